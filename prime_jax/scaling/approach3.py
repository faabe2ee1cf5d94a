"""Approach 3: the law fitted to all runs of a family, with a certificate of convergence.

Minimises sum_i w_i rho(log L_hat_i - log L_i) with
log L_hat = logsumexp(log E, log A - alpha log N, log B - beta log D) (Hoffmann et al. 2022,
equation 3), and rho(r) either Huber's function or r**2 / 2 (`ls`). Published fits that stop short
of their own optimum (one leaves A and B at the start value) come from finite differences on badly
scaled unknowns; here the unknowns are standardised, gradient and Hessian exact, and every fit says
how well it converged.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from prime_jax.errors import UserError
from prime_jax.scaling import newton
from prime_jax.scaling.laws import Law

Array = NDArray[np.float64]
Objective = Literal["huber", "ls"]

DELTA = 1e-3
NAMES = ("E", "A", "alpha", "B", "beta")  # order of the unknowns
LOGS = (0, 1, 3)  # unknowns that are logs of terms of the loss
AGREE = 1e-9  # starts within this relative distance of the best objective agree with it
MIN_AGREEING = 0.9  # of the starts should
STATIONARY = 1e-6  # largest scaled gradient of a converged fit
FLAT = 1e-12  # fraction of the largest curvature that rounding cannot tell from none
SILENT, EXACT = 1e-12, 1e-30  # residual, and objective of a run, that are rounding


@dataclass(frozen=True)
class Problem:
    """The objective on n runs.

    The unknowns theta_5 are log E, the log of the parameter term at the centre of the data,
    alpha * sd(log N), the log of the token term at the centre, beta * sd(log D): all of order one.
    """

    x_n: Array  # standardised log N
    y_n: Array  # standardised log D
    log_loss_n: Array  # or [P, n]: other losses for each of P problems
    weight_n: Array
    centre: tuple[float, float]
    scale: tuple[float, float]
    objective: Objective = "huber"
    delta: float = DELTA  # residual at which rho turns from a square into a line

    def derivatives(self, theta_Px5: Array, weight_Pxn: Array) -> tuple[Array, Array, Array]:
        """Objective_P, gradient_Px5 and Hessian_Px5x5 for P settings of unknowns and weights."""
        s_e, s_a, s_b, residual = self.fractions(theta_Px5)
        score = np.clip(residual, -self.delta, self.delta)
        slope = weight_Pxn * score
        value = np.sum(slope * (residual - 0.5 * score), axis=1)
        curve = weight_Pxn * (score == residual)
        one_x, one_y, x_x, y_y, x_y = self._features
        score_e, score_a, score_b = slope * s_e, slope * s_a, slope * s_b
        gradient = np.empty((len(slope), 5))
        gradient[:, 0] = np.sum(score_e, axis=1)
        gradient[:, 1:3] = score_a @ one_x
        gradient[:, 3:5] = score_b @ one_y

        # Two fractions k, m contribute (bend s_k s_m + [k = m] slope s_k) times their features.
        curvature = curve - slope
        curvature_e, curvature_a, curvature_b = curvature * s_e, curvature * s_a, curvature * s_b
        hessian = np.empty((len(slope), 5, 5))
        hessian[:, 0, 0] = np.sum(curvature_e * s_e + score_e, axis=1)
        hessian[:, 0, 1:3] = (curvature_e * s_a) @ one_x
        hessian[:, 0, 3:5] = (curvature_e * s_b) @ one_y
        hessian[:, 1:3, 1:3] = ((curvature_a * s_a + score_a) @ x_x).reshape(-1, 2, 2)
        hessian[:, 3:5, 3:5] = ((curvature_b * s_b + score_b) @ y_y).reshape(-1, 2, 2)
        hessian[:, 1:3, 3:5] = ((curvature_a * s_b) @ x_y).reshape(-1, 2, 2)
        hessian[:, 1:, 0] = hessian[:, 0, 1:]
        hessian[:, 3:5, 1:3] = hessian[:, 1:3, 3:5].transpose(0, 2, 1)
        return value, gradient, hessian

    def curvature(self, residual_n: Array) -> float:
        """mean(rho''), by the weights: what the sum of all runs has for curvature.

        Over a kernel density of the residuals, as few of them may lie within delta.
        """
        if np.isinf(self.delta):
            return 1.0
        count = len(residual_n)
        residual = residual_n * np.sqrt(count / max(count - len(NAMES), 1))  # a fit hugs its data
        quartiles = np.subtract(*np.percentile(residual, [75, 25])) / 1.34
        width = max(0.9 * min(residual.std(), quartiles) * count**-0.2, SILENT)
        inside = ndtr((self.delta - residual) / width) - ndtr((-self.delta - residual) / width)
        return max(float(self.weight_n @ inside / self.weight_n.sum()), SILENT)

    def value(self, theta_5: Array) -> float:
        return float(self.weight_n @ self.cost(self.residual(theta_5)))

    def cost(self, residual: ArrayLike) -> Array:
        """rho of residuals."""
        score = np.clip(residual, -self.delta, self.delta)
        return score * (residual - 0.5 * score)

    def residual(self, theta_5: Array) -> Array:
        """log L_hat - log L, [n]."""
        return self.fractions(theta_5[None])[3][0]

    def fractions(self, theta_Px5: Array) -> tuple[Array, Array, Array, Array]:
        """Fractions of the three terms in the predicted loss, and the residuals; each [P, n]."""
        e, a, alpha, b, beta = (theta_Px5[:, k : k + 1] for k in range(5))
        s_e, s_a, s_b = np.exp(e), np.exp(a - alpha * self.x_n), np.exp(b - beta * self.y_n)
        total = s_e + s_a + s_b
        residual = np.log(total) - self.log_loss_n
        part = 1 / total
        return s_e * part, s_a * part, s_b * part, residual

    def gradient_scale(self, theta_Px5: Array) -> Array:
        """The gradient_Px5 if every residual pulled the same way: what "zero" is measured by."""
        s_e, s_a, s_b, _ = self.fractions(theta_Px5)
        size_x, size_y = np.abs(self.x_n), np.abs(self.y_n)
        columns = (s_e, s_a, s_a * size_x, s_b, s_b * size_y)
        score = min(self.delta, DELTA)  # least squares: as of residuals of 0.1 %
        return score * np.stack([c @ self.weight_n for c in columns], 1)

    def at(self, which: NDArray[np.intp]) -> "Problem":
        """For some of the P sets of losses, if there are several."""
        several = self.log_loss_n.ndim == 2
        return replace(self, log_loss_n=self.log_loss_n[which]) if several else self

    def stages(self) -> "list[Problem]":
        """A small delta is reached through larger ones: far from the minimum it leaves Newton's
        method without curvature."""
        if self.delta >= DELTA:
            return [self]
        steps = math.ceil(math.log10(DELTA / self.delta) - 1e-9)
        wider = [self.delta * 10.0**k for k in range(steps, 0, -1)]
        return [*(replace(self, delta=delta) for delta in wider), self]

    @cached_property
    def _features(self) -> tuple[Array, ...]:
        """By which the derivatives by the unknowns of a term differ: [n, 2], and products [n, 4]."""
        ones = np.ones_like(self.x_n)
        one_x, one_y = np.stack([ones, -self.x_n], 1), np.stack([ones, -self.y_n], 1)
        pairs = ((one_x, one_x), (one_y, one_y), (one_x, one_y))
        products = ((a[:, :, None] * b[:, None, :]).reshape(len(ones), 4) for a, b in pairs)
        return one_x, one_y, *products

    @property
    def floor(self) -> float:
        """The objective of an exact fit, which is rounding."""
        return EXACT * len(self.x_n)

    def law(self, theta: Array) -> Law:
        """Unknowns [..., 5] in the units of the data."""
        e, a, alpha, b, beta = np.moveaxis(theta, -1, 0)
        alpha, beta = alpha / self.scale[0], beta / self.scale[1]
        log_a, log_b = a + alpha * self.centre[0], b + beta * self.centre[1]
        return Law(np.exp(e), np.exp(log_a), np.exp(log_b), alpha, beta)

    def theta(self, law: Law) -> Array:
        """The inverse of `law`."""
        a = np.log(law.A) - law.alpha * self.centre[0]
        b = np.log(law.B) - law.beta * self.centre[1]
        parts = (np.log(law.E), a, law.alpha * self.scale[0], b, law.beta * self.scale[1])
        return np.stack([np.asarray(part, dtype=np.float64) for part in parts], -1)

    def box(self) -> tuple[Array, Array]:
        """Bounds_5 no sensible fit reaches: terms of a millionth of the loss, exponents .01 to 5."""
        low, high = self.log_loss_n.min(), self.log_loss_n.max()
        lower = [low - 14, low - 14, 0.01 * self.scale[0], low - 14, 0.01 * self.scale[1]]
        upper = [high, high + 5, 5 * self.scale[0], high + 5, 5 * self.scale[1]]
        return np.array(lower), np.array(upper)


def problem(
    params: Array,
    tokens: Array,
    loss: Array,
    delta: float = DELTA,
    objective: Objective = "huber",
    weight: Array | None = None,
) -> Problem:
    """The objective on runs of N = `params`, D = `tokens`; needs two different N and two D.

    `delta` is that of Huber's function; least squares has none.

    Raises:
        UserError: a delta that is not above 0.
    """
    if not 0 < delta < math.inf:
        raise UserError(f"delta is {delta}; it must be a number above 0, such as {DELTA}")
    log_n, log_d = np.log(params), np.log(tokens)
    centre, scale = (log_n.mean(), log_d.mean()), (log_n.std(), log_d.std())
    x, y = (log_n - centre[0]) / scale[0], (log_d - centre[1]) / scale[1]
    delta = math.inf if objective == "ls" else delta
    weight = np.ones(len(x)) if weight is None else weight
    return Problem(
        x_n=x,
        y_n=y,
        log_loss_n=np.log(loss),
        weight_n=weight,
        centre=centre,
        scale=scale,
        objective=objective,
        delta=delta,
    )


def starts(p: Problem) -> Array:
    """54 starts that all give losses of the right size (E, exponents and how the rest splits)."""
    lowest, middle = np.exp(p.log_loss_n.min()), np.exp(np.median(p.log_loss_n))
    grid = itertools.product((0.3, 0.6, 0.9), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0), (0.3, 0.7))
    rows = []
    for irreducible, alpha, beta, fraction in grid:
        e = irreducible * lowest
        a, b = fraction * (middle - e), (1 - fraction) * (middle - e)
        rows.append([np.log(e), np.log(a), alpha * p.scale[0], np.log(b), beta * p.scale[1]])
    return np.array(rows)


@dataclass(frozen=True)
class Certificate:
    """How far a fit is from a proper minimum.

    Attributes:
        converged: it is a proper minimum, to rounding.
        gradient: largest component of the gradient, as a fraction of what it would be if every
            residual pulled the same way; 0 at a stationary point.
        smallest_eigenvalue: of the Hessian in the standardised unknowns that are not at a bound,
            as a fraction of the largest; above FLAT at a proper minimum.
        starts, agreeing: number of starts and the fraction that ends within 1e-9 of the best.
        bounds: parameters that ended at a bound of the search.
    """

    converged: bool
    gradient: float
    smallest_eigenvalue: float
    starts: int
    agreeing: float
    bounds: tuple[str, ...]


def certify(p: Problem, theta_5: Array, ends_S: ArrayLike = ()) -> Certificate:
    """Examine any point; `ends_S` are the objectives that other starts ended at."""
    theta, ends_S = theta_5[None], np.asarray(ends_S, dtype=np.float64)
    lower, upper = p.box()
    _, gradient_Px5, hessian = p.derivatives(theta, p.weight_n[None])
    gradient = gradient_Px5[0]
    moves = newton.free(theta_5, gradient, lower, upper)
    eigenvalues = np.linalg.eigvalsh(hessian[0][np.ix_(moves, moves)])
    curvature = eigenvalues[0] / eigenvalues[-1] if moves.any() else 0.0
    scaled = np.abs(gradient) / p.gradient_scale(theta)[0]
    best = ends_S.min(initial=np.inf)
    exact = p.weight_n.sum() * p.cost(AGREE)  # where relative says nothing
    agree = ends_S <= best + AGREE * best + exact
    largest = float(scaled[moves].max(initial=0.0))
    return Certificate(
        converged=bool(largest < STATIONARY and curvature > FLAT),
        gradient=largest,
        smallest_eigenvalue=float(curvature),
        starts=len(ends_S),
        agreeing=float(agree.mean()) if len(ends_S) else 0.0,
        bounds=tuple(name for name, moving in zip(NAMES, moves, strict=True) if not moving),
    )


@dataclass(frozen=True)
class Fit:
    law: Law
    theta_5: Array
    objective: float
    certificate: Certificate


def solve(p: Problem, start_Px5: Array, weight_Pxn: Array) -> tuple[Array, Array]:
    """Newton's method from each start under its own weights: theta_Px5 and the objective_P."""
    lower, upper = p.box()
    theta, value = start_Px5, np.empty(0)
    for stage in p.stages():
        theta, value = newton.minimise(
            lambda t, i, stage=stage: stage.at(i).derivatives(t, weight_Pxn[i]),
            start_PxK=theta, lower_K=lower, upper_K=upper, floor=stage.floor, logs=LOGS,
        )  # fmt: skip
    return theta, value


def fit(p: Problem) -> Fit:
    """The best of all starts. Its objective is summed over the runs, not averaged."""
    start = starts(p)
    ends, values = solve(p, start, np.broadcast_to(p.weight_n, (len(start), len(p.x_n))))
    theta = ends[np.argmin(values)]
    law = p.law(theta)
    law = Law(*(float(v) for v in (law.E, law.A, law.B, law.alpha, law.beta)))
    return Fit(law, theta, p.value(theta), certify(p, theta, values))


@dataclass(frozen=True)
class Audit:
    """A law that somebody published, beside the optimum of the objective on the same runs.

    Attributes:
        objective: of the published law, summed over the runs.
        excess: by which fraction it is above the minimum.
        certificate: of the published law.
        best: the fit at the minimum.
    """

    objective: float
    excess: float
    certificate: Certificate
    best: Fit


def audit(p: Problem, law: Law) -> Audit:
    """Find how far a published law is from the minimum of the objective that it claims."""
    theta, best = p.theta(law), fit(p)
    objective = p.value(theta)
    return Audit(objective, objective / best.objective - 1, certify(p, theta), best)
