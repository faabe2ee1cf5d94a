"""The loss against N at one budget, and the size at which it is lowest.

A parabola in log N (Hoffmann et al. 2022, section 3.2), or Akima's interpolant, which assumes no
shape and follows the noise of single runs instead.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import Akima1DInterpolator

from prime_jax.scaling.laws import Compute, Optimum

Array = NDArray[np.float64]
Side = Literal["below", "above"]
Method = Literal["parabola", "akima"]

MIN_SIZES = {"parabola": 3, "akima": 5}  # Akima's slopes come from five neighbours
FINE = 401  # sizes at which an interpolant is searched


@dataclass(frozen=True)
class IsoflopCurve:
    """One budget, and its parabola in u = log N - centre: loss = c_0 + c_1 u + c_2 u**2.

    Attributes:
        weight_n: of the runs, inverse variances up to a factor.
        censored: the side of the sampled sizes on which the optimum lies; `optimum` then holds
            the size at that edge, which bounds N*, and the lowest loss measured.
        covariance_3x3: of c over the noise variance.
        interpolated: the optimum is that of Akima's interpolant; the parabola then only tells
            the noise.
    """

    flops: float
    params_n: Array
    loss_n: Array
    weight_n: Array
    centre: float
    c_3: Array
    covariance_3x3: Array
    optimum: Optimum
    censored: Side | None
    interpolated: bool = False

    @property
    def log_params_n(self) -> Array:
        return np.log(self.params_n)

    @property
    def low(self) -> float:
        return float(self.params_n.min())

    @property
    def high(self) -> float:
        return float(self.params_n.max())

    @property
    def squares(self) -> float:
        """Weighted sum of the squared residuals of the parabola."""
        residual = self.loss_n - self._parabola(self.log_params_n)
        return float(self.weight_n @ residual**2)

    @property
    def minimum(self) -> float:
        """log N at the lowest point of the parabola, wherever that is."""
        return float(self.centre - self.c_3[1] / (2 * self.c_3[2]))

    def loss(self, params: Array) -> Array:
        x = np.log(params)
        return _akima(self.log_params_n, self.loss_n)(x) if self.interpolated else self._parabola(x)

    def _parabola(self, x: Array) -> Array:
        return np.polynomial.polynomial.polyval(x - self.centre, self.c_3)


def fit(
    budget: float, params: Array, loss: Array, weight: Array, compute: Compute, method: Method
) -> IsoflopCurve | None:
    """The IsoFLOP curve of the runs [n] of one budget; None if its curve has no minimum."""
    x = np.log(params)
    centre = float(weight @ x / weight.sum())
    design = np.stack([np.ones_like(x), x - centre, (x - centre) ** 2], 1)
    covariance = np.linalg.inv(design.T @ (weight[:, None] * design))
    c = covariance @ (design.T @ (weight * loss))
    low, high = x.min(), x.max()
    if method == "akima":
        best, value = (v.item() for v in _lowest(x, loss[:, None]))
    elif c[2] > 0:
        best, value = centre - c[1] / (2 * c[2]), c[0] - c[1] ** 2 / (4 * c[2])
    else:
        return None
    censored: Side | None = "below" if best <= low else "above" if best >= high else None
    size = float(np.exp(np.clip(best, -50, 100)))
    if censored:
        size, value = (params.min() if censored == "below" else params.max()), loss.min()
    optimum = Optimum(budget, float(size), compute.tokens(budget, size), float(value))
    return IsoflopCurve(
        flops=budget,
        params_n=params,
        loss_n=loss,
        weight_n=weight,
        centre=centre,
        c_3=c,
        covariance_3x3=covariance,
        optimum=optimum,
        censored=censored,
        interpolated=method == "akima",
    )


def redraw(curve: IsoflopCurve, sigma_R: Array, rng: np.random.Generator) -> Array:
    """log N* of the curve under noise of variance sigma**2 / weight, [R].

    NaN where it has no minimum then (or, interpolated, none between the sampled sizes).
    Resampling runs would leave four-point parabolas undetermined in a third of the replicates;
    the posterior of the coefficients under a flat prior does not.
    """
    replicates = len(sigma_R)
    if curve.interpolated:
        noise = rng.standard_normal((len(curve.loss_n), replicates)) * sigma_R
        loss_nxR = curve.loss_n[:, None] + noise / np.sqrt(curve.weight_n)[:, None]
        best, _ = _lowest(curve.log_params_n, loss_nxR)
        inside = (best > curve.log_params_n.min()) & (best < curve.log_params_n.max())
        return np.where(inside, best, np.nan)
    root = np.linalg.cholesky(curve.covariance_3x3)
    c_Rx3 = curve.c_3 + sigma_R[:, None] * (rng.standard_normal((replicates, 3)) @ root.T)
    convex = c_Rx3[:, 2] > 0
    minimum = -c_Rx3[:, 1] / (2 * np.where(convex, c_Rx3[:, 2], 1.0))
    return np.where(convex, curve.centre + minimum, np.nan)


def _akima(x_n: Array, loss_n: Array) -> Akima1DInterpolator:
    """Through the mean loss of every size; `loss_n` may have more axes."""
    size, where = np.unique(x_n, return_inverse=True)
    total = np.zeros((len(size), *loss_n.shape[1:]))
    np.add.at(total, where, loss_n)
    count = np.bincount(where).reshape(-1, *[1] * (loss_n.ndim - 1))
    return Akima1DInterpolator(size, total / count)


def _lowest(x_n: Array, loss_nxR: Array) -> tuple[Array, Array]:
    """log N and the loss where R interpolants are lowest, each [R]; at an edge, the edge."""
    curve = _akima(x_n, loss_nxR)
    fine = np.linspace(x_n.min(), x_n.max(), FINE)
    values = curve(fine)
    k = np.argmin(values, axis=0)
    column = np.arange(values.shape[1])
    edge = (k == 0) | (k == FINE - 1)
    k = np.clip(k, 1, FINE - 2)
    before, here, after = (values[k + step, column] for step in (-1, 0, 1))
    curvature = before - 2 * here + after
    shift = np.where(
        curvature > 0, (before - after) / (2 * np.where(curvature > 0, curvature, 1.0)), 0.0
    )
    best = np.clip(fine[k] + shift * (fine[1] - fine[0]), fine[0], fine[-1])
    at = np.where(values[0] < values[-1], fine[0], fine[-1])
    value = here - (before - after) * shift / 4
    return np.where(edge, at, best), np.where(edge, np.minimum(values[0], values[-1]), value)
