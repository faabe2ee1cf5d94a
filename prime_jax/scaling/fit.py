"""All fits of a set of runs: per family the three approaches, and whether they agree.

Approach 3 of a family comes with all that says how far to trust it: the weights of the runs from
their error budget, the bands from a bootstrap, and the interval of each parameter and best size
also from a profile, which shows what the runs do not identify.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prime_jax.errors import UserError
from prime_jax.scaling import approach1, approach2, approach3, labels, noise, validate
from prime_jax.scaling.approach1 import Curves
from prime_jax.scaling.approach2 import Debiased
from prime_jax.scaling.diagnostics import Diagnostic, refuse, warn
from prime_jax.scaling.intervals import (
    Ends,
    at_bound,
    best_size,
    bootstrap_weights,
    percentiles,
    profiles,
    quantities,
    resample,
    wild_resample,
)
from prime_jax.scaling.laws import Compute, Law, Optimum, exponent, fit_compute, optimum
from prime_jax.scaling.noise import ErrorBudget
from prime_jax.scaling.points import Points, Runs, budget_levels, strata
from prime_jax.scaling.settings import DEFAULTS, Settings
from prime_jax.scaling.validate import Rollout

Estimate = tuple[float, list[float] | None]  # a, and its interval if it has one


def disagreements(estimates: dict[str, Estimate]) -> list[Diagnostic]:
    """A warning for approaches that differ by more than their intervals allow.

    The sides of two intervals that face each other add in quadrature, as for independent errors.
    The errors share their data and so are closer than that: a difference that stands out is real.
    """
    out = []
    for (one, (a, ends)), (other, (b, b_ends)) in itertools.combinations(estimates.items(), 2):
        if ends is None or b_ends is None:
            continue
        facing = (ends[1] - a, b - b_ends[0]) if a < b else (a - ends[0], b_ends[1] - b)
        if abs(a - b) > math.hypot(*facing):
            out.append(
                warn(
                    "approaches_disagree",
                    f"{one} gives a = {a:.3f} ({ends[0]:.3f} to {ends[1]:.3f}), {other} a = {b:.3f} ({b_ends[0]:.3f} to {b_ends[1]:.3f})",
                )
            )
    return out


Array = NDArray[np.float64]

MIN_RUNS, FEW_RUNS = 6, 15  # five unknowns; three runs for each of them
MIN_LEVELS = 3  # different N, D and C without which the two terms cannot be told apart
POWER_LAW_ERROR = 0.05
PROFILED = 12  # most budgets at which N* is profiled
SMALL_DELTA = 0.05  # of the scatter: a Huber delta below it is least absolute deviation in effect


@dataclass(frozen=True)
class Parametric:
    """Approach 3 of one family: the law, and the laws of the bootstrap replicates.

    Attributes:
        errors, scatter: error budget of the runs, and their scatter about the law (relative).
        profile: profile intervals of the parameters and of a.
        sizes: those of N*, by budget.
    """

    problem: approach3.Problem
    fit: approach3.Fit
    replicates: Law
    errors: ErrorBudget
    scatter: float
    profile: dict[str, Ends]
    sizes: dict[float, Ends]
    diagnostics: tuple[Diagnostic, ...]


def fit_law(points: Points, compute: Compute, settings: Settings) -> Parametric:
    problem, fitted, errors = weighted_fit(points, settings)
    replicates = _resample(problem, fitted, points, settings)
    ends, sizes = _profile(problem, fitted, points, compute, settings.level)
    scatter = noise.scatter(problem.residual(fitted.theta_5))
    diagnostics = [
        *_fit_findings(points, fitted),
        *_delta_findings(problem, scatter),
        *_bound_findings(problem, fitted, replicates, settings),
        *_profile_findings(ends, sizes, settings.level),
        *_optimum_findings(points, compute, fitted.law),
    ]
    return Parametric(
        problem=problem,
        fit=fitted,
        replicates=replicates,
        errors=errors,
        scatter=scatter,
        profile=ends,
        sizes=sizes,
        diagnostics=tuple(diagnostics),
    )


def too_few(points: Points) -> Diagnostic | None:
    """Why approach 3 is refused, if it is."""
    levels = {
        "size": len(np.unique(points.params)),
        "number of tokens": len(np.unique(points.tokens)),
        "budget": budget_levels(points.budget, points.flops),
    }
    runs = len(points.loss)
    if runs < MIN_RUNS:
        return refuse("too_few_points", f"{_count(runs, 'run')}; approach 3 needs {MIN_RUNS}")
    for name, found in levels.items():
        if found < MIN_LEVELS:
            code = "too_few_budgets" if name == "budget" else "too_few_points"
            return refuse(code, f"{_count(found, name)}; approach 3 needs {MIN_LEVELS}")
    return None


def _count(number: int, what: str) -> str:
    plural = what.replace("number", "numbers") if "number" in what else f"{what}s"
    return f"only {number} {what if number == 1 else plural}"


def weighted_fit(
    points: Points, settings: Settings
) -> tuple[approach3.Problem, approach3.Fit, ErrorBudget]:
    """The fit under the weights of the error budget, which needs the scatter of an even one."""
    problem = approach3.problem(
        points.params, points.tokens, points.loss, settings.delta, settings.objective
    )
    fitted, errors = approach3.fit(problem), noise.of(points)
    weight = errors.weights(noise.scatter(problem.residual(fitted.theta_5)))
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
    named = quantities(problem, compute)
    every = points.budgets
    shown = np.linspace(0, len(every) - 1, min(len(every), PROFILED)).round().astype(int)
    at = every[shown].tolist()
    sizes = [best_size(problem, compute, flops) for flops in at]
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
            warn("too_few_points", f"{runs} runs for five unknowns; {FEW_RUNS} or more are wanted")
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
    if points.loss.min() < fit.law.E:
        diagnostics.append(
            warn(
                "e_above_lowest_loss",
                f"E = {fit.law.E:.4g} is above the lowest loss, {points.loss.min():.4g}",
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
    shown = "; ".join(open_ends)
    return [warn("not_identified", f"{level:.0%} profile intervals do not close: {shown}")]


def _optimum_findings(points: Points, compute: Compute, law: Law) -> list[Diagnostic]:
    diagnostics, outside = [], []
    for budget in points.budgets:
        params = points.params[points.budget == budget]
        best = optimum(law, compute, budget).params
        if len(np.unique(params)) >= MIN_LEVELS and not params.min() <= best <= params.max():
            outside.append(f"{labels.count(best)} at {labels.flops(budget)} FLOPs")
    if outside:
        diagnostics.append(
            warn(
                "extrapolation",
                f"approach 3 puts the optimum outside the sampled sizes: {', '.join(outside)}",
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


SMALL_SCALE = 1e17  # FLOPs
CURVE = 49  # budgets at which the frontier is stored and drawn


@dataclass(frozen=True)
class FamilyFit:
    """What was found for a family; a part that was refused is None and has its refusal."""

    points: Points
    compute: Compute
    parametric: Parametric | None
    isoflop: approach2.Isoflop | None
    draws: approach2.Draws | None
    refusals: tuple[Diagnostic, ...]  # of the family as a whole, or of approach 3
    debiased: Debiased | None = None
    envelope: approach1.Envelope | None = None
    disagreements: tuple[Diagnostic, ...] = ()  # about the approaches together
    rollout: Rollout | None = None  # None without approach 3

    @property
    def fitted(self) -> bool:
        exponents = (self.isoflop and self.isoflop.a, self.envelope and self.envelope.line)
        return bool(self.parametric) or any(found is not None for found in exponents)

    @property
    def reason(self) -> str:
        """Why it is not fitted."""
        return next(diagnostic.message for diagnostic in self.diagnostics if diagnostic.refusal)

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """All of them, those of the data first; not those of an envelope that nobody asked for."""
        envelope = self.envelope if self.envelope and self.envelope.counts else None
        parts = (self.parametric, self.isoflop, envelope, self.rollout)
        own = [diagnostic for part in parts if part for diagnostic in part.diagnostics]
        return (*self.points.diagnostics, *self.refusals, *own, *self.disagreements)


@dataclass(frozen=True)
class ScalingFit:
    runs: Runs
    settings: Settings
    families: dict[str, FamilyFit]
    groups: tuple[tuple[str, ...], ...]  # families whose losses may share an axis
    diagnostics: tuple[Diagnostic, ...]  # of the runs as a whole

    @property
    def refused(self) -> bool:
        families = [f for family in self.families.values() for f in family.diagnostics]
        return any(diagnostic.refusal for diagnostic in (*self.diagnostics, *families))


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
    groups = _groups(runs)
    return ScalingFit(runs, settings, families, groups, _findings(runs, groups))


def fit_family(
    points: Points, settings: Settings = DEFAULTS, curves: Curves | None = None
) -> FamilyFit:
    compute = fit_compute(points.flops, points.params, points.tokens)
    refusals = tuple(f for f in points.diagnostics if f.refusal)
    if refusals:
        return FamilyFit(
            points=points, compute=compute, parametric=None, isoflop=None, draws=None, refusals=()
        )
    isoflop = approach2.fit(points, compute, settings.approach2)
    draws = approach2.redraw(isoflop, settings.replicates, settings.seed)
    without = approach2.check(isoflop, draws, settings.level)
    isoflop = replace(isoflop, diagnostics=isoflop.diagnostics + without)
    envelope = approach1.fit(curves, settings.replicates, settings.seed, settings.level)
    refusal = too_few(points)
    three = None if refusal else fit_law(points, compute, settings)
    family = FamilyFit(
        points=points,
        compute=compute,
        parametric=three,
        isoflop=isoflop,
        draws=draws,
        refusals=(refusal,) if refusal else (),
        envelope=envelope,
    )
    family = replace(
        family, debiased=_debiased(family, settings), rollout=_rollout(family, settings)
    )
    return replace(family, disagreements=tuple(disagreements(exponents(family, settings.level))))


def exponents(family: FamilyFit, level: float) -> dict[str, Estimate]:
    """The exponent a of each approach that has one, and its interval."""
    out = {}
    envelope, isoflop, debiased = family.envelope, family.isoflop, family.debiased
    if envelope and envelope.line:
        out["approach 1"] = envelope.line.a, approach2.interval(envelope.a_R, level)
    if debiased:
        draws = debiased.a_R
        out["approach 2"] = debiased.a, None if draws is None else approach2.interval(draws, level)
    elif isoflop and isoflop.a is not None:
        draws = family.draws
        ends = None if draws is None else approach2.interval(draws.a, level)
        out["approach 2"] = isoflop.a, ends
    if family.parametric:
        law, replicates = family.parametric.fit.law, family.parametric.replicates
        ends = percentiles(exponent(replicates, family.compute), level)
        out["approach 3"] = float(exponent(law, family.compute)), ends
    return out


def _rollout(family: FamilyFit, settings: Settings) -> Rollout | None:
    if family.parametric is None:
        return None
    winners = family.envelope.optima if family.envelope else ()
    return validate.rollout(family.points, settings, family.parametric.fit.law, winners)


def _debiased(family: FamilyFit, settings: Settings) -> Debiased | None:
    """Approach 2 without the bias of parabolas, if approach 3 knows how steep the curves are."""
    part = family.parametric
    if part is None or part.fit.certificate.bounds or family.isoflop is None:
        return None
    return approach2.correct(
        family.isoflop,
        draws=family.draws,
        law=part.fit.law,
        replicates=part.replicates,
        compute=family.compute,
        seed=settings.seed,
    )


def curve_budgets(points: Points) -> Array:
    """Budgets from the smallest to the largest of the data, for curves; nothing beyond it."""
    return np.geomspace(points.budgets[0], points.budgets[-1], CURVE)


def optima(law: Law, compute: Compute, flops: Array) -> Optimum:
    """Optima_[R, K] of the R laws of a bootstrap at K budgets."""
    fields = (np.asarray(v)[:, None] for v in (law.E, law.A, law.B, law.alpha, law.beta))
    return optimum(Law(*fields), compute, flops)


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
    largest = max(points.budgets[-1] for points in runs.families.values())
    if largest < SMALL_SCALE:
        diagnostics.append(
            warn(
                "small_scale",
                f"the largest budget is {labels.flops(largest)} FLOPs: at this scale the exponents illustrate the tool and are not a scientific result",
            )
        )
    return tuple(diagnostics)
