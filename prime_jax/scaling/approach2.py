"""Approach 2: the best size of each budget from a parabola, and the power law through them.

At a fixed budget the loss is fitted by a parabola in log N (Hoffmann et al. 2022, section 3.2);
its vertex is N*. A vertex outside the sampled sizes is a bound, never a value, and a parabola
without a minimum gives nothing.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prime_jax.scaling import budgets, labels
from prime_jax.scaling.findings import Finding, refuse, warn
from prime_jax.scaling.laws import Compute, Optimum
from prime_jax.scaling.points import Points

Array = NDArray[np.float64]
Side = Literal["below", "above"]

LEAST_SIZES, LEAST_BUDGETS = 3, 3


@dataclass(frozen=True)
class Valley:
    """The parabola of one budget in u = log N - centre: loss = c_0 + c_1 u + c_2 u**2.

    Attributes:
        censored: the side of the sampled sizes on which the optimum lies; `optimum` then holds
            the size at that edge, which bounds N*, and the lowest loss measured.
        covariance_3x3: of c over the noise variance.
    """

    flops: float
    low: float
    high: float
    centre: float
    c_3: Array
    covariance_3x3: Array
    residual_n: Array
    optimum: Optimum
    censored: Side | None

    def loss(self, params: Array) -> Array:
        return np.polynomial.polynomial.polyval(np.log(params) - self.centre, self.c_3)


@dataclass(frozen=True)
class Draws:
    """Valleys redrawn from their errors: N*_RxK of the K budgets inside, and the exponent a_R.

    NaN where a redrawn parabola has no minimum.
    """

    params: Array
    a: Array


@dataclass(frozen=True)
class Isoflop:
    """Approach 2 of one family; `a` is None where it is refused."""

    valleys: tuple[Valley, ...]
    a: float | None
    findings: tuple[Finding, ...]

    @property
    def inside(self) -> tuple[Valley, ...]:
        return tuple(valley for valley in self.valleys if valley.censored is None)


def fit(points: Points, compute: Compute) -> Isoflop:
    valleys, findings, spread, few, no_minimum = [], [], [], [], []
    for budget in points.budgets:
        mine = points.budget == budget
        params, loss = points.params[mine], points.loss[mine]
        if budgets.spread(points.flops[mine]) > budgets.SPREAD:
            spread.append(budget)
        elif len(np.unique(params)) < LEAST_SIZES:
            few.append(budget)
        else:
            valley = _valley(budget, params, loss, compute)
            (no_minimum if valley is None else valleys).append(valley or budget)
    if spread:
        findings.append(
            warn(
                "budget_ambiguous",
                f"runs of {_list(spread)} FLOPs differ in their FLOPs by more than {budgets.SPREAD - 1:.0%}",
            )
        )
    if few:
        findings.append(
            warn("too_few_points", f"fewer than {LEAST_SIZES} sizes at {_list(few)} FLOPs")
        )
    if no_minimum:
        findings.append(
            warn("negative_curvature", f"the parabola has no minimum at {_list(no_minimum)} FLOPs")
        )
    findings += _censored(valleys)
    inside = [valley for valley in valleys if valley.censored is None]
    if len(inside) < LEAST_BUDGETS:
        findings.append(
            refuse(
                "too_few_budgets",
                f"approach 2 has {len(inside)} budgets with their optimum inside the sampled sizes; an exponent needs {LEAST_BUDGETS}",
            )
        )
        return Isoflop(tuple(valleys), None, tuple(findings))
    slope = _slope(inside)
    a = float(slope @ np.log([float(valley.optimum.params) for valley in inside]))
    return Isoflop(tuple(valleys), a, tuple(findings))


def redraw(isoflop: Isoflop, replicates: int, seed: int) -> Draws | None:
    """Valleys redrawn under normal noise of one unknown variance, shared by all budgets.

    Resampling runs would leave four-point parabolas undetermined in a third of the replicates;
    the posterior of the coefficients under a flat prior does not. The exponent also carries the
    scatter of the vertices about their power law that this noise does not explain.
    None without a degree of freedom.
    """
    inside = isoflop.inside
    freedom = sum(len(valley.residual_n) - 3 for valley in isoflop.valleys)
    if freedom < 1 or not inside:
        return None
    rng = np.random.default_rng(seed)
    squares = sum(float(valley.residual_n @ valley.residual_n) for valley in isoflop.valleys)
    sigma_R = np.sqrt(squares / rng.chisquare(freedom, replicates))
    log_params = np.empty((replicates, len(inside)))
    for k, valley in enumerate(inside):
        root = np.linalg.cholesky(valley.covariance_3x3)
        c_Rx3 = valley.c_3 + sigma_R[:, None] * (rng.standard_normal((replicates, 3)) @ root.T)
        convex = c_Rx3[:, 2] > 0
        vertex = -c_Rx3[:, 1] / (2 * np.where(convex, c_Rx3[:, 2], 1.0))
        log_params[:, k] = np.where(convex, valley.centre + vertex, np.nan)
    if isoflop.a is None:
        return Draws(np.exp(log_params), np.full(replicates, np.nan))
    scatter = _excess_scatter(inside, log_params) * rng.standard_normal(log_params.shape)
    return Draws(np.exp(log_params), (log_params + scatter) @ _slope(inside))


def doubts(isoflop: Isoflop, draws: Draws | None, level: float) -> tuple[Finding, ...]:
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


def _valley(budget: float, params: Array, loss: Array, compute: Compute) -> Valley | None:
    """None if the parabola has no minimum."""
    x = np.log(params)
    centre = x.mean()
    design = np.stack([np.ones_like(x), x - centre, (x - centre) ** 2], 1)
    covariance = np.linalg.inv(design.T @ design)
    c = np.linalg.lstsq(design, loss, rcond=None)[0]
    if not c[2] > 0:
        return None
    low, high = params.min(), params.max()
    best = float(np.exp(np.clip(centre - c[1] / (2 * c[2]), -50, 100)))
    censored: Side | None = "below" if best <= low else "above" if best >= high else None
    value = c[0] - c[1] ** 2 / (4 * c[2])
    if censored:
        best, value = (low, loss.min()) if censored == "below" else (high, loss.min())
    optimum = Optimum(budget, best, compute.tokens(budget, best), value)
    return Valley(budget, low, high, centre, c, covariance, loss - design @ c, optimum, censored)


def _slope(inside: tuple[Valley, ...] | list[Valley]) -> Array:
    """Weights_K whose product with log N* is the least-squares slope on log C."""
    x = np.log([valley.flops for valley in inside])
    x = x - x.mean()
    return x / (x @ x)


def _excess_scatter(inside: tuple[Valley, ...], log_params_RxK: Array) -> float:
    """Standard deviation of log N* about the power law, less what the noise of runs explains."""
    x = np.log([valley.flops for valley in inside])
    y = np.log([valley.optimum.params for valley in inside])
    x, y = x - x.mean(), y - y.mean()
    residual = y - (x @ y) / (x @ x) * x
    middle = np.nanpercentile(log_params_RxK, [16, 84], axis=0)  # vertices have heavy tails
    noise = np.mean((np.diff(middle, axis=0) / 2) ** 2)
    return float(np.sqrt(max(residual @ residual / (len(x) - 2) - noise, 0.0)))


def _censored(valleys: list[Valley]) -> list[Finding]:
    findings = []
    for side, edge in (("below", "smallest"), ("above", "largest")):
        out = [valley for valley in valleys if valley.censored == side]
        if out:
            where = ", ".join(
                f"{labels.count(v.optimum.params)} at {labels.flops(v.flops)} FLOPs" for v in out
            )
            findings.append(
                warn("optimum_outside_range", f"the optimum lies {side} the {edge} size: {where}")
            )
    return findings


def _list(values: list[float]) -> str:
    if len(values) > 5:
        return (
            f"{len(values)} budgets from {labels.flops(min(values))} to {labels.flops(max(values))}"
        )
    return ", ".join(labels.flops(value) for value in values)
