"""What was logged on the way of a run: of a sweep, or a table as people keep it.

A table of logs is long (columns run, step or tokens, loss), or wide, as W&B exports a chart
(Step, then `<run> - <metric>` and its `__MIN` and `__MAX` for each run).
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from prime_jax.errors import UserError
from prime_jax.runtime.records import best_valid
from prime_jax.scaling.settings import DEFAULT_METRIC
from prime_jax.scaling.table import KINDS, Table, number, require, status, text

MIN_EVALUATIONS = 3  # that make a curve
WIDE = re.compile(r"(?P<run>.+) - (?P<metric>.+?)(?P<bound>__MIN|__MAX)?")
CLOCKS = ("tokens", "step", "_step", "global_step", "trainer/global_step")
RUNS = ("run", "name", "run_name")


@dataclass
class Log:
    """One run: losses along its clock, and the learning rate along its own."""

    clock: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    lr_clock: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    kind: str = ""
    schedule: str = ""  # "decays" where that is known without the rates
    tokens_per_step: float = math.nan
    end: float = math.nan  # the last step of all that the run logged, where that is known


@dataclass(frozen=True)
class Logs:
    """Of many runs, by name; the clocks count `tokens` or steps."""

    runs: dict[str, Log]
    in_tokens: bool
    source: str


def logs_of_table(table: Table) -> Logs:
    """A CSV, long or wide; cells without a loss are no points."""
    if is_wide(table.columns):
        table = _melt(table)
    clock, run = (_column(table, names) for names in (CLOCKS, RUNS))
    loss = loss_column(table)
    rows = [
        (row, name) for row, name in zip(table.rows, table.names, strict=True) if text(row, loss)
    ]
    if not rows:
        raise UserError(f"{table.source}: column {loss!r} is empty")
    table = replace(table, rows=[row for row, _ in rows], names=[name for _, name in rows])
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


def _column(table: Table, names: tuple[str, ...]) -> str:
    for name in names:
        if name in table.columns:
            return name
    raise UserError(
        f"{table.source}: no column {' or '.join(map(repr, names[:2]))} for training curves; it has {_shown(table.columns)}"
    )


def loss_column(table: Table) -> str:
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
    return replace(table, rows=rows, names=names, columns=["run", clock, loss])


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
        ended = {name: log for name, log in logs.runs.items() if log.clock}
        named = [text(r, "run") in ended or status(r) not in ("", "done") for r in rows]
        require(data, "run", named, f"no column 'loss', and no curve in {logs.source}")
        columns += ["loss"] if "kind" in columns else ["loss", "kind"]
        for row in rows:
            if log := ended.get(text(row, "run")):
                row["loss"] = log.loss[int(np.argmax(log.clock))]
                row.setdefault("kind", log.kind)
    return replace(data, rows=rows, columns=columns)


def ends(data: Table) -> Table:
    """Of a table of curves, the last row of each run: its point of the fit."""
    clock = next(name for name in CLOCKS if name in data.columns)
    last: dict[str, int] = {}
    for k, row in enumerate(data.rows):
        run = text(row, "run")
        if run not in last or number(row, clock) > number(data.rows[last[run]], clock):
            last[run] = k
    keep = sorted(last.values())
    rows, names = [data.rows[k] for k in keep], [data.names[k] for k in keep]
    return replace(data, rows=rows, names=names)


def of_sweep(root: Path, metric: str) -> Logs:
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
