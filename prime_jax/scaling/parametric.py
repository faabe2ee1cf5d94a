"""Approach 3 of one family, with all that says how far to trust it.

The weights of the runs come from their error budget, the bands from a bootstrap, and the interval
of each parameter and best size also from a profile, which shows what the runs do not identify.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prime_jax.scaling import approach3, bootstrap, budgets, labels, noise, profile
from prime_jax.scaling.diagnostics import Diagnostic, refuse, warn
from prime_jax.scaling.laws import Compute, Law, optimum
from prime_jax.scaling.noise import ErrorBudget
from prime_jax.scaling.points import Points
from prime_jax.scaling.settings import Settings

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
    profile: dict[str, profile.Ends]
    sizes: dict[float, profile.Ends]
    diagnostics: tuple[Diagnostic, ...]


def fit(points: Points, compute: Compute, settings: Settings) -> Parametric:
    problem, fitted, errors = weighted(points, settings)
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
        "budget": budgets.levels(points.budget, points.flops),
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


def weighted(
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
        return bootstrap.wild(problem, fitted, points.run, settings.replicates, settings.seed)
    strata = budgets.strata(points.budget)
    weights = bootstrap.weights(strata, settings.replicates, settings.seed)
    return bootstrap.laws(problem, fitted, weights)


def _profile(
    problem: approach3.Problem,
    fitted: approach3.Fit,
    points: Points,
    compute: Compute,
    level: float,
) -> tuple[dict[str, profile.Ends], dict[float, profile.Ends]]:
    quantities = profile.parameters(problem, compute)
    every = points.budgets
    shown = np.linspace(0, len(every) - 1, min(len(every), PROFILED)).round().astype(int)
    at = every[shown].tolist()
    sizes = [profile.best_size(problem, compute, flops) for flops in at]
    ends = profile.intervals(problem, fitted, [*quantities.values(), *sizes], level, points.run)
    count = len(quantities)
    return (
        dict(zip(quantities, ends[:count], strict=True)),
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
    fractions = bootstrap.at_bound(problem, replicates)
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
    ends: dict[str, profile.Ends], sizes: dict[float, profile.Ends], level: float
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
