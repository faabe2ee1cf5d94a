"""Optimal time grids from measured costs: the grid of least loss for a number of steps, and the
smallest number of steps for a loss.

A step from masked fraction u to s costs the joint negative log-probability of what it reveals; its
sum over a grid is the bound `finite:T` of the ancestral sampler on that grid. We measure the cost
per revealed fraction, R(u, s / u), at a few points, interpolate, and find the cheapest path from 1
to 0 by dynamic programming. Minimisation is biased towards points with favourable noise; so R is
fitted as the cost of infinitesimal steps, constrained to increase with u, less the saving from
revealing sub-tokens of a token jointly, measured on the same tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import RunConfig
from prime_jax.kernels.subtoken_head import subtoken_log_masses, subtoken_log_probs
from prime_jax.kernels.subtoken_head_base import Head, true_digits
from prime_jax.objectives import masked_inputs
from prime_jax.sample.predict import Model

FRACTIONS = (0.02, 0.05, *np.linspace(0.1, 1.0, 10).round(2))  # u: masked before the step
PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # s / u: of these, masked after it; 1 is an infinitesimal step
POINTS = 256  # time grids consist of multiples of 1 / POINTS
MAX_STEPS = 1024  # the time of the search is cubic in this
EXAMPLES = 64  # blocks to measure on
MEASURE_SEED = 0x617D


class Rates(NamedTuple):
    """Measured cost R(u, s / u), nats per token for all sub-tokens of the sequence.

    Attributes:
        rate_UxP: at FRACTIONS and PARTS; the cost of a step is R(u, s / u) (u - s).
    """

    rate_UxP: np.ndarray

    @property
    def bound(self) -> float:
        """Loss in the limit of infinitely many steps: the integral of R(u, 1)."""
        u = np.linspace(0, 1, 4 * POINTS + 1)
        return float(np.trapezoid(self.at(u, np.ones_like(u)), u))

    def at(self, u: np.ndarray, part: np.ndarray) -> np.ndarray:
        from scipy.interpolate import RegularGridInterpolator

        table = RegularGridInterpolator((FRACTIONS, PARTS), self.rate_UxP)
        return table(np.stack([np.maximum(u, FRACTIONS[0]), part], axis=-1))

    def loss(self, time_grid: np.ndarray) -> float:
        """Nats per token of a grid from 1 down to 0."""
        u, s = time_grid[:-1], time_grid[1:]
        return float((self.at(u, s / u) * (u - s)).sum())


def measure(
    model: Model, params: Any, config: RunConfig, token_ExL: np.ndarray, batch: int = 32
) -> Rates:
    """Measure the rates on some sequences, with common random numbers for a smooth surface. One
    network call per batch and fraction."""
    from scipy.optimize import isotonic_regression

    costs = jax.jit(partial(_costs, model, config))
    params = jax.device_put(params, jax.devices()[0])
    single, saved = np.zeros(len(FRACTIONS)), np.zeros((len(FRACTIONS), len(PARTS)))
    batch = min(batch, len(token_ExL))
    batches = len(token_ExL) // batch
    for i in range(batches):
        tokens = jnp.asarray(token_ExL[i * batch : (i + 1) * batch])
        for k, u in enumerate(FRACTIONS):
            parts = costs(params, tokens, np.float32(u), np.uint32(i))
            single[k] += parts[0]
            saved[k, :-1] += parts[1]
    rising = isotonic_regression(single, weights=np.array(FRACTIONS)).x
    return Rates((rising[:, None] - saved) / (batches * batch * token_ExL.shape[1]))


def _costs(model: Model, config: RunConfig, params, token_BxL, fraction, index) -> tuple:
    """Summed nats per revealed fraction of steps that start at `fraction`.

    Returns:
        the cost of infinitesimal steps [], and the savings of longer ones [P - 1] by PARTS.
    """
    book, head = model.head.codebook, model.head
    shape = (*token_BxL.shape, book.length)
    level_BxLxS = jax.random.uniform(jax.random.fold_in(jax.random.key(MEASURE_SEED), index), shape)
    hidden_BxLxS = level_BxLxS < fraction
    ones_BxL = jnp.ones(token_BxL.shape, jnp.float32)
    inputs = masked_inputs(
        config,
        book=book,
        token_BxL=token_BxL,
        masked_BxLxS=hidden_BxLxS,
        weight_BxL=ones_BxL,
        eos_id=-1,
    )
    h_BxLxD, head_VxD = model.network(params)(inputs.digits_BxLxS, None, None)
    parts = (h_BxLxD, hidden_BxLxS, level_BxLxS)
    h_NxD, hidden_NxS, level_NxS = (x.reshape(-1, *x.shape[2:]) for x in parts)
    row_N = jnp.asarray(book.rows)[token_BxL].reshape(-1)
    single_NxS = _nats(head, h_NxD, head_VxD, row_N, hidden_NxS)

    def saved(part):
        later_NxS = hidden_NxS & (level_NxS < part * fraction)
        _, joint_N = subtoken_log_masses(
            head,
            h_NxD=h_NxD,
            head_VxD=head_VxD,
            row_N=row_N,
            masked_NxS=hidden_NxS,
            later_NxS=later_NxS,
        )
        alone = jnp.where(hidden_NxS & ~later_NxS, single_NxS, 0).sum()
        return (alone + joint_N.sum()) / (fraction * (1 - part))

    alone = jnp.where(hidden_NxS, single_NxS, 0).sum() / fraction
    return alone, jax.lax.map(saved, jnp.array(PARTS[:-1], jnp.float32))


def _nats(head: Head, h_NxD, head_VxD, row_N, hidden_NxS) -> jax.Array:
    """Marginal -log P [N, S] of the true digit of every masked sub-token."""
    _, marginals_NxSxb, joint_N = subtoken_log_probs(head, h_NxD, head_VxD, row_N, hidden_NxS)
    if marginals_NxSxb is None:
        return -joint_N[:, None]
    return -jnp.where(true_digits(head, row_N), marginals_NxSxb, 0).sum(axis=2)


def best(rates: Rates, steps: int) -> np.ndarray:
    """The time grid [steps + 1] of least loss, in multiples of 1 / max(POINTS, steps)."""
    points = max(POINTS, steps)
    _, previous = _cheapest(rates, points, steps)
    at, path = points, [points]
    for step in reversed(range(steps)):
        at = previous[step, at]
        path.append(at)
    return np.array(path) / points


def fewest(rates: Rates, loss: float) -> int | None:
    """The smallest number of steps whose best grid has at most `loss` nats per token, or None if
    this takes more than POINTS."""
    least, _ = _cheapest(rates, POINTS, POINTS)
    enough = np.flatnonzero(least <= loss)
    return int(enough[0]) + 1 if len(enough) else None


def _cheapest(rates: Rates, points: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Least loss from 1 for 1 .. steps steps, and the next point for each number of steps.

    Dynamic programming: loss_k[u] = min over s < u of cost(u, s) + loss_{k-1}[s], loss_0[0] = 0.
    """
    index = np.arange(points + 1)
    u, s = index[1:, None] / points, index[None, :] / points
    inside = s < u
    part = np.where(inside, s / u, 0.0)
    cost = rates.at(np.broadcast_to(u, part.shape), part) * (u - s)
    cost = np.vstack([np.full((1, points + 1), np.inf), np.where(inside, cost, np.inf)])
    loss = np.where(index == 0, 0.0, np.inf)
    least, following = np.empty(steps), np.zeros((steps, points + 1), int)
    for k in range(steps):
        total = cost + loss
        following[k] = total.argmin(axis=1)
        loss = total.min(axis=1)
        least[k] = loss[points]
    return least, following
