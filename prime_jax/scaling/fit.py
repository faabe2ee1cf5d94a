"""All fits of a set of runs: per family approach 3 with its bootstrap, and approach 2."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prime_jax.errors import UserError
from prime_jax.scaling import approach2, approach3, bootstrap, budgets, labels
from prime_jax.scaling.findings import Finding, refuse, warn
from prime_jax.scaling.laws import Compute, Law, Optimum, fit_compute, optimum
from prime_jax.scaling.points import Points, Runs

Array = NDArray[np.float64]

LEAST_RUNS, FEW_RUNS = 6, 15  # five unknowns; three runs for each of them
LEAST_LEVELS = 3  # different N, D and C without which the two terms cannot be told apart
POWER_LAW_ERROR = 0.05
SMALL_SCALE = 1e17  # FLOPs
CURVE = 49  # budgets at which the frontier is stored and drawn


@dataclass(frozen=True)
class Settings:
    """How to fit; `level` is that of every interval."""

    replicates: int = 1000
    seed: int = 0
    level: float = 0.95
    delta: float = approach3.DELTA


@dataclass(frozen=True)
class Parametric:
    """Approach 3 of one family: the law, and the laws of the bootstrap replicates."""

    fit: approach3.Fit
    replicates: Law
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class FamilyFit:
    """What was found for a family; a part that was refused is None and has its refusal."""

    points: Points
    compute: Compute
    parametric: Parametric | None
    isoflop: approach2.Isoflop | None
    draws: approach2.Draws | None
    refusals: tuple[Finding, ...]  # of the family as a whole, or of approach 3

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All of them, those of the data first."""
        parts = (self.parametric, self.isoflop)
        own = [finding for part in parts if part for finding in part.findings]
        return (*self.points.findings, *self.refusals, *own)


@dataclass(frozen=True)
class ScalingFit:
    runs: Runs
    settings: Settings
    families: dict[str, FamilyFit]
    groups: tuple[tuple[str, ...], ...]  # families whose losses may share an axis
    findings: tuple[Finding, ...]  # of the runs as a whole

    @property
    def refused(self) -> bool:
        families = [f for family in self.families.values() for f in family.findings]
        return any(finding.refusal for finding in (*self.findings, *families))


def fit_runs(
    runs: Runs, settings: Settings = Settings(), tell: Callable[[str], None] = lambda family: None
) -> ScalingFit:
    """Fit every family. `tell` is called with the name of each before its turn.

    Raises:
        UserError: not one family can be fitted, by either approach.
    """
    families = {}
    for name, points in runs.families.items():
        tell(name)
        families[name] = fit_family(points, settings)
    fitted = [
        f for f in families.values() if f.parametric or (f.isoflop and f.isoflop.a is not None)
    ]
    if not fitted:
        reasons = (f"{name}: {family.refusals[0].message}" for name, family in families.items())
        raise UserError(f"{runs.source}: nothing can be fitted; {'; '.join(reasons)}")
    groups = _groups(runs)
    return ScalingFit(runs, settings, families, groups, _findings(runs, groups))


def fit_family(points: Points, settings: Settings = Settings()) -> FamilyFit:
    compute = fit_compute(points.flops, points.params, points.tokens)
    refusals = tuple(f for f in points.findings if f.refusal)
    if refusals:
        return FamilyFit(points, compute, None, None, None, ())
    isoflop = approach2.fit(points, compute)
    draws = approach2.redraw(isoflop, settings.replicates, settings.seed)
    doubts = approach2.doubts(isoflop, draws, settings.level)
    isoflop = replace(isoflop, findings=isoflop.findings + doubts)
    refusal = _too_few(points)
    if refusal:
        return FamilyFit(points, compute, None, isoflop, draws, (refusal,))
    parametric = _parametric(points, compute, settings)
    return FamilyFit(points, compute, parametric, isoflop, draws, ())


def curve_budgets(points: Points) -> Array:
    """Budgets from the smallest to the largest of the data, for curves; nothing beyond it."""
    return np.geomspace(points.budgets[0], points.budgets[-1], CURVE)


def optima(law: Law, compute: Compute, flops: Array) -> Optimum:
    """Optima_[R, K] of the R laws of a bootstrap at K budgets."""
    fields = (np.asarray(v)[:, None] for v in (law.E, law.A, law.B, law.alpha, law.beta))
    return optimum(Law(*fields), compute, flops)


def _too_few(points: Points) -> Finding | None:
    levels = {
        "size": points.params,
        "number of tokens": points.tokens,
        "budget": points.budget,
    }
    runs = len(points.loss)
    if runs < LEAST_RUNS:
        return refuse("too_few_points", f"{_count(runs, 'run')}; approach 3 needs {LEAST_RUNS}")
    for name, values in levels.items():
        found = len(np.unique(values))
        if found < LEAST_LEVELS:
            code = "too_few_budgets" if name == "budget" else "too_few_points"
            return refuse(code, f"{_count(found, name)}; approach 3 needs {LEAST_LEVELS}")
    return None


def _count(number: int, what: str) -> str:
    plural = what.replace("number", "numbers") if "number" in what else f"{what}s"
    return f"only {number} {what if number == 1 else plural}"


def _parametric(points: Points, compute: Compute, settings: Settings) -> Parametric:
    problem = approach3.problem(points.params, points.tokens, points.loss, settings.delta)
    fit = approach3.fit(problem)
    strata = budgets.strata(points.budget)
    weights = bootstrap.weights(strata, settings.replicates, settings.seed)
    replicates = bootstrap.laws(problem, fit, weights)
    findings = [
        *_fit_findings(points, fit),
        *_bound_findings(problem, fit, replicates, settings),
        *_optimum_findings(points, compute, fit.law),
    ]
    return Parametric(fit, replicates, tuple(findings))


def _fit_findings(points: Points, fit: approach3.Fit) -> list[Finding]:
    certificate, findings = fit.certificate, []
    runs = len(points.loss)
    if runs < FEW_RUNS:
        findings.append(
            warn("too_few_points", f"{runs} runs for five unknowns; {FEW_RUNS} or more are wanted")
        )
    if certificate.gradient > approach3.STATIONARY:
        findings.append(
            refuse("not_converged", f"the scaled gradient is {certificate.gradient:.1e}")
        )
    elif certificate.smallest_eigenvalue <= 0:
        findings.append(
            warn(
                "negative_curvature",
                "the fit is no proper minimum: its Hessian has a direction without curvature",
            )
        )
    if certificate.agreeing < approach3.MOST:
        findings.append(
            warn(
                "starts_disagree",
                f"{certificate.agreeing:.0%} of {certificate.starts} starts reach the best objective",
            )
        )
    if points.loss.min() < fit.law.E:
        findings.append(
            warn(
                "e_above_lowest_loss",
                f"E = {fit.law.E:.4g} is above the lowest loss, {points.loss.min():.4g}",
            )
        )
    return findings


def _bound_findings(
    problem: approach3.Problem, fit: approach3.Fit, replicates: Law, settings: Settings
) -> list[Finding]:
    if fit.certificate.bounds:
        names = ", ".join(fit.certificate.bounds)
        return [
            warn(
                "bound_hit", f"{names} ended at a bound of the search: the data do not determine it"
            )
        ]
    shares = bootstrap.at_bound(problem, replicates)
    often = {name: share for name, share in shares.items() if share > (1 - settings.level) / 2}
    if often:
        shown = ", ".join(f"{name} in {share:.0%}" for name, share in often.items())
        return [
            warn(
                "bound_hit",
                f"bootstrap replicates end at a bound of the search ({shown}): intervals are cut off there",
            )
        ]
    return []


def _optimum_findings(points: Points, compute: Compute, law: Law) -> list[Finding]:
    findings, outside = [], []
    for budget in points.budgets:
        params = points.params[points.budget == budget]
        best = optimum(law, compute, budget).params
        if len(np.unique(params)) >= LEAST_LEVELS and not params.min() <= best <= params.max():
            outside.append(f"{labels.count(best)} at {labels.flops(budget)} FLOPs")
    if outside:
        findings.append(
            warn(
                "extrapolation",
                f"approach 3 puts the optimum outside the sampled sizes: {', '.join(outside)}",
            )
        )
    if compute.error > POWER_LAW_ERROR:
        findings.append(
            warn(
                "flops_not_a_power_law",
                f"FLOPs per token deviate from a power law of N by up to {compute.error:.0%}",
            )
        )
    return findings


def _groups(runs: Runs) -> tuple[tuple[str, ...], ...]:
    if runs.choice.allow_mixed_kinds:
        return (tuple(runs.families),)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, points in runs.families.items():
        groups.setdefault(points.measure.group, []).append(name)
    return tuple(tuple(names) for names in groups.values())


def _findings(runs: Runs, groups: tuple[tuple[str, ...], ...]) -> tuple[Finding, ...]:
    findings = []
    measures = {points.measure.group: points.measure for points in runs.families.values()}
    if len(measures) > 1:
        shown = "; ".join(
            f"{name}: {points.measure.label}" for name, points in runs.families.items()
        )
        how = "drawn on separate axes" if len(groups) > 1 else "drawn on one axis, as asked"
        kinds = {group[0] for group in measures}
        code = "mixed_kinds" if len(kinds) > 1 else "mixed_evaluations"
        findings.append(warn(code, f"families cannot be compared and are {how}: {shown}"))
    for family in dict.fromkeys(run.family for run in runs.excluded):
        if family not in runs.families:
            findings.append(
                refuse("too_few_points", f"family {family} has no run that can be used")
            )
    largest = max(points.budgets[-1] for points in runs.families.values())
    if largest < SMALL_SCALE:
        findings.append(
            warn(
                "small_scale",
                f"the largest budget is {labels.flops(largest)} FLOPs: at this scale the exponents illustrate the tool and are not a scientific result",
            )
        )
    return tuple(findings)
