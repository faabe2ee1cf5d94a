"""Ahead-of-time check whether a run fits a slice, with the compiler for its chips.

The real training step, including optimizer and donation, is compiled for the slice's topology in a
separate process (`worker`), which needs the compiler (libtpu) but no TPU. Compiling takes half a
minute to some minutes; the worker caches verdicts in a directory of the caller.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prime_jax import flops
from prime_jax.config import MeshConfig, RunConfig
from prime_jax.errors import UserError
from prime_jax.hardware import roofline
from prime_jax.hardware.slices import Slice, human_bytes
from prime_jax.runtime import meshes, storage
from prime_jax.runtime.records import read_json, write_json_atomic
from prime_jax.settings import to_dict

TRIES = 6  # of autofit
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # otherwise libtpu waits for a metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise a second process waits for a lock
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # these three only silence libtpu
    "TPU_WORKER_ID": "0",
}
UNWANTED = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # not inherited: virtual devices, dumps
Compile = Callable[[RunConfig, Slice, storage.Path | None], dict[str, Any]]


class Progress:
    """Interface for the progress of compilations; this one shows nothing."""

    def expect(self, total: int) -> None:
        """The number of compilations that are known to be needed."""

    def expect_more(self) -> None:
        """One more compilation is needed, because one did not fit."""

    def watch(self, config: RunConfig, text: str) -> AbstractContextManager[None]:
        """Context of one compilation."""
        return nullcontext()


SILENT = Progress()


@dataclass(frozen=True)
class Verdict:
    """The compiler's verdict on a shape and a slice.

    Attributes:
        config: with the mesh settings that were compiled.
        slice_: the slice.
        record: result of `worker.check`.
        tried: if `autofit` failed, all configs that it compiled; empty otherwise.
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
        """Bytes per chip; our estimate if the compiler failed without a number."""
        memory = self.record["memory"]
        if "total" in memory:
            return memory["total"]
        return sum(memory.values()) if memory else sum(roofline.memory(self.config, self.mesh))

    @property
    def temporaries(self) -> float:
        """Bytes per chip; of a program that failed to compile, the total less the state."""
        found = self.record["memory"].get("temporaries")
        return self.total - roofline.memory(self.config, self.mesh)[0] if found is None else found

    @property
    def prediction(self) -> roofline.Prediction:
        return roofline.predict(self.config, self.mesh, self.slice_.chip, self.slice_.slices)


def check(
    config: RunConfig,
    slice_: Slice,
    cache: storage.Path | None = None,
    compile: Compile | None = None,
    progress: Progress = SILENT,
    text: str = "as written",
) -> Verdict:
    """Compile the training step of `config` for `slice_`, or read the cached verdict.

    Args:
        cache: directory of cached verdicts.
        compile: replaces the compiler (tests).
        progress: entered around the compilation, with `text`.

    Raises:
        UserError: no compiler for these chips on this machine, a mesh that does not fit, or a
            compiler error other than memory.
    """
    meshes.choose(config, slice_.devices, slice_.slices)
    with progress.watch(config, text):
        return Verdict(config, slice_, (compile or compile_in_subprocess)(config, slice_, cache))


def compile_in_subprocess(
    config: RunConfig, slice_: Slice, cache: storage.Path | None = None
) -> dict[str, Any]:
    """`worker.check` in its own process, for its environment and in case the compiler crashes."""
    inherited = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
        where = str(cache if storage.is_remote(cache) else cache.absolute()) if cache else ""
        asked = {"config": to_dict(config), "slice": slice_.name, "cache": where}
        write_json_atomic(question, asked)
        command = [
            sys.executable,
            "-m",
            "prime_jax.compile_check.worker",
            str(question),
            str(answer),
        ]
        done = subprocess.run(
            command, env=inherited | ENVIRONMENT, capture_output=True, text=True, check=False
        )
        if not answer.exists():
            if done.returncode < 0:  # libtpu crashed; its last line is not informative
                raise UserError(
                    f"the compiler for {slice_.name} crashed (signal {-done.returncode}): a bug in "
                    "the compiler; try another seq_len, batch or slice"
                )
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the compiler for {slice_.name} failed ({done.returncode}): {last}")
        record = read_json(answer)
    if "refused" in record:
        raise UserError(record["refused"])
    return record


def alternatives(config: RunConfig, slice_: Slice) -> list[RunConfig]:
    """`config` with other recomputation, micro-batches and tensor parallelism, fastest first.

    Settings of replica and data parallelism do not change. Only meshes with the fewest idle chips.
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
    """Estimated bytes per chip, corrected by the error of the estimate for the last verdict on the
    same mesh. Errors on other meshes are not used: other arrays dominate their memory."""
    mesh = meshes.choose(config, slice_.devices, slice_.slices)
    state, temporaries = roofline.memory(config, mesh)
    for verdict in reversed(seen):
        if verdict.mesh[:3] == mesh[:3]:
            estimate = roofline.memory(verdict.config, verdict.mesh)[1]
            return state + temporaries * verdict.temporaries / estimate
    return state + temporaries


def autofit(
    config: RunConfig,
    slice_: Slice,
    cache: storage.Path | None = None,
    compile: Compile | None = None,
    progress: Progress = SILENT,
) -> Verdict:
    """The fastest combination that fits, among at most `TRIES` that are compiled.

    Tried in the order of predicted speed, without those that cannot fit by the estimate so far; the
    last try is the one with the smallest estimate. If none fits, the verdict that came closest.
    """
    found, seen = alternatives(config, slice_), []
    if not found:
        return check(config, slice_, cache, compile, progress)  # raises: its mesh does not fit
    # The size of the state is exact. If it is too large for every candidate, one try is enough.
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
    """Single changes that should make an oversized run fit, each with the expected memory."""
    config, slice_ = verdict.config, verdict.slice_
    now, out = config.mesh, []
    changes = [replace(now, remat="full")] if now.remat != "full" else []
    changes += _more_parts(config)
    mesh = verdict.mesh
    if mesh.replica > slice_.slices:  # replicated parameters could be sharded
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
        # Sharded over all devices, the state per chip is smallest.
        state = roofline.state_bytes(config, flops.param_counts(config)["total"])
        chips = state / verdict.limit / slice_.chip.per_chip
        search = "nothing that --autofit tried fits: use" if verdict.tried else "try --autofit or"
        out.append(
            f"no single change is enough; {search} more chips"
            f" (the state alone, sharded over all chips, needs {chips:.1f} chips)"
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
    """The settings as text; with `before`, only those that differ."""
    old = to_dict(before) if before else {}
    changed = {k: v for k, v in to_dict(mesh).items() if v != old.get(k) and (before or v)}
    return ", ".join(f"mesh.{name} = {value}" for name, value in changed.items())
