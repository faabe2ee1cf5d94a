"""Which runs share a compute budget."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GAP = 1.05  # runs further apart than this belong to different budgets
SPREAD = 1.10  # a budget whose FLOPs differ by more is no IsoFLOP: loss moves with C as well as N


def assign(flops: Array, stated: Array | None) -> Array:
    """The budget of each run, [n].

    Groups are those of the stated budgets where given, else runs without a gap of 5 % between
    them. A group is named by its stated budget, unless that counts FLOPs in another convention:
    then, and where nothing is stated, by the geometric mean of its FLOPs.
    """
    if stated is None:
        order = np.argsort(flops)
        steps = np.diff(np.log(flops[order])) > np.log(GAP)
        group = np.empty(len(flops), dtype=int)
        group[order] = np.concatenate([[0], np.cumsum(steps)])
    else:
        group = np.unique(stated, return_inverse=True)[1]
    means = np.exp(np.bincount(group, np.log(flops)) / np.bincount(group))
    budget = np.array([float(f"{mean:.6g}") for mean in means])[group]
    if stated is None:
        return budget
    planned = np.abs(np.log(budget / stated)) < np.log(SPREAD)
    return np.where(planned, stated, budget)


def spread(flops: Array) -> float:
    """Largest over smallest FLOPs of one budget."""
    return float(flops.max() / flops.min())


def levels(budget: Array, flops: Array) -> int:
    """Different amounts of compute: the budgets, and for runs without gaps between them the times
    that their FLOPs double."""
    runs = (flops[budget == value] for value in np.unique(budget))
    return sum(max(1, int(np.log2(spread(of_one)))) for of_one in runs)


def strata(budget: Array) -> Array:
    """Groups to resample within, [n]: the budgets; those of one or two runs are pooled.

    A run alone in its stratum would be drawn every time, as if it had no error.
    """
    values, counts = np.unique(budget, return_counts=True)
    small = np.isin(budget, values[counts < 3])
    return np.where(small, 0.0, budget)
