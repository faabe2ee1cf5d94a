"""fit.json: what a fit found, for other programs.

{"schema": 1, "source": {"name", "sha256"}, "metric", "conventions": {"flops", "params"},
 "method": {"objective", "delta", "bootstrap", "seed", "level"}, "versions": {...},
 "comparable": [[families whose losses may be compared], ...],
 "families": {NAME: {
   "kind", "given", "runs", "budgets": [FLOPs], "compute": {"k", "q"} of C = k N**q D,
   "approach3": {"params": {"E", "A", "B", "alpha", "beta"} | null, "a", "objective" (summed),
     "certificate": {"converged", "gradient", "smallest_eigenvalue", "starts", "agreeing", "bounds"},
     "intervals": {each parameter and "a": [low, high]},
     "optima": [{"flops", "params", "tokens", "loss", "intervals": {...}}] at the budgets,
     "frontier": {"flops", "params", "tokens", "loss": [...], "intervals": {...: [[low], [high]]}},
     "warnings"},
   "approach2": {"a" | null, "intervals": {"a"},
     "optima": [{"flops", "params", "tokens", "loss", "interval" | null, "censored"?}], "warnings"},
   "warnings": all of the family}},
 "excluded": [{"run", "family", "status", "reason"}], "warnings": those of the runs as a whole}

N and D are in units of one, losses in that of the data. `"censored": "above"` (or "below"): the
optimum lies above `params`, which is the edge of the sampled sizes and no value. A warning is
{"code", "message", "cure", "refusal"}.
"""

import dataclasses
import platform
from importlib.metadata import version
from typing import Any

import numpy as np

from prime_jax import __version__
from prime_jax.scaling import approach2, bootstrap
from prime_jax.scaling.fit import FamilyFit, ScalingFit, Settings, curve_budgets, optima
from prime_jax.scaling.laws import Optimum, exponent, optimum

SCHEMA = 1
QUANTITIES = ("params", "tokens", "loss")


def as_dict(fit: ScalingFit) -> dict[str, Any]:
    runs, settings = fit.runs, fit.settings
    return {
        "schema": SCHEMA,
        "source": {"name": runs.source, "sha256": runs.sha256},
        "metric": runs.choice.metric,
        "conventions": {
            "flops": runs.columns.flops_convention,
            "params": runs.columns.params_convention,
        },
        "method": {
            "objective": "sum of Huber(log residual)",
            "delta": settings.delta,
            "bootstrap": settings.replicates,
            "seed": settings.seed,
            "level": settings.level,
        },
        "versions": versions(),
        "comparable": [list(group) for group in fit.groups],
        "families": {name: _family(family, settings) for name, family in fit.families.items()},
        "excluded": [dataclasses.asdict(run) for run in runs.excluded],
        "warnings": [finding.as_dict() for finding in fit.findings],
    }


def versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("numpy", "scipy")}
    return {"prime_jax": __version__, "python": platform.python_version(), **libraries}


def _family(family: FamilyFit, settings: Settings) -> dict[str, Any]:
    points = family.points
    return {
        "kind": points.measure.kind,
        "given": points.measure.given,
        "runs": len(points.loss),
        "budgets": points.budgets.tolist(),
        "compute": {"k": family.compute.k, "q": family.compute.q},
        "approach3": _approach3(family, settings),
        "approach2": _approach2(family, settings),
        "warnings": [finding.as_dict() for finding in family.findings],
    }


def _approach3(family: FamilyFit, settings: Settings) -> dict[str, Any]:
    part = family.parametric
    if part is None:
        return {"params": None, "warnings": [finding.as_dict() for finding in family.refusals]}
    law, draws, compute = part.fit.law, part.replicates, family.compute
    budgets = family.points.budgets
    best = optimum(law, compute, budgets)
    spread = _intervals(optima(draws, compute, budgets), settings.level)
    curve = curve_budgets(family.points)
    params = dataclasses.asdict(law)
    intervals = {name: bootstrap.interval(getattr(draws, name), settings.level) for name in params}
    intervals["a"] = bootstrap.interval(exponent(draws, compute), settings.level)
    certificate = part.fit.certificate
    return {
        "params": params,
        "a": float(exponent(law, compute)),
        "objective": part.fit.objective,
        "certificate": {"converged": certificate.converged, **dataclasses.asdict(certificate)},
        "intervals": intervals,
        "optima": [
            {
                "flops": float(budget),
                **{name: float(getattr(best, name)[k]) for name in QUANTITIES},
                "intervals": {name: [ends[0][k], ends[1][k]] for name, ends in spread.items()},
            }
            for k, budget in enumerate(budgets)
        ],
        "frontier": {
            "flops": curve.tolist(),
            **_lists(optimum(law, compute, curve)),
            "intervals": _intervals(optima(draws, compute, curve), settings.level),
        },
        "warnings": [finding.as_dict() for finding in part.findings],
    }


def _approach2(family: FamilyFit, settings: Settings) -> dict[str, Any]:
    isoflop, draws = family.isoflop, family.draws
    if isoflop is None:
        return {"a": None, "intervals": {"a": None}, "optima": [], "warnings": []}
    inside = 0
    rows = []
    for valley in isoflop.valleys:
        row = {name: float(getattr(valley.optimum, name)) for name in ("flops", *QUANTITIES)}
        row["interval"] = None
        if valley.censored:
            row["censored"] = valley.censored
        else:
            if draws is not None:
                row["interval"] = approach2.interval(draws.params[:, inside], settings.level)
            inside += 1
        rows.append(row)
    known = draws is not None and isoflop.a is not None
    return {
        "a": isoflop.a,
        "intervals": {"a": approach2.interval(draws.a, settings.level) if known else None},
        "optima": rows,
        "warnings": [finding.as_dict() for finding in isoflop.findings],
    }


def _intervals(draws: Optimum, level: float) -> dict[str, list[list[float]]]:
    return {name: bootstrap.interval(getattr(draws, name), level) for name in QUANTITIES}


def _lists(best: Optimum) -> dict[str, list[float]]:
    return {name: np.asarray(getattr(best, name)).tolist() for name in QUANTITIES}
