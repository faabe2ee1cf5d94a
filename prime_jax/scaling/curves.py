"""Training curves: what was logged of each run, in the N, D and C of the fit.

Logs hold a clock and losses only; what a run is (its family, N, D and C) is told by the table of
runs that the fit reads, which has a row for each run name. So N and C are counted in one
convention everywhere.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prime_jax.errors import UserError
from prime_jax.scaling import table, training_logs
from prime_jax.scaling.columns import Columns
from prime_jax.scaling.points import Runs
from prime_jax.scaling.table import Table, number, require, text
from prime_jax.scaling.training_logs import CLOCKS, Log, Logs

Array = NDArray[np.float64]

BIN = 1.05  # points closer in tokens than this are averaged: single batches are noisy
STEADY = 0.99  # of the peak learning rate: what counts as constant
MIN_STEADY = 0.5  # of a run must be at a constant rate, or its schedule decays


@dataclass(frozen=True)
class Curve:
    """The loss of one run along its training.

    Attributes:
        tokens_n, flops_n, loss_n: increasing D, the C spent on it, and the loss there.
        schedule: of the learning rate: "constant" (then the points are of its constant part),
            "decays", or "" (not known).
    """

    run: str
    params: float
    tokens_n: Array
    flops_n: Array
    loss_n: Array
    schedule: str = ""


@dataclass(frozen=True)
class Curves:
    """Of one family.

    Attributes:
        kind: of the losses along the curves, as in `points.KINDS`, or "" (not stated).
        missing: how many of the `total` finished runs have no curve.
        asked: somebody asked for an envelope, so that to have none is a refusal.
    """

    curves: tuple[Curve, ...]
    kind: str
    missing: int = 0
    total: int = 0
    asked: bool = True


def read(source: Path, curves: Path | None, metric: str) -> tuple[Table, Logs | None]:
    """The table of runs, and the logs of their training; a sweep has its own.

    Args:
        source: a sweep directory, or a CSV of runs.
        curves: a CSV of training curves, or another sweep; the same CSV where its rows are points
            of curves, the last row of each run being its result.
        metric: which evaluation makes the curves of a sweep.

    Raises:
        UserError: one of them cannot be read, or they do not belong together.
    """
    if curves is None:
        data = table.read(source)
        return data, training_logs.load(source, metric) if source.is_dir() else None
    if curves == source and not source.is_dir():
        data = table.read_csv(source, table.MAX_CURVE_ROWS)
        if training_logs.is_wide(data.columns):
            raise UserError(
                f"{source}: curves alone; give a CSV with a row for each run (run, family, params, tokens), and this one with --curves"
            )
        logs = training_logs.of_table(data)
        return complete(_ends(data), logs), logs
    logs = training_logs.load(curves, metric)
    return complete(table.read(source), logs), logs


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


def join(logs: Logs, data: Table, runs: Runs, asked: bool = True) -> dict[str, Curves]:
    """The curves of the runs that the fit uses, by family.

    Raises:
        UserError: tokens that do not follow from the steps, or disagree with the table.
    """
    excluded = {run.run for run in runs.excluded}
    used: dict[str, dict[str, Any]] = {}
    for row in data.rows:
        name = text(row, "run")
        if name and name not in excluded:
            used[name] = max(used.get(name, row), row, key=lambda r: number(r, runs.columns.tokens))
    out = {}
    for family in runs.families:
        mine = {name: row for name, row in used.items() if text(row, "family") == family}
        found = {name: logs.runs[name] for name in mine if name in logs.runs}
        curves = [_curve(name, log, mine[name], runs.columns, logs) for name, log in found.items()]
        curves = tuple(c for c in curves if len(c.loss_n) > 1 or c.schedule == "decays")
        kind = "+".join(sorted({log.kind for log in found.values() if log.clock}))
        out[family] = Curves(curves, kind, len(mine) - len(curves), len(mine), asked)
    return out


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


def _curve(name: str, log: Log, row: dict[str, Any], columns: Columns, logs: Logs) -> Curve:
    flops, params, tokens = _size(row, columns)
    unit = 1.0 if logs.in_tokens else _tokens_per_step(name, log, row, tokens, logs)
    order = np.argsort(log.clock)
    clock, loss = np.array(log.clock)[order], np.array(log.loss)[order]
    reached = clock[-1] * unit if len(clock) else 0.0
    if reached > 1.05 * tokens:
        raise UserError(
            f"{logs.source}: the curve of run {name} goes to {reached:.4g} tokens, but the run has {tokens:.4g}; check tokens_per_step"
        )
    schedule, low, high = _steady(log, row, tokens / unit)
    keep = clock > 0
    if schedule == "constant":
        keep &= (clock >= low) & (clock <= high)
    d, loss = _average(clock[keep] * unit, loss[keep])
    return Curve(
        run=name,
        params=params,
        tokens_n=d,
        flops_n=flops * d / tokens,
        loss_n=loss,
        schedule=schedule,
    )


def _size(row: dict[str, Any], columns: Columns) -> tuple[float, float, float]:
    """C, N and D of a run; one may be given by the other two (checked with the points)."""
    flops, params, tokens = (
        number(row, getattr(columns, name)) for name in ("flops", "params", "tokens")
    )
    if not columns.flops:
        return 6 * params * tokens, params, tokens
    if not columns.params:
        return flops, flops / (6 * tokens), tokens
    return (flops, params, tokens) if columns.tokens else (flops, params, flops / (6 * params))


def _tokens_per_step(name: str, log: Log, row: dict[str, Any], tokens: float, logs: Logs) -> float:
    for value in (
        number(row, "tokens_per_step"),
        log.tokens_per_step,
        tokens / (number(row, "step") or np.nan),
    ):
        if value > 0:
            return value
    raise UserError(
        f"{logs.source}: how many tokens is a step of run {name}? Add a column tokens_per_step, or `step` (its last one), to the table of runs"
    )


def _steady(log: Log, row: dict[str, Any], length: float) -> tuple[str, float, float]:
    """The schedule of a run, and between which two clock times its rate is constant."""
    if log.schedule:
        return log.schedule, 0.0, np.inf
    if log.lr:
        rate, clock = np.array(log.lr), np.array(log.lr_clock)
        high = clock[rate >= STEADY * rate.max()]
        fraction = (high.max() - high.min()) / clock.max()
        return "constant" if fraction >= MIN_STEADY else "decays", high.min(), high.max()
    named = text(row, "schedule").lower()
    if named == "wsd":
        fraction = number(row, "cooldown_fraction")
        if not 0 <= fraction < 1:
            raise UserError(
                f"run {text(row, 'run')}: a wsd schedule needs a column cooldown_fraction, from 0 to 1"
            )
        return "constant", 0.0, (1 - fraction) * length
    schedule = {"": "", "constant": "constant"}.get(named, "decays")
    return schedule, 0.0, np.inf


def _average(tokens: Array, loss: Array) -> tuple[Array, Array]:
    """Means over bins of equal width in log D; evaluations far apart stay as they are."""
    group = np.unique(np.floor(np.log(tokens) / np.log(BIN)), return_inverse=True)[1]
    count = np.bincount(group)
    return np.bincount(group, tokens) / count, np.bincount(group, loss) / count
