"""Laws of the loss, L(N, D, U), and what everything else needs to know of one.

A law is two classes in one file. A `Law` holds its parameters, as floats or with one entry for each
bootstrap replicate (everything broadcasts), and gives losses, the optimum under a compute budget,
and the exponent of N*. A `Form` is the law on the N and D of some runs, in unknowns of order one:
start points, bounds, predictions and their derivatives, and the quantities that have profiles. The
solver, its certificate, the intervals, the rollout and the report use nothing else; the shift of
parabolas (approach 2), designs and comparisons are those of `PowerLaw` alone. `approach3.LAWS` has
them by the name that `Settings.law` gives. U are the unique tokens of a run; a law that
`knows_repetition` counts the rest of D less. Laws of something else than N and D (`frontiers`,
`rate_laws`, `tasks`) have a form, too, but no exponent, optimum or best size.

`PowerLaw` is L = E + A / N**alpha + B / D**beta: Hoffmann et al., "Training compute-optimal large
language models" (2022), section 3.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Compute:
    """C = k N**q D: what a run of N parameters and D tokens costs; k = 6, q = 1 for C = 6 N D.

    Counting attention, embeddings or the head makes the FLOPs per token an (almost) power law of
    N whose exponent is not one; the optimum has to be taken under the relation that holds.
    `error` is the largest relative deviation of the runs from it.
    """

    k: float = 6.0
    q: float = 1.0
    error: float = 0.0

    def tokens(self, flops: ArrayLike, params: ArrayLike) -> Array:
        return np.asarray(flops) / (self.k * np.power(params, self.q))


def fit_compute(flops: Array, params: Array, tokens: Array) -> Compute:
    """Least squares of log(C / D) on log N; one single N leaves q = 1."""
    if np.allclose(flops, 6 * params * tokens, rtol=1e-9, atol=0):
        return Compute()
    x, y = np.log(params), np.log(flops / tokens)
    spread = x - x.mean()
    q = float(spread @ y / (spread @ spread)) if np.ptp(x) > 1e-9 else 1.0
    intercept = float(np.mean(y - q * x))
    error = float(np.expm1(np.abs(y - q * x - intercept).max()))
    return Compute(float(np.exp(intercept)), q, error)


@dataclass(frozen=True)
class Optimum:
    """The cheapest way to spend `flops`: sizes, tokens and the loss they reach."""

    flops: Array
    params: Array
    tokens: Array
    loss: Array


class Law(Protocol):
    """A dataclass whose fields are the parameters; N and D in units of one, losses as the data."""

    formula: str  # for people
    knows_repetition: bool

    @property
    def lowest(self) -> Array | float:
        """The loss that no compute removes."""

    def loss(self, params: ArrayLike, tokens: ArrayLike, unique: ArrayLike = np.inf) -> Array: ...

    def exponent(self, compute: Compute) -> Array:
        """a in N*(C) ~ C**a."""

    def optimum(self, compute: Compute, flops: ArrayLike, unique: ArrayLike = np.inf) -> Optimum:
        """The stationary point of L along C = k N**q D."""


@dataclass(frozen=True)
class Quantity:
    """g(theta_K) = (constant + linear . theta + logs . log theta) / (plain + divide . theta).

    g can be solved for an unknown: one that is in `linear` alone, or in `logs` alone. `natural`
    makes of g what people call its value; it increases.
    """

    constant: float
    linear_K: Array
    logs_K: Array
    plain: float
    divide_K: Array
    natural: Callable[[Array], Array]

    @property
    def solvable(self) -> tuple[int, bool]:
        """The first unknown that g can be solved for, and whether g has its log."""
        has = np.stack([self.linear_K != 0, self.logs_K != 0, self.divide_K != 0])
        alone = has & (has.sum(axis=0) == 1)
        log = not alone[0].any()
        return int(np.argmax(alone[1] if log else alone[0])), log

    def at(self, theta_K: Array) -> tuple[Array, Array]:
        """g before `natural`, and its gradient_K."""
        used = np.where(self.logs_K != 0, theta_K, 1.0)
        below = self.plain + self.divide_K @ theta_K
        value = (self.constant + self.linear_K @ theta_K + self.logs_K @ np.log(used)) / below
        return value, (self.linear_K + self.logs_K / used - value * self.divide_K) / below


class Form(Protocol):
    """A law on the N and D of n runs.

    Attributes:
        names: of the parameters, in the order of the K unknowns that stand for them.
        logs: those unknowns that are logs of terms of the loss.
    """

    names: tuple[str, ...]
    logs: tuple[int, ...]

    def predict(self, theta_PxK: Array) -> tuple[Array, Any]:
        """log L_Pxn, and whatever `derivatives` can use of it."""

    def derivatives(self, parts: Any, slope_Pxn: Array, curve_Pxn: Array) -> tuple[Array, Array]:
        """Gradient_PxK and Hessian_PxKxK of sum_n f(log L) with f' = slope and f'' = curve."""

    def gradient_size(self, parts: Any, weight_n: Array) -> Array:
        """sum_n weight |d log L / d unknowns|, [P, K]: what "zero" is measured by."""

    def starts(self, log_loss_n: Array) -> Array:
        """Unknowns_SxK that all give losses of the right size."""

    def box(self, log_loss_n: Array) -> tuple[Array, Array]:
        """Bounds_K of the unknowns that no sensible fit reaches."""

    def law(self, theta: Array) -> Law:
        """Unknowns [..., K] in the units of the data."""

    def theta(self, law: Law) -> Array:
        """The inverse of `law`."""

    def quantities(self, compute: Compute) -> dict[str, Quantity]:
        """Each parameter, and the exponent a."""

    def best_size(self, compute: Compute, flops: float) -> Quantity:
        """N*(flops), as in `Law.optimum`."""


def quantity(
    constant: float = 0.0,
    linear: Sequence[float] = (0,),
    logs: Sequence[float] = (0,),
    plain: float = 1.0,
    divide: Sequence[float] = (0,),
    natural: Callable[[Array], Array] = np.exp,
) -> Quantity:
    """A `Quantity`; coefficients that are left out are 0."""
    count = max(len(row) for row in (linear, logs, divide))
    rows = (
        np.broadcast_to(np.array(row, dtype=np.float64), count) for row in (linear, logs, divide)
    )
    linear_K, logs_K, divide_K = rows
    return Quantity(
        constant=constant,
        linear_K=linear_K,
        logs_K=logs_K,
        plain=plain,
        divide_K=divide_K,
        natural=natural,
    )


def exponent(law: Law, compute: Compute) -> Array:
    return law.exponent(compute)


def optimum(law: Law, compute: Compute, flops: ArrayLike, unique: ArrayLike = np.inf) -> Optimum:
    """N*(C), D*(C) and L*(C) by a law."""
    return law.optimum(compute, flops, unique)


def optima(law: Law, compute: Compute, flops: Array, unique: ArrayLike = np.inf) -> Optimum:
    """Optima_[R, K] of the R laws of a bootstrap at K budgets."""
    columns = {name: np.asarray(value)[:, None] for name, value in vars(law).items()}
    return replace(law, **columns).optimum(compute, flops, unique)


# --- the law of Hoffmann et al.


@dataclass(frozen=True)
class PowerLaw:
    E: Array | float
    A: Array | float
    B: Array | float
    alpha: Array | float
    beta: Array | float

    formula = "L(N, D) = E + A / N^α + B / D^β. E is the loss that no amount of compute removes."
    knows_repetition = False

    @property
    def lowest(self) -> Array | float:
        return self.E

    def loss(self, params: ArrayLike, tokens: ArrayLike, unique: ArrayLike = np.inf) -> Array:
        return (
            self.E + self.A * np.power(params, -self.alpha) + self.B * np.power(tokens, -self.beta)
        )

    def exponent(self, compute: Compute) -> Array:
        """beta / (alpha + q beta), the usual beta / (alpha + beta) for q = 1."""
        return np.asarray(self.beta / (self.alpha + compute.q * self.beta))

    def optimum(self, compute: Compute, flops: ArrayLike, unique: ArrayLike = np.inf) -> Optimum:
        """In closed form: d L / d log N = 0 where alpha A N**-alpha = q beta B D**-beta.

        It is taken in logs, as A and B of bootstrap replicates may span hundreds of decades.
        """
        flops = np.asarray(flops, dtype=np.float64)
        alpha, beta, q = self.alpha, self.beta, compute.q
        log_ratio = np.log(alpha) + np.log(self.A) - np.log(q * beta) - np.log(self.B)
        log_work = np.log(flops) - np.log(compute.k)
        log_params = (log_ratio + beta * log_work) / (alpha + q * beta)
        params, tokens = np.exp(log_params), np.exp(log_work - q * log_params)
        return Optimum(flops, params, tokens, self.loss(params, tokens))


@dataclass(frozen=True)
class PowerForm:
    """The unknowns are log E, the log of the parameter term at the centre of the data,
    alpha * sd(log N), the log of the token term at the centre, beta * sd(log D): all of order one.
    """

    x_n: Array  # standardised log N
    y_n: Array  # standardised log D
    centre: tuple[float, float]
    scale: tuple[float, float]

    names = ("E", "A", "alpha", "B", "beta")
    logs = (0, 1, 3)

    @classmethod
    def on(cls, params: Array, tokens: Array, unique: ArrayLike = np.inf) -> "PowerForm":
        """Needs two different N and two D."""
        log_n, log_d = np.log(params), np.log(tokens)
        centre, scale = (log_n.mean(), log_d.mean()), (log_n.std(), log_d.std())
        return cls((log_n - centre[0]) / scale[0], (log_d - centre[1]) / scale[1], centre, scale)

    def predict(self, theta_PxK: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        """log L, and the fractions of the three terms in it, each [P, n]."""
        e, a, alpha, b, beta = (theta_PxK[:, k : k + 1] for k in range(5))
        s_e, s_a, s_b = np.exp(e), np.exp(a - alpha * self.x_n), np.exp(b - beta * self.y_n)
        total = s_e + s_a + s_b
        part = 1 / total
        return np.log(total), (s_e * part, s_a * part, s_b * part)

    def derivatives(
        self, parts: tuple[Array, Array, Array], slope_Pxn: Array, curve_Pxn: Array
    ) -> tuple[Array, Array]:
        s_e, s_a, s_b = parts
        one_x, one_y, x_x, y_y, x_y = self._features
        score_e, score_a, score_b = slope_Pxn * s_e, slope_Pxn * s_a, slope_Pxn * s_b
        gradient = np.empty((len(slope_Pxn), 5))
        gradient[:, 0] = np.sum(score_e, axis=1)
        gradient[:, 1:3] = score_a @ one_x
        gradient[:, 3:5] = score_b @ one_y

        # Two fractions k, m contribute ((f'' - f') s_k s_m + [k = m] f' s_k) times their features.
        curvature = curve_Pxn - slope_Pxn
        curvature_e, curvature_a, curvature_b = curvature * s_e, curvature * s_a, curvature * s_b
        hessian = np.empty((len(slope_Pxn), 5, 5))
        hessian[:, 0, 0] = np.sum(curvature_e * s_e + score_e, axis=1)
        hessian[:, 0, 1:3] = (curvature_e * s_a) @ one_x
        hessian[:, 0, 3:5] = (curvature_e * s_b) @ one_y
        hessian[:, 1:3, 1:3] = ((curvature_a * s_a + score_a) @ x_x).reshape(-1, 2, 2)
        hessian[:, 3:5, 3:5] = ((curvature_b * s_b + score_b) @ y_y).reshape(-1, 2, 2)
        hessian[:, 1:3, 3:5] = ((curvature_a * s_b) @ x_y).reshape(-1, 2, 2)
        hessian[:, 1:, 0] = hessian[:, 0, 1:]
        hessian[:, 3:5, 1:3] = hessian[:, 1:3, 3:5].transpose(0, 2, 1)
        return gradient, hessian

    def gradient_size(self, parts: tuple[Array, Array, Array], weight_n: Array) -> Array:
        s_e, s_a, s_b = parts
        size_x, size_y = np.abs(self.x_n), np.abs(self.y_n)
        columns = (s_e, s_a, s_a * size_x, s_b, s_b * size_y)
        return np.stack([c @ weight_n for c in columns], 1)

    def starts(self, log_loss_n: Array) -> Array:
        """54: of E, of the exponents and of how the rest splits."""
        lowest, middle = np.exp(log_loss_n.min()), np.exp(np.median(log_loss_n))
        rows = []
        for irreducible, alpha, beta, fraction in product(
            (0.3, 0.6, 0.9), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0), (0.3, 0.7)
        ):
            e = irreducible * lowest
            a, b = fraction * (middle - e), (1 - fraction) * (middle - e)
            exponents = alpha * self.scale[0], beta * self.scale[1]
            rows.append([np.log(e), np.log(a), exponents[0], np.log(b), exponents[1]])
        return np.array(rows)

    def box(self, log_loss_n: Array) -> tuple[Array, Array]:
        """Terms of a millionth of the loss, exponents .01 to 5."""
        low, high = log_loss_n.min(), log_loss_n.max()
        lower = [low - 14, low - 14, 0.01 * self.scale[0], low - 14, 0.01 * self.scale[1]]
        upper = [high, high + 5, 5 * self.scale[0], high + 5, 5 * self.scale[1]]
        return np.array(lower), np.array(upper)

    def law(self, theta: Array) -> PowerLaw:
        e, a, alpha, b, beta = np.moveaxis(theta, -1, 0)
        alpha, beta = alpha / self.scale[0], beta / self.scale[1]
        log_a, log_b = a + alpha * self.centre[0], b + beta * self.centre[1]
        return PowerLaw(np.exp(e), np.exp(log_a), np.exp(log_b), alpha, beta)

    def theta(self, law: PowerLaw) -> Array:
        a = np.log(law.A) - law.alpha * self.centre[0]
        b = np.log(law.B) - law.beta * self.centre[1]
        parts = (np.log(law.E), a, law.alpha * self.scale[0], b, law.beta * self.scale[1])
        return np.stack([np.asarray(part, dtype=np.float64) for part in parts], -1)

    def quantities(self, compute: Compute) -> dict[str, Quantity]:
        n, d = self.centre[0] / self.scale[0], self.centre[1] / self.scale[1]
        log_alpha, log_beta = -np.log(self.scale[0]), -np.log(self.scale[1])

        def exponent(log_ratio: Array) -> Array:
            return 1 / (np.exp(-log_ratio) + compute.q)

        return {
            "E": quantity(linear=(1, 0, 0, 0, 0)),
            "A": quantity(linear=(0, 1, n, 0, 0)),
            "B": quantity(linear=(0, 0, 0, 1, d)),
            "alpha": quantity(log_alpha, logs=(0, 0, 1, 0, 0)),
            "beta": quantity(log_beta, logs=(0, 0, 0, 0, 1)),
            "a": quantity(log_beta - log_alpha, logs=(0, 0, -1, 0, 1), natural=exponent),
        }

    def best_size(self, compute: Compute, flops: float) -> Quantity:
        n, d = self.centre[0] / self.scale[0], self.centre[1] / self.scale[1]
        work = (np.log(flops) - np.log(compute.k)) / self.scale[1]
        constant = np.log(self.scale[1]) - np.log(self.scale[0]) - np.log(compute.q)
        divide = (0, 0, 1 / self.scale[0], 0, compute.q / self.scale[1])
        return quantity(constant, (0, 1, n, -1, work - d), (0, 0, 1, 0, -1), 0.0, divide)

    @cached_property
    def _features(self) -> tuple[Array, ...]:
        """By which the derivatives by the unknowns of a term differ: [n, 2], and products [n, 4]."""
        ones = np.ones_like(self.x_n)
        one_x, one_y = np.stack([ones, -self.x_n], 1), np.stack([ones, -self.y_n], 1)
        pairs = ((one_x, one_x), (one_y, one_y), (one_x, one_y))
        products = ((a[:, :, None] * b[:, None, :]).reshape(len(ones), 4) for a, b in pairs)
        return one_x, one_y, *products
