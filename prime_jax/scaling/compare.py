"""Families against a baseline: the compute multiplier, who is lower, and whose exponents differ.

All families are resampled together on the grid that they share (`grid.weights`), so the spread of
a difference is that of the difference. A comparison of different kinds of number is refused
unless the runs were read with `allow_mixed_kinds`, and then carries a note.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prime_jax.config import nearest
from prime_jax.errors import UserError
from prime_jax.scaling import (
    approach2,
    approach3,
    bootstrap,
    grid,
    joint,
    labels,
    multiplier,
    parametric,
)
from prime_jax.scaling.diagnostics import Diagnostic, refuse, warn
from prime_jax.scaling.joint import SharedFit
from prime_jax.scaling.laws import Compute, Law, exponent, fit_compute
from prime_jax.scaling.multiplier import Multiplier, Side
from prime_jax.scaling.points import Points, Runs
from prime_jax.scaling.settings import Settings

Array = NDArray[np.float64]

CURVE = 33  # budgets of a curve
SIMULATIONS = 299  # of a likelihood-ratio test, at most
MIXED = "mixed kinds of number: {}; a difference between them is not one between models"


@dataclass(frozen=True)
class Difference:
    """The exponent a of the family less that of the baseline, by one approach."""

    value: float
    interval: list[float] | None

    @property
    def significant(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Contrast:
    """A family against the baseline.

    Attributes:
        at_family, at_baseline: the multiplier at the budgets of the family (the baseline), where C
            is what that one spends; the curves between its smallest and largest budget.
        lower_flops, lower: budgets of either, and the probability that the family's best loss is
            lower there, from the laws and between the minima (NaN beyond them).
        lower_in_range: whether a budget lies within the data of both.
        exponents: differences of a, by approach 3 and approach 2 (None where that is refused).
        tests: of shared exponents, of a shared E.
    """

    at_family: Multiplier
    at_baseline: Multiplier
    family_curve: Multiplier
    baseline_curve: Multiplier
    lower_flops: Array
    lower: tuple[Array, Array]
    lower_in_range: NDArray[np.bool_]
    exponents: tuple[Difference, Difference | None]
    tests: tuple[SharedFit, ...]


@dataclass(frozen=True)
class Pair:
    """`contrast` is None where the comparison is refused; `mixed` is the note, or empty."""

    points: Points
    contrast: Contrast | None
    mixed: str
    diagnostics: tuple[Diagnostic, ...]


@dataclass(frozen=True)
class Comparison:
    runs: Runs
    settings: Settings
    baseline: str
    pairs: dict[str, Pair]

    @property
    def refused(self) -> bool:
        return any(f.refusal for pair in self.pairs.values() for f in pair.diagnostics)


@dataclass(frozen=True)
class _Fitted:
    """The parts of a fit that a comparison needs."""

    points: Points
    compute: Compute
    problem: approach3.Problem
    fit: approach3.Fit
    isoflop: approach2.Isoflop


@dataclass(frozen=True)
class _Prepared:
    """A fitted family, and its replicates drawn together with the others'."""

    family: _Fitted
    replicates: Law
    cell_n: NDArray[np.intp]
    side: Side
    slopes_R: Array | None  # a of approach 2, redrawn


def compare(
    runs: Runs,
    baseline: str,
    against: Sequence[str],
    settings: Settings,
    progress: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Compare families with a baseline.

    Args:
        against: the families; all others if empty.
        progress: is called with what is being done.

    Raises:
        UserError: a family is not there, or there is nothing to compare.
    """
    names = list(dict.fromkeys(against)) or [name for name in runs.families if name != baseline]
    for name in (baseline, *names):
        if name not in runs.families:
            raise UserError(f"{runs.source}: no family {name!r}{nearest(name, runs.families)}")
    if baseline in names or not names:
        raise UserError(f"{runs.source}: {baseline} needs another family to be compared with")
    base = runs.families[baseline]
    refusals = {name: _refusals(base, runs.families[name], runs) for name in names}
    fits = {}
    for name in names:
        refusals[name] = refusals[name] or _unfitted(base) + _unfitted(runs.families[name])
        for needed in (baseline, name):
            if not refusals[name] and needed not in fits:
                progress(f"fitting {needed}")
                fits[needed] = _fit(runs.families[needed], settings)
    progress("resampling all families together")
    ready = _prepare(fits, settings) if fits else {}
    pairs = {}
    for name in names:
        progress(f"comparing {name} with {baseline}")
        points, mixed = runs.families[name], _mixed(base, runs.families[name])
        if refusals[name]:
            pairs[name] = Pair(points, None, mixed, tuple(refusals[name]))
            continue
        contrast = _contrast(ready[name], ready[baseline], settings)
        diagnostics = [*_notes(base, points), *_findings(name, baseline, contrast, settings)]
        pairs[name] = Pair(points, contrast, mixed, tuple(diagnostics))
    return Comparison(runs, settings, baseline, pairs)


def _mixed(base: Points, points: Points) -> str:
    if base.measure.group == points.measure.group:
        return ""
    shown = "; ".join(f"{part.family} {_measure(part)}" for part in (base, points))
    return MIXED.format(shown)


def _measure(points: Points) -> str:
    measure = points.measure
    sides = (f"{n} {v}" for n in ("tokenizer", "eval_set") if (v := getattr(measure, n)))
    return ", ".join((measure.label, *sides))


def _refusals(base: Points, points: Points, runs: Runs) -> list[Diagnostic]:
    if runs.choice.allow_mixed_kinds or not _mixed(base, points):
        return []
    same = base.measure.group[0] == points.measure.group[0]
    code = "mixed_evaluations" if same else "mixed_kinds"
    shown = "; ".join(f"{part.family}: {_measure(part)}" for part in (base, points))
    return [refuse(code, f"these losses cannot be compared ({shown})")]


def _notes(base: Points, points: Points) -> list[Diagnostic]:
    mixed = _mixed(base, points)
    if not mixed:
        return []
    same = base.measure.group[0] == points.measure.group[0]
    return [warn("mixed_evaluations" if same else "mixed_kinds", mixed)]


def _unfitted(points: Points) -> list[Diagnostic]:
    """Why approach 3 is refused, if it is."""
    whys = [
        diagnostic for diagnostic in (*points.diagnostics, parametric.too_few(points)) if diagnostic
    ]
    return [
        refuse(why.code, f"{points.family} has no law: {why.message}")
        for why in whys
        if why.refusal
    ]


def _fit(points: Points, settings: Settings) -> _Fitted:
    compute = fit_compute(points.flops, points.params, points.tokens)
    problem, fitted, _ = parametric.weighted(points, settings)
    return _Fitted(
        points, compute, problem, fitted, approach2.fit(points, compute, settings.approach2)
    )


def _prepare(fits: dict[str, _Fitted], settings: Settings) -> dict[str, _Prepared]:
    replicates = _replicates(list(fits.values()), settings)
    where = _cells([family.points for family in fits.values()])
    out = {}
    for k, (name, family) in enumerate(fits.items()):
        points, law = family.points, family.fit.law
        inside = family.isoflop.inside
        side = Side(
            law=law,
            replicates=Law(*(np.asarray(v)[:, None] for v in _values(replicates[k]))),
            compute=family.compute,
            knots_K=np.log([curve.flops for curve in inside]),
            log_loss_K=np.log([curve.optimum.loss for curve in inside]),
            log_loss_RxK=multiplier.minimum_losses(
                inside, settings.replicates, settings.seed + 1 + k
            ),
            low=float(points.budgets[0]),
            high=float(points.budgets[-1]),
        )
        slopes = None
        if family.isoflop.a is not None:
            draws = approach2.redraw(family.isoflop, settings.replicates, settings.seed + 1 + k)
            slopes = None if draws is None else draws.a
        out[name] = _Prepared(family, replicates[k], where[k], side, slopes)
    return out


def _replicates(fits: list[_Fitted], settings: Settings) -> list[Law]:
    """Laws of all families under runs drawn together.

    A family with checkpoints of one run cannot be drawn by cells: it gets the wild cluster
    bootstrap, independent of the others.
    """
    alone = [family.points for family in fits if family.points.run is None]
    drawn = iter(grid.weights(alone, settings.replicates, settings.seed) if alone else ())
    out = []
    for k, family in enumerate(fits, 1):
        run_n = family.points.run
        if run_n is None:
            out.append(bootstrap.laws(family.problem, family.fit, next(drawn)))
        else:
            seed = settings.seed + k
            draws = bootstrap.wild(family.problem, family.fit, run_n, settings.replicates, seed)
            out.append(draws)
    return out


def _cells(parts: list[Points]) -> list[NDArray[np.intp]]:
    """Those of the grid; the checkpoints of one run make a cell."""
    where, budget = grid.cells(parts)
    first, out = len(budget), []
    for part, cell_n in zip(parts, where, strict=True):
        out.append(cell_n if part.run is None else first + part.run)
        first += len(cell_n)
    return out


def _contrast(family: _Prepared, base: _Prepared, settings: Settings) -> Contrast:
    mine, yours = family.family.points.budgets, base.family.points.budgets
    level, side, other = settings.level, family.side, base.side
    both = np.unique(np.concatenate([mine, yours]))
    tests = tuple(
        joint.likelihood_ratio(
            (base.family.problem, family.family.problem),
            fits=(base.family.fit, family.family.fit),
            names=names,
            cells=(base.cell_n, family.cell_n),
            replicates=min(SIMULATIONS, settings.replicates),
            seed=settings.seed,
        )
        for names in (joint.EXPONENTS, joint.IRREDUCIBLE)
    )
    return Contrast(
        at_family=multiplier.at_family(side, other, mine, level),
        at_baseline=multiplier.at_baseline(side, other, yours, level),
        family_curve=multiplier.at_family(
            side, other, np.geomspace(mine[0], mine[-1], CURVE), level
        ),
        baseline_curve=multiplier.at_baseline(
            side, other, np.geomspace(yours[0], yours[-1], CURVE), level
        ),
        lower_flops=both,
        lower=multiplier.lower(side, other, both),
        lower_in_range=side.holds(both) & other.holds(both),
        exponents=(_difference3(family, base, level), _difference2(family, base, level)),
        tests=tests,
    )


def _difference3(family: _Prepared, base: _Prepared, level: float) -> Difference:
    value, draws = (
        exponent(mine, family.family.compute) - exponent(yours, base.family.compute)
        for mine, yours in ((family.side.law, base.side.law), (family.replicates, base.replicates))
    )
    return Difference(float(value), bootstrap.interval(draws, level))


def _difference2(family: _Prepared, base: _Prepared, level: float) -> Difference | None:
    a, b = family.family.isoflop.a, base.family.isoflop.a
    if a is None or b is None:
        return None
    drawn = family.slopes_R is not None and base.slopes_R is not None
    interval = approach2.interval(family.slopes_R - base.slopes_R, level) if drawn else None
    return Difference(a - b, interval)


def _findings(name: str, base: str, contrast: Contrast, settings: Settings) -> list[Diagnostic]:
    diagnostics = []
    three = contrast.exponents[0]
    if not three.significant:
        ends = " to ".join(f"{end:+.3f}" for end in three.interval)
        diagnostics.append(
            warn(
                "exponents_do_not_differ",
                f"{name} and {base} do not differ significantly in their exponents: a differs by {three.value:+.3f}, "
                f"{settings.level:.0%} interval {ends}",
            )
        )
    for m, who in ((contrast.at_family, name), (contrast.at_baseline, base)):
        outside = [labels.flops(c) for c in m.flops[~m.in_range]]
        if outside:
            diagnostics.append(
                warn(
                    "multiplier_extrapolated",
                    f"multipliers at {', '.join(outside)} FLOPs of {who} need a frontier beyond its data",
                )
            )
    apart = [labels.flops(c) for c in contrast.at_family.flops[_disagree(contrast.at_family)]]
    if apart:
        diagnostics.append(
            warn(
                "multipliers_disagree",
                f"at {', '.join(apart)} FLOPs of {name} the law's multiplier and the interpolated one differ beyond their intervals",
            )
        )
    return diagnostics


def _disagree(m: Multiplier) -> NDArray[np.bool_]:
    out = np.zeros(len(m.flops), dtype=bool)
    for k, ends in enumerate(m.interpolated_interval):
        if ends is not None:
            low, high = m.interval_2xK[:, k]
            out[k] = ends[1] < low or high < ends[0]
    return out


def _values(law: Law) -> tuple[Array, ...]:
    return law.E, law.A, law.B, law.alpha, law.beta
