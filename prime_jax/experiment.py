"""Experiments are Python files: `config() -> RunConfig` for one run, `sweep() -> Sweep` for many.

Those that travel with the package have names of their own: `preset:c4_grid`.
"""

import dataclasses
import re
import runpy
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from prime_jax import config as configs
from prime_jax import shipped
from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.settings import nearest

T = TypeVar("T")
EXPERIMENT = re.compile(r"^def (config|sweep)\(", re.MULTILINE)


def presets() -> dict[str, Path]:
    """The experiments that travel with the package, by name."""
    files = sorted(shipped.place("experiments").glob("*.py"))
    return {path.stem: path for path in files if EXPERIMENT.search(path.read_text())}


def located(path: str | Path) -> Path:
    """The file of an EXPERIMENT, which `preset:NAME` names, too.

    Raises:
        UserError: no such preset; says the nearest.
    """
    kind, colon, name = str(path).partition(":")
    if kind != "preset" or not colon:
        return Path(path)
    known = presets()
    if name not in known:
        raise UserError(f"{path}: no such preset{nearest(name, known)}")
    return known[name]


def load_config(path: str | Path) -> RunConfig:
    """The run of an experiment file, see `call`."""
    return call(path, "config", RunConfig)


def call(path: str | Path, function: str, returns: type[T]) -> T:
    """Execute an experiment file and return what its `function()` returns.

    Raises:
        UserError: no such file, a syntax error or an exception (each with its line), no such
            function, or a result of another type.
    """
    path = located(path)
    if not path.exists():
        raise UserError(f"{path}: no such experiment file")
    if path.is_dir() or path.suffix.lower() != ".py":
        what = "is a folder; " if path.is_dir() else ""
        raise UserError(f"{path}: {what}an experiment is a Python file (.py)")
    module = guarded(path, lambda: runpy.run_path(str(path), run_name=path.stem))
    if not callable(module.get(function)):
        raise UserError(f"{path}: must define a function {function}() -> {returns.__name__}")
    value = guarded(path, module[function])
    if not isinstance(value, returns):
        raise UserError(
            f"{path}: {function}() returned {type(value).__name__}, not {returns.__name__}"
        )
    return value


def guarded(path: Path, run: Callable[[], T]) -> T:
    """`run()`, which executes code of the experiment file `path`.

    Raises:
        UserError: for any exception, with the line of the file if it is known.
    """
    try:
        return run()
    except SyntaxError as error:
        raise UserError(f"{error.filename or path} line {error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        inside = [(frame, n) for frame, n in frames if frame.f_code.co_filename == str(path)]
        frame, number = inside[-1] if inside else (None, 0)
        line = f" line {number}" if inside else ""
        known = vars(configs) | (frame.f_globals if frame else {})
        raise UserError(f"{path}{line}: {_what(error, known)}") from error


def _what(error: Exception, known: Mapping[str, Any]) -> str:
    """An exception in words; for a keyword that a class in `known` lacks, the nearest that it has."""
    if isinstance(error, UserError):  # a setting refused its value
        return str(error)
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    cls = known.get(found[1]) if found else None
    if not dataclasses.is_dataclass(cls):
        return f"{type(error).__name__}: {error}"
    valid = [f.name for f in dataclasses.fields(cls)]
    return f"{found[1]}({found[2]}=...): no such setting{nearest(found[2], valid)}"
