"""A table of runs: a row for each run, cells as they were read, and what a cell means."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prime_jax.errors import UserError

KINDS = ("nll", "nelbo", "train_loss")  # of losses
DONE = ("done", "finished", "completed", "complete", "succeeded", "success", "ok")
WANDB = ("finished", "running", "crashed", "failed", "killed", "preempting", "preempted", "pending")
WITH_COMMA = re.compile(r"^\d+(,\d+)+(\.\d*)?$")  # 1,000,000 or 3,75


Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows as they were read, the name of each for messages, and the hash of the data."""

    rows: list[Row]
    names: list[str]  # "row 7", or "run 3fa9..."
    columns: list[str]
    source: str
    sha256: str
    read_as: Mapping[str, str] = field(default_factory=dict)  # {name here: what it was read from}


def of_columns(columns: Any, source: str = "data") -> Table:
    """A table of columns by name: a dict of sequences, or a data frame as pandas has it.

    Raises:
        UserError: it is neither, or its columns differ in length.
    """
    try:
        named = {one_line(str(name)): list(columns[name]) for name in columns.keys()}  # noqa: SIM118
    except (AttributeError, TypeError):
        kind = type(columns).__name__
        raise UserError(
            f"{kind} is no table of runs; give a path, a data frame or a dict of columns"
        ) from None
    lengths = {name: len(cells) for name, cells in named.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"{source}: its columns differ in length: {shown}")
    rows = [
        dict(zip(named, map(_cell, cells), strict=True))
        for cells in zip(*named.values(), strict=True)
    ]
    if not rows:
        raise UserError(f"{source}: no runs in it")
    hashed = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    names = [f"row {k}" for k in range(len(rows))]
    return Table(rows, names, list(named), source, hashed)


def _cell(value: Any) -> Any:
    """A number or a text; empty for what stands for no value (None, NaN, NA, NaT)."""
    if hasattr(value, "item"):  # numpy's scalars
        value = value.item()
    if value is None or str(value) in ("nan", "<NA>", "NaT"):
        return ""
    return value if isinstance(value, int | float) else one_line(str(value))


def one_line(cell: str) -> str:
    """Without space around it; names with line breaks in them are said in one line, too."""
    return " ".join(cell.splitlines()).strip()


def text(row: Row, column: str, default: str = "") -> str:
    value = row.get(column)
    return default if value is None or value == "" else str(value)


def number(row: Row, column: str) -> float:
    """The cell as a float; NaN where there is none, or no number."""
    value = row.get(column)
    try:
        return float(value) if value not in (None, "") else math.nan
    except (TypeError, ValueError, OverflowError):
        return math.nan


def status(row: Mapping[str, Any]) -> str:
    """What became of a run: "done", another word, or "" where the table does not say.

    It is said by `status`, or by `State` in the words of W&B.
    """
    state = text(row, "State") or text(row, "state")
    word = text(row, "status") or (state if state.lower() in WANDB else "")
    return "done" if word.lower() in DONE else word


def require(table: Table, column: str, good: Sequence[bool], problem: str) -> None:
    """Check a column, cell by cell.

    Raises:
        UserError: naming the first rows that are not good, and what they hold.
    """
    bad = [k for k, ok in enumerate(good) if not ok]
    if bad:
        if any(WITH_COMMA.search(text(table.rows[k], column)) for k in bad):
            problem = f"{column} has commas inside numbers; write 1000000 and 3.75"
        cells = (
            f"{table.names[k]} has {text(table.rows[k], column)!r}".replace("''", "nothing")
            for k in bad[:4]
        )
        rest = f" (and {len(bad) - 4} more rows)" if len(bad) > 4 else ""
        raise UserError(f"{table.source}: {problem}: {', '.join(cells)}{rest}")
