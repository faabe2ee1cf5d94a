"""What every engine is given, and the options that it declares. No JAX, no cloud library.

An engine is a module of this package with

    Options                                  a frozen dataclass: its command-line options
    render(pools, options) -> {file: text}   what would be sent
    up(pools, options, desk) -> exit code    start workers; safe to run twice
    down(sweep, options, desk) -> exit code  list and remove what `up` of this sweep made

A rendered target has APPLY, the command that takes its files, in place of `up` and `down`.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from prime_jax.costs import Prices
from prime_jax.errors import UserError
from prime_jax.slices import Slice

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sweep:
    """A sweep as engines name it.

    Attributes:
        root: absolute path or URL; it makes the name, so that `down` finds what `up` made.
    """

    root: str

    @classmethod
    def at(cls, root: Any) -> "Sweep":
        text = str(root).rstrip("/")
        return cls(text if "://" in text else str(Path(text).resolve()))

    @property
    def name(self) -> str:
        """Beginning of the names of everything that engines make for this sweep."""
        return f"prime-{hashlib.sha256(self.root.encode()).hexdigest()[:6]}"

    def on_object_store(self) -> bool:
        return "://" in self.root


@dataclass(frozen=True)
class Pool:
    """Identical workers for the runs of one slice.

    Attributes:
        where: None for runs that any machine may take.
        workers: at most so many at a time.
        runs: how many are unfinished, running ones included.
        data: local folders of prepared data that these runs read.
    """

    sweep: Sweep
    where: Slice | None
    workers: int
    runs: int
    data: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.sweep.name}-{self.where.name if self.where else 'any'}"

    @property
    def want(self) -> int:
        """Workers that have something to do."""
        return min(self.workers, self.runs)

    @property
    def hosts(self) -> int:
        return self.where.hosts if self.where else 1

    def work(self) -> list[str]:
        """The worker's command, the same on every engine and host."""
        chosen = ["--slice", self.where.name] if self.where else []
        return ["sweep", "work", self.sweep.root, *chosen]

    def copies(self, source: str) -> list[tuple[str, str]]:
        """(from, to) of each data folder: SOURCE/NAME goes where the runs look for it.

        Raises:
            UserError: the runs read local folders and no source was given.
        """
        if self.data and not source:
            raise UserError(
                f"runs read {self.data[0]}; copy its folder to a bucket and add --data gs://BUCKET/DIR"
            )
        return [(f"{source.rstrip('/')}/{PurePosixPath(path).name}", path) for path in self.data]


@dataclass(frozen=True)
class Desk:
    """Where engines say what they do, and ask."""

    console: Any
    yes: bool
    prices: Prices | None

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)

    def agree(self, lines: Sequence[str], question: str) -> bool:
        """Show what will be done; whether to do it.

        Raises:
            UserError: nobody is there to ask.
        """
        for line in lines:
            self.say(line)
        if self.yes:
            return True
        if not sys.stdin.isatty():
            raise UserError("nobody is here to answer; --yes does it without asking")
        return self.console.input(f"{question} [y/N] ").strip().lower() in ("y", "yes")

    def cost(self, where: Slice | None, workers: int) -> str:
        """Of so many workers, per hour."""
        if where is None or self.prices is None:
            return "cost unknown (give --prices FILE)" if where else "no accelerators"
        price = self.prices.of(where, workers)
        if price is None:
            return f"cost unknown: no {where.generation} in the price list"
        return f"{price:.2f} {self.prices.currency} per hour on demand ({self.prices.date})"


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of an engine's Options: its default, its text in --help and what argparse needs."""
    made = {"default_factory": default} if callable(default) else {"default": default}
    return field(**made, metadata={"help": help, **more})


def default_of(one: Any) -> Any:
    return one.default if one.default is not MISSING else one.default_factory()


def unfinished(root: Any) -> Iterator[Any]:
    """Runs that a worker has or may still take."""
    from prime_jax.sweep import state

    state.check_root(root)
    return (r for r in state.list_runs(root) if r.state == "running" or r.opens_in() is not None)


def pools(root: Any, workers: int, only: Slice | None = None) -> list[Pool]:
    """One pool per slice that unfinished runs were planned for.

    Args:
        root: the sweep.
        workers: at most so many per pool.
        only: the pool of this slice alone; it takes the runs planned for no slice, too.

    Raises:
        UserError: no sweep, or fewer than one worker.
    """
    from prime_jax import slices

    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1")
    groups: dict[str, list[Any]] = {}
    for run in unfinished(root):
        groups.setdefault(run.spec.get("slice") or (only.name if only else ""), []).append(run)
    if only:
        groups = {only.name: groups.get(only.name, [])}
    sweep = Sweep.at(root)
    return [
        Pool(sweep, slices.parse(name) if name else None, workers, len(runs), _data(runs))
        for name, runs in sorted(groups.items())
    ]


def _data(runs: Sequence[Any]) -> tuple[str, ...]:
    paths = {run.spec["config"]["data"]["path"] for run in runs}
    return tuple(sorted(path for path in paths if "://" not in path))


def needs(extra: str, package: str) -> UserError:
    """What to say when an engine's library is missing."""
    return UserError(f"this engine needs {package}: pip install 'prime_jax[{extra}]'")


def template(name: str) -> str:
    """A file of the repository's launch/.

    Raises:
        UserError: this is an installed wheel, which does not carry them.
    """
    path = REPO / "launch" / name
    if not path.is_file():
        raise UserError(
            f"no {path}: `up` and `render` need a checkout of prime_jax (pip install -e .)"
        )
    return path.read_text()


def options_of(engine: Any) -> dict[str, Any]:
    """Fields of an engine's Options by name."""
    return {one.name: one for one in fields(engine.Options)}
