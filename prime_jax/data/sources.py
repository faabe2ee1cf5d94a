"""Text sources, divided into parts that can be read independently, in a fixed order.

Specs:
    pysource                 the sources of the Python standard library, one document per file
    text:GLOB                one document per file
    stream:GLOB              files joined into one text, without documents, split by position (text8)
    jsonl:GLOB               one document per line, key `text`; jsonl.KEY:GLOB, another key
    parquet:GLOB             one document per row, column `text`; parquet.KEY:GLOB
    tfds:NAME                a prepared TensorFlow dataset, feature `text`, its own splits if any;
                             tfds.KEY:NAME
    markov:V=16,order=1,...  synthetic, entropies known exactly (markov.py)
    A*0.7+B*0.3              a mixture: fractions of the tokens, as many as fit without repetition;
                             each source contributes its first documents
GLOB is local or remote (`gs://...`, through fsspec); links are followed; .gz, .zst, .bz2 and .xz are
decompressed, archives of many files refused. Rows without a value are empty documents.
"""

import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prime_jax.data import markov, readers
from prime_jax.errors import UserError

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz", ".7z", ".rar")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
NUMBER = r"\d*\.?\d+(?:[eE][+-]?\d+)?"  # a weight
PART_BYTES = 1 << 20  # small files are grouped into parts of at least about this size
ROWS_PER_PART = 10_000


@dataclass(frozen=True)
class Part:
    """A part of a source that one worker reads; equal parts give equal documents.

    Attributes:
        read: yields documents, and None for one that is not valid text.
        args: of `read`.
        size: bytes on disk, for progress.
    """

    read: Callable[..., Iterator[readers.Document | None]]
    args: tuple[Any, ...]
    size: int

    def documents(self) -> Iterator[readers.Document | None]:
        return self.read(*self.args)


@dataclass(frozen=True)
class Source:
    """One corpus.

    Attributes:
        spec: as given by the user.
        parts: in the order of the stream.
        weight: fraction of the tokens in a mixture.
        endless: one stream without documents, so without EOS.
    """

    spec: str
    parts: list[Part]
    weight: float = 1.0
    endless: bool = False

    @property
    def files(self) -> list[str]:
        """The files that it is read from, in order; none for a chain."""
        found: dict[str, None] = {}
        for part in self.parts:
            if part.read is readers.tfds:
                found |= dict.fromkeys(readers.tfds_files(part.args[0]))
            elif part.read is readers.stream:
                found[part.args[0]] = None
            elif part.read is not readers.markov:
                found |= dict.fromkeys(part.args[0])
        return list(found)


def parse(spec: str) -> list[Source]:
    """The sources of a spec; more than one for a mixture.

    Raises:
        UserError: unknown kind, no matching file, or a mixture that cannot be read.
    """
    terms = re.findall(rf"(?:^|\+)(.+?)\*({NUMBER})(?=\+|$)", spec)
    if len(terms) < 2 or "+".join(f"{s}*{w}" for s, w in terms) != spec:
        return [_parse_one(spec, 1.0)]
    sources = [_parse_one(part, float(weight)) for part, weight in terms]
    if any(source.weight <= 0 for source in sources):
        raise UserError(f"source {spec}: weights must be above 0")
    if len({source.endless for source in sources}) > 1:
        raise UserError(
            f"source {spec}: an endless source (stream, markov) cannot be mixed with documents"
        )
    return sources


def _parse_one(spec: str, weight: float) -> Source:
    named, _, value = spec.partition(":")
    kind, dot, key = named.partition(".")
    of_rows = {"jsonl": readers.jsonl, "parquet": readers.parquet}
    if spec == "pysource":
        return Source(spec, _pysource_parts(), weight)
    if kind in of_rows and value and bool(dot) == bool(key):
        more = (key,) if dot else ()
        return Source(spec, _group(files(spec, value), of_rows[kind], *more), weight)
    if kind == "tfds" and value and bool(dot) == bool(key):
        return Source(spec, _tfds_parts(value, key or readers.KEY), weight)
    if named == "text" and value:
        return Source(spec, _group(files(spec, value), readers.texts), weight)
    if named == "stream" and value:
        return Source(spec, _stream_parts(files(spec, value)), weight, endless=True)
    if named == "markov":
        chain = markov.parse(value)
        part = Part(readers.markov, (chain,), 4 * chain.tokens)
        return Source(spec, [part], weight, endless=not chain.doc_mean)
    raise UserError(
        f"source {spec!r} is unknown; use pysource, text:GLOB, stream:GLOB, jsonl:GLOB, "
        "parquet:GLOB, tfds:NAME or markov:V=16,..., and jsonl.KEY:GLOB where the text is under "
        "another key"
    )


def files(spec: str, glob: str) -> list[tuple[str, int]]:
    """(path, bytes) of the files that match, sorted by path.

    Raises:
        UserError: none does, one is an archive or a link to nothing, or the store cannot be read.
    """
    try:
        fs, path = readers.file_systems().url_to_fs(glob)
        local = readers.is_local(fs)
        found = (readers.following_links() if local else fs).glob(path, detail=True)
    except Exception as error:  # every store has its own exceptions
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"source {spec}: {line}") from error
    matched = [(p, info.get("size") or 0) for p, info in found.items() if info["type"] == "file"]
    for name, info in found.items():
        # A link back to a folder that it is in is left out: what it leads to is there already.
        if info["type"] not in ("file", "directory") and not os.path.isdir(name):
            broken = info.get("islink") and not os.path.exists(name)
            why = "is a link to nothing" if broken else "is neither a file nor a folder"
            raise UserError(f"source {spec}: {name} {why}")
        if info["type"] == "file" and name.lower().endswith(ARCHIVES):
            raise UserError(f"source {spec}: {name} is an archive of files: unpack it")
    if not matched:
        raise UserError(f"source {spec}: no file matches {glob}{_hint(spec, glob, found)}")
    return sorted((p if local else fs.unstrip_protocol(p), size) for p, size in matched)


def _hint(spec: str, glob: str, found: Mapping[str, Any]) -> str:
    """What may have been meant by a pattern that no file matches."""
    if found:
        return f"; {next(iter(found))} is a folder: write {glob.rstrip('/')}/* for its files"
    if "+" in spec and "*" in spec:
        return "; a mixture is written A*0.7+B*0.3"
    return ""


def _group(
    files: list[tuple[str, int]],
    read: Callable[..., Iterator[readers.Document | None]],
    *more: str,
) -> list[Part]:
    """Parts of whole files: small files together, large ones in parts of their own."""
    largest = max(PART_BYTES, sum(n for _, n in files) // 1000)  # limits the number of parts
    parts: list[Part] = []
    paths: list[str] = []
    size = 0
    for path, n in files:
        if paths and size + n > largest:
            parts.append(Part(read, (tuple(paths), *more), size))
            paths, size = [], 0
        paths.append(path)
        size += n
    return [*parts, Part(read, (tuple(paths), *more), size)]


def _pysource_parts() -> list[Part]:
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, subfolders, names in os.walk(root):
        outside = {"site-packages", "dist-packages", "__pycache__"}
        subfolders[:] = [name for name in subfolders if name not in outside]
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"pysource: this Python's library at {root} has no .py files")
    return _group([(path, os.path.getsize(path)) for path in sorted(files)], readers.python_files)


def _stream_parts(files: list[tuple[str, int]]) -> list[Part]:
    compressed = [p for p, _ in files if p.endswith(COMPRESSED)]
    if compressed:
        raise UserError(
            f"stream: {compressed[0]} is compressed; to split it by position, unpack it"
        )
    total = sum(size for _, size in files)
    chunk = max(-(-total // readers.STREAM_CHUNKS), 1)
    parts, start = [], 0
    for path, size in files:
        for begin in range(0, size, chunk * 10):
            end = min(begin + chunk * 10, size)
            parts.append(Part(readers.stream, (path, begin, end, chunk, start, total), end - begin))
        start += size
    if not parts:
        raise UserError(f"stream: {files[0][0]} is empty")
    return parts


def _tfds_parts(name: str, key: str) -> list[Part]:
    """Ranges of rows; `validation` and `test` splits are used as such, other rows are hashed."""
    known = readers.tfds_splits(name, key)
    pins = {"train": "train" if "validation" in known else ""}
    pins |= {"validation": "valid", "test": "test"}
    parts = []
    for split, pin in pins.items():
        rows = known.get(split, 0)
        for begin in range(0, rows, ROWS_PER_PART):
            end = min(begin + ROWS_PER_PART, rows)
            parts.append(
                Part(readers.tfds, (name, split, pin, begin, end, key), (end - begin) << 10)
            )
    if not parts:
        raise UserError(f"tfds:{name} has no split named train, validation or test")
    return parts


def sample(source: Source, n_bytes: int) -> Iterator[str]:
    """About `n_bytes` of text from the beginnings of parts spread evenly over a source."""
    count = min(len(source.parts), 64)
    for k in range(count):
        left = -(-n_bytes // count)
        for document in source.parts[k * len(source.parts) // count].documents():
            if document is not None:
                yield document.text[:left]
                left -= len(document.text)
            if left <= 0:
                break
