"""The best learning rate as a law: lr* = k N**n D**d B**b, from cells that were run at several rates.

A cell is runs of one N, D and batch size. A parabola in log lr gives its best rate, whose error
follows from the misfit of all parabolas; a best rate outside the sampled ones is only a bound and
is left out, with a warning. The law is least squares on the log rates, weighted by their errors:
its form is that of any law (`laws.Form`), linear in its unknowns. B enters where it varies.

Where the plan says what its rule would have chosen, the best rates are compared with that, too:
a rule that drifts, being right at one corner of a grid and wrong at another, bends the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prime_jax.scaling import approach3, labels, noise
from prime_jax.scaling.approach3 import Certificate, Fit, Problem
from prime_jax.scaling.intervals import Ends, profiles
from prime_jax.scaling.laws import Quantity, quantity
from prime_jax.scaling.points import Points, cells, groups
from prime_jax.scaling.schema import Diagnostic, hidden, key, refuse, warn

Array = NDArray[np.float64]

MIN_RATES = 3  # of a cell: a parabola has three unknowns
SPARE = 2  # cells beyond the unknowns of the law
DRIFT = 2**0.5  # half a step between rates a factor of two apart; with .03 nats per (d log lr)**2
# it costs .004 nats, as much as another seed
CERTAIN = 3.0  # standard errors of the difference: the largest of several has to pass
TOGETHER = 1e-3  # of the spread of log N, log D and log B: less of its own is none


BOUND = {"above": "at least ", "below": "at most ", None: ""}  # a best rate beyond those sampled


@dataclass(frozen=True)
class RateLaw:
    k: Array | float
    n: Array | float
    d: Array | float
    b: Array | float = 0.0

    formula = "lr* = k N^n D^d B^b"

    def rate(self, params: ArrayLike, tokens: ArrayLike, batch: ArrayLike = 1.0) -> Array:
        return (
            self.k * np.power(params, self.n) * np.power(tokens, self.d) * np.power(batch, self.b)
        )


@dataclass(frozen=True)
class RateForm:
    """The unknowns are log lr* at the centre of the cells, and the exponents in standard deviations
    of log N, log D and, where there are four, log B."""

    features_nxK: Array
    centre: Array  # of the logs, [K - 1]
    scale: Array

    logs = ()

    @classmethod
    def on(cls, *counts: Array) -> "RateForm":
        """Of N, D and perhaps B of the cells, [n] each."""
        logs = np.log(np.stack(counts, -1))
        centre, scale = logs.mean(axis=0), logs.std(axis=0)
        ones = np.ones((len(logs), 1))
        return cls(np.hstack([ones, (logs - centre) / scale]), centre, scale)

    @property
    def names(self) -> tuple[str, ...]:
        return ("k", "n", "d", "b")[: len(self.scale) + 1]

    def predict(self, theta_PxK: Array) -> tuple[Array, None]:
        """log lr*."""
        return theta_PxK @ self.features_nxK.T, None

    def derivatives(self, parts: None, slope_Pxn: Array, curve_Pxn: Array) -> tuple[Array, Array]:
        x = self.features_nxK
        return slope_Pxn @ x, np.einsum("pn,nk,nl->pkl", curve_Pxn, x, x)

    def gradient_size(self, parts: None, weight_n: Array) -> Array:
        return (weight_n @ np.abs(self.features_nxK))[None]

    def starts(self, log_rate_n: Array) -> Array:
        """9: of the exponents of N and D."""
        rows = [
            [log_rate_n.mean(), n * self.scale[0], d * self.scale[1]]
            for n in (-1.0, 0.0, 1.0)
            for d in (-1.0, 0.0, 1.0)
        ]
        return np.hstack([rows, np.zeros((9, len(self.names) - 3))])

    def box(self, log_rate_n: Array) -> tuple[Array, Array]:
        """Rates within a factor of e**10 of the cells, exponents from -5 to 5."""
        middle, reach = log_rate_n.mean(), np.concatenate([[10.0], 5 * self.scale])
        shift = np.eye(len(self.names))[0] * middle
        return shift - reach, shift + reach

    def law(self, theta: Array) -> RateLaw:
        exponents = theta[..., 1:] / self.scale
        return RateLaw(
            np.exp(theta[..., 0] - exponents @ self.centre),
            *(exponents[..., k] for k in range(len(self.scale))),
        )

    def theta(self, law: RateLaw) -> Array:
        names = self.names[1:]
        exponents = np.stack([np.asarray(getattr(law, name)) for name in names], -1)
        first = np.log(law.k) + exponents @ self.centre
        return np.concatenate([np.asarray(first)[..., None], exponents * self.scale], -1)

    def quantities(self) -> dict[str, Quantity]:
        found = {"k": self.rate_at(np.zeros(len(self.scale)))}
        for j, name in enumerate(self.names[1:]):
            row = np.eye(len(self.names))[j + 1] / self.scale[j]
            found[name] = quantity(linear=row, natural=lambda g: g)
        return found

    def rate_at(self, logs: Array) -> Quantity:
        """lr* at the logs of N, D and perhaps B."""
        return quantity(linear=[1.0, *((logs - self.centre) / self.scale)])


@dataclass(frozen=True)
class RateCell:
    """Runs that differ in their learning rate only.

    Attributes:
        rates: lowest and highest.
        best: of the parabola; where it is `censored` (below, above) the rate at that edge.
        curvature: of the loss, nats per (d log lr)**2.
        sd: of log best.
        rule: the rate that the rule of the plan gives; None if that is not known.
        law: what the fitted law says; None without one.
    """

    flops: float
    params: float
    tokens: float
    batch: float | None
    rates: list[float]
    runs: int
    best: float
    curvature: float
    censored: str | None
    sd: float | None
    rule: float | None
    law: float | None = None


@dataclass(frozen=True)
class HeldOutRate:
    """A cell of a later budget, by the law of the earlier ones; error is predicted over best."""

    fitted: float
    flops: float
    params: float
    best: float
    predicted: float
    error: float


@dataclass(frozen=True)
class RateFit:
    """The law of a family; nothing but cells and warnings where it is refused."""

    params: RateLaw | None = key("`{k, n, d, b}`: lr\\* = k N^n D^d B^b; null if refused")
    objective: float | None = key("weighted sum of squared log residuals / 2", default=None)
    certificate: Certificate | None = key("as that of approach 3", default=None)
    profile: dict[str, Ends] | None = key(
        "`[low, high]` of each parameter by profile likelihood", default=None
    )
    cells: tuple[RateCell, ...] = key(
        "`flops, params, tokens, batch, rates, runs, best, curvature, censored, sd, rule, law`",
        default=(),
    )
    held_out: tuple[HeldOutRate, ...] = key(
        "cells of larger budgets predicted from smaller ones: `fitted, flops, params, best, predicted, error`",
        default=(),
    )
    error: float | None = key("rms of the log of those errors", default=None)
    warnings: tuple[Diagnostic, ...] = key("warnings of this law", default=())
    problem: Problem | None = hidden(default=None)
    fit: Fit | None = hidden(default=None)

    def at(self, params: float, tokens: float, batch: float = 1.0, level: float = 0.95) -> Ends:
        """Profile interval of the best rate of a run."""
        form = self.problem.form
        logs = np.log([params, tokens, batch])[: len(form.scale)]
        return profiles(self.problem, self.fit, [form.rate_at(logs)], level)[0]


def fit(points: Points, level: float = 0.95) -> RateFit:
    """The law of a family, or why there is none."""
    found = cells_of(points)
    if not found:
        none = f"no cell of {points.family} was run at {MIN_RATES} learning rates or more"
        return RateFit(None, warnings=(refuse("too_few_rates", none),))
    inside = [cell for cell in found if cell.censored is None]
    warnings = [*_edges(found), *drift_findings(found)]
    if all(cell.runs == MIN_RATES for cell in found):  # no parabola has a misfit
        warnings += [one for one in points.diagnostics if one.code == "no_seed_repeats"]
    if refusal := _refusal(inside):
        return RateFit(None, cells=found, warnings=(refusal, *warnings))
    p = problem(inside)
    fitted = approach3.fit(p)
    named = p.form.quantities()
    ends = dict(zip(named, profiles(p, fitted, list(named.values()), level), strict=True))
    held_out = _held_out(inside)
    errors = np.log([one.error + 1 for one in held_out])
    told = tuple(replace(cell, law=_rate(fitted.law, cell)) for cell in found)
    if not held_out:
        few = "too few budgets to predict the rates of larger ones from those of smaller ones"
        warnings.append(warn("too_few_budgets", few))
    return RateFit(
        params=fitted.law,
        objective=fitted.objective,
        certificate=fitted.certificate,
        profile=ends,
        cells=told,
        held_out=held_out,
        error=float(np.sqrt(np.mean(errors**2))) if held_out else None,
        warnings=tuple(warnings),
        problem=p,
        fit=fitted,
    )


def problem(inside: Sequence[RateCell]) -> Problem:
    """Weighted least squares of the log rates, by their errors and the scatter beyond these."""
    rates = np.log([cell.best for cell in inside])
    variance = np.array([cell.sd**2 for cell in inside])
    even = Problem(
        form=RateForm.on(*_counts(inside)),
        log_loss_n=rates,
        weight_n=np.ones(len(rates)),
        objective="ls",
        delta=np.inf,
    )
    if np.ptp(variance) == 0:
        return even
    scatter = noise.scatter(even.residual(approach3.fit(even).theta_K), even.unknowns)
    weight = 1 / (variance + max(scatter**2 - variance.mean(), 0.0))
    return replace(even, weight_n=weight / weight.mean())


def cells_of(points: Points) -> tuple[RateCell, ...]:
    """The cells with three rates or more, smallest C and N first."""
    if points.lr is None:
        return ()
    x = np.log(points.lr)
    fresh = np.minimum(points.available, points.tokens)
    cell_n = cells(points.params, points.tokens, points.batch, fresh)
    several = [
        members
        for members in groups(np.where(np.isfinite(x), cell_n, -1))
        if len(np.unique(x[members])) >= MIN_RATES
    ]
    sigma = _noise(points, several)
    found = [_cell(points, members, sigma) for members in several]
    return tuple(sorted(found, key=lambda cell: (cell.flops, cell.params)))


def _noise(points: Points, several: Sequence[NDArray[np.intp]]) -> float:
    """Relative standard deviation of a loss: the misfit of the parabolas; else of the seeds, which is
    assumed where no run is repeated."""
    squares = freedom = 0.0
    for members in several:
        x, y = np.log(points.lr[members]), np.log(points.loss[members])
        if len(members) > MIN_RATES:
            residual = y - np.polyval(np.polyfit(x, y, 2), x)
            squares, freedom = squares + residual @ residual, freedom + len(members) - 3
    return float(np.sqrt(squares / freedom)) if freedom else noise.of(points).seed.relative_sd


def _cell(points: Points, members: NDArray[np.intp], sigma: float) -> RateCell:
    x, loss, first = np.log(points.lr[members]), points.loss[members], members[0]
    centre = x.mean()
    columns = np.stack([np.ones_like(x), x - centre, (x - centre) ** 2], 1)
    _, slope, bend = np.linalg.lstsq(columns, loss, rcond=None)[0]
    low, high, minimum = x.min(), x.max(), centre - slope / (2 * bend) if bend > 0 else np.nan
    side, best, sd = None, minimum, None
    if not low < minimum < high:
        rising = minimum <= low if bend > 0 else slope > 0
        side, best = ("below", low) if rising else ("above", high)
    else:
        covariance = np.linalg.inv(columns.T @ columns) * (sigma * loss.mean()) ** 2
        by = np.array([0.0, -1 / (2 * bend), slope / (2 * bend**2)])
        sd = float(np.sqrt(by @ covariance @ by))
    return RateCell(
        flops=float(points.budget[first]),
        params=float(points.params[first]),
        tokens=float(points.tokens[first]),
        batch=None if points.batch is None else float(points.batch[first]),
        rates=np.exp([low, high]).tolist(),
        runs=len(members),
        best=float(np.exp(best)),
        curvature=float(bend),
        censored=side,
        sd=sd,
        rule=None if points.rule_lr is None else _known(points.rule_lr[members]),
    )


def _known(rates: Array) -> float | None:
    known = rates[np.isfinite(rates)]
    return float(np.median(known)) if len(known) else None


def _counts(inside: Sequence[RateCell]) -> list[Array]:
    """N and D, and B where it varies by itself."""
    counts = [np.array([getattr(cell, name) for cell in inside]) for name in ("params", "tokens")]
    batch = np.array([cell.batch or np.nan for cell in inside])
    if np.isfinite(batch).all() and _free([*counts, batch]) and len(inside) >= 4 + SPARE:
        counts.append(batch)
    return counts


def _free(counts: Sequence[Array]) -> bool:
    """Whether none of the logs follows from the others."""
    logs = np.log(np.stack(counts, -1))
    spread = logs - logs.mean(axis=0)
    return bool(np.linalg.svd(spread, compute_uv=False)[-1] > TOGETHER * np.sqrt(len(logs)))


def _refusal(inside: Sequence[RateCell]) -> Diagnostic | None:
    if len(inside) < 3 + SPARE:
        return refuse(
            "too_few_rates",
            f"{len(inside)} cells have their best rate within those sampled; a law needs {3 + SPARE}",
        )
    if not _free(_counts(inside)[:2]):
        return refuse(
            "too_few_rates", "N and D of the cells go together: their exponents cannot be told"
        )
    return None


def _edges(found: Sequence[RateCell]) -> list[Diagnostic]:
    edge = [cell for cell in found if cell.censored]
    if not edge:
        return []
    shown = ", ".join(
        f"{cell.censored} {cell.best:.2g} at {labels.flops(cell.flops)} FLOPs, N = {labels.count(cell.params)}"
        for cell in edge[:3]
    )
    return [
        warn(
            "rate_at_edge",
            f"the best rate of {len(edge)} of {len(found)} cells lies outside: {shown}",
        )
    ]


def drift_findings(found: Sequence[RateCell]) -> list[Diagnostic]:
    """A warning where the best rates leave the rule's by factors that differ between cells, by more
    than their errors; the largest error stands for those of cells whose best rate is a bound."""
    known = [cell for cell in found if cell.rule]
    lowest = [cell for cell in known if cell.censored != "above"]  # at most this factor
    highest = [cell for cell in known if cell.censored != "below"]  # at least this one
    if not lowest or not highest:
        return []
    low, high = min(lowest, key=_factor), max(highest, key=_factor)
    most = max((cell.sd or 0.0 for cell in known), default=0.0)
    error = np.hypot(*(most if cell.sd is None else cell.sd for cell in (low, high)))
    if np.log(_factor(high) / _factor(low)) <= max(np.log(DRIFT), CERTAIN * error):
        return []
    shown = " and ".join(
        f"{BOUND[cell.censored]}{_factor(cell):.2g} times"
        f" the rule's at {labels.flops(cell.flops)} FLOPs, N = {labels.count(cell.params)}"
        for cell in (low, high)
    )
    return [warn("rate_drifts", f"the best learning rate is {shown}")]


def _factor(cell: RateCell) -> float:
    """The best rate over the rule's."""
    return cell.best / cell.rule


def _held_out(inside: Sequence[RateCell]) -> tuple[HeldOutRate, ...]:
    """The cells beyond each beginning of the budgets that determines a law."""
    budgets = sorted({cell.flops for cell in inside})
    out = []
    for last in budgets[:-1]:
        known = [cell for cell in inside if cell.flops <= last]
        if _refusal(known):
            continue
        law = approach3.fit(problem(known)).law
        for cell in inside:
            if cell.flops > last:
                told = _rate(law, cell)
                error = told / cell.best - 1
                out.append(HeldOutRate(last, cell.flops, cell.params, cell.best, told, error))
    return tuple(out)


def _rate(law: RateLaw, cell: RateCell) -> float:
    return float(law.rate(cell.params, cell.tokens, cell.batch or 1.0))
