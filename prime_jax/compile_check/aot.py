"""Does a run fit a slice that nobody has rented? The compiler for its chips answers.

The real training step, optimizer and donation included, is compiled for the slice's topology in a
process of its own (`worker`), which needs the compiler (libtpu) and no TPU. Compiling takes
half a minute to some minutes; answers are cached where the caller says.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from prime_jax import __version__, flops, step
from prime_jax.config import MeshConfig, RunConfig
from prime_jax.errors import UserError
from prime_jax.hardware import roofline
from prime_jax.hardware.slices import Slice, human_bytes
from prime_jax.runtime import meshes
from prime_jax.runtime.records import read_json, write_json_atomic
from prime_jax.settings import to_dict

TRIES = 6  # of autofit
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # or libtpu waits for the metadata server of a cloud
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process waits for a lock
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # these three only keep libtpu quiet
    "TPU_WORKER_ID": "0",
}
UNWANTED = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # of the caller: virtual devices, dumps
PACKAGE = Path(__file__).parents[1]
SOURCES = (  # what may change a training step or what is read from it, below the package
    *("step.py", "model.py", "objectives.py", "corrupt.py", "schedule.py", "subtokens.py"),
    *("optim.py", "flops.py", "runtime/sharding.py", "runtime/meshes.py", "hardware/*.py"),
    *("compile_check/*.py", "kernels/*.py"),
)
Compile = Callable[[RunConfig, Slice], dict[str, Any]]


class Progress:
    """Told about compilations; this one shows nothing."""

    def expect(self, total: int) -> None:
        """So many are known to be needed."""

    def expect_more(self) -> None:
        """One that did not fit makes another one necessary."""

    def watch(self, config: RunConfig, text: str) -> AbstractContextManager[None]:
        """Entered for as long as one takes."""
        return nullcontext()


SILENT = Progress()


@dataclass(frozen=True)
class Verdict:
    """A shape on a slice, judged by the compiler.

    Attributes:
        config: with the mesh settings that were tried.
        slice_: the slice.
        record: what `worker.check` found.
        tried: all that `autofit` compiled in vain, this one included; empty otherwise.
    """

    config: RunConfig
    slice_: Slice
    record: dict[str, Any]
    tried: tuple[RunConfig, ...] = ()

    @property
    def fits(self) -> bool:
        return self.record["verdict"] == "OK"

    @property
    def mesh(self) -> meshes.Choice:
        return meshes.Choice(*self.record["mesh"], self.record["why"])

    @property
    def limit(self) -> float:
        return self.record["limit"]

    @property
    def total(self) -> float:
        """Bytes per chip; where the compiler refused without a number, ours."""
        memory = self.record["memory"]
        if "total" in memory:
            return memory["total"]
        return sum(memory.values()) if memory else sum(roofline.memory(self.config, self.mesh))

    @property
    def temporaries(self) -> float:
        """Bytes per chip; a refused program's are what is not state."""
        found = self.record["memory"].get("temporaries")
        return self.total - roofline.memory(self.config, self.mesh)[0] if found is None else found

    @property
    def prediction(self) -> roofline.Prediction:
        return roofline.predict(self.config, self.mesh, self.slice_.chip, self.slice_.slices)


@cache
def program_source() -> str:
    """Digest of the code that makes the program and reads it."""
    digest = hashlib.sha256()
    for file in sorted(file for name in SOURCES for file in PACKAGE.glob(name)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> str:
    """The versions that a verdict depends on."""
    found = [f"prime_jax {__version__}"]
    for package in ("jax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def key(config: RunConfig, slice_: Slice) -> str:
    """Names the question: what is compiled (mesh settings included), for what, and by what."""
    asked = [to_dict(step.shape_of(config)), slice_.name, compiler(), program_source()]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def check(
    config: RunConfig,
    slice_: Slice,
    cache: Path | None = None,
    compile: Compile | None = None,
    progress: Progress = SILENT,
    text: str = "as written",
) -> Verdict:
    """Compile the training step of `config` for `slice_`, or remember that it was.

    Args:
        cache: directory of earlier answers.
        compile: stands in for the compiler (tests).
        progress: told about the compilation, with `text`.

    Raises:
        UserError: no compiler for these chips here, a mesh that does not fit, or the compiler
            failed for another reason than memory.
    """
    meshes.choose(config, slice_.devices, slice_.slices)
    known = cache / f"{key(config, slice_)}.json" if cache else None
    if known and known.exists():
        with progress.watch(config, text):
            return Verdict(config, slice_, read_json(known))
    with progress.watch(config, text):
        record = (compile or compile_apart)(config, slice_)
    if known:
        known.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(known, {**record, "compiler": compiler()})
    return Verdict(config, slice_, record)


def compile_apart(config: RunConfig, slice_: Slice) -> dict[str, Any]:
    """`worker.check` in its own process: its environment is set, and a crash is its own."""
    kept = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
        write_json_atomic(question, {"config": to_dict(config), "slice": slice_.name})
        command = [
            sys.executable,
            "-m",
            "prime_jax.compile_check.worker",
            str(question),
            str(answer),
        ]
        done = subprocess.run(
            command, env=kept | ENVIRONMENT, capture_output=True, text=True, check=False
        )
        if not answer.exists():
            if done.returncode < 0:  # libtpu has died, and its last line says nothing
                raise UserError(
                    f"the compiler for {slice_.name} crashed (signal {-done.returncode}): a fault of "
                    "its own, which another seq_len, batch or slice may not meet"
                )
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the compiler for {slice_.name} failed ({done.returncode}): {last}")
        record = read_json(answer)
    if "refused" in record:
        raise UserError(record["refused"])
    return record


def alternatives(config: RunConfig, slice_: Slice) -> list[RunConfig]:
    """`config` under other recomputation, micro-batches and tensor parallelism, fastest first.

    What the config says of replicas and shared parameters stays. No chip is idle that need not be.
    """
    found = []
    for candidate in _variants(config):
        try:
            mesh = meshes.choose(candidate, slice_.devices, slice_.slices)
        except UserError:
            continue
        seconds = roofline.predict(candidate, mesh, slice_.chip, slice_.slices).step_seconds
        found.append((-mesh.devices, seconds, candidate.mesh.accumulate, candidate))
    most = min((item[0] for item in found), default=0)
    usable = sorted((item for item in found if item[0] == most), key=lambda item: item[1:3])
    return [item[-1] for item in usable]


def _variants(config: RunConfig) -> Iterator[RunConfig]:
    for model in [config.mesh.model] if config.mesh.model else [1, 2, 4, 8]:
        for remat in ("none", "dots", "full"):
            accumulate = 1
            while accumulate <= config.batch_size:
                if config.batch_size % accumulate == 0:
                    mesh = replace(config.mesh, model=model, remat=remat, accumulate=accumulate)
                    yield replace(config, mesh=mesh)
                accumulate *= 2


def expected(config: RunConfig, slice_: Slice, seen: Sequence[Verdict] = ()) -> float:
    """Bytes per chip on paper, corrected by how far off the paper was for the last verdict seen on
    the same mesh. What another mesh was off by says nothing: other arrays fill its memory."""
    mesh = meshes.choose(config, slice_.devices, slice_.slices)
    state, temporaries = roofline.memory(config, mesh)
    for verdict in reversed(seen):
        if verdict.mesh[:3] == mesh[:3]:
            paper = roofline.memory(verdict.config, verdict.mesh)[1]
            return state + temporaries * verdict.temporaries / paper
    return state + temporaries


def autofit(
    config: RunConfig,
    slice_: Slice,
    cache: Path | None = None,
    compile: Compile | None = None,
    progress: Progress = SILENT,
) -> Verdict:
    """The fastest combination that fits, among at most `TRIES` that are compiled.

    Tried in the order of predicted speed, leaving out those that by what was seen cannot fit; the
    last try is the one that should need least. Without success, the verdict that came closest.
    """
    found, seen = alternatives(config, slice_), []
    if not found:
        return check(
            config, slice_, cache, compile, progress
        )  # which says what is wrong with its mesh
    # The state is known exactly. Where it alone is too much everywhere, one try proves it.
    waiting = [c for c in found if _state(c, slice_) <= slice_.chip.memory] or [
        min(found, key=lambda c: expected(c, slice_))
    ]
    while waiting and len(seen) < TRIES:
        sizes = [expected(c, slice_, seen) for c in waiting]
        hopeful = [c for c, size in zip(waiting, sizes, strict=True) if size <= slice_.chip.memory]
        if hopeful and len(seen) < TRIES - 1:
            chosen = hopeful[0]
        else:
            chosen = waiting[sizes.index(min(sizes))]
        text = f"try {len(seen) + 1} of at most {TRIES}, {describe(chosen.mesh)}"
        verdict = check(
            chosen, slice_=slice_, cache=cache, compile=compile, progress=progress, text=text
        )
        if verdict.fits:
            return verdict
        seen.append(verdict)
        waiting.remove(chosen)
    closest = min(seen, key=lambda verdict: verdict.total)
    return replace(closest, tried=tuple(verdict.config for verdict in seen))


def _state(config: RunConfig, slice_: Slice) -> float:
    return roofline.memory(config, meshes.choose(config, slice_.devices, slice_.slices))[0]


def fixes(verdict: Verdict) -> list[str]:
    """Single changes that should make an oversized run fit, each with the memory expected."""
    config, slice_ = verdict.config, verdict.slice_
    now, out = config.mesh, []
    changes = [replace(now, remat="full")] if now.remat != "full" else []
    changes += _more_parts(config)
    mesh = verdict.mesh
    if mesh.replica > slice_.slices:  # parameters are copied that could be shared
        groups = mesh.replica * mesh.data
        changes.append(replace(now, replica=slice_.slices, data=groups // slice_.slices))
    changes += [replace(now, model=size) for size in (2, 4, 8) if size > mesh.model]
    wanted: set[str] = set()
    for change in changes:
        changed = replace(config, mesh=change)
        try:
            size = expected(changed, slice_, [verdict])
        except UserError:
            continue
        if changed in verdict.tried:
            continue
        names = describe(change, now)
        kind = names.split(" = ")[0]
        if size <= verdict.limit and kind not in wanted:
            wanted.add(kind)
            out.append(f"{names} (about {human_bytes(size)})")
    if not out:
        # Shared by all, a chip's part of the state is smallest.
        state = roofline.state_bytes(config, flops.param_counts(config)["total"])
        chips = state / verdict.limit / slice_.chip.per_chip
        search = "none that --autofit compiled fits: use" if verdict.tried else "try --autofit or"
        out.append(
            f"no single change is enough; {search} more chips"
            f" (the state alone, shared by all, fills {chips:.1f} chips)"
        )
    return out


def _more_parts(config: RunConfig) -> list[MeshConfig]:
    """More micro-batches, fewest first."""
    now, out, parts = config.mesh, [], 2 * config.mesh.accumulate
    while parts <= config.batch_size:
        if config.batch_size % parts == 0:
            out.append(replace(now, accumulate=parts))
        parts *= 2
    return out


def describe(mesh: MeshConfig, before: MeshConfig | None = None) -> str:
    """Settings in words; with `before`, only those that differ."""
    old = to_dict(before) if before else {}
    changed = {k: v for k, v in to_dict(mesh).items() if v != old.get(k) and (before or v)}
    return ", ".join(f"mesh.{name} = {value}" for name, value in changed.items())
