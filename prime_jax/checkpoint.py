"""Checkpoints: orbax directories, each sealed by a list of checksums that is written last.

A step without its seal was never finished and is ignored; one whose files no longer match the seal
is named and skipped. Orbax itself restores flipped bits without a word, hence the checksums.
"""

import json
import logging
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prime_jax import distributed
from prime_jax.config import CheckpointConfig
from prime_jax.errors import UserError
from prime_jax.records import write_json_atomic

CHUNK = 1 << 24


def _seal(directory: Path, step: int) -> Path:
    return directory / f"{step:09d}.json"


def _data(directory: Path, step: int) -> Path:
    return directory / f"{step:09d}"


def _checksums(path: Path) -> dict[str, list[int]]:
    """{relative name: [bytes, crc32]} of every file below `path`."""
    out = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        crc = 0
        with file.open("rb") as stream:
            while block := stream.read(CHUNK):
                crc = zlib.crc32(block, crc)
        out[str(file.relative_to(path))] = [file.stat().st_size, crc]
    return out


def steps(directory: Path) -> list[int]:
    """Finished steps in a checkpoint directory, oldest first."""
    return sorted(int(p.stem) for p in directory.glob("*.json") if p.stem.isdigit())


class Writer:
    """Saves in the background: training goes on while files are written.

    As a context manager it has finished (or given up) when the block is left. With several
    processes all of them call `save` and `wait` alike; process 0 seals and prunes.

    Attributes:
        seconds: how long the last save took, from its call to its seal.
    """

    def __init__(self, directory: Path, about: dict[str, Any], config: CheckpointConfig):
        self.directory = Path(directory).absolute()  # orbax insists
        self.about, self.config = about, config
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # something else went wrong first; its message counts
            self._thread.join()

    def steps(self) -> list[int]:
        return steps(self.directory)

    def save(self, step: int, state: Any) -> None:
        """Begin to save; returns when `state` may change again.

        Raises:
            UserError: this save, or the one before, could not be written.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        began = time.monotonic()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with _quiet_orbax():
                response = ocp.save_async(_data(self.directory, step), state, overwrite=True)
        except Exception as error:  # orbax and tensorstore raise many types for a failed write
            raise self._failed(step, error) from error
        self._thread = threading.Thread(target=self._finish, args=(step, response, began))
        self._thread.start()

    def wait(self) -> None:
        """Return when the save in progress, if there is one, is sealed.

        Raises:
            UserError: it could not be written; what was saved before is untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _finish(self, step: int, response: Any, began: float) -> None:
        try:
            with _quiet_orbax():
                response.result()
            if distributed.is_writer():
                sums = {"step": step, "about": self.about, "files": _checksums(self._data(step))}
                write_json_atomic(_seal(self.directory, step), sums)
                self._prune()
        except Exception as error:
            self._error = self._failed(step, error)
        self.seconds = time.monotonic() - began

    def _data(self, step: int) -> Path:
        return _data(self.directory, step)

    def _failed(self, step: int, error: Exception) -> UserError:
        if distributed.is_writer():
            shutil.rmtree(self._data(step), ignore_errors=True)
        kept = self.steps()
        rest = f"step {kept[-1]} is kept" if kept else "no earlier checkpoint exists"
        reason = str(error).splitlines()[0][:200]
        return UserError(f"cannot save step {step} in {self.directory} ({reason}); {rest}")

    def _prune(self) -> None:
        every = self.config.keep_every
        for old in self.steps()[: -self.config.keep]:
            if not every or old % every:
                # The seal goes first: a step without one is no step.
                _seal(self.directory, old).unlink(missing_ok=True)
                shutil.rmtree(self._data(old), ignore_errors=True)


def restore(
    directories: Sequence[Path],
    abstract: Any,
    about: dict[str, Any],
    say: Callable[[str], None],
) -> Any | None:
    """The newest undamaged state in any of several checkpoint directories, or None.

    Args:
        abstract: shapes, dtypes and shardings of the state.
        say: told in one line about each damaged checkpoint that was skipped.
    Raises:
        UserError: an undamaged checkpoint belongs to another run.
    """
    found = [(step, directory) for directory in directories for step in steps(directory)]
    for step, directory in sorted(found, reverse=True, key=lambda pair: pair[0]):
        damage = _damage(directory, step)
        if damage is None:
            return _load(directory, step, abstract, about)
        say(f"checkpoint {_data(directory, step)} is damaged ({damage}); trying the one before")
    return None


def _damage(directory: Path, step: int) -> str | None:
    try:
        expected = json.loads(_seal(directory, step).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "its list of checksums is unreadable"
    actual = _checksums(_data(directory, step))
    for name, sums in expected.items():
        if actual.get(name) != sums:
            return f"{name} {'has changed' if name in actual else 'is missing'}"
    return None


def _load(directory: Path, step: int, abstract: Any, about: dict[str, Any]) -> Any:
    from orbax.checkpoint import v1 as ocp

    saved = json.loads(_seal(directory, step).read_text())["about"]
    for key, value in about.items():
        if saved.get(key) != value:
            raise UserError(
                f"{_data(directory, step)}: belongs to another run ({key} {saved.get(key)}, "
                f"here {value}); use a new directory"
            )
    with _quiet_orbax():
        return ocp.load(_data(directory.absolute(), step), abstract)


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax warns about its own defaults and logs the traceback of what it then raises."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
