"""`prime-jax init`: where somebody begins who has installed the package and no checkout."""

import ast
from dataclasses import dataclass
from pathlib import Path

from prime_jax.cli.console import Table, say, show
from prime_jax.cli.parse import Arguments
from prime_jax.errors import UserError
from prime_jax.settings import REQUIRED, setting

STARTER = Path(__file__).parents[1] / "starter"


@dataclass(frozen=True)
class Init(Arguments):
    """Write a starter into DIR: experiment.py, one run and a small sweep with their arithmetic in
    comments, and README.md, the commands from data to a fit. Both run as they are on a laptop. Then
    list the presets of this package, which `preset:NAME` names wherever a command takes
    EXPERIMENT."""

    EXAMPLES = ("prime-jax init study",)

    directory: Path = setting(REQUIRED, "new or empty folder", positional=True, metavar="DIR")


def init(args: Init) -> None:
    from prime_jax import experiment

    place = args.directory
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place}: already exists; give a new or an empty folder")
    place.mkdir(parents=True, exist_ok=True)
    for file in sorted(STARTER.iterdir()):
        if file.is_file():
            (place / file.name).write_text(file.read_text())
            say(f"wrote {place / file.name}")
    rows = tuple((f"preset:{name}", _about(path)) for name, path in experiment.presets().items())
    show(Table(("preset", ""), rows, ("prime-jax sweep plan preset:c4_grid",)))


def _about(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.splitlines()[0]
