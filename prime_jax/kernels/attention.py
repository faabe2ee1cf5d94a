"""Softmax attention for all families: bidirectional or causal, optionally within segments.

`attention_reference` is the plain twin. On a CPU heads and blocks of queries are scanned, and the
scores are recomputed in the backward pass, so that they stay in cache and are never stored;
elsewhere the library's fused path is used.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

NEG = -1e30
SAVED = "attention"  # name of what a remat policy should keep: scores are recomputed anyway
QUERY_ROWS = 256  # of a block: large enough for the cores, small enough for their caches


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
    heads, groups = q_BxLxHxK.shape[2], k_BxLxGxK.shape[2]
    q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q_BxLxHxK, k_BxLxGxK, v_BxLxGxK))
    if groups < heads:
        k, v = (jnp.repeat(x, heads // groups, axis=0) for x in (k, v))
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    _, out = jax.lax.scan(lambda _, qkv: (None, _one_head(*qkv, mask)), None, (q * scale, k, v))
    return jnp.moveaxis(out, 0, 2)


def _matmul(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _blocks(rows: Any) -> Any:
    """Split [B, L, ...] arrays into [L / R, B, R, ...] blocks of query rows."""
    length = jax.tree.leaves(rows)[0].shape[1]
    size = math.gcd(length, QUERY_ROWS)
    size = size if size >= QUERY_ROWS // 8 else length  # an odd length is not worth splitting
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, size, x.shape[-1]), 1, 0), rows
    )


def _joined(blocks: jax.Array) -> jax.Array:
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _scores(q_BxRxK, k_BxLxK, mask_BxRxL):
    z_BxRxL = _matmul("brk,blk->brl", q_BxRxK, k_BxLxK)
    return z_BxRxL if mask_BxRxL is None else jnp.where(mask_BxRxL, z_BxRxL, NEG)


@jax.custom_vjp
def _one_head(q_BxLxK, k_BxLxK, v_BxLxK, mask):
    """softmax(q k^T) v of one head, R query rows at a time, so that [R, L] stays in cache."""
    return _one_head_forward(q_BxLxK, k_BxLxK, v_BxLxK, mask)[0]


def _one_head_forward(q_BxLxK, k_BxLxK, v_BxLxK, mask):
    def block(_, rows):
        z_BxRxL = _scores(rows[0], k_BxLxK, rows[1])
        top_BxRx1 = z_BxRxL.max(-1, keepdims=True)
        e_BxRxL = jnp.exp(z_BxRxL - top_BxRx1)
        total_BxRx1 = e_BxRxL.sum(-1, keepdims=True)
        # Normalising after the product divides [R, K] numbers instead of [R, L].
        out_BxRxK = _matmul("brl,blk->brk", e_BxRxL.astype(v_BxLxK.dtype), v_BxLxK) / total_BxRx1
        return None, (out_BxRxK.astype(v_BxLxK.dtype), top_BxRx1 + jnp.log(total_BxRx1))

    _, (out, lse) = jax.lax.scan(block, None, _blocks((q_BxLxK, mask)))
    out_BxLxK, lse_BxLx1 = (checkpoint_name(_joined(x), SAVED) for x in (out, lse))
    return out_BxLxK, (q_BxLxK, k_BxLxK, v_BxLxK, mask, out_BxLxK, lse_BxLx1)


def _one_head_backward(residuals, dout_BxLxK):
    q_BxLxK, k_BxLxK, v_BxLxK, mask, out_BxLxK, lse_BxLx1 = residuals
    dtype = q_BxLxK.dtype
    product = dout_BxLxK.astype(jnp.float32) * out_BxLxK.astype(jnp.float32)
    delta_BxLx1 = product.sum(-1, keepdims=True)

    def block(carry, rows):
        dk_BxKxL, dv_BxKxL = carry
        q_BxRxK, mask_BxRxL, dout_BxRxK, lse_BxRx1, delta_BxRx1 = rows
        p_BxRxL = jnp.exp(_scores(q_BxRxK, k_BxLxK, mask_BxRxL) - lse_BxRx1)
        dp_BxRxL = _matmul("brk,blk->brl", dout_BxRxK, v_BxLxK)
        dz_BxRxL = (p_BxRxL * (dp_BxRxL - delta_BxRx1)).astype(dtype)
        # Products over rows come out as [K, L]: the other order transposes the [R, L] factor.
        dv_BxKxL += _matmul("brk,brl->bkl", dout_BxRxK, p_BxRxL.astype(dtype))
        dk_BxKxL += _matmul("brk,brl->bkl", q_BxRxK, dz_BxRxL)
        return (dk_BxKxL, dv_BxKxL), _matmul("brl,blk->brk", dz_BxRxL, k_BxLxK).astype(dtype)

    zero = jnp.zeros(jnp.swapaxes(k_BxLxK, 1, 2).shape, jnp.float32)
    rows = _blocks((q_BxLxK, mask, dout_BxLxK, lse_BxLx1, delta_BxLx1))
    (dk_BxKxL, dv_BxKxL), dq = jax.lax.scan(block, (zero, zero), rows)
    dk_BxLxK, dv_BxLxK = (jnp.swapaxes(x, 1, 2).astype(dtype) for x in (dk_BxKxL, dv_BxKxL))
    return _joined(dq), dk_BxLxK, dv_BxLxK, None


_one_head.defvjp(_one_head_forward, _one_head_backward)
