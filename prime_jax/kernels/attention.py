"""Softmax attention for all families: bidirectional or causal, optionally within segments.

`attention_reference` is the plain twin. On a CPU heads are scanned with rematerialisation, which
keeps one head's [L, L] scores in cache; elsewhere the library's fused path is used.
"""

import jax
import jax.numpy as jnp

NEG = -1e30


def allowed(length: int, causal: bool, segment_ids_BxL: jax.Array | None) -> jax.Array | None:
    """bool mask broadcastable to [B, L, L] (query, key), or None where everything is visible."""
    mask = None
    if causal:
        mask = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids_BxL is not None:
        same_BxLxL = segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :]
        mask = same_BxLxL if mask is None else same_BxLxL & mask
    return mask


def attention_reference(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, causal=False, segment_ids_BxL=None):
    """Twin of `attention` with every score stored, in float32."""
    heads, groups = q_BxLxHxK.shape[2], k_BxLxGxK.shape[2]
    k_BxLxHxK = jnp.repeat(k_BxLxGxK, heads // groups, axis=2)
    v_BxLxHxK = jnp.repeat(v_BxLxGxK, heads // groups, axis=2)
    scores = jnp.einsum("blhk,bmhk->bhlm", q_BxLxHxK, k_BxLxHxK).astype(jnp.float32)
    scores *= q_BxLxHxK.shape[-1] ** -0.5
    mask = allowed(q_BxLxHxK.shape[1], causal, segment_ids_BxL)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, NEG)
    probs = jax.nn.softmax(scores).astype(v_BxLxGxK.dtype)
    return jnp.einsum("bhlm,bmhk->blhk", probs, v_BxLxHxK)


def attention(
    q_BxLxHxK: jax.Array,
    k_BxLxGxK: jax.Array,
    v_BxLxGxK: jax.Array,
    causal: bool = False,
    segment_ids_BxL: jax.Array | None = None,
) -> jax.Array:
    """Attention output [B, L, H, K]; H query heads share G key-value heads in groups of H / G.

    Args:
        segment_ids_BxL: positions see each other only within equal ids (padding gets its own).
    """
    mask = allowed(q_BxLxHxK.shape[1], causal, segment_ids_BxL)
    if jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(
            q_BxLxHxK,
            k_BxLxGxK,
            v_BxLxGxK,
            mask=None if segment_ids_BxL is None else mask[:, None],
            is_causal=causal and segment_ids_BxL is None,
        )
    return _scan_heads(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, mask)


def _scan_heads(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, mask):
    batch, length, heads, size = q_BxLxHxK.shape
    groups = k_BxLxGxK.shape[2]
    scale = size**-0.5

    @jax.checkpoint
    def one_head(q_BxLxK, k_BxLxK, v_BxLxK):
        scores = jnp.einsum(
            "blk,bmk->blm", q_BxLxK * scale, k_BxLxK, preferred_element_type=jnp.float32
        )
        if mask is not None:
            scores = jnp.where(mask, scores, NEG)
        # Normalising after the product divides [L, K] numbers instead of [L, L].
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum(
            "blm,bmk->blk",
            weights.astype(v_BxLxK.dtype),
            v_BxLxK,
            preferred_element_type=jnp.float32,
        )
        return (out / total).astype(v_BxLxK.dtype)

    def step(_, qkv):
        return None, one_head(*qkv)

    q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q_BxLxHxK, k_BxLxGxK, v_BxLxGxK))
    if groups < heads:
        k, v = (jnp.repeat(x, heads // groups, axis=0) for x in (k, v))
    _, out = jax.lax.scan(step, None, (q, k, v))
    return jnp.moveaxis(out, 0, 2).reshape(batch, length, heads, size)
