"""ArrayRecord files of fixed-length blocks; errors include the file name."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prime_jax.errors import UserError
from prime_jax.runtime import storage

OPTIONS = "group_size:1,uncompressed"  # random access to single records, deterministic bytes
BATCH = 1024


class Reader:
    """Random access to the records of one file; thread-safe."""

    def __init__(self, path: Path, records: int, advice: str):
        from array_record.python import array_record_module

        self.path, self.records, self.advice = path, records, advice
        try:
            self._reader = array_record_module.ArrayRecordReader(
                str(path), options="readahead_buffer_size:0"
            )
            found = self._reader.num_records()
        except (RuntimeError, ValueError) as error:
            raise self._damaged(error) from error
        if found != records:
            raise self._damaged(f"{found} records instead of {records}")

    def read(self, positions: list[int]) -> bytes:
        """The records at these positions, joined.

        Raises:
            UserError: one of them is damaged (checksums are part of the format).
        """
        try:
            return b"".join(self._reader.read(positions))
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._damaged(error) from error

    def _damaged(self, reason: object) -> UserError:
        first_line = str(reason).partition("\n")[0]
        return UserError(f"{self.path} is damaged ({first_line}){self.advice}")


def digest(path: Path, records: int, advice: str) -> str:
    """SHA-256 of the records of a file, in order; raises UserError where one is damaged."""
    reader, sha = Reader(path, records, advice), hashlib.sha256()
    for begin in range(0, records, BATCH):
        sha.update(reader.read(list(range(begin, min(begin + BATCH, records)))))
    return sha.hexdigest()


def write(path: Path, records_NxR: np.ndarray) -> str:
    """Write rows uint8 [N, R] as records, atomically; returns the digest.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with storage.replacing(path) as [temporary]:
            writer = _writer(temporary)
            for row in records_NxR:
                writer.write(row.tobytes())
            writer.close()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return hashlib.sha256(records_NxR).hexdigest()


def _writer(path: Path) -> Any:
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordWriter(str(path), OPTIONS)


def write_array(path: Path, array: np.ndarray) -> str:
    """Write a .npy file atomically; returns the SHA-256 of the file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    storage.write(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


@contextmanager
def whole_files(paths: Sequence[str | Path]) -> Iterator[list[BinaryIO]]:
    """Files open for writing that get their names only if the block ends without an error.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        with storage.replacing(*map(Path, paths)) as temporary, ExitStack() as stack:
            yield [stack.enter_context(t.open("wb")) for t in temporary]
    except OSError as error:
        raise UserError(f"cannot write {paths[0]}: {error.strerror}") from error
