"""Intervals of everything that is computed from a fitted law: by resampling, and by profiles.

Resampling. Runs are drawn with replacement within each budget, as multinomial weights rather than
copies, so thousands of replicates share one set of arrays and go through the same Newton solver
together. Checkpoints of one run share its luck: where they enter, the errors of each run are kept
together and multiplied by one random factor (the wild cluster bootstrap; Cameron, Gelbach and
Miller 2008, Review of Economics and Statistics 90, with the six factors of Webb 2014). An error is
a residual for least squares; for a robust objective it is psi(residual) / mean(psi'), by least
squares of which the fit moves as it does by its own objective, and which has no kink for residuals
to stay at.

Profiles: how far a quantity can be pushed before the runs object. The objective is minimised over
everything else with the quantity held at c. Twice its rise above the minimum, over kappa, is
compared with F(1, n - 5), where

    kappa = mean(psi**2) n / (n - 5) / mean(psi'),    psi = rho'

makes the rise of a robust objective what the likelihood ratio is for normal noise (Schrader and
Hettmansperger 1980, Biometrika 67; it is the residual variance for least squares). mean(psi') is
taken over a kernel density of the residuals: of 60 runs too few lie within Huber's delta to be
counted. Runs of several checkpoints count once. An end is None where the objective never rises
enough: the runs do not bound the quantity on that side.

A quantity (`laws.Quantity`) is held by a penalty instead of a constraint: the minimum of
objective + weight (g - c)**2 lies exactly on the profile, at the g that it ends with.
"""

from collections.abc import Callable, Sequence
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
PENALTY = 100.0  # the penalty's curvature over that of the objective along the quantity
CLOSE = 1e-7  # an end is found when the root of the rise is within this fraction of its limit
ROUNDS, DOUBLINGS = 40, 10
STEPS = 100  # of Newton's method for one point of a profile
FAR = 50.0  # an end this far from the fit, a factor of e**50, is none
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
        exact = [float(q.natural(values([q], fit.theta_K[None])[0])[0]) for q in quantities]
        return [(value, value) for value in exact]
    kappa, freedom = robust_scale(p, p.residual(fit.theta_K), runs)
    rise = 0.5 * kappa * fdtri(1, freedom, level)
    both = _Stack.of([q for q in quantities for _ in range(2)])
    ends = _search(*_pushed(p, fit.theta_K, both, rise), far=FAR)
    pairs = zip(ends[::2], ends[1::2], quantities, strict=True)
    return [(_natural(q, low), _natural(q, high)) for low, high, q in pairs]


def profile_of(
    objective: Callable[[float], float],
    best: float,
    rise: float,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> Ends:
    """Where a function of one number has risen by `rise` above its minimum, which is at `best`.

    For a quantity of another law: `objective` is then its minimum over everything else. An end
    beyond the limits is open.
    """
    lowest = objective(best)

    def push(which: NDArray[np.intp], aim: Array) -> tuple[Array, Array]:
        at = np.clip(aim, *limits)
        values = np.array([objective(float(c)) for c in at])
        return at, np.sqrt(np.maximum(values - lowest, 0) / rise)

    step = 0.1 * max(abs(best), 1.0)
    low, high = _search(push, np.full(2, best), np.array([-step, step]))
    return low, high


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


class _Stack(NamedTuple):
    """The coefficients of several quantities [P], for as many settings of the unknowns."""

    constant: Array
    linear: Array
    logs: Array
    plain: Array
    divide: Array

    @classmethod
    def of(cls, quantities: Sequence[Quantity]) -> "_Stack":
        rows = [(q.constant, q.linear_K, q.logs_K, q.plain, q.divide_K) for q in quantities]
        return cls(*(np.array(column) for column in zip(*rows, strict=True)))

    def at(self, which: NDArray[np.intp]) -> "_Stack":
        return _Stack(*(column[which] for column in self))


def values(quantities: Sequence[Quantity], theta_PxK: Array) -> tuple[Array, Array, Array]:
    """The P quantities at P settings: g_P (before `natural`), its gradient_PxK, Hessian_PxKxK."""
    return _values(_Stack.of(quantities), theta_PxK)


def _values(g: _Stack, theta_PxK: Array) -> tuple[Array, Array, Array]:
    used = np.where(g.logs != 0, theta_PxK, 1.0)
    top = g.constant + np.sum(g.linear * theta_PxK + g.logs * np.log(used), axis=1)
    below = g.plain + np.sum(g.divide * theta_PxK, axis=1)
    value = top / below
    gradient = (g.linear + g.logs / used - value[:, None] * g.divide) / below[:, None]
    diagonal = np.arange(theta_PxK.shape[1])
    hessian = np.zeros((len(value), len(diagonal), len(diagonal)))
    hessian[:, diagonal, diagonal] = -g.logs / used**2
    cross = gradient[:, :, None] * g.divide[:, None, :]
    return value, gradient, (hessian - cross - cross.transpose(0, 2, 1)) / below[:, None, None]


# (problem indices_P, aims_P) -> values reached_P, roots_P of the rise there over its limit
Push = Callable[[NDArray[np.intp], Array], tuple[Array, Array]]


def _pushed(p: Problem, theta_K: Array, g: _Stack, rise: float) -> tuple[Push, Array, Array]:
    """Minima of the objective with each quantity near its aim, the values at the fit, and first
    steps: downward and upward by turns."""
    count = len(g.constant)
    theta, deficit = np.tile(theta_K, (count, 1)), np.zeros(count)
    weight = np.broadcast_to(p.weight_n, (count, p.runs))
    lowest, _, hessian = p.derivatives(theta_K[None], p.weight_n[None])
    best, slope, _ = _values(g, theta)
    spread = np.sum(slope * (slope @ np.linalg.pinv(hessian[0], hermitian=True)), axis=1)
    curvature = np.abs(1 / spread)

    def push(which: NDArray[np.intp], aim: Array) -> tuple[Array, Array]:
        target, penalty = aim + deficit[which], PENALTY * curvature[which]
        theta[which] = _held(
            p,
            g=g.at(which),
            start_PxK=theta[which],
            weight_Pxn=weight[which],
            target_P=target,
            stiff_P=penalty,
        )
        value = _values(g.at(which), theta[which])[0]
        deficit[which] = target - value  # what the penalty gives way by, made up for next time
        objective = p.derivatives(theta[which], weight[which])[0]
        return value, np.sqrt(np.maximum(objective - lowest, 0) / rise)

    side = np.tile([-1.0, 1.0], count // 2)
    return push, best, side * np.sqrt(2 * rise / curvature)


def _search(push: Push, best_P: Array, step_P: Array, far: float = np.inf) -> list[float | None]:
    """The value at which the root reaches 1, from `best` in the direction of `step`.

    Steps double until the root is above 1, and are then divided by the Illinois method: straight
    lines, and half the height of an end that stays. None where that takes too many or leads
    further than `far`.
    """
    count = len(best_P)
    inner, below, step = best_P.copy(), np.full(count, -1.0), step_P.copy()
    outer, above = np.full(count, np.nan), np.full(count, np.nan)
    aim, doubled, last = best_P + step, np.zeros(count, dtype=int), np.zeros(count)
    found: list[float | None] = [None] * count
    active = np.arange(count)
    for _ in range(ROUNDS):
        if not len(active):
            break
        going = []
        for k, at, root in zip(active, *push(active, aim[active]), strict=True):
            off = root - 1
            if abs(off) < CLOSE:
                found[k] = float(at)
                continue
            bounded = off > 0 or np.isfinite(outer[k])
            if off > 0:
                outer[k], above[k] = at, off
            elif bounded or abs(at - inner[k]) > 0.1 * abs(aim[k] - inner[k]):
                inner[k], below[k] = at, off
            else:
                continue  # at the edge of what a law can be
            if bounded:
                if last[k] * off > 0:
                    (below if off > 0 else above)[k] *= 0.5
                last[k] = off
                aim[k] = inner[k] - below[k] / (above[k] - below[k]) * (outer[k] - inner[k])
            elif doubled[k] < DOUBLINGS and abs(inner[k] - best_P[k]) < far:
                doubled[k] += 1
                step[k] *= 2
                aim[k] = inner[k] + step[k]
            else:
                continue
            going.append(k)
        active = np.array(going, dtype=int)
    for k in np.flatnonzero(np.isfinite(outer)):  # a jump of the profile: where it is crossed
        if found[k] is None:
            found[k] = float(0.5 * (inner[k] + outer[k]))
    return found


def _held(
    p: Problem, g: _Stack, start_PxK: Array, weight_Pxn: Array, target_P: Array, stiff_P: Array
) -> Array:
    """The minimum of objective + stiff / 2 (g - target)**2, [P, 5]."""

    def derivatives(theta: Array, which: NDArray[np.intp]) -> tuple[Array, Array, Array]:
        value, gradient, hessian = p.derivatives(theta, weight_Pxn[which])
        held, slope, second = _values(g.at(which), theta)
        penalty, off = stiff_P[which], held - target_P[which]
        score = (penalty * off)[:, None]
        outer = slope[:, :, None] * slope[:, None, :]
        return (
            value + 0.5 * penalty * off**2,
            gradient + score * slope,
            hessian + penalty[:, None, None] * outer + score[:, :, None] * second,
        )

    return newton.minimise(derivatives, start_PxK, *p.box(), p.floor, steps=STEPS)[0]


def _natural(quantity: Quantity, value: float | None) -> float | None:
    return None if value is None else float(quantity.natural(np.array(value)))
