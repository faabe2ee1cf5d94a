"""Which tiles of (tokens, head rows) the Pallas kernels of the head visit: all, or only some.

A tile can be skipped if none of its tokens is consistent with any of its head rows. Codes that
share a block of head rows share their leading bits, so tokens sorted by what they see of those
bits leave about half of the tiles empty. The kernels skip them at run time, exactly: skipped tiles
would have added zeros.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.kernels.subtoken_head_base import PADDING

SORTED_BITS = 10  # leading bits by which tokens are sorted: below a block's size nothing is gained


class Visits(NamedTuple):
    """Order of visits; int32 arrays, flat because they are read from scalar memory.

    Attributes:
        blocks_IJ: blocks of head rows that each of I tiles of tokens visits, J places each.
        count_I: how many of the places are used.
        steps_3KT: backward, for each of K cores T steps sorted by block of head rows: the block,
            the tile of tokens, and how often the core has gone on to another tile before.
        count_K: how many of the steps are used.
    """

    blocks_IJ: Any
    count_I: Any
    steps_3KT: Any
    count_K: Any


def all_tiles(tiles: int, blocks: int, cores: int) -> Visits:
    return _visits(np.ones((tiles, blocks), bool), cores)


def _visits(active_IxJ: Any, cores: int) -> Visits:
    """The lists of the tiles marked; NumPy in, NumPy out."""
    lib = np if isinstance(active_IxJ, np.ndarray) else jnp
    tiles, blocks = active_IxJ.shape

    def first(active_RxC):
        """Columns marked in each row, then the last of them again; and their number."""
        count_R = active_RxC.sum(axis=1)
        order_RxC = lib.argsort(~active_RxC, axis=1, stable=True)
        place_RxC = lib.minimum(np.arange(active_RxC.shape[1]), count_R[:, None] - 1)
        return lib.take_along_axis(order_RxC, lib.maximum(place_RxC, 0), axis=1), count_R

    blocks_IxJ, count_I = first(active_IxJ)
    # Every block is visited at least once: that is what writes its gradient.
    empty_J = ~active_IxJ.any(axis=0)
    visited_JxI = (active_IxJ | (empty_J & (np.arange(tiles) == 0)[:, None])).T
    per_core = -(-blocks // cores)
    padding = np.zeros((cores * per_core - blocks, tiles), bool)
    visited_KxT = lib.concatenate([visited_JxI, padding]).reshape(cores, per_core * tiles)
    index_KxT, count_K = first(visited_KxT)
    tile_KxT = index_KxT % tiles
    block_KxT = index_KxT // tiles + per_core * np.arange(cores)[:, None]
    moved_KxT = lib.concatenate(
        [np.zeros((cores, 1), bool), tile_KxT[:, 1:] != tile_KxT[:, :-1]], axis=1
    )
    steps = lib.stack([block_KxT, tile_KxT, lib.cumsum(moved_KxT, axis=1)])
    return Visits(*(x.astype(np.int32).reshape(-1) for x in (blocks_IxJ, count_I, steps, count_K)))


def sorted_order(true_N: jax.Array, visible_N: jax.Array, bits: int) -> jax.Array:
    """int32 [N]: rows sorted by what they see of the leading bits (0, 1 or hidden) of their code."""
    key_N = jnp.zeros_like(true_N)
    for bit in range(bits - 1, max(-1, bits - 1 - SORTED_BITS), -1):
        seen_N = (visible_N >> bit) & 1 == 1
        key_N = 3 * key_N + jnp.where(seen_N, (true_N >> bit) & 1, 2)
    return jnp.argsort(key_N).astype(jnp.int32)


def consistent_tiles(words_V, true_N, visible_N, tokens: int, rows: int, cores: int) -> Visits:
    """Visits of the tiles that hold a consistent pair, or may: exact where codes are dense.

    Args:
        words_V: codes in ascending order (but for padding), a multiple of `rows`.
        true_N, visible_N: of the rows in their sorted order, a multiple of `tokens`.
    """
    words_JxU = jnp.asarray(words_V).reshape(-1, rows)
    real_JxU = words_JxU != PADDING
    low_J = words_JxU[:, 0]
    high_J = jnp.where(real_JxU, words_JxU, 0).max(axis=1)
    differ_J = low_J ^ high_J  # leading bits in which all codes of the block agree: above these
    for shift in (1, 2, 4, 8, 16):
        differ_J |= jax.lax.shift_right_logical(differ_J, jnp.int32(shift))
    clash_NxJ = ((low_J ^ true_N[:, None]) & visible_N[:, None] & ~differ_J) != 0
    possible_NxJ = ~clash_NxJ & real_JxU.any(axis=1)
    return _visits(possible_NxJ.reshape(-1, tokens, possible_NxJ.shape[1]).any(axis=1), cores)
