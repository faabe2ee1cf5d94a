"""Checks, before any work is done, that no command overwrites its own inputs."""

import os
from collections.abc import Iterable
from pathlib import Path as LocalPath

from prime_jax.errors import UserError
from prime_jax.runtime import storage
from prime_jax.runtime.storage import Path

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
