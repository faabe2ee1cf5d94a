"""Checkpoints: orbax directories, each sealed by a list of checksums that is written last.

A step without its seal was never finished and is ignored; one whose files no longer match the seal
is reported and skipped. Orbax itself restores corrupted data silently, hence the checksums.

Every process writes its part to a shared folder or to `gs://`. Orbax does not support `s3://`:
there a run of one process saves to a local folder, which is then uploaded.
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
from typing import Any, NamedTuple

from prime_jax.config import CheckpointConfig
from prime_jax.errors import UserError
from prime_jax.runtime import distributed, storage
from prime_jax.runtime.records import write_json_atomic
from prime_jax.runtime.storage import Path

PATIENCE = 300.0  # seconds for which a background save retries an unreachable store
LAYOUT = 1  # version of the parameter layout; increase it when their order or meaning changes


def _seal(directory: Path, step: int) -> Path:
    return directory / f"{step:09d}.json"


def _data(directory: Path, step: int) -> Path:
    return directory / f"{step:09d}"


def steps(directory: Path) -> list[int]:
    """Finished steps in a checkpoint directory, oldest first."""
    seals = (name.partition(".json") for name in storage.names(directory))
    return sorted(int(stem) for stem, dot, rest in seals if stem.isdigit() and dot and not rest)


def is_sealed(directory: Path, step: int) -> bool:
    """Whether a step of a checkpoint directory is finished."""
    return storage.exists(_seal(directory, step))


def prune(directory: Path, config: CheckpointConfig) -> None:
    """Leave of the checkpoints of a run that has ended what `keep` says, pinned or not.

    Raises:
        UserError, Unreachable: they cannot be read or removed.
    """
    Writer(directory, {}, config)._prune()


def _is_uploaded(directory: Path) -> bool:
    return str(directory).startswith("s3://")


class Writer:
    """Saves in the background: training continues while files are written.

    As a context manager, it waits for the save in progress when the block ends. With several
    processes all of them must call `save` and `wait`; process 0 writes the seal and prunes.

    Attributes:
        about: identities that a restore compares.
        origin: the config and tokenizer, for a reader who has only the checkpoint.
        pinned: a step that stays, whatever `keep` says: other runs continue from it.
        lineage: what seals say of the steps before them (lineage.py).
        tally: what a run has counted until the step that is saved next; it lies in the seal, so
            that whoever continues there counts on.
        seconds: duration of the last save, from the call to its seal.
    """

    def __init__(
        self,
        directory: Path,
        about: dict[str, Any],
        config: CheckpointConfig,
        log: Callable[[str], None] = print,
        origin: dict[str, Any] | None = None,
        pinned: int = 0,
    ):
        if not storage.is_remote(directory):
            directory = LocalPath(directory).absolute()  # required by orbax
        elif _is_uploaded(directory) and not distributed.is_alone():
            raise UserError(
                f"{directory}: several processes can save only to a shared folder or gs://"
            )
        self.directory = directory
        self.about, self.config, self.log, self.origin = about, config, log, origin or {}
        self.pinned, self.lineage = pinned, {}
        self.tally: dict[str, Any] = {}
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
        elif self._thread is not None:  # the block failed: its exception is the one to raise
            self._thread.join()

    def steps(self) -> list[int]:
        """Finished steps, oldest first, less those that are known to be damaged."""
        return [step for step in steps(self.directory) if self._whole.get(step, True)]

    def know(self, step: int, whole: bool) -> None:
        """What `restore` has found of a step in this writer's directory."""
        self._whole[step] = whole

    def save(self, step: int, state: Any) -> None:
        """Start a save; returns when `state` may be modified or donated again.

        Raises:
            UserError, Unreachable: this save, or the one before, could not be written.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        began = time.monotonic()
        try:
            storage.make_folder(self.directory)
            target = self._data(step)
            if _is_uploaded(self.directory):
                target = LocalPath(tempfile.mkdtemp(prefix="prime_jax-")) / target.name
            with _quiet_orbax():
                response = ocp.save_async(target, state, overwrite=True)
        except Exception as error:  # orbax and tensorstore raise many types for a failed write
            raise self._failed(step, error) from error
        args = (step, response, target, began, dict(self.tally))
        self._thread = threading.Thread(target=self._finish, args=args)
        self._thread.start()

    def try_save(self, step: int, state: Any) -> None:
        """`save`; if the store is unreachable, log that and continue without a checkpoint.

        Raises:
            UserError: this save, or the one before, could not be written for another reason.
        """
        for act in (self.wait, lambda: self.save(step, state)):
            try:
                act()
            except storage.Unreachable as error:
                self.log(f"{error}; training continues")

    def save_with_retries(self, step: int, state: Any, patience: float) -> None:
        """Save and seal; retries while the store is unreachable.

        Raises:
            Unreachable: the store is still unreachable after `patience` seconds.
            UserError: as `save`.
        """
        began, verdict = time.monotonic(), "again"
        while verdict == "again":
            self.try_save(step, state)
            timed_out = time.monotonic() - began > patience
            verdict = distributed.broadcast(self._verdict(step, timed_out))
        if verdict != "saved":
            raise storage.Unreachable(f"step {step} could not be saved in {self.directory}")

    def _verdict(self, step: int, timed_out: bool) -> str:
        """`saved`, `again` or `timed out`; the value of process 0 is used by all."""
        try:
            self.wait()
            if not distributed.is_writer() or step in self.steps():
                return "saved"
        except storage.Unreachable as error:
            self.log(str(error))
        return "timed out" if timed_out else "again"

    def wait(self) -> None:
        """Wait until the save in progress, if any, is sealed.

        Raises:
            UserError, Unreachable: it could not be written; what was saved before is untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _finish(
        self, step: int, response: Any, target: Path, began: float, tally: dict[str, Any]
    ) -> None:
        try:
            with _quiet_orbax():
                response.result()
            if distributed.is_writer():
                storage.retry(lambda: self._publish(step, target, tally), lambda _: None, PATIENCE)
        except Exception as error:
            self._error = self._failed(step, error)
        if target != self._data(step):
            storage.remove(target.parent)
        self.seconds = time.monotonic() - began
        if self._error is None and distributed.is_writer():
            with contextlib.suppress(UserError):  # what cannot be looked at now stays for now
                self._prune()

    def _publish(self, step: int, target: Path, tally: dict[str, Any]) -> None:
        if target != self._data(step):
            storage.remove(self._data(step))
            storage.upload(target, self._data(step))
        files = storage.checksums(self._data(step))
        what = {"layout": LAYOUT, "step": step, "about": self.about, "origin": self.origin}
        what |= {"lineage": self.lineage, "tally": tally, "files": files}
        write_json_atomic(_seal(self.directory, step), what)
        self._whole[step] = True

    def _data(self, step: int) -> Path:
        return _data(self.directory, step)

    def _failed(self, step: int, error: Exception) -> UserError:
        rest = ""
        with contextlib.suppress(UserError):
            if distributed.is_writer():
                storage.remove(self._data(step))
            left = self.steps()
            rest = f"; step {left[-1]} is kept" if left else "; no earlier checkpoint exists"
        kind = type(storage.explain(error, "", self.directory))
        reason = str(error).splitlines()[0][:600]  # paths come before the cause
        return kind(f"cannot save step {step} in {self.directory} ({reason}){rest}")

    def _prune(self) -> None:
        """Remove what lies behind the newest `keep` steps that can be restored.

        A damaged step counts for none, wherever it is: its seal may well be later than all that
        this run has made. One that is later stays until the run comes by and replaces it.
        """
        kept, every = 0, self.config.keep_every
        for step in reversed(steps(self.directory)):
            if kept < self.config.keep:
                if step not in self._whole:
                    self._whole[step] = _damage(self.directory, step) is None
                kept += self._whole[step]
            elif step != self.pinned and (not every or step % every):
                # The seal goes first: a step without one is no step.
                storage.remove(_seal(self.directory, step))
                storage.remove(self._data(step))


class Schedule:
    """Which steps are saved: every `every` steps, every `minutes` minutes, and a given one.

    All processes of a group must save at the same steps, but their clocks differ: process 0 reads
    its clock and broadcasts, at steps that all processes know in advance. Between two saves it
    checks about log2(steps) times, each time after half of the estimated remaining steps.
    """

    def __init__(self, config: CheckpointConfig, first_step: int, also: int = 0):
        self.every, self.seconds, self.also = config.every, 60 * config.minutes, also
        self.restart(first_step)

    def should_save(self, step: int) -> bool:
        """Whether to save after `step` steps; every process must call this after every step."""
        if step == self.also or (self.every and step % self.every == 0):
            return True
        if not self.seconds or step < self._next:
            return False
        wait = distributed.broadcast(self._wait(step))
        self._at, self._next = step, step + wait
        return wait == 0

    def restart(self, step: int) -> None:
        """Start a new interval: `step` was saved, or is the first step."""
        self._saved = self._checked = time.monotonic()
        self._at, self._next = step, step + 1

    def _wait(self, step: int) -> int:
        """Steps until the next check; 0 to save now."""
        now = time.monotonic()
        left = self.seconds - (now - self._saved)
        pace = (now - self._checked) / max(step - self._at, 1)  # seconds a step
        self._checked = now
        if left <= 0:
            return 0
        return max(1, int(left / max(pace, 1e-9) / 2))


class Found(NamedTuple):
    """A checkpoint to continue from.

    Attributes:
        place: its directory among those that were looked at.
        seal: the content of its seal.
    """

    directory: Path
    place: int
    step: int
    seal: dict[str, Any]


def restore(
    directories: Sequence[Path],
    abstract: Any,
    about: dict[str, Any],
    log: Callable[[str], None],
    note: Callable[[int, int, bool], None] = lambda *_: None,
) -> Any | None:
    """The newest undamaged state in any of several checkpoint directories, or None.

    Args:
        abstract: shapes, dtypes and shardings of the state.
        log, note: as in `newest`.
    Raises:
        UserError: an undamaged checkpoint belongs to another run.
    """
    found = newest(directories, log, note)
    return found and load(found, abstract, about)


def newest(
    directories: Sequence[Path],
    log: Callable[[str], None],
    note: Callable[[int, int, bool], None] = lambda *_: None,
    *,
    donors: Sequence[Path] = (),
    donates: Callable[[dict[str, Any]], bool] = lambda seal: True,
) -> Found | None:
    """The newest undamaged checkpoint in any of several directories, or None.

    Process 0 verifies the checksums and broadcasts which one, so that all processes agree.

    Args:
        directories: of one run.
        log: receives one line for each damaged checkpoint that is skipped.
        note: receives for each checkpoint that was examined the place of its directory, its step
            and whether it is undamaged.
        donors: directories of other runs, whose places come behind those of `directories`.
        donates: whether one may continue from a donor's checkpoint, given its seal.
    """
    places = [*directories, *donors]
    known = None
    if distributed.is_writer():
        found = [(step, place) for place, d in enumerate(places) for step in steps(d)]
        own = len(directories)
        found = [(step, i) for step, i in found if i < own or _donates(places[i], step, donates)]
        known = _newest(places, sorted(found, key=lambda pair: (-pair[0], pair[1])), log, note)
    known = distributed.broadcast(known)
    if known is None:
        return None
    step, place = known
    seal = _read_seal(places[place], step)
    if distributed.broadcast(seal is None):  # its run has pruned it since
        return newest(directories, log, note, donors=donors, donates=donates)
    return Found(places[place], place, step, seal)


def _read_seal(directory: Path, step: int) -> dict[str, Any] | None:
    """None where it is damaged, or was removed since it was listed."""
    try:
        return json.loads(storage.read(_seal(directory, step)))
    except storage.Unreachable:
        raise
    except (UserError, ValueError):
        return None


def _donates(directory: Path, step: int, donates: Callable[[dict[str, Any]], bool]) -> bool:
    seal = _read_seal(directory, step)
    return seal is not None and donates(seal)


def _newest(
    directories: Sequence[Path],
    found: Sequence[tuple[int, int]],
    log: Callable[[str], None],
    note: Callable[[int, int, bool], None],
) -> tuple[int, int] | None:
    """The first (step, place in `directories`) of `found` that is undamaged."""
    for step, place in found:
        damage = _damage(directories[place], step)
        note(place, step, damage is None)
        if damage is None:
            return step, place
        last = (step, place) == found[-1]
        then = "no other is left: starting at step 0" if last else "trying the previous one"
        log(f"checkpoint {_data(directories[place], step)} is damaged ({damage}); {then}")
    return None


def _damage(directory: Path, step: int) -> str | None:
    try:
        expected = json.loads(storage.read(_seal(directory, step)))["files"]
    except storage.Unreachable:
        raise
    except (UserError, ValueError, KeyError):
        return "the list of checksums is unreadable"
    actual = storage.checksums(_data(directory, step))
    for name, sums in expected.items():
        if not storage.same_sums(actual.get(name), sums):
            return f"{name} {'has changed' if name in actual else 'is missing'}"
    return None


def load(found: Found, abstract: Any, about: dict[str, Any]) -> Any:
    """The state of a checkpoint; all processes of a group must call this.

    Args:
        abstract: shapes, dtypes and shardings of the state.
        about: identities that the seal must have.
    Raises:
        UserError: it belongs to another run, or is of another layout.
    """
    from orbax.checkpoint import v1 as ocp

    directory, step, seal = found.directory, found.step, found.seal
    if seal.get("layout") != LAYOUT:
        raise UserError(
            f"{_data(directory, step)}: the parameters have layout {seal.get('layout')}, this "
            f"version reads layout {LAYOUT}; train again, or use the version that saved it"
        )
    saved = seal["about"]
    for key, value in about.items():
        if saved.get(key) != value:
            raise UserError(
                f"{_data(directory, step)}: belongs to another run ({key} is {saved.get(key)}, "
                f"expected {value}); use a new directory"
            )
    with _quiet_orbax(), tempfile.TemporaryDirectory(prefix="prime_jax-") as here:
        source = _data(directory, step)
        if _is_uploaded(directory):
            storage.download(source, LocalPath(here))
            source = LocalPath(here)
        elif not storage.is_remote(directory):
            source = source.absolute()
        return ocp.load(source, abstract)


def load_from_donor(found: Found, abstract: Any, about: dict[str, Any]) -> Any | None:
    """`load` from the checkpoint of another run; None, on all processes, if that run has pruned it
    meanwhile. Its seal goes first, so what was read while that is still there is whole."""
    state, error = None, None
    try:
        state = load(found, abstract, about)
    except Exception as caught:  # orbax raises many types for files that are gone
        error = caught
    if distributed.broadcast(not is_sealed(found.directory, found.step)):
        return None
    if error is not None:
        raise error
    return state


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silence orbax, which warns about its defaults and logs exceptions that it also raises."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
