"""Finished draws of a long evaluation, in a file from which a later call continues."""

import io
import json
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from prime_jax.runtime import distributed, storage
from prime_jax.runtime.storage import Path

SAVE_SECONDS = 20.0

# Rows, their nats by label (perhaps more of them, and still on the device), called when these are read.
Batch = tuple[np.ndarray, dict[str, Any], Callable[[], None]]


class Partial:
    """Nats of each row, NaN where there is no draw yet; without a path, in memory only.

    Process 0 reads and writes; all processes begin with what it found.

    Args:
        identity: of the work; a file with another identity is ignored.
        earlier: files of other attempts, read if there is none at `path`.
    """

    def __init__(
        self,
        path: Path | None,
        identity: dict[str, Any],
        rows: int,
        earlier: Sequence[Path] = (),
    ):
        self.path, self.rows = path, rows
        self.identity = json.dumps(identity, sort_keys=True)
        self.nats: dict[str, np.ndarray] = {}
        self._saved = time.monotonic()
        if path is not None:
            found = {}
            if distributed.is_writer():
                found = next(filter(None, map(self._read, (path, *earlier))), {})
            self.nats = distributed.broadcast_arrays(found)

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        if not storage.exists(path):
            return {}
        try:
            with np.load(io.BytesIO(storage.read(path))) as stored:
                if str(stored["identity"]) == self.identity:
                    return {k: stored[k] for k in stored.files if k != "identity"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # damaged: start again
        return {}

    def remaining(self) -> np.ndarray:
        """Rows without a draw."""
        for values in self.nats.values():
            return np.flatnonzero(np.isnan(values))
        return np.arange(self.rows)

    def put(self, index: np.ndarray, values: dict[str, np.ndarray]) -> None:
        for label, value in values.items():
            array = self.nats.setdefault(label, np.full(self.rows, np.nan))
            array[index] = value[: len(index)]
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def fill(self, batches: Iterable[Batch], ahead: int) -> None:
        """Read batches of draws, up to `ahead` of them late: so many are queued on the device.

        What was read is saved when this is interrupted.
        """
        waiting: deque[Batch] = deque()

        def read() -> None:
            index, values, done = waiting.popleft()
            self.put(index, {k: np.asarray(v, np.float64) for k, v in values.items()})
            done()

        try:
            for batch in batches:
                waiting.append(batch)
                if len(waiting) > ahead:
                    read()
            while waiting:
                read()
        except BaseException:
            self.save()
            raise

    def save(self) -> None:
        if not self.nats or self.path is None or not distributed.is_writer():
            return
        stream = io.BytesIO()
        np.savez(stream, identity=self.identity, **self.nats)
        storage.make_folder(self.path.parent)
        storage.write(self.path, stream.getvalue())
        self._saved = time.monotonic()

    def discard(self) -> None:
        if self.path is not None and distributed.is_writer():
            storage.remove(self.path)
