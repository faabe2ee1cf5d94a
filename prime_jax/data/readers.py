"""Readers: each yields the documents of one part of a source; None for an invalid document."""

import functools
import hashlib
import io
import json
import logging
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

from prime_jax.data.markov import Markov
from prime_jax.errors import UserError

DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)  # what a damaged file raises
KEY = "text"  # of a document in rows
SHOWN = 8  # keys in a message
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


def is_local(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def following_links() -> Any:
    """The local file system, in which a link is what it points to.

    fsspec's own neither lists nor walks what is behind links. A link back to a folder that it is in
    stays a link: a walk would not end.
    """
    from fsspec.implementations.local import LocalFileSystem

    class Following(LocalFileSystem):
        cachable = False

        def info(self, path: Any, **options: Any) -> dict[str, Any]:
            found = super().info(path, **options)
            place = found["name"]
            if not found.get("islink") or not os.path.exists(place):
                return found
            back = os.path.realpath(place) in map(os.path.realpath, Path(place).parents)
            if os.path.isdir(place) and not back:
                found["type"] = "directory"
            elif os.path.isfile(place):
                found |= {"type": "file", "size": os.path.getsize(place)}
            return found

    return Following()


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
    if not offset and data[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it")
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
        except DAMAGED as error:
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


def jsonl(paths: tuple[str, ...], key: str = KEY) -> Iterator[Document | None]:
    for path in paths:
        try:
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json_document(line, key, f"{path} line {number}")
        except UserError:
            raise
        except DAMAGED as error:
            raise _damaged(path, error) from error


def _json_document(line: bytes, key: str, where: str) -> Document | None:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text: byte 0x{line[error.start]:02x} at offset {error.start}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: {_json_kind(row)}, not a JSON object with the key {key!r}")
    if key not in row:
        raise UserError(f"{where}: {_no_key('jsonl', key, row)}")
    text = row[key]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {key!r} is {_json_kind(text)}, not text")
    return _valid(text)


def _json_kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _no_key(kind: str, key: str, found: Iterable[str]) -> str:
    """The keys (columns, features) that there are, and how to name the right one."""
    found = list(found)
    shown = ", ".join(map(repr, found[:SHOWN])) + (", ..." if len(found) > SHOWN else "")
    return f"no {key!r}, but {shown or 'nothing'}; name the one that holds the text: {kind}.KEY:..."


def _valid(text: str | None) -> Document | None:
    """None for text with lone surrogates (possible in JSON escapes), which UTF-8 cannot encode; a
    row without a value is an empty document."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return None
    return Document(text or "")


def parquet(paths: tuple[str, ...], key: str = KEY) -> Iterator[Document | None]:
    import pyarrow
    import pyarrow.parquet

    for path in paths:
        try:
            with _open(path) as opened:
                file = pyarrow.parquet.ParquetFile(opened)
                _check_column(file.schema_arrow, key, path)
                for batch in file.iter_batches(columns=[key]):
                    for text in batch.column(key).to_pylist():
                        yield _valid(text)
        except UserError:
            raise
        except (*DAMAGED, pyarrow.ArrowException) as error:
            raise _damaged(path, error) from error


def _check_column(schema: Any, key: str, path: str) -> None:
    from pyarrow import types

    if key not in schema.names:
        raise UserError(f"{path}: {_no_key('parquet', key, schema.names)}")
    kind = schema.field(key).type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(inner) or types.is_large_string(inner) or types.is_null(inner)):
        raise UserError(f"{path}: column {key!r} is of type {kind}, not text")


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
    return builder


def tfds_splits(name: str, key: str) -> dict[str, int]:
    """Rows of each split.

    Raises:
        UserError: no such dataset on this machine, or no feature `key` in it.
    """
    info = _tfds_builder(name).info
    if key not in (info.features or {}):
        raise UserError(f"tfds:{name}: {_no_key('tfds', key, info.features or {})}")
    return {k: split.num_examples for k, split in info.splits.items()}


def tfds_files(name: str) -> list[str]:
    folder = Path(_tfds_builder(name).data_dir)
    return sorted(str(path) for path in folder.iterdir() if path.is_file())


@functools.cache
def _tfds_rows(name: str, split: str) -> Any:
    try:
        return _tfds_builder(name).as_data_source(split)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"tfds:{name}: cannot be read without TensorFlow: {reason}") from error


def tfds(
    name: str, split: str, pin: str, begin: int, end: int, key: str = KEY
) -> Iterator[Document]:
    rows = _tfds_rows(name, split)
    for i in range(begin, end):
        where, text = f"tfds:{name} {split} row {i}", rows[i][key]
        if not isinstance(text, bytes):
            raise UserError(f"{where}: {key!r} is {type(text).__name__}, not text")
        yield Document(_decode(text, where), split=pin)


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
