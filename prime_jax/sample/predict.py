"""Predictions for masked sub-tokens: one sampled token for every position that needs one.

A token is sampled from the softmax over the tokens that agree with the visible sub-tokens, and all
sub-tokens that one step reveals are taken from it. So sub-tokens of one token are sampled jointly,
as in the kernel that `finite:T` scores, and only valid tokens can result. The restriction is also
applied to models trained without carry-over.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prime_jax.kernels.common import NEG, target_kind
from prime_jax.kernels.subtoken_head_base import Head, consistent
from prime_jax.objectives import Network, guided
from prime_jax.sample.filters import Filters, draw

Score = Callable[[jax.Array, jax.Array], jax.Array]


class Model(NamedTuple):
    """A network and its head; static under `jit`.

    Attributes:
        network: parameters to a `Network`; that of ARM also takes a cache.
    """

    network: Callable[[Any], Network]
    head: Head


def example_keys(seed: jax.Array, example_B: jax.Array, step_B: jax.Array) -> jax.Array:
    """A key for each example and step, independent of the batch."""

    def key(example, step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), example), step)

    return jax.vmap(key)(example_B, step_B)


def position_keys(key_B: jax.Array, length: int) -> jax.Array:
    """Keys [B, L] of the positions of every example."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(fold, in_axes=(0, None))(key_B, jnp.arange(length))


def restricted(head: Head, digits_NxS: jax.Array, z_NxV: jax.Array) -> jax.Array:
    """Logits with NEG for tokens that disagree with a visible sub-token (not the digit `base`)."""
    if head.plain:
        return z_NxV
    masked_NxS = digits_NxS == head.codebook.base
    seen_NxS = jnp.where(masked_NxS, 0, digits_NxS)
    fields_SxW = head.fields_SxW.astype("int32")
    seen_NxW = (seen_NxS[..., None] * fields_SxW).sum(axis=1, dtype=jnp.int32)
    visible_NxW = head.visible_words(~masked_NxS)
    return jnp.where(consistent(head.words_VxW, seen_NxW, visible_NxW), z_NxV, NEG)


def rows_at_a_time() -> int:
    return 8 if target_kind() == "cpu" else 256


def propose(
    head: Head,
    score: Score | None,
    filters: Filters,
    h_NxD: jax.Array,
    head_VxD: jax.Array,
    digits_NxS: jax.Array,
    key_N: jax.Array,
    active_N: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A drawn head row, int32 [N], and its score, float32 [N], of every active position.

    Only active rows are computed; others hold zeros. The score is of the model's probabilities
    before temperature and filters.
    """
    total = active_N.shape[0]
    size = min(rows_at_a_time(), total)
    order_N = jnp.argsort(~active_N, stable=True)
    dtype = jnp.promote_types(h_NxD.dtype, jnp.float32)

    def chunk(i, out):
        # The last slice is clamped to fit; rows computed twice get the same result.
        at_n = jax.lax.dynamic_slice_in_dim(order_N, i * size, size)
        h_nxD = h_NxD[at_n].astype(head_VxD.dtype)
        z_nxV = jnp.einsum("nd,vd->nv", h_nxD, head_VxD, preferred_element_type=dtype)
        z_nxV = restricted(head, digits_NxS[at_n], z_nxV)
        row_n = draw(filters, z_nxV, key_N[at_n])
        rows_N, scores_N = out
        if score is not None:
            value_n = score(jax.nn.log_softmax(z_nxV), row_n).astype(jnp.float32)
            scores_N = scores_N.at[at_n].set(value_n)
        return rows_N.at[at_n].set(row_n), scores_N

    zeros = jnp.zeros(total, jnp.int32), jnp.zeros(total, jnp.float32)
    return jax.lax.fori_loop(0, -(-active_N.sum() // size), chunk, zeros)


def hidden_states(
    network: Network,
    digits_BxLxS: jax.Array,
    segment_ids_BxL: jax.Array,
    unprompted_BxLxS: jax.Array | None,
    cfg_scale: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Hidden states [B, L, D] and head rows [V, D], with guidance if unprompted digits are given."""
    if unprompted_BxLxS is None:
        return network(digits_BxLxS, segment_ids_BxL, None)
    both = jnp.concatenate([digits_BxLxS, unprompted_BxLxS])
    h, head_VxD = network(both, jnp.concatenate([segment_ids_BxL, segment_ids_BxL]), None)
    return guided(*jnp.split(h, 2), cfg_scale), head_VxD
