"""Codes of tokens kept in a file.

`codes.npy` is int64 [V], the code of every id; `codes.json` beside it says for which tokenizer. Both
are read without this package, and may be written by hand.
"""

import io
import zipfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from prime_jax.config import RunConfig
from prime_jax.data.manifest import Manifest
from prime_jax.errors import NoData, UserError
from prime_jax.runtime import storage
from prime_jax.runtime.records import read_json
from prime_jax.subtokens import Codebook, base


def about_file(path: storage.Path) -> storage.Path:
    """Where a file of codes says for which tokenizer it is: `codes.json` for `codes.npy`."""
    return path.with_suffix(".json")


def as_bytes(book: Codebook) -> bytes:
    """The file of codes."""
    stream = io.BytesIO()
    np.save(stream, book.codes.astype(np.int64))
    return stream.getvalue()


def read(path: storage.Path, manifest: Manifest, length: int) -> Codebook:
    """The codebook in a file, for this dataset and `length` sub-tokens.

    Raises:
        UserError: the file is missing or no list of codes, or they are no injection into the
            b**l codes, of another number of tokens or of another tokenizer.
    """
    try:
        codes = np.load(io.BytesIO(storage.read(path)), allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: holds no array (.npy): {error}") from error
    vocab, b = manifest.vocab_size, base(manifest.vocab_size, length)
    if not (isinstance(codes, np.ndarray) and codes.ndim == 1 and codes.dtype.kind in "iu"):
        raise UserError(f"{path}: must hold integers: an array [V] with the code of each id")
    if len(codes) != vocab:
        raise UserError(
            f"{path}: holds {len(codes)} codes, but {manifest.directory} has {vocab} token ids"
        )
    if codes.min() < 0 or codes.max() >= b**length:
        wrong = int(np.argmax((codes < 0) | (codes >= b**length)))
        raise UserError(
            f"{path}: token {wrong} has code {codes[wrong]}; {length} sub-tokens of base {b} have "
            f"codes 0 to {b**length - 1}"
        )
    values, times = np.unique(codes, return_counts=True)
    if (times > 1).any():
        shared = values[times > 1][0]
        one, other = np.flatnonzero(codes == shared)[:2]
        raise UserError(f"{path}: tokens {one} and {other} share code {shared}; each needs its own")
    about = about_file(path)
    if not storage.exists(about):
        raise UserError(
            f'{about} is missing: it names the tokenizer of the codes, e.g. {{"tokenizer": '
            f'"{manifest.tokenizer_hash}"}} for the tokenizer of {manifest.directory}'
        )
    found = read_json(about)
    tokenizer = found.get("tokenizer") if isinstance(found, dict) else None
    if tokenizer != manifest.tokenizer_hash:
        raise UserError(
            f"{path}: made for tokenizer {tokenizer} ({about}), but {manifest.directory} was "
            f"prepared with {manifest.tokenizer_hash}"
        )
    return _book(length, b, codes.astype(np.int64).tobytes())


@lru_cache(maxsize=8)
def _book(length: int, base: int, codes: bytes) -> Codebook:
    """One object for equal codes: runs of one shape share compiled programs."""
    return Codebook(length, base, np.frombuffer(codes, np.int64))


def of_run(config: RunConfig, manifest: Manifest) -> Codebook | None:
    """The codes of a run that has them from a file; None for others.

    Raises:
        NoData: the file cannot be used (`read`), or is not the one that the run began with.
    """
    s = config.subtokens
    if not s.codes_file:
        return None
    try:
        book = read(Path(s.codes_file), manifest, s.length)
    except UserError as error:
        raise NoData(f"subtokens.codes_file: {error}") from error
    if s.codes not in ("", book.hash):
        raise NoData(
            f"subtokens.codes_file: {s.codes_file} holds codes {book.hash}, the run has {s.codes}: "
            "the file was changed"
        )
    return book


def filled(config: RunConfig, manifest: Manifest) -> RunConfig:
    """`config` with the hash of the codes in its file, if it has one.

    Raises:
        NoData: as `of_run`.
    """
    book = of_run(config, manifest)
    if book is None:
        return config
    return replace(config, subtokens=replace(config.subtokens, codes=book.hash))
