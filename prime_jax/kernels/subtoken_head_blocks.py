"""Tile sizes of the head's TPU kernels, as large as the chip's VMEM allows."""

from typing import NamedTuple

from jax.experimental.pallas import tpu as pltpu

from prime_jax.errors import UserError
from prime_jax.kernels.selection import target_kind
from prime_jax.kernels.subtoken_head_base import Head

LANES = 128
MIB = 1 << 20


class Blocks(NamedTuple):
    """Tokens and head rows of a tile, and head rows of a part; multiples of 128 on a TPU."""

    tokens: int = 512
    rows: int = 1024
    part: int = 256


def ceil_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def vmem_bytes(width: int, itemsize: int, blocks: Blocks) -> int:
    """An upper bound on the VMEM of the larger kernel, the backward pass."""
    tokens, rows, part = blocks
    by_tokens = (
        tokens * width * (2 * 2 * itemsize + 3 * 4)
    )  # two of h and dh, double-buffered, and a sum
    by_rows = rows * width * (2 * itemsize + 2 * 4)  # head and dhead, double-buffered
    return by_tokens + by_rows + 8 * part * tokens * 4 + 4 * MIB


def vmem_capacity() -> int:
    """VMEM of the chip for which the program is traced, less the compiler's reserve."""
    if not target_kind().startswith("TPU"):
        return 60 * MIB
    return pltpu.get_tpu_info().vmem_capacity_bytes * 15 // 16


def core_count() -> int:
    """Cores of one JAX device."""
    return pltpu.get_tpu_info().num_cores if target_kind().startswith("TPU") else 1


def matrix_unit() -> int:
    """Columns of the chip's matrix units."""
    return pltpu.get_tpu_info().mxu_column_size if target_kind().startswith("TPU") else LANES


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
