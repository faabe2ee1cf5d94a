"""The law L(N, D) = E + A / N**alpha + B / D**beta, and its optimum under a compute budget.

Hoffmann et al., "Training compute-optimal large language models" (2022), section 3.3. A `Law` or a
`Compute` may hold arrays instead of floats, one entry per bootstrap replicate: everything
broadcasts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """N and D in units of one parameter and one token; losses in the unit of the data."""

    E: Array | float
    A: Array | float
    B: Array | float
    alpha: Array | float
    beta: Array | float

    def loss(self, params: ArrayLike, tokens: ArrayLike) -> Array:
        return (
            self.E + self.A * np.power(params, -self.alpha) + self.B * np.power(tokens, -self.beta)
        )


@dataclass(frozen=True)
class Compute:
    """C = k N**q D: what a run of N parameters and D tokens costs; k = 6, q = 1 for C = 6 N D.

    Counting attention, embeddings or the head makes the FLOPs per token an (almost) power law of
    N whose exponent is not one; the optimum has to be taken under the relation that holds.
    `error` is the largest relative deviation of the runs from it.
    """

    k: float = 6.0
    q: float = 1.0
    error: float = 0.0

    def tokens(self, flops: ArrayLike, params: ArrayLike) -> Array:
        return np.asarray(flops) / (self.k * np.power(params, self.q))


def fit_compute(flops: Array, params: Array, tokens: Array) -> Compute:
    """Least squares of log(C / D) on log N; one single N leaves q = 1."""
    if np.allclose(flops, 6 * params * tokens, rtol=1e-9, atol=0):
        return Compute()
    x, y = np.log(params), np.log(flops / tokens)
    spread = x - x.mean()
    q = float(spread @ y / (spread @ spread)) if np.ptp(x) > 1e-9 else 1.0
    intercept = float(np.mean(y - q * x))
    error = float(np.expm1(np.abs(y - q * x - intercept).max()))
    return Compute(float(np.exp(intercept)), q, error)


@dataclass(frozen=True)
class Optimum:
    """The cheapest way to spend `flops`: sizes, tokens and the loss they reach."""

    flops: Array
    params: Array
    tokens: Array
    loss: Array


def exponent(law: Law, compute: Compute) -> Array:
    """a in N*(C) ~ C**a: beta / (alpha + q beta), the usual beta / (alpha + beta) for q = 1."""
    return np.asarray(law.beta / (law.alpha + compute.q * law.beta))


def optimum(law: Law, compute: Compute, flops: ArrayLike) -> Optimum:
    """N*(C), D*(C) and L*(C) in closed form: the stationary point of L along C = k N**q D.

    d L / d log N = 0 where alpha A N**-alpha = q beta B D**-beta. It is taken in logs, as A and B
    of bootstrap replicates may span hundreds of decades.
    """
    flops = np.asarray(flops, dtype=np.float64)
    log_ratio = np.log(law.alpha) + np.log(law.A) - np.log(compute.q * law.beta) - np.log(law.B)
    log_work = np.log(flops) - np.log(compute.k)
    log_params = (log_ratio + law.beta * log_work) / (law.alpha + compute.q * law.beta)
    params, tokens = np.exp(log_params), np.exp(log_work - compute.q * log_params)
    return Optimum(flops, params, tokens, law.loss(params, tokens))


def optima(law: Law, compute: Compute, flops: Array) -> Optimum:
    """Optima_[R, K] of the R laws of a bootstrap at K budgets."""
    fields = (np.asarray(v)[:, None] for v in (law.E, law.A, law.B, law.alpha, law.beta))
    return optimum(Law(*fields), compute, flops)
