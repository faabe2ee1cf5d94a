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
from scipy.special import ndtri

from prime_jax.scaling import approach2, approach3, noise
from prime_jax.scaling.laws import Compute, Law, Optimum, fit_compute, optimum
from prime_jax.scaling.points import Points
from prime_jax.scaling.schema import Diagnostic, hidden, key, warn
from prime_jax.scaling.settings import Settings

Array = NDArray[np.float64]

MIN_FITTED = 3  # budgets, sizes and numbers of tokens of the smallest fit
MIN_RUNS = 6
MIN_SPAN = 0.25  # of the range of log C; a fit over less says little about the rest
MAX_STEPS = 8  # where there are many budgets, steps are spread over them
START_STRIDE = 11  # every 11th start: five, besides the law of all runs
LARGE_BIAS = 0.01  # of the loss; about a fifth of the compute that reaches it
BINS = (0.0, 0.25, 0.5, 1.0, 2.0, np.inf)  # decades of C beyond the fitted budgets


@dataclass(frozen=True)
class Point:
    params: float
    loss: float


@dataclass(frozen=True)
class Foreseen(Point):
    """What was predicted, and by how much it is off: predicted over measured, less 1."""

    params_error: float | None
    loss_error: float | None


@dataclass(frozen=True)
class Prediction:
    """One held-out budget.

    Attributes:
        decades: log10 of its FLOPs over those of the largest fitted budget.
        mean, rms: of the errors of its runs by approach 3.
        measured: the minimum of the parabola through its runs; None without one.
        approach3: the optimum that approach 3 predicts.
        approach2: that of the power laws of N* and of the loss through the fitted minima; None
            with fewer than three minima.
        params_n, errors_n: sizes of its runs, and approach 3's loss over the measured one, less 1.
    """

    flops: float
    decades: float
    in_range: bool
    runs: int
    mean: float
    rms: float
    measured: Point | None
    approach3: Foreseen
    approach2: Foreseen | None
    params_n: Array = hidden()
    errors_n: Array = hidden()


@dataclass(frozen=True)
class Winner(Foreseen):
    """An optimum of approach 1 beyond the fitted budgets, and what its power laws say of it."""

    flops: float
    measured: Point


@dataclass(frozen=True)
class Step:
    """A fit on the `fitted` budgets by `law`, and the rest; mean and rms of all its runs."""

    fitted: Array
    runs: int
    mean: float
    rms: float
    budgets: tuple[Prediction, ...]
    approach1: tuple[Winner, ...]
    law: Law = hidden()

    @property
    def errors_n(self) -> Array:
        return np.concatenate([prediction.errors_n for prediction in self.budgets])


@dataclass(frozen=True)
class Distance:
    """The errors of runs that lie between two distances beyond the data, in decades of C."""

    from_: float
    to: float  # may be infinite
    runs: int
    mean: float
    rms: float


@dataclass(frozen=True)
class ModelError:
    """How wrong predicted losses are, as a fraction of the loss."""

    bias: float = key("mean error of held-out runs, predicted over measured less 1")
    rms: float = key("root mean square of those errors")
    inside: float = key("rms residual of the fitted runs themselves")
    per_decade: float = key("what a decade of extrapolation adds, in quadrature to `inside`")

    def at(self, decades: ArrayLike) -> Array:
        """The expected error at a distance beyond the data; 0 is within it."""
        return np.hypot(self.inside, self.per_decade * np.asarray(decades))

    def widen(
        self, loss: ArrayLike, low: ArrayLike, high: ArrayLike, decades: ArrayLike, level: float
    ) -> tuple[Array, Array]:
        """The ends of a bootstrap interval of the loss, moved apart by the model's error."""
        extra = ndtri((1 + level) / 2) * self.at(decades) * np.asarray(loss)
        return loss - np.hypot(loss - low, extra), loss + np.hypot(high - loss, extra)


@dataclass(frozen=True)
class Rollout:
    """All steps; numbers are None without one. Every held-out run of every step counts the same."""

    bias: float | None = key("mean error of held-out runs: predicted over measured, less 1")
    rms: float | None = key("root mean square of those errors")
    inside: float | None = key("rms residual of the fitted runs themselves")
    per_decade: float | None = key("what a decade of extrapolation adds in quadrature to `inside`")
    by_distance: tuple[Distance, ...] = key(
        "`from, to` (decades; null: no end), `runs`, `mean`, `rms`"
    )
    steps: tuple[Step, ...] = key(
        "`fitted` budgets, `runs`, `mean`, `rms` and, for each of the `budgets` predicted, "
        "`measured`, `approach3` and `approach2` with their errors; `approach1` alike"
    )
    warnings: tuple[Diagnostic, ...] = hidden(default=())

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        return tuple(prediction for step in self.steps for prediction in step.budgets)


def distance(points: Points, flops: ArrayLike) -> Array:
    """Decades of C outside the range of the data; 0 inside."""
    return np.maximum(0.0, np.log10(flops) - np.log10(points.levels[-1])) + np.maximum(
        0.0, np.log10(points.levels[0]) - np.log10(flops)
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
        return _rollout((), np.array([]), (few,))
    if len(cuts) > MAX_STEPS:
        cuts = [cuts[k] for k in np.linspace(0, len(cuts) - 1, MAX_STEPS).round().astype(int)]
    compute = fit_compute(points.flops, points.params, points.tokens)
    if law is None:
        everything = np.ones(len(points.loss), dtype=bool)
        law = approach3.fit(_problem(points, everything, settings)).law
    weight_n = _weights(points, law)
    residuals = points.expected(law) / points.loss - 1
    isoflop = approach2.fit(points.of_isoflop(law), compute, settings.approach2)
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
    return _rollout(steps, residuals)


def model_error(rollout: Rollout | None) -> ModelError | None:
    """None without a step."""
    if rollout is None or not rollout.steps:
        return None
    return ModelError(rollout.bias, rollout.rms, rollout.inside, rollout.per_decade)


def _rollout(
    steps: Sequence[Step], residuals_n: Array, warnings: tuple[Diagnostic, ...] = ()
) -> Rollout:
    """Of the steps, and of the relative residuals of the law of all runs."""
    predictions = [prediction for step in steps for prediction in step.budgets]
    if not predictions:
        return Rollout(
            bias=None,
            rms=None,
            inside=None,
            per_decade=None,
            by_distance=(),
            steps=(),
            warnings=warnings,
        )
    errors = np.concatenate([p.errors_n for p in predictions])
    decades = np.concatenate([np.full(len(p.errors_n), p.decades) for p in predictions])
    error = error_of(errors, decades, residuals_n)
    bins = []
    for low, high in itertools.pairwise(BINS):
        mine = [p.errors_n for p in predictions if low < p.decades <= high]
        if mine:
            bins.append(Distance(low, high, **_summary(np.concatenate(mine))))
    return Rollout(
        **vars(error),
        by_distance=tuple(bins),
        steps=tuple(steps),
        warnings=_findings(error.bias),
    )


def error_of(errors_m: Array, decades_m: Array, residuals_n: Array) -> ModelError | None:
    """Of held-out errors at distances beyond what was fitted, and of the residuals of the fit.

    None without an error.
    """
    if not len(errors_m):
        return None
    inside = np.mean(residuals_n**2)
    growth = max(0.0, np.mean(errors_m**2) - inside) / np.mean(decades_m**2)
    return ModelError(
        bias=float(errors_m.mean()),
        rms=float(np.sqrt(np.mean(errors_m**2))),
        inside=float(np.sqrt(inside)),
        per_decade=float(np.sqrt(growth)),
    )


@dataclass(frozen=True)
class HeldOutRuns:
    """The errors of the single runs of one prediction."""

    fitted_up_to: float
    flops: float
    params: Array
    errors: Array


@dataclass(frozen=True)
class Validation(Rollout):
    """A family of validate.json: its rollout with every run, and its warnings."""

    kind: str = ""
    runs: tuple[HeldOutRuns, ...] = ()
    # The same field, written here: in fit.json they are among those of the family.
    warnings: tuple[Diagnostic, ...] = key("warnings of the family", default=())


def validate_family(points: Points, settings: Settings) -> Validation:
    if any(diagnostic.refusal for diagnostic in points.diagnostics):
        found = _rollout((), np.array([]), points.diagnostics)
    else:
        found = rollout(points, settings)
    runs = tuple(
        HeldOutRuns(float(step.fitted[-1]), one.flops, one.params_n, one.errors_n)
        for step in found.steps
        for one in step.budgets
    )
    return Validation(**vars(found), kind=points.measure.kind, runs=runs)


def _summary(errors_n: Array) -> dict[str, Any]:
    rms = float(np.sqrt(np.mean(errors_n**2)))
    return {"runs": len(errors_n), "mean": float(errors_n.mean()), "rms": rms}


def _against(foreseen: Optimum, measured: Optimum | None) -> dict[str, float | None]:
    """The fields of `Foreseen`."""
    errors = {
        f"{name}_error": float(getattr(foreseen, name) / getattr(measured, name) - 1)
        if measured
        else None
        for name in ("params", "loss")
    }
    return {"params": float(foreseen.params), "loss": float(foreseen.loss)} | errors


def _point(best: Optimum) -> Point:
    return Point(float(best.params), float(best.loss))


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
        delta=settings.delta,
        objective=settings.objective,
        law=settings.law,
        unique=points.available[fitted],
    )


def _weights(points: Points, law: Law) -> Array:
    """Of all runs, as in their fit; most of all they tell repeats and tuned runs from others."""
    residual = np.log(points.expected(law) / points.loss)
    scatter = noise.scatter(residual, len(vars(law)))
    return noise.of(points).run_weights(scatter)


def _law(problem: approach3.Problem, near: Law) -> Law:
    start = np.vstack(
        [problem.form.theta(near), problem.form.starts(problem.log_loss_n)[::START_STRIDE]]
    )
    weight = np.broadcast_to(problem.weight_n, (len(start), problem.runs))
    ends, values = approach3.solve(problem, start, weight)
    return problem.form.law(ends[np.argmin(values)])


def _step(
    points: Points,
    k: int,
    law: Law,
    isoflop: approach2.Approach2,
    envelope: Sequence[Optimum],
    compute: Compute,
) -> Step:
    fitted, held_out = points.budgets[:k], points.budgets[k:]
    minima = {curve.optimum.flops: curve.optimum for curve in isoflop.inside}
    known = [best for flops, best in minima.items() if flops <= fitted[-1]]
    predictions = []
    for flops in held_out.tolist():
        mine = points.budget == flops
        params = points.params[mine]
        errors = points.only(mine).expected(law) / points.loss[mine] - 1
        measured, power = minima.get(flops), _power(known, compute, flops)
        predictions.append(
            Prediction(
                flops=flops,
                decades=float(np.log10(flops / fitted[-1])),
                in_range=False,
                **_summary(errors),
                measured=measured and _point(measured),
                approach3=Foreseen(**_against(optimum(law, compute, flops), measured)),
                approach2=power and Foreseen(**_against(power, measured)),
                params_n=params,
                errors_n=errors,
            )
        )
    winners = [best for best in envelope if best.flops <= fitted[-1]]
    later = [best for best in envelope if best.flops > fitted[-1]]
    foreseen = [(best, _power(winners, compute, float(best.flops))) for best in later]
    return Step(
        fitted=fitted,
        **_summary(np.concatenate([one.errors_n for one in predictions])),
        budgets=tuple(predictions),
        approach1=tuple(
            Winner(**_against(power, best), flops=float(best.flops), measured=_point(best))
            for best, power in foreseen
            if power
        ),
        law=law,
    )


def _power(known: list[Optimum], compute: Compute, flops: float) -> Optimum | None:
    """Straight lines through log N* and log loss against log C, read off at `flops`."""
    if len(known) < MIN_FITTED:
        return None
    x = np.log([best.flops for best in known])
    lines = (np.polyfit(x, np.log([getattr(b, n) for b in known]), 1) for n in ("params", "loss"))
    params, loss = (np.exp(np.polyval(line, np.log(flops))) for line in lines)
    return Optimum(flops, params, compute.tokens(flops, params), loss)


def _findings(bias: float) -> tuple[Diagnostic, ...]:
    if abs(bias) < LARGE_BIAS:
        return ()
    side = "high" if bias > 0 else "low"
    return (
        warn(
            "held_out_bias",
            f"losses of larger budgets predicted from smaller ones are too {side} by {abs(bias):.1%} on average",
        ),
    )
