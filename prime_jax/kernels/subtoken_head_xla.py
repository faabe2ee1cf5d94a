"""The head in plain JAX, streaming over chunks of rows: logits [N, V] are never stored.

`loss_and_gradients` gets the row weights and computes gradients in the forward pass, with one
computation of the logits. `masses` and `gradients` are forward and backward for any cotangent; the
latter recomputes the logits.
"""

from typing import Any

import jax
import jax.numpy as jnp

from prime_jax.kernels.common import NEG, target_kind
from prime_jax.kernels.subtoken_head_base import (
    PADDING,
    Coefficients,
    Head,
    HeadLoss,
    Masses,
    Shard,
    combined,
    consistent,
    loss_terms,
    one_hot,
    shard,
    summed,
)

# On a CPU the logits of a chunk fit into the cache, unless this gives fewer than MIN_ROWS: then
# passes over the head and its gradient would dominate.
CHUNK_ELEMENTS = 1 << 20
MIN_ROWS = 128
ACCELERATOR_ROWS = 1024  # without such a cache: few passes and little memory


def chunk_rows(n_rows: int, vocab_size: int) -> int:
    """Rows per chunk: a divisor of n_rows near the limit if there is one, else rows are padded."""
    least = MIN_ROWS if target_kind() == "cpu" else ACCELERATOR_ROWS
    limit = min(n_rows, max(least, CHUNK_ELEMENTS // vocab_size))
    divisor = max(d for d in range(1, limit + 1) if n_rows % d == 0)
    return divisor if divisor > 0.8 * limit else -(-n_rows // -(-n_rows // limit))


def _chunked(head: Head, rows: Any, vocab_size: int) -> Any:
    """Split the leading axis of every array into [chunks, rows per chunk], padded with zeros."""
    n_rows = jax.tree.leaves(rows)[0].shape[0]
    asked = head.blocks[0] if len(head.blocks) == 1 else 0  # three are those of the TPU's kernels
    chunk = min(asked, n_rows) or chunk_rows(n_rows, vocab_size)

    def split(x):
        x = jnp.pad(x, ((0, -n_rows % chunk), *((0, 0) for _ in x.shape[1:])))
        return x.reshape(-1, chunk, *x.shape[1:])

    return jax.tree.map(split, rows)


def _joined(chunks: Any, n_rows: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n_rows], chunks)


def _logits(head: Head, part: Shard, head_VxD, h_NxD, row_N, visible_NxW) -> jax.Array:
    """Restricted logits [N, V] of this device's head rows in at least float32."""
    dtype = jnp.promote_types(h_NxD.dtype, jnp.float32)
    z_NxV = jnp.einsum("nd,vd->nv", h_NxD, head_VxD, preferred_element_type=dtype)
    if visible_NxW is None and head.axis_name is None:
        return z_NxV
    true_NxW = jnp.asarray(head.words_VxW)[row_N]
    if visible_NxW is None:  # exclude only padding rows
        visible_NxW = jnp.full_like(true_NxW, PADDING)
    return jnp.where(consistent(part.words_VxW, true_NxW, visible_NxW), z_NxV, NEG)


class _Grid:
    """Codes 0 .. V-1 as a table of high by low digits; its last rows may be missing.

    Digit masses follow from its row and column sums, and these digit by digit: a reshape and a sum, one
    addition per element instead of a product with a [V, S*b] matrix.
    """

    def __init__(self, head: Head):
        book = head.codebook
        self.base, self.vocab_size = book.base, book.vocab_size
        self.low_slots = book.length // 2
        self.high_slots = book.length - self.low_slots
        self.low = book.base**self.low_slots
        self.high = book.base**self.high_slots
        self.full = book.vocab_size // self.low  # rows without a gap

    def sums(self, e_NxV: jax.Array) -> jax.Array:
        """sum_v e_v [C_vj = c]: [N, S, b]."""
        body, tail_NxT = jnp.split(e_NxV, [self.full * self.low], axis=1)
        body_NxHxL = body.reshape(e_NxV.shape[0], self.full, self.low)
        high_NxH, low_NxL = body_NxHxL.sum(axis=2), body_NxHxL.sum(axis=1)
        if tail_NxT.shape[1]:
            high_NxH = jnp.concatenate([high_NxH, tail_NxT.sum(axis=1, keepdims=True)], axis=1)
            low_NxL += jnp.pad(tail_NxT, ((0, 0), (0, self.low - tail_NxT.shape[1])))
        high_NxH = jnp.pad(high_NxH, ((0, 0), (0, self.high - high_NxH.shape[1])))
        parts = (self._by_digit(high_NxH, self.high_slots), self._by_digit(low_NxL, self.low_slots))
        return jnp.concatenate(parts, axis=1)

    def _by_digit(self, e_NxC: jax.Array, slots: int) -> jax.Array:
        """Sums [N, slots, b] over all b**slots codes, slot by slot from the left."""
        out = []
        for _ in range(slots):
            e_NxbxR = e_NxC.reshape(e_NxC.shape[0], self.base, -1)
            out.append(e_NxbxR.sum(axis=2))
            e_NxC = e_NxbxR.sum(axis=1)
        return jnp.stack(out, axis=1)

    def to_tokens(self, value_NxSxb: jax.Array) -> jax.Array:
        """sum_j value_j[C_vj] for every token: [N, V], the transpose of `sums`."""
        high_NxH = self._of_codes(value_NxSxb[:, : self.high_slots])
        low_NxL = self._of_codes(value_NxSxb[:, self.high_slots :])
        rows = -(-self.vocab_size // self.low)
        table_NxHxL = high_NxH[:, :rows, None] + low_NxL[:, None, :]
        return table_NxHxL.reshape(len(value_NxSxb), -1)[:, : self.vocab_size]

    def _of_codes(self, value_NxSxb: jax.Array) -> jax.Array:
        """The transpose of `_by_digit`: [N, b**S]."""
        out_NxC = jnp.zeros((len(value_NxSxb), 1), value_NxSxb.dtype)
        for value_Nxb in jnp.moveaxis(value_NxSxb, 1, 0):
            out_NxC = (out_NxC[:, :, None] + value_Nxb[:, None, :]).reshape(len(out_NxC), -1)
        return out_NxC


class _Columns:
    """For any codes: products with one-hot digits."""

    def __init__(self, head: Head, part: Shard, dtype):
        self.shape = (-1, head.codebook.length, head.codebook.base)
        self.hot_VxC = one_hot(head, part.words_VxW, dtype)

    def sums(self, e_NxV: jax.Array) -> jax.Array:
        return (e_NxV @ self.hot_VxC).reshape(self.shape)

    def to_tokens(self, value_NxSxb: jax.Array) -> jax.Array:
        return value_NxSxb.reshape(value_NxSxb.shape[0], -1) @ self.hot_VxC.T


def _digits(head: Head, part: Shard, dtype) -> _Grid | _Columns | None:
    """The implementation of sums over digits; None if l = 1."""
    if head.plain:
        return None
    if head.dense_codes and head.axis_name is None:
        return _Grid(head)
    return _Columns(head, part, dtype)


def _chunk_masses(head: Head, digits, z_cxV: jax.Array, true_c: jax.Array) -> tuple:
    """(masses over all devices, exp(z - top))."""
    top_c = z_cxV.max(axis=1)
    e_cxV = jnp.exp(z_cxV - top_c[:, None])
    sums_cxSxb = None if digits is None else digits.sums(e_cxV)
    mass_c = e_cxV.sum(axis=1) if digits is None else sums_cxSxb[:, 0].sum(axis=1)
    index_c = jnp.clip(true_c, 0, z_cxV.shape[1] - 1)
    truth_c = jnp.take_along_axis(z_cxV, index_c[:, None], axis=1)[:, 0]
    if head.axis_name is not None:
        truth_c = jnp.where(index_c == true_c, truth_c, 0.0)
    masses = combined(head, Masses(top_c, truth_c, mass_c, sums_cxSxb))
    if head.axis_name is not None:
        e_cxV *= jnp.exp(top_c - masses.top_N)[:, None]
    return masses, e_cxV


def _logit_gradient(digits, p_cxV, true_c, coefficients: Coefficients) -> jax.Array:
    """dz [c, V] from probabilities (or from masses, with coefficients scaled by `over`)."""
    factor = coefficients.constant_N[:, None]
    if coefficients.digits_NxSxb is not None:
        factor += digits.to_tokens(coefficients.digits_NxSxb)
    column_cxV = jax.lax.broadcasted_iota(jnp.int32, p_cxV.shape, 1)
    at_truth_cxV = jnp.where(column_cxV == true_c[:, None], coefficients.truth_N[:, None], 0)
    return p_cxV * factor + at_truth_cxV


def _add_products(dhead_VxD, dz_cxV, h_cxD, head_VxD) -> tuple:
    """(dhead + dz^T h, dz head)."""
    dz_cxV, dtype = dz_cxV.astype(h_cxD.dtype), dhead_VxD.dtype
    dh_cxD = jnp.einsum("nv,vd->nd", dz_cxV, head_VxD, preferred_element_type=dtype)
    dhead_VxD += jnp.einsum("nv,nd->vd", dz_cxV, h_cxD, preferred_element_type=dtype)
    return dhead_VxD, dh_cxD


def masses(head: Head, h_NxD, head_VxD, row_N, visible_NxW) -> Masses:
    """Sums of every row over the tokens consistent with `visible_NxW`."""
    h_NxD = h_NxD.astype(head_VxD.dtype)
    part = shard(head, row_N, head_VxD.shape[0])
    digits = _digits(head, part, jnp.promote_types(h_NxD.dtype, jnp.float32))

    def chunk(row):
        z_cxV = _logits(head, part, head_VxD, *row[:3])
        return _chunk_masses(head, digits, z_cxV, row[3])[0]

    rows = (h_NxD, row_N, visible_NxW, part.true_N)
    return _joined(jax.lax.map(chunk, _chunked(head, rows, head_VxD.shape[0])), h_NxD.shape[0])


def gradients(head: Head, h_NxD, head_VxD, row_N, visible_NxW, lse_N, coefficients) -> tuple:
    """(dh [N, D], dhead [V, D]) in at least float32 from the coefficients of every row."""
    h_NxD = h_NxD.astype(head_VxD.dtype)
    dtype = jnp.promote_types(h_NxD.dtype, jnp.float32)
    part = shard(head, row_N, head_VxD.shape[0])
    digits = _digits(head, part, dtype)

    def chunk(dhead_VxD, row):
        z_cxV = _logits(head, part, head_VxD, *row[:3])
        p_cxV = jnp.exp(z_cxV - row[4][:, None])
        dz_cxV = _logit_gradient(digits, p_cxV, row[3], row[5])
        return _add_products(dhead_VxD, dz_cxV, row[0], head_VxD)

    rows = (h_NxD, row_N, visible_NxW, part.true_N, lse_N, coefficients)
    start = jnp.zeros(head_VxD.shape, dtype)
    dhead_VxD, dh = jax.lax.scan(chunk, start, _chunked(head, rows, head_VxD.shape[0]))
    return summed(head, _joined(dh, h_NxD.shape[0])), dhead_VxD


def loss_and_gradients(
    head: Head, h_NxD, head_VxD, row_N, masked_NxS, weight_N, whole_N, *, gradient: bool
) -> tuple[HeadLoss, jax.Array | None, jax.Array | None]:
    """(loss sums, dh [N, D], dhead [V, D]): one pass over the rows; None without `gradient`."""
    h_NxD = h_NxD.astype(head_VxD.dtype)
    dtype = jnp.promote_types(h_NxD.dtype, jnp.float32)
    part = shard(head, row_N, head_VxD.shape[0])
    digits = _digits(head, part, dtype)

    def chunk(carry, row):
        sums, dhead_VxD = carry
        h_cxD, row_c, true_c, masked_cxS, *weights = row
        z_cxV = _logits(head, part, head_VxD, h_cxD, row_c, head.seen(masked_cxS))
        masses, e_cxV = _chunk_masses(head, digits, z_cxV, true_c)
        losses, coefficients = loss_terms(head, masses, row_c, masked_cxS, *weights)
        sums = jax.tree.map(jnp.add, sums, losses)
        if not gradient:
            return (sums, dhead_VxD), None
        # Dividing the coefficients by the mass saves a pass over p = e / mass.
        scaled = coefficients.over(masses.mass_N)
        dz_cxV = _logit_gradient(digits, e_cxV, true_c, scaled)
        dhead_VxD, dh_cxD = _add_products(dhead_VxD, dz_cxV, h_cxD, head_VxD)
        return (sums, dhead_VxD), dh_cxD

    rows = (h_NxD, row_N, part.true_N, masked_NxS, weight_N, whole_N)
    zero = jnp.zeros((), dtype)
    start = (HeadLoss(zero, zero), jnp.zeros(head_VxD.shape if gradient else (), dtype))
    (sums, dhead_VxD), dh = jax.lax.scan(chunk, start, _chunked(head, rows, head_VxD.shape[0]))
    if not gradient:
        return sums, None, None
    return sums, summed(head, _joined(dh, h_NxD.shape[0])), dhead_VxD
