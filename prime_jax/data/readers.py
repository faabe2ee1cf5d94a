"""Readers: each yields the documents of one part of a source; None for an invalid document."""

import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

from prime_jax.data.markov import Markov
from prime_jax.errors import UserError

STREAM_CHUNKS = 1000  # pieces of a stream without documents: splits are exact to 0.1 %


class Document(NamedTuple):
    """One text.

    Attributes:
        text: what is tokenized.
        position: number in [0, 1) that determines the split; None: the hash of the text does.
        split: the split, if the source defines it.
    """

    text: str
    position: float | None = None
    split: str = ""


def uniform(text: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the text and the seed only."""
    salt = (seed % 2**64).to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "little") / 2**64


def file_systems() -> ModuleType:
    """The module fsspec, with silent stores: they log exceptions that they also raise."""
    import fsspec

    for name in ("gcsfs", "s3fs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return fsspec


def _open(path: str) -> BinaryIO:
    fsspec = file_systems()
    if not path.endswith(".zst"):
        return fsspec.open(path, "rb", compression="infer").open()
    import pyarrow  # unlike other readers it detects a truncated file, and reads every frame

    raw = fsspec.open(path, "rb").open()
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")


def _decode(data: bytes, path: str, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset "
            f"{offset + error.start}; binary files cannot be a corpus"
        ) from error


def texts(paths: tuple[str, ...]) -> Iterator[Document]:
    for path in paths:
        try:
            with _open(path) as file:
                data = file.read()
        except (OSError, EOFError, ValueError) as error:
            raise _damaged(path, error) from error
        yield Document(_decode(data, path))


def python_files(paths: tuple[str, ...]) -> Iterator[Document | None]:
    """Test files of the library in other encodings give None."""
    for path in paths:
        try:
            yield Document(Path(path).read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            yield None
        except OSError as error:
            raise _damaged(path, error) from error


def stream(
    path: str, begin: int, end: int, chunk: int, start: int, total: int
) -> Iterator[Document]:
    """Pieces of `chunk` bytes of [begin, end), with boundaries moved to the next character."""
    with _open(path) as file:
        for at in range(begin, end, chunk):
            stop = min(at + chunk, end)
            file.seek(at)
            data = file.read(stop + 3 - at)
            first = _continuation(data, 0) if at else 0
            last = stop - at + _continuation(data, stop - at)
            yield Document(_decode(data[first:last], path, at + first), (start + at) / total)


def _continuation(data: bytes, at: int) -> int:
    """Number of UTF-8 continuation bytes from `at` on: offset to the next character."""
    n = 0
    while n < 3 and at + n < len(data) and data[at + n] & 0xC0 == 0x80:
        n += 1
    return n


def jsonl(paths: tuple[str, ...]) -> Iterator[Document | None]:
    for path in paths:
        try:
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json_document(line, f"{path} line {number}")
        except (OSError, EOFError) as error:
            raise _damaged(path, error) from error


def _json_document(line: bytes, where: str) -> Document | None:
    try:
        text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{where}: not a JSON object with a string "text"') from error
    return _valid(text)


def _valid(text: str) -> Document | None:
    """None for text with lone surrogates (possible in JSON escapes), which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return Document(text)


def parquet(paths: tuple[str, ...]) -> Iterator[Document | None]:
    import pyarrow
    import pyarrow.parquet

    for path in paths:
        try:
            with _open(path) as file:
                for batch in pyarrow.parquet.ParquetFile(file).iter_batches(columns=["text"]):
                    for text in batch.column("text").to_pylist():
                        yield _valid(text or "")
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise _damaged(path, error) from error


@functools.cache
def _tfds_builder(name: str) -> Any:
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
        if not builder.info.splits:
            raise ValueError("it is not prepared on this machine")
    except Exception as error:  # the library raises many types
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"tfds:{name}: {reason}; prepare it as array_record first, or set TFDS_DATA_DIR"
        ) from error
    if "text" not in (builder.info.features or {}):
        raise UserError(f"tfds:{name} has no feature named text")
    return builder


def tfds_splits(name: str) -> dict[str, int]:
    return {k: split.num_examples for k, split in _tfds_builder(name).info.splits.items()}


@functools.cache
def _tfds_rows(name: str, split: str) -> Any:
    try:
        return _tfds_builder(name).as_data_source(split)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"tfds:{name}: cannot be read without TensorFlow: {reason}") from error


def tfds(name: str, split: str, pin: str, begin: int, end: int) -> Iterator[Document]:
    rows = _tfds_rows(name, split)
    for i in range(begin, end):
        yield Document(_decode(rows[i]["text"], f"tfds:{name} {split} row {i}"), split=pin)


def markov(chain: Markov) -> Iterator[Document]:
    """Chunks of one chain split by position, or documents split by a hash of their number."""
    stream = chain.stream()
    if not chain.doc_mean:
        chunk = max(-(-len(stream) // STREAM_CHUNKS), 1)
        for at in range(0, len(stream), chunk):
            yield Document(_numbers(stream[at : at + chunk]), at / len(stream))
        return
    ends = (stream == chain.V).nonzero()[0].tolist()
    for index, (start, end) in enumerate(zip([-1, *ends], ends, strict=False)):
        yield Document(_numbers(stream[start + 1 : end]), uniform(f"{chain.seed} {index}"))


def _numbers(ids: Any) -> str:
    return " ".join(map(str, ids.tolist())) + " "
