"""Histories of many runs: all that they logged, by step, as TensorBoard and W&B keep it.

The last values of a history are a row of the table of runs, its losses a training curve.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import Any

from prime_jax.errors import UserError
from prime_jax.scaling.columns import candidates, interpret, recognised
from prime_jax.scaling.logs import CLOCKS, Log, Logs, loss_column
from prime_jax.scaling.settings import Choice
from prime_jax.scaling.table import Row, Table, number, require, text

STEPS = CLOCKS[1:]
WANDB = ("_step",)


@dataclass
class Metric:
    """The values of one metric, by increasing step."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: float, value: float) -> None:
        """A step that comes again, after a resume, puts away what was logged from there on."""
        if self.steps and step <= self.steps[-1]:
            keep = bisect_left(self.steps, step)
            del self.steps[keep:], self.values[keep:]
        self.steps.append(step)
        self.values.append(value)


@dataclass
class History:
    """What one run logged, and its settings where it wrote them down."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    settings: Row = field(default_factory=dict)

    def add(self, name: str, step: float | None, value: Any) -> None:
        """A value of a metric, or a setting, which has no step."""
        if step is None:
            self.settings[name] = value
            return
        if name not in self.metrics:
            self.metrics[name] = Metric()
        self.metrics[name].add(step, value)

    @property
    def end(self) -> float:
        """The last step."""
        return max((metric.steps[-1] for metric in self.metrics.values()), default=math.nan)

    def last(self) -> Row:
        """The row of a table of runs."""
        row = self.settings | {name: metric.values[-1] for name, metric in self.metrics.items()}
        return row | {"step": self.end}


@dataclass(frozen=True)
class Histories:
    """Of many runs, by name."""

    runs: dict[str, History]
    source: str
    sha256: str

    def table(self) -> Table:
        """A row for each run."""
        rows = [{"run": name} | history.last() for name, history in self.runs.items()]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        names = [f"run {name}" for name in self.runs]
        return Table(rows, names, columns, self.source, self.sha256)

    def interpret(self, choice: Choice) -> tuple[Table, Logs]:
        """The table of runs, and the logs of their loss.

        Raises:
            UserError: it is not clear which metric is the loss, and as `columns.interpret`.
        """
        table = self.table()
        if "loss" in table.columns and "loss" not in choice.names:
            others = replace(table, columns=[name for name in table.columns if name != "loss"])
            if other := recognised(others, choice).get("loss"):
                raise UserError(
                    f"{self.source}: is the loss `loss` or `{other}`? Say --columns loss={other}, or loss=loss"
                )
        table = interpret(table, choice)
        if "loss" not in table.columns:  # choose_columns says so, with all else that is missing
            return table, Logs({}, False, self.source)
        logs = self._logs(*(table.read_as.get(name, name) for name in ("loss", "lr")))
        return _ended(table, logs), logs

    def curves(self, choice: Choice) -> Logs:
        """The logs alone, where another table has the runs."""
        table = self.table()
        named = {ours: name for ours, name in choice.names.items() if name in table.columns}
        known = recognised(table, choice) | named
        return self._logs(known.get("loss") or loss_column(table), known.get("lr", "lr"))

    def _logs(self, loss: str, lr: str) -> Logs:
        kind = "train_loss" if "train" in loss else ""
        logs = {}
        for name, history in self.runs.items():
            metric, rate = (history.metrics.get(tag, Metric()) for tag in (loss, lr))
            points = zip(metric.steps, metric.values, strict=True)
            good = {step: value for step, value in points if 0 < value < math.inf}
            logs[name] = Log(
                clock=[*good],
                loss=[*good.values()],
                lr_clock=rate.steps,
                lr=rate.values,
                kind=kind,
                end=history.end,
            )
        return Logs(logs, False, self.source)


def _ended(table: Table, logs: Logs) -> Table:
    """Runs with their peak rate, and those whose loss is no number as diverged."""
    rows = [dict(row) for row in table.rows]
    for row in rows:
        if rates := logs.runs[row["run"]].lr:
            row["lr"] = max(rates)
        if text(row, "loss") and not math.isfinite(number(row, "loss")):
            row.setdefault("status", "diverged")
            row.setdefault("reason", "loss is not finite")
    return replace(table, rows=rows)


def of_table(table: Table, run: str = "") -> Histories | None:
    """The histories in a table with a row for each step, or None where its rows are runs.

    Rows are steps where runs come again along W&B's own clock, or along any in JSON lines.

    Args:
        run: of which run they are, where no column says so.

    Raises:
        UserError: a row without its step.
    """
    clocks = STEPS if table.source.endswith(".jsonl") else WANDB
    clock = next((name for name in clocks if name in table.columns), None)
    column = next(iter(candidates(table, "run")), None)
    names = [text(row, column) if column else run for row in table.rows]
    if clock is None or not all(names) or len(set(names)) == len(names) > 1:
        return None
    steps = [number(row, clock) for row in table.rows]
    require(table, clock, [step >= 0 for step in steps], f"{clock} must be a number, 0 or more")
    runs: dict[str, History] = {name: History() for name in names}
    for k in sorted(range(len(steps)), key=steps.__getitem__):
        for name, value in table.rows[k].items():
            if name not in (clock, column) and value != "":
                at, known = _measured(value, steps[k])
                runs[names[k]].add(name, at, known)
    return Histories(runs, table.source, table.sha256)


def _measured(value: Any, step: float) -> tuple[float | None, Any]:
    """A number with its step; a text is a setting."""
    try:
        return step, float(value)
    except (ValueError, OverflowError):
        return None, value
