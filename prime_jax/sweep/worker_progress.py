"""Progress display of a worker: one bar for the sweep, one for its run, log lines above them."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from prime_jax.sweep import status
from prime_jax.sweep.state import Run


@dataclass
class WorkerProgress:
    progress: Progress
    overall: TaskID
    current: TaskID

    @classmethod
    @contextlib.contextmanager
    def open(cls, console: Console) -> Iterator["WorkerProgress"]:
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            yield cls(progress, progress.add_task(""), progress.add_task("", visible=False))

    def sweep(self, runs: Sequence[Run]) -> None:
        done = sum(run.state == "done" for run in runs)
        self.progress.update(
            self.overall, description=status.counts(runs), total=len(runs), completed=done
        )

    def run(self, run: Run, heartbeat: dict[str, Any]) -> None:
        text, total = escape(status.line(run, heartbeat)), run.spec["config"]["steps"]
        self.progress.update(
            self.current,
            description=text,
            total=total,
            completed=heartbeat.get("step", 0),
            visible=True,
        )

    def log(self, text: str, style: str = "") -> None:
        self.progress.console.print(escape(text), style=style, highlight=False, soft_wrap=True)
