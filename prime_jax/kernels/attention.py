"""Softmax attention for all families: bidirectional, causal or by blocks, within documents or not.

One function, several implementations: our Mosaic kernels or JAX's splash attention on a TPU, cuDNN
on a GPU, plain XLA anywhere. On a CPU heads and blocks of queries are scanned, and the scores are
recomputed in the backward pass, so that they stay in cache and are never stored.
`attention_reference` is the reference for all of them.

A document is a run of equal segment ids; a negative id is padding. Attention is restricted to a
document; outputs of padding are zero.

Block diffusion reads a noisy and a clean sequence, concatenated. A noisy block attends to itself
and to the clean blocks before it; a clean block to the clean blocks up to itself (BD3-LM, section 3.2).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from prime_jax.errors import UserError
from prime_jax.kernels.attention_mask import (
    SAVED,
    allowed,
    by_blocks,
    documents,
    fitted,
    head_lanes,
)
from prime_jax.kernels.common import NEG, on_tpu, target_kind
from prime_jax.kernels.selection import default_attention

QUERY_ROWS = 256  # of a block: large enough for the cores, small enough for their caches


def attention_reference(
    q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, causal=False, segment_ids_BxL=None, block_length=0
):
    """Reference for `attention`, with all scores stored, in float32."""
    heads, groups = q_BxLxHxK.shape[2], k_BxLxGxK.shape[2]
    k_BxLxHxK = jnp.repeat(k_BxLxGxK, heads // groups, axis=2)
    v_BxLxHxK = jnp.repeat(v_BxLxGxK, heads // groups, axis=2)
    scores = jnp.einsum("blhk,bmhk->bhlm", q_BxLxHxK, k_BxLxHxK).astype(jnp.float32)
    scores *= q_BxLxHxK.shape[-1] ** -0.5
    runs_BxL = None if segment_ids_BxL is None else documents(segment_ids_BxL, block_length)
    mask = allowed(q_BxLxHxK.shape[1], causal, runs_BxL, block_length)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, NEG)
    probs = jax.nn.softmax(scores).astype(v_BxLxGxK.dtype)
    return _without_padding(jnp.einsum("bhlm,bmhk->blhk", probs, v_BxLxHxK), segment_ids_BxL)


def _without_padding(out_BxLxHxK: jax.Array, segment_ids_BxL: jax.Array | None) -> jax.Array:
    if segment_ids_BxL is None:
        return out_BxLxHxK
    return jnp.where(segment_ids_BxL[:, :, None, None] < 0, 0, out_BxLxHxK)


def attention(
    q_BxLxHxK: jax.Array,
    k_BxLxGxK: jax.Array,
    v_BxLxGxK: jax.Array,
    causal: bool = False,
    segment_ids_BxL: jax.Array | None = None,
    implementation: str = "auto",
    blocks: Sequence[int] = (),
    block_length: int = 0,
) -> jax.Array:
    """Attention output [B, L, H, K]; H query heads share G key-value heads in groups of H / G.

    Args:
        segment_ids_BxL: int32; attention is restricted to runs of equal ids; negative ids are
            padding.
        implementation: `pallas` (interpreted, slowly, on a CPU), `splash`, `cudnn` (XLA where
            cuDNN has no kernel), `xla`, `scan`, or `auto`: the default for the device
            that the program is traced for.
        blocks: of `pallas`: queries and keys of a block; empty for the default.
        block_length: above 0 for block diffusion: tokens of a block; L and the segment ids then
            include both the noisy and the clean sequence. Not for `pallas`.

    Raises:
        UserError: unknown implementation, or blocks of another form.
    """
    if implementation == "auto":
        length = q_BxLxHxK.shape[1]
        implementation = default_attention(target_kind(), length, block_length).implementation
    if implementation == "pallas":
        if block_length:
            raise UserError(
                "attention implementation pallas does not support block diffusion; use splash"
            )
        from prime_jax.kernels import attention_mosaic  # imports Mosaic only if used

        return attention_mosaic.masked_attention(
            q_BxLxHxK,
            k_BxLxGxK,
            v_BxLxGxK,
            causal,
            segment_ids_BxL,
            blocks,
            interpret=not on_tpu(),
        )
    if implementation not in PLAIN:
        raise UserError(
            f"attention implementation {implementation!r}: choose auto, pallas, "
            + ", ".join(sorted(PLAIN))
        )
    # Padding forms separate documents, so that every row has keys and no NaN occurs.
    runs_BxL = None if segment_ids_BxL is None else documents(segment_ids_BxL, block_length)
    see = (causal, runs_BxL, block_length)
    out_BxLxHxK = PLAIN[implementation](q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, *see)
    return _without_padding(out_BxLxHxK, segment_ids_BxL)


def attention_to_cache(q_BxLxHxK, k_BxMxGxK, v_BxMxGxK, last_BxL) -> jax.Array:
    """Attention [B, L, H, K] of new positions, each to the keys 0 .. `last` of a KV cache of M."""
    mask_BxLxM = jnp.arange(k_BxMxGxK.shape[1]) <= last_BxL[..., None]
    return jax.nn.dot_product_attention(
        q_BxLxHxK, k_BxMxGxK, v_BxMxGxK, mask=mask_BxLxM[:, None], implementation="xla"
    )


def _xla(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, causal, documents_BxL, block_length, library="xla"):
    batch, length, heads, _ = q_BxLxHxK.shape
    mask = None
    if documents_BxL is not None or block_length:
        mask = allowed(length, causal, documents_BxL, block_length)[:, None]
        if library == "cudnn":  # does not support broadcast masks
            mask = jnp.broadcast_to(mask, (batch, heads, length, length))
    return jax.nn.dot_product_attention(
        q_BxLxHxK,
        k_BxLxGxK,
        v_BxLxGxK,
        mask=mask,
        is_causal=causal and mask is None,
        implementation=library,
    )


def _cudnn(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, causal, documents_BxL, block_length):
    served = cudnn_serves(q_BxLxHxK, packed=documents_BxL is not None or block_length > 0)
    library = "cudnn" if served else "xla"
    return _xla(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, causal, documents_BxL, block_length, library)


def cudnn_serves(q_BxLxHxK: jax.Array, packed: bool) -> bool:
    """Whether every GPU with cuDNN's attention has a kernel for these shapes."""
    _, length, _, size = q_BxLxHxK.shape
    half = q_BxLxHxK.dtype in (jnp.bfloat16, jnp.float16)
    return half and size % 8 == 0 and size <= 128 and not (packed and length % 2)


def _splash_rule(base: type, length: int, padded: int, block_length: int) -> Any:
    """The mask of block diffusion as a splash mask, computed tile by tile."""

    class Rule(base):
        shape = (padded, padded)

        def __getitem__(self, tile):
            query, key = (np.arange(padded)[part] for part in tile)
            padding = query[:, None] >= length  # in separate documents
            return padding | by_blocks(query[:, None], key, length, block_length)

    return Rule()


def _splash(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, causal, documents_BxL, block_length):
    """JAX's splash attention; skips tiles that the causal or block mask excludes, but not those of
    other documents, which are only masked."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, length, heads, size = q_BxLxHxK.shape
    (queries, keys), padded = fitted(length)
    if padded > length and documents_BxL is None:
        documents_BxL = jnp.zeros((batch, length), jnp.int32)
    ids = None
    if documents_BxL is not None:
        ids_BxL = jnp.pad(documents_BxL, ((0, 0), (0, padded - length)), constant_values=-1)
        ids = kernel.SegmentIds(ids_BxL, ids_BxL)

    def heads_first(x_BxLxHxK):
        padding = (0, 0), (0, padded - length), (0, 0), (0, head_lanes(size) - size)
        return jnp.swapaxes(jnp.pad(x_BxLxHxK, padding), 1, 2)

    mask = (masks.CausalMask if causal else masks.FullMask)((padded, padded))
    if block_length:
        mask = _splash_rule(masks.Mask, length, padded, block_length)
    splash = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_kv_compute=math.gcd(keys, 512),
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=math.gcd(keys, 512),
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=SAVED,
        interpret=not on_tpu(),
    )
    q_BxLxHxK = (q_BxLxHxK.astype(jnp.float32) * size**-0.5).astype(q_BxLxHxK.dtype)
    out = jax.vmap(splash)(*(heads_first(x) for x in (q_BxLxHxK, k_BxLxGxK, v_BxLxGxK)), ids)
    return jnp.swapaxes(out, 1, 2)[:, :length, :, :size]


def _scan(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, causal, documents_BxL, block_length):
    mask = allowed(q_BxLxHxK.shape[1], causal, documents_BxL, block_length)
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
    size = size if size >= QUERY_ROWS // 8 else length  # too small blocks are not worth splitting
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

PLAIN = {"splash": _splash, "cudnn": _cudnn, "xla": _xla, "scan": _scan}
