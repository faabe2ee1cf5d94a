"""Rollout: fit on the budgets up to k, predict the rest, and see how wrong that was.

A bootstrap resamples runs under the law, so it cannot see that the law itself bends; predictions
of larger budgets from smaller ones do, and on most public data they come out too high. The error
of held-out budgets is therefore reported beside every fit and widens its bands of the loss.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from prime_jax.scaling import approach2, approach3, noise
from prime_jax.scaling.diagnostics import Diagnostic, warn
from prime_jax.scaling.laws import Compute, Law, Optimum, fit_compute, optimum
from prime_jax.scaling.points import Points
from prime_jax.scaling.settings import Settings

Array = NDArray[np.float64]

SCHEMA = 1  # of validate.json: {"schema", the origin as in fit.json, "families": {NAME: report}}
MIN_FITTED = 3  # budgets, sizes and numbers of tokens of the smallest fit
MIN_RUNS = 6
MIN_SPAN = 0.25  # of the range of log C; a fit over less says little about the rest
MAX_STEPS = 8  # where there are many budgets, steps are spread over them
START_STRIDE = 11  # every 11th start: five, besides the law of all runs
LARGE_BIAS = 0.01  # of the loss; about a fifth of the compute that reaches it
BINS = (0.0, 0.25, 0.5, 1.0, 2.0, np.inf)  # decades of C beyond the fitted budgets


@dataclass(frozen=True)
class Prediction:
    """One held-out budget.

    Attributes:
        decades: log10 of its FLOPs over those of the largest fitted budget.
        params_n, errors_n: sizes of its runs, and approach 3's loss over the measured one, less 1.
        parametric: the optimum that approach 3 predicts.
        power: that of approach 2's power laws of N* and of the loss through the fitted minima;
            None with fewer than three minima.
        measured: the minimum of the parabola through the held-out runs; None without one.
    """

    flops: float
    decades: float
    params_n: Array
    errors_n: Array
    parametric: Optimum
    power: Optimum | None
    measured: Optimum | None


@dataclass(frozen=True)
class Step:
    """A fit on some budgets, and the rest.

    Attributes:
        fitted: budgets.
        law: approach 3 on their runs.
        predictions: of the others.
        envelope: optima of approach 1 beyond the fitted budgets, each with what the power laws
            through those within say about it.
    """

    fitted: Array
    law: Law
    predictions: tuple[Prediction, ...]
    envelope: tuple[tuple[Optimum, Optimum], ...] = ()

    @property
    def errors_n(self) -> Array:
        return np.concatenate([prediction.errors_n for prediction in self.predictions])


@dataclass(frozen=True)
class Rollout:
    """All steps, and the relative residuals of the law of all runs."""

    steps: tuple[Step, ...]
    residuals_n: Array
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        return tuple(prediction for step in self.steps for prediction in step.predictions)


@dataclass(frozen=True)
class ModelError:
    """How wrong predicted losses are, as a fraction of the loss.

    Attributes:
        bias, rms: of the held-out runs; a positive bias is a prediction that is too high.
        inside: rms residual of the fitted runs.
        per_decade: what a decade of extrapolation adds (in quadrature to `inside`).
    """

    bias: float
    rms: float
    inside: float
    per_decade: float

    def at(self, decades: ArrayLike) -> Array:
        """The expected error at a distance beyond the data; 0 is within it."""
        return np.hypot(self.inside, self.per_decade * np.asarray(decades))

    def widen(
        self, loss: ArrayLike, low: ArrayLike, high: ArrayLike, decades: ArrayLike, level: float
    ) -> tuple[Array, Array]:
        """The ends of a bootstrap interval of the loss, moved apart by the model's error."""
        extra = norm.ppf((1 + level) / 2) * self.at(decades) * np.asarray(loss)
        return loss - np.hypot(loss - low, extra), loss + np.hypot(high - loss, extra)


def distance(points: Points, flops: ArrayLike) -> Array:
    """Decades of C outside the budgets of the data; 0 inside."""
    return np.maximum(0.0, np.log10(flops) - np.log10(points.budgets[-1])) + np.maximum(
        0.0, np.log10(points.budgets[0]) - np.log10(flops)
    )


def rollout(
    points: Points,
    settings: Settings,
    law: Law | None = None,
    envelope: Sequence[Optimum] = (),
) -> Rollout:
    """Fit on each beginning of the budgets and predict the rest.

    Args:
        points: the runs.
        settings: as of their fit.
        law: that of all runs, if it is known already; only saves time.
        envelope: optima of approach 1.
    """
    cuts = [k for k in range(MIN_FITTED, len(points.budgets)) if _enough(points, k)]
    if not cuts:
        few = warn(
            "too_few_budgets",
            f"a rollout needs {MIN_FITTED + 1} budgets, so the error of predictions is not known",
        )
        return Rollout((), np.array([]), (few,))
    if len(cuts) > MAX_STEPS:
        cuts = [cuts[k] for k in np.linspace(0, len(cuts) - 1, MAX_STEPS).round().astype(int)]
    compute = fit_compute(points.flops, points.params, points.tokens)
    if law is None:
        everything = np.ones(len(points.loss), dtype=bool)
        law = approach3.fit(_problem(points, everything, settings)).law
    weight_n = _weights(points, law)
    residuals = law.loss(points.params, points.tokens) / points.loss - 1
    isoflop = approach2.fit(points, compute, settings.approach2)
    steps = []
    for k in cuts:
        fitted = points.budget <= points.budgets[k - 1]
        problem = replace(_problem(points, fitted, settings), weight_n=weight_n[fitted])
        steps.append(
            _step(
                points,
                k=k,
                law=_law(problem, law),
                isoflop=isoflop,
                envelope=envelope,
                compute=compute,
            )
        )
    found = Rollout(tuple(steps), residuals)
    return replace(found, diagnostics=_findings(model_error(found)))


def model_error(rollout: Rollout) -> ModelError | None:
    """None without a step. Every held-out run of every step counts the same."""
    if not rollout.steps:
        return None
    errors = np.concatenate([prediction.errors_n for prediction in rollout.predictions])
    decades = np.concatenate([np.full(len(p.errors_n), p.decades) for p in rollout.predictions])
    inside = np.mean(rollout.residuals_n**2)
    growth = max(0.0, np.mean(errors**2) - inside) / np.mean(decades**2)
    return ModelError(
        float(errors.mean()),
        float(np.sqrt(np.mean(errors**2))),
        float(np.sqrt(inside)),
        float(np.sqrt(growth)),
    )


def by_distance(rollout: Rollout) -> list[tuple[float, float, Array]]:
    """Errors of held-out runs by decades of extrapolation: (from, to, errors_n), none empty."""
    out = []
    for low, high in itertools.pairwise(BINS):
        mine = [p.errors_n for p in rollout.predictions if low < p.decades <= high]
        if mine:
            out.append((low, high, np.concatenate(mine)))
    return out


def report(points: Points, settings: Settings) -> dict[str, Any]:
    """A family of validate.json: its `rollout` with every run, and its warnings.

    {..., "kind", "runs": [{"fitted_up_to", "flops", "params": [N], "errors": [...]}], "warnings"}
    """
    if any(diagnostic.refusal for diagnostic in points.diagnostics):
        found = Rollout((), np.array([]), points.diagnostics)
    else:
        found = rollout(points, settings)
    runs = [
        {
            "fitted_up_to": float(step.fitted[-1]),
            "flops": prediction.flops,
            "params": prediction.params_n.tolist(),
            "errors": prediction.errors_n.tolist(),
        }
        for step in found.steps
        for prediction in step.predictions
    ]
    warnings = [diagnostic.as_dict() for diagnostic in found.diagnostics]
    return {**as_dict(found), "kind": points.measure.kind, "runs": runs, "warnings": warnings}


def as_dict(rollout: Rollout) -> dict[str, Any]:
    """The `rollout` of fit.json and validate.json.

    {"bias", "rms", "inside", "per_decade": ModelError, all null without a step,
     "by_distance": [{"from", "to" (decades; null: no end), "runs", "mean", "rms"}],
     "steps": [{"fitted": [FLOPs], "mean", "rms",
       "budgets": [{"flops", "decades", "in_range": false, "runs", "mean", "rms",
         "measured": {"params", "loss"} | null (the minimum of the held-out budget),
         "approach3" and "approach2": {"params", "loss", "params_error", "loss_error"} | null}],
       "approach1": [alike, with "flops" and "measured"]}]}

    Errors are predicted / measured - 1; `mean` and `rms` those of approach 3 on the single runs.
    """
    error = model_error(rollout)
    names = ("bias", "rms", "inside", "per_decade")
    return {
        **{name: error and getattr(error, name) for name in names},
        "by_distance": [
            {"from": low, "to": high if np.isfinite(high) else None, **_summary(errors)}
            for low, high, errors in by_distance(rollout)
        ],
        "steps": [
            {
                "fitted": step.fitted.tolist(),
                **_summary(step.errors_n),
                "budgets": [_prediction(prediction) for prediction in step.predictions],
                "approach1": [
                    {
                        "flops": float(best.flops),
                        "measured": _best(best),
                        **_against(foreseen, best),
                    }
                    for best, foreseen in step.envelope
                ],
            }
            for step in rollout.steps
        ],
    }


def _prediction(p: Prediction) -> dict[str, Any]:
    return {
        "flops": p.flops,
        "decades": p.decades,
        "in_range": False,
        **_summary(p.errors_n),
        "measured": p.measured and _best(p.measured),
        "approach3": _against(p.parametric, p.measured),
        "approach2": p.power and _against(p.power, p.measured),
    }


def _summary(errors_n: Array) -> dict[str, Any]:
    rms = float(np.sqrt(np.mean(errors_n**2)))
    return {"runs": len(errors_n), "mean": float(errors_n.mean()), "rms": rms}


def _best(best: Optimum) -> dict[str, float]:
    return {"params": float(best.params), "loss": float(best.loss)}


def _against(foreseen: Optimum, measured: Optimum | None) -> dict[str, float | None]:
    errors = {
        f"{name}_error": float(getattr(foreseen, name) / getattr(measured, name) - 1)
        if measured
        else None
        for name in ("params", "loss")
    }
    return _best(foreseen) | errors


def _enough(points: Points, k: int) -> bool:
    log_flops = np.log(points.budgets)
    if log_flops[k - 1] - log_flops[0] < MIN_SPAN * np.ptp(log_flops):
        return False
    fitted = points.budget <= points.budgets[k - 1]
    levels = min(len(np.unique(v[fitted])) for v in (points.params, points.tokens))
    return fitted.sum() >= MIN_RUNS and levels >= MIN_FITTED


def _problem(points: Points, fitted: NDArray[np.bool_], settings: Settings) -> approach3.Problem:
    return approach3.problem(
        points.params[fitted],
        points.tokens[fitted],
        points.loss[fitted],
        settings.delta,
        settings.objective,
    )


def _weights(points: Points, law: Law) -> Array:
    """Of all runs, as in their fit; most of all they tell repeats and tuned runs from others."""
    scatter = noise.scatter(np.log(law.loss(points.params, points.tokens) / points.loss))
    return noise.of(points).weights(scatter)


def _law(problem: approach3.Problem, near: Law) -> Law:
    start = np.vstack([problem.theta(near), approach3.starts(problem)[::START_STRIDE]])
    weight = np.broadcast_to(problem.weight_n, (len(start), len(problem.x_n)))
    ends, values = approach3.solve(problem, start, weight)
    return problem.law(ends[np.argmin(values)])


def _step(
    points: Points,
    k: int,
    law: Law,
    isoflop: approach2.Isoflop,
    envelope: Sequence[Optimum],
    compute: Compute,
) -> Step:
    fitted, held_out = points.budgets[:k], points.budgets[k:]
    minima = {curve.optimum.flops: curve.optimum for curve in isoflop.inside}
    known = [best for flops, best in minima.items() if flops <= fitted[-1]]
    predictions = []
    for flops in held_out.tolist():
        mine = points.budget == flops
        params, tokens, loss = points.params[mine], points.tokens[mine], points.loss[mine]
        predictions.append(
            Prediction(
                flops=flops,
                decades=float(np.log10(flops / fitted[-1])),
                params_n=params,
                errors_n=law.loss(params, tokens) / loss - 1,
                parametric=optimum(law, compute, flops),
                power=_power(known, compute, flops),
                measured=minima.get(flops),
            )
        )
    winners = [best for best in envelope if best.flops <= fitted[-1]]
    later = [best for best in envelope if best.flops > fitted[-1]]
    foreseen = [(best, _power(winners, compute, float(best.flops))) for best in later]
    return Step(fitted, law, tuple(predictions), tuple(pair for pair in foreseen if pair[1]))


def _power(known: list[Optimum], compute: Compute, flops: float) -> Optimum | None:
    """Straight lines through log N* and log loss against log C, read off at `flops`."""
    if len(known) < MIN_FITTED:
        return None
    x = np.log([best.flops for best in known])
    lines = (np.polyfit(x, np.log([getattr(b, n) for b in known]), 1) for n in ("params", "loss"))
    params, loss = (np.exp(np.polyval(line, np.log(flops))) for line in lines)
    return Optimum(flops, params, compute.tokens(flops, params), loss)


def _findings(error: ModelError | None) -> tuple[Diagnostic, ...]:
    if error is None or abs(error.bias) < LARGE_BIAS:
        return ()
    side = "high" if error.bias > 0 else "low"
    return (
        warn(
            "held_out_bias",
            f"losses of larger budgets predicted from smaller ones are too {side} by {abs(error.bias):.1%} on average",
        ),
    )
