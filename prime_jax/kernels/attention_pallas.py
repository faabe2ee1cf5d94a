"""Flash attention for TPUs: padding, documents and gradients around the Mosaic kernels."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from prime_jax.kernels.attention_mask import SAVED, Visits, fitted, head_lanes, visits
from prime_jax.kernels.attention_mosaic import Plan, backward, forward, vmem_bytes
from prime_jax.kernels.check_case import Case


def fits(length: int, size: int, itemsize: int) -> bool:
    """Whether a head fits into the VMEM of the chip that the program is traced for."""
    usable = 0.93 * pltpu.get_tpu_info().vmem_capacity_bytes
    return vmem_bytes(length, size, itemsize) <= usable


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
