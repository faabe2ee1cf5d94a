"""Families against a baseline: the compute multiplier, who is lower, and whose exponents differ.

Runs of different families at one size and budget have their data, shape and seed in common, hence
part of their error. All families are therefore resampled together on the grid that they share
(`grid_weights`), so the spread of a difference is that of the difference. A comparison of different
kinds of number is refused unless the runs were read with `allow_mixed_kinds`, and then carries a note.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prime_jax.errors import UserError
from prime_jax.scaling import approach2, approach3, joint, labels
from prime_jax.scaling.fits import too_few, weighted_fit
from prime_jax.scaling.intervals import (
    bootstrap_weights,
    known_percentiles,
    percentiles,
    resample,
    wild_resample,
)
from prime_jax.scaling.laws import Compute, PowerLaw, exponent, fit_compute
from prime_jax.scaling.multiplier import (
    Multiplier,
    Side,
    at_baseline,
    at_family,
    lower_probability,
    minimum_losses,
)
from prime_jax.scaling.points import Points, Runs, assign_budgets, strata
from prime_jax.scaling.results import Origin, origin
from prime_jax.scaling.schema import Diagnostic, hidden, key, refuse, warn
from prime_jax.scaling.settings import POWERS, Settings
from prime_jax.settings import nearest

Array = NDArray[np.float64]
Index = NDArray[np.intp]

CURVE = 33  # budgets of a curve
SIMULATIONS = 299  # of a likelihood-ratio test, at most
MIXED = "mixed kinds of number: {}; a difference between them is not one between models"


def grid_cells(families: Sequence[Points]) -> tuple[list[Index], Array]:
    """The cell of every run of each family, and the budget of every cell.

    Budgets and sizes within 5 % of each other are the same: families count their heads and
    embeddings differently. Repeats of a cell are cells of their own, matched in their order.
    """
    owner = np.repeat(np.arange(len(families)), [len(part.loss) for part in families])
    budget = assign_budgets(np.concatenate([part.budget for part in families]), None)
    params = np.concatenate([part.params for part in families])
    index: dict[tuple[float, float, int], int] = {}
    found = np.empty(len(owner), dtype=np.intp)
    for value in np.unique(budget):
        mine = np.flatnonzero(budget == value)
        size = assign_budgets(params[mine], None)
        seen: dict[tuple[int, float], int] = {}
        for run, near in zip(mine.tolist(), size.tolist(), strict=True):
            repeat = seen.get((owner[run], near), 0)
            seen[owner[run], near] = repeat + 1
            found[run] = index.setdefault((float(value), near, repeat), len(index))
    return [found[owner == f] for f in range(len(families))], np.array([key[0] for key in index])


def grid_weights(families: Sequence[Points], replicates: int, seed: int) -> list[Array]:
    """Bootstrap weights_Rxn of each family, drawn together; every budget keeps its weight."""
    where, budget = grid_cells(families)
    drawn_RxM = bootstrap_weights(strata(budget), replicates, seed)
    out = []
    for part, cell_n in zip(families, where, strict=True):
        weight_Rxn = drawn_RxM[:, cell_n]
        stratum_n = strata(part.budget)
        for stratum in np.unique(stratum_n):
            mine = stratum_n == stratum
            total_Rx1 = weight_Rxn[:, mine].sum(axis=1, keepdims=True)
            kept = np.where(total_Rx1 > 0, weight_Rxn[:, mine], 1.0)  # all drawn from the others
            weight_Rxn[:, mine] = kept * mine.sum() / np.where(total_Rx1 > 0, total_Rx1, mine.sum())
        out.append(weight_Rxn)
    return out


@dataclass(frozen=True)
class Between:
    """The multiplier between the optima of approach 2, without a law."""

    value: float
    interval: list[float] | None


@dataclass(frozen=True)
class AtBudget:
    """m at one budget; a value or an end that is None is beyond all numbers."""

    flops: float = key("C")
    other_flops: float | None = key(
        "C that the other one needs for the same loss; null: it never reaches it"
    )
    value: float | None = key("m from the fitted laws")
    median: float | None = key("median of m over the replicates")
    interval: list[float | None] = key("`[low, high]` of m")
    never: float = key("fraction of the replicates in which the loss is never reached")
    in_range: bool = key("both frontiers are used within their data; else an extrapolation")
    interpolated: Between | None = key("m between the optima of approach 2: `value, interval`")


@dataclass(frozen=True)
class Curve:
    flops: Array
    value: Array
    median: Array
    interval: Array
    in_range: NDArray[np.bool_]


@dataclass(frozen=True)
class Multipliers:
    """m read off at what one of the two spends."""

    budgets: tuple[AtBudget, ...]
    curve: Curve = key("the same between the smallest and the largest budget, as lists")
    arrays: Multiplier = hidden()


@dataclass(frozen=True)
class Sides:
    at_family: Multipliers = key(
        "C is what the family spends, m = C / other_flops; null where the baseline never reaches that loss (m is 0)"
    )
    at_baseline: Multipliers = key(
        "the same fields where C is what the baseline spends, m = other_flops / C; null where the family never reaches that loss (m is infinite)"
    )


@dataclass(frozen=True)
class Lower:
    """How probable it is that the family's best loss is below the baseline's."""

    flops: float
    probability: float
    interpolated: float | None
    in_range: bool


@dataclass(frozen=True)
class Difference:
    """The exponent a of the family less that of the baseline, by one approach."""

    difference: float
    interval: list[float] | None
    significant: bool


@dataclass(frozen=True)
class Differences:
    approach3: Difference
    approach2: Difference | None


@dataclass(frozen=True)
class Test:
    """Whether both may share parameters."""

    shared: tuple[str, ...]
    p: float
    statistic: float
    simulations: int
    gradient: float
    params: dict[str, PowerLaw]


@dataclass(frozen=True)
class Contrast:
    """A family against the baseline; where it is refused, only its warnings."""

    kind: str = key("kind of the family's losses")
    mixed: str | None = key("what differs between the two kinds of number, or null")
    multiplier: Sides | None = key(
        "how many times the compute of the baseline the family needs for one loss", default=None
    )
    lower: tuple[Lower, ...] = key(
        "probability that the family's best loss is the lower one, at budgets of either: `flops, probability, interpolated, in_range`",
        default=(),
    )
    exponents: Differences | None = key(
        "the exponent a less that of the baseline, by approach: `difference, interval, significant`",
        default=None,
    )
    tests: dict[str, Test] | None = key(
        "whether both may share `exponents`, or `E`: each `{shared, p, statistic, simulations, gradient, params}`",
        default=None,
    )
    warnings: tuple[Diagnostic, ...] = key(
        "warnings of the comparison: `{code, message, hint, refusal}`", default=()
    )


@dataclass(frozen=True)
class Baseline:
    family: str
    kind: str


@dataclass(frozen=True)
class Comparison(Origin):
    allow_mixed_kinds: bool = key("whether different kinds of number were compared")
    baseline: Baseline = key("`family` and its `kind`")
    families: dict[str, Contrast]
    data: Runs = hidden()

    @property
    def refused(self) -> bool:
        return any(w.refusal for family in self.families.values() for w in family.warnings)


@dataclass(frozen=True)
class _Fitted:
    """The parts of a fit that a comparison needs."""

    points: Points
    compute: Compute
    problem: approach3.Problem
    fit: approach3.Fit
    isoflop: approach2.Approach2


@dataclass(frozen=True)
class _Prepared:
    """A fitted family, and its replicates drawn together with the others'."""

    family: _Fitted
    replicates: PowerLaw
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
    if settings.law != POWERS:
        raise UserError(
            f"families are compared by the law {POWERS!r}, not by {settings.law!r}; "
            "R_D of families stands in the output of fit"
        )
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
        points, mixed = runs.families[name], _mixed(base, runs.families[name]) or None
        if refusals[name]:
            warnings = tuple(refusals[name])
            pairs[name] = Contrast(points.measure.kind, mixed, warnings=warnings)
            continue
        contrast = _contrast(ready[name], ready[baseline], mixed, settings)
        warnings = (*_notes(base, points), *_findings(name, baseline, contrast, settings))
        pairs[name] = replace(contrast, warnings=warnings)
    return Comparison(
        **origin(runs, settings),
        allow_mixed_kinds=runs.choice.allow_mixed_kinds,
        baseline=Baseline(baseline, base.measure.kind),
        families=pairs,
        data=runs,
    )


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
    whys = [diagnostic for diagnostic in (*points.diagnostics, too_few(points)) if diagnostic]
    return [
        refuse(why.code, f"{points.family} has no law: {why.message}")
        for why in whys
        if why.refusal
    ]


def _fit(points: Points, settings: Settings) -> _Fitted:
    compute = fit_compute(points.flops, points.params, points.tokens)
    problem, fitted, _ = weighted_fit(points, settings)
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
            replicates=replace(
                law, **{name: draws[:, None] for name, draws in vars(replicates[k]).items()}
            ),
            compute=family.compute,
            knots_K=np.log([curve.flops for curve in inside]),
            log_loss_K=np.log([curve.optimum.loss for curve in inside]),
            log_loss_RxK=minimum_losses(inside, settings.replicates, settings.seed + 1 + k),
            low=float(points.levels[0]),
            high=float(points.levels[-1]),
        )
        slopes = None
        if family.isoflop.a is not None:
            draws = approach2.redraw(family.isoflop, settings.replicates, settings.seed + 1 + k)
            slopes = None if draws is None else draws.a
        out[name] = _Prepared(family, replicates[k], where[k], side, slopes)
    return out


def _replicates(fits: list[_Fitted], settings: Settings) -> list[PowerLaw]:
    """Laws of all families under runs drawn together.

    A family with checkpoints of one run, or runs of one trajectory, cannot be drawn by cells: it
    gets the wild cluster bootstrap, independent of the others.
    """
    alone = [family.points for family in fits if family.points.run is None]
    drawn = iter(grid_weights(alone, settings.replicates, settings.seed) if alone else ())
    out = []
    for k, family in enumerate(fits, 1):
        run_n = family.points.run
        if run_n is None:
            out.append(resample(family.problem, family.fit, next(drawn)))
        else:
            seed = settings.seed + k
            draws = wild_resample(family.problem, family.fit, run_n, settings.replicates, seed)
            out.append(draws)
    return out


def _cells(parts: list[Points]) -> list[NDArray[np.intp]]:
    """Those of the grid; checkpoints of one run, or runs of one trajectory, make a cell."""
    where, budget = grid_cells(parts)
    first, out = len(budget), []
    for part, cell_n in zip(parts, where, strict=True):
        out.append(cell_n if part.run is None else first + part.run)
        first += len(cell_n)
    return out


def _contrast(
    family: _Prepared, base: _Prepared, mixed: str | None, settings: Settings
) -> Contrast:
    mine, yours = family.family.points.levels, base.family.points.levels
    level, side, other = settings.level, family.side, base.side
    both = np.unique(np.concatenate([mine, yours]))
    inside = side.holds(both) & other.holds(both)
    lower = zip(both, *lower_probability(side, other, both), inside, strict=True)
    return Contrast(
        kind=family.family.points.measure.kind,
        mixed=mixed,
        multiplier=Sides(
            _multipliers(at_family, side, other, mine, level),
            _multipliers(at_baseline, side, other, yours, level),
        ),
        lower=tuple(
            Lower(float(c), float(p), _number(q), bool(within)) for c, p, q, within in lower
        ),
        exponents=Differences(_difference3(family, base, level), _difference2(family, base, level)),
        tests={
            name: _test(family, base, shared, settings)
            for name, shared in (("exponents", joint.EXPONENTS), ("E", joint.IRREDUCIBLE))
        },
    )


def _multipliers(
    at: Callable[..., Multiplier], side: Side, other: Side, flops: Array, level: float
) -> Multipliers:
    m = at(side, other, flops, level)
    drawn = at(side, other, np.geomspace(flops[0], flops[-1], CURVE), level)
    budgets = tuple(
        AtBudget(
            flops=float(m.flops[k]),
            other_flops=_number(m.equal[k]),
            value=_multiple(m.value[k]),
            median=_multiple(m.median[k]),
            interval=[_multiple(end) for end in m.interval_2xK[:, k]],
            never=float(m.never[k]),
            in_range=bool(m.in_range[k]),
            interpolated=Between(float(m.interpolated[k]), ends)
            if np.isfinite(m.interpolated[k])
            else None,
        )
        for k, ends in enumerate(m.interpolated_interval)
    )
    lines = (drawn.value, drawn.median, drawn.interval_2xK)
    value, median, interval = (np.where(line == 0, np.nan, line) for line in lines)
    curve = Curve(drawn.flops, value, median, interval, drawn.in_range)
    return Multipliers(budgets, curve, m)


def _test(family: _Prepared, base: _Prepared, shared: tuple[str, ...], settings: Settings) -> Test:
    found = joint.likelihood_ratio(
        (base.family.problem, family.family.problem),
        fits=(base.family.fit, family.family.fit),
        names=shared,
        cells=(base.cell_n, family.cell_n),
        replicates=min(SIMULATIONS, settings.replicates),
        seed=settings.seed,
    )
    return Test(
        shared=found.names,
        p=found.p,
        statistic=found.statistic,
        simulations=found.replicates,
        gradient=found.gradient,
        params=dict(zip(("baseline", "family"), found.laws, strict=True)),
    )


def _multiple(value: float) -> float | None:
    """None where a loss is never reached."""
    return None if value == 0 else _number(value)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _difference(value: float, interval: list[float] | None) -> Difference:
    significant = interval is not None and not interval[0] <= 0 <= interval[1]
    return Difference(value, interval, significant)


def _difference3(family: _Prepared, base: _Prepared, level: float) -> Difference:
    value, draws = (
        exponent(mine, family.family.compute) - exponent(yours, base.family.compute)
        for mine, yours in ((family.side.law, base.side.law), (family.replicates, base.replicates))
    )
    return _difference(float(value), percentiles(draws, level))


def _difference2(family: _Prepared, base: _Prepared, level: float) -> Difference | None:
    a, b = family.family.isoflop.a, base.family.isoflop.a
    if a is None or b is None:
        return None
    drawn = family.slopes_R is not None and base.slopes_R is not None
    return _difference(
        a - b, known_percentiles(family.slopes_R - base.slopes_R, level) if drawn else None
    )


def _findings(name: str, base: str, contrast: Contrast, settings: Settings) -> list[Diagnostic]:
    diagnostics, sides = [], contrast.multiplier
    at_family = sides.at_family.arrays
    three = contrast.exponents.approach3
    if not three.significant:
        ends = " to ".join(f"{end:+.3f}" for end in three.interval)
        diagnostics.append(
            warn(
                "exponents_do_not_differ",
                f"{name} and {base} do not differ significantly in their exponents: a differs by {three.difference:+.3f}, "
                f"{settings.level:.0%} interval {ends}",
            )
        )
    for m, who in ((at_family, name), (sides.at_baseline.arrays, base)):
        outside = [labels.flops(c) for c in m.flops[~m.in_range]]
        if outside:
            diagnostics.append(
                warn(
                    "multiplier_extrapolated",
                    f"multipliers at {', '.join(outside)} FLOPs of {who} need a frontier beyond its data",
                )
            )
    apart = [labels.flops(c) for c in at_family.flops[_disagree(at_family)]]
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
