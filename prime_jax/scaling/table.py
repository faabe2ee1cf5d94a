"""Reading what a fit starts from: a table of runs, its columns, and what was logged on the way.

A table is a CSV of anybody's (or the same as JSON: a list of objects), or the directory of a sweep,
with a row for each run; `choose_columns` says which of its columns are read. Logs are those of a sweep, or a CSV as W&B exports it: long
(columns run, step or tokens, loss), or wide (Step, then `<run> - <metric>` and its `__MIN` and
`__MAX` for each run).
"""

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from prime_jax.errors import UserError
from prime_jax.runtime.records import best_valid
from prime_jax.scaling.settings import DEFAULT_FLOPS, DEFAULT_METRIC, DEFAULT_PARAMS, Choice
from prime_jax.settings import nearest

KINDS = ("nll", "nelbo", "train_loss")  # of losses
MAX_ROWS = 100_000  # one row is one run; more than this is a training log
MAX_CURVE_ROWS = 500_000
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
PACKED = {b"\x1f\x8b": "gzip", b"PK": "a zip or Excel file", b"PAR1": "Parquet"}  # by first bytes
AS_GIVEN = "as given"  # plain `flops` and `params` columns, whatever they count
MIN_EVALUATIONS = 3  # that make a curve
WIDE = re.compile(r"(?P<run>.+) - (?P<metric>.+?)(?P<bound>__MIN|__MAX)?")
DONE = ("done", "finished", "completed", "complete", "succeeded", "success", "ok")
WANDB = ("finished", "running", "crashed", "failed", "killed", "preempting", "preempted", "pending")
# Words by which columns of others are recognised, the likeliest first.
MEANT = {
    "family": ("family", "model", "arch", "architecture", "method", "group", "experiment"),
    "loss": ("loss", "nll"),
    "params": ("params", "parameters", "param", "n"),
    "tokens": ("tokens", "token", "d"),
    "flops": ("flops", "flop", "compute", "c"),
}
CLOCKS = ("tokens", "step", "_step", "global_step", "trainer/global_step")
RUNS = ("run", "name", "run_name")


@dataclass(frozen=True)
class Table:
    """Rows as they were read, the name of each for messages, and the hash of the data."""

    rows: list[dict[str, Any]]
    names: list[str]  # "row 7", or "run 3fa9..."
    columns: list[str]
    source: str
    sha256: str


def read(source: Path) -> Table:
    """Read a CSV or JSON file, or a sweep directory.

    Raises:
        UserError: nothing there, not readable, or not a table of runs.
    """
    if source.is_dir():
        return _read_sweep(source)
    return read_csv(source)


def renamed(table: Table, names: Mapping[str, str]) -> Table:
    """The table with columns called as they are here; `names` holds their own: {"loss": "val_loss"}.

    A column that had the new name before is left out.

    Raises:
        UserError: such a column is not there, or stands for two.
    """
    for wanted in names.values():
        if wanted not in table.columns:
            raise UserError(
                f"{table.source}: no column {wanted!r}{nearest(wanted, table.columns)} (of --columns)"
            )
    new = {theirs: ours for ours, theirs in names.items()}
    if len(new) < len(names):
        raise UserError("--columns: one column stands for two")
    kept = [name for name in table.columns if name in new or name not in names]
    rows = [{new.get(name, name): row[name] for name in kept if name in row} for row in table.rows]
    return replace(table, rows=rows, columns=[new.get(name, name) for name in kept])


def status(row: Mapping[str, Any]) -> str:
    """What became of a run: "done", another word, or "" where the table does not say.

    It is said by `status`, or by `State` in the words of W&B.
    """
    state = text(row, "State") or text(row, "state")
    word = text(row, "status") or (state if state.lower() in WANDB else "")
    return "done" if word.lower() in DONE else word


def of_columns(columns: Any, source: str = "data") -> Table:
    """A table of columns by name: a dict of sequences, or a data frame as pandas has it.

    Raises:
        UserError: it is neither, or its columns differ in length.
    """
    try:
        named = {_one_line(str(name)): list(columns[name]) for name in columns.keys()}  # noqa: SIM118
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
    return value if isinstance(value, int | float) else _one_line(str(value))


def _one_line(cell: str) -> str:
    """Without space around it; names with line breaks in them are said in one line, too."""
    return " ".join(cell.splitlines()).strip()


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
        columns = [_one_line(name) for name in next(lines, [])]
        while columns == ["sep=", ""] or not columns or columns[0].startswith("# "):
            columns = [_one_line(name) for name in next(lines)]  # a hint to Excel, or a comment
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
            rows.append(dict(zip(columns, map(_one_line, cells), strict=True)))
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


@dataclass(frozen=True)
class Columns:
    """Column names; "" for the one of flops, params, tokens that C = 6 N D gives."""

    loss: str
    loss_se: str
    kind: str
    flops: str
    params: str
    tokens: str
    flops_convention: str
    params_convention: str


def choose_columns(table: Table, choice: Choice) -> Columns:
    """Raises UserError for a column that is not there, with what there is."""
    if any(name.endswith(("__MIN", "__MAX")) for name in table.columns):
        raise UserError(
            f"{table.source}: training curves as W&B exports them; give a CSV with a row for each run (run, family, params, tokens), and this one with --curves"
        )
    missing = [] if "family" in table.columns else ["family"]
    loss, loss_se, kind = _loss(table, choice.metric)
    missing += [] if loss in table.columns else [loss]
    flops, flops_convention = _convention(table, "flops", choice.flops, DEFAULT_FLOPS)
    params, params_convention = _convention(table, "params", choice.params, DEFAULT_PARAMS)
    found = {name: name if name in table.columns else "" for name in (flops, params, "tokens")}
    absent = [name for name, column in found.items() if not column]
    missing += absent if len(absent) > 1 else []
    if missing:
        raise UserError(f"{table.source}: {_lacks(table, missing, absent)}")
    if flops in absent:
        flops_convention = "6 N D"
    columns = found[flops], found[params], found["tokens"]
    return Columns(loss, loss_se, kind, *columns, flops_convention, params_convention)


def _loss(table: Table, metric: str) -> tuple[str, str, str]:
    if metric == DEFAULT_METRIC:
        return "loss", "loss_se", "kind"
    names = f"loss_{metric}", f"se_{metric}", f"kind_{metric}"
    if names[0] not in table.columns:
        others = [c.removeprefix("kind_") for c in table.columns if c.startswith("kind_")]
        known = f"metrics here: {', '.join([DEFAULT_METRIC, *others])}" if others else _has(table)
        raise UserError(f"{table.source}: no column {names[0]!r}; {known}")
    return names


def _lacks(table: Table, missing: list[str], absent: list[str]) -> str:
    """All the columns that are missing, what there is, and which of that may be meant."""
    named = ", ".join(map(repr, missing))
    two = " (two of flops, params, tokens are needed)" if len(absent) > 1 else ""
    what = "columns" if len(missing) > 1 else "column"
    free = [name for name in table.columns if name not in (*MEANT, "kind", "run", "seed", "budget")]
    numbers = [name for name in free if number(table.rows[0], name) > 0]
    texts = [name for name in free if name not in numbers]
    near = {
        name: found
        for name in missing
        if (found := _likeliest(name, texts if name == "family" else numbers))
    }
    pairs = ",".join(f"{ours}={theirs}" for ours, theirs in near.items())
    hint = f"; if these are meant, say --columns {pairs}" if pairs else ""
    return f"no {what} {named}{two}; {_has(table)}{hint}"


def _likeliest(wanted: str, columns: list[str]) -> str:
    """The column whose words are nearest to a name, or ""."""

    known = MEANT.get(wanted, ())

    def distance(name: str) -> tuple[bool, int, int]:
        words = re.findall("[a-z]+", name.lower())
        said = words if len(words) == 1 else [word for word in words if len(word) > 1]
        first = min((known.index(word) for word in said if word in known), default=len(known))
        return "train" in words, first, len(words)

    best = min(columns, key=distance, default="")
    return best if best and distance(best)[1] < len(known) else ""


def _has(table: Table) -> str:
    shown = ", ".join(table.columns[:20]) + (", ..." if len(table.columns) > 20 else "")
    return f"it has {shown}"


def _convention(table: Table, quantity: str, wanted: str | None, default: str) -> tuple[str, str]:
    """The column that counts a quantity, and the name of the convention."""
    column = f"{quantity}_{wanted or default}"
    if column in table.columns:
        return column, wanted or default
    if wanted:
        known = [c for c in table.columns if c.startswith(f"{quantity}_")]
        has = f"it has {', '.join(known)}" if known else f"its {quantity} are taken as they are"
        raise UserError(f"{table.source}: no column {column!r}; {has}")
    return quantity, AS_GIVEN


@dataclass
class Log:
    """One run: losses along its clock, and the learning rate along its own."""

    clock: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    lr_clock: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    kind: str = ""
    schedule: str = ""  # "decays" where that is known without the rates
    tokens_per_step: float = float("nan")


@dataclass(frozen=True)
class Logs:
    """Of many runs, by name; the clocks count `tokens` or steps."""

    runs: dict[str, Log]
    in_tokens: bool
    source: str


def load_logs(source: Path, metric: str) -> Logs:
    """Raises UserError: nothing there, or no training curves (with the rows that are wrong)."""
    if source.is_dir():
        return _of_sweep(source, metric)
    return logs_of_table(read_csv(source, MAX_CURVE_ROWS))


def logs_of_table(table: Table) -> Logs:
    """A CSV, long or wide; cells without a loss are no points."""
    if is_wide(table.columns):
        table = _melt(table)
    clock, run = (_column(table, names) for names in (CLOCKS, RUNS))
    loss = _loss_column(table)
    rows = [
        (row, name) for row, name in zip(table.rows, table.names, strict=True) if text(row, loss)
    ]
    if not rows:
        raise UserError(f"{table.source}: column {loss!r} is empty")
    table = Table(*(list(side) for side in zip(*rows, strict=True)), *_rest(table))
    clocks = np.array([number(row, clock) for row in table.rows])
    losses = np.array([number(row, loss) for row in table.rows])
    require(table, clock, clocks >= 0, f"{clock} must be a number, 0 or more")
    require(table, loss, (losses > 0) & np.isfinite(losses), "loss must be a number above 0")
    require(table, run, [text(row, run) != "" for row in table.rows], f"{run} is empty")
    known = f"kind must be one of {', '.join(KINDS)}"
    require(table, "kind", [text(row, "kind") in ("", *KINDS) for row in table.rows], known)
    guess = "train_loss" if "train" in loss else ""
    logs: dict[str, Log] = {}
    seen: dict[tuple[str, float], str] = {}
    for row, name, at, value in zip(table.rows, table.names, clocks, losses, strict=True):
        key = text(row, run), float(at)
        if key in seen:
            raise UserError(
                f"{table.source}: {seen[key]} and {name} are the same {clock} of run {key[0]}; drop one"
            )
        seen[key] = name
        log = logs.setdefault(key[0], Log(kind=text(row, "kind", guess)))
        log.clock.append(key[1])
        log.loss.append(float(value))
        log.tokens_per_step = number(row, "tokens_per_step")
        rate = number(row, "lr")
        if rate >= 0:
            log.lr_clock.append(key[1])
            log.lr.append(rate)
    if all(len(set(log.lr)) < 2 for log in logs.values()):
        for log in logs.values():  # the peak rate of each run, not its schedule
            log.lr_clock, log.lr = [], []
    return Logs(logs, clock == "tokens", table.source)


def is_wide(columns: list[str]) -> bool:
    return len(columns) > 1 and all(WIDE.fullmatch(name) for name in columns[1:])


def _rest(table: Table) -> tuple[list[str], str, str]:
    return table.columns, table.source, table.sha256


def _column(table: Table, names: tuple[str, ...]) -> str:
    for name in names:
        if name in table.columns:
            return name
    raise UserError(
        f"{table.source}: no column {' or '.join(map(repr, names[:2]))} for training curves; it has {_shown(table.columns)}"
    )


def _loss_column(table: Table) -> str:
    """`loss`, or the only column whose name ends so (`train/loss`, `val_loss`)."""
    if "loss" in table.columns:
        return "loss"
    found = [name for name in table.columns if name.lower().endswith("loss")]
    if len(found) != 1:
        what = f"several losses ({', '.join(found)}); keep one" if found else "no column 'loss'"
        raise UserError(f"{table.source}: {what}; it has {_shown(table.columns)}")
    return found[0]


def _shown(columns: list[str]) -> str:
    rest = f" and {len(columns) - 8} more" if len(columns) > 8 else ""
    return ", ".join(columns[:8]) + rest


def _melt(table: Table) -> Table:
    """Wide to long."""
    first = table.columns[0]
    if "token" in first.lower():
        clock = "tokens"
    elif first.lower().endswith("step"):
        clock = "step"
    else:
        raise UserError(
            f"{table.source}: its first column is {first!r}; export the chart over steps or tokens"
        )
    cells = {name: WIDE.fullmatch(name) for name in table.columns[1:]}
    cells = {
        name: match
        for name, match in cells.items()
        if not match["bound"] and match["metric"] != "_step"
    }
    metrics = sorted({match["metric"] for match in cells.values()})
    if len(metrics) != 1:
        raise UserError(
            f"{table.source}: curves of {', '.join(metrics) or 'nothing'}; export one loss"
        )
    loss = metrics[0] if metrics[0].endswith("loss") else "loss"
    rows, names = [], []
    for row, name in zip(table.rows, table.names, strict=True):
        for column, match in cells.items():
            if row[column]:
                rows.append({"run": match["run"], clock: row[first], loss: row[column]})
                names.append(name)
    if not rows:
        raise UserError(f"{table.source}: a header but no losses")
    return Table(rows, names, ["run", clock, loss], table.source, table.sha256)


def _of_sweep(root: Path, metric: str) -> Logs:
    """Evaluations along training if every finished run has enough of them, else batch losses.

    A batch loss is of other text than the evaluation set and of the objective trained, so it is a
    `train_loss` whatever the family.
    """
    from prime_jax.sweep import state

    state.check_root(root)
    training, evaluated, decaying = {}, {}, {}
    for run in state.list_runs(root):
        if (run.result or {}).get("status") != "done":
            continue
        if run.spec["config"].get("optim", {}).get("schedule") != "wsd":
            decaying[run.id] = Log(schedule="decays")
            continue
        rows = [row for k in range(run.k + 1) for row in _rows(root / "runs" / run.id / str(k))]
        name = "joint" if metric == "joint" else "loss"
        batches = {row["step"]: row[name] for row in rows if _number(row.get(name), above=0)}
        lr = {row["step"]: row["lr"] for row in rows if _number(row.get("lr"))}
        evals = {row["step"]: loss for row in rows if (loss := _evaluation(row, metric))}
        rates = {"lr_clock": list(lr), "lr": list(lr.values())}
        losses = list(batches.values())
        training[run.id] = Log(list(batches), losses, **rates, kind="train_loss")
        values = [loss["value"] for loss in evals.values()]
        kind = "+".join(sorted({loss["kind"] for loss in evals.values()}))
        evaluated[run.id] = Log(list(evals), values, **rates, kind=kind)
    enough = all(len(log.clock) >= MIN_EVALUATIONS for log in evaluated.values())
    return Logs(decaying | (evaluated if enough else training), False, root.name)


def _rows(attempt: Path) -> Iterator[dict[str, Any]]:
    """Later attempts repeat the steps that an earlier one lost; a killed one ends mid-line, and
    what is no record of a step is none."""
    try:
        lines = (attempt / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0:
            yield row


def _number(value: Any, above: float = -math.inf) -> bool:
    return type(value) in (int, float) and above < value < math.inf


def _evaluation(row: dict[str, Any], metric: str) -> dict[str, Any] | None:
    evals = row.get("eval")
    losses = [
        loss
        for loss in (evals if isinstance(evals, list) else ())
        if isinstance(loss, dict)
        and _number(loss.get("value"), above=0)
        and loss.get("kind") in KINDS
        and isinstance(loss.get("estimator"), str)
    ]
    if metric == DEFAULT_METRIC:
        return best_valid(losses)
    return next((loss for loss in losses if loss["estimator"] == metric), None)


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
        return complete(_ends(data), logs), logs
    else:
        logs = load_logs(curves, metric)
    found = source if isinstance(source, Table) else read(source)
    return complete(renamed(found, names), logs), logs


def complete(data: Table, logs: Logs) -> Table:
    """The table of runs with what the logs tell: the last loss and the tokens, where no column does.

    Raises:
        UserError: no column `run`, or a run without a curve to take its loss from.
    """
    if "run" not in data.columns:
        raise UserError(
            f"{data.source}: no column 'run'; its names tell which curve of {logs.source} belongs to which run"
        )
    if not any(text(row, "run") in logs.runs for row in data.rows):
        names = ", ".join(list(logs.runs)[:4])
        raise UserError(
            f"{logs.source}: none of its {len(logs.runs)} runs ({names}, ...) is a `run` of {data.source}"
        )
    rows = [dict(row) for row in data.rows]
    columns = list(data.columns)
    steps = [name for name in CLOCKS if name in columns]
    if "tokens" not in columns and steps and "tokens_per_step" in columns:
        columns.append("tokens")
        for row in rows:
            row["tokens"] = number(row, steps[0]) * number(row, "tokens_per_step")
    if not any(name == "loss" or name.startswith("loss_") for name in columns):
        named = [text(row, "run") in logs.runs for row in rows]
        require(data, "run", named, f"no column 'loss', and no curve in {logs.source}")
        columns += ["loss"] if "kind" in columns else ["loss", "kind"]
        for row in rows:
            log = logs.runs[text(row, "run")]
            row["loss"] = log.loss[int(np.argmax(log.clock))]
            row.setdefault("kind", log.kind)
    return Table(rows, data.names, columns, data.source, data.sha256)


def _ends(data: Table) -> Table:
    """Of a table of curves, the last row of each run: its point of the fit."""
    clock = next(name for name in CLOCKS if name in data.columns)
    last: dict[str, int] = {}
    for k, row in enumerate(data.rows):
        run = text(row, "run")
        if run not in last or number(row, clock) > number(data.rows[last[run]], clock):
            last[run] = k
    keep = sorted(last.values())
    rows, names = [data.rows[k] for k in keep], [data.names[k] for k in keep]
    return Table(rows, names, data.columns, data.source, data.sha256)
