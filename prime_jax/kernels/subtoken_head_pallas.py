"""The head for TPUs: operands of the Mosaic kernels, and what their results mean.

The same three functions as in `subtoken_head_xla`. Rows, and codes, are padded to whole tiles.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from prime_jax.config import SubtokenConfig
from prime_jax.hardware.chips import CHIPS
from prime_jax.kernels.check_case import Case
from prime_jax.kernels.subtoken_head_base import (
    PADDING,
    Coefficients,
    Head,
    HeadLoss,
    Masses,
    combined,
    loss_terms,
    one_hot,
    shard,
    summed,
)
from prime_jax.kernels.subtoken_head_blocks import LANES, Blocks, ceil_to, core_count, fitted
from prime_jax.kernels.subtoken_head_mosaic import Operands, backward, forward
from prime_jax.subtokens import Codebook

LOG2E = math.log2(math.e)


def supports(head: Head) -> bool:
    """One word per code, and digits that fit the lanes of one register beside the ones."""
    return head.fields_SxW.shape[1] == 1 and head.columns < LANES


def _padded(x: jax.Array, count: int, value: Any = 0) -> jax.Array:
    return jnp.pad(
        x, ((0, count - x.shape[0]), *((0, 0) for _ in x.shape[1:])), constant_values=value
    )


def _operands(head: Head, h_NxD, head_VxD, row_N, visible_NxW) -> Operands:
    (n_tokens, width), (n_rows, _), dtype = h_NxD.shape, head_VxD.shape, head_VxD.dtype
    blocks = fitted(head, width, dtype.itemsize)
    tokens = min(blocks.tokens, ceil_to(n_tokens, LANES))
    rows = min(blocks.rows, ceil_to(n_rows, blocks.part))
    blocks = Blocks(tokens, rows, math.gcd(rows, blocks.part))
    padded_tokens, padded_rows = ceil_to(n_tokens, tokens), ceil_to(n_rows, rows)

    # The barrier keeps the compiler from unfolding indicators of the whole vocabulary.
    words_VxW = jax.lax.optimization_barrier(jnp.asarray(shard(head, row_N, n_rows).words_VxW))
    words_VxW = _padded(words_VxW, padded_rows, PADDING)
    hot_VxK = None
    if not head.plain:
        hot_VxC = one_hot(head, words_VxW, jnp.float32)
        hot_VxK = jnp.pad(hot_VxC, ((0, 0), (0, 1)), constant_values=1).astype(dtype)
    true_N = jnp.asarray(head.words_VxW)[row_N, 0]
    visible_N = jnp.full_like(true_N, PADDING) if visible_NxW is None else visible_NxW[:, 0]
    hs_NxD = (h_NxD.astype(jnp.float32) * LOG2E).astype(dtype)
    return Operands(
        blocks=blocks,
        cores=min(core_count(), padded_rows // rows),
        hs_NxD=_padded(hs_NxD, padded_tokens),
        head_VxD=_padded(head_VxD, max(n_rows, rows)),  # a copy of it only where it is one block
        codes_1xV=words_VxW.T,
        hot_VxK=hot_VxK,
        bits_2xN=_padded(jnp.stack([true_N, visible_N], axis=1), padded_tokens).T,
    )


def masses(head: Head, h_NxD, head_VxD, row_N, visible_NxW, interpret: Any = None) -> Masses:
    """As in `subtoken_head_xla`; digit masses from the exponentials in twice the precision."""
    operands = _operands(head, h_NxD, head_VxD, row_N, visible_NxW)
    return _masses(head, operands, row_N, head_VxD, 2, interpret)


def _masses(head: Head, operands: Operands, row_N, head_VxD, terms: int, interpret) -> Masses:
    count = len(row_N)
    top_1xN, sums_KxN = forward(operands, terms, interpret)
    sums_NxK, digits = sums_KxN.T[:count], None
    if not head.plain:
        shape = (-1, head.codebook.length, head.codebook.base)
        digits = sums_NxK[:, : head.columns].reshape(shape)
    true_N = shard(head, row_N, head_VxD.shape[0]).true_N
    index_N = jnp.clip(true_N, 0, head_VxD.shape[0] - 1)
    hs_NxD = operands.hs_NxD[:count].astype(jnp.float32)
    truth_N = (hs_NxD * head_VxD[index_N].astype(jnp.float32)).sum(axis=1)
    truth_N = jnp.where(index_N == true_N, truth_N, 0)
    top_N, mass_N = top_1xN[0, :count], sums_NxK[:, head.columns]
    return combined(head, Masses(top_N / LOG2E, truth_N / LOG2E, mass_N, digits))


def gradients(
    head: Head, h_NxD, head_VxD, row_N, visible_NxW, lse_N, coefficients, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """As in `subtoken_head_xla`: (dh [N, D], dhead [V, D]), float32."""
    operands = _operands(head, h_NxD, head_VxD, row_N, visible_NxW)
    return _gradients(head, operands, h_NxD, head_VxD, lse_N, coefficients, interpret)


def _gradients(head: Head, operands: Operands, h_NxD, head_VxD, lse_N, coefficients, interpret):
    constant_N, digits_NxSxb, truth_N = coefficients
    count, padded = len(h_NxD), len(operands.hs_NxD)
    columns_KxN = None
    if digits_NxSxb is not None:
        digits_NxC = digits_NxSxb.reshape(-1, head.columns)
        columns_NxK = jnp.concatenate([digits_NxC, constant_N[:, None]], axis=1)
        columns_KxN = _padded(columns_NxK, padded).T
    numbers_3xN = _padded(jnp.stack([lse_N * LOG2E, constant_N, truth_N], axis=1), padded).T
    dhead_VxD, dh_NxD = backward(
        operands,
        _padded(h_NxD.astype(head_VxD.dtype), padded),
        columns_KxN,
        numbers_3xN,
        interpret,
    )
    return summed(head, dh_NxD[:count]), dhead_VxD[: head_VxD.shape[0]]


def loss_and_gradients(
    head: Head,
    h_NxD,
    head_VxD,
    row_N,
    masked_NxS,
    weight_N,
    whole_N,
    *,
    gradient: bool,
    interpret: Any = None,
) -> tuple[HeadLoss, jax.Array | None, jax.Array | None]:
    """As in `subtoken_head_xla`: (loss sums, dh [N, D], dhead [V, D])."""
    operands = _operands(head, h_NxD, head_VxD, row_N, head.seen(masked_NxS))
    masses = _masses(head, operands, row_N, head_VxD, 1, interpret)
    losses, coefficients = loss_terms(head, masses, row_N, masked_NxS, weight_N, whole_N)
    if not gradient:
        return losses, None, None
    lse_N = masses.lse_N
    return losses, *_gradients(head, operands, h_NxD, head_VxD, lse_N, coefficients, interpret)


def cases(chip: str, width: int, vocab_size: int) -> list[Case]:
    """Forward and backward of the marginal loss at the granularity of bits, 4096 tokens."""
    length = (vocab_size - 1).bit_length()
    head = Head(Codebook.create(vocab_size, SubtokenConfig(length=length)))
    device = AbstractDevice(device_kind=CHIPS[chip].kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("chip",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        options = {"blocks": tuple(fitted(head, width, 2))}

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((4096, *shape), dtype)

    hidden, row = array(width, dtype=jnp.bfloat16), array(dtype=jnp.int32)
    rows = jax.ShapeDtypeStruct((vocab_size, width), jnp.bfloat16)
    masked = array(length, dtype=bool)
    loss = partial(loss_and_gradients, head, whole_N=None, gradient=False, interpret=False)

    def run_backward(h_NxD, head_VxD, row_N, masked_NxS, lse_N, coefficients):
        seen_NxW = head.seen(masked_NxS)
        return gradients(head, h_NxD, head_VxD, row_N, seen_NxW, lse_N, coefficients, False)

    shared = (hidden, rows, row, masked, array())
    coefficients = Coefficients(array(), array(length, head.codebook.base), array())
    name = f"D={width} V={vocab_size}"
    return [
        Case(f"head forward {name}", loss, shared, options),
        Case(f"head backward {name}", run_backward, (*shared, coefficients), options),
    ]
