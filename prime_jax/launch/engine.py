"""The interface of engines: sweeps, pools, options, dialogue. Imports no JAX or cloud library.

An engine is a module of this package with

    Options                                       a frozen dataclass of flags (`settings.Flags`)
    render(sweep, options) -> {file: text}        what would be submitted
    up(sweep, options, dialogue) -> exit code     start workers; idempotent
    down(sweep, options, dialogue) -> exit code   list and remove what `up` created

A target that is only rendered has APPLY, the command for its files, instead of `up` and `down`.

Every engine starts the same command, `Pool.work`, and never sees a run. `up` compares `Sweep.pools`
with what is there under `Pool.name`, and confirms the difference and its cost. Hosts of one worker
are given PRIME_COORDINATOR, PRIME_PROCESSES and PRIME_PROCESS_ID (`runtime.distributed`). SIGTERM
reaches the worker, which needs a minute; it exits with 0 (nothing left), 1 (a run failed) or 85
(saved; start it again).
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Template
from typing import TYPE_CHECKING, Any

from prime_jax import shipped
from prime_jax.errors import UserError
from prime_jax.hardware.slices import Slice

if TYPE_CHECKING:
    from prime_jax.hardware.prices import Prices

PLAIN = re.compile(r"[A-Za-z/][\w./@-]*(:[\w./@-]+)*", re.ASCII)  # what YAML reads as text
NOT_TEXT = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sweep:
    """A sweep for engines: a name, and pools that are counted at every call.

    Attributes:
        root: absolute path or URL; determines the name, so that `down` finds what `up` created.
        source: the same as a `Path`.
        workers: maximum per pool.
        only: restrict to the pool of this slice, which then includes runs without a slice.
    """

    root: str
    source: Any
    workers: int = 1
    only: Slice | None = None

    @property
    def name(self) -> str:
        """Prefix of the names of everything that engines create for this sweep."""
        return f"prime-{hashlib.sha256(self.root.encode()).hexdigest()[:6]}"

    @property
    def notes(self) -> Any:
        """Folder for files of engines and their machines."""
        return self.source / "launch"

    def on_object_store(self) -> bool:
        return "://" in self.root

    def pools(self) -> "list[Pool]":
        """One pool per slice that runs were planned for.

        Raises:
            UserError: there is no sweep at `root`.
        """
        from prime_jax.hardware import slices
        from prime_jax.sweep import state

        state.check_root(self.source)
        groups: dict[str, list[Any]] = {}
        for run in state.list_runs(self.source):
            name = run.slice or (self.only.name if self.only else "")
            unfinished = run.state == "running" or run.opens_in() is not None
            groups.setdefault(name, []).extend([run] if unfinished else [])
        if self.only:
            groups = {self.only.name: groups.get(self.only.name, [])}
        return [
            Pool(self, slices.parse(name) if name else None, len(runs), _data(runs))
            for name, runs in sorted(groups.items())
        ]

    def busy_pools(self) -> "list[Pool]":
        """The pools with unfinished runs."""
        return [pool for pool in self.pools() if pool.runs]


def sweep_at(root: Any, workers: int = 1, only: Slice | None = None) -> Sweep:
    """The sweep at a path or URL.

    Raises:
        UserError: fewer than one worker.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    text = str(root).rstrip("/")
    return Sweep(text if "://" in text else str(Path(text).resolve()), root, workers, only)


@dataclass(frozen=True)
class Pool:
    """Identical workers for the runs of one slice.

    Attributes:
        slice_: None for runs that any machine may take.
        runs: number of unfinished runs, including running ones.
        data: local folders of prepared data that these runs read.
    """

    sweep: Sweep
    slice_: Slice | None
    runs: int
    data: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.sweep.name}-{self.slice_.name if self.slice_ else 'any'}"

    @property
    def want(self) -> int:
        """Number of workers that are needed."""
        return min(self.sweep.workers, self.runs)

    @property
    def hosts(self) -> int:
        return self.slice_.hosts if self.slice_ else 1

    def work(self) -> list[str]:
        """The worker's command, the same on every engine and host."""
        chosen = ["--slice", self.slice_.name] if self.slice_ else []
        return ["sweep", "work", self.sweep.root, *chosen]

    def mounts(self, source: str) -> list[tuple[str, str]]:
        """(from, to) of each data folder: SOURCE/NAME is mounted at the path in the config.

        Raises:
            UserError: the runs read local folders and no source was given.
        """
        if self.data and not source:
            raise UserError(
                f"runs read {self.data[0]}; copy its folder to a bucket and add "
                "--data gs://BUCKET/DIR"
            )
        return [(f"{source.rstrip('/')}/{PurePosixPath(path).name}", path) for path in self.data]


@dataclass(frozen=True)
class Dialogue:
    """What engines tell and ask.

    Attributes:
        log: shows a line.
        ask: puts a question; whether the answer was yes. Raises UserError if nobody can answer.
        yes: every answer is yes, without a question.
    """

    log: Callable[[str], None]
    ask: Callable[[str], bool]
    yes: bool
    prices: "Prices | None"

    def confirm(self, lines: Sequence[str], question: str) -> bool:
        """Show the planned actions and ask whether to do them."""
        for line in lines:
            self.log(line)
        return self.yes or self.ask(question)

    def cost(self, slice_: Slice | None, workers: int) -> str:
        """Text: cost of the workers per hour."""
        if slice_ is None or self.prices is None:
            return "cost unknown (give --prices FILE)" if slice_ else "no accelerators"
        price = self.prices.of(slice_, workers)
        if price is None:
            return f"cost unknown: no {slice_.generation} in the price list"
        return f"{price:.2f} {self.prices.currency} per hour on demand ({self.prices.date})"


def _data(runs: Sequence[Any]) -> tuple[str, ...]:
    return tuple(sorted({run.spec["config"]["data"]["path"] for run in runs}))


def needs(extra: str, package: str) -> UserError:
    """The error for a missing library of an engine."""
    return UserError(f"this engine needs {package}: pip install 'prime_jax[{extra}]'")


def template(name: str) -> str:
    """A file of launch/."""
    return (shipped.place("launch") / name).read_text()


def fill(file: str, **values: Any) -> str:
    """A file of launch/ with its $names replaced.

    A list replaces a line that contains only its $name, one line per element with the same
    indentation; an empty list removes the line.
    """
    lines: list[str] = []
    for line in template(file).splitlines():
        value = values.get(line.strip().removeprefix("$"))
        indent = line[: len(line) - len(line.lstrip())]
        if isinstance(value, list):
            lines += [indent + one for one in value]  # as they are: a `$` of a user stays
        else:
            lines.append(Template(line).substitute(values))
    return "\n".join(lines) + "\n"


def scalar(text: str) -> str:
    """A string as YAML that reads as the same string: `on`, `123` and `a: b #c` are quoted."""
    plain = PLAIN.fullmatch(text) and text.lower() not in NOT_TEXT
    return text if plain else json.dumps(text, ensure_ascii=False)
