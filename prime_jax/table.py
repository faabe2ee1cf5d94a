"""One table model: the command line draws it, the report writes it as HTML, `str` gives text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Style = Literal["", "good", "bad", "notable"]


@dataclass(frozen=True)
class Cell:
    """A text, lines of small print below it, and how it is to be noticed."""

    text: str
    small: tuple[str, ...] = ()
    style: Style = ""

    def __str__(self) -> str:
        return " ".join((self.text, *(f"({line})" for line in self.small)))


@dataclass(frozen=True)
class Table:
    """Rows of cells or of what `str` shows.

    Attributes:
        head: names of the columns; empty where the first column says it all.
        notes: sentences that belong to it, one a line.
        long: columns whose cells may break into lines in HTML.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()
    title: str = ""
    long: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.rows)

    def __str__(self) -> str:
        lines = [[str(cell) for cell in row] for row in self.rows]
        named = [list(self.head)] if any(self.head) else []
        widths = [max(map(len, column)) for column in zip(*named, *lines, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in named + lines
        ]
        return "\n".join([*([self.title] if self.title else []), *text, *self.notes])
