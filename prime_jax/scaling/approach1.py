"""Approach 1: the lower envelope of training curves, and the power law through its winners.

At each of many compute budgets the run with the lowest loss so far gives N* and D* (Hoffmann et
al. 2022, section 3.1). A loss along training counts only where the learning rate is constant: on
its way down it is lower than that of a run that goes on, and higher than that of a run that ended.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prime_jax.scaling import approach2
from prime_jax.scaling.curves import Curve, Curves
from prime_jax.scaling.diagnostics import Diagnostic, refuse, warn
from prime_jax.scaling.laws import Optimum

Array = NDArray[np.float64]

BUDGETS = 400  # at which the envelope is taken
MIN_SIZES, MIN_WINNERS = 3, 4  # that compete, and that win
DEEP = 64  # best runs of each budget that are kept: a resampling lacks all of them once in e**64
EDGE_SHARE = 0.25  # of the range of log C that edge sizes may win unmentioned


@dataclass(frozen=True)
class Line:
    """N* = exp(log_params) C**a and D* = exp(log_tokens) C**b."""

    a: float
    log_params: float
    b: float
    log_tokens: float


@dataclass(frozen=True)
class Envelope:
    """Approach 1 of one family; `line` is None where it is refused.

    Attributes:
        optima: one for each size that wins, at the middle (in log C) of the budgets it wins.
        flops_g, loss_g: the envelope, where a winner has competitors on both sides.
        a_R, b_R: of resampled runs; NaN where too few sizes win.
    """

    line: Line | None
    optima: tuple[Optimum, ...]
    flops_g: Array
    loss_g: Array
    a_R: Array
    b_R: Array
    kind: str
    asked: bool
    diagnostics: tuple[Diagnostic, ...]

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


def fit(curves: Curves | None, replicates: int, seed: int, level: float = 0.95) -> Envelope:
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
    for r in range(replicates):
        present = np.zeros(len(usable), dtype=bool)
        present[rng.integers(len(usable), size=len(usable))] = True
        redrawn, between = race.run(present)
        found = _line(flops_g, race, redrawn, between)
        if found:
            a_R[r], b_R[r] = found.a, found.b
    if approach2.interval(a_R, level) is None:
        diagnostics.append(
            warn(
                "interval_unbounded",
                "approach 1 has no interval: without a few of its runs, too few sizes win",
            )
        )
    loss_g = race.loss_nxG[winner, np.arange(len(flops_g))]
    return Envelope(
        line=line,
        optima=_optima(flops_g, race, winner, inside),
        flops_g=flops_g[inside],
        loss_g=loss_g[inside],
        a_R=a_R,
        b_R=b_R,
        kind=curves.kind,
        asked=curves.asked,
        diagnostics=tuple(diagnostics),
    )


def _refused(curves: Curves | None, *diagnostics: Diagnostic) -> Envelope:
    none = np.empty(0)
    kind, asked = ("", False) if curves is None else (curves.kind, curves.asked)
    return Envelope(
        line=None,
        optima=(),
        flops_g=none,
        loss_g=none,
        a_R=none,
        b_R=none,
        kind=kind,
        asked=asked,
        diagnostics=diagnostics,
    )


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
