"""Resampling of runs: the spread of everything that is computed from a fitted law.

Runs are drawn with replacement within each budget, as multinomial weights rather than copies, so
thousands of replicates share one set of arrays and go through the same Newton solver together.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prime_jax.scaling import newton
from prime_jax.scaling.approach3 import NAMES, Fit, Problem
from prime_jax.scaling.laws import Law

Array = NDArray[np.float64]

BLOCK = 60_000  # runs x replicates per numpy call: arrays of this size stay in the cache


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
    lower, upper = p.box()
    ends = []
    size = max(1, BLOCK // weight_Rxn.shape[1])
    for first in range(0, len(weight_Rxn), size):
        block = weight_Rxn[first : first + size]
        start = np.tile(fitted.theta_5, (len(block), 1))
        ends.append(
            newton.minimise(lambda t, i, w=block: p.derivatives(t, w[i]), start, lower, upper)[0]
        )
    return p.law(np.concatenate(ends))


def at_bound(p: Problem, replicates: Law) -> dict[str, float]:
    """The share of replicates that end at a bound of the search, by parameter."""
    theta_Rx5 = p.theta(replicates)
    lower, upper = p.box()
    slack = 1e-9 * (upper - lower)
    held = (theta_Rx5 <= lower + slack) | (theta_Rx5 >= upper - slack)
    return dict(zip(NAMES, held.mean(axis=0).tolist(), strict=True))


def interval(values_R: Array, level: float = 0.95) -> list[float]:
    """Percentile interval along the first axis, ends [lower, upper]."""
    tail = 50 * (1 - level)
    return np.percentile(values_R, [tail, 100 - tail], axis=0).tolist()
