"""Attention masks, and the blocks that block-wise attention visits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prime_jax.errors import UserError
from prime_jax.kernels.common import LANES, ceil_to

SAVED = "attention"  # checkpoint name of outputs that a remat policy should save


def documents(segment_ids_BxL: jax.Array, block_length: int = 0) -> jax.Array:
    """int32 [B, L]: document number of every position; runs of padding count as documents."""
    if block_length:  # the same numbers in the noisy and the clean sequence
        return jnp.tile(documents(segment_ids_BxL[:, : segment_ids_BxL.shape[1] // 2]), 2)
    new_BxL = jnp.pad(segment_ids_BxL[:, 1:] != segment_ids_BxL[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(new_BxL.astype(jnp.int32), axis=1)


def by_blocks(query: Any, key: Any, length: int, block_length: int) -> Any:
    """Whether a query attends to a key in block diffusion.

    Args:
        query, key: positions in [noisy, clean], JAX or NumPy arrays that broadcast.
        length: of noisy and clean together.
    """
    half = length // 2
    query_block, key_block = query % half // block_length, key % half // block_length
    own = ((query < half) == (key < half)) & (query_block == key_block)
    return own | ((key >= half) & (query_block > key_block))


def allowed(
    length: int, causal: bool, documents_BxL: jax.Array | None, block_length: int = 0
) -> jax.Array | None:
    """bool mask broadcastable to [B, L, L] (query, key), or None for no mask."""
    mask = None
    if causal:
        mask = jnp.tril(jnp.ones((length, length), bool))[None]
    if block_length:
        position_L = jnp.arange(length)
        mask = by_blocks(position_L[:, None], position_L, length, block_length)[None]
    if documents_BxL is not None:
        same_BxLxL = documents_BxL[:, :, None] == documents_BxL[:, None, :]
        mask = same_BxLxL if mask is None else same_BxLxL & mask
    return mask


class Blocks(NamedTuple):
    """Queries and keys of a block; multiples of 128 on a TPU."""

    queries: int = 512
    keys: int = 1024


class Visits(NamedTuple):
    """The keys of each query, one contiguous range, and the blocks to visit.

    Attributes:
        span_Bx2xL: int32; query i attends to the keys span[0, i] <= j < span[1, i].
        keys_Bx2xI: int32; first block of keys that a block of queries visits, and how many.
        queries_Bx2xJ: int32; the same for the blocks of queries that visit a block of keys.
    """

    span_Bx2xL: jax.Array
    keys_Bx2xI: jax.Array
    queries_Bx2xJ: jax.Array


def fitted(length: int, blocks: Sequence[int] = ()) -> tuple[Blocks, int]:
    """Blocks no longer than the sequence, and the length padded to a multiple of them.

    Raises:
        UserError: `blocks` is neither empty nor two positive numbers.
    """
    if blocks and (len(blocks) != 2 or min(blocks) < 1):
        raise UserError(f"attention blocks {tuple(blocks)}: give queries and keys of a block")
    wanted = Blocks(*blocks)
    queries = min(wanted.queries, ceil_to(length, LANES))
    padded = ceil_to(length, queries)
    keys = max(n for n in range(queries, max(wanted.keys, queries) + 1, queries) if padded % n == 0)
    return Blocks(queries, keys), padded


def head_lanes(size: int) -> int:
    """Lanes for a head of size `size`."""
    return 64 if size <= 64 else ceil_to(size, LANES)


def visits(
    length: int, causal: bool, documents_BxL: jax.Array, padding_BxL: jax.Array, blocks: Blocks
) -> Visits:
    """Spans of keys, and the blocks to visit.

    Args:
        documents_BxL: int32, equal within a document, different in adjacent ones.
        padding_BxL: positions that are masked as queries and keys.
    """
    position_L = jnp.arange(length, dtype=jnp.int32)
    new_BxL = documents_BxL[:, 1:] != documents_BxL[:, :-1]
    opens_BxL, closes_BxL = (
        jnp.pad(new_BxL, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1))
    )
    first_BxL = jax.lax.cummax(jnp.where(opens_BxL, position_L, 0), axis=1)
    last_BxL = jnp.where(closes_BxL, position_L + 1, length)
    last_BxL = jax.lax.cummin(last_BxL, axis=1, reverse=True)
    if causal:
        last_BxL = jnp.minimum(last_BxL, position_L + 1)
    first_BxL = jnp.where(padding_BxL, length, first_BxL)
    last_BxL = jnp.where(padding_BxL, 0, last_BxL)

    first_BxI = first_BxL.reshape(first_BxL.shape[0], -1, blocks.queries).min(-1)
    last_BxI = last_BxL.reshape(first_BxL.shape[0], -1, blocks.queries).max(-1)
    start_J = jnp.arange(0, length, blocks.keys, dtype=jnp.int32)
    first, last = jnp.maximum(first_BxI[..., None], start_J), last_BxI[..., None]
    overlap_BxIxJ = first < jnp.minimum(last, start_J + blocks.keys)
    span_Bx2xL = jnp.stack([first_BxL, last_BxL], axis=1)
    return Visits(span_Bx2xL, _hull(overlap_BxIxJ), _hull(jnp.swapaxes(overlap_BxIxJ, 1, 2)))


def _hull(overlap: jax.Array) -> jax.Array:
    """Along the last axis: index of the first true element, and the count up to the last one."""
    first = jnp.argmax(overlap, axis=-1)
    stop = overlap.shape[-1] - jnp.argmax(overlap[..., ::-1], axis=-1)
    return jnp.stack([first, jnp.where(overlap.any(-1), stop - first, 0)], axis=1).astype(jnp.int32)
