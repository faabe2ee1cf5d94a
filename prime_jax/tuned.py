"""Where choices of kernels lie: measured ones below a sweep's ROOT or in the user's cache directory,
those that a run began with in its own directory.

Of measured ones, one JSON file per kind of chip, written by `prime-jax kernels tune` or `sweep work --tune`. A
sweep's own goes first; without either, nothing counts as measured.
"""

import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from prime_jax.kernels.selection import FILE, NOTHING, Choices
from prime_jax.runtime import storage
from prime_jax.runtime.records import as_json, read_json, write_json_atomic
from prime_jax.runtime.storage import Path

FOLDER = "kernels"  # below ROOT
CACHE = "PRIME_JAX_CACHE"  # environment variable: instead of ~/.cache/prime_jax


def user_folder() -> pathlib.Path:
    """In the directory for caches of the XDG base directory specification."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get(CACHE) or pathlib.Path(cache, "prime_jax")) / FOLDER


def file_of(device_kind: str, root: Path | None = None) -> Path:
    """The table of a kind of chip: of a sweep, or of this user."""
    name = re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")
    return (root / FOLDER if root else user_folder()) / f"{name}.json"


def load(device_kind: str, root: Path | None = None) -> Choices:
    """What was measured on a kind of chip, by the sweep or else by this user.

    Raises:
        UserError: a table that is damaged, or of another version.
    """
    for place in (root, None) if root else (None,):
        file = file_of(device_kind, place)
        if storage.exists(file):
            return Choices.from_dict(read_json(file), str(file))
    return NOTHING


def save(choices: Choices, root: Path | None = None, *, replace: bool = True) -> Path:
    """Where the table now is.

    Args:
        replace: False leaves one that has come there meanwhile.
    """
    file = file_of(choices.device_kind, root)
    storage.make_folder(file.parent)
    if replace:
        write_json_atomic(file, choices.as_dict())
    else:
        storage.create(file, as_json(choices.as_dict()))
    return file


def begun(directories: Iterable[Path]) -> dict[str, Any] | None:
    """The kernels that a run recorded at its first step, from the first of its directories that has
    them (`selection.recorded` reads them); None before that."""
    files = [directory / FILE for directory in directories]
    return next((read_json(file) for file in files if storage.exists(file)), None)
