"""Are N and C of all runs counted in one way?

C / (N D) is a function of the shape of a model: near 6, more where embeddings or attention are in
C and not in N. No one way of counting gives two values of it at one N, or moves it up and down
from each size to the next.
"""

import numpy as np
from numpy.typing import NDArray

from prime_jax.scaling import labels
from prime_jax.scaling.diagnostics import Diagnostic, warn

Array = NDArray[np.float64]

SAME, JUMP = 1.05, 1.25  # largest ratio of C / (N D) at one size, and between neighbours


def diagnostics(flops: Array, params: Array, tokens: Array, names: list[str]) -> list[Diagnostic]:
    """A warning that names two runs which cannot both be right; `names` are those of the rows."""
    order = np.argsort(params, kind="stable")
    size, ratio = np.log(params[order]), np.log((flops / (params * tokens))[order])
    step, jump = np.diff(size), np.diff(ratio)
    twice = (step < 1e-6) & (np.abs(jump) > np.log(SAME))
    apart = np.abs(jump) > np.log(JUMP)
    both_ways = (jump[apart] > 0).any() and (jump[apart] < 0).any()
    k = np.flatnonzero(twice if twice.any() else apart & both_ways)
    if not len(k):
        return []
    shown = (
        f"{np.exp(ratio[j]):.3g} N D for {names[order[j]]} (N = {labels.count(params[order[j]])})"
        for j in (k[0], k[0] + 1)
    )
    return [warn("mixed_conventions", f"FLOPs are {' and '.join(shown)}: no one count gives both")]
