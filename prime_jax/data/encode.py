"""First pass of a preparation: the documents of one part become token files, one per split.

STEM.train, STEM.valid, STEM.test   tokens, uint16 or uint32 little-endian, EOS included
STEM.docs.npy                       int64 [documents, 3]: split, tokens, bytes of text, in order
STEM.json                           counts; written last
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from prime_jax.data import readers, shards, sources, tokenizers
from prime_jax.data.manifest import SPLITS, Request
from prime_jax.runtime.records import write_json_atomic

BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 20
SPLIT, TOKENS, BYTES = range(3)  # columns of the table of documents


@dataclass(frozen=True)
class Encode:
    """One task of the first pass."""

    part: sources.Part
    stem: Path
    dataset: Path  # where the tokenizer is
    tokenizer_hash: str
    request: Request
    endless: bool


def stored_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def encode_part(task: Encode) -> Encode:
    """Write the files of one part; see the module docstring.

    Raises:
        UserError: damaged input, a tokenizer that is not lossless, or unwritable files.
    """
    tokenizer = _tokenizer(task.dataset, task.tokenizer_hash)
    end = [] if task.endless else [np.array([tokenizer.eos_id])]
    dtype = np.dtype(stored_dtype(tokenizer.vocab_size)).newbyteorder("<")
    counts = {"documents": 0, "tokens": 0, "bytes": 0, "skipped": 0, "empty": 0}
    rows: list[tuple[int, int, int]] = []
    with shards.whole_files([f"{task.stem}.{split}" for split in SPLITS]) as files:
        for documents in _batches(_limited(task, counts)):
            encoded = tokenizer.encode_batch([document.text for document in documents])
            for document, ids in zip(documents, encoded, strict=True):
                size = len(document.text.encode())
                tokenizers.check_lossless(tokenizer, document.text, ids)
                split = _split(task.request, document)
                tokens = np.concatenate([ids, *end]).astype(dtype)
                files[split].write(tokens.tobytes())
                rows.append((split, len(tokens), size))
    table = np.array(rows, np.int64).reshape(-1, 3)
    shards.write_array(Path(f"{task.stem}.docs.npy"), table)
    counts["tokens"] = int(table[:, TOKENS].sum())
    write_json_atomic(Path(f"{task.stem}.json"), counts)
    return task


@lru_cache(maxsize=1)
def _tokenizer(dataset: Path, _hash: str) -> tokenizers.Tokenizer:
    return tokenizers.load(dataset)


def _limited(task: Encode, counts: dict[str, int]) -> Iterator[readers.Document]:
    """The documents that have text, counted, until this part alone reaches the limits."""
    request = task.request
    for document in task.part.documents():
        if document is None:
            counts["skipped"] += 1
        elif not document.text:
            counts["empty"] += 1
        else:
            yield document
            counts["documents"] += 1
            counts["bytes"] += len(document.text.encode())
            if 0 < request.max_documents <= counts["documents"]:
                return
            if 0 < request.max_bytes <= counts["bytes"]:
                return


def _batches(documents: Iterable[readers.Document]) -> Iterator[list[readers.Document]]:
    batch: list[readers.Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _split(request: Request, document: readers.Document) -> int:
    """Index in SPLITS: that of the source, else by position, else by the hash of the text."""
    if document.split:
        return SPLITS.index(document.split)
    position = document.position
    if position is None:
        position = readers.uniform(document.text, request.seed)
    if position < 1 - request.valid_fraction - request.test_fraction:
        return 0
    return 1 if position < 1 - request.test_fraction else 2
