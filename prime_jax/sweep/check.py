"""Compile the shapes of a plan for a slice: largest first, until one of each family fits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from prime_jax import flops, step
from prime_jax.compile_check import aot
from prime_jax.compile_check.aot import Verdict
from prime_jax.config import MeshConfig, RunConfig
from prime_jax.hardware.slices import Slice, human_bytes
from prime_jax.kernels import selection
from prime_jax.kernels.selection import NOTHING, Choices
from prime_jax.sweep.plan import Candidate

CACHE = Path("cache", "checks")  # below ROOT


@dataclass(frozen=True)
class Options:
    """Attributes:
    every: compile every shape, not only the largest of each family.
    autofit: search for mesh settings with which a shape fits.
    cache: directory of cached verdicts.
    choices: kernels measured on the slice's chip, as its runs will find them.
    """

    every: bool = False
    autofit: bool = False
    cache: Path | None = None
    choices: Choices = NOTHING


def check(
    listed: Sequence[Candidate],
    slice_: Slice,
    options: Options,
    compile: aot.Compile | None = None,
    progress: aot.Progress = aot.SILENT,
) -> tuple[list[Candidate], list[Verdict]]:
    """Compile shapes, family by family, until one fits; those that do not fit are dropped.

    If a shape fits, all smaller ones of its family are assumed to fit; with `autofit` they get the
    settings found for it.

    Args:
        progress: receives the number of compilations, and is entered around each.
    Raises:
        UserError: no compiler on this machine, or a mesh that does not fit the slice.
    """
    out, verdicts = list(listed), []
    families = _shapes(listed, slice_, options.choices)
    total = sum(len(shapes) if options.every else 1 for shapes in families.values())
    progress.expect(total)
    one = partial(aot.autofit if options.autofit else aot.check, progress=progress)
    for shapes in families.values():
        for number, (config, members) in enumerate(shapes):
            verdict = one(config, slice_, options.cache, compile)
            verdicts.append(verdict)
            for i in members:
                out[i] = _with_verdict(out[i], verdict)
            if verdict.fits and not options.every:
                if options.autofit:
                    rest = [i for _, members in shapes[number + 1 :] for i in members]
                    for i in rest:
                        out[i] = _with_mesh(out[i], verdict.config.mesh)
                break
            if not options.every and number + 1 < len(shapes):
                progress.expect_more()
    return out, verdicts


def _shapes(
    listed: Sequence[Candidate], slice_: Slice, choices: Choices
) -> dict[str, list[tuple[RunConfig, list[int]]]]:
    """By family: distinct programs and the candidates that share each, largest first."""
    groups: dict[tuple[str, RunConfig], tuple[RunConfig, list[int]]] = {}
    for i, candidate in enumerate(listed):
        if candidate.config is None or candidate.drop:
            continue
        kernels = selection.resolved(candidate.config, slice_.chip.device_kind, choices)
        config = replace(candidate.config, kernels=kernels)
        shape = (candidate.row.family, step.shape_of(config))
        groups.setdefault(shape, (config, []))[1].append(i)
    out: dict[str, list[tuple[RunConfig, list[int]]]] = {}
    for (family, _), group in sorted(groups.items(), key=lambda item: _size(item[1][0])):
        out.setdefault(family, []).append(group)
    return out


def _size(config: RunConfig) -> tuple[int, int]:
    """Sort key: parameters, then tokens of a micro-batch, both descending."""
    rows = config.batch_size // config.mesh.accumulate
    return -flops.param_counts(config)["total"], -rows * config.data.seq_len


def _with_verdict(candidate: Candidate, verdict: Verdict) -> Candidate:
    if verdict.fits:
        return _with_mesh(candidate, verdict.config.mesh)
    over = human_bytes(verdict.total - verdict.limit)
    reason = f"{over} too much for {verdict.slice_.name}: {aot.fixes(verdict)[0]}"
    return replace(candidate, drop=reason)


def _with_mesh(candidate: Candidate, mesh: MeshConfig) -> Candidate:
    """The mesh is not part of a run's identity: its id does not change."""
    if candidate.config is None or candidate.drop:
        return candidate
    if candidate.config.batch_size % mesh.accumulate:
        return candidate
    return replace(candidate, config=replace(candidate.config, mesh=mesh))
