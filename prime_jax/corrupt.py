"""The forward process: which sub-tokens are masked, a pure function of (seed, step, row).

Keys are folded per sequence of the global batch, so a run masks the same sub-tokens on any mesh,
number of hosts or micro-batch split.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prime_jax import schedule
from prime_jax.config import ObjectiveConfig


class Corruption(NamedTuple):
    """Result of the forward process for B sequences of L tokens with S sub-tokens each.

    Attributes:
        masked_BxLxS: masked sub-tokens; only at target positions.
        weight_BxL: w(t) at each position over the density of t (1 with the flat weight); one t per
            block.
        whole_B: sequences whose masks cover whole tokens (granularity mixing).
        length_B: length after the cut of random-length training (L otherwise).
    """

    masked_BxLxS: jax.Array
    weight_BxL: jax.Array
    whole_B: jax.Array
    length_B: jax.Array


def step_key(seed: int, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), step)


def row_keys(key: jax.Array, row_B: jax.Array) -> jax.Array:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)


def hide(uniform_BxLxS: jax.Array, alpha_BxL: jax.Array, whole_B: jax.Array) -> jax.Array:
    """Mask each sub-token with probability 1 - alpha, or whole tokens where `whole_B` is set.

    A token-level mask reuses the draw of the first sub-token, so that both cases share keys.
    """
    u_BxLxS = jnp.where(whole_B[:, None, None], uniform_BxLxS[..., :1], uniform_BxLxS)
    return u_BxLxS >= alpha_BxL[..., None]


def corrupt(
    config: ObjectiveConfig,
    key: jax.Array,
    row_B: jax.Array,
    count: int,
    target_BxL: jax.Array,
    length: int,
) -> Corruption:
    """Sample times and masks for some rows of a global batch.

    Args:
        key: `step_key(seed, step)`, shared by all hosts.
        row_B: rows of the global batch on this device.
        count: rows of the global batch; the times are stratified over them and their blocks.
        target_BxL: positions of the loss; others are never masked.
        length: sub-tokens per token, S.
    """
    n_tokens = target_BxL.shape[1]
    time_key, rows_key = jax.random.split(key)
    offset = jax.random.uniform(time_key)
    block = config.block_length or n_tokens
    blocks = n_tokens // block
    row_BxG = row_B[:, None] * blocks + jnp.arange(blocks)
    t_BxG = schedule.times(config, offset, row_BxG, count * blocks)
    t_BxL = jnp.repeat(t_BxG, block, axis=1)

    def per_row(row_key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mask_key, whole_key, length_key = jax.random.split(row_key, 3)
        uniform = jax.random.uniform(mask_key, (n_tokens, length))
        whole = jax.random.uniform(whole_key) < config.token_mask_rho
        cut, size = jax.random.split(length_key)
        cut_length = jnp.where(
            jax.random.uniform(cut) < config.random_length,
            jax.random.randint(size, (), 1, n_tokens + 1),
            n_tokens,
        )
        return uniform, whole, cut_length

    uniform_BxLxS, whole_B, length_B = jax.vmap(per_row)(row_keys(rows_key, row_B))
    masked_BxLxS = hide(uniform_BxLxS, schedule.alpha(config, t_BxL), whole_B)
    inside_BxL = target_BxL & (jnp.arange(n_tokens) < length_B[:, None])
    flat = config.weight == "flat"
    weighed = lambda: schedule.weight(config, t_BxL) / schedule.density(config, t_BxL)  # noqa: E731
    weight_BxL = jnp.ones_like(t_BxL) if flat else weighed()
    return Corruption(masked_BxLxS & inside_BxL[..., None], weight_BxL, whole_B, length_B)
