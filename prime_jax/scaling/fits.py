"""All fits of a set of runs: per family the three approaches, and whether they agree.

Approach 3 of a family comes with all that says how far to trust it: the weights of the runs from
their error budget, the bands from a bootstrap, and the interval of each parameter and best size
also from a profile, which shows what the runs do not identify.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray

from prime_jax.errors import UserError
from prime_jax.scaling import approach1, approach2, approach3, frontiers, labels, noise, rate_laws
from prime_jax.scaling.approach1 import Approach1, Curves
from prime_jax.scaling.approach2 import Approach2
from prime_jax.scaling.approach3 import law_of
from prime_jax.scaling.frontiers import FrontierFits
from prime_jax.scaling.intervals import (
    Ends,
    at_bound,
    bootstrap_weights,
    percentiles,
    profiles,
    resample,
    wild_resample,
)
from prime_jax.scaling.laws import Compute, Law, PowerLaw, exponent, fit_compute, optimum
from prime_jax.scaling.noise import ErrorBudget, Held
from prime_jax.scaling.points import Points, Runs, budget_levels, strata
from prime_jax.scaling.results import (
    Approach3,
    FamilyFit,
    Repetition,
    ScalingFit,
    curve_budgets,
    origin,
)
from prime_jax.scaling.rollout import Rollout, model_error, rollout
from prime_jax.scaling.schema import Diagnostic, refuse, warn
from prime_jax.scaling.settings import DEFAULTS, POWERS, Settings
from prime_jax.scaling.table import Table

Estimate = tuple[float, list[float] | None]  # a, and its interval if it has one

Array = NDArray[np.float64]

MIN_RUNS, FEW_RUNS = 6, 15  # five unknowns; three runs for each of them
MIN_REPEATED = 3  # runs that saw their data more than once, for a law of repetition
MIN_LEVELS = 3  # different N, D and C without which the two terms cannot be told apart
POWER_LAW_ERROR = 0.05
APART = 0.05  # in a, between approaches that both have no interval
MAX_SHOWN = 5  # budgets in one message
PROFILED = 12  # most budgets at which N* is profiled
SMALL_DELTA = 0.05  # of the scatter: a Huber delta below it is least absolute deviation in effect
SMALL_SCALE = 1e17  # FLOPs


def disagreements(estimates: dict[str, Estimate]) -> list[Diagnostic]:
    """A warning for approaches that differ by more than their intervals allow.

    The sides of two intervals that face each other add in quadrature, as for independent errors.
    The errors share their data and so are closer than that: a difference that stands out is real.
    One without an interval has to lie within that of the other, two without within 0.05.
    """
    out = []
    for (one, (a, ends)), (other, (b, b_ends)) in itertools.combinations(estimates.items(), 2):
        sides = [
            abs(value - (known[1] if value < facing else known[0])) if known else 0.0
            for value, known, facing in ((a, ends, b), (b, b_ends, a))
        ]
        allowed = math.hypot(*sides) if ends or b_ends else APART
        if abs(a - b) > allowed:
            said = (
                f"{one} gives a = {a:.3f} {_ends(ends)}",
                f"{other} a = {b:.3f} {_ends(b_ends)}",
            )
            out.append(warn("approaches_disagree", ", ".join(said)))
    return out


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - MAX_SHOWN} more" if len(texts) > MAX_SHOWN else ""
    return ", ".join(texts[:MAX_SHOWN]) + more


def _ends(interval: list[float] | None) -> str:
    return f"({interval[0]:.3f} to {interval[1]:.3f})" if interval else "(no interval)"


def fit_law(points: Points, compute: Compute, settings: Settings) -> Approach3:
    """Approach 3, but for its optima, which wait for the error of the rollout."""
    problem, fitted, _ = weighted_fit(points, settings)
    replicates = _resample(problem, fitted, points, settings)
    ends, sizes = _profile(problem, fitted, points, compute, settings.level)
    law, level = fitted.law, settings.level
    diagnostics = [
        *_fit_findings(points, fitted),
        *_delta_findings(
            problem, noise.scatter(problem.residual(fitted.theta_K), problem.unknowns)
        ),
        *_bound_findings(problem, fitted, replicates, settings),
        *_profile_findings(ends, sizes, level),
        *_optimum_findings(points, compute, law),
    ]
    spread = {name: percentiles(draws, level) for name, draws in vars(replicates).items()}
    return Approach3(
        params=law,
        a=float(exponent(law, compute)),
        objective=fitted.objective,
        certificate=fitted.certificate,
        intervals=spread | {"a": percentiles(exponent(replicates, compute), level)},
        profile=ends,
        warnings=tuple(diagnostics),
        problem=problem,
        fit=fitted,
        replicates=replicates,
        sizes=sizes,
        data=points,
        compute=compute,
        level=level,
    )


def too_few(points: Points, law: str = POWERS) -> Diagnostic | None:
    """Why approach 3 is refused, if it is."""
    levels = {
        "size": len(np.unique(points.params)),
        "number of tokens": len(np.unique(points.tokens)),
        "budget": budget_levels(points.budget, points.flops),
    }
    runs, known = len(points.loss), law_of(law)[1]
    least = max(MIN_RUNS, len(fields(known)) + 1)
    if runs < least:
        return refuse("too_few_points", f"{_count(runs, 'run')}; approach 3 needs {least}")
    for name, found in levels.items():
        if found < MIN_LEVELS:
            code = "too_few_budgets" if name == "budget" else "too_few_points"
            return refuse(code, f"{_count(found, name)}; approach 3 needs {MIN_LEVELS}")
    again = int(np.sum(points.repeats))
    if known.knows_repetition and again < MIN_REPEATED:
        return refuse(
            "no_repeated_runs",
            f"{_count(again, 'run') if again else 'no run'} saw its data more than once; R_D needs {MIN_REPEATED}",
        )
    return None


def _count(number: int, what: str) -> str:
    plural = what.replace("number", "numbers") if "number" in what else f"{what}s"
    return f"only {number} {what if number == 1 else plural}"


def weighted_fit(
    points: Points, settings: Settings
) -> tuple[approach3.Problem, approach3.Fit, ErrorBudget]:
    """The fit under the weights of the error budget, which needs the scatter of an even one."""
    problem = approach3.problem(
        points.params,
        points.tokens,
        points.loss,
        settings.delta,
        settings.objective,
        law=settings.law,
        unique=points.available,
    )
    fitted, errors = approach3.fit(problem), noise.of(points)
    weight = errors.run_weights(noise.scatter(problem.residual(fitted.theta_K), problem.unknowns))
    if np.ptp(weight) > 0:
        problem = replace(problem, weight_n=weight)
        fitted = approach3.fit(problem)
    return problem, fitted, errors


def _resample(
    problem: approach3.Problem, fitted: approach3.Fit, points: Points, settings: Settings
) -> Law:
    if points.run is not None:
        return wild_resample(problem, fitted, points.run, settings.replicates, settings.seed)
    weights = bootstrap_weights(strata(points.budget), settings.replicates, settings.seed)
    return resample(problem, fitted, weights)


def _profile(
    problem: approach3.Problem,
    fitted: approach3.Fit,
    points: Points,
    compute: Compute,
    level: float,
) -> tuple[dict[str, Ends], dict[float, Ends]]:
    named = problem.form.quantities(compute)
    every = points.levels
    shown = np.linspace(0, len(every) - 1, min(len(every), PROFILED)).round().astype(int)
    at = every[shown].tolist()
    sizes = [problem.form.best_size(compute, flops) for flops in at]
    ends = profiles(problem, fitted, [*named.values(), *sizes], level, points.run)
    count = len(named)
    return (
        dict(zip(named, ends[:count], strict=True)),
        dict(zip(at, ends[count:], strict=True)),
    )


def _fit_findings(points: Points, fit: approach3.Fit) -> list[Diagnostic]:
    certificate, diagnostics = fit.certificate, []
    runs = len(points.loss)
    if runs < FEW_RUNS:
        diagnostics.append(
            warn(
                "too_few_points",
                f"{runs} runs for {len(vars(fit.law))} unknowns; {FEW_RUNS} or more are wanted",
            )
        )
    if certificate.gradient > approach3.STATIONARY:
        diagnostics.append(
            refuse("not_converged", f"the scaled gradient is {certificate.gradient:.1e}")
        )
    elif certificate.smallest_eigenvalue <= approach3.FLAT:
        diagnostics.append(
            warn(
                "negative_curvature",
                "the fit is no proper minimum: its Hessian has a direction without curvature",
            )
        )
    if certificate.agreeing < approach3.MIN_AGREEING:
        diagnostics.append(
            warn(
                "starts_disagree",
                f"{certificate.agreeing:.0%} of {certificate.starts} starts reach the best objective",
            )
        )
    if points.loss.min() < fit.law.lowest:
        diagnostics.append(
            warn(
                "e_above_lowest_loss",
                f"E = {fit.law.lowest:.4g} is above the lowest loss, {points.loss.min():.4g}",
            )
        )
    return diagnostics


def _delta_findings(problem: approach3.Problem, scatter: float) -> list[Diagnostic]:
    if problem.objective != "huber" or problem.delta >= SMALL_DELTA * scatter:
        return []
    return [
        warn(
            "delta_too_small",
            f"delta = {problem.delta:.1g} is below {SMALL_DELTA:.0%} of the scatter of the runs ({scatter:.1g}): in effect least absolute deviation, which optimisers with absolute tolerances leave where they start",
        )
    ]


def _bound_findings(
    problem: approach3.Problem, fit: approach3.Fit, replicates: Law, settings: Settings
) -> list[Diagnostic]:
    if fit.certificate.bounds:
        names = ", ".join(fit.certificate.bounds)
        return [
            warn(
                "bound_hit", f"{names} ended at a bound of the search: the data do not determine it"
            )
        ]
    fractions = at_bound(problem, replicates)
    often = {
        name: fraction
        for name, fraction in fractions.items()
        if fraction > (1 - settings.level) / 2
    }
    if often:
        shown = ", ".join(f"{name} in {fraction:.0%}" for name, fraction in often.items())
        return [
            warn(
                "bound_hit",
                f"bootstrap replicates end at a bound of the search ({shown}): intervals are cut off there",
            )
        ]
    return []


def _profile_findings(
    ends: dict[str, Ends], sizes: dict[float, Ends], level: float
) -> list[Diagnostic]:
    named = ends | {f"N* at {labels.flops(flops)} FLOPs": pair for flops, pair in sizes.items()}
    sides = {(True, True): "neither end", (True, False): "no lower end", (False, True): "no upper end"}  # fmt: skip
    open_ends = [
        f"{name} has {sides[low is None, high is None]}"
        for name, (low, high) in named.items()
        if low is None or high is None
    ]
    if not open_ends:
        return []
    shown = _some(open_ends)
    return [warn("not_identified", f"{level:.0%} profile intervals do not close: {shown}")]


def _optimum_findings(points: Points, compute: Compute, law: Law) -> list[Diagnostic]:
    diagnostics, outside = [], []
    for budget in points.levels:
        params = points.sizes_near(budget)
        params = params if len(np.unique(params)) >= MIN_LEVELS else points.params
        best = optimum(law, compute, budget).params
        if not params.min() <= best <= params.max():
            outside.append(f"{labels.count(best)} at {labels.flops(budget)} FLOPs")
    if outside:
        diagnostics.append(
            warn(
                "extrapolation",
                f"approach 3 puts the optimum outside the sampled sizes: {_some(outside)}",
            )
        )
    if compute.error > POWER_LAW_ERROR:
        diagnostics.append(
            warn(
                "flops_not_a_power_law",
                f"FLOPs per token deviate from a power law of N by up to {compute.error:.0%}",
            )
        )
    return diagnostics


def fit_runs(
    runs: Runs,
    settings: Settings = DEFAULTS,
    progress: Callable[[str], None] = lambda family: None,
    curves: Mapping[str, Curves] | None = None,
) -> ScalingFit:
    """Fit every family.

    Args:
        runs: the points.
        settings: how.
        progress: called with the name of each family before its turn.
        curves: training curves by family, for approach 1.

    Raises:
        UserError: not one family can be fitted, by any approach.
    """
    families = {}
    for name, points in runs.families.items():
        progress(name)
        families[name] = fit_family(points, settings, (curves or {}).get(name))
    if not any(family.fitted for family in families.values()):
        reasons = (f"{name}: {family.reason}" for name, family in families.items())
        raise UserError(f"{runs.source}: nothing can be fitted; {'; '.join(reasons)}")
    return whole(runs, settings, families)


def whole(
    runs: Runs, settings: Settings, families: dict[str, FamilyFit], table: Table | None = None
) -> ScalingFit:
    """The fit of all families; `table` is what the runs were read from."""
    groups = _groups(runs)
    return ScalingFit(
        **origin(runs, settings),
        comparable=groups,
        families=families,
        repetition=_repetitions(families, settings.level),
        excluded=runs.excluded,
        warnings=_findings(runs, groups),
        data=runs,
        settings=settings,
        table=table,
    )


def fit_family(
    points: Points, settings: Settings = DEFAULTS, curves: Curves | None = None
) -> FamilyFit:
    compute = fit_compute(points.flops, points.params, points.tokens)
    drift = tuple(rate_laws.drift_findings(rate_laws.cells_of(points)))
    points = replace(points, diagnostics=(*points.diagnostics, *drift))
    if any(warning.refusal for warning in points.diagnostics):
        return _family(
            points,
            compute,
            Approach3(None),
            Approach2(settings.approach2),
            Approach1(),
        )
    law = law_of(settings.law)[1]
    if law.knows_repetition:
        known = tuple(one for one in points.diagnostics if one.code != "data_repeated")
        points = replace(points, diagnostics=known)
    two = approach2.fit(points.of_isoflop(law), compute, settings.approach2)
    draws = approach2.redraw(two, settings.replicates, settings.seed)
    two = approach2.with_errors(two, draws, settings.level)
    one = approach1.fit(curves, settings.replicates, settings.seed, settings.level)
    refusal = too_few(points, settings.law)
    if refusal:
        part = _family(points, compute, Approach3(None, warnings=(refusal,)), two, one)
        return replace(part, frontier=frontiers.of_minima(two, None, settings))
    three = fit_law(points, compute, settings)
    held_out = rollout(points, settings, three.law, one.optima)
    three = replace(three, error=model_error(held_out))
    three = replace(
        three,
        optima=three.bests(points.levels),
        frontier=three.along(curve_budgets(points)),
    )
    if isinstance(three.law, PowerLaw) and not three.certificate.bounds:  # it knows the curves
        two = _with_debiased(two, three, settings)
    part = _family(points=points, compute=compute, three=three, two=two, one=one, rollout=held_out)
    return replace(part, frontier=frontiers.of_minima(two, three.law.lowest, settings))


def frontier_of(points: Points, settings: Settings) -> FrontierFits:
    """The law of the lowest losses alone, without the intervals of the approaches."""
    compute = fit_compute(points.flops, points.params, points.tokens)
    law = law_of(settings.law)[1]
    two = approach2.fit(points.of_isoflop(law), compute, settings.approach2)
    lowest = None if too_few(points, settings.law) else weighted_fit(points, settings)[1].law.lowest
    return frontiers.of_minima(two, lowest, settings)


def _family(
    points: Points,
    compute: Compute,
    three: Approach3,
    two: Approach2,
    one: Approach1,
    rollout: Rollout | None = None,
) -> FamilyFit:
    """The parts put together; of approach 1 nothing is said that nobody asked for."""
    shown = (three, two, one) if one.counts else (three, two)
    own = [warning for part in shown for warning in part.warnings]
    about = [] if rollout is None else rollout.warnings
    return FamilyFit(
        kind=points.measure.kind,
        given=points.measure.given,
        runs=len(points.loss),
        budgets=points.levels,
        compute=compute,
        approach3=three,
        approach2=two,
        approach1=one,
        error_budget=_errors(points, three, rollout),
        rollout=rollout,
        warnings=(*points.diagnostics, *own, *about, *disagreements(exponents(three, two, one))),
        points=points,
    )


def _errors(points: Points, three: Approach3, rollout: Rollout | None) -> ErrorBudget:
    errors = noise.of(points)
    if not three:
        return errors
    known, weight_n = model_error(rollout), three.problem.weight_n
    return replace(
        errors,
        model=known and Held(known.bias, known.rms),
        scatter=noise.scatter(three.problem.residual(three.fit.theta_K), three.problem.unknowns),
        weights=[float(weight_n.min()), float(weight_n.max())],
    )


def exponents(three: Approach3, two: Approach2, one: Approach1) -> dict[str, Estimate]:
    """The exponent a of each approach that has one, and its interval."""
    debiased = {"approach 2, de-biased": two.debiased} if two.debiased else {"approach 2": two}
    parts = {"approach 1": one, **debiased, "approach 3": three}
    return {
        name: (part.a, part.intervals["a"]) for name, part in parts.items() if part.a is not None
    }


def _with_debiased(two: Approach2, three: Approach3, settings: Settings) -> Approach2:
    """The same with its optima without bias, or with a warning of what they would be."""
    if two.a is None or two.method == "akima":
        return two
    debiased = approach2.take_shift_off(
        two,
        draws=two.draws,
        law=three.law,
        replicates=three.replicates,
        compute=three.compute,
        seed=settings.seed,
        level=settings.level,
    )
    wrong = approach2.implausible(two, debiased)
    if wrong:
        return replace(two, warnings=(*two.warnings, wrong))
    return replace(two, debiased=debiased)


def _repetitions(families: dict[str, FamilyFit], level: float) -> tuple[Repetition, ...]:
    """R_D of every two families."""
    known = [
        name for name, f in families.items() if f.approach3 and f.approach3.law.knows_repetition
    ]
    out = []
    for other, family in itertools.combinations(known, 2):
        mine, theirs = (families[name].approach3 for name in (family, other))
        draws = mine.replicates.R_D / theirs.replicates.R_D
        (mine_low, mine_high), (low, high) = (_open_ends(part, level) for part in (mine, theirs))
        ends = percentiles(draws, level)
        ends = [None if mine_low or high else ends[0], None if mine_high or low else ends[1]]
        out.append(
            Repetition(
                family=family,
                other=other,
                ratio=mine.law.R_D / theirs.law.R_D,
                interval=ends,
                higher=float(np.mean(draws > 1)),
                significant=(ends[0] or 0.0) > 1 or (ends[1] or math.inf) < 1,
            )
        )
    return tuple(out)


def _open_ends(part: Approach3, level: float) -> tuple[bool, bool]:
    """Whether the search, not the runs, ends the interval of R_D below and above."""
    lower, upper = part.problem.box()
    k, tail = part.problem.form.names.index("R_D"), (1 - level) / 2
    theta = part.problem.form.theta(part.replicates)[:, k]
    slack = 1e-9 * (upper - lower)[k]
    return tuple(
        bool(np.mean(held) > tail)
        for held in (theta <= lower[k] + slack, theta >= upper[k] - slack)
    )


def _groups(runs: Runs) -> tuple[tuple[str, ...], ...]:
    if runs.choice.allow_mixed_kinds:
        return (tuple(runs.families),)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, points in runs.families.items():
        groups.setdefault(points.measure.group, []).append(name)
    return tuple(tuple(names) for names in groups.values())


def _findings(runs: Runs, groups: tuple[tuple[str, ...], ...]) -> tuple[Diagnostic, ...]:
    diagnostics = []
    measures = {points.measure.group: points.measure for points in runs.families.values()}
    if len(measures) > 1:
        shown = "; ".join(
            f"{name}: {points.measure.label}" for name, points in runs.families.items()
        )
        how = "drawn on separate axes" if len(groups) > 1 else "drawn on one axis, as asked"
        kinds = {group[0] for group in measures}
        code = "mixed_kinds" if len(kinds) > 1 else "mixed_evaluations"
        diagnostics.append(warn(code, f"families cannot be compared and are {how}: {shown}"))
    for family in dict.fromkeys(run.family for run in runs.excluded):
        if family not in runs.families:
            diagnostics.append(
                refuse("too_few_points", f"family {family} has no run that can be used")
            )
    largest = max(points.levels[-1] for points in runs.families.values())
    if largest < SMALL_SCALE:
        diagnostics.append(
            warn(
                "small_scale",
                f"the largest budget is {labels.flops(largest)} FLOPs: at this scale the exponents illustrate the tool and are not a scientific result",
            )
        )
    return tuple(diagnostics)
