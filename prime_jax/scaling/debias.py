"""Approach 2 less its bias: optima freed from the shift of their parabolas, and their exponent.

The IsoFLOP curve of L = E + A / N**alpha + B / D**beta at fixed C is no parabola: up to a factor and a
constant it is exp(-alpha t) / alpha + exp(q beta t) / (q beta) in t = log N - log N* (with
C = k N**q D). The least-squares parabola is linear in the losses, so the place of N* below a given
minimum follows in closed form from alpha, beta and the sampled sizes; E, A and B drop out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from prime_jax.scaling import newton
from prime_jax.scaling.isoflop_curves import IsoflopCurve
from prime_jax.scaling.laws import Compute, Law, Optimum

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Debiased:
    """The optima of the K budgets that have theirs inside the sampled sizes.

    Attributes:
        optima: N* and D*, and the loss of the fitted curve there.
        shift_K: log N of each minimum above that of its optimum.
        a: the exponent through them, weighted by their errors; budgets whose optimum lies at an
            edge of the sizes enter as bounds.
        log_params_RxK, a_R: redrawn from the errors; None without a degree of freedom.
    """

    optima: tuple[Optimum, ...]
    shift_K: Array
    a: float
    log_params_RxK: Array | None
    a_R: Array | None


def optimum(curve: IsoflopCurve, minimum: ArrayLike, law: Law, compute: Compute) -> Array:
    """log N* for which the parabola through this curve's sizes has its lowest point at `minimum`.

    `minimum` and the exponents of `law` broadcast. NaN where no such law exists. An interpolant
    has no shift.
    """
    minimum = np.asarray(minimum, dtype=np.float64)
    if curve.interpolated:
        return minimum
    alpha, beta = np.asarray(law.alpha)[..., None], compute.q * np.asarray(law.beta)[..., None]
    u, w = curve.log_params_n - curve.centre, curve.weight_n
    design = np.stack([np.ones_like(u), u, u**2], 1)
    slopes_2xn = (curve.covariance_3x3 @ (design.T * w))[1:]  # losses to c_1 and c_2
    to_slope = slopes_2xn[0] + 2 * (minimum[..., None] - curve.centre) * slopes_2xn[1]
    falling = np.sum(to_slope * np.exp(-alpha * u), -1) / alpha[..., 0]
    rising = np.sum(to_slope * np.exp(beta * u), -1) / beta[..., 0]
    possible = (falling < 0) & (rising > 0)  # the two cancel at the minimum, for some N*
    ratio = np.where(possible, -rising / np.where(possible, falling, 1.0), np.nan)
    return curve.centre + np.log(ratio) / (alpha[..., 0] + beta[..., 0])


def exponent(x_V: Array, y_RxV: Array, sd_V: Array, side_V: NDArray[np.int_]) -> Array:
    """Slope of y on x in R data sets whose points have normal errors `sd_V` [R].

    `side_V` is 0 for a value, 1 where y is only known to be above, -1 below the number given
    (Tobin's censored regression, with known variances).
    """
    x = x_V - x_V.mean()
    value = side_V == 0
    weight = value / sd_V**2
    middle = weight @ x / weight.sum()
    slope = (y_RxV @ (weight * (x - middle))) / (weight @ (x - middle) ** 2)
    if value.all():
        return slope
    start = np.stack([y_RxV @ weight / weight.sum() - slope * middle, slope], 1)

    def derivatives(theta, problems):
        mean = theta[:, :1] + theta[:, 1:] * x
        z = (mean - y_RxV[problems]) / sd_V
        by_value = 0.5 * z**2, z, np.ones_like(z)
        signed = np.where(value, 1, side_V) * z
        log_mass = norm.logcdf(signed)
        mills = np.exp(norm.logpdf(signed) - log_mass)
        by_bound = -log_mass, -side_V * mills, mills * (signed + mills)
        cost, first, second = (
            np.where(value, one, other) for one, other in zip(by_value, by_bound, strict=True)
        )
        features = np.stack([np.ones_like(x), x], 1)
        gradient = (first / sd_V) @ features
        products = (features[:, :, None] * features[:, None, :]).reshape(len(x), -1)
        return cost.sum(axis=1), gradient, ((second / sd_V**2) @ products).reshape(-1, 2, 2)

    far = np.array([1e6, 1e3])
    return newton.minimise(derivatives, start, -far, far)[0][:, 1]


def correct(
    curves: tuple[IsoflopCurve, ...],
    minima_RxV: Array | None,
    law: Law,
    replicates: Law,
    compute: Compute,
    seed: int,
) -> Debiased | None:
    """Take the shift off all curves.

    Args:
        curves: at least three of them with their optimum inside.
        minima_RxV: their minima in log N, redrawn from their errors.
        law, replicates: of approach 3 and its bootstrap, for their exponents alone.
        compute: what a run costs.
        seed: of the scatter of the optima about their power law.

    Returns:
        None where the law cannot have brought forth one of the minima inside.
    """
    side_V = np.array([{None: 0, "above": 1, "below": -1}[v.censored] for v in curves])
    raw_V = np.log([v.optimum.params for v in curves])
    x_V = np.log([v.flops for v in curves])
    y_V = np.array([optimum(v, y, law, compute) for v, y in zip(curves, raw_V, strict=True)])
    inside = side_V == 0
    if not np.isfinite(y_V[inside]).all():
        return None
    sizes = np.exp(y_V[inside])
    optima = tuple(
        Optimum(v.flops, float(n), compute.tokens(v.flops, n), float(v.loss(n)))
        for v, n in zip((v for v in curves if v.censored is None), sizes, strict=True)
    )
    shift = (raw_V - y_V)[inside]
    if minima_RxV is None:
        a = exponent(x_V[inside], y_V[None, inside], np.ones(inside.sum()), side_V[inside])
        return Debiased(optima, shift, a.item(), None, None)
    redrawn = np.stack(
        [optimum(v, minima_RxV[:, k], replicates, compute) for k, v in enumerate(curves)], 1
    )
    sd_V = errors(redrawn)
    known = np.isfinite(y_V) & (inside | np.isfinite(sd_V))
    worst = np.nanmax(sd_V[inside], initial=0.0) or 1.0
    sd_V = np.where(np.isfinite(sd_V), sd_V, worst)
    excess = scatter(x_V[inside], y_V[inside], sd_V[inside])
    sd_V = np.sqrt(sd_V**2 + excess**2 + 1e-18)  # noiseless data: no weight is infinite
    x, sd, side = x_V[known], sd_V[known], side_V[known]
    a = exponent(x, y_V[None, known], sd, side).item()
    rng = np.random.default_rng(seed)
    noisy = redrawn + excess * rng.standard_normal(redrawn.shape)
    y_RxV = np.where(inside, noisy, y_V)[:, known]
    whole = np.isfinite(y_RxV).all(axis=1)
    a_R = np.full(len(y_RxV), np.nan)
    a_R[whole] = exponent(x, y_RxV[whole], sd, side)
    return Debiased(optima, shift, a, redrawn[:, inside], a_R)


def scatter(x_K: Array, y_K: Array, noise_K: Array) -> float:
    """Standard deviation of y about its line on x, less what the noise of the points explains."""
    x, y = x_K - x_K.mean(), y_K - y_K.mean()
    residual = y - (x @ y) / (x @ x) * x
    return float(np.sqrt(max(residual @ residual / (len(x) - 2) - np.mean(noise_K**2), 0.0)))


def errors(draws_RxV: Array) -> Array:
    """Standard deviations by percentiles: minima have heavy tails. NaN where a tail is lost."""
    lost = np.isnan(draws_RxV).mean(axis=0) > 0.16
    low, high = np.nanpercentile(np.where(lost, 0.0, draws_RxV), [16, 84], axis=0)
    return np.where(lost, np.nan, (high - low) / 2)
