"""Batches of a prepared dataset: the order is a pure function of (seed, step).

Position p = step * batch + row of the stream is block shuffle(p), with another permutation for each
epoch (grain). There is no iterator state, so a run can resume at any step and number of hosts.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from prime_jax.data.manifest import Manifest
from prime_jax.data.shards import Reader
from prime_jax.errors import UserError

THREADS, AHEAD = 2, 4  # prefetching of batches


class Blocks:
    """The blocks of one split, across its shards; shards are opened when first read."""

    def __init__(self, manifest: Manifest, split: str):
        self._manifest = manifest
        self._shards = manifest.split(split).shards
        self._ends = list(accumulate(shard.blocks for shard in self._shards))
        self._readers: dict[int, Reader] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [N, L] and document numbers int64 [N] of these blocks, in this order.

        Raises:
            UserError: a damaged shard, by name.
        """
        by_shard: dict[int, list[int]] = {}
        for row, index in enumerate(indices):
            by_shard.setdefault(bisect_right(self._ends, int(index)), []).append(row)
        raw_NxR = np.empty((len(indices), self._manifest.record_bytes), np.uint8)
        for shard, rows in by_shard.items():
            first = self._ends[shard] - self._shards[shard].blocks
            data = self._reader(shard).read([int(indices[row]) - first for row in rows])
            raw_NxR[rows] = np.frombuffer(data, np.uint8).reshape(len(rows), -1)
        doc_N = np.ascontiguousarray(raw_NxR[:, :8]).view("<i8")[:, 0].astype(np.int64)
        stored = np.dtype(self._manifest.dtype).newbyteorder("<")
        tokens_NxL = np.ascontiguousarray(raw_NxR[:, 8:]).view(stored).astype(np.int32)
        return tokens_NxL, doc_N

    def _reader(self, shard: int) -> Reader:
        if shard not in self._readers:  # harmless if two threads open it twice
            path = self._manifest.path / self._shards[shard].file
            advice = self._manifest.rebuild()
            self._readers[shard] = Reader(path, self._shards[shard].blocks, advice)
        return self._readers[shard]


@lru_cache(maxsize=8)
def blocks(manifest: Manifest, split: str) -> Blocks:
    """The blocks of a split, opened once per process."""
    return Blocks(manifest, split)


def train_batches(
    manifest: Manifest,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    rows: np.ndarray | None = None,
    first: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This host's part of the global batches of steps start .. stop-1.

    Args:
        rows: those of each global batch to read here (sharding.local_rows); all by default.
        first: use only the first so many blocks of the split; 0 for all of them.
    Yields:
        tokens_bxL int32, and example_b int64: step * batch_size + row, the position in the stream.
    Raises:
        UserError: no training block, or a damaged shard.
    """
    import grain

    source = blocks(manifest, "train")
    if not len(source):
        raise UserError(f"{manifest.directory}: the train split has no block")
    row_b = np.arange(batch_size, dtype=np.int64) if rows is None else rows.astype(np.int64)
    count = first or len(source)
    epochs = -(-stop * batch_size // count)
    order = grain.MapDataset.range(count).seed(seed % 2**32).shuffle().repeat(max(epochs, 1))

    def read(step: int) -> np.ndarray:
        return source.read(np.array([order[int(i)] for i in step * batch_size + row_b]))[0]

    ahead = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    batches = iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(ahead))
    for step, tokens_bxL in zip(range(start, stop), batches, strict=True):
        yield tokens_bxL, step * batch_size + row_b


@dataclass(frozen=True, eq=False)
class EvalBlocks:
    """Blocks to evaluate on.

    Attributes:
        tokens: int32 [E, L].
        doc: int64 [E], document of each block's first token (clusters of the standard error).
        n_bytes: int64 [E], bytes of text in each block.
        hash: twelve hex digits of the tokens; results with the same hash are comparable.
    """

    tokens: np.ndarray
    doc: np.ndarray
    n_bytes: np.ndarray
    hash: str


def eval_blocks(manifest: Manifest, split: str, examples: int) -> EvalBlocks:
    """Evenly spaced blocks of a split, the same ones every time.

    Args:
        examples: how many; 0, or more than there are, means all.
    Raises:
        UserError: the split has no block, or a damaged shard.
    """
    source = blocks(manifest, split)
    count = len(source)
    if not count:
        raise UserError(f"{manifest.directory}: the {split} split has no block of text")
    wanted = min(examples, count) or count
    indices = np.arange(wanted) * count // wanted
    tokens, doc = source.read(indices)
    n_bytes = manifest.token_bytes()[tokens].sum(1, dtype=np.int64)
    digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:12]
    return EvalBlocks(tokens, doc, n_bytes, digest)
