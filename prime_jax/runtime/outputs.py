"""What commands write where people tell them to: checked before any work is done.

No command overwrites its own inputs. A file that is named is followed through links, pipes and
devices are written into, `-` is stdout. A directory lists in `.prime_jax.json` what was made there,
with hashes: what is not in the list, or was changed since, is not ours and is not replaced.
"""

import contextlib
import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path as LocalPath
from typing import IO, Any

from prime_jax.errors import FULL, UserError
from prime_jax.runtime import storage
from prime_jax.runtime.records import read_json, write_json_atomic
from prime_jax.runtime.storage import Path

STDOUT = "-"
MADE = ".prime_jax.json"  # of a directory: {file: SHA-256, or null while it is being made}

RUN_FILES = (  # inputs in a run directory or an exported folder
    "config.json",
    "result.json",
    "metrics.jsonl",
    "codebook.npy",
    "eval.npz",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "checkpoints",
)


def refuse_overwrite(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, or lies inside an input folder.

    Symbolic links are followed; hard links, and other letter case on a case-insensitive file
    system, count as the same file.

    Raises:
        UserError: with the output and the input.
    """
    outputs = [LocalPath(out) if not storage.is_remote(out) else out for out in outputs]
    for source in inputs:
        for out in outputs:
            if _holds(source, out):
                same = os.fspath(source) == os.fspath(out)
                raise UserError(
                    f"{out} would be replaced, and is {'the' if same else f'{source}, an'} input "
                    "of this command; write somewhere else"
                )


def check_file(out: Path) -> None:
    """Raises: UserError: `out` cannot be written: no such folder, a folder itself, or read-only."""
    if is_stdout(out) or storage.is_remote(out):
        return
    if LocalPath(out).is_dir():
        raise UserError(f"cannot write {out}: it is a folder")
    if _is_special(out):  # its link may name no path: /dev/stdout -> pipe:[123]
        return _check_writable(out, LocalPath(out))
    target = LocalPath(out).resolve()
    if not target.parent.is_dir():
        raise UserError(f"cannot write {out}: no folder {target.parent}")
    _check_writable(out, target if target.exists() else target.parent)


def _check_writable(out: Path, place: LocalPath) -> None:
    writable = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH  # also for root, who may write anywhere
    if not (place.stat().st_mode & writable and os.access(place, os.W_OK)):
        raise UserError(f"cannot write {out}: {place} is read-only")


def is_stdout(out: Path) -> bool:
    return os.fspath(out) == STDOUT


def _is_special(out: Path) -> bool:
    """A pipe, a device or the like, perhaps behind a link."""
    place = LocalPath(out)
    return place.exists() and not place.is_file() and not place.is_dir()


def write(out: Path, text: str) -> None:
    """Write a whole file, atomically where it is one; see `check_file`.

    Raises:
        UserError: it cannot be written.
    """
    check_file(out)
    if storage.is_remote(out):
        return storage.write(out, text.encode())
    if not is_stdout(out) and not _is_special(out):
        return storage.write(LocalPath(out).resolve(), text.encode())
    with stream(out) as file:
        file.write(text)


@contextlib.contextmanager
def stream(out: Path) -> Iterator[IO[str]]:
    """A local file to write lines into, one after the other; see `check_file`.

    Raises:
        UserError: it cannot be opened.
    """
    check_file(out)
    if is_stdout(out):
        yield sys.stdout
        return
    with _named(out), contextlib.ExitStack() as stack:
        with storage.one_line("write", out):
            opened = LocalPath(out).open("w", encoding="utf-8", newline="")  # noqa: SIM115
        yield stack.enter_context(opened)


@contextlib.contextmanager
def _named(out: Path) -> Iterator[None]:
    """The error of a full disk says where: that of a write names no file."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and not error.filename:
            error.filename = os.fspath(out)
        raise


def check_folder(folder: Path, names: Iterable[str], *, force: bool = False) -> None:
    """Refuse a directory that cannot be written, or where one of `names` is not ours.

    Raises:
        UserError: says what is in the way.
    """
    if not storage.is_remote(folder):
        place = LocalPath(folder).resolve()
        while not os.path.exists(place):
            place = place.parent
        if not place.is_dir():
            raise UserError(f"cannot write into {folder}: {place} is a file")
        _check_writable(folder, place)
    made = {} if force else _made(folder)
    for name in [] if force else names:
        place = folder / name
        if os.path.lexists(place) and made.get(name, "") not in (None, _hash(place)):
            how = "was changed since it was made" if name in made else "was not made by prime-jax"
            raise UserError(f"{place} {how}; write somewhere else, or replace it with --force")


@contextlib.contextmanager
def folder(place: Path, names: Iterable[str], *, force: bool = False) -> Iterator[None]:
    """Within, files of these names are made in a directory; then they are ours.

    Raises:
        UserError: as `check_folder`, or the directory cannot be made.
    """
    names = list(names)
    check_folder(place, names, force=force)
    storage.make_folder(place)
    made = _made(place)
    write_json_atomic(place / MADE, made | dict.fromkeys(names))
    yield
    now = {name: _hash(place / name) for name in {*made, *names} if (place / name).is_file()}
    kept = {name: made[name] if name in made and name not in names else now[name] for name in now}
    write_json_atomic(place / MADE, dict(sorted(kept.items())))


def _made(place: Path) -> dict[str, Any]:
    with contextlib.suppress(UserError):
        found = read_json(place / MADE)
        return found if isinstance(found, dict) else {}
    return {}


def _hash(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def of_run(directories: Iterable[Path]) -> list[Path]:
    """The files and folders that make a run, in each directory of its attempts."""
    return [directory / name for directory in directories for name in RUN_FILES]


def of_sweep(root: Path) -> list[Path]:
    """The files and folders that make a sweep."""
    return [root / name for name in ("sweep.json", "state", "runs")]


def _holds(source: Path, out: Path) -> bool:
    if storage.is_remote(source) or storage.is_remote(out):
        inside, folder = os.fspath(out), os.fspath(source).rstrip("/")
        return inside == folder or inside.startswith(f"{folder}/")
    try:
        if not out.exists():
            return False
        if out.samefile(source):
            return True
    except OSError:
        return False  # missing or inaccessible: reading the source will raise
    return source.is_dir() and LocalPath(source).resolve() in out.resolve().parents
