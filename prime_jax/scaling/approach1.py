"""Approach 1: the lower envelope of training curves, and the power law through its winners.

At each of many compute budgets the run with the lowest loss so far gives N* and D* (Hoffmann et
al. 2022, section 3.1). A loss along training counts only where the learning rate is constant: on
its way down it is lower than that of a run that goes on, and higher than that of a run that ended.

Logs hold a clock and losses only; what a run is (its family, N, D and C) is told by the table of
runs that the fit reads, which has a row for each run name. So N and C are counted in one
convention everywhere.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prime_jax.errors import UserError
from prime_jax.scaling.columns import Columns
from prime_jax.scaling.intervals import known_percentiles
from prime_jax.scaling.laws import Optimum
from prime_jax.scaling.logs import Log, Logs
from prime_jax.scaling.points import Runs
from prime_jax.scaling.schema import Diagnostic, hidden, key, refuse, warn
from prime_jax.scaling.table import Table, number, text

Array = NDArray[np.float64]

BIN = 1.05  # points closer in tokens than this are averaged: single batches are noisy
STEADY = 0.99  # of the peak learning rate: what counts as constant
MIN_STEADY = 0.5  # of a run must be at a constant rate, or its schedule decays
BUDGETS, SHOWN = 400, 49  # at which the envelope is taken, and stored
MIN_SIZES, MIN_WINNERS = 3, 4  # that compete, and that win
DEEP = 64  # best runs of each budget that are kept: a resampling lacks all of them once in e**64
EDGE_SHARE = 0.25  # of the range of log C that edge sizes may win unmentioned


@dataclass(frozen=True)
class Curve:
    """The loss of one run along its training.

    Attributes:
        tokens_n, flops_n, loss_n: increasing D, the C spent on it, and the loss there.
        schedule: of the learning rate: "constant" (then the points are of its constant part),
            "decays", or "" (not known).
        trajectory: of the run, which others may share; its name where none is known.
    """

    run: str
    params: float
    tokens_n: Array
    flops_n: Array
    loss_n: Array
    schedule: str = ""
    trajectory: str = ""


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


def join_curves(logs: Logs, data: Table, runs: Runs, asked: bool = True) -> dict[str, Curves]:
    """The curves of the runs that the fit uses, by family.

    Raises:
        UserError: tokens that do not follow from the steps, or disagree with the table.
    """
    excluded = {(run.family, run.run) for run in runs.excluded}
    used: dict[str, dict[str, dict[str, Any]]] = {family: {} for family in runs.families}
    for row in data.rows:
        family, name = text(row, "family", "?"), text(row, "run")  # as in `excluded`
        if name and (family, name) not in excluded:
            of = used[family]
            of[name] = max(of.get(name, row), row, key=lambda r: number(r, runs.columns.tokens))
    several = [name for name in logs.runs if sum(name in of for of in used.values()) > 1]
    if several:
        raise UserError(
            f"{logs.source}: run {several[0]} is in several families of {data.source}, so its curve may be of any; give every run a name of its own"
        )
    out = {}
    for family, mine in used.items():
        found = {name: logs.runs[name] for name in mine if name in logs.runs}
        curves = [_curve(name, log, mine[name], runs.columns, logs) for name, log in found.items()]
        curves = tuple(c for c in curves if len(c.loss_n) > 1 or c.schedule == "decays")
        kind = "+".join(sorted({log.kind for log in found.values() if log.clock}))
        out[family] = Curves(curves, kind, len(mine) - len(curves), len(mine), asked)
    return out


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
        trajectory=text(row, "trajectory", name),
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
        tokens / (log.end or np.nan),
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


@dataclass(frozen=True)
class Line:
    """N* = exp(log_params) C**a and D* = exp(log_tokens) C**b."""

    a: float
    log_params: float
    b: float
    log_tokens: float


@dataclass(frozen=True)
class Envelope:
    """The lowest loss at each budget, where a winner has competitors on both sides."""

    flops: Array
    loss: Array


@dataclass(frozen=True)
class Approach1:
    """Approach 1 of one family; `a` is None where it is refused."""

    a: float | None = key("exponent of N\\*; null if refused", default=None)
    b: float | None = key("exponent of D\\*", default=None)
    intervals: dict[str, list[float] | None] = key(
        "intervals of a and b, from resampled runs", default_factory=lambda: {"a": None, "b": None}
    )
    kind: str = key("kind of the losses along the curves", default="")
    optima: tuple[Optimum, ...] = key(
        "one for each size that has the lowest loss somewhere, at the middle of these budgets",
        default=(),
    )
    envelope: Envelope = key(
        "the lowest loss at each of `flops`",
        default_factory=lambda: Envelope(np.empty(0), np.empty(0)),
    )
    warnings: tuple[Diagnostic, ...] = key(
        "warnings of this approach; without --curves they stand only here", default=()
    )
    line: Line | None = hidden(default=None)
    a_R: Array | None = hidden(default=None)  # of resampled runs; NaN where too few sizes win
    asked: bool = hidden(default=False)

    @property
    def counts(self) -> bool:
        """Whether it was asked for, or gave something without."""
        return self.asked or self.line is not None


@dataclass(frozen=True)
class _Race:
    """Losses of n runs at G budgets, sorted once so that resampling only looks up.

    Each of the three `[T, G]` lists the runs with a loss at a budget by rising loss, rising N and
    falling N; `has` tells which entries are such runs.
    """

    params_n: Array
    tokens_nxG: Array
    loss_nxG: Array
    orders: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]
    has: tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]

    def run(self, present_n: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """The winner at each budget, and where it counts: between budgets that an edge size wins.

        An edge is the smallest or the largest size that got so far: the optimum may lie beyond
        it. Leaving out those budgets alone would leave in what noise makes of their neighbours.
        """
        first, some = [], None
        for order, has in zip(self.orders, self.has, strict=True):
            candidates = present_n[order] & has
            some = candidates.any(axis=0)
            first.append(np.take_along_axis(order, np.argmax(candidates, axis=0)[None], 0)[0])
        best, least, most = (self.params_n[k] for k in first)
        g = np.arange(len(some))
        small = g[some & (best <= least)]
        low = small[-1] if len(small) else -1
        large = g[some & (best >= most) & (g > low)]
        high = large[0] if len(large) else len(g)
        return first[0], some & (g > low) & (g < high)


def fit(curves: Curves | None, replicates: int, seed: int, level: float = 0.95) -> Approach1:
    if curves is None or not curves.curves:
        text = "no training curves" if curves is None else "no run has a training curve"
        return _refused(curves, refuse("no_curves", text))
    diagnostics, usable = _schedules(curves)
    sizes = len({curve.params for curve in usable})
    if sizes < MIN_SIZES:
        if not diagnostics or not diagnostics[-1].refusal:
            diagnostics.append(
                refuse(
                    "too_few_winners",
                    f"training curves of {sizes} sizes; approach 1 needs {MIN_SIZES}",
                )
            )
        return _refused(curves, *diagnostics)
    flops_g, race = _race(usable)
    winner, inside = race.run(np.ones(len(usable), dtype=bool))
    diagnostics += _edges(inside)
    wins = len(set(race.params_n[winner[inside]]))
    line = _line(flops_g, race, winner, inside)
    if line is None:
        diagnostics.append(
            refuse(
                "too_few_winners",
                f"{wins} sizes win a stretch of the envelope between others; approach 1 needs {MIN_WINNERS}",
            )
        )
        return _refused(curves, *diagnostics)
    a_R, b_R = np.full((2, replicates), np.nan)
    rng = np.random.default_rng(seed)
    place: dict[str, int] = {}
    unit_n = np.array([place.setdefault(c.trajectory or c.run, len(place)) for c in usable])
    for r in range(replicates):
        present = np.isin(unit_n, rng.integers(len(place), size=len(place)))
        redrawn, between = race.run(present)
        found = _line(flops_g, race, redrawn, between)
        if found:
            a_R[r], b_R[r] = found.a, found.b
    if known_percentiles(a_R, level) is None:
        diagnostics.append(
            warn(
                "interval_unbounded",
                "approach 1 has no interval: without a few of its runs, too few sizes win",
            )
        )
    loss_g = race.loss_nxG[winner, np.arange(len(flops_g))]
    every = max(1, int(inside.sum()) // SHOWN)
    return Approach1(
        a=line.a,
        b=line.b,
        intervals={
            name: known_percentiles(draws, level) for name, draws in (("a", a_R), ("b", b_R))
        },
        line=line,
        optima=_optima(flops_g, race, winner, inside),
        envelope=Envelope(flops_g[inside][::every], loss_g[inside][::every]),
        a_R=a_R,
        kind=curves.kind,
        asked=curves.asked,
        warnings=tuple(diagnostics),
    )


def _refused(curves: Curves | None, *diagnostics: Diagnostic) -> Approach1:
    kind, asked = ("", False) if curves is None else (curves.kind, curves.asked)
    return Approach1(kind=kind, asked=asked, warnings=diagnostics)


def _schedules(curves: Curves) -> tuple[list[Diagnostic], list[Curve]]:
    """The curves that may be compared along their way."""
    diagnostics = []
    if curves.missing:
        diagnostics.append(
            warn(
                "curves_missing", f"{curves.missing} of {curves.total} runs have no training curve"
            )
        )
    if curves.kind == "train_loss":
        diagnostics.append(
            warn(
                "curves_of_training_loss",
                "the curves are training losses, averaged over 5 % of the tokens: noisy, and no likelihood of the evaluation set",
            )
        )
    unknown = sum(curve.schedule == "" for curve in curves.curves)
    if unknown:
        diagnostics.append(
            warn(
                "schedule_unknown",
                f"the learning-rate schedule of {unknown} runs is not known; a loss along training counts only at a constant rate",
            )
        )
    usable = [curve for curve in curves.curves if curve.schedule != "decays"]
    lost = len(curves.curves) - len(usable)
    if lost:
        too_few = len({curve.params for curve in usable}) < MIN_SIZES
        log = refuse if too_few else warn
        diagnostics.append(
            log(
                "schedule_decays",
                f"the learning rate of {lost} of {len(curves.curves)} runs decays all along: their losses along training cannot be compared",
            )
        )
    return diagnostics, usable


def _race(curves: list[Curve]) -> tuple[Array, _Race]:
    """The race between the second-smallest start and the second-largest end of three sizes."""
    params_n = np.array([curve.params for curve in curves])
    low = min(curve.flops_n[0] for curve in curves)
    high = max(curve.flops_n[-1] for curve in curves)
    flops_g = np.geomspace(low, high, BUDGETS)
    x = np.log(flops_g)
    loss, tokens = np.empty((2, len(curves), BUDGETS))
    for k, curve in enumerate(curves):
        c = np.log(curve.flops_n)
        at = np.exp(np.interp(x, c, np.log(curve.loss_n), np.nan, np.nan))
        loss[k] = np.where(np.isnan(at), np.inf, at)
        tokens[k] = flops_g * curve.tokens_n[-1] / curve.flops_n[-1]
    runs = np.isfinite(loss)
    keys = (
        loss,
        np.where(runs, params_n[:, None], np.inf),
        np.where(runs, -params_n[:, None], np.inf),
    )
    orders = tuple(np.argsort(key, axis=0, kind="stable")[:DEEP] for key in keys)
    has = tuple(np.take_along_axis(runs, order, 0) for order in orders)
    return flops_g, _Race(params_n, tokens, loss, orders, has)


def _line(
    flops_g: Array, race: _Race, winner: NDArray[np.intp], inside: NDArray[np.bool_]
) -> Line | None:
    if len(np.unique(race.params_n[winner[inside]])) < MIN_WINNERS:
        return None
    x = np.log(flops_g[inside])
    where = winner[inside]
    n, d = np.log(race.params_n[where]), np.log(race.tokens_nxG[where, np.flatnonzero(inside)])
    middle = x.mean()
    spread = (x - middle) / ((x - middle) @ (x - middle))
    a, b = float(spread @ n), float(spread @ d)
    return Line(a, float(n.mean() - a * middle), b, float(d.mean() - b * middle))


def _optima(
    flops_g: Array, race: _Race, winner: NDArray[np.intp], inside: NDArray[np.bool_]
) -> tuple[Optimum, ...]:
    out = []
    for size in np.unique(race.params_n[winner[inside]]):
        mine = np.flatnonzero(inside & (race.params_n[winner] == size))
        g = mine[len(mine) // 2]
        k = winner[g]
        out.append(
            Optimum(
                float(flops_g[g]),
                float(size),
                float(race.tokens_nxG[k, g]),
                float(race.loss_nxG[k, g]),
            )
        )
    return tuple(out)


def _edges(inside: NDArray[np.bool_]) -> list[Diagnostic]:
    fraction = 1 - inside.mean()
    if fraction <= EDGE_SHARE:
        return []
    return [
        warn(
            "winner_at_edge",
            f"over {fraction:.0%} of the range of compute the smallest or the largest size that got so far wins; left out, as the optimum may lie beyond it",
        )
    ]
