"""Reading what a fit starts from: CSV and JSON of anybody's, a sweep, event files, histories."""

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from prime_jax.errors import UserError
from prime_jax.runtime import storage
from prime_jax.scaling import events
from prime_jax.scaling.columns import interpret
from prime_jax.scaling.histories import Histories, History, of_table
from prime_jax.scaling.logs import Logs, complete, ends, is_wide, logs_of_table, of_sweep
from prime_jax.scaling.settings import Choice
from prime_jax.scaling.table import Table, of_columns, one_line
from prime_jax.settings import flatten

Progress = Callable[[str], None]
LINES = "*.jsonl"
TIME = re.compile(r"\d+(\.\d+)?")

MAX_ROWS = 100_000  # one row is one run; more than this is a training log
MAX_CURVE_ROWS = 500_000
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
PACKED = {b"\x1f\x8b": "gzip", b"PK": "a zip or Excel file", b"PAR1": "Parquet"}  # by first bytes


def quiet(_: str) -> None:
    """Say nothing."""


def read(source: Path, progress: Progress = quiet, most: int = MAX_ROWS) -> Table | Histories:
    """Read a CSV or JSON file, a sweep, or a directory of histories.

    Args:
        progress: called with what is being read.
        most: rows of a CSV.

    Raises:
        UserError: nothing there, not readable, or not a table of runs.
    """
    if not is_sweep(source):
        if source.is_dir():
            return _read_directory(source, progress)
        if source.match(events.PATTERN):
            raise UserError(f"{source}: one event file; give the directory of all runs")
        table = read_csv(source, most)
        return of_table(table) or table
    return _read_sweep(source)


def is_sweep(source: Any) -> bool:
    """Whether a source is the directory of a sweep.

    Raises:
        UserError: it is another directory, and in a bucket.
    """
    if not hasattr(source, "is_dir") or not source.is_dir():
        return False
    if storage.exists(source / "sweep.json"):
        return True
    if storage.is_remote(source):
        raise UserError(
            f"{source}: no sweep here; event files and histories are read from a local folder, so copy "
            "them first"
        )
    return False


def read_csv(path: Path, most: int = MAX_ROWS) -> Table:
    data = _bytes(path)
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


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _of_json(text: str, path: Path, hashed: str) -> Table:
    """Objects, in a list or a line each, or an object of columns; objects within are flattened."""
    found = _parse(text, path)
    if isinstance(found, dict) and found and all(isinstance(v, list) for v in found.values()):
        return replace(of_columns(found, path.name), sha256=hashed)
    if not (isinstance(found, list) and found and all(isinstance(row, dict) for row in found)):
        raise UserError(f"{path}: JSON, but not a list of objects, one for each run")
    rows = list(map(flatten, found))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = of_columns({name: [row.get(name) for row in rows] for name in columns}, path.name)
    return replace(table, names=[f"row {k}" for k in range(1, len(found) + 1)], sha256=hashed)


def _parse(text: str, path: Path) -> Any:
    """JSON, or the list of what its lines are."""
    lines = text.split("\n")
    try:
        first = json.loads(lines[0]) if len(lines) > 1 else None
    except (ValueError, RecursionError):
        first = None
    if not isinstance(first, dict):
        return _load(text, str(path))
    numbered = enumerate(lines, 1)
    return [_load(line, f"{path}, line {k}") for k, line in numbered if line.strip()]


def _load(text: str, where: str) -> Any:
    try:
        return json.loads(
            text, parse_constant=str
        )  # NaN is a text: null is no value, NaN a bad one
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); give a CSV or a list of objects") from error


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


def _read_directory(root: Path, progress: Progress) -> Histories:
    """Event files of TensorBoard, where a directory is a run; or files of JSON lines."""
    files = sorted(path for path in root.rglob(events.PATTERN) if path.is_file())
    lines = [] if files else sorted(root.glob(LINES))
    if not files and not lines:
        raise UserError(
            f"{root}: no sweep here (make one with: prime-jax sweep plan EXPERIMENT {root}), no event files of TensorBoard, and no histories ({LINES})"
        )
    hashed, runs = hashlib.sha256(), {}
    for place, path in enumerate(files or lines, 1):
        name = str(path.relative_to(root).parent) if files else path.stem
        progress(f"reading {name} ({place} of {len(files or lines)})")
        if files:
            data = _bytes(path)
            history = runs.setdefault(name, History())
            for logged in events.read(data, path):
                history.add(*logged)
            hashed.update(hashlib.sha256(data).digest())
        else:
            table = read_csv(path)
            found = of_table(table, run=name)
            if found is None:
                raise UserError(f"{path}: no steps in it (a key _step or step)")
            runs |= found.runs
            hashed.update(bytes.fromhex(table.sha256))
    runs = {name: history for name, history in _sessions(runs).items() if history.metrics}
    if not runs:
        raise UserError(f"{root}: event files without a scalar in them")
    return Histories(runs, root.name, hashed.hexdigest())


def _sessions(runs: dict[str, History]) -> dict[str, History]:
    """What `add_hparams` writes one level down, below the time, belongs to the run."""
    out = dict(runs)
    for name, history in runs.items():
        parent = str(PurePath(name).parent)
        if history.settings and parent in runs and TIME.fullmatch(PurePath(name).name):
            runs[parent].settings |= history.settings
            runs[parent].metrics |= {
                k: v for k, v in history.metrics.items() if k not in runs[parent].metrics
            }
            del out[name]
    return out


def load_logs(source: Path | Table, choice: Choice, progress: Progress = quiet) -> Logs:
    """Raises UserError: nothing there, or no training curves (with the rows that are wrong)."""
    if isinstance(source, Table):
        return logs_of_table(source)
    if is_sweep(source):
        return of_sweep(source, choice.metric)
    found = read(source, progress, MAX_CURVE_ROWS)
    return found.curves(choice) if isinstance(found, Histories) else logs_of_table(found)


def read_with_curves(
    source: Path | Table,
    curves: Path | Table | None = None,
    choice: Choice | None = None,
    progress: Progress = quiet,
) -> tuple[Table, Logs | None]:
    """The table of runs, and the logs of their training; sweeps and histories have their own.

    Args:
        source: a sweep directory, histories, a CSV of runs, or a table.
        curves: training curves, as a CSV or histories, another sweep, or a table; the same CSV
            where its rows are points of curves, the last row of each run being its result.
        choice: the metric of a sweep, and the columns of the table of runs.
        progress: called with what is being read.

    Raises:
        UserError: one of them cannot be read, or they do not belong together.
    """
    choice = choice or Choice()
    same = curves is not None and curves == source
    most = MAX_CURVE_ROWS if same else MAX_ROWS
    found = source if isinstance(source, Table) else read(source, progress, most)
    if isinstance(found, Histories):
        table, logs = found.interpret(choice)
    else:
        table, logs = interpret(found, choice), None
    if curves is None:
        own = of_sweep(source, choice.metric) if is_sweep(source) else logs
        return table, own
    if not same or is_sweep(source):
        logs = load_logs(curves, choice, progress)
    elif logs is None:
        if is_wide(table.columns):
            raise UserError(
                f"{source}: curves alone; give a CSV with a row for each run (run, family, params, tokens), and this one with --curves"
            )
        logs = logs_of_table(table)
        table = ends(table)
    return complete(table, logs), logs
