"""The compute multiplier m: how many times the compute of a baseline a family needs for one loss.

Two frontiers L*(C) that differ in E have no constant ratio of compute, and outside the data it may
grow without limit; so m is a curve with a band, each point with a flag. C may be what the family
spends, m(C) = C / C_baseline(L*_family(C)), or what the baseline spends,
m(C) = C_family(L*_baseline(C)) / C: the same curve read off at either end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prime_jax.scaling.approach2 import IsoflopCurve, noise_scale, redraw_curve
from prime_jax.scaling.intervals import (
    known_percentiles,
)
from prime_jax.scaling.laws import Compute, PowerLaw, optimum
from prime_jax.scaling.points import GAP

Array = NDArray[np.float64]
Ratio = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Side:
    """A family's frontier: its law and replicates, and its minima with their draws.

    Attributes:
        law: of all runs.
        replicates: laws of arrays [R, 1].
        knots_K: log C of the budgets with their optimum inside; ascending.
        log_loss_K, log_loss_RxK: log loss at the minima, and its draws (None without any).
        low, high: the budgets of the data.
    """

    law: PowerLaw
    replicates: PowerLaw
    compute: Compute
    knots_K: Array
    log_loss_K: Array
    log_loss_RxK: Array | None
    low: float
    high: float

    def holds(self, flops: Array) -> NDArray[np.bool_]:
        """Whether the budgets lie within the data, as near as one budget is to another."""
        return (self.low / GAP <= flops) & (flops <= self.high * GAP)


@dataclass(frozen=True)
class Multiplier:
    """m at K budgets.

    Attributes:
        flops: C.
        equal: what the other one needs for the same loss, by the laws; inf where it never does.
        value: from the laws. Inf where the family never reaches the loss, 0 where the baseline
            never does: its E is not below it.
        median, interval_2xK: of the replicates.
        never: fraction of the replicates in which the loss is never reached.
        in_range: both frontiers are used within their data.
        interpolated: between the minima of approach 2, NaN beyond them.
        interpolated_interval: of each budget, or None.
    """

    flops: Array
    equal: Array
    value: Array
    median: Array
    interval_2xK: Array
    never: Array
    in_range: NDArray[np.bool_]
    interpolated: Array
    interpolated_interval: list[list[float] | None]


def frontier_flops(law: PowerLaw, compute: Compute, loss: ArrayLike) -> Array:
    """C at which the best loss is `loss`; inf where E is not below it.

    Both terms of the law fall with the same power of C along the frontier, so that
    L* = E + K C**-gamma with gamma = alpha beta / (alpha + q beta).
    """
    at_one = optimum(law, compute, 1.0)
    excess = law.A * np.power(at_one.params, -law.alpha) + law.B * np.power(
        at_one.tokens, -law.beta
    )
    gamma = law.alpha * law.beta / (law.alpha + compute.q * law.beta)
    above = np.asarray(loss) - law.E
    with np.errstate(over="ignore"):
        flops = np.exp((np.log(excess) - np.log(np.where(above > 0, above, 1.0))) / gamma)
    return np.where(above > 0, flops, np.inf)


def at_family(family: Side, baseline: Side, flops: Array, level: float) -> Multiplier:
    """m at what the family spends."""
    return _multiplier(family, baseline, flops, level, lambda spent, equal: spent / equal)


def at_baseline(family: Side, baseline: Side, flops: Array, level: float) -> Multiplier:
    """m at what the baseline spends."""
    return _multiplier(baseline, family, flops, level, lambda spent, equal: equal / spent)


def lower_probability(family: Side, baseline: Side, flops: Array) -> tuple[Array, Array]:
    """How probable it is that the family's best loss is the lower one, [K], twice.

    From the replicates of the laws, and from the draws of the minima (NaN beyond them).
    """
    losses = [
        np.asarray(optimum(side.replicates, side.compute, flops).loss)
        for side in (family, baseline)
    ]
    parametric = np.mean(losses[0] < losses[1], axis=0)
    if family.log_loss_RxK is None or baseline.log_loss_RxK is None:
        return parametric, np.full(len(flops), np.nan)
    mine, yours = (
        _interpolate(np.log(flops), side.knots_K, side.log_loss_RxK) for side in (family, baseline)
    )
    known = np.isfinite(mine) & np.isfinite(yours)
    fraction = np.sum(known & (mine < yours), axis=0) / np.maximum(known.sum(axis=0), 1)
    return parametric, np.where(known.mean(axis=0) > 0.5, fraction, np.nan)


def minimum_losses(curves: tuple[IsoflopCurve, ...], replicates: int, seed: int) -> Array | None:
    """Log loss at the lowest point of each IsoFLOP curve, redrawn from its error, [R, K].

    As approach2.redraw does for N*. NaN where a redrawn curve has no minimum; None without a degree
    of freedom.
    """
    rng = np.random.default_rng(seed)
    sigma_R = noise_scale(curves, replicates, rng)
    if sigma_R is None:
        return None
    losses = [redraw_curve(curve, sigma_R, rng)[1] for curve in curves]
    return np.log(np.maximum(np.stack(losses, 1), 1e-9))


@np.errstate(divide="ignore", over="ignore", under="ignore")  # m may be infinite, or 0
def _multiplier(here: Side, there: Side, flops: Array, level: float, ratio: Ratio) -> Multiplier:
    """m where one side spends `flops` and the other what it needs for the loss reached."""
    equal = frontier_flops(there.law, there.compute, optimum(here.law, here.compute, flops).loss)
    losses_RxK = optimum(here.replicates, here.compute, flops).loss
    equal_RxK = frontier_flops(there.replicates, there.compute, losses_RxK)
    tail = (1 - level) / 2
    # Order statistics: an average with "never" would be no number.
    ends_3xK = np.quantile(
        ratio(flops, equal_RxK), [tail, 0.5, 1 - tail], axis=0, method="inverted_cdf"
    )
    reached = _equal(here, there, here.log_loss_K[None], there.log_loss_K[None], flops)[0]
    intervals: list[list[float] | None] = [None] * len(flops)
    if here.log_loss_RxK is not None and there.log_loss_RxK is not None:
        drawn_RxK = ratio(flops, _equal(here, there, here.log_loss_RxK, there.log_loss_RxK, flops))
        intervals = [known_percentiles(drawn_R, level) for drawn_R in drawn_RxK.T]
    known = np.isfinite(reached)
    return Multiplier(
        flops=flops,
        equal=equal,
        value=ratio(flops, equal),
        median=ends_3xK[1],
        interval_2xK=ends_3xK[[0, 2]],
        never=np.mean(np.isinf(equal_RxK), axis=0),
        in_range=here.holds(flops) & there.holds(equal),
        interpolated=ratio(flops, reached),
        interpolated_interval=[
            ends if sure else None for ends, sure in zip(intervals, known, strict=True)
        ],
    )


def _equal(here: Side, there: Side, mine_RxK: Array, yours_RxK: Array, flops: Array) -> Array:
    """C at which the interpolated frontier of `there` has the loss that `here` has at `flops`."""
    losses = _interpolate(np.log(flops), here.knots_K, mine_RxK)
    rows = zip(losses, yours_RxK, strict=True)
    return np.exp([_invert(loss_Q, there.knots_K, knot_K) for loss_Q, knot_K in rows])


def _interpolate(x_Q: Array, knots_K: Array, values_RxK: Array) -> Array:
    """Straight lines between the points, [R, Q]; NaN beyond them."""
    out = np.full((len(values_RxK), len(x_Q)), np.nan)
    for r, value_K in enumerate(values_RxK):
        known = np.isfinite(value_K)
        if known.sum() > 1:
            out[r] = np.interp(x_Q, knots_K[known], value_K[known], np.nan, np.nan)
    return out


def _invert(loss_Q: Array, knots_K: Array, value_K: Array) -> Array:
    """log C at which straight lines between the points first fall to a loss; NaN beyond them."""
    known = np.isfinite(value_K)
    if known.sum() < 2:
        return np.full(len(loss_Q), np.nan)
    best_K = np.minimum.accumulate(value_K[known])
    return np.interp(-loss_Q, -best_K, knots_K[known], np.nan, np.nan)
