"""Experiments are Python files: `config() -> RunConfig` for one run, `sweep() -> Sweep` for many."""

import runpy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prime_jax.config import RunConfig
from prime_jax.errors import UserError

T = TypeVar("T")


def load_config(path: str | Path) -> RunConfig:
    """The run of an experiment file, see `call`."""
    return call(path, "config", RunConfig)


def call(path: str | Path, function: str, returns: type[T]) -> T:
    """Execute an experiment file and return what its `function()` returns.

    Raises:
        UserError: no such file, a syntax error, an exception while it runs (each with its line),
            no such function, or a result of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such experiment file")
    module = _guarded(path, lambda: runpy.run_path(str(path), run_name=path.stem))
    if not callable(module.get(function)):
        raise UserError(f"{path}: must define a function {function}() -> {returns.__name__}")
    value = _guarded(path, module[function])
    if not isinstance(value, returns):
        raise UserError(
            f"{path}: {function}() returned {type(value).__name__}, not {returns.__name__}"
        )
    return value


def _guarded(path: Path, run: Callable[[], T]) -> T:
    try:
        return run()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename or path} line {error.lineno}: {error.msg}") from error
    except Exception as error:
        inside = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        line = f" line {inside[-1]}" if inside else ""
        raise UserError(f"{path}{line}: {type(error).__name__}: {error}") from error
