"""Mosaic (TPU) kernels of the sub-token embedding: a multi-hot matmul without the multi-hot matrix.

Tokens are on lanes (codes [W, N]): a [N, 1] operand would take 128 times the HBM. Each block of
tokens builds its [K, n] zeros and ones in registers; forward multiplies them with the [K, D] table,
backward adds their product with the cotangent into one float32 [K, D] block that stays in VMEM.
Matrices here have their rows in the order in which the kernel numbers them:

    words    digit c of the slot at bit i is row c * P + i, P = 16 or 32
    digits   digit c of slot s is row s * P + c, P = R rounded up to 16
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from prime_jax.kernels.common import Case, ceil_to, dot, on_tpu

TOKENS = 512  # per block: 512 x 2048 float32 cotangents, twice, are 8 MiB of VMEM
SUBLANES = 16  # rows of a bfloat16 tile


class Layout(NamedTuple):
    """How codes [W, n] become the multi-hot matrix."""

    hot: Callable[[jax.Array, jnp.dtype], jax.Array]  # codes int32 [W, n], dtype -> [K, n]
    rows: int  # K


@functools.cache
def words_layout(words: int) -> Layout:
    """Binary tokens, packed into one or two words (`embedding`)."""
    bits, kind_shift = (16, 4) if words == 1 else (32, 5)

    def hot(words_Wxn, dtype):
        shape = (3 * bits, words_Wxn.shape[1])
        row_Kxn = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        bit_Kxn = row_Kxn & (bits - 1)

        def read(word_1xn, shift_Kxn):
            return (word_1xn >> shift_Kxn) & 1  # `& 1` removes the sign extension

        seen_Kxn = read(words_Wxn[:1], bit_Kxn)
        masked_Kxn = read(words_Wxn[-1:], bit_Kxn + (16 if bits == 16 else 0))
        digit_Kxn = jnp.where(masked_Kxn == 1, 2, seen_Kxn)
        return _indicator(digit_Kxn == row_Kxn >> kind_shift, dtype)

    return Layout(hot, 3 * bits)


@functools.cache
def digits_layout(slots: int, rows: int) -> Layout:
    """Any base: one row of digits per slot."""
    padded = ceil_to(rows, SUBLANES)

    def hot(digits_Sxn, dtype):
        digit_Pxn = jax.lax.broadcasted_iota(jnp.int32, (padded, digits_Sxn.shape[1]), 0)
        same = [digit_Pxn == digits_Sxn[s : s + 1] for s in range(slots)]
        return jnp.concatenate([_indicator(x, dtype) for x in same], axis=0)

    return Layout(hot, slots * padded)


def _indicator(condition: jax.Array, dtype) -> jax.Array:
    # Via float32: a bfloat16 select with a 32-bit condition has no layout on the TPU.
    return jnp.where(condition, 1.0, 0.0).astype(dtype)


def from_words(words_NxW, matrix_KxD, length: int, dtype) -> jax.Array:
    """[N, D] in `dtype` from packed binary tokens; matrix row s * 3 + c is digit c of slot s."""
    width, layout = matrix_KxD.shape[1], words_layout(words_NxW.shape[1])
    by_bit_SxRxD = matrix_KxD.reshape(length, 3, width)[::-1]  # slot j is bit l - 1 - j
    padding = layout.rows // 3 - length
    padded_RxPxD = jnp.pad(jnp.swapaxes(by_bit_SxRxD, 0, 1), ((0, 0), (0, padding), (0, 0)))
    codes_WxN = jax.lax.bitcast_convert_type(words_NxW, jnp.int32).T
    return _embed(layout, jnp.dtype(dtype), codes_WxN, padded_RxPxD.reshape(-1, width))


def from_digits(digits_NxS, matrix_KxD, dtype) -> jax.Array:
    """[N, D] in `dtype` from digits below R; matrix row s * R + c is digit c of slot s."""
    slots, width = digits_NxS.shape[1], matrix_KxD.shape[1]
    rows = matrix_KxD.shape[0] // slots
    layout = digits_layout(slots, rows)
    padding = layout.rows // slots - rows
    padded_SxPxD = jnp.pad(matrix_KxD.reshape(slots, rows, width), ((0, 0), (0, padding), (0, 0)))
    codes_SxN = digits_NxS.astype(jnp.int32).T
    return _embed(layout, jnp.dtype(dtype), codes_SxN, padded_SxPxD.reshape(-1, width))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _embed(layout: Layout, dtype, codes_WxN, matrix_KxD):
    return _forward(layout, codes_WxN, matrix_KxD.astype(dtype))


def _embed_forward(layout, dtype, codes_WxN, matrix_KxD):
    return _embed(layout, dtype, codes_WxN, matrix_KxD), (codes_WxN, matrix_KxD[:0])


def _embed_backward(layout, dtype, residuals, g_NxD):
    codes_WxN, empty = residuals
    return None, _backward(layout, codes_WxN, g_NxD).astype(empty.dtype)


_embed.defvjp(_embed_forward, _embed_backward)


def _dot(hot_Kxn: jax.Array, x: jax.Array, hot_axis: int) -> jax.Array:
    """Contract `hot_axis` of the multi-hot matrix with the rows of `x`, in float32."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return dot(hot_Kxn, x, (hot_axis, 0), exact)


def _forward(layout: Layout, codes_WxN, matrix_KxD) -> jax.Array:
    """[N, D] in the dtype of the matrix."""
    n_tokens, width = codes_WxN.shape[1], matrix_KxD.shape[1]
    block = min(TOKENS, n_tokens)

    def kernel(codes_ref, matrix_ref, out_ref):
        hot_Kxn = layout.hot(codes_ref[...], matrix_ref.dtype)
        out_ref[...] = _dot(hot_Kxn, matrix_ref[...], 0).astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        name="subtoken_embedding_forward",
        grid=(pl.cdiv(n_tokens, block),),
        in_specs=[
            pl.BlockSpec((codes_WxN.shape[0], block), lambda i: (0, i)),
            pl.BlockSpec(matrix_KxD.shape, lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((block, width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((n_tokens, width), matrix_KxD.dtype),
        **_options("parallel", layout.rows, n_tokens, width, matrix_KxD.dtype),
    )(codes_WxN, matrix_KxD)


def _backward(layout: Layout, codes_WxN, g_NxD) -> jax.Array:
    """Gradient of the matrix, float32 [K, D], summed over blocks of tokens in order."""
    n_tokens, width = g_NxD.shape
    block = min(TOKENS, n_tokens)

    def kernel(codes_ref, g_ref, out_ref):
        i = pl.program_id(0)

        @pl.when(i == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        g_nxD = g_ref[...]
        if n_tokens % block:  # the last block reads past the end
            row_nxD = i * block + jax.lax.broadcasted_iota(jnp.int32, g_nxD.shape, 0)
            g_nxD = jnp.where(row_nxD < n_tokens, g_nxD.astype(jnp.float32), 0.0).astype(
                g_nxD.dtype
            )
        out_ref[...] += _dot(layout.hot(codes_ref[...], g_nxD.dtype), g_nxD, 1)

    return pl.pallas_call(
        kernel,
        name="subtoken_embedding_backward",
        grid=(pl.cdiv(n_tokens, block),),
        in_specs=[
            pl.BlockSpec((codes_WxN.shape[0], block), lambda i: (0, i)),
            pl.BlockSpec((block, width), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((layout.rows, width), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((layout.rows, width), jnp.float32),
        **_options("arbitrary", layout.rows, n_tokens, width, g_NxD.dtype),
    )(codes_WxN, g_NxD)


def _options(semantics: str, n_rows: int, n_tokens: int, width: int, dtype) -> dict[str, Any]:
    """Interpreted if the target is not a TPU; the cost estimate is for XLA's scheduler."""
    return {
        "compiler_params": pltpu.CompilerParams(dimension_semantics=(semantics,)),
        "cost_estimate": pl.CostEstimate(
            flops=2 * n_tokens * n_rows * width,
            bytes_accessed=n_tokens * (width * dtype.itemsize + 4) + 4 * n_rows * width,
            transcendentals=0,
        ),
        "interpret": not on_tpu(),
    }


def cases(chip: str, width: int, vocab_size: int) -> list[Case]:
    """Forward and backward at 16384 tokens in bfloat16: binary codes, and base 15."""
    del chip, vocab_size  # blocks do not depend on the chip, codes not on the vocabulary
    n_tokens, struct = 16384, jax.ShapeDtypeStruct
    g_NxD = struct((n_tokens, width), jnp.bfloat16)
    out = []
    for name, layout, words in (
        ("l=16 b=2", words_layout(1), 1),
        ("l=18 b=2", words_layout(2), 2),
        ("l=4 b=15", digits_layout(4, 16), 4),
    ):
        codes_WxN = struct((words, n_tokens), jnp.int32)
        matrix_KxD = struct((layout.rows, width), jnp.bfloat16)
        forward = functools.partial(_forward, layout)
        backward = functools.partial(_backward, layout)
        options = {"tokens": TOKENS, "rows": layout.rows}
        out += [
            Case(f"embedding forward D={width} {name}", forward, (codes_WxN, matrix_KxD), options),
            Case(f"embedding backward D={width} {name}", backward, (codes_WxN, g_NxD), options),
        ]
    return out
