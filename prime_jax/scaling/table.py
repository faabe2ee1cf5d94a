"""Reading a table of runs: a CSV of anybody's, or the directory of a sweep."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_jax.errors import UserError

MAX_ROWS = 100_000  # one row is one run; more than this is a training log
MAX_CURVE_ROWS = 500_000
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}


@dataclass(frozen=True)
class Table:
    """Rows as they were read, the name of each for messages, and the hash of the data."""

    rows: list[dict[str, Any]]
    names: list[str]  # "row 7", or "run 3fa9..."
    columns: list[str]
    source: str
    sha256: str


def read(source: Path) -> Table:
    """Read a CSV file or a sweep directory.

    Raises:
        UserError: nothing there, not readable, or not a table of runs.
    """
    if source.is_dir():
        return _read_sweep(source)
    return read_csv(source)


def read_csv(path: Path, most: int = MAX_ROWS) -> Table:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    text = _decode(data, path)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in next(lines, [])]
        if columns == ["sep=", ""]:  # a hint to Excel
            columns = [name.strip() for name in next(lines, [])]
        _check_header(columns, path)
        rows, names = [], []
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{path}, row {lines.line_num}: {len(cells)} cells, but the header has {len(columns)}"
                )
            rows.append(dict(zip(columns, (cell.strip() for cell in cells), strict=True)))
            names.append(f"row {lines.line_num}")
            if len(rows) > most:
                raise UserError(
                    f"{path}: more than {most:,} rows; a fit wants one row for each run, not a training log (--curves takes {MAX_CURVE_ROWS:,})"
                )
    except csv.Error as error:
        raise UserError(f"{path}, row {lines.line_num}: not a CSV ({error})") from error
    if not rows:
        raise UserError(f"{path}: a header but no runs")
    return Table(rows, names, columns, path.name, hashlib.sha256(data).hexdigest())


def _decode(data: bytes, path: Path) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f'{path}: UTF-16 (Excel\'s "Unicode text"); save it as "CSV UTF-8"')
    if b"\0" in data[:4096]:
        raise UserError(f"{path}: a binary file, not a CSV")
    try:
        text = data.decode("utf-8-sig")  # Excel's byte order mark is dropped
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as CSV UTF-8"
        ) from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def _check_header(columns: list[str], path: Path) -> None:
    if len(columns) == 1:
        for separator, name in SEPARATORS.items():
            if separator in columns[0]:
                raise UserError(f"{path}: columns are separated by {name}; a CSV has commas")
    if sum(_is_number(name) for name in columns) > 1:
        raise UserError(
            f"{path}: the first row holds numbers ({', '.join(columns[:4])}, ...); a header with the names of the columns is missing"
        )
    twice = {name for name in columns if name and columns.count(name) > 1}
    if twice:
        raise UserError(f"{path}: column {sorted(twice)[0]!r} appears twice")


def _read_sweep(root: Path) -> Table:
    from prime_jax.sweep import collect

    rows = collect.rows(root)
    if not rows:
        raise UserError(f"{root}: no runs in this sweep yet")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    names = [f"run {row.get('run', number)}" for number, row in enumerate(rows, 1)]
    canonical = json.dumps(rows, sort_keys=True, default=str).encode()
    return Table(rows, names, columns, root.name, hashlib.sha256(canonical).hexdigest())


def text(row: dict[str, Any], column: str, default: str = "") -> str:
    value = row.get(column)
    return default if value is None or value == "" else str(value)


def number(row: dict[str, Any], column: str) -> float:
    """The cell as a float; NaN where there is none, or no number."""
    value = row.get(column)
    try:
        return float(value) if value not in (None, "") else math.nan
    except (TypeError, ValueError):
        return math.nan


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def require(table: Table, column: str, good: Sequence[bool], problem: str) -> None:
    """Check a column, cell by cell.

    Raises:
        UserError: naming the first rows that are not good, and what they hold.
    """
    bad = [k for k, ok in enumerate(good) if not ok]
    if bad:
        cells = (
            f"{table.names[k]} has {text(table.rows[k], column)!r}".replace("''", "nothing")
            for k in bad[:4]
        )
        rest = f" (and {len(bad) - 4} more rows)" if len(bad) > 4 else ""
        raise UserError(f"{table.source}: {problem}: {', '.join(cells)}{rest}")
