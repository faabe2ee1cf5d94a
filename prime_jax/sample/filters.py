"""Filters of logits; settings are traced, so a change needs no compilation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prime_jax.kernels.common import NEG

MIN_TEMPERATURE = 1e-4  # of the nucleus when the temperature is 0


class Filters(NamedTuple):
    """Settings of a draw; `top_k` 0 and `top_p` 1 disable these filters."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


def keep_likeliest(filters: Filters, z_NxV: jax.Array) -> jax.Array:
    """Logits with NEG outside the `top_k` most likely tokens and outside the nucleus.

    The nucleus is the smallest set of most likely tokens whose mass, at the temperature, reaches
    `top_p`. Sorts only if one of the two is used.
    """

    def filtered(z_NxV):
        size = z_NxV.shape[1]
        sorted_NxV = jnp.sort(z_NxV, axis=1, descending=True)
        p_NxV = jax.nn.softmax(sorted_NxV / jnp.maximum(filters.temperature, MIN_TEMPERATURE))
        before_NxV = jnp.cumsum(p_NxV, axis=1) - p_NxV
        nucleus_NxV = before_NxV < filters.top_p
        count_N = jnp.maximum(nucleus_NxV.sum(axis=1), 1)
        count_N = jnp.minimum(count_N, jnp.where(filters.top_k > 0, filters.top_k, size))
        floor_Nx1 = jnp.take_along_axis(sorted_NxV, count_N[:, None] - 1, axis=1)
        return jnp.where(z_NxV >= floor_Nx1, z_NxV, NEG)

    wanted = (filters.top_k > 0) | (filters.top_p < 1)
    return jax.lax.cond(wanted, filtered, lambda z: z, z_NxV)


def draw(filters: Filters, z_NxV: jax.Array, key_N: jax.Array) -> jax.Array:
    """One index per row, int32 [N], from the softmax at the temperature; 0 takes the maximum.

    Default float32 Gumbel noise is at most 15.9, which effectively lowers the temperature (arXiv
    2409.02908); mode "high" can draw classes of any probability.
    """

    def noise(key):
        return jax.random.gumbel(key, z_NxV.shape[1:], z_NxV.dtype, mode="high")

    noisy_NxV = keep_likeliest(filters, z_NxV) + filters.temperature * jax.vmap(noise)(key_N)
    return jnp.argmax(noisy_NxV, axis=1).astype(jnp.int32)
