"""The data-constrained law: tokens that were seen before, and parameters in excess, count less.

    L = E + A / N'**alpha + B / D'**beta
    D' = U + U R_D (1 - exp(-(D/U - 1) / R_D))       U = unique tokens, at most D
    N' = V + V R_N (1 - exp(-(N/V - 1) / R_N))       V = parameters that U tokens are enough for,
                                                     at most N
    V: alpha A / V**alpha = beta B / U**beta         the optimum of fresh data for C = 6 N D

(Muennighoff et al., "Scaling data-constrained language models", arXiv 2305.16264, section 3 and
appendix A.) After many epochs the data are worth U (1 + R_D) fresh tokens and no more, so R_D is
about the number of epochs from which on repetition is of little use. Runs of at most one epoch say
nothing of it. Published values often rest on a flat objective: look at the profile interval.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from prime_jax.scaling.laws import (
    Array,
    Compute,
    Optimum,
    PowerForm,
    PowerLaw,
    Quantity,
    quantity,
)

LEAST, MOST = 0.05, 1e4  # of R_D and R_N in a search
WORTHLESS = 50.0  # log of a number of epochs beyond which nothing changes
SPAN, GRID, STEPS = 1e4, 121, 45  # of the search for N*: factors about that of fresh data
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class RepeatedLaw:
    E: Array | float
    A: Array | float
    B: Array | float
    alpha: Array | float
    beta: Array | float
    R_D: Array | float
    R_N: Array | float

    formula = (
        "L = E + A / N′^α + B / D′^β, where D′ = U + U R_D (1 − exp(−(D/U − 1) / R_D)) of U unique "
        "tokens, and N′ likewise of the parameters that U tokens are enough for, with R_N."
    )
    knows_repetition = True

    @property
    def fresh(self) -> PowerLaw:
        """The law of data that are never repeated."""
        return PowerLaw(self.E, self.A, self.B, self.alpha, self.beta)

    @property
    def lowest(self) -> Array | float:
        return self.E

    def loss(self, params: ArrayLike, tokens: ArrayLike, unique: ArrayLike = np.inf) -> Array:
        log_n, log_d = np.log(params), np.log(tokens)
        log_u = np.minimum(np.log(unique), log_d)
        ratio = np.log(self.alpha) + np.log(self.A) - np.log(self.beta) - np.log(self.B)
        excess = np.maximum(log_n - (ratio + self.beta * log_u) / self.alpha, 0.0)
        size = log_n - excess + growth(excess, np.log(self.R_N)).value
        data = log_u + growth(log_d - log_u, np.log(self.R_D)).value
        return self.E + self.A * np.exp(-self.alpha * size) + self.B * np.exp(-self.beta * data)

    def exponent(self, compute: Compute) -> Array:
        """Of fresh data."""
        return self.fresh.exponent(compute)

    def optimum(self, compute: Compute, flops: ArrayLike, unique: ArrayLike = np.inf) -> Optimum:
        """N*, D* and the loss with so many unique tokens, D*/unique being the best epochs.

        That of fresh data has a closed form; else the least of a grid, and golden sections.
        """
        best = self.fresh.optimum(compute, flops)
        log_params = np.log(best.params)
        if np.isfinite(unique).any():
            log_params = _least(lambda x: self._along(compute, flops, x, unique).loss, log_params)
        return self._along(compute, flops, log_params, unique)

    def _along(
        self, compute: Compute, flops: ArrayLike, log_params: Array, unique: ArrayLike
    ) -> Optimum:
        params = np.exp(log_params)
        tokens = compute.tokens(flops, params)
        loss = self.loss(params, tokens, unique)
        return Optimum(np.asarray(flops, dtype=np.float64), params, tokens, loss)


def _least(loss: Callable[[Array], Array], start: Array) -> Array:
    """Where the loss is least, about the start; each entry by itself."""
    steps = np.linspace(-np.log(SPAN), np.log(SPAN), GRID)
    found = np.stack([loss(start + step) for step in steps])
    centre = start + steps[np.argmin(found, axis=0)]
    low, high = centre - (steps[1] - steps[0]), centre + (steps[1] - steps[0])
    for _ in range(STEPS):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        down = loss(left) < loss(right)
        low, high = np.where(down, low, left), np.where(down, right, high)
    return 0.5 * (low + high)


class Growth(NamedTuple):
    """h(v, r) = log(1 + e**r (1 - exp(-(e**v - 1) / e**r))): v is the log of D/U, or of N/V, and
    r that of R_D or R_N; with its derivatives."""

    value: Array
    v: Array
    r: Array
    vv: Array
    vr: Array
    rr: Array


def growth(v: ArrayLike, r: ArrayLike) -> Growth:
    v, scale = np.minimum(v, WORTHLESS), np.exp(r)
    times, again = np.exp(v), np.expm1(v)
    kept = np.exp(-again / scale)
    worth = -scale * np.expm1(-again / scale)
    by_v, by_r = kept * times, worth - again * kept
    total = 1 + worth
    h_v, h_r = by_v / total, by_r / total
    return Growth(
        value=np.log1p(worth),
        v=h_v,
        r=h_r,
        vv=(by_v - kept * times**2 / scale) / total - h_v**2,
        vr=kept * again * times / scale / total - h_v * h_r,
        rr=(by_r - kept * again**2 / scale) / total - h_r**2,
    )


class Parts(NamedTuple):
    """What the derivatives use of a prediction; [P, n] but for `first`."""

    fractions: tuple[Array, Array, Array]  # of the three terms in L
    first: tuple[Array, Array]  # derivatives_PxnxK of the logs of the terms of N and of D
    size: Growth
    data: Growth
    bounds: Array  # derivatives_PxnxK of log V
    theta: Array  # [P, K]


E, A, ALPHA, B, BETA, R_D, R_N = range(7)


@dataclass(frozen=True)
class RepeatedForm:
    """The unknowns are those of `PowerForm`, then log R_D and log R_N."""

    fresh: PowerForm
    log_params_n: Array
    log_unique_n: Array
    log_epochs_n: Array

    names = (*PowerForm.names, "R_D", "R_N")
    logs = PowerForm.logs

    @classmethod
    def on(cls, params: Array, tokens: Array, unique: ArrayLike = np.inf) -> "RepeatedForm":
        """Needs two different N and two D; `unique` are tokens that a run had, also more than D."""
        used = np.minimum(unique, tokens)
        fresh = PowerForm.on(params, tokens)
        return cls(fresh, np.log(params), np.log(used), np.log(tokens / used))

    def predict(self, theta_PxK: Array) -> tuple[Array, Parts]:
        (centre, middle), (scale, width) = self.fresh.centre, self.fresh.scale
        e, a, alpha, b, beta, r_d, r_n = (theta_PxK[:, k : k + 1] for k in range(7))
        alpha, beta = alpha / scale, beta / width
        fresh_n = self.log_unique_n - middle
        top = np.log(alpha) - np.log(beta) + a - b + beta * fresh_n
        excess = self.log_params_n - centre - top / alpha
        over = excess > 0
        size, data = growth(np.where(over, excess, 0.0), r_n), growth(self.log_epochs_n, r_d)
        x = self.log_params_n - centre - np.where(over, excess - size.value, 0.0)
        y = fresh_n + data.value
        terms = np.exp(e + 0 * x), np.exp(a - alpha * x), np.exp(b - beta * y)
        total = sum(terms)

        bounds = np.zeros((*x.shape, 7))  # of log V, by the unknowns
        bounds[..., A], bounds[..., B] = 1 / alpha, -1 / alpha
        bounds[..., ALPHA] = (1 - top) / alpha**2 / scale
        bounds[..., BETA] = (fresh_n - 1 / beta) / alpha / width
        by_n = -alpha[..., None] * np.where(over, 1 - size.v, 0.0)[..., None] * bounds
        by_n[..., A] += 1
        by_n[..., ALPHA] -= x / scale
        by_n[..., R_N] = -alpha * size.r
        by_d = np.zeros_like(by_n)
        by_d[..., B], by_d[..., BETA], by_d[..., R_D] = 1, -y / width, -beta * data.r
        fractions = tuple(term / total for term in terms)
        return np.log(total), Parts(fractions, (by_n, by_d), size, data, bounds, theta_PxK)

    def derivatives(self, parts: Parts, slope_Pxn: Array, curve_Pxn: Array) -> tuple[Array, Array]:
        """A term with log T adds fraction * (dT dT' + ddT) to the second derivatives of L over L."""
        in_e, in_n, in_d = parts.fractions
        by_n, by_d = parts.first
        first = in_n[..., None] * by_n + in_d[..., None] * by_d
        first[..., E] += in_e
        hessian = _outer(curve_Pxn - slope_Pxn, first, first)
        hessian += _outer(slope_Pxn * in_n, by_n, by_n) + _outer(slope_Pxn * in_d, by_d, by_d)
        hessian[:, E, E] += np.sum(slope_Pxn * in_e, axis=1)
        for (i, j), value in self._second(parts, slope_Pxn * in_n, slope_Pxn * in_d).items():
            hessian[:, i, j] += value
            if i != j:
                hessian[:, j, i] += value
        return np.einsum("pn,pnk->pk", slope_Pxn, first), hessian

    def _second(
        self, parts: Parts, weight_n: Array, weight_d: Array
    ) -> dict[tuple[int, int], Array]:
        """Weighted sums_P of the second derivatives of the logs of the terms, that are not 0."""
        (_, middle), (scale, width) = self.fresh.centre, self.fresh.scale
        _, a, alpha, b, beta, _, _ = (parts.theta[:, k : k + 1] for k in range(7))
        alpha, beta, size, data = alpha / scale, beta / width, parts.size, parts.data
        fresh_n, used = self.log_unique_n - middle, (A, ALPHA, B, BETA)
        top = np.log(alpha) - np.log(beta) + a - b + beta * fresh_n
        over = size.value > 0
        lost, bent = over * (1 - size.v), over * size.vv
        of_bound = {  # second derivatives of log V
            (A, ALPHA): -1 / alpha**2 / scale,
            (ALPHA, B): 1 / alpha**2 / scale,
            (ALPHA, ALPHA): (2 * top - 3) / alpha**3 / scale**2,
            (ALPHA, BETA): -(fresh_n - 1 / beta) / alpha**2 / scale / width,
            (BETA, BETA): 1 / beta**2 / alpha / width**2,
        }
        out: dict[tuple[int, int], Array] = {}

        def add(i: int, j: int, value: Array) -> None:
            pair = min(i, j), max(i, j)
            out[pair] = out.get(pair, 0.0) + np.sum(value, axis=1)

        for k, i in enumerate(used):
            bound = parts.bounds[..., i]
            moved = weight_n * lost * bound / scale  # by the exponent and by N'
            add(i, ALPHA, -2 * moved if i == ALPHA else -moved)
            add(i, R_N, weight_n * alpha * size.vr * over * bound)
            for j in used[k:]:
                bend = bent * bound * parts.bounds[..., j]
                add(i, j, -weight_n * alpha * (bend + lost * of_bound.get((i, j), 0.0)))
        add(ALPHA, R_N, -weight_n * size.r / scale)
        add(R_N, R_N, -weight_n * alpha * size.rr)
        add(BETA, R_D, -weight_d * data.r / width)
        add(R_D, R_D, -weight_d * beta * data.rr)
        return out

    def gradient_size(self, parts: Parts, weight_n: Array) -> Array:
        in_e, in_n, in_d = parts.fractions
        first = in_n[..., None] * parts.first[0] + in_d[..., None] * parts.first[1]
        first[..., E] += in_e
        return np.einsum("n,pnk->pk", weight_n, np.abs(first))

    def starts(self, log_loss_n: Array) -> Array:
        """54: those of `PowerForm`, half of them with an R_D of 5, half with 30."""
        known = self.fresh.starts(log_loss_n)
        r_d = np.where(np.arange(len(known)) // 2 % 2, 5.0, 30.0)
        return np.hstack([known, np.log(np.stack([r_d, np.full(len(known), 5.0)], 1))])

    def box(self, log_loss_n: Array) -> tuple[Array, Array]:
        """That of `PowerForm`; R_D and R_N from .05 to 10,000."""
        lower, upper = self.fresh.box(log_loss_n)
        return np.append(lower, np.log([LEAST] * 2)), np.append(upper, np.log([MOST] * 2))

    def law(self, theta: Array) -> RepeatedLaw:
        fresh = vars(self.fresh.law(theta[..., :R_D]))
        return RepeatedLaw(**fresh, R_D=np.exp(theta[..., R_D]), R_N=np.exp(theta[..., R_N]))

    def theta(self, law: RepeatedLaw) -> Array:
        more = (np.asarray(np.log(value))[..., None] for value in (law.R_D, law.R_N))
        return np.concatenate([self.fresh.theta(law.fresh), *more], -1)

    def quantities(self, compute: Compute) -> dict[str, Quantity]:
        found = {name: _padded(q) for name, q in self.fresh.quantities(compute).items()}
        a = found.pop("a")
        return found | {
            "R_D": quantity(linear=(0, 0, 0, 0, 0, 1, 0)),
            "R_N": quantity(linear=(0, 0, 0, 0, 0, 0, 1)),
            "a": a,
        }

    def best_size(self, compute: Compute, flops: float) -> Quantity:
        """Of fresh data."""
        return _padded(self.fresh.best_size(compute, flops))


def _outer(weight_Pxn: Array, one_PxnxK: Array, other_PxnxK: Array) -> Array:
    """sum_n weight one other', [P, K, K]."""
    return (one_PxnxK * weight_Pxn[..., None]).transpose(0, 2, 1) @ other_PxnxK


def _padded(q: Quantity) -> Quantity:
    """For two more unknowns, which it does not depend on."""
    rows = {
        name: np.append(getattr(q, name), [0.0, 0.0]) for name in ("linear_K", "logs_K", "divide_K")
    }
    return replace(q, **rows)
