"""Approach 2: the best size of each budget from a parabola, and the power law through them.

At a fixed budget the loss is fitted by a parabola in log N (Hoffmann et al. 2022, section 3.2);
its minimum is N*. A minimum outside the sampled sizes is a bound, never a value, and a parabola
without a minimum gives nothing. `a` is the usual least-squares slope through the minima;
`debias.correct` takes off the shift that a parabola has even without noise.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prime_jax.scaling import budgets, debias, isoflop_curves, labels
from prime_jax.scaling.debias import Debiased
from prime_jax.scaling.diagnostics import Diagnostic, refuse, warn
from prime_jax.scaling.isoflop_curves import IsoflopCurve, Method
from prime_jax.scaling.laws import Compute, Law
from prime_jax.scaling.points import Points

Array = NDArray[np.float64]

MIN_BUDGETS = 3
OFF_CENTRE = 0.5  # of the half-width of the sizes, in log N, between their middle and the optimum
DRIFT = 0.1  # in the exponent, between the middles of the sizes and the optima


@dataclass(frozen=True)
class Draws:
    """Optima redrawn from their errors, and the exponent a_R; NaN where a curve has no minimum.

    Attributes:
        params: N*_RxK of the K budgets inside.
        minima_RxV: log N of the lowest points of all V curves.
    """

    params: Array
    a: Array
    minima_RxV: Array


@dataclass(frozen=True)
class Isoflop:
    """Approach 2 of one family; `a` is None where it is refused."""

    curves: tuple[IsoflopCurve, ...]
    a: float | None
    diagnostics: tuple[Diagnostic, ...]
    method: Method = "parabola"

    @property
    def inside(self) -> tuple[IsoflopCurve, ...]:
        return tuple(curve for curve in self.curves if curve.censored is None)


def fit(
    points: Points, compute: Compute, method: Method = "parabola", weight_n: Array | None = None
) -> Isoflop:
    """IsoFLOP curves of all budgets, and the exponent through those with their optimum inside.

    Args:
        points: the runs.
        compute: what a run costs.
        method: the curve through the losses of one budget.
        weight_n: of the runs, inverse variances up to a factor; equal if None.
    """
    weight_n = np.ones(len(points.loss)) if weight_n is None else weight_n
    found, spread, few, no_minimum = [], [], [], []
    for budget in points.budgets:
        mine = points.budget == budget
        params = points.params[mine]
        if budgets.spread(points.flops[mine]) > budgets.SPREAD:
            spread.append(budget)
        elif len(np.unique(params)) < isoflop_curves.MIN_SIZES[method]:
            few.append(budget)
        else:
            curve = isoflop_curves.fit(
                budget,
                params=params,
                loss=points.loss[mine],
                weight=weight_n[mine],
                compute=compute,
                method=method,
            )
            (no_minimum if curve is None else found).append(curve or budget)
    diagnostics = _left_out(spread, few, no_minimum, method) + _censored(found)
    inside = [curve for curve in found if curve.censored is None]
    a = None
    if len(inside) < MIN_BUDGETS:
        diagnostics.append(
            refuse(
                "too_few_budgets",
                f"approach 2 has {len(inside)} budgets with their optimum inside the sampled sizes; an exponent needs {MIN_BUDGETS}",
            )
        )
    else:
        a = float(_slope(inside) @ np.log([curve.optimum.params for curve in inside]))
    diagnostics += _grid(inside, a)
    return Isoflop(tuple(found), a, tuple(diagnostics), method)


def redraw(isoflop: Isoflop, replicates: int, seed: int) -> Draws | None:
    """IsoFLOP curves redrawn under normal noise of one unknown variance, shared by all budgets.

    The exponent also carries the scatter of the minima about their power law that this noise
    does not explain. None without a degree of freedom.
    """
    inside = isoflop.inside
    freedom = sum(len(curve.loss_n) - 3 for curve in isoflop.curves)
    if freedom < 1 or not inside:
        return None
    rng = np.random.default_rng(seed)
    squares = sum(curve.squares for curve in isoflop.curves)
    sigma_R = np.sqrt(squares / rng.chisquare(freedom, replicates))
    minima = np.stack([isoflop_curves.redraw(v, sigma_R, rng) for v in isoflop.curves], 1)
    log_params = minima[:, [v.censored is None for v in isoflop.curves]]
    if isoflop.a is None:
        return Draws(np.exp(log_params), np.full(replicates, np.nan), minima)
    x = np.log([curve.flops for curve in inside])
    y = np.log([curve.optimum.params for curve in inside])
    excess = debias.scatter(x, y, debias.errors(log_params))
    noise = excess * rng.standard_normal(log_params.shape)
    return Draws(np.exp(log_params), (log_params + noise) @ _slope(inside), minima)


def correct(
    isoflop: Isoflop,
    draws: Draws | None,
    law: Law,
    replicates: Law,
    compute: Compute,
    seed: int,
) -> Debiased | None:
    """The same optima and exponent without the bias of parabolas; None where `a` is refused."""
    if isoflop.a is None:
        return None
    minima = None if draws is None else draws.minima_RxV
    return debias.correct(
        isoflop.curves,
        minima_RxV=minima,
        law=law,
        replicates=replicates,
        compute=compute,
        seed=seed,
    )


def check(isoflop: Isoflop, draws: Draws | None, level: float) -> tuple[Diagnostic, ...]:
    """Why the exponent has no interval, if it has none."""
    if isoflop.a is None:
        return ()
    if draws is None:
        return (
            warn(
                "interval_unbounded",
                "approach 2 has no run to spare for an error: three sizes fix a parabola",
            ),
        )
    if interval(draws.a, level) is None:
        return (
            warn(
                "interval_unbounded",
                "approach 2 has no interval: within the noise some parabola has no minimum",
            ),
        )
    return ()


def interval(draws_R: Array, level: float = 0.95) -> list[float] | None:
    """Percentile interval; None where more draws have no minimum than the tails may hold."""
    tail = (1 - level) / 2
    missing = np.isnan(draws_R)
    if missing.mean() > tail:
        return None
    return np.quantile(draws_R[~missing], [tail, 1 - tail]).tolist()


def _slope(inside: tuple[IsoflopCurve, ...] | list[IsoflopCurve]) -> Array:
    """Weights_K whose product with log N* is the least-squares slope on log C."""
    x = np.log([curve.flops for curve in inside])
    x = x - x.mean()
    return x / (x @ x)


def _left_out(
    spread: list[float], few: list[float], no_minimum: list[float], method: Method
) -> list[Diagnostic]:
    diagnostics = []
    if spread:
        diagnostics.append(
            warn(
                "budget_ambiguous",
                f"runs of {_list(spread)} FLOPs differ in their FLOPs by more than {budgets.SPREAD - 1:.0%}",
            )
        )
    if few:
        least = isoflop_curves.MIN_SIZES[method]
        diagnostics.append(
            warn("too_few_points", f"fewer than {least} sizes at {_list(few)} FLOPs")
        )
    if no_minimum:
        diagnostics.append(
            warn("negative_curvature", f"the parabola has no minimum at {_list(no_minimum)} FLOPs")
        )
    return diagnostics


def _grid(inside: list[IsoflopCurve], a: float | None) -> list[Diagnostic]:
    """Sizes that are not laid around the optimum: what a minimum then owes to the grid."""
    diagnostics = []
    middle = np.array([np.log(v.low * v.high) / 2 for v in inside])
    half = np.array([np.log(v.high / v.low) / 2 for v in inside])
    best = np.log([v.optimum.params for v in inside])
    off = [
        v.flops
        for v, far in zip(inside, np.abs(middle - best) > OFF_CENTRE * half, strict=True)
        if far
    ]
    if off:
        diagnostics.append(
            warn(
                "off_centre_grid",
                f"the optimum is in the outer half of the sampled sizes at {_list(off)} FLOPs",
            )
        )
    if a is not None:
        grid = float(_slope(inside) @ middle)
        if abs(grid - a) > DRIFT:
            diagnostics.append(
                warn(
                    "drifting_grid",
                    f"the middle of the sampled sizes grows as C^{grid:.2f}, the optimum as C^{a:.2f}",
                )
            )
    return diagnostics


def _censored(curves: list[IsoflopCurve]) -> list[Diagnostic]:
    diagnostics = []
    for side, edge in (("below", "smallest"), ("above", "largest")):
        out = [curve for curve in curves if curve.censored == side]
        if out:
            where = ", ".join(
                f"{labels.count(v.optimum.params)} at {labels.flops(v.flops)} FLOPs" for v in out
            )
            diagnostics.append(
                warn("optimum_outside_range", f"the optimum lies {side} the {edge} size: {where}")
            )
    return diagnostics


def _list(values: list[float]) -> str:
    if len(values) > 5:
        return (
            f"{len(values)} budgets from {labels.flops(min(values))} to {labels.flops(max(values))}"
        )
    return ", ".join(labels.flops(value) for value in values)
