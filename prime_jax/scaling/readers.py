"""Reading what a fit starts from: CSV and JSON of anybody's, and the directory of a sweep."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from prime_jax.errors import UserError
from prime_jax.scaling.columns import renamed
from prime_jax.scaling.logs import Logs, complete, ends, is_wide, logs_of_table, of_sweep
from prime_jax.scaling.table import Table, of_columns, one_line

MAX_ROWS = 100_000  # one row is one run; more than this is a training log
MAX_CURVE_ROWS = 500_000
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
PACKED = {b"\x1f\x8b": "gzip", b"PK": "a zip or Excel file", b"PAR1": "Parquet"}  # by first bytes


def read(source: Path) -> Table:
    """Read a CSV or JSON file, or a sweep directory.

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
    if text.lstrip()[0] in "[{":
        return _of_json(text, path, hashlib.sha256(data).hexdigest())
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [one_line(name) for name in next(lines, [])]
        while columns == ["sep=", ""] or not columns or columns[0].startswith("# "):
            columns = [one_line(name) for name in next(lines)]  # a hint to Excel, or a comment
        _check_header(columns, path)
        rows, names = [], []
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            while len(cells) > len(columns) and not cells[-1].strip():
                cells.pop()
            if len(cells) != len(columns):
                raise UserError(
                    f"{path}, row {lines.line_num}: {len(cells)} cells, but the header has {len(columns)}"
                )
            rows.append(dict(zip(columns, map(one_line, cells), strict=True)))
            names.append(f"row {lines.line_num}")
            if len(rows) > most:
                raise UserError(
                    f"{path}: more than {most:,} rows; a fit wants one row for each run, not a training log (--curves takes {MAX_CURVE_ROWS:,})"
                )
    except StopIteration:
        raise UserError(f"{path}: comments only, no runs") from None
    except csv.Error as error:
        raise UserError(f"{path}, row {lines.line_num}: not a CSV ({error})") from error
    if not rows:
        raise UserError(f"{path}: a header but no runs")
    return Table(rows, names, columns, path.name, hashlib.sha256(data).hexdigest())


def _of_json(text: str, path: Path, hashed: str) -> Table:
    """A list of objects, one for each run, or an object of columns."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); give a CSV or a list of objects") from error
    if isinstance(found, dict) and found and all(isinstance(v, list) for v in found.values()):
        return replace(of_columns(found, path.name), sha256=hashed)
    if not (isinstance(found, list) and found and all(isinstance(row, dict) for row in found)):
        raise UserError(f"{path}: JSON, but not a list of objects, one for each run")
    columns = list(dict.fromkeys(name for row in found for name in row))
    table = of_columns({name: [row.get(name) for row in found] for name in columns}, path.name)
    return replace(table, names=[f"row {k}" for k in range(1, len(found) + 1)], sha256=hashed)


def _decode(data: bytes, path: Path) -> str:
    for start, kind in PACKED.items():
        if data.startswith(start):
            raise UserError(f"{path}: {kind}; unpack it, or save it as CSV UTF-8")
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


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _read_sweep(root: Path) -> Table:
    from prime_jax.sweep import collect

    rows = collect.rows(root)
    if not rows:
        raise UserError(f"{root}: no runs in this sweep yet")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    names = [f"run {row.get('run', number)}" for number, row in enumerate(rows, 1)]
    canonical = json.dumps(rows, sort_keys=True, default=str).encode()
    return Table(rows, names, columns, root.name, hashlib.sha256(canonical).hexdigest())


def load_logs(source: Path, metric: str) -> Logs:
    """Raises UserError: nothing there, or no training curves (with the rows that are wrong)."""
    if source.is_dir():
        return of_sweep(source, metric)
    return logs_of_table(read_csv(source, MAX_CURVE_ROWS))


def read_with_curves(
    source: Path | Table,
    curves: Path | Table | None,
    metric: str,
    names: Mapping[str, str] | None = None,
) -> tuple[Table, Logs | None]:
    """The table of runs, and the logs of their training; a sweep has its own.

    Args:
        source: a sweep directory, a CSV of runs, or a table.
        curves: a CSV of training curves, another sweep, or a table; the same CSV where its rows
            are points of curves, the last row of each run being its result.
        metric: which evaluation makes the curves of a sweep.
        names: of columns of the table of runs, as for `renamed`.

    Raises:
        UserError: one of them cannot be read, or they do not belong together.
    """
    names = names or {}
    if curves is None:
        if isinstance(source, Table):
            return renamed(source, names), None
        found = renamed(read(source), names)
        return found, load_logs(source, metric) if source.is_dir() else None
    if isinstance(curves, Table):
        logs = logs_of_table(curves)
    elif curves == source and not curves.is_dir():
        data = renamed(read_csv(curves, MAX_CURVE_ROWS), names)
        if is_wide(data.columns):
            raise UserError(
                f"{source}: curves alone; give a CSV with a row for each run (run, family, params, tokens), and this one with --curves"
            )
        logs = logs_of_table(data)
        return complete(ends(data), logs), logs
    else:
        logs = load_logs(curves, metric)
    found = source if isinstance(source, Table) else read(source)
    return complete(renamed(found, names), logs), logs
