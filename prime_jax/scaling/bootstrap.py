"""Resampling of runs: the spread of everything that is computed from a fitted law.

Runs are drawn with replacement within each budget, as multinomial weights rather than copies, so
thousands of replicates share one set of arrays and go through the same Newton solver together.
Checkpoints of one run share its luck: where they enter, the errors of each run are kept together
and multiplied by one random factor (the wild cluster bootstrap; Cameron, Gelbach and Miller 2008,
Review of Economics and Statistics 90, with the six factors of Webb 2014). An error is a residual
for least squares; for a robust objective it is psi(residual) / mean(psi'), by least squares of which
the fit moves as it does by its own objective, and which has no kink for residuals to stay at.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prime_jax.scaling.approach3 import NAMES, Fit, Problem, solve
from prime_jax.scaling.laws import Law

Array = NDArray[np.float64]

BLOCK = 20_000  # runs x replicates per numpy call: arrays of this size stay in the cache
WEBB = np.sqrt([0.5, 1.0, 1.5]).repeat(2) * np.tile([-1.0, 1.0], 3)  # mean 0, variance 1


def weights(strata_n: ArrayLike, replicates: int, seed: int) -> Array:
    """Weights_Rxn: how often each run is drawn; every stratum keeps its number of runs."""
    rng = np.random.default_rng(seed)
    strata = np.asarray(strata_n)
    out = np.empty((replicates, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        out[:, members] = rng.multinomial(
            len(members), np.full(len(members), 1 / len(members)), size=replicates
        )
    return out


def laws(p: Problem, fitted: Fit, weight_Rxn: Array) -> Law:
    """The law refitted to each replicate, started at the fit: a `Law` of arrays [R]."""
    return _refit(p, fitted, p.weight_n * weight_Rxn)


def wild(p: Problem, fitted: Fit, run_n: ArrayLike, replicates: int, seed: int) -> Law:
    """The law refitted to its own losses and the errors of the runs, each times a random factor."""
    labels, run = np.unique(run_n, return_inverse=True)
    factor_RxG = np.random.default_rng(seed).choice(WEBB, (replicates, len(labels)))
    spread = np.sqrt(len(labels) / max(len(labels) - len(NAMES), 1))  # a fit hugs its data
    residual = p.residual(fitted.theta_5)
    error = -spread * np.clip(residual, -p.delta, p.delta) / p.curvature(residual)
    drawn = p.log_loss_n + residual + factor_RxG[:, run] * error
    squares = replace(p, log_loss_n=drawn, objective="ls", delta=np.inf)
    return _refit(squares, fitted, np.broadcast_to(p.weight_n, drawn.shape))


def _refit(p: Problem, fitted: Fit, weight_Rxn: Array) -> Law:
    size = max(1, BLOCK // weight_Rxn.shape[1])
    ends = []
    for first in range(0, len(weight_Rxn), size):
        block = np.arange(first, min(first + size, len(weight_Rxn)))
        start = np.tile(fitted.theta_5, (len(block), 1))
        ends.append(solve(p.at(block), start, weight_Rxn[block])[0])
    return p.law(np.concatenate(ends))


def at_bound(p: Problem, replicates: Law) -> dict[str, float]:
    """The fraction of replicates that end at a bound of the search, by parameter."""
    theta_Rx5 = p.theta(replicates)
    lower, upper = p.box()
    slack = 1e-9 * (upper - lower)
    held = (theta_Rx5 <= lower + slack) | (theta_Rx5 >= upper - slack)
    return dict(zip(NAMES, held.mean(axis=0).tolist(), strict=True))


def interval(values_R: Array, level: float = 0.95) -> list[float]:
    """Percentile interval along the first axis, ends [lower, upper]."""
    tail = 50 * (1 - level)
    return np.percentile(values_R, [tail, 100 - tail], axis=0).tolist()
