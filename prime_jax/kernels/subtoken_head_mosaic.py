"""The head for TPUs: two Mosaic kernels, online masses and one fused backward pass.

The same three functions as in `subtoken_head_xla`; rows, and codes, are padded to whole tiles.

Tokens are on lanes: logits are computed transposed, [head rows, tokens], so that softmax statistics
are sublane reductions without lane shuffles. Head rows are processed in parts; the next product is
issued before the softmax of the previous part. Digit masses are a product with the indicator of
every digit; a row of ones in it gives the total mass the same rounding.

The backward pass recomputes the logits, and both gradients from them: dhead is accumulated in VMEM
over the tokens; dh is read, updated and written back by copies that overlap with the products.

Letters besides the usual: T tokens and U head rows of a tile, R head rows of a part, K columns of
digits (C digits, a column of ones, padding).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from prime_jax.config import SubtokenConfig
from prime_jax.errors import UserError
from prime_jax.hardware.chips import CHIPS, MIB
from prime_jax.kernels.common import LANES, LOG2E, NEG, Case, ceil_to, dot, on_tpu, vmem_capacity
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
from prime_jax.subtokens import Codebook

TILE = 16  # sublanes of a bfloat16 tile


class Blocks(NamedTuple):
    """Tokens and head rows of a tile, and head rows of a part; multiples of 128 on a TPU."""

    tokens: int = 512
    rows: int = 1024
    part: int = 256


class Operands(NamedTuple):
    """Inputs of both kernels, padded to whole tiles.

    Attributes:
        hs_NxD: hidden states times log2(e), so that logits are exponents of 2.
        head_VxD: not padded: reads beyond its end are undefined, and excluded by `codes_1xV`.
        codes_1xV: words of the head rows; hot_VxK: their one-hot digits and a one, None if l = 1.
        bits_2xN: word of the true token, and the bits that consistent head rows share with it.
        cores: number of cores of the backward pass, each with its own blocks of head rows.
    """

    blocks: Blocks
    cores: int
    hs_NxD: jax.Array
    head_VxD: jax.Array
    codes_1xV: jax.Array
    hot_VxK: jax.Array | None
    bits_2xN: jax.Array


def vmem_bytes(width: int, itemsize: int, blocks: Blocks) -> int:
    """An upper bound on the VMEM of the larger kernel, the backward pass."""
    tokens, rows, part = blocks
    by_tokens = (
        tokens * width * (2 * 2 * itemsize + 3 * 4)
    )  # two of h and dh, double-buffered, and a sum
    by_rows = rows * width * (2 * itemsize + 2 * 4)  # head and dhead, double-buffered
    return by_tokens + by_rows + 8 * part * tokens * 4 + 4 * MIB


def core_count() -> int:
    """Cores of one JAX device."""
    return pltpu.get_tpu_info().num_cores if on_tpu() else 1


def matrix_unit() -> int:
    """Columns of the chip's matrix units."""
    return pltpu.get_tpu_info().mxu_column_size if on_tpu() else LANES


def fitted(head: Head, width: int, itemsize: int) -> Blocks:
    """The configured blocks, or the largest default ones that fit into VMEM.

    Raises:
        UserError: `head.blocks` is neither empty nor three positive numbers, the last of which
            divides the second.
    """
    if head.blocks:
        good = len(head.blocks) == 3 and min(head.blocks) > 0
        if not good or head.blocks[1] % head.blocks[2]:
            raise UserError(
                f"head blocks {head.blocks}: give tokens, head rows and a part of the head rows"
            )
        return Blocks(*head.blocks)
    # With smaller widths or larger matrix units a matmul hides less of the softmax.
    large = 1024 if width <= (1024 if matrix_unit() > LANES else 512) else 512
    usual = [Blocks(large), Blocks(), Blocks(512, 512), Blocks(256, 512)]
    fit = [x for x in usual if vmem_bytes(width, itemsize, x) <= vmem_capacity()]
    return fit[0] if fit else Blocks(128, 256, 128)


def supports(head: Head) -> bool:
    """One word per code, and columns of digits and ones that fit the lanes of one register."""
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

    # The barrier prevents constant folding of indicators of the whole vocabulary.
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
        head_VxD=_padded(
            head_VxD, max(n_rows, rows)
        ),  # copied only if it is smaller than one block
        codes_1xV=words_VxW.T,
        hot_VxK=hot_VxK,
        bits_2xN=_padded(jnp.stack([true_N, visible_N], axis=1), padded_tokens).T,
    )


def masses(head: Head, h_NxD, head_VxD, row_N, visible_NxW, interpret: Any = None) -> Masses:
    """As in `subtoken_head_xla`; digit masses from exponentials in twice bfloat16's precision."""
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


def _mismatch(codes_ref, start: int, part: int, bits_2xT: jax.Array) -> tuple:
    """Bits [R, T] in which head rows differ from the truth, and whether a visible one does."""
    tokens = bits_2xT.shape[1]
    lanes = min(LANES, tokens)
    codes_1xR = codes_ref[:, pl.ds(start, part)]
    codes_RxT = jnp.tile(jnp.broadcast_to(codes_1xR, (lanes, part)).T, (1, tokens // lanes))
    differ_RxT = codes_RxT ^ bits_2xT[:1]
    return differ_RxT, (differ_RxT & bits_2xT[1:]) != 0


def _forward_kernel(blocks: Blocks, terms, hs_ref, head_ref, codes_ref, *refs):
    *hot_ref, bits_ref, top_ref, sums_ref = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, NEG)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    hs_TxD, bits_2xT = hs_ref[...], bits_ref[...]

    def logits(start):
        return dot(head_ref[pl.ds(start, blocks.part), :], hs_TxD, (1, 1))

    def sums(start, p_RxT):
        if not hot_ref:
            return p_RxT.sum(0, keepdims=True)
        hot_KxR = hot_ref[0][:, pl.ds(start, blocks.part)]
        high_RxT = p_RxT.astype(hot_KxR.dtype)
        total_KxT = dot(hot_KxR, high_RxT, (1, 0))
        if terms > 1 and hot_KxR.dtype != jnp.float32:
            low_RxT = (p_RxT - high_RxT.astype(jnp.float32)).astype(hot_KxR.dtype)
            total_KxT += dot(hot_KxR, low_RxT, (1, 0))
        return total_KxT

    next_RxT = logits(0)
    top_1xT, sums_KxT = top_ref[...], sums_ref[...]
    for start in range(0, blocks.rows, blocks.part):
        z_RxT = next_RxT
        if start + blocks.part < blocks.rows:  # issued early to overlap with the softmax
            next_RxT = logits(start + blocks.part)
        _, excluded_RxT = _mismatch(codes_ref, start, blocks.part, bits_2xT)
        z_RxT = jnp.where(excluded_RxT, NEG, z_RxT)
        higher_1xT = jnp.maximum(top_1xT, z_RxT.max(0, keepdims=True))
        # Sums before the first consistent row are later multiplied by 0.
        p_RxT = jnp.exp2(z_RxT - higher_1xT)
        sums_KxT = sums_KxT * jnp.exp2(top_1xT - higher_1xT) + sums(start, p_RxT)
        top_1xT = higher_1xT
    top_ref[...], sums_ref[...] = top_1xT, sums_KxT


def forward(operands: Operands, terms: int, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """(largest exponent [1, N], sums of powers of 2 relative to it [K, N]), float32.

    Args:
        terms: 2 for digit sums with twice the precision of bfloat16.
    """
    (tokens, rows, _), (n_tokens, width) = operands.blocks, operands.hs_NxD.shape
    n_rows, dtype = operands.head_VxD.shape[0], operands.head_VxD.dtype
    hot, hot_specs, sums = (), (), 1
    if operands.hot_VxK is not None:
        sums = ceil_to(operands.hot_VxK.shape[1], 16)
        hot = (jnp.pad(operands.hot_VxK.T, ((0, sums - operands.hot_VxK.shape[1]), (0, 0))),)
        hot_specs = (pl.BlockSpec((sums, rows), lambda i, j: (0, j)),)
    by_token = lambda n: pl.BlockSpec((n, tokens), lambda i, j: (0, i))  # noqa: E731
    return _call(
        partial(_forward_kernel, operands.blocks, terms),
        operands,
        name="subtoken_head_forward",
        grid=(n_tokens // tokens, pl.cdiv(n_rows, rows)),
        semantics=("parallel", "arbitrary"),
        inputs=(operands.hs_NxD, operands.head_VxD, operands.codes_1xV, *hot, operands.bits_2xN),
        in_specs=[
            pl.BlockSpec((tokens, width), lambda i, j: (i, 0)),
            pl.BlockSpec((rows, width), lambda i, j: (j, 0)),
            pl.BlockSpec((1, rows), lambda i, j: (0, j)),
            *hot_specs,
            by_token(2),
        ],
        out_specs=[by_token(1), by_token(sums)],
        out_shapes=[((1, n_tokens), jnp.float32), ((sums, n_tokens), jnp.float32)],
        cost=pl.CostEstimate(
            flops=2 * n_tokens * n_rows * (width + sums),
            transcendentals=n_tokens * n_rows,
            bytes_accessed=n_tokens // tokens * n_rows * width * dtype.itemsize,
        ),
        interpret=interpret,
    )


def _backward_kernel(blocks: Blocks, n_rows: int, grid, hs_ref, h_ref, head_ref, *refs):
    codes_ref, *digit_refs, bits_ref, numbers_ref, _, dhead_ref, dh_ref = refs[:-3]
    buffer_ref, read_sem, write_sem = refs[-3:]
    (_, places, tiles), n_blocks = grid, pl.cdiv(n_rows, blocks.rows)
    core, place, tile = (pl.program_id(axis) for axis in range(3))
    block, step = core * places + place, place * tiles + tile
    last = step == jnp.minimum(places, n_blocks - core * places) * tiles - 1
    moves = tiles > 1  # every step writes one tile of dh and reads the next; a single one stays
    slot = jax.lax.rem(step, 2) if moves else 0

    def copy(tile, slot, out):
        start = (core * tiles + tile) * blocks.tokens
        there = dh_ref.at[pl.ds(pl.multiple_of(start, blocks.tokens), blocks.tokens), :]
        here = buffer_ref.at[slot]
        if out:
            return pltpu.make_async_copy(here, there, write_sem.at[slot])
        return pltpu.make_async_copy(there, here, read_sem.at[slot])

    @pl.when(block < n_blocks)  # the last core may have fewer blocks
    def _():
        @pl.when(step == 0)
        def _():
            copy(tile, slot, out=False).start()

        if moves:

            @pl.when(step > 0)  # wait until the previous tile is written
            def _():
                copy(tile, 1 - slot, out=True).wait()

            @pl.when(~last)
            def _():
                copy(jax.lax.rem(tile + 1, tiles), 1 - slot, out=False).start()

        @pl.when(tile == 0)
        def _():
            dhead_ref[...] = jnp.zeros_like(dhead_ref)

        if n_rows % blocks.rows:

            @pl.when(block == n_rows // blocks.rows)
            def _():
                _clear(head_ref, n_rows % blocks.rows)

        hs_TxD, h_TxD, bits_2xT = hs_ref[...], h_ref[...], bits_ref[...]
        lse_1xT, constant_1xT, truth_1xT = (numbers_ref[i : i + 1, :] for i in range(3))
        dh_TxD = None
        for start in range(0, blocks.rows, blocks.part):
            here = pl.ds(start, blocks.part)
            head_RxD = head_ref[here, :]
            z_RxT = dot(head_RxD, hs_TxD, (1, 1))
            factor_RxT = constant_1xT
            if digit_refs:
                hot_ref, columns_ref = digit_refs
                factor_RxT = dot(hot_ref[here, :], columns_ref[...], (1, 0))
            differ_RxT, excluded_RxT = _mismatch(codes_ref, start, blocks.part, bits_2xT)
            p_RxT = jnp.exp2(jnp.where(excluded_RxT, NEG, z_RxT - lse_1xT))
            dz_RxT = p_RxT * factor_RxT
            dz_RxT += jnp.where(differ_RxT == 0, truth_1xT, 0.0)
            dz_RxT = dz_RxT.astype(head_RxD.dtype)
            dhead_ref[here, :] += dot(dz_RxT, h_TxD, (1, 0))
            part_TxD = dot(dz_RxT, head_RxD, (0, 0))
            dh_TxD = part_TxD if dh_TxD is None else dh_TxD + part_TxD

        @pl.when(moves | (step == 0))
        def _():
            copy(tile, slot, out=False).wait()

        buffer_ref[slot] += dh_TxD

        @pl.when(moves | last)
        def _():
            copy(tile, slot, out=True).start()

        @pl.when(last)
        def _():
            copy(tile, slot, out=True).wait()


def _clear(head_ref, count: int) -> None:
    """Set rows from `count` on to zero: undefined values times a zero gradient could be NaN."""
    edge = count // TILE * TILE
    after = min(edge + TILE, head_ref.shape[0])
    tile = head_ref[edge:after, :].astype(jnp.float32)
    row = edge + jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    head_ref[edge:after, :] = jnp.where(row < count, tile, 0).astype(head_ref.dtype)
    if after < head_ref.shape[0]:
        head_ref[after:, :] = jnp.zeros_like(head_ref[after:, :])


def _split(x_KxN: jax.Array, dtype) -> list[jax.Array]:
    """Terms of `dtype` that sum to float32 x, so that a product with all of them is precise."""
    if dtype == jnp.float32:
        return [x_KxN]
    pieces = []
    for _ in range(3):
        pieces.append(x_KxN.astype(dtype))
        x_KxN = x_KxN - pieces[-1].astype(jnp.float32)
    return pieces


def backward(
    operands: Operands, h_NxD, columns_KxN, numbers_3xN, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """(dhead [V, D], dh [N, D]), float32.

    Args:
        columns_KxN: contribution of each digit, and of the one, to dz / p; None if l = 1.
        numbers_3xN: log2-sum-exp2; dz / p if `columns_KxN` is None; added to the true token's dz.
    """
    (tokens, rows, _), (n_tokens, width) = operands.blocks, operands.hs_NxD.shape
    n_rows, dtype = operands.head_VxD.shape[0], operands.head_VxD.dtype
    cores, n_blocks = operands.cores, pl.cdiv(n_rows, rows)
    places = pl.cdiv(n_blocks, cores)
    grid = cores, places, n_tokens // tokens

    def block(k, j, i):
        return jnp.minimum(k * places + j, n_blocks - 1)

    digits, digit_specs, columns = (), (), 0
    if columns_KxN is not None:
        pieces = _split(columns_KxN, dtype)
        count = len(pieces) * operands.hot_VxK.shape[1]
        columns = ceil_to(count, LANES)
        hot_VxK = jnp.concatenate([operands.hot_VxK] * len(pieces), axis=1)
        digits = (
            jnp.pad(hot_VxK, ((0, 0), (0, columns - count))),
            jnp.pad(jnp.concatenate(pieces), ((0, columns - count), (0, 0))),
        )
        digit_specs = (
            pl.BlockSpec((rows, columns), lambda *at: (block(*at), 0)),
            pl.BlockSpec((columns, tokens), lambda k, j, i: (0, i)),
        )
    by_token = lambda n: pl.BlockSpec((n, tokens), lambda k, j, i: (0, i))  # noqa: E731
    tokens_spec = pl.BlockSpec((tokens, width), lambda k, j, i: (i, 0))
    rows_spec = pl.BlockSpec((rows, width), lambda *at: (block(*at), 0))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    inputs = (operands.hs_NxD, h_NxD, operands.head_VxD, operands.codes_1xV, *digits)
    inputs = (*inputs, operands.bits_2xN, numbers_3xN)
    dhead_VxD, dh_KNxD = _call(
        partial(_backward_kernel, operands.blocks, n_rows, grid),
        operands,
        name="subtoken_head_backward",
        grid=grid,
        semantics=("parallel", "arbitrary", "arbitrary"),
        inputs=(*inputs, jnp.zeros((cores * n_tokens, width), jnp.float32)),
        in_specs=[
            tokens_spec,
            tokens_spec,
            rows_spec,
            pl.BlockSpec((1, rows), lambda *at: (0, block(*at))),
            *digit_specs,
            by_token(2),
            by_token(3),
            hbm,
        ],
        out_specs=[rows_spec, hbm],
        out_shapes=[((n_rows, width), jnp.float32), ((cores * n_tokens, width), jnp.float32)],
        scratch_shapes=[
            pltpu.VMEM((2, tokens, width), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        aliases={len(inputs): 1},
        cost=pl.CostEstimate(
            flops=2 * n_tokens * n_rows * (3 * width + columns),
            transcendentals=n_tokens * n_rows,
            bytes_accessed=pl.cdiv(n_rows, rows) * n_tokens * width * (2 * dtype.itemsize + 8),
        ),
        interpret=interpret,
    )
    return dhead_VxD, dh_KNxD.reshape(cores, n_tokens, width).sum(axis=0)


def _call(
    kernel,
    operands: Operands,
    *,
    semantics,
    inputs,
    out_shapes,
    cost,
    interpret,
    aliases=None,
    **specs,
):
    width, itemsize = operands.hs_NxD.shape[1], operands.head_VxD.dtype.itemsize
    needed = vmem_bytes(width, itemsize, operands.blocks)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(*x) for x in out_shapes],
        input_output_aliases=aliases or {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=max(16 * MIB, min(needed, vmem_capacity())),
        ),
        cost_estimate=cost,
        interpret=not on_tpu() if interpret is None else interpret,
        **specs,
    )(*inputs)


def cases(chip: str, width: int, vocab_size: int) -> list[Case]:
    """Forward and backward of the marginal loss for binary sub-tokens, 4096 tokens."""
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
