"""The grid of sizes and budgets that families share, and resampling that respects it.

Runs of different families at one size and budget have their data, shape and seed in common, hence
part of their error. Drawing them together keeps that part out of the spread of a difference.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prime_jax.scaling import bootstrap, budgets
from prime_jax.scaling.points import Points

Array = NDArray[np.float64]
Index = NDArray[np.intp]


def cells(families: Sequence[Points]) -> tuple[list[Index], Array]:
    """The cell of every run of each family, and the budget of every cell.

    Budgets and sizes within 5 % of each other are the same: families count their heads and
    embeddings differently. Repeats of a cell are cells of their own, matched in their order.
    """
    owner = np.repeat(np.arange(len(families)), [len(part.loss) for part in families])
    budget = budgets.assign(np.concatenate([part.budget for part in families]), None)
    params = np.concatenate([part.params for part in families])
    index: dict[tuple[float, float, int], int] = {}
    found = np.empty(len(owner), dtype=np.intp)
    for value in np.unique(budget):
        mine = np.flatnonzero(budget == value)
        size = budgets.assign(params[mine], None)
        seen: dict[tuple[int, float], int] = {}
        for run, near in zip(mine.tolist(), size.tolist(), strict=True):
            repeat = seen.get((owner[run], near), 0)
            seen[owner[run], near] = repeat + 1
            found[run] = index.setdefault((float(value), near, repeat), len(index))
    return [found[owner == f] for f in range(len(families))], np.array([key[0] for key in index])


def weights(families: Sequence[Points], replicates: int, seed: int) -> list[Array]:
    """Bootstrap weights_Rxn of each family, drawn together; every budget keeps its weight."""
    where, budget = cells(families)
    drawn_RxM = bootstrap.weights(budgets.strata(budget), replicates, seed)
    out = []
    for part, cell_n in zip(families, where, strict=True):
        weight_Rxn = drawn_RxM[:, cell_n]
        strata = budgets.strata(part.budget)
        for stratum in np.unique(strata):
            mine = strata == stratum
            total_Rx1 = weight_Rxn[:, mine].sum(axis=1, keepdims=True)
            kept = np.where(total_Rx1 > 0, weight_Rxn[:, mine], 1.0)  # all drawn from the others
            weight_Rxn[:, mine] = kept * mine.sum() / np.where(total_Rx1 > 0, total_Rx1, mine.sum())
        out.append(weight_Rxn)
    return out
