"""Orders of revealing.

An order is either fixed, i.e. random numbers determine the step at which every sub-token is
revealed, or adaptive: the plan determines only how many tokens each step reveals, and a score of
the model's prediction determines which. Fixed plans are made on the host, example by example, so
they depend on (seed, example) only. Steps that reveal nothing are known in advance and skipped.

With u_0 = 1 > u_1 > .. > u_T = 0 the fraction masked before each step, a sub-token of level v
in [0, 1) is revealed at the step i with u_{i+1} <= v < u_i.

    ancestral      independent levels: the reverse process with T steps, whose bound is `finite:T`
    random         levels spread evenly in random order: a fixed count at each step
    left-to-right  levels spread evenly from the first sub-token to the last
    first-hitting  one sub-token per step in random order: the limit T -> inf (arXiv 2409.02908)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.errors import UserError
from prime_jax.sample.options import ADAPTIVE, Options

NEVER = np.int32(2**31 - 1)


def even_levels(count: int) -> np.ndarray:
    """Levels of `count` units revealed one after the other, evenly over the fractions."""
    return 1 - (np.arange(count) + 0.5) / count


def ancestral(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.random(count)


def shuffled(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.permutation(even_levels(count))


def in_order(rng: np.random.Generator, count: int) -> np.ndarray:
    return even_levels(count)


LEVELS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "ancestral": ancestral,
    "random": shuffled,
    "first-hitting": shuffled,
    "left-to-right": in_order,
}


def time_grid(options: Options, steps: int) -> np.ndarray:
    """Fractions masked before each of `steps` steps and after the last: float64 [steps + 1]."""
    if options.time_grid:
        return np.array(options.time_grid)
    u = np.linspace(1, 0, steps + 1)
    return 1 - np.cos(np.pi / 2 * u) if options.grid == "cosine" else u


def step_of(level_N: np.ndarray, time_grid: np.ndarray) -> np.ndarray:
    """The step at which a level is revealed: the number of later points above it."""
    return np.searchsorted(-time_grid[1:-1], -level_N)


class Plan(NamedTuple):
    """When an example's sub-tokens are revealed; arrays of a batch have a leading axis.

    Attributes:
        when_LxS: int32 step of each sub-token, NEVER where it is not masked. An adaptive order has
            the same step for a whole token; only the number of tokens per step is used.
        block_L: int32 number of the block that each token belongs to.
        steps: of the plan, including those that reveal nothing.
    """

    when_LxS: np.ndarray
    block_L: np.ndarray
    steps: np.ndarray


def plan(
    options: Options, hidden_LxS: np.ndarray, rng: np.random.Generator, fixed_blocks: bool = False
) -> Plan:
    """The plan of one example: blocks left to right, each with an equal part of the steps.

    Args:
        fixed_blocks: count blocks from the first position (block diffusion), not from the first
            masked token. They take a step each even where `steps` are fewer.

    Raises:
        UserError: fewer steps than blocks.
    """
    drawn_L = hidden_LxS.any(axis=1)
    total = int(drawn_L.sum())
    length = options.block_length or max(total, 1)
    counted_L = np.ones_like(drawn_L) if fixed_blocks else drawn_L
    block_L = np.maximum(np.cumsum(counted_L) - 1, 0) // length
    blocks = np.unique(block_L[drawn_L])
    when_LxS = np.full(hidden_LxS.shape, NEVER, np.int32)
    one_each = options.order == "first-hitting" or options.threshold is not None
    if options.steps < len(blocks) and not (one_each or fixed_blocks or options.time_grid):
        raise UserError(
            f"--steps {options.steps}: {total} tokens in blocks of {length} (--block-length) take at "
            f"least {len(blocks)}"
        )
    ends = options.steps * np.arange(len(blocks) + 1) // max(len(blocks), 1)
    start = 0
    for number, block in enumerate(blocks):
        inside_L = drawn_L & (block_L == block)
        units = hidden_LxS & inside_L[:, None]
        adaptive = options.order in ADAPTIVE
        count = int((inside_L if adaptive else units).sum())
        steps = count if one_each else max(1, int(ends[number + 1] - ends[number]))
        fractions = np.linspace(1, 0, steps + 1) if one_each else time_grid(options, steps)
        levels = even_levels(count) if adaptive else LEVELS[options.order](rng, count)
        when = start + step_of(levels, fractions)
        if adaptive:
            when_LxS[inside_L] = np.where(hidden_LxS[inside_L], when[:, None], NEVER)
        else:
            when_LxS[units] = when
        start += len(fractions) - 1
    return Plan(when_LxS, block_L.astype(np.int32), np.int32(start))


def idle_fraction(plan: Plan) -> float:
    """Fraction of the steps of an example's plan that reveal nothing; 0 without steps."""
    busy = len(np.unique(plan.when_LxS[plan.when_LxS < NEVER]))
    return 1 - busy / max(int(plan.steps), busy, 1)


# Scores of a prediction: log-probabilities [N, V] and the drawn index [N], to [N]. All but the last
# read the visible tokens only: `evaluate.chain` reveals by them, and is exact for such a sampler.


def confidence(logp_NxV: jax.Array, drawn_N: jax.Array) -> jax.Array:
    """log p of the likeliest."""
    return logp_NxV.max(axis=1)


def confidence_drawn(logp_NxV: jax.Array, drawn_N: jax.Array) -> jax.Array:
    """log p of what was drawn: the published rule. A text has then no likelihood that a chain rule
    gives, because the order depends on draws that are thrown away."""
    return jnp.take_along_axis(logp_NxV, drawn_N[:, None], axis=1)[:, 0]


def margin(logp_NxV: jax.Array, drawn_N: jax.Array) -> jax.Array:
    """p of the likeliest minus p of the next."""
    best_Nx2 = jnp.exp(jax.lax.top_k(logp_NxV, 2)[0])
    return best_Nx2[:, 0] - best_Nx2[:, 1]


def entropy(logp_NxV: jax.Array, drawn_N: jax.Array) -> jax.Array:
    """Minus the entropy, nats."""
    p_NxV = jnp.exp(logp_NxV)
    return jnp.where(p_NxV > 0, p_NxV * logp_NxV, 0.0).sum(axis=1)


SCORES = {
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
    "confidence-drawn": confidence_drawn,
}


def behind(score_BxL: jax.Array, active_BxL: jax.Array, dtype: Any) -> jax.Array:
    """How far each active position is behind the best of its row: whole numbers, inf elsewhere.

    Equal predictions (those of all positions while nothing is visible) differ by the rounding of
    the network, which depends on batch and devices. Their distance to the best rounds to 0, so that
    the first position comes first, everywhere.

    Args:
        dtype: of the hidden states; it decides what scores can tell apart.
    """
    best_Bx1 = jnp.where(active_BxL, score_BxL, -jnp.inf).max(axis=1, keepdims=True)
    resolution = max(2.0**-13, 4 * float(jnp.finfo(dtype).eps))
    return jnp.where(active_BxL, jnp.round((best_Bx1 - score_BxL) / resolution), jnp.inf)


# Choice of what a step reveals, from the plan, the masked sub-tokens [B, L, S] and scores [B, L].


def next_fixed(plan: Plan, hidden_BxLxS: jax.Array) -> jax.Array:
    """The next step, int32 [B], at which a fixed plan reveals something; NEVER at the end."""
    return jnp.where(hidden_BxLxS, plan.when_LxS, NEVER).min(axis=(1, 2))


def revealed(plan: Plan, hidden_BxLxS: jax.Array) -> jax.Array:
    """How many tokens, int32 [B], of a plan are revealed."""
    planned_B = (plan.when_LxS.min(axis=2) < NEVER).sum(axis=1)
    return planned_B - hidden_BxLxS.any(axis=2).sum(axis=1)


def next_count(plan: Plan, hidden_BxLxS: jax.Array) -> jax.Array:
    """How many tokens, int32 [B], the next step of an adaptive plan reveals."""
    time_BxL = jnp.sort(plan.when_LxS.min(axis=2), axis=1)
    length = time_BxL.shape[1]
    done_B = revealed(plan, hidden_BxLxS)
    at_Bx1 = jnp.minimum(done_B, length - 1)[:, None]
    next_Bx1 = jnp.take_along_axis(time_BxL, at_Bx1, axis=1)
    later_BxL = jnp.arange(length) >= done_B[:, None]
    return (later_BxL & (time_BxL == next_Bx1)).sum(axis=1)


def active_block(plan: Plan, hidden_BxLxS: jax.Array) -> jax.Array:
    """bool [B, L]: tokens with masked sub-tokens in the first block that has any."""
    open_BxL = hidden_BxLxS.any(axis=2)
    block_BxL = jnp.where(open_BxL, plan.block_L, NEVER)
    return open_BxL & (block_BxL == block_BxL.min(axis=1, keepdims=True))


def most_confident(active_BxL, score_BxL, count_B, threshold, dtype) -> jax.Array:
    """bool [B, L]: the `count` active tokens of the highest score, and all above the threshold."""
    key_BxL = behind(score_BxL, active_BxL, dtype)
    rank_BxL = jnp.argsort(jnp.argsort(key_BxL, axis=1, stable=True), axis=1)
    return active_BxL & ((rank_BxL < count_B[:, None]) | (score_BxL >= threshold))
