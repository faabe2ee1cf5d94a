"""Intervals of everything that is computed from a fitted law: by resampling, and by profiles.

Resampling. Runs are drawn with replacement within each budget, as multinomial weights rather than
copies, so thousands of replicates share one set of arrays and go through the same Newton solver
together. Checkpoints of one run share its luck, and runs of one trajectory are one run until the
first of them cools down: where such enter, the errors of each run or trajectory are kept together
and multiplied by one random factor (the wild cluster bootstrap; Cameron, Gelbach and Miller 2008,
Review of Economics and Statistics 90, with the six factors of Webb 2014). An error is a residual
for least squares; for a robust objective it is psi(residual) / mean(psi'), by least squares of
which the fit moves as it does by its own objective, and which has no kink for residuals to stay at.

Profiles: how far a quantity can be pushed before the runs object. The objective is minimised over
everything else with the quantity held at c. Twice its rise above the minimum, over kappa, is
compared with F(1, n - 5), where

    kappa = mean(psi**2) n / (n - 5) / mean(psi'),    psi = rho'

makes the rise of a robust objective what the likelihood ratio is for normal noise (Schrader and
Hettmansperger 1980, Biometrika 67; it is the residual variance for least squares). mean(psi') is
taken over a kernel density of the residuals: of 60 runs too few lie within Huber's delta to be
counted. Runs of several checkpoints count once, and so do trajectories. An end is None where the
objective never rises enough: the runs do not bound the quantity on that side.

A quantity (`laws.Quantity`) is held by taking the place of an unknown: with g = c and the other
unknowns given, that one is known, in closed form, and the objective is refitted over the others.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import fdtri

from prime_jax.scaling import newton
from prime_jax.scaling.approach3 import Fit, Problem, solve
from prime_jax.scaling.laws import Law, Quantity

Array = NDArray[np.float64]

BLOCK = 20_000  # runs x replicates per numpy call: arrays of this size stay in the cache
WEBB = np.sqrt([0.5, 1.0, 1.5]).repeat(2) * np.tile([-1.0, 1.0], 3)  # mean 0, variance 1
NEAR = 1e-9  # the minimum that is a point of a profile is found to this fraction of the limit
CLOSE = 1e-7  # an end is found when the root of the rise is within this fraction of its limit
ROUNDS = 40
STEPS = 100  # of Newton's method for one point of a profile
FAR = 50.0  # an end this far from the fit, a factor of e**50, is none
STEEP = 10.0  # a root of this size and more is as good as any
SILENT = 1e-6  # residuals of runs without noise


def bootstrap_weights(strata_n: ArrayLike, replicates: int, seed: int) -> Array:
    """Weights_Rxn: how often each run is drawn; every stratum keeps its number of runs."""
    rng = np.random.default_rng(seed)
    strata = np.asarray(strata_n)
    out = np.empty((replicates, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        out[:, members] = rng.multinomial(
            len(members), np.full(len(members), 1 / len(members)), size=replicates
        )
    return out


def resample(p: Problem, fitted: Fit, weight_Rxn: Array) -> Law:
    """The law refitted to each replicate, started at the fit: a `Law` of arrays [R]."""
    return _refit(p, fitted, p.weight_n * weight_Rxn)


def wild_resample(p: Problem, fitted: Fit, run_n: ArrayLike, replicates: int, seed: int) -> Law:
    """The law refitted to its own losses and the errors of the runs, each times a random factor."""
    labels, run = np.unique(run_n, return_inverse=True)
    factor_RxG = np.random.default_rng(seed).choice(WEBB, (replicates, len(labels)))
    spread = np.sqrt(len(labels) / max(len(labels) - p.unknowns, 1))  # a fit hugs its data
    residual = p.residual(fitted.theta_K)
    error = -spread * np.clip(residual, -p.delta, p.delta) / p.curvature(residual)
    drawn = p.log_loss_n + residual + factor_RxG[:, run] * error
    squares = replace(p, log_loss_n=drawn, objective="ls", delta=np.inf)
    return _refit(squares, fitted, np.broadcast_to(p.weight_n, drawn.shape))


def _refit(p: Problem, fitted: Fit, weight_Rxn: Array) -> Law:
    size = max(1, BLOCK // weight_Rxn.shape[1])
    ends = []
    for first in range(0, len(weight_Rxn), size):
        block = np.arange(first, min(first + size, len(weight_Rxn)))
        start = np.tile(fitted.theta_K, (len(block), 1))
        ends.append(solve(p.at(block), start, weight_Rxn[block])[0])
    return p.form.law(np.concatenate(ends))


def at_bound(p: Problem, replicates: Law) -> dict[str, float]:
    """The fraction of replicates that end at a bound of the search, by parameter."""
    theta_RxK = p.form.theta(replicates)
    lower, upper = p.box()
    slack = 1e-9 * (upper - lower)
    held = (theta_RxK <= lower + slack) | (theta_RxK >= upper - slack)
    return dict(zip(p.form.names, held.mean(axis=0).tolist(), strict=True))


def percentiles(values_R: Array, level: float = 0.95) -> list[float]:
    """Percentile interval along the first axis, ends [lower, upper]."""
    tail = 50 * (1 - level)
    return np.percentile(values_R, [tail, 100 - tail], axis=0).tolist()


def known_percentiles(draws_R: Array | None, level: float = 0.95) -> list[float] | None:
    """Percentile interval of draws that may be NaN (no minimum, too few winners).

    None without draws, or where more of them are missing than the tails may hold.
    """
    if draws_R is None:
        return None
    tail = (1 - level) / 2
    missing = np.isnan(draws_R)
    if missing.mean() > tail:
        return None
    return np.quantile(draws_R[~missing], [tail, 1 - tail]).tolist()


Ends = tuple[float | None, float | None]


def profiles(
    p: Problem,
    fit: Fit,
    quantities: Sequence[Quantity],
    level: float = 0.95,
    runs: NDArray[np.int_] | None = None,
) -> list[Ends]:
    """Profile intervals of all quantities, in natural units.

    Args:
        p, fit: the objective and its minimum.
        quantities: of the form of the law.
        level: of each interval.
        runs: the run of each point, [n], where several may be checkpoints of one.
    """
    if np.abs(p.residual(fit.theta_K)).max() < SILENT:
        exact = [float(q.natural(q.at(fit.theta_K)[0])) for q in quantities]
        return [(value, value) for value in exact]
    kappa, freedom = robust_scale(p, p.residual(fit.theta_K), runs)
    profile = _Profiles(p, fit.theta_K, quantities, 0.5 * kappa * fdtri(1, freedom, level))
    pairs = zip(*[iter(_search(profile))] * 2, quantities, strict=True)
    return [(_natural(q, low), _natural(q, high)) for low, high, q in pairs]


def robust_scale(
    p: Problem, residual: Array, runs: NDArray[np.int_] | None = None
) -> tuple[float, int]:
    """kappa of the residuals of a fit, and the degrees of freedom of its numerator."""
    count = len(residual)
    independent = count if runs is None else len(np.unique(runs))
    freedom = max(independent - p.unknowns, 1)
    score = np.clip(residual, -p.delta, p.delta)
    squares = np.sum((p.weight_n * score) ** 2) / freedom
    return float(squares / (np.mean(p.weight_n) * p.curvature(residual))), freedom


class Replaced(NamedTuple):
    """P quantities, each in the place of an unknown: with g and the others that one is known.

    It is u, or exp(u) where g has its log, with

        scale u = g (plain + divide . theta) - constant - linear . theta - logs . log theta

    Attributes:
        unknown: which one, [P].
        scale, log: what g has it times, and whether that is its log, [P].
        constant, plain, linear, logs, divide: of g, [P] or [P, K]; 0 for this unknown.
    """

    unknown: NDArray[np.intp]
    scale: Array
    log: NDArray[np.bool_]
    constant: Array
    plain: Array
    linear: Array
    logs: Array
    divide: Array

    @classmethod
    def of(cls, quantities: Sequence[Quantity]) -> "Replaced":
        rows = []
        for q in quantities:
            j, log = q.solvable
            others = (np.where(np.arange(len(r)) == j, 0.0, r) for r in (q.linear_K, q.logs_K, q.divide_K))  # fmt: skip
            scale = (q.logs_K if log else q.linear_K)[j]
            rows.append((j, scale, log, q.constant, q.plain, *others))
        return cls(*(np.array(column) for column in zip(*rows, strict=True)))

    def at(self, which: NDArray[np.intp]) -> "Replaced":
        return Replaced(*(column[which] for column in self))

    def fill(self, value_P: Array, theta_PxK: Array) -> tuple[Array, Array, Array]:
        """The unknowns with those replaced that follow from g = `value_P` and the others, and
        their gradient_PxK and Hessian_PxKxK by the others."""
        g, scale, log = value_P[:, None], self.scale[:, None], self.log[:, None]
        used = np.where(self.logs != 0, theta_PxK, 1.0)
        slope = g * self.divide - self.linear
        top = value_P * self.plain - self.constant
        u = (top + np.sum(slope * theta_PxK - self.logs * np.log(used), axis=1)) / self.scale
        first = (slope - self.logs / used) / scale
        second = np.eye(theta_PxK.shape[1]) * (self.logs / used**2 / scale)[:, None]
        second = second + (log * first)[:, :, None] * first[:, None, :]
        power = np.exp(np.where(self.log, u, 0.0))  # 1 where the unknown is u itself
        theta = theta_PxK.copy()
        theta[np.arange(len(theta)), self.unknown] = np.where(self.log, power, u)
        return theta, power[:, None] * first, power[:, None, None] * second


class _Profiles:
    """The objective with each of P quantities held and everything else refitted.

    There are two for each quantity: a search downward and one upward. A refit starts on the line
    from the fit through the last one below the limit, the first along d theta / d g.

    Attributes:
        best, step: g at the fit, and first steps, [P].
    """

    def __init__(self, p: Problem, fit_K: Array, quantities: Sequence[Quantity], limit: float):
        self.p, self.fit_K, self.limit, self.lowest = p, fit_K, limit, p.value(fit_K)
        _, gradient, hessian = p.derivatives(fit_K[None], p.weight_n[None])
        moves = np.ix_(*[newton.free(fit_K, gradient[0], *p.box())] * 2)
        inverse = np.zeros_like(hessian[0])
        inverse[moves] = np.linalg.pinv(hessian[0][moves], hermitian=True)
        best, slope = (np.array(x) for x in zip(*(q.at(fit_K) for q in quantities), strict=True))
        variance = np.abs(np.sum(slope * (slope @ inverse), axis=1))
        known = variance > 0  # else it is at a bound
        size = np.where(known, np.sqrt(2 * limit * variance), 1.0)
        along = slope @ inverse / np.where(known, variance, 1.0)[:, None]
        self.held = Replaced.of([q for q in quantities for _ in range(2)])
        self.best, self.step = best.repeat(2), np.stack([-size, size], 1).ravel()
        self.at, self.along = self.best.copy(), along.repeat(2, axis=0)
        self.near = np.tile(fit_K, (len(self.best), 1))
        self.last = self.near.copy()

    def roots(self, which: NDArray[np.intp], value_P: Array) -> Array:
        """The root of the rise over its limit, of the profiles `which` at the values."""
        start = self.near[which] + (value_P - self.at[which])[:, None] * self.along[which]
        with np.errstate(over="ignore", invalid="ignore"):  # beyond what a law can be
            floor = max(self.p.floor, NEAR * self.limit)
            theta, objective = _refit_others(self.p, self.held.at(which), value_P, start, floor)
        root = np.fmin(np.sqrt(np.maximum(objective - self.lowest, 0) / self.limit), STEEP)
        self.last[which] = theta
        below = which[root < 1]
        self.near[below], self.at[below] = theta[root < 1], value_P[root < 1]
        self.along[below] = (theta[root < 1] - self.fit_K) / (self.at - self.best)[below, None]
        return root

    def inside(self) -> NDArray[np.bool_]:
        """Whether the last laws were within the bounds of the search, [P]."""
        lower, upper = self.p.box()
        return np.all((self.last >= lower) & (self.last <= upper), axis=1)


def _refit_others(
    p: Problem, held: Replaced, value_P: Array, start_PxK: Array, floor: float
) -> tuple[Array, Array]:
    """Minima over the unknowns that are not replaced: theta_PxK and the objective_P, to `floor`."""
    weight = np.broadcast_to(p.weight_n, (len(start_PxK), p.runs))

    def derivatives(theta: Array, which: NDArray[np.intp]) -> tuple[Array, Array, Array]:
        part = held.at(which)
        full, first, second = part.fill(value_P[which], theta)
        value, gradient, hessian = p.derivatives(full, weight[which])
        own = np.arange(len(which)), part.unknown
        jacobian = np.tile(np.eye(theta.shape[1]), (len(which), 1, 1))  # by the others
        jacobian[own] = first
        back = jacobian.transpose(0, 2, 1)
        hessian = back @ hessian @ jacobian + gradient[own][:, None, None] * second
        gradient = (back @ gradient[:, :, None])[:, :, 0]
        lost = ~np.isfinite(hessian).all(axis=(1, 2))  # beyond all numbers
        value[lost], gradient[lost], hessian[lost] = np.inf, 0.0, 0.0
        return value, gradient, hessian

    theta, value = newton.minimise(derivatives, start_PxK, *p.box(), floor, steps=STEPS)
    return held.fill(value_P, theta)[0], value


def _search(profile: _Profiles) -> list[float | None]:
    """The value of each quantity at which the root reaches 1.

    Steps double until the root is above 1, and are then divided by the Illinois method: straight
    lines, and half the height of an end that stays. None where that leads further than FAR, or
    out of the bounds of the law.
    """
    best, step = profile.best, profile.step.copy()
    count = len(best)
    inner, below = best.copy(), np.full(count, -1.0)
    outer, above = np.full(count, np.nan), np.full(count, np.nan)
    aim, last = best + step, np.zeros(count)
    found: list[float | None] = [None] * count
    active = np.arange(count)
    for _ in range(ROUNDS):
        if not len(active):
            break
        going = []
        for k, root in zip(active, profile.roots(active, aim[active]), strict=True):
            off = root - 1
            if abs(off) < CLOSE:
                found[k] = float(aim[k])
                continue
            if off > 0:
                outer[k], above[k] = aim[k], off
            else:
                inner[k], below[k] = aim[k], off
            if np.isfinite(outer[k]):
                if last[k] * off > 0:
                    (below if off > 0 else above)[k] *= 0.5
                last[k] = off
                aim[k] = inner[k] - below[k] / (above[k] - below[k]) * (outer[k] - inner[k])
            elif abs(inner[k] - best[k]) < FAR:
                step[k] *= 2
                aim[k] = inner[k] + step[k]
            else:
                continue
            going.append(k)
        active = np.array(going, dtype=int)
    for k in np.flatnonzero(np.isfinite(outer)):  # a jump of the profile: where it is crossed
        if found[k] is None:
            found[k] = float(0.5 * (inner[k] + outer[k]))
    inside = profile.inside()
    return [end if within else None for end, within in zip(found, inside, strict=True)]


def _natural(quantity: Quantity, value: float | None) -> float | None:
    return None if value is None else float(quantity.natural(np.array(value)))
