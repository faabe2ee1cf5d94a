"""fit.json: what a fit found, for other programs.

{"schema": 2, "source": {"name", "sha256", "points": SHA-256 of points.csv beside it}, "metric", "conventions": {"flops", "params"},
 "method": {"objective", "delta", "bootstrap", "seed", "level", "allow_mixed_kinds",
   "settings": all that a refit of points.csv needs}, "versions": {...},
 "comparable": [[families whose losses may be compared], ...],
 "families": {NAME: {
   "kind", "given", "runs", "budgets": [FLOPs], "compute": {"k", "q"} of C = k N**q D,
   "approach3": {"params": {"E", "A", "B", "alpha", "beta"} | null, "a", "objective" (summed),
     "certificate": {"converged", "gradient", "smallest_eigenvalue", "starts", "agreeing", "bounds"},
     "intervals": {each parameter and "a": [low, high]} (bootstrap),
     "profile": {each parameter and "a": [low | null, high | null]} (null: the interval is open),
     "optima": [{"flops", "params", "tokens", "loss", "intervals": {...},
       "profile": {"params": [low | null, high | null]} | null (not profiled: many budgets),
       "intervals_with_model": {"loss"} | null (widened by the error of the rollout)}] at the budgets,
     "frontier": {"flops", "params", "tokens", "loss": [...], "intervals": {...: [[low], [high]]},
       "intervals_with_model": {"loss": [[low], [high]]} | null},
     "warnings"},
   "approach2": {"method": "parabola" | "akima", "a" | null, "intervals": {"a"},
     "optima": [{"flops", "params", "tokens", "loss", "interval" | null, "censored"?}],
     "debiased": null | {"a", "intervals": {"a"},
       "optima": [{"flops", "params", "tokens", "loss", "interval" | null, "shift"}]}, "warnings"},
   "approach1": {"a" | null, "b" | null, "intervals": {"a", "b"}, "kind" (of the curves),
     "optima": [{"flops", "params", "tokens", "loss"}], "envelope": {"flops", "loss": [...]}, "warnings"},
   "error_budget": {"seed", "tuning" | null, "evaluation" | null: {"relative_sd", "basis", "runs"},
     "model": {"bias", "rms"} of a rollout | null, "scatter" about the law | null,
     "weights": [smallest, largest] | null}, relative to the loss,
   "rollout": as validate.as_dict has it, null without approach 3,
   "template": {"config", "rules"} that runs of a sweep share, for new ones (only of a sweep),
   "warnings": all of the family}},
 "excluded": [{"run", "family", "status", "reason"}], "warnings": those of the runs as a whole}

N and D are in units of one, losses in that of the data. `"censored": "above"` (or "below"): the
optimum lies above `params`, which is the edge of the sampled sizes and no value. `shift` is by how
much the minimum of a parabola lies above the optimum, relative to it. `b` is the exponent of D*(C).
Warnings of an approach 1 that nobody asked for (--curves) and that was refused are only there. A warning is
{"code", "message", "hint", "refusal"}.
"""

import dataclasses
import platform
from importlib.metadata import version
from typing import Any

import numpy as np

from prime_jax import __version__
from prime_jax.scaling import approach2, noise, validate
from prime_jax.scaling.fit import CURVE, FamilyFit, ScalingFit, curve_budgets, optima
from prime_jax.scaling.intervals import Ends, percentiles
from prime_jax.scaling.laws import Optimum, exponent, optimum
from prime_jax.scaling.points import Runs
from prime_jax.scaling.settings import Settings

SCHEMA = 2
QUANTITIES = ("params", "tokens", "loss")
OBJECTIVES = {
    "huber": "sum of Huber(log residual)",
    "ls": "sum of squared log residuals / 2",
}


def as_dict(fit: ScalingFit) -> dict[str, Any]:
    settings = fit.settings
    return {
        "schema": SCHEMA,
        **origin(fit.runs, settings),
        "comparable": [list(group) for group in fit.groups],
        "families": {name: _family(family, settings) for name, family in fit.families.items()},
        "excluded": [dataclasses.asdict(run) for run in fit.runs.excluded],
        "warnings": [diagnostic.as_dict() for diagnostic in fit.diagnostics],
    }


def origin(runs: Runs, settings: Settings) -> dict[str, Any]:
    """What was fitted, and how."""
    return {
        "source": {"name": runs.source, "sha256": runs.sha256},
        "metric": runs.choice.metric,
        "conventions": {
            "flops": runs.columns.flops_convention,
            "params": runs.columns.params_convention,
        },
        "method": {
            "objective": OBJECTIVES[settings.objective],
            "delta": settings.delta if settings.objective == "huber" else None,
            "bootstrap": settings.replicates,
            "seed": settings.seed,
            "level": settings.level,
            "allow_mixed_kinds": runs.choice.allow_mixed_kinds,
            "settings": dataclasses.asdict(settings),
        },
        "versions": versions(),
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
        "approach1": _approach1(family, settings),
        "error_budget": _error_budget(family),
        "rollout": family.rollout and validate.as_dict(family.rollout),
        "warnings": [diagnostic.as_dict() for diagnostic in family.diagnostics],
    }


def _approach3(family: FamilyFit, settings: Settings) -> dict[str, Any]:
    part = family.parametric
    if part is None:
        return {
            "params": None,
            "warnings": [diagnostic.as_dict() for diagnostic in family.refusals],
        }
    law, draws, compute = part.fit.law, part.replicates, family.compute
    budgets = family.points.budgets
    best = optimum(law, compute, budgets)
    spread = _intervals(optima(draws, compute, budgets), settings.level)
    wider = _with_model(family, best, spread["loss"], settings)
    curve = curve_budgets(family.points)
    frontier = optimum(law, compute, curve)
    band = _intervals(optima(draws, compute, curve), settings.level)
    wider_band = _with_model(family, frontier, band["loss"], settings)
    params = dataclasses.asdict(law)
    intervals = {name: percentiles(getattr(draws, name), settings.level) for name in params}
    intervals["a"] = percentiles(exponent(draws, compute), settings.level)
    certificate = part.fit.certificate
    return {
        "params": params,
        "a": float(exponent(law, compute)),
        "objective": part.fit.objective,
        "certificate": {"converged": certificate.converged, **dataclasses.asdict(certificate)},
        "intervals": intervals,
        "profile": {name: list(ends) for name, ends in part.profile.items()},
        "optima": [
            {
                "flops": float(budget),
                **{name: float(getattr(best, name)[k]) for name in QUANTITIES},
                "intervals": {name: [ends[0][k], ends[1][k]] for name, ends in spread.items()},
                "profile": _profiled(part.sizes, budget),
                "intervals_with_model": wider and {"loss": [ends[k] for ends in wider]},
            }
            for k, budget in enumerate(budgets)
        ],
        "frontier": {
            "flops": curve.tolist(),
            **_lists(frontier),
            "intervals": band,
            "intervals_with_model": wider_band and {"loss": wider_band},
        },
        "warnings": [diagnostic.as_dict() for diagnostic in part.diagnostics],
    }


def _profiled(sizes: dict[float, Ends], budget: float) -> dict[str, list[float | None]] | None:
    return {"params": list(sizes[budget])} if budget in sizes else None


def _error_budget(family: FamilyFit) -> dict[str, Any]:
    part = family.parametric
    errors = part.errors if part else noise.of(family.points)
    error = validate.model_error(family.rollout) if family.rollout else None
    weight_n = part and part.problem.weight_n
    return {
        "seed": dataclasses.asdict(errors.seed),
        "tuning": errors.tuning and dataclasses.asdict(errors.tuning),
        "evaluation": errors.evaluation and dataclasses.asdict(errors.evaluation),
        "model": error and {"bias": error.bias, "rms": error.rms},
        "scatter": part and part.scatter,
        "weights": None if weight_n is None else [float(weight_n.min()), float(weight_n.max())],
    }


def _approach2(family: FamilyFit, settings: Settings) -> dict[str, Any]:
    isoflop, draws = family.isoflop, family.draws
    if isoflop is None:
        none = {"a": None, "intervals": {"a": None}, "optima": [], "debiased": None}
        return {"method": settings.approach2, **none, "warnings": []}
    inside = 0
    rows = []
    for curve in isoflop.curves:
        row = {name: float(getattr(curve.optimum, name)) for name in ("flops", *QUANTITIES)}
        row["interval"] = None
        if curve.censored:
            row["censored"] = curve.censored
        else:
            if draws is not None:
                row["interval"] = approach2.interval(draws.params[:, inside], settings.level)
            inside += 1
        rows.append(row)
    known = draws is not None and isoflop.a is not None
    return {
        "method": isoflop.method,
        "a": isoflop.a,
        "intervals": {"a": approach2.interval(draws.a, settings.level) if known else None},
        "optima": rows,
        "debiased": _debiased(family, settings),
        "warnings": [diagnostic.as_dict() for diagnostic in isoflop.diagnostics],
    }


def _debiased(family: FamilyFit, settings: Settings) -> dict[str, Any] | None:
    part, level = family.debiased, settings.level
    if part is None:
        return None
    rows = []
    for k, (best, shift) in enumerate(zip(part.optima, part.shift_K, strict=True)):
        draws = None if part.log_params_RxK is None else np.exp(part.log_params_RxK[:, k])
        row = {name: float(getattr(best, name)) for name in ("flops", *QUANTITIES)}
        row["interval"] = None if draws is None else approach2.interval(draws, level)
        rows.append(row | {"shift": float(np.expm1(shift))})
    ends = None if part.a_R is None else approach2.interval(part.a_R, level)
    return {"a": part.a, "intervals": {"a": ends}, "optima": rows}


def _approach1(family: FamilyFit, settings: Settings) -> dict[str, Any]:
    part = family.envelope
    line = part.line if part else None
    if part is None or line is None:
        warnings = [diagnostic.as_dict() for diagnostic in part.diagnostics] if part else []
        none = {"a": None, "b": None, "intervals": {"a": None, "b": None}}
        empty = {"optima": [], "envelope": {"flops": [], "loss": []}}
        return {**none, "kind": part.kind if part else "", **empty, "warnings": warnings}
    every = max(1, len(part.flops_g) // CURVE)
    return {
        "a": line.a,
        "b": line.b,
        "intervals": {
            "a": approach2.interval(part.a_R, settings.level),
            "b": approach2.interval(part.b_R, settings.level),
        },
        "kind": part.kind,
        "optima": [dataclasses.asdict(best) for best in part.optima],
        "envelope": {
            "flops": part.flops_g[::every].tolist(),
            "loss": part.loss_g[::every].tolist(),
        },
        "warnings": [diagnostic.as_dict() for diagnostic in part.diagnostics],
    }


def _intervals(draws: Optimum, level: float) -> dict[str, list[list[float]]]:
    return {name: percentiles(getattr(draws, name), level) for name in QUANTITIES}


def _with_model(
    family: FamilyFit, best: Optimum, ends: list[list[float]], settings: Settings
) -> list[list[float]] | None:
    """Intervals of the loss moved apart by the error of held-out budgets, if that is known."""
    error = validate.model_error(family.rollout) if family.rollout else None
    if error is None:
        return None
    low, high = (np.asarray(end) for end in ends)
    decades = validate.distance(family.points, best.flops)
    wider = error.widen(np.asarray(best.loss), low, high, decades, settings.level)
    return [end.tolist() for end in wider]


def _lists(best: Optimum) -> dict[str, list[float]]:
    return {name: np.asarray(getattr(best, name)).tolist() for name in QUANTITIES}
