"""What people see: one table model, one way to round, one progress display.

The border at which text from files and users is escaped: nothing here reads markup in a cell or
a line.
"""

import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.table import Table as Drawn
from rich.text import Text

WIDE = 200  # columns where nobody says how many: in files and pipes
LINE_SECONDS = 60.0  # between lines of progress where there is no terminal


@dataclass(frozen=True)
class Table:
    """Rows under a head; `notes` are lines below. A cell may carry a style: `Text("x", "red")`."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    notes: Sequence[str] = ()
    title: str = ""


def console(*, stderr: bool = False) -> Console:
    """Of the terminal's width; wide where there is none and COLUMNS does not say."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made = Console(stderr=stderr, highlight=False, width=WIDE)
    return made


def show(table: Table, out: Console | None = None) -> None:
    """Draw a table; where it is too wide its cells fold, and lose nothing."""
    out = out or console()
    drawn = _drawn(table, gap=2)
    if drawn.__rich_measure__(out, out.options.update(max_width=10**4)).maximum > out.width:
        drawn = _drawn(table, gap=1)
    with out.capture() as kept:
        out.print(drawn)
    padded = kept.get()
    out.file.write(padded if out.is_terminal else re.sub(r" +$", "", padded, flags=re.MULTILINE))
    for note in table.notes:
        say(note, out)


def _drawn(table: Table, gap: int) -> Drawn:
    drawn = Drawn(
        title=Text(table.title, "bold") if table.title else None,
        title_justify="left",
        box=None,
        padding=(0, gap, 0, 0),
        show_header=any(table.head),
        header_style="bold",
    )
    for place, name in enumerate(table.head):
        cells = [str(row[place]) for row in table.rows]
        justify = "right" if any(cells) and all(map(_numeric, cells)) else "left"
        drawn.add_column(Text(name), justify=justify, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return drawn


def _numeric(cell: str) -> bool:
    return not cell or cell[:1].isdigit() or (cell[:1] in "+-" and cell[1:2].isdigit())


def say(text: str, out: Console | None = None, style: str = "") -> None:
    """A line of text as it is."""
    (out or console()).print(Text(text, style=style), soft_wrap=True)


def rounded(value: float, ends: Sequence[float] | None = None, digits: int = 4) -> str:
    """A number to `digits` significant ones, and its interval with it: `3.412 (3.405 to 3.418)`.

    As many more as it takes to give the nearer end of the interval two digits of its distance.
    """
    if ends is not None and math.isfinite(value) and value:
        distance = min((abs(end - value) for end in ends if end not in (value, None)), default=0.0)
        if 0 < distance < math.inf:
            places = math.floor(math.log10(abs(value))) - math.floor(math.log10(distance))
            digits = min(max(digits, places + 2), 17)
    if ends is None:
        return f"{value:.{digits}g}"
    low, high = (f"{end:.{digits}g}" for end in ends)
    return f"{value:.{digits}g} ({low} to {high})"


def error(value: float | None) -> str:
    """A standard error to four places; None is one that cannot be known."""
    return "unknown" if value is None else f"{value:.4f}"


class Progress:
    """What runs, how far it is, and lines above it; a context manager.

    A bar for each task on a terminal, a line a minute elsewhere.

    Args:
        out: where; by default stdout.
        transient: the bar goes when it is done.
    """

    def __init__(
        self,
        out: Console | None = None,
        *,
        transient: bool = False,
        left: ProgressColumn | None = None,
    ):
        self.out = out or console()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(20))
        times = (MofNCompleteColumn(), left or TimeRemainingColumn())
        self._bars = Bars(
            *columns,
            *times,
            console=self.out,
            disable=not self.out.is_terminal,
            transient=transient,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told = time.monotonic()

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bars.stop()

    def log(self, line: str, style: str = "") -> None:
        """A line above the bars."""
        say(line, self.out, style)

    def show(self, name: str, text: str, total: float | None, done: float) -> None:
        """Task `name` is at `done` of `total`; the text may change from call to call."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(text, total=total)
        self._bars.update(self._tasks[name], description=text, total=total, completed=done)
        self._tell(text, total, done)

    def heartbeat(self, now: dict[str, Any]) -> bool:
        """What `train` says of a run on its way."""
        mfu = "" if now["mfu"] is None else f" MFU {now['mfu']:.2f}"
        speed = f"{now['tokens_per_second']:,.0f} tokens/s{mfu}"
        self.show(
            "run", f"{now['phase']} loss {now['loss']:.4f} {speed}", now["steps"], now["step"]
        )
        return True

    def tick(self, text: str, total: float, more: float) -> None:
        """`more` of `total` of the task called `text` is done."""
        known = self._tasks.get(text)
        before = self._bars.tasks[known].completed if known is not None else 0
        self.show(text, text, total, before + more)

    def _tell(self, text: str, total: float | None, done: float) -> None:
        now = time.monotonic()
        if not self.out.is_terminal and now - self._told >= LINE_SECONDS:
            self._told = now
            self.log(f"{text}: {done:,.0f} of {total:,.0f}" if total else text)


def write(text: str) -> None:
    """Text for programs, as it is."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
