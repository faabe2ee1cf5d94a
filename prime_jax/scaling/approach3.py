"""Approach 3: the law fitted to all runs of a family, with a certificate of convergence.

Minimises sum_i w_i Huber_delta(log L_hat_i - log L_i) with
log L_hat = logsumexp(log E, log A - alpha log N, log B - beta log D) (Hoffmann et al. 2022,
equation 3). Published fits that stop short of their own optimum (one leaves A and B at the start
value) come from finite differences on badly scaled unknowns; here the unknowns are standardised,
gradient and Hessian exact, and every fit says how well it converged.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prime_jax.scaling import newton
from prime_jax.scaling.laws import Law

Array = NDArray[np.float64]

DELTA = 1e-3
NAMES = ("E", "A", "alpha", "B", "beta")  # order of the unknowns
AGREE = 1e-9  # starts within this relative distance of the best objective agree with it
MOST = 0.9  # of the starts should
STATIONARY = 1e-6  # largest scaled gradient of a converged fit


@dataclass(frozen=True)
class Problem:
    """The objective on n runs.

    The unknowns theta_5 are log E, the log of the parameter term at the centre of the data,
    alpha * sd(log N), the log of the token term at the centre, beta * sd(log D): all of order one.
    """

    x_n: Array  # standardised log N
    y_n: Array  # standardised log D
    log_loss_n: Array
    centre: tuple[float, float]
    scale: tuple[float, float]
    delta: float = DELTA

    def derivatives(self, theta_Px5: Array, weight_Pxn: Array) -> tuple[Array, Array, Array]:
        """Objective_P, gradient_Px5 and Hessian_Px5x5 for P settings of unknowns and weights."""
        s_e, s_a, s_b, residual = self._shares(theta_Px5)
        size = np.abs(residual)
        inside = size <= self.delta
        cost = np.where(inside, 0.5 * residual**2, self.delta * (size - 0.5 * self.delta))
        value = np.sum(weight_Pxn * cost, axis=1)

        slope = weight_Pxn * np.clip(residual, -self.delta, self.delta)
        x, y = self.x_n, self.y_n
        one_x, one_y = np.stack([np.ones_like(x), -x], 1), np.stack([np.ones_like(y), -y], 1)
        gradient = np.empty((len(theta_Px5), 5))
        gradient[:, 0] = np.sum(slope * s_e, axis=1)
        gradient[:, 1:3] = (slope * s_a) @ one_x
        gradient[:, 3:5] = (slope * s_b) @ one_y

        # Two shares k, m contribute (bend s_k s_m + [k = m] slope s_k) times their features.
        bend = weight_Pxn * inside - slope
        hessian = np.empty((len(theta_Px5), 5, 5))
        hessian[:, 0, 0] = np.sum(bend * s_e * s_e + slope * s_e, axis=1)
        hessian[:, 0, 1:3] = (bend * s_e * s_a) @ one_x
        hessian[:, 0, 3:5] = (bend * s_e * s_b) @ one_y
        hessian[:, 1:3, 1:3] = _outer(bend * s_a * s_a + slope * s_a, one_x, one_x)
        hessian[:, 3:5, 3:5] = _outer(bend * s_b * s_b + slope * s_b, one_y, one_y)
        hessian[:, 1:3, 3:5] = _outer(bend * s_a * s_b, one_x, one_y)
        hessian[:, 1:, 0] = hessian[:, 0, 1:]
        hessian[:, 3:5, 1:3] = hessian[:, 1:3, 3:5].transpose(0, 2, 1)
        return value, gradient, hessian

    def gradient_scale(self, theta_Px5: Array) -> Array:
        """The gradient_Px5 if every residual pulled the same way: what "zero" is measured by."""
        s_e, s_a, s_b, _ = self._shares(theta_Px5)
        size_x, size_y = np.abs(self.x_n), np.abs(self.y_n)
        columns = (s_e, s_a, s_a * size_x, s_b, s_b * size_y)
        return self.delta * np.stack([np.sum(c, axis=1) for c in columns], 1)

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

    def _shares(self, theta_Px5: Array) -> tuple[Array, Array, Array, Array]:
        """Shares of the three terms in the predicted loss, and the residuals; each [P, n]."""
        e, a, alpha, b, beta = (theta_Px5[:, k : k + 1] for k in range(5))
        term_a, term_b = a - alpha * self.x_n, b - beta * self.y_n
        top = np.maximum(np.maximum(term_a, term_b), e)
        s_e, s_a, s_b = np.exp(e - top), np.exp(term_a - top), np.exp(term_b - top)
        total = s_e + s_a + s_b
        residual = top + np.log(total) - self.log_loss_n
        return s_e / total, s_a / total, s_b / total, residual


def problem(params: Array, tokens: Array, loss: Array, delta: float = DELTA) -> Problem:
    """The objective on runs of N = `params`, D = `tokens`; needs two different N and two D."""
    log_n, log_d = np.log(params), np.log(tokens)
    centre, scale = (log_n.mean(), log_d.mean()), (log_n.std(), log_d.std())
    x, y = (log_n - centre[0]) / scale[0], (log_d - centre[1]) / scale[1]
    return Problem(x, y, np.log(loss), centre, scale, delta)


def starts(p: Problem) -> Array:
    """54 starts that all give losses of the right size (E, exponents and how the rest splits)."""
    lowest, middle = np.exp(p.log_loss_n.min()), np.exp(np.median(p.log_loss_n))
    grid = itertools.product((0.3, 0.6, 0.9), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0), (0.3, 0.7))
    rows = []
    for irreducible, alpha, beta, share in grid:
        e = irreducible * lowest
        a, b = share * (middle - e), (1 - share) * (middle - e)
        rows.append([np.log(e), np.log(a), alpha * p.scale[0], np.log(b), beta * p.scale[1]])
    return np.array(rows)


@dataclass(frozen=True)
class Certificate:
    """How far a fit is from a proper minimum.

    Attributes:
        gradient: largest component of the gradient, as a share of what it would be if every
            residual pulled the same way; 0 at a stationary point.
        smallest_eigenvalue: of the Hessian in the standardised unknowns that are not at a bound,
            as a share of the largest; above 0 at a proper minimum.
        starts, agreeing: number of starts and the share that ends within 1e-9 of the best.
        bounds: parameters that ended at a bound of the search.
    """

    gradient: float
    smallest_eigenvalue: float
    starts: int
    agreeing: float
    bounds: tuple[str, ...]

    @property
    def converged(self) -> bool:
        return self.gradient < STATIONARY and self.smallest_eigenvalue > 0


def certify(p: Problem, theta_5: Array, ends_S: Array) -> Certificate:
    """Examine any point, also a published one: `certify(p, p.theta(law), np.array([]))`."""
    theta = theta_5[None]
    value, gradient, hessian = p.derivatives(theta, np.ones((1, len(p.x_n))))
    lower, upper = p.box()
    moves = newton.free(theta, gradient, lower, upper)[0]
    scaled = np.abs(gradient[0]) / p.gradient_scale(theta)[0]
    eigenvalues = np.linalg.eigvalsh(hessian[0][np.ix_(moves, moves)])
    noise = 1e-9 * p.delta**2  # an exact fit has objective 0, where relative says nothing
    agree = ends_S <= value[0] + AGREE * value[0] + noise
    return Certificate(
        gradient=float(scaled[moves].max(initial=0.0)),
        smallest_eigenvalue=float(eigenvalues[0] / eigenvalues[-1]) if moves.any() else 0.0,
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


def fit(p: Problem) -> Fit:
    """The best of all starts. Its objective is summed over the runs, not averaged."""
    ones = np.ones((1, len(p.x_n)))
    lower, upper = p.box()
    ends, values = newton.minimise(lambda t, _: p.derivatives(t, ones), starts(p), lower, upper)
    best = int(np.argmin(values))
    law = p.law(ends[best])
    law = Law(*(float(v) for v in (law.E, law.A, law.B, law.alpha, law.beta)))
    return Fit(law, ends[best], float(values[best]), certify(p, ends[best], values))


def _outer(weight_Pxn: Array, left_nxI: Array, right_nxJ: Array) -> Array:
    """sum_n weight[p, n] left[n, i] right[n, j]: one matrix product for all problems."""
    features = (left_nxI[:, :, None] * right_nxJ[:, None, :]).reshape(len(left_nxI), -1)
    return (weight_Pxn @ features).reshape(-1, left_nxI.shape[1], right_nxJ.shape[1])
