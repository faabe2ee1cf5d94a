"""All fits of a set of runs: per family approach 3 with its bootstrap, and approach 2."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prime_jax.errors import UserError
from prime_jax.scaling import (
    agreement,
    approach1,
    approach2,
    bootstrap,
    labels,
    parametric,
    validate,
)
from prime_jax.scaling.curves import Curves
from prime_jax.scaling.debias import Debiased
from prime_jax.scaling.diagnostics import Diagnostic, refuse, warn
from prime_jax.scaling.laws import Compute, Law, Optimum, exponent, fit_compute, optimum
from prime_jax.scaling.parametric import Parametric
from prime_jax.scaling.points import Points, Runs
from prime_jax.scaling.settings import DEFAULTS, Settings
from prime_jax.scaling.validate import Rollout

Array = NDArray[np.float64]

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
    disagreements = approach2.check(isoflop, draws, settings.level)
    isoflop = replace(isoflop, diagnostics=isoflop.diagnostics + disagreements)
    envelope = approach1.fit(curves, settings.replicates, settings.seed, settings.level)
    refusal = parametric.too_few(points)
    three = None if refusal else parametric.fit(points, compute, settings)
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
    return replace(
        family, disagreements=tuple(agreement.diagnostics(exponents(family, settings.level)))
    )


def exponents(family: FamilyFit, level: float) -> dict[str, agreement.Estimate]:
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
        ends = bootstrap.interval(exponent(replicates, family.compute), level)
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
