"""Second pass of a preparation: join the parts into one stream per split and cut it into shards."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prime_jax.data import shards
from prime_jax.data.encode import BYTES, SPLIT, TOKENS
from prime_jax.data.manifest import SPLITS, Shard, Split
from prime_jax.runtime.records import read_json, write_json_atomic

SHARD_BYTES = 128 << 20


class PartPrefix(NamedTuple):
    """The first documents of a part."""

    stem: Path
    documents: int


class Piece(NamedTuple):
    """The tokens of one part in the stream of one split."""

    part: PartPrefix
    tokens: int
    documents: int
    first_token: int  # position in the stream
    first_document: int


@dataclass(frozen=True)
class Assemble:
    """One task of the second pass: blocks [first_block, first_block + blocks) of a split."""

    split: int
    pieces: tuple[Piece, ...]  # those that overlap these blocks
    first_block: int
    blocks: int
    seq_len: int
    dtype: str
    vocab_size: int
    shard: Path
    stem: Path  # of the counts: STEM.npy and, last, STEM.json


def _table(part: PartPrefix) -> np.ndarray:
    return np.load(f"{part.stem}.docs.npy", mmap_mode="r")[: part.documents]


def keep_first(parts: Iterable[PartPrefix], what: str, limit: float) -> list[PartPrefix]:
    """The shortest prefix that holds at least `limit` documents, bytes or tokens."""
    kept, left = [], limit
    for part in parts:
        if left <= 0:
            break
        amounts = _amounts(part, what).cumsum()
        n = min(int(np.searchsorted(amounts, left)) + 1, part.documents)
        kept.append(part._replace(documents=n))
        left -= amounts[-1] if len(amounts) else 0
    return kept


def _amounts(part: PartPrefix, what: str) -> np.ndarray:
    if what == "documents":
        return np.ones(part.documents, np.int64)
    return _table(part)[:, {"tokens": TOKENS, "bytes": BYTES}[what]]


def mix(sources: list[list[PartPrefix]], weights: list[float]) -> list[PartPrefix]:
    """The longest prefixes of the sources whose tokens are in proportion to the weights, up to one
    document."""
    totals = [sum(int(_amounts(p, "tokens").sum()) for p in parts) for parts in sources]
    scale = min(total / weight for total, weight in zip(totals, weights, strict=True))
    return [
        part
        for parts, weight in zip(sources, weights, strict=True)
        for part in keep_first(parts, "tokens", weight * scale)
    ]


def streams(parts: list[PartPrefix]) -> list[list[Piece]]:
    """The pieces of each split's stream."""
    out: list[list[Piece]] = [[] for _ in SPLITS]
    for part in parts:
        table = np.asarray(_table(part))
        for split, pieces in enumerate(out):
            rows = table[table[:, SPLIT] == split]
            token = pieces[-1].first_token + pieces[-1].tokens if pieces else 0
            document = pieces[-1].first_document + pieces[-1].documents if pieces else 0
            if len(rows):
                pieces.append(Piece(part, int(rows[:, TOKENS].sum()), len(rows), token, document))
    return out


def shard_tasks(
    split: int, pieces: list[Piece], seq_len: int, dtype: str, vocab_size: int, out: Path
) -> list[Assemble]:
    """Tasks that cover all full blocks of a split."""
    tokens = sum(piece.tokens for piece in pieces)
    blocks = tokens // seq_len
    per_shard = max(SHARD_BYTES // (seq_len * np.dtype(dtype).itemsize), 1)
    count = -(-blocks // per_shard)
    tasks = []
    for k in range(count):
        first = k * per_shard
        n = min(per_shard, blocks - first)
        begin, end = first * seq_len, (first + n) * seq_len
        overlap = [p for p in pieces if p.first_token < end and begin < p.first_token + p.tokens]
        name = f"{SPLITS[split]}-{k:05d}-of-{count:05d}"
        tasks.append(
            Assemble(
                split=split,
                pieces=tuple(overlap),
                first_block=first,
                blocks=n,
                seq_len=seq_len,
                dtype=dtype,
                vocab_size=vocab_size,
                shard=out / f"{name}.array_record",
                stem=out / "parts" / f"shard-{name}",
            )
        )
    return tasks


def assemble_shard(task: Assemble) -> Assemble:
    """Write one shard and its counts.

    Raises:
        UserError: the files cannot be written.
    """
    begin = task.first_block * task.seq_len
    end = begin + task.blocks * task.seq_len
    stored = np.dtype(task.dtype).newbyteorder("<")
    tokens = np.concatenate(list(_tokens(task, begin, end, stored)))
    block_starts = np.arange(begin, end, task.seq_len)
    doc = np.searchsorted(_document_starts(task), block_starts, side="right") - 1
    doc += task.pieces[0].first_document
    record = np.dtype([("doc", "<i8"), ("tokens", stored, (task.seq_len,))])
    records = np.empty(task.blocks, record)
    records["doc"], records["tokens"] = doc, tokens.reshape(task.blocks, task.seq_len)
    digest = shards.write(task.shard, records.view(np.uint8).reshape(task.blocks, -1))
    shards.write_array(Path(f"{task.stem}.npy"), np.bincount(tokens, minlength=task.vocab_size))
    size = task.shard.stat().st_size
    write_json_atomic(Path(f"{task.stem}.json"), {"sha256": digest, "size": size})
    return task


def _tokens(task: Assemble, begin: int, end: int, stored: np.dtype) -> Iterator[np.ndarray]:
    for piece in task.pieces:
        low = max(begin - piece.first_token, 0)
        high = min(end - piece.first_token, piece.tokens)
        path = f"{piece.part.stem}.{SPLITS[task.split]}"
        yield np.fromfile(path, stored, high - low, offset=low * stored.itemsize)


def _document_starts(task: Assemble) -> np.ndarray:
    """Position in the stream of the first token of each document of the pieces."""
    starts = []
    for piece in task.pieces:
        table = _table(piece.part)
        lengths = table[table[:, SPLIT] == task.split, TOKENS]
        starts.append(piece.first_token + np.cumsum(lengths) - lengths)
    return np.concatenate(starts)


def counts(tasks: list[Assemble], vocab_size: int) -> np.ndarray:
    """int64 [V]: how often each id occurs in finished shards."""
    return sum((np.load(f"{task.stem}.npy") for task in tasks), np.zeros(vocab_size, np.int64))


def summary(pieces: list[Piece], tasks: list[Assemble], token_bytes: np.ndarray) -> Split:
    """The manifest entry of a split whose shards are finished."""
    tokens = sum(task.blocks * task.seq_len for task in tasks)
    written = [read_json(Path(f"{task.stem}.json")) for task in tasks]
    return Split(
        documents=sum(piece.documents for piece in pieces),
        tokens=tokens,
        bytes=int(counts(tasks, len(token_bytes)) @ token_bytes.astype(np.int64)),
        blocks=sum(task.blocks for task in tasks),
        dropped_tokens=sum(piece.tokens for piece in pieces) - tokens,
        shards=tuple(
            Shard(task.shard.name, task.blocks, w["size"], w["sha256"])
            for task, w in zip(tasks, written, strict=True)
        ),
    )
