"""Flash attention for TPUs: two Mosaic kernels, and padding, documents and gradients around them.

Queries are on lanes: scores are computed transposed, so that softmax statistics are sublane
reductions without lane shuffles. The keys and values of a head stay in VMEM, and the kernel loops
over the blocks of keys to which some query of its block attends: the range is computed from the
documents at run time, and blocks outside it cost nothing. Scores are computed one block ahead of
their softmax. The backward pass recomputes the scores and loops over the blocks of queries that
attend to its block of keys; the query gradient of a whole head is accumulated in VMEM.

Letters besides the usual: Q queries and M keys of a block.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from prime_jax.hardware.chips import MIB
from prime_jax.kernels.attention_mask import SAVED, Blocks, Visits, fitted, head_lanes, visits
from prime_jax.kernels.common import LANES, LOG2E, NEG, Case, ceil_to, dot

ONES = 16  # rows of ones, a whole tile of bfloat16
PART = 512  # keys of a block that the forward pass processes at a time


class Plan(NamedTuple):
    """Static settings of the kernels.

    Attributes:
        masked: some query does not attend to every key.
        scale: of the scores.
        interpret: run without a TPU: True, or `pltpu.InterpretParams`.
    """

    blocks: Blocks
    masked: bool
    scale: float
    interpret: Any = False


def vmem_bytes(length: int, size: int, itemsize: int, blocks: Sequence[int] = ()) -> int:
    """An upper bound on the VMEM of the larger kernel, the backward pass."""
    (queries, keys), length = fitted(length, blocks)
    size = ceil_to(head_lanes(size), LANES)
    whole = length * size * (6 * itemsize + 4)  # q, dout, dq, each twice; the float32 sum of dq
    by_keys = keys * size * (9 * itemsize + 8)  # k, v, dk, dv twice; k transposed; two sums
    return (
        whole + by_keys + keys * queries * (8 + 3 * itemsize)
    )  # scores and arrays computed from them


def masked_attention(
    q_BxLxHxK: jax.Array,
    k_BxLxGxK: jax.Array,
    v_BxLxGxK: jax.Array,
    causal: bool = False,
    segment_ids_BxL: jax.Array | None = None,
    blocks: Sequence[int] = (),
    interpret: Any = False,
) -> jax.Array:
    """`attention.attention` as two Mosaic kernels; any length, any head size.

    Args:
        blocks: queries and keys of a block; empty for the default.
        interpret: run without a TPU: True, or `pltpu.InterpretParams`.

    Raises:
        UserError: `blocks` has another form.
    """
    batch, length, _, size = q_BxLxHxK.shape
    fit, padded = fitted(length, blocks)
    if segment_ids_BxL is None:
        segment_ids_BxL = jnp.zeros((batch, length), jnp.int32)
        masked = causal or padded > length
    else:
        masked = True
    segment_ids_BxL = jnp.pad(segment_ids_BxL, ((0, 0), (0, padded - length)), constant_values=-1)
    seen = visits(padded, causal, segment_ids_BxL, segment_ids_BxL < 0, fit)

    def heads_first(x_BxLxHxK):
        padding = (0, 0), (0, padded - length), (0, 0), (0, head_lanes(size) - size)
        return jnp.swapaxes(jnp.pad(x_BxLxHxK, padding), 1, 2)

    plan = Plan(fit, masked, size**-0.5, interpret)
    qkv = [heads_first(x) for x in (q_BxLxHxK, k_BxLxGxK, v_BxLxGxK)]
    return jnp.swapaxes(_flash(plan, *qkv, seen), 1, 2)[:, :length, :, :size]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(plan: Plan, q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, seen: Visits):
    return _flash_forward(plan, q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, seen)[0]


def _flash_forward(plan, q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, seen):
    out_BxHxLxK, lse_BxHx1xL = forward(plan, q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, seen)
    out_BxHxLxK, lse_BxHx1xL = (checkpoint_name(x, SAVED) for x in (out_BxHxLxK, lse_BxHx1xL))
    return out_BxHxLxK, (q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, seen, out_BxHxLxK, lse_BxHx1xL)


def _flash_backward(plan, residuals, dout_BxHxLxK):
    return *backward(plan, *residuals, dout_BxHxLxK), None


_flash.defvjp(_flash_forward, _flash_backward)


def forward(plan, q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, seen: Visits) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, H, L, K], and the scores' log2-sum-exp2 [B, H, 1, L] (1e30 for padding)."""
    batch, heads, length, size = q_BxHxLxK.shape
    queries, keys = plan.blocks
    groups = k_BxGxLxK.shape[1]
    shared, rows = heads // groups, size + ONES
    # Rows of ones below the values: the same matmul sums the probabilities, with the same rounding
    # as the weighted values.
    ones = jnp.ones((batch, groups, ONES, length), v_BxGxLxK.dtype)
    vt_BxGxRxL = jnp.concatenate([jnp.swapaxes(v_BxGxLxK, 2, 3), ones], axis=2)
    by_queries = pl.BlockSpec((1, 1, queries, size), lambda b, h, i, _: (b, h, i, 0))
    row = pl.BlockSpec((1, 1, 1, queries), lambda b, h, i, _: (b, h, 0, i))
    span = pl.BlockSpec((1, 2, queries), lambda b, h, i, _: (b, 0, i))
    return _call(
        _forward_kernel,
        plan,
        q_BxHxLxK,
        blocks=length // queries,
        in_specs=[by_queries, _whole(length, size, shared), _whole(rows, length, shared), span],
        out_specs=[by_queries, row],
        out_shapes=[(q_BxHxLxK.shape, q_BxHxLxK.dtype), ((batch, heads, 1, length), jnp.float32)],
        scratch_shapes=[
            pltpu.VMEM(shape, jnp.float32)
            for shape in ((keys, queries), (1, queries), (1, queries), (rows, queries))
        ],
        matmuls=2,
    )(
        seen.keys_Bx2xI,
        q_BxHxLxK,
        k_BxGxLxK,
        vt_BxGxRxL,
        seen.span_Bx2xL,
    )


def backward(plan, q_BxHxLxK, k_BxGxLxK, v_BxGxLxK, seen, out_BxHxLxK, lse_BxHx1xL, dout_BxHxLxK):
    """Gradients of q, k and v; for shared k and v summed over heads in float32."""
    batch, heads, length, size = q_BxHxLxK.shape
    groups, keys = k_BxGxLxK.shape[1], plan.blocks.keys
    product = dout_BxHxLxK.astype(jnp.float32) * out_BxHxLxK.astype(jnp.float32)
    by_keys, by_shared_keys = (
        pl.BlockSpec((1, 1, keys, size), lambda b, h, j, _, n=n: (b, h // n, j, 0))
        for n in (1, heads // groups)
    )
    head, row = _whole(length, size), _whole(1, length)
    span = pl.BlockSpec((1, 2, length), lambda b, h, j, _: (b, 0, 0))
    dtype = q_BxHxLxK.dtype if groups == heads else jnp.float32
    dq_BxHxLxK, *dkv = _call(
        _backward_kernel,
        plan,
        q_BxHxLxK,
        blocks=length // keys,
        in_specs=[head, by_shared_keys, by_shared_keys, head, span, row, row],
        out_specs=[head, by_keys, by_keys],
        out_shapes=[(q_BxHxLxK.shape, t) for t in (q_BxHxLxK.dtype, dtype, dtype)],
        scratch_shapes=[
            pltpu.VMEM((size, keys), k_BxGxLxK.dtype),
            pltpu.VMEM((size, length), jnp.float32),
            pltpu.VMEM((keys, size), jnp.float32),
            pltpu.VMEM((keys, size), jnp.float32),
        ],
        matmuls=5,
    )(
        seen.queries_Bx2xJ,
        q_BxHxLxK,
        k_BxGxLxK,
        v_BxGxLxK,
        dout_BxHxLxK,
        seen.span_Bx2xL,
        lse_BxHx1xL,
        product.sum(-1)[:, :, None],
    )
    if groups < heads:
        dkv = [x.reshape(batch, groups, -1, length, size).sum(2) for x in dkv]
    return dq_BxHxLxK, *(x.astype(k_BxGxLxK.dtype) for x in dkv)


def _whole(rows: int, columns: int, shared: int = 1) -> pl.BlockSpec:
    """A whole head, or the key-value head of a group of `shared` heads."""
    return pl.BlockSpec((1, 1, rows, columns), lambda b, h, i, _: (b, h // shared, 0, 0))


def _call(
    kernel, plan, q_BxHxLxK, blocks, in_specs, out_specs, out_shapes, scratch_shapes, matmuls
):
    """The kernel on a grid of sequences, heads and blocks; its first argument are block ranges."""
    batch, heads, length, size = q_BxHxLxK.shape
    itemsize = q_BxHxLxK.dtype.itemsize
    scores = batch * heads * length**2
    return pl.pallas_call(
        functools.partial(kernel, plan),
        name=f"masked_attention{kernel.__name__.removesuffix('_kernel')}",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, blocks),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_shapes,
        ),
        out_shape=[jax.ShapeDtypeStruct(*x) for x in out_shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=max(16 * MIB, vmem_bytes(length, size, itemsize, plan.blocks)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * scores * size,
            transcendentals=scores,
            bytes_accessed=2 * matmuls * batch * heads * length * size * itemsize,
        ),
        interpret=plan.interpret,
    )


def _dot(plan: Plan, x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    if plan.interpret:  # XLA's CPU backend lacks some bfloat16 products
        precision = jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else None
        return dot(x.astype(jnp.float32), y.astype(jnp.float32), contract, precision)
    return dot(x, y, contract)


def _exponents(plan: Plan, k_MxK, q_QxK, start: Any, span_2xQ: jax.Array) -> jax.Array:
    """Scores as exponents of 2 [M, Q], NEG where masked; keys from `start` on.

    Scaled here, in float32: scaling the queries before would round once more.
    """
    s_MxQ = _dot(plan, k_MxK, q_QxK, (1, 1)) * (plan.scale * LOG2E)
    if not plan.masked:
        return s_MxQ
    first_1xQ = span_2xQ[:1] - start
    count_1xQ = jnp.maximum(span_2xQ[1:] - span_2xQ[:1], 0)
    # One comparison for both ends: below the first key the difference wraps to a huge number.
    place_MxQ = jax.lax.broadcasted_iota(jnp.int32, s_MxQ.shape, 0) - first_1xQ
    return jnp.where(place_MxQ.astype(jnp.uint32) < count_1xQ.astype(jnp.uint32), s_MxQ, NEG)


def _forward_kernel(
    plan,
    range_ref,
    q_ref,
    k_ref,
    vt_ref,
    span_ref,
    out_ref,
    lse_ref,
    scores_ref,
    next_top_ref,
    top_ref,
    sum_ref,
):
    keys = plan.blocks.keys
    sequence, block = pl.program_id(0), pl.program_id(2)
    first, count = range_ref[sequence, 0, block], range_ref[sequence, 1, block]
    q_QxK, span_2xQ = q_ref[0, 0], span_ref[0]
    top_ref[...] = jnp.full_like(top_ref, NEG)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    parts = [slice(start, min(start + PART, keys)) for start in range(0, keys, PART)]

    def columns(j, part):
        start = pl.multiple_of(j * keys, keys) + part.start
        return start, pl.ds(start, part.stop - part.start)

    def score(j, part, top_1xQ):
        """Store the scores of a part of block j; returns the running maximum."""
        start, here = columns(j, part)
        s_MxQ = _exponents(plan, k_ref[0, 0, here, :], q_QxK, start, span_2xQ)
        scores_ref[part, :] = s_MxQ
        return jnp.maximum(top_1xQ, s_MxQ.max(0, keepdims=True))

    def visit(j, follows):
        """Accumulate block j, whose scores are stored, and compute those of the next block.

        Scores of a part are read just before they are overwritten: the matmul of one block
        overlaps with the independent softmax of the other.
        """
        top_1xQ = next_top_1xQ = next_top_ref[...]
        sum_RxQ = sum_ref[...] * jnp.exp2(top_ref[...] - top_1xQ)
        for part in parts:
            vt_RxM = vt_ref[0, 0, :, columns(j, part)[1]]
            p_MxQ = jnp.exp2(scores_ref[part, :] - top_1xQ).astype(vt_RxM.dtype)
            sum_RxQ += _dot(plan, vt_RxM, p_MxQ, (1, 0))
            if follows:
                next_top_1xQ = score(j + 1, part, next_top_1xQ)
        sum_ref[...], top_ref[...], next_top_ref[...] = sum_RxQ, top_1xQ, next_top_1xQ

    @pl.when(count > 0)
    def _():
        top_1xQ = top_ref[...]
        for part in parts:
            top_1xQ = score(first, part, top_1xQ)
        next_top_ref[...] = top_1xQ
        last = first + count - 1
        jax.lax.fori_loop(first, last, lambda j, _: visit(j, follows=True), None)
        visit(last, follows=False)

    # Sums before the first visible key of a query were rescaled by 0 at that key; only a query
    # without any key still has them.
    alive_1xQ = top_ref[...] > NEG / 2
    size = q_QxK.shape[1]
    total_1xQ = jnp.where(alive_1xQ, sum_ref[size : size + 1, :], 1)
    out_KxQ = sum_ref[:size, :] * jnp.where(alive_1xQ, 1 / total_1xQ, 0)
    out_ref[0, 0] = out_KxQ.T.astype(out_ref.dtype)
    lse_ref[0, 0] = jnp.where(alive_1xQ, top_ref[...] + jnp.log2(total_1xQ), -NEG)


def _backward_kernel(
    plan,
    range_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    span_ref,
    lse_ref,
    delta_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    kt_ref,
    dq_sum_ref,
    dk_sum_ref,
    dv_sum_ref,
):
    queries, keys = plan.blocks
    sequence, block = pl.program_id(0), pl.program_id(2)
    first, count = range_ref[sequence, 0, block], range_ref[sequence, 1, block]
    k_MxK, v_MxK = k_ref[0, 0], v_ref[0, 0]
    kt_ref[...] = k_MxK.T
    dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
    dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    @pl.when(block == 0)
    def _():
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    def visit(i, _):
        rows = pl.ds(pl.multiple_of(i * queries, queries), queries)
        q_QxK, dout_QxK = q_ref[0, 0, rows, :], dout_ref[0, 0, rows, :]
        s_MxQ = _exponents(plan, k_MxK, q_QxK, block * keys, span_ref[0, :, rows])
        p_MxQ = jnp.exp2(s_MxQ - lse_ref[0, 0, :, rows])
        dp_MxQ = _dot(plan, v_MxK, dout_QxK, (1, 1))
        ds_MxQ = (p_MxQ * (dp_MxQ - delta_ref[0, 0, :, rows])).astype(q_QxK.dtype)
        dv_sum_ref[...] += _dot(plan, p_MxQ.astype(q_QxK.dtype), dout_QxK, (1, 0))
        dk_sum_ref[...] += _dot(plan, ds_MxQ, q_QxK, (1, 0))
        dq_sum_ref[:, rows] += _dot(plan, kt_ref[...], ds_MxQ, (1, 0))
        return 0

    jax.lax.fori_loop(first, first + count, visit, 0)
    dk_ref[0, 0] = (dk_sum_ref[...] * plan.scale).astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_sum_ref[...].astype(dv_ref.dtype)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        dq_ref[0, 0] = (dq_sum_ref[...] * plan.scale).T.astype(dq_ref.dtype)


def cases(chip: str, width: int, vocab_size: int) -> list[Case]:
    """Forward and backward over packed documents, 2048 tokens, heads of 128 and of 64."""
    return [case for size in (128, 64) for case in _cases(width // size, size)]


def _cases(heads: int, size: int, batch: int = 2, length: int = 2048) -> list[Case]:
    blocks, _ = fitted(length)
    plan = Plan(blocks, masked=True, scale=size**-0.5)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    x = array(batch, heads, length, size)
    ids = array(batch, length, dtype=jnp.int32)
    lse = array(batch, heads, 1, length, dtype=jnp.float32)

    def seen(ids_BxL):
        return visits(length, False, ids_BxL, ids_BxL < 0, blocks)

    def run_forward(q, k, v, ids_BxL):
        return forward(plan, q, k, v, seen(ids_BxL))

    def run_backward(q, k, v, ids_BxL, out, lse, dout):
        return backward(plan, q, k, v, seen(ids_BxL), out, lse, dout)

    name, options = f"H={heads} K={size} L={length}", {"blocks": tuple(blocks)}
    return [
        Case(f"attention forward {name}", run_forward, (x, x, x, ids), options),
        Case(f"attention backward {name}", run_backward, (x, x, x, ids, x, lse, x), options),
    ]
