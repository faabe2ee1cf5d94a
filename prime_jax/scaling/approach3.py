"""Approach 3: the law fitted to all runs of a family, with a certificate of convergence.

Minimises sum_i w_i rho(log L_hat_i - log L_i) (Hoffmann et al. 2022, equation 3), with rho(r)
either Huber's function or r**2 / 2 (`ls`), and any law of `laws`. Published fits that stop short
of their own optimum (one leaves A and B at the start value) come from finite differences on badly
scaled unknowns; here the unknowns are standardised, gradient and Hessian exact, and every fit says
how well it converged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from prime_jax.errors import UserError
from prime_jax.scaling import newton
from prime_jax.scaling.laws import Form, Law, PowerForm, PowerLaw
from prime_jax.scaling.repeated import RepeatedForm, RepeatedLaw
from prime_jax.scaling.settings import DELTA, POWERS, REPEATED, Objective

Array = NDArray[np.float64]

AGREE = 1e-9  # starts within this relative distance of the best objective agree with it
MIN_AGREEING = 0.9  # of the starts should
STATIONARY = 1e-6  # largest scaled gradient of a converged fit
FLAT = 1e-12  # fraction of the largest curvature that rounding cannot tell from none
SILENT, EXACT = 1e-12, 1e-30  # residual, and objective of a run, that are rounding

# By name: what makes the form of a law on params, tokens and unique tokens; its class.
LAWS: dict[str, tuple[Callable[[Array, Array, ArrayLike], Form], type[Law]]] = {
    POWERS: (PowerForm.on, PowerLaw),
    REPEATED: (RepeatedForm.on, RepeatedLaw),
}


def law_of(name: str) -> tuple[Callable[[Array, Array, ArrayLike], Form], type[Law]]:
    """Raises UserError for a law that is not there."""
    if name not in LAWS:
        raise UserError(f"no law {name!r}; there are {', '.join(LAWS)}")
    return LAWS[name]


@dataclass(frozen=True)
class Problem:
    """The objective on n runs."""

    form: Form
    log_loss_n: Array  # or [P, n]: other losses for each of P problems
    weight_n: Array
    objective: Objective = "huber"
    delta: float = DELTA  # residual at which rho turns from a square into a line

    def derivatives(self, theta_PxK: Array, weight_Pxn: Array) -> tuple[Array, Array, Array]:
        """Objective_P, gradient_PxK and Hessian_PxKxK for P settings of unknowns and weights."""
        predicted, parts = self.form.predict(theta_PxK)
        residual = predicted - self.log_loss_n
        score = np.clip(residual, -self.delta, self.delta)
        slope = weight_Pxn * score
        value = np.sum(slope * (residual - 0.5 * score), axis=1)
        curve = weight_Pxn * (score == residual)
        return value, *self.form.derivatives(parts, slope, curve)

    def curvature(self, residual_n: Array) -> float:
        """mean(rho''), by the weights: what the sum of all runs has for curvature.

        Over a kernel density of the residuals, as few of them may lie within delta.
        """
        if np.isinf(self.delta):
            return 1.0
        count = len(residual_n)
        residual = residual_n * np.sqrt(
            count / max(count - self.unknowns, 1)
        )  # a fit hugs its data
        quartiles = np.subtract(*np.percentile(residual, [75, 25])) / 1.34
        width = max(0.9 * min(residual.std(), quartiles) * count**-0.2, SILENT)
        inside = ndtr((self.delta - residual) / width) - ndtr((-self.delta - residual) / width)
        return max(float(self.weight_n @ inside / self.weight_n.sum()), SILENT)

    def value(self, theta_K: Array) -> float:
        return float(self.weight_n @ self.cost(self.residual(theta_K)))

    def cost(self, residual: ArrayLike) -> Array:
        """rho of residuals."""
        score = np.clip(residual, -self.delta, self.delta)
        return score * (residual - 0.5 * score)

    def residual(self, theta_K: Array) -> Array:
        """log L_hat - log L, [n]."""
        return self.residuals(theta_K[None])[0]

    def residuals(self, theta_PxK: Array) -> Array:
        """log L_hat - log L, [P, n]."""
        return self.form.predict(theta_PxK)[0] - self.log_loss_n

    def gradient_scale(self, theta_PxK: Array) -> Array:
        """The gradient_PxK if every residual pulled the same way: what "zero" is measured by."""
        score = min(self.delta, DELTA)  # least squares: as of residuals of 0.1 %
        return score * self.form.gradient_size(self.form.predict(theta_PxK)[1], self.weight_n)

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

    @property
    def unknowns(self) -> int:
        return len(self.form.names)

    @property
    def runs(self) -> int:
        return len(self.weight_n)

    @property
    def floor(self) -> float:
        """The objective of an exact fit, which is rounding."""
        return EXACT * self.runs

    def box(self) -> tuple[Array, Array]:
        """Bounds_K of the unknowns."""
        return self.form.box(self.log_loss_n)


def problem(
    params: Array,
    tokens: Array,
    loss: Array,
    delta: float = DELTA,
    objective: Objective = "huber",
    weight: Array | None = None,
    law: str = POWERS,
    unique: ArrayLike = np.inf,
) -> Problem:
    """The objective of a law, a name of `LAWS`, on runs of N = `params`, D = `tokens`, of which
    `unique` are unique.

    `delta` is that of Huber's function; least squares has none.

    Raises:
        UserError: a delta that is not above 0, or no such law.
    """
    if not 0 < delta < math.inf:
        raise UserError(f"delta is {delta}; it must be a number above 0, such as {DELTA}")
    return Problem(
        form=law_of(law)[0](params, tokens, unique),
        log_loss_n=np.log(loss),
        weight_n=np.ones(len(params)) if weight is None else weight,
        objective=objective,
        delta=math.inf if objective == "ls" else delta,
    )


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


def certify(p: Problem, theta_K: Array, ends_S: ArrayLike = ()) -> Certificate:
    """Examine any point; `ends_S` are the objectives that other starts ended at."""
    theta, ends_S = theta_K[None], np.asarray(ends_S, dtype=np.float64)
    lower, upper = p.box()
    _, gradient_PxK, hessian = p.derivatives(theta, p.weight_n[None])
    gradient = gradient_PxK[0]
    moves = newton.free(theta_K, gradient, lower, upper)
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
        bounds=tuple(name for name, moving in zip(p.form.names, moves, strict=True) if not moving),
    )


@dataclass(frozen=True)
class Fit:
    law: Law
    theta_K: Array
    objective: float
    certificate: Certificate


def solve(p: Problem, start_PxK: Array, weight_Pxn: Array) -> tuple[Array, Array]:
    """Newton's method from each start under its own weights: theta_PxK and the objective_P."""
    lower, upper = p.box()
    theta, value = start_PxK, np.empty(0)
    for stage in p.stages():
        theta, value = newton.minimise(
            lambda t, i, stage=stage: stage.at(i).derivatives(t, weight_Pxn[i]),
            start_PxK=theta, lower_K=lower, upper_K=upper, floor=stage.floor, logs=p.form.logs,
        )  # fmt: skip
    return theta, value


def fit(p: Problem) -> Fit:
    """The best of all starts. Its objective is summed over the runs, not averaged."""
    start = p.form.starts(p.log_loss_n)
    ends, values = solve(p, start, np.broadcast_to(p.weight_n, (len(start), p.runs)))
    theta = ends[np.argmin(values)]
    law = p.form.law(theta)
    law = replace(law, **{name: float(value) for name, value in vars(law).items()})
    return Fit(law, theta, p.value(theta), certify(p, theta, values))
