"""Checkpoints: orbax directories, each sealed by a list of checksums that is written last.

A step without its seal was never finished and is ignored; one whose files no longer match the seal
is named and skipped. Orbax itself restores flipped bits without a word, hence the checksums.
"""

import json
import logging
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def save(directory: Path, step: int, state: Any, about: dict[str, Any], keep: int) -> None:
    """Write one checkpoint, then drop all but the newest `keep`.

    Args:
        about: what the state belongs to (run id, codebook and data hashes); checked on restore.
    Raises:
        UserError: the disk is full or not writable; what was saved before is untouched.
    """
    from orbax.checkpoint import v1 as ocp

    directory = directory.absolute()  # orbax insists
    path = _data(directory, step)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _quiet_orbax():
            ocp.save(path, state, overwrite=True)
        write_json_atomic(
            _seal(directory, step), {"step": step, "about": about, "files": _checksums(path)}
        )
    except Exception as error:  # orbax and tensorstore raise many types for a failed write
        shutil.rmtree(path, ignore_errors=True)
        kept = steps(directory)
        rest = f"step {kept[-1]} is kept" if kept else "no earlier checkpoint exists"
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"cannot save step {step} in {directory} ({reason}); {rest}") from error
    for old in steps(directory)[:-keep]:
        _seal(directory, old).unlink(missing_ok=True)  # first: a step without a seal is no step
        shutil.rmtree(_data(directory, old), ignore_errors=True)


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
