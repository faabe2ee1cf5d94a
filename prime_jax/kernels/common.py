"""What the kernels share: which chip they are traced for, and small things that several need."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from prime_jax.hardware.chips import MIB

LANES = 128  # of a TPU's registers
NEG = -1e30  # finite stand-in for -inf: no NaN from inf - inf
LOG2E = math.log2(math.e)


def target_kind() -> str:
    """Device kind that the surrounding program is traced for: its mesh's, or this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.device_kind


def on_tpu() -> bool:
    """Whether Mosaic's kernels run there; elsewhere they are interpreted."""
    return target_kind().startswith("TPU")


def vmem_capacity() -> int:
    """VMEM of the chip that the program is traced for, less what the compiler keeps."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.get_tpu_info().vmem_capacity_bytes * 15 // 16 if on_tpu() else 60 * MIB


def ceil_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int], precision: Any = None) -> jax.Array:
    """Product over one axis of each, in float32, for the body of a kernel."""
    # float32 follows jax.default_matmul_precision; bfloat16 products are exact as they are.
    if precision is None and x.dtype == jnp.bfloat16:
        precision = jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


@dataclass(frozen=True)
class Case:
    """One program of `prime-jax kernels check`: a function to compile for one chip, on its own.

    Each Mosaic module lists its own: `cases(chip, width, vocab_size) -> list[Case]`, forward and
    backward apart, in bfloat16, at the blocks that it takes on `chip` (of `hardware.chips.CHIPS`).

    Attributes:
        name: kernel, direction and shape, e.g. `head backward D=1024 V=51200`.
        function: takes `arguments`; must not choose its implementation by the default backend.
        arguments: `jax.ShapeDtypeStruct`s (any tree).
        options: what the report says about the choice, e.g. {"blocks": (512, 1024)}.
        mosaic_calls: Mosaic kernels that the compiled program must hold, at least.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    mosaic_calls: int = 1
