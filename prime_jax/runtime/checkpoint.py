"""Checkpoints: orbax directories, each sealed by a list of checksums that is written last.

A step without its seal was never finished and is ignored; one whose files no longer match the seal
is named and skipped. Orbax itself restores flipped bits without a word, hence the checksums.

Every process writes its part to a shared folder or to `gs://`. Orbax does not know `s3://`: there a
run of one process saves in a local folder that is then copied.
"""

import contextlib
import json
import logging
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as LocalPath
from typing import Any

from prime_jax.config import CheckpointConfig
from prime_jax.errors import UserError
from prime_jax.runtime import distributed, storage
from prime_jax.runtime.records import write_json_atomic
from prime_jax.runtime.storage import Path

PATIENCE = 300.0  # seconds that a save in the background waits for a store to come back
LAYOUT = 1  # of the parameters; the next number whenever their order or meaning changes


def _seal(directory: Path, step: int) -> Path:
    return directory / f"{step:09d}.json"


def _data(directory: Path, step: int) -> Path:
    return directory / f"{step:09d}"


def steps(directory: Path) -> list[int]:
    """Finished steps in a checkpoint directory, oldest first."""
    seals = (name.partition(".json") for name in storage.names(directory))
    return sorted(int(stem) for stem, dot, rest in seals if stem.isdigit() and dot and not rest)


def _is_copied(directory: Path) -> bool:
    return str(directory).startswith("s3://")


class Writer:
    """Saves in the background: training goes on while files are written.

    As a context manager it has finished (or given up) when the block is left. With several
    processes all of them call `save` and `wait` alike; process 0 seals and prunes.

    Attributes:
        about: identities that a restore compares.
        origin: what the weights mean, for a reader who has nothing but the checkpoint.
        seconds: how long the last save took, from its call to its seal.
    """

    def __init__(
        self,
        directory: Path,
        about: dict[str, Any],
        config: CheckpointConfig,
        log: Callable[[str], None] = print,
        origin: dict[str, Any] | None = None,
    ):
        if not storage.is_remote(directory):
            directory = LocalPath(directory).absolute()  # orbax insists
        elif _is_copied(directory) and not distributed.is_alone():
            raise UserError(f"{directory}: several processes save to a shared folder or to gs://")
        self.directory = directory
        self.about, self.config, self.log, self.origin = about, config, log, origin or {}
        self.seconds = 0.0
        self._whole: dict[
            int, bool
        ] = {}  # steps whose files were compared with their seal, or made
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
        """Finished steps, oldest first, less those that are known to be damaged."""
        return [step for step in steps(self.directory) if self._whole.get(step, True)]

    def know(self, step: int, whole: bool) -> None:
        """What `restore` has found of a step in this writer's directory."""
        self._whole[step] = whole

    def save(self, step: int, state: Any) -> None:
        """Begin to save; returns when `state` may change again.

        Raises:
            UserError, Unreachable: this save, or the one before, could not be written.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        began = time.monotonic()
        try:
            storage.make_folder(self.directory)
            target = self._data(step)
            if _is_copied(self.directory):
                target = LocalPath(tempfile.mkdtemp(prefix="prime_jax-")) / target.name
            with _quiet_orbax():
                response = ocp.save_async(target, state, overwrite=True)
        except Exception as error:  # orbax and tensorstore raise many types for a failed write
            raise self._failed(step, error) from error
        self._thread = threading.Thread(target=self._finish, args=(step, response, target, began))
        self._thread.start()

    def try_save(self, step: int, state: Any) -> None:
        """`save`, unless the store is out of reach: then say so, and training goes on.

        Raises:
            UserError: this save, or the one before, could not be written for another reason.
        """
        for act in (self.wait, lambda: self.save(step, state)):
            try:
                act()
            except storage.Unreachable as error:
                self.log(f"{error}; training goes on")

    def save_with_retries(self, step: int, state: Any, patience: float) -> None:
        """Save and seal, as often as it takes while the store is out of reach.

        Raises:
            Unreachable: still, after `patience` seconds.
            UserError: as `save`.
        """
        began, verdict = time.monotonic(), "again"
        while verdict == "again":
            self.try_save(step, state)
            late = time.monotonic() - began > patience
            verdict = distributed.broadcast(self._verdict(step, late))
        if verdict != "saved":
            raise storage.Unreachable(f"step {step} could not be saved in {self.directory}")

    def _verdict(self, step: int, late: bool) -> str:
        """Process 0's counts."""
        try:
            self.wait()
            if not distributed.is_writer() or step in self.steps():
                return "saved"
        except storage.Unreachable as error:
            self.log(str(error))
        return "late" if late else "again"

    def wait(self) -> None:
        """Return when the save in progress, if there is one, is sealed.

        Raises:
            UserError, Unreachable: it could not be written; what was saved before is untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _finish(self, step: int, response: Any, target: Path, began: float) -> None:
        try:
            with _quiet_orbax():
                response.result()
            if distributed.is_writer():
                storage.retry(lambda: self._publish(step, target), lambda _: None, PATIENCE)
        except Exception as error:
            self._error = self._failed(step, error)
        if target != self._data(step):
            storage.remove(target.parent)
        self.seconds = time.monotonic() - began
        if self._error is None and distributed.is_writer():
            with contextlib.suppress(UserError):  # what cannot be looked at now stays for now
                self._prune()

    def _publish(self, step: int, target: Path) -> None:
        if target != self._data(step):
            storage.remove(self._data(step))
            storage.upload(target, self._data(step))
        files = storage.checksums(self._data(step))
        what = {"layout": LAYOUT, "step": step, "about": self.about, "origin": self.origin}
        write_json_atomic(_seal(self.directory, step), {**what, "files": files})
        self._whole[step] = True

    def _data(self, step: int) -> Path:
        return _data(self.directory, step)

    def _failed(self, step: int, error: Exception) -> UserError:
        rest = ""
        with contextlib.suppress(UserError):
            if distributed.is_writer():
                storage.remove(self._data(step))
            kept = self.steps()
            rest = f"; step {kept[-1]} is kept" if kept else "; no earlier checkpoint exists"
        kind = type(storage.explain(error, "", self.directory))
        reason = str(error).splitlines()[0][:600]  # paths come first, causes last
        return kind(f"cannot save step {step} in {self.directory} ({reason}){rest}")

    def _prune(self) -> None:
        """Remove what lies behind the newest `keep` steps that can be restored.

        A damaged step counts for none, wherever it is: its seal may well be later than all that
        this run has made. One that is later stays until the run comes by and replaces it.
        """
        kept = 0
        for step in reversed(steps(self.directory)):
            if kept < self.config.keep:
                if step not in self._whole:
                    self._whole[step] = _damage(self.directory, step) is None
                kept += self._whole[step]
            elif not self.config.keep_every or step % self.config.keep_every:
                # The seal goes first: a step without one is no step.
                storage.remove(_seal(self.directory, step))
                storage.remove(self._data(step))


class Schedule:
    """Which steps are saved: every so many, and so many minutes apart.

    The steps are the same on all processes of a process group, whose clocks differ: process 0 reads its own
    and tells the others, at steps that all know. Between two saves it looks about log2(steps)
    times, each time half of what it believes to be left later.
    """

    def __init__(self, config: CheckpointConfig, first_step: int):
        self.every, self.seconds = config.every, 60 * config.minutes
        self.saved(first_step)

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps; every process asks after every step."""
        if self.every and step % self.every == 0:
            return True
        if not self.seconds or step < self._next:
            return False
        wait = distributed.broadcast(self._wait(step))
        self._at, self._next = step, step + wait
        return wait == 0

    def saved(self, step: int) -> None:
        """Count from here: `step` is saved, or the first one begins."""
        self._saved = self._looked = time.monotonic()
        self._at, self._next = step, step + 1

    def _wait(self, step: int) -> int:
        """Steps until the next look; 0 if the time has come."""
        now = time.monotonic()
        left = self.seconds - (now - self._saved)
        pace = (now - self._looked) / max(step - self._at, 1)  # seconds a step, since the last look
        self._looked = now
        if left <= 0:
            return 0
        return max(1, int(left / max(pace, 1e-9) / 2))


def restore(
    directories: Sequence[Path],
    abstract: Any,
    about: dict[str, Any],
    log: Callable[[str], None],
    note: Callable[[int, int, bool], None] = lambda *_: None,
) -> Any | None:
    """The newest undamaged state in any of several checkpoint directories, or None.

    Process 0 looks for it: it is read for that once, and the others cannot find another one.

    Args:
        abstract: shapes, dtypes and shardings of the state.
        log: told in one line about each damaged checkpoint that was skipped.
        note: told about each that was looked at: its place in `directories`, its step, whether it
            is whole.
    Raises:
        UserError: an undamaged checkpoint belongs to another run.
    """
    found = distributed.broadcast(
        _newest(directories, log, note) if distributed.is_writer() else None
    )
    if found is None:
        return None
    step, place = found
    return _load(directories[place], step, abstract, about)


def _newest(
    directories: Sequence[Path],
    log: Callable[[str], None],
    note: Callable[[int, int, bool], None],
) -> tuple[int, int] | None:
    """(step, place in `directories`) of the newest undamaged checkpoint."""
    found = [(step, place) for place, d in enumerate(directories) for step in steps(d)]
    found.sort(key=lambda pair: (-pair[0], pair[1]))
    for step, place in found:
        damage = _damage(directories[place], step)
        note(place, step, damage is None)
        if damage is None:
            return step, place
        last = (step, place) == found[-1]
        then = "none is left: beginning at step 0" if last else "trying the one before"
        log(f"checkpoint {_data(directories[place], step)} is damaged ({damage}); {then}")
    return None


def _damage(directory: Path, step: int) -> str | None:
    try:
        expected = json.loads(storage.read(_seal(directory, step)))["files"]
    except storage.Unreachable:
        raise
    except (UserError, ValueError, KeyError):
        return "its list of checksums is unreadable"
    actual = storage.checksums(_data(directory, step))
    for name, sums in expected.items():
        if not storage.same_sums(actual.get(name), sums):
            return f"{name} {'has changed' if name in actual else 'is missing'}"
    return None


def _load(directory: Path, step: int, abstract: Any, about: dict[str, Any]) -> Any:
    from orbax.checkpoint import v1 as ocp

    seal = json.loads(storage.read(_seal(directory, step)))
    if seal.get("layout") != LAYOUT:
        raise UserError(
            f"{_data(directory, step)}: parameters in layout {seal.get('layout')}, this version "
            f"reads {LAYOUT}; train again, or use the version that saved it"
        )
    saved = seal["about"]
    for key, value in about.items():
        if saved.get(key) != value:
            raise UserError(
                f"{_data(directory, step)}: belongs to another run ({key} {saved.get(key)}, "
                f"here {value}); use a new directory"
            )
    with _quiet_orbax(), tempfile.TemporaryDirectory(prefix="prime_jax-") as here:
        source = _data(directory, step)
        if _is_copied(directory):
            storage.download(source, LocalPath(here))
            source = LocalPath(here)
        elif not storage.is_remote(directory):
            source = source.absolute()
        return ocp.load(source, abstract)


@contextlib.contextmanager
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
