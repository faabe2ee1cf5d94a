"""Compiles one training step for devices that are not here; `aot` runs it as a process of its own.

The process computes on the CPU, whatever it compiles for. Reads a JSON object {config, slice} from
the file named first and writes its answer to the file named second.
"""

import importlib.metadata
import re
import sys
import time
from pathlib import Path
from typing import Any

from prime_jax import optim, step
from prime_jax.compile_check import gpu_target, hlo
from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.hardware import slices
from prime_jax.hardware.slices import Slice
from prime_jax.runtime import records, sharding
from prime_jax.settings import from_dict

SCHEMA = 1
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Ran out of memory", "out of memory")


def devices_of(slice_: Slice) -> list[Any]:
    """The devices of a slice, described to the compiler.

    Raises:
        UserError: no compiler for them on this machine, with how to get it.
    """
    from jax.experimental import topologies

    if slice_.chip.platform == "cuda":
        return gpu_target.devices(slice_)
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "no TPU compiler here (libtpu); get it with: pip install 'prime_jax[tpu-compile]'"
        ) from None
    options: dict[str, Any] = {}
    if slice_.generation == "v4":
        options["chip_config_name"] = "megacore"  # two cores that are one device, as on Cloud TPU
    if slice_.chips == slice_.slices:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slice_.slices > 1:
        options["num_slices"] = slice_.slices
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=slice_.topology, **options
    ).devices
    return list(found)


def arguments(program: step.Program) -> tuple:
    """Shapes, types and shardings of what the training step is called with."""
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


def check(config: RunConfig, slice_: Slice) -> dict[str, Any]:
    """Compile the step; the record that `aot.Verdict` reads."""
    program = step.make_program(step.shape_of(config), 0, devices_of(slice_))
    out: dict[str, Any] = {
        "schema": SCHEMA,
        "slice": slice_.name,
        "mesh": list(program.mesh_choice[:3]),
        "why": program.mesh_choice.why,
        "limit": slice_.chip.memory,
    }
    start = time.perf_counter()
    try:
        compiled = program.train.compile(*arguments(program))
    except Exception as error:
        if not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        seconds = time.perf_counter() - start
        lowered = program.train.lower(*arguments(program))
        text = lowered.as_text(dialect="hlo", debug_info=True)
        found = _found(hlo.largest(text, hlo.KEPT), hlo.collectives(text))
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
    """What can be learnt from the compiler's refusal: the total, and its own limit.

    It speaks of temporaries and counts the donated state among them: of programs that grow past
    the limit, the number is the sum of what it says of the last that fits.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = [float(n) * units[u] for n, u in re.findall(r"\((\d+\.?\d*)([KMGT])\)", message)]
    memory = {"total": sizes[0]} if sizes else {}
    limit = {"limit": sizes[1]} if len(sizes) > 1 else {}
    return {"verdict": "OOM", "memory": memory, "message": message.splitlines()[0]} | limit


def main(question: Path, answer: Path) -> int:
    asked = records.read_json(question)
    config = from_dict(RunConfig, asked["config"])
    try:
        out = check(config, slices.parse(asked["slice"]))
    except UserError as error:
        out = {"schema": SCHEMA, "refused": str(error)}
    records.write_json_atomic(answer, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
