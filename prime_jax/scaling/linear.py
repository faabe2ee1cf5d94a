"""The law linearised at its fit: what any set of runs would tell about N*(C).

Around the fit log L is linear in five unknowns, so the variance of log N*(C) that runs leave is
known before they are trained: g' (J'J)^-1 g times the variance of one run.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from prime_jax.errors import UserError
from prime_jax.scaling.approach3 import NAMES
from prime_jax.scaling.fit import FamilyFit
from prime_jax.scaling.laws import Compute, Law, optimum
from prime_jax.scaling.settings import Settings

Array = NDArray[np.float64]

WORST_CONDITION = 1e14


@dataclass(frozen=True)
class Linear:
    """The law linearised at its fit, in log E, alpha and beta and the two terms at a centre.

    Attributes:
        free: which of the five unknowns the fit determines (the others are at a bound).
        sigma: of log loss of one run, times what the objective loses against least squares.
    """

    law: Law
    compute: Compute
    centre: tuple[float, float]
    free: NDArray[np.bool_]
    sigma: float

    def features(self, params: Array, tokens: Array) -> Array:
        """d log L / d unknowns, [n, free]."""
        law = self.law
        x, y = np.log(params) - self.centre[0], np.log(tokens) - self.centre[1]
        loss = law.loss(params, tokens)
        a, b = law.A * params**-law.alpha / loss, law.B * tokens**-law.beta / loss
        return np.stack([law.E / loss, a, -a * x, b, -b * y], -1)[..., self.free]

    def optimum_gradient(self, flops: float) -> Array:
        """d log N*(C) / d unknowns, [free], from the closed form of `laws.optimum`."""
        law, q = self.law, self.compute.q
        fraction = law.alpha + q * law.beta
        log_params = float(np.log(optimum(law, self.compute, flops).params))
        log_work = math.log(flops / self.compute.k)
        alpha = (1 / law.alpha - log_params + self.centre[0]) / fraction
        beta = (log_work - q * log_params - 1 / law.beta - self.centre[1]) / fraction
        return np.array([0.0, 1 / fraction, alpha, -1 / fraction, beta])[self.free]

    def covariance(self, params: Array, tokens: Array, weight: Array) -> Array:
        """Of the unknowns over sigma**2, [free, free], once these runs are known.

        Raises:
            UserError: the runs do not determine the unknowns, not even to first order.
        """
        features = self.features(params, tokens)
        information = features.T @ (features * weight[:, None])
        size = np.sqrt(np.diag(information))
        scaled = information / np.outer(size, size)
        if not np.linalg.cond(scaled) < WORST_CONDITION:
            raise UserError("the runs do not determine the law; a design has nothing to start from")
        return np.linalg.inv(scaled) / np.outer(size, size)

    def sd(self, flops: float, params: Array, tokens: Array, weight: Array) -> float:
        """Of log N*(flops), once runs of these sizes, tokens and weights are known."""
        gradient = self.optimum_gradient(flops)
        covariance = self.covariance(params, tokens, weight)
        return self.sigma * math.sqrt(gradient @ covariance @ gradient)


def linearise(family: FamilyFit, settings: Settings) -> Linear:
    """The family has approach 3."""
    fit, points = family.parametric.fit, family.points
    centre = float(np.log(points.params).mean()), float(np.log(points.tokens).mean())
    free = np.array([name not in fit.certificate.bounds for name in NAMES])
    noise = noise_sd(family)
    return Linear(
        fit.law, family.compute, centre, free, noise * loss_of_efficiency(noise, settings)
    )


def noise_sd(family: FamilyFit) -> float:
    """Residual standard deviation of the log loss about the law: noise, and what the law misses.

    Of a run of weight one; those of the error budget differ between runs.
    """
    points, part = family.points, family.parametric
    residual = np.log(points.loss) - np.log(part.fit.law.loss(points.params, points.tokens))
    squares = float(part.problem.weight_n @ residual**2)
    return math.sqrt(squares / max(1, len(residual) - len(NAMES)))


def loss_of_efficiency(noise: float, settings: Settings) -> float:
    """Standard error under the fit's objective over that of least squares, for normal noise.

    Huber, "Robust estimation of a location parameter" (1964): E psi^2 / (E psi')^2.
    """
    if settings.objective == "ls":
        return 1.0
    k = settings.delta / noise if noise > 0 else math.inf
    if k > 8:
        return 1.0
    inside = 2 * norm.cdf(k) - 1
    psi2 = inside - 2 * k * norm.pdf(k) + 2 * k**2 * norm.sf(k)
    return float(math.sqrt(psi2) / inside)
