"""Sub-token embedding: the digits of each token in, one vector per token out, for every family.

Lookup in a small table is a product with a multi-hot matrix: digits as [N, K] zeros and ones,
tables as [K, D] rows (concatenation is a block-diagonal table). Forward and backward are matmuls, so
gradients are float32 sums in a fixed order, without a scatter. Implementations:

    multi_hot   plain XLA, any base
    select      plain XLA, base 2 and concatenation: two selects per element, no matmul
    pallas      `embedding_mosaic`: the multi-hot matrix exists only in registers

Larger tables (plain tokens, bases above 80) are gathered.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.kernels.common import on_tpu

MULTI_HOT_ROWS = 256  # tables up to this many rows are read by a matmul instead of a gather
PALLAS_ROWS = 1024  # limit of `pallas`, which does not store the multi-hot matrix


def subtoken_embedding(
    kind: str,
    table_TxRxE: jax.Array,
    digits_NxS: jax.Array,
    width: int,
    implementation: str = "xla",
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Merge the S sub-token embeddings of each token into one vector [..., width].

    Args:
        kind: `sum`, or `cat` (S tables) and `cat_shared` (one), which concatenate and pad with
            zeros where S does not divide the width (theory.md, "Sub-token codes").
        table_TxRxE: T tables of R = b + 1 rows; the last row stands for "masked".
        digits_NxS: int [..., S] below R.
        implementation: `xla` (the fastest one without Pallas for the target device), `multi_hot`,
            `select` or `pallas`; tables that are too large for it are gathered.
        dtype: of the result; by default that of the tables.
    """
    dtype = dtype or table_TxRxE.dtype
    shape, slots = digits_NxS.shape[:-1], digits_NxS.shape[-1]
    digits_NxS = digits_NxS.reshape(-1, slots)
    chosen = resolve(implementation, kind, slots, table_TxRxE.shape[1])
    if chosen == "gather":
        x_NxD = _gather(kind, table_TxRxE, digits_NxS, width).astype(dtype)
    elif chosen == "multi_hot":
        x_NxD = _multi_hot(kind, table_TxRxE, digits_NxS, width).astype(dtype)
    elif chosen == "select":
        x_NxD = _select(table_TxRxE, _packed(digits_NxS), slots, width, dtype)
    else:
        from prime_jax.kernels import embedding_mosaic  # imports Mosaic only if used

        matrix_KxD = _matrix(kind, table_TxRxE, slots, width)
        if table_TxRxE.shape[1] == 3:
            words_NxW = _packed(digits_NxS)
            x_NxD = embedding_mosaic.from_words(words_NxW, matrix_KxD, slots, dtype)
        else:
            x_NxD = embedding_mosaic.from_digits(digits_NxS, matrix_KxD, dtype)
    return x_NxD.reshape(*shape, width)


def subtoken_embedding_reference(kind, table_TxRxE, digits_NxS, width) -> jax.Array:
    """Twin of `subtoken_embedding`: every digit's row is looked up."""
    return _gather(kind, table_TxRxE, digits_NxS, width)


def resolve(implementation: str, kind: str, slots: int, rows: int) -> str:
    """The implementation for S tables of R rows: `gather`, `multi_hot`, `select` or `pallas`."""
    limit = PALLAS_ROWS if implementation == "pallas" else MULTI_HOT_ROWS
    if slots == 1 or slots * rows > limit:
        return "gather"
    selectable = rows == 3 and kind != "sum"
    if implementation == "xla":
        # TPU compiler's estimate: 0.42 of the matmul's time, forward and backward; slower on a CPU.
        return "select" if selectable and on_tpu() else "multi_hot"
    if implementation == "select" and not selectable:
        raise ValueError(f"select reads concatenated binary tables, not {kind} of {rows} rows")
    return implementation


def _packed(digits_NxS: jax.Array) -> jax.Array:
    """uint32 [N, W] of binary digits, 2 where masked (theory.md, "Sub-token codes"): slot j is bit
    S-1-j.

    Up to 16 sub-tokens fit one word, digits in the low and masks in the high half; else two words.
    """
    slots = digits_NxS.shape[1]
    shift_S = np.arange(slots - 1, -1, -1, dtype=np.uint32)
    bits = [(digits_NxS == digit).astype(jnp.uint32) << shift_S for digit in (1, 2)]
    seen_N, mask_N = (x_NxS.sum(axis=1, dtype=jnp.uint32) for x_NxS in bits)
    return (seen_N | mask_N << 16)[:, None] if slots <= 16 else jnp.stack([seen_N, mask_N], axis=1)


def _matrix(kind: str, table_TxRxE: jax.Array, slots: int, width: int) -> jax.Array:
    """[S * R, D], row s * R + r: contribution of digit r of slot s to a token's vector."""
    rows, size = table_TxRxE.shape[1:]
    if kind == "sum":
        return table_TxRxE.reshape(slots * rows, width)
    spread_SxRxE = jnp.broadcast_to(table_TxRxE, (slots, rows, size))
    block_SxRxSxE = (
        jnp.eye(slots, dtype=table_TxRxE.dtype)[:, None, :, None] * spread_SxRxE[:, :, None]
    )
    matrix_KxE = block_SxRxSxE.reshape(slots * rows, slots * size)
    return jnp.pad(matrix_KxE, ((0, 0), (0, width - slots * size)))


def _multi_hot(kind, table_TxRxE, digits_NxS, width):
    slots, rows = digits_NxS.shape[1], table_TxRxE.shape[1]
    hot_NxSxR = jax.nn.one_hot(digits_NxS, rows, dtype=table_TxRxE.dtype)
    return hot_NxSxR.reshape(-1, slots * rows) @ _matrix(kind, table_TxRxE, slots, width)


def _gather(kind, table_TxRxE, digits_NxS, width):
    tables, _, size = table_TxRxE.shape
    slots = digits_NxS.shape[1]
    if slots == 1:
        return table_TxRxE[0][digits_NxS[:, 0]]
    slot = 0 if tables == 1 else jnp.arange(slots)
    read_NxSxE = table_TxRxE[slot, digits_NxS]
    if kind == "sum":
        return read_NxSxE.sum(axis=1)
    merged_NxE = read_NxSxE.reshape(-1, slots * size)
    return jnp.pad(merged_NxE, ((0, 0), (0, width - slots * size)))


def _lane_conditions(words_NxW, shift_1xD):
    """bool [N, D]: the lane's sub-token is masked; it is visible and 1; it is visible and 0."""
    seen_N, mask_N = words_NxW[:, 0], words_NxW[:, -1]
    if words_NxW.shape[1] == 1:
        mask_N = mask_N >> 16
    one_NxD = ((seen_N[:, None] >> shift_1xD) & 1) == 1
    masked_NxD = ((mask_N[:, None] >> shift_1xD) & 1) == 1
    return masked_NxD, one_NxD & ~masked_NxD, ~one_NxD & ~masked_NxD


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _select_lanes(dtype, lanes_3xD, words_NxW, shift_1xD):
    masked_NxD, one_NxD, _ = _lane_conditions(words_NxW, shift_1xD)
    zero_1xD, one_1xD, masked_1xD = jnp.split(lanes_3xD.astype(dtype), 3)
    return jnp.where(masked_NxD, masked_1xD, jnp.where(one_NxD, one_1xD, zero_1xD))


def _select_forward(dtype, lanes_3xD, words_NxW, shift_1xD):
    residuals = lanes_3xD[:0], words_NxW, shift_1xD
    return _select_lanes(dtype, lanes_3xD, words_NxW, shift_1xD), residuals


def _select_backward(dtype, residuals, g_NxD):
    """Three masked column sums, which XLA computes in one pass over the cotangent."""
    empty, words_NxW, shift_1xD = residuals
    conditions = reversed(_lane_conditions(words_NxW, shift_1xD))
    g_NxD = g_NxD.astype(jnp.promote_types(g_NxD.dtype, jnp.float32))
    sums = [jnp.where(condition, g_NxD, 0).sum(axis=0) for condition in conditions]
    return jnp.stack(sums).astype(empty.dtype), None, None


_select_lanes.defvjp(_select_forward, _select_backward)


def _select(table_Tx3xE, words_NxW, length, width, dtype):
    """Each lane reads one bit of the token: three candidate rows [3, D], two selects."""
    size = table_Tx3xE.shape[2]
    spread_Sx3xE = jnp.broadcast_to(table_Tx3xE, (length, 3, size))
    lanes_3xE = jnp.swapaxes(spread_Sx3xE, 0, 1).reshape(3, length * size)
    lanes_3xD = jnp.pad(lanes_3xE, ((0, 0), (0, width - length * size)))
    slot_D = np.minimum(np.arange(width) // size, length - 1)
    shift_1xD = (length - 1 - slot_D).astype(np.uint32)[None]
    return _select_lanes(jnp.dtype(dtype), lanes_3xD, words_NxW, shift_1xD)
