"""The files that a dataset was made of, identified by their content.

DIR/inputs.json, beside the manifest: path, size, time of change and SHA-256 of each, in the order of
the source. Size and time are a shortcut; where they differ, the content decides. In a bucket the
store's own tag stands for the content.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prime_jax.data import readers
from prime_jax.errors import UserError
from prime_jax.runtime.records import read_json, write_json_atomic

FILE = "inputs.json"
HASHERS = 8


@dataclass(frozen=True)
class Input:
    """One file. `modified` is nanoseconds, or a bucket's tag; `sha256` is empty where not read."""

    path: str
    size: int
    modified: str
    sha256: str = ""


def stamped(paths: Sequence[str]) -> list[Input]:
    """Raises: UserError: one of them cannot be read."""
    return [_stamped(path) for path in paths]


def _stamped(path: str) -> Input:
    try:
        if "://" not in path:
            found = os.stat(path)
            return Input(path, found.st_size, str(found.st_mtime_ns))
        fs, inside = readers.file_systems().url_to_fs(path)
        info = fs.info(inside)
    except Exception as error:  # every store has its own exceptions
        raise UserError(f"cannot read {path}: {error}") from error
    tags = [info[key] for key in ("etag", "ETag", "crc32c", "mtime", "LastModified") if key in info]
    return Input(path, info.get("size") or 0, str(next(iter(tags), "")))


def hashed(inputs: Sequence[Input], tick: Callable[[int], None]) -> Iterator[Input]:
    """`inputs` with the hash of those on local disks; `tick` receives bytes as they are read."""
    with ThreadPoolExecutor(HASHERS) as readers_:
        for made in readers_.map(_hashed, inputs):
            tick(made.size)
            yield made


def _hashed(known: Input) -> Input:
    if "://" in known.path:
        return known
    try:
        with open(known.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {known.path}: {error.strerror}") from error
    return dataclasses.replace(known, sha256=digest)


def save(inputs: Sequence[Input], directory: Path) -> None:
    write_json_atomic(directory / FILE, [dataclasses.asdict(known) for known in inputs])


def changes(directory: Path, paths: Sequence[str]) -> str:
    """What is not as when the dataset in `directory` was made, empty if nothing is.

    Datasets that do not know what they were made of are taken to be of these files.
    """
    if not (directory / FILE).exists():
        return ""
    try:
        known = [Input(**row) for row in read_json(directory / FILE)]
    except TypeError as error:
        raise UserError(f"{directory / FILE} is damaged ({error})") from error
    if len(known) != len(paths):
        return f"it reads {len(paths)} files now, {len(known)} then"
    for then, now in zip(known, stamped(paths), strict=True):
        same = (then.size, then.modified) == (now.size, now.modified)
        if not same and not (then.sha256 and then.sha256 == _hashed(now).sha256):
            return f"{now.path} has changed since"
    return ""
