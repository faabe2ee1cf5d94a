"""How much the loss of a run is off for reasons other than its N and D.

* Seed: another seed gives another loss. Measured from runs that repeat one (N, D, learning rate, batch).
* Tuning: a learning rate beside the best one costs about curvature * (log lr - log best)**2 nats.
  Measured where runs of one (N, D) differ in learning rate; elsewhere not known, and left out.
* Evaluation: the standard error of the loss, as stated with it.
* Model: what a law of this form misses beyond the data. Only a rollout shows it (validate.py);
  it widens predictions and has no part in the weights.

The first three add up to a standard deviation for each run. A run weighs as one over its variance,
to which is added the scatter about the law that these sources do not explain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prime_jax.scaling.points import SEED, Points, cells, groups, repeated
from prime_jax.scaling.schema import hidden, key

Array = NDArray[np.float64]

CURVATURE = 0.03  # nats per squared unit of log lr, as is typical
NORMAL = 1.4826  # standard deviation over median size of normal numbers


@dataclass(frozen=True)
class Source:
    """What makes losses differ.

    Attributes:
        relative_sd: root mean square over the runs it is known for, as a fraction of the loss.
        basis: what the number rests on.
        runs: how many it is known for.
    """

    relative_sd: float
    basis: str
    runs: int


@dataclass(frozen=True)
class Held:
    """Errors of held-out budgets, relative to the loss."""

    bias: float
    rms: float


@dataclass(frozen=True)
class ErrorBudget:
    """A source is None where nothing is known about it; all are relative to the loss."""

    seed: Source = key("error from another seed: `relative_sd, basis, runs`")
    tuning: Source | None = key("error from a learning rate beside the best one")
    evaluation: Source | None = key("error from the evaluation: standard errors of the losses")
    model: Held | None = key("error of the law: `bias, rms` of the rollout", default=None)
    scatter: float | None = key("scatter of the runs about the law", default=None)
    weights: list[float] | None = key(
        "weights of the runs in the fit: `[smallest, largest]`", default=None
    )
    sd_n: Array = hidden(default=None)  # of each run, all sources together

    def run_weights(self, scatter: float) -> Array:
        """Weights_n of mean 1; all exactly 1 if nothing tells the runs apart.

        `scatter` is the standard deviation of the log residuals of a fit without weights.
        """
        variance = self.sd_n**2
        if np.ptp(variance) == 0:
            return np.ones(len(variance))
        weight = 1 / (variance + max(scatter**2 - variance.mean(), 0.0))
        return weight / weight.mean()


def of(points: Points) -> ErrorBudget:
    evaluation, evaluation_n = _evaluation(points)
    tuning, tuning_n = _tuning(points)
    seed = _seed(points, evaluation_n)
    total = np.sqrt(seed.relative_sd**2 + evaluation_n**2 + tuning_n**2)
    return ErrorBudget(seed, tuning, evaluation, sd_n=total)


def scatter(residual_n: Array, unknowns: int) -> float:
    """Standard deviation about a law with so many unknowns, from the median size: a few odd runs
    do not move it."""
    count = len(residual_n)
    hugged = np.sqrt(count / max(count - unknowns, 1))
    return float(NORMAL * np.median(np.abs(residual_n)) * hugged)


def _seed(points: Points, evaluation_n: Array) -> Source:
    """Scatter within repeats less what the evaluation explains of it."""
    repeats = repeated(points.params, points.tokens, points.lr, points.batch, _fresh(points))
    if not repeats:
        return Source(SEED, "assumed", 0)
    log_loss, squares, freedom = np.log(points.loss), 0.0, 0
    for members in repeats:
        squares += np.sum((log_loss[members] - log_loss[members].mean()) ** 2)
        squares -= (len(members) - 1) * np.mean(evaluation_n[members] ** 2)
        freedom += len(members) - 1
    variance = max(float(squares) / freedom, 0.0)
    return Source(float(np.sqrt(variance)), "repeated runs", sum(map(len, repeats)))


def _fresh(points: Points) -> Array:
    """Tokens that a run saw once or more: runs that repeat data to different degrees differ."""
    return np.minimum(points.available, points.tokens)


def _evaluation(points: Points) -> tuple[Source | None, Array]:
    relative = points.loss_se / points.loss
    known = np.isfinite(relative)
    if not known.any():
        return None, np.zeros(len(relative))
    typical = float(np.sqrt(np.mean(relative[known] ** 2)))
    source = Source(typical, "standard errors of the losses", int(known.sum()))
    return source, np.where(known, relative, typical)


def _tuning(points: Points) -> tuple[Source | None, Array]:
    """The loss that each run gives away by its learning rate, relative."""
    none = np.zeros(len(points.loss))
    if points.lr is None:
        return None, none
    x = np.log(points.lr)
    known = np.isfinite(x)
    cell = np.where(known, cells(points.params, points.tokens, points.batch, _fresh(points)), -1)
    compared = [members for members in groups(cell) if np.ptp(x[members]) > 0]
    if not compared:
        return None, none
    curvature, basis = _curvature(points.loss, x, compared)
    given_away = none.copy()
    for members in compared:
        # With the curvature known, the best learning rate is one of two unknowns of a line.
        slope, _ = np.polyfit(x[members], points.loss[members] - curvature * x[members] ** 2, 1)
        off = x[members] + slope / (2 * curvature)
        given_away[members] = curvature * off**2 / points.loss[members]
    used = np.concatenate(compared)
    typical = float(np.sqrt(np.mean(given_away[used] ** 2)))
    return Source(typical, basis, len(used)), given_away


def _curvature(loss: Array, x: Array, groups: Sequence[NDArray[np.intp]]) -> tuple[float, str]:
    """Of the loss in log lr, shared by all groups with three learning rates or more."""
    top, bottom = 0.0, 0.0
    for members in groups:
        if len(np.unique(x[members])) < 3:
            continue
        line = np.stack([np.ones(len(members)), x[members]], 1)
        square = x[members] ** 2
        square = square - line @ np.linalg.lstsq(line, square, rcond=None)[0]
        top, bottom = top + float(square @ loss[members]), bottom + float(square @ square)
    if bottom > 0 and top > 0:
        return top / bottom, "learning rates compared, measured curvature"
    return CURVATURE, "learning rates compared, assumed curvature"
