"""Compiles one training step for absent devices; `aot` runs it as a separate process.

The process itself uses the CPU. It reads a JSON object {config, slice, cache} from the file in the
first argument and writes its result to the file in the second. Verdicts are cached under the digest
of the program that the compiler is given: whatever changes the program, a rule of the mesh or the
choice of a kernel, changes the key, and nothing else does.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from prime_jax import optim, step
from prime_jax.compile_check import gpu_target, hlo
from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.hardware import chips, slices
from prime_jax.hardware.slices import Slice
from prime_jax.runtime import records, sharding, storage
from prime_jax.settings import from_dict

SCHEMA = 1
COMPILERS = ("jax", "jaxlib", "libtpu", *gpu_target.PLUGINS)
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Ran out of memory", "out of memory")


def devices_of(slice_: Slice) -> list[Any]:
    """The devices of a slice, from a topology description.

    Raises:
        UserError: no compiler for them on this machine; with how to install it.
    """
    from jax.experimental import topologies

    if slice_.chip.platform == "cuda":
        return gpu_target.devices(slice_)
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "no TPU compiler (libtpu) on this machine; install it with: "
            "pip install 'prime_jax[tpu-compile]'"
        ) from None
    options: dict[str, Any] = dict(slice_.chip.compiler)
    if slice_.chips == slice_.slices:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slice_.slices > 1:
        options["num_slices"] = slice_.slices
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=slice_.topology, **options
    ).devices
    return list(found)


def arguments(program: step.Program) -> tuple:
    """Shapes, types and shardings of the arguments of the training step."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    c = program.parts.config
    batch = NamedSharding(program.mesh, sharding.BATCH)
    tokens = jax.ShapeDtypeStruct((c.batch_size, c.data.seq_len), jnp.int32, sharding=batch)
    rows = jax.ShapeDtypeStruct((c.batch_size,), jnp.int32, sharding=batch)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    horizon = jax.tree.map(lambda _: scalar, optim.horizon(c))
    return program.abstract, tokens, rows, jax.ShapeDtypeStruct((), jnp.uint32), horizon


def compilers() -> dict[str, str]:
    """Versions of what is installed here of the compilers."""
    found = {}
    for package in COMPILERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def key(program: str, slice_: Slice) -> str:
    """Names the question: a program in StableHLO, what it is compiled for, and by what."""
    options = chips.compiler_options(slice_.chip.kind)
    asked = [SCHEMA, program, slice_.name, options, compilers()]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def check(config: RunConfig, slice_: Slice, cache: storage.Path | None = None) -> dict[str, Any]:
    """Compile the step, or remember that its program was compiled.

    Args:
        cache: directory of earlier answers.
    Returns:
        The record that `aot.Verdict` reads.
    """
    drawn = dataclasses.replace(config.subtokens, codes="")  # which codes changes no shape
    shape = step.shape_of(dataclasses.replace(config, subtokens=drawn))
    program = step.make_program(shape, 0, devices_of(slice_))
    lowered = program.train.lowered(*arguments(program))
    if cache is None:
        return judged(program, lowered, slice_)
    known = cache / f"{key(lowered.as_text(), slice_)}.json"
    if storage.exists(known):
        return records.read_json(known)
    record = judged(program, lowered, slice_)
    storage.make_folder(cache)
    records.write_json_atomic(known, {**record, "compilers": compilers()})
    return record


def judged(program: step.Program, lowered: Any, slice_: Slice) -> dict[str, Any]:
    """What the compiler says of the step."""
    out: dict[str, Any] = {
        "schema": SCHEMA,
        "slice": slice_.name,
        "mesh": list(program.mesh_choice[:3]),
        "why": program.mesh_choice.why,
        "limit": slice_.chip.memory,
    }
    start = time.perf_counter()
    try:
        compiled = program.train.compile(*arguments(program), lowered=lowered)
    except Exception as error:
        if not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        seconds = time.perf_counter() - start
        text = lowered.as_text(dialect="hlo", debug_info=True)
        found = _found(hlo.largest(text, hlo.NOT_FUSED), hlo.collectives(text))
        return out | _refused(str(error)) | found | {"as_written": True, "compile_seconds": seconds}
    stats, text = compiled.memory_analysis(), compiled.as_text()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    fits = sum(memory.values()) <= slice_.chip.memory
    return out | {
        "verdict": "OK" if fits else "OOM",
        "memory": memory,
        "compile_seconds": time.perf_counter() - start,
        **_found(hlo.largest(text), hlo.collectives(text)),
    }


def _found(largest: hlo.Array | None, collectives: list[hlo.Collective]) -> dict[str, Any]:
    return {
        "largest": largest._asdict() if largest else None,
        "collectives": [one._asdict() for one in collectives],
    }


def _refused(message: str) -> dict[str, Any]:
    """The total and the limit from the compiler's out-of-memory message.

    The message reports temporaries, but includes the donated state: for programs that grow past the
    limit, the number continues the total of the last program that fits.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = [float(n) * units[u] for n, u in re.findall(r"\((\d+\.?\d*)([KMGT])\)", message)]
    memory = {"total": sizes[0]} if sizes else {}
    limit = {"limit": sizes[1]} if len(sizes) > 1 else {}
    return {"verdict": "OOM", "memory": memory, "message": message.splitlines()[0]} | limit


def main(question: Path, answer: Path) -> int:
    asked = records.read_json(question)
    config, slice_ = from_dict(RunConfig, asked["config"]), slices.parse(asked["slice"])
    cache = storage.path(asked["cache"]) if asked["cache"] else None
    try:
        out = check(config, slice_, cache)
    except UserError as error:
        out = {"schema": SCHEMA, "refused": str(error)}
    records.write_json_atomic(answer, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
