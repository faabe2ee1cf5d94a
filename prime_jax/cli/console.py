"""What people see: tables, lines, one progress display, one picture that renews itself.

The border at which text from files and users is escaped: nothing here reads markup in a cell or
a line.
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
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

from prime_jax.table import Cell, Table

WIDE = 200  # columns where nobody says how many: in files and pipes
FIRST_SECONDS, LINE_SECONDS = 10.0, 60.0  # to the first line without a terminal; between them


COLOURS = {"": "", "good": "green", "bad": "red", "notable": "yellow"}  # of cells


def console(*, stderr: bool = False) -> Console:
    """Of the terminal's width; wide where there is none and COLUMNS does not say."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made = Console(stderr=stderr, highlight=False, width=WIDE)
    return made


def show(table: Table, out: Console | None = None) -> None:
    """Draw a table. Where it is too wide, columns of one value are said once below it, then cells
    fold; nothing is lost."""
    out = out or console()
    drawn = _drawn(table, gap=2)
    if _width(drawn, out) > out.width:
        drawn = _drawn(table, gap=1)
    if _width(drawn, out) > out.width:
        table = _without_constants(table)
        drawn = _drawn(table, gap=1)
    with out.capture() as kept:
        out.print(drawn)
    padded = kept.get()
    out.file.write(padded if out.is_terminal else re.sub(r" +$", "", padded, flags=re.MULTILINE))
    for note in table.notes:
        say(note, out)


def _width(drawn: Drawn, out: Console) -> int:
    return drawn.__rich_measure__(out, out.options.update(max_width=10**4)).maximum


def _without_constants(table: Table) -> Table:
    """The columns that tell rows from each other; what is the same in all becomes the first note."""
    columns = [[str(row[i]) for row in table.rows] for i in range(len(table.head))]
    same = [i for i, cells in enumerate(columns) if len(cells) > 1 and len(set(cells)) == 1]
    if not same or len(same) == len(columns):
        return table
    pick = lambda cells: tuple(cell for i, cell in enumerate(cells) if i not in same)  # noqa: E731
    said = ", ".join(f"{table.head[i]} {columns[i][0]}".strip() for i in same if columns[i][0])
    notes = ([f"in every row: {said}"] if said else []) + list(table.notes)
    rows = list(map(pick, table.rows))
    return replace(table, head=pick(table.head), rows=rows, notes=notes, long=frozenset())


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
        whole = name == "id"  # a broken one could not be copied
        drawn.add_column(Text(name), justify=justify, overflow="fold", no_wrap=whole)
    for row in table.rows:
        drawn.add_row(*map(_text, row))
    return drawn


def _text(cell: Any) -> Text:
    return Text(str(cell), COLOURS[cell.style] if isinstance(cell, Cell) else "")


def _numeric(cell: str) -> bool:
    return not cell or cell[:1].isdigit() or (cell[:1] in "+-" and cell[1:2].isdigit())


def say(text: str, out: Console | None = None, style: str = "") -> None:
    """A line of text as it is."""
    (out or console()).print(Text(text, style=style), soft_wrap=True)


def _shown(part: Table | Text | str) -> RenderableType:
    if isinstance(part, Table):
        return Group(_drawn(part, gap=1), *map(Text, part.notes))
    return Text(part) if isinstance(part, str) else part


@contextlib.contextmanager
def picture(out: Console | None = None) -> Iterator[Callable[..., None]]:
    """Yields what shows tables and texts in the place of those that it showed before."""
    with Live(console=out or console(), auto_refresh=False) as live:

        def renew(*parts: Table | Text | str) -> None:
            live.update(Group(*map(_shown, parts)), refresh=True)

        yield renew


def error(value: float | None) -> str:
    """A standard error to four places; None is one that cannot be known."""
    return "unknown" if value is None else f"{value:.4f}"


class Progress:
    """What runs, how far it is, and lines above it; a context manager.

    A bar for each task on a terminal, elsewhere a line after ten seconds and then one a minute.

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
        times = (TextColumn("{task.fields[count]}"), left or TimeRemainingColumn())
        self._bars = Bars(
            *columns,
            *times,
            console=self.out,
            disable=not self.out.is_terminal,
            transient=transient,
        )
        self._tasks: dict[str, TaskID] = {}
        self._next = time.monotonic() + FIRST_SECONDS

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
            self._tasks[name] = self._bars.add_task(text, total=total, count="")
        count = f"{done:,.0f}/{total:,.0f}" if total else ""
        self._bars.update(
            self._tasks[name], description=text, total=total, completed=done, count=count
        )
        self._tell(text, total, done)

    def heartbeat(self, now: dict[str, Any]) -> bool:
        """What `train` says of a run on its way."""
        text = now["phase"]
        if now["tokens_per_second"]:  # else no row has been logged, and the loss is not known
            text += f" loss {now['loss']:.4f} {now['tokens_per_second']:,.0f} tokens/s"
            text += "" if now["mfu"] is None else f" MFU {now['mfu']:.2f}"
        self.show("run", text, now["steps"], now["step"])
        return True

    def doing(self, text: str) -> None:
        """What is done now; nobody knows how long it takes."""
        self.show("now", text, None, 0)

    def tick(self, text: str, total: float, more: float) -> None:
        """`more` of `total` of the task called `text` is done."""
        known = self._tasks.get(text)
        before = self._bars.tasks[known].completed if known is not None else 0
        self.show(text, text, total, before + more)

    def _tell(self, text: str, total: float | None, done: float) -> None:
        now = time.monotonic()
        if not self.out.is_terminal and now >= self._next:
            self._next = now + LINE_SECONDS
            self.log(f"{text}: {done:,.0f} of {total:,.0f}" if total else text)


def write(text: str) -> None:
    """Text for programs, as it is."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
