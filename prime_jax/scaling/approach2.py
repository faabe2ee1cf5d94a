"""Approach 2: the best size of each budget from a parabola, and the power law through them.

At a fixed budget the loss is fitted by a parabola in log N (Hoffmann et al. 2022, section 3.2), or
followed by Akima's interpolant, which assumes no shape and follows the noise of single runs
instead. Its minimum is N*. A minimum outside the sampled sizes is a bound, never a value, and a
parabola without a minimum gives nothing. `a` is the usual least-squares slope through the minima.

De-biased: the IsoFLOP curve of L = E + A / N**alpha + B / D**beta at fixed C is no parabola: up to a
factor and a constant it is exp(-alpha t) / alpha + exp(q beta t) / (q beta) in t = log N - log N*
(with C = k N**q D). The least-squares parabola is linear in the losses, so the place of N* below a
given minimum follows in closed form from alpha, beta and the sampled sizes; E, A and B drop out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_ndtr

from prime_jax.scaling import labels, newton, noise
from prime_jax.scaling.intervals import known_percentiles
from prime_jax.scaling.laws import Compute, Optimum, PowerLaw
from prime_jax.scaling.points import SPREAD, Points, assign_budgets, budget_spread
from prime_jax.scaling.schema import Diagnostic, hidden, key, refuse, warn
from prime_jax.scaling.settings import Method

Array = NDArray[np.float64]
Side = Literal["below", "above"]

MIN_SIZES = {"parabola": 3, "akima": 5}  # Akima's slopes come from five neighbours
HALF_LOG_2PI = np.log(np.sqrt(2 * np.pi))
FINE = 401  # sizes at which an interpolant is searched
MIN_BUDGETS = 3
MAX_SPREAD = 2.0  # largest over smallest FLOPs of a stated budget
MAX_SHIFT, MAX_CHANGE = 2.0, 0.2  # of an optimum, a factor; and of a: by the bias of parabolas
OFF_CENTRE = 0.5  # of the half-width of the sizes, in log N, between their middle and the optimum
DRIFT = 0.1  # in the exponent, between the middles of the sizes and the optima


@dataclass(frozen=True)
class IsoflopCurve:
    """One budget, and its parabola in u = log N - centre: loss = c_0 + c_1 u + c_2 u**2.

    Attributes:
        weight_n: of the runs, inverse variances up to a factor.
        censored: the side of the sampled sizes on which the optimum lies; `optimum` then holds
            the size at that edge, which bounds N*, and the lowest loss measured.
        covariance_3x3: of c over the noise variance.
        sd_n: standard deviations of the losses, where the optimum is that of Akima's interpolant,
            which follows every loss; None for a parabola, whose misfit tells them.
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
    sd_n: Array | None = None

    @property
    def interpolated(self) -> bool:
        return self.sd_n is not None

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


def fit_curve(
    budget: float,
    params: Array,
    loss: Array,
    weight: Array,
    compute: Compute,
    sd: Array | None = None,
) -> IsoflopCurve | None:
    """The IsoFLOP curve of the runs [n] of one budget; None if its curve has no minimum.

    With `sd` of the losses it is an interpolant, else a parabola.
    """
    x = np.log(params)
    centre = float(weight @ x / weight.sum())
    design = np.stack([np.ones_like(x), x - centre, (x - centre) ** 2], 1)
    covariance = np.linalg.inv(design.T @ (weight[:, None] * design))
    c = covariance @ (design.T @ (weight * loss))
    low, high = x.min(), x.max()
    if sd is not None:
        best, value = (v.item() for v in _lowest(x, loss[:, None]))
    elif c[2] > 0:
        best, value = centre - c[1] / (2 * c[2]), c[0] - c[1] ** 2 / (4 * c[2])
    else:
        return None
    if value <= 0:
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
        sd_n=sd,
    )


def noise_scale(
    curves: Sequence[IsoflopCurve], replicates: int, rng: np.random.Generator
) -> Array | None:
    """Standard deviations_R of a loss of weight one: as the parabolas' misfit has them, with the
    error of that; 1 for interpolants, which know their own. None without a degree of freedom."""
    if any(curve.interpolated for curve in curves):
        return np.ones(replicates)
    freedom = sum(len(curve.loss_n) - 3 for curve in curves)
    if freedom < 1:
        return None
    squares = sum(curve.squares for curve in curves)
    return np.sqrt(squares / rng.chisquare(freedom, replicates))


def redraw_curve(
    curve: IsoflopCurve, sigma_R: Array, rng: np.random.Generator
) -> tuple[Array, Array]:
    """log N* of the curve and the loss there, each [R], under noise of variance sigma**2 / weight.

    NaN where it has no minimum then (or, interpolated, none between the sampled sizes).
    Resampling runs would leave four-point parabolas undetermined in a third of the replicates;
    the posterior of the coefficients under a flat prior does not.
    """
    replicates = len(sigma_R)
    if curve.interpolated:
        noise = rng.standard_normal((len(curve.loss_n), replicates)) * sigma_R
        loss_nxR = curve.loss_n[:, None] + noise * curve.sd_n[:, None]
        best, lowest = _lowest(curve.log_params_n, loss_nxR)
        inside = (best > curve.log_params_n.min()) & (best < curve.log_params_n.max())
        return np.where(inside, best, np.nan), np.where(inside, lowest, np.nan)
    root = np.linalg.cholesky(curve.covariance_3x3)
    c_Rx3 = curve.c_3 + sigma_R[:, None] * (rng.standard_normal((replicates, 3)) @ root.T)
    convex = c_Rx3[:, 2] > 0
    minimum = -c_Rx3[:, 1] / (2 * np.where(convex, c_Rx3[:, 2], 1.0))
    lowest = c_Rx3[:, 0] + c_Rx3[:, 1] * minimum / 2
    return np.where(convex, curve.centre + minimum, np.nan), np.where(convex, lowest, np.nan)


def _akima(x_n: Array, loss_n: Array) -> Callable[[ArrayLike], Array]:
    """Through the mean loss of every size; `loss_n` may have more axes.

    Sizes without a gap of 5 % are one: between two that are next to each other the noise of their
    losses would be a slope without end.
    """
    from scipy.interpolate import Akima1DInterpolator  # slow to load, and rarely used

    where = _distinct(np.exp(x_n))
    count = np.bincount(where)
    total = np.zeros((len(count), *loss_n.shape[1:]))
    np.add.at(total, where, loss_n)
    mean = total / count.reshape(-1, *[1] * (loss_n.ndim - 1))
    return Akima1DInterpolator(np.bincount(where, x_n) / count, mean, extrapolate=True)


def _sizes(params: Array, method: Method) -> int:
    return len(np.unique(params if method == "parabola" else _distinct(params)))


def _distinct(params: Array) -> NDArray[np.intp]:
    """Which of the sizes, in rising order, each run has; those without a gap are one."""
    return np.unique(assign_budgets(params, None), return_inverse=True)[1]


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


@dataclass(frozen=True)
class Unshifted:
    """The optimum of a budget without the shift of its parabola, and that shift over it."""

    flops: float
    params: float
    tokens: float
    loss: float
    interval: list[float] | None
    shift: float


@dataclass(frozen=True)
class Debiased:
    """The optima of the K budgets that have theirs inside the sampled sizes."""

    a: float = key(
        "exponent of N\\* through these optima, weighted by their errors; budgets with a bound enter as bounds"
    )
    intervals: dict[str, list[float] | None] = key("interval of a")
    optima: tuple[Unshifted, ...] = key(
        "optima as above, with the `shift` that was removed, relative to N\\*"
    )
    shift_K: Array = hidden()  # log N of each minimum above that of its optimum
    log_params_RxK: Array | None = hidden()  # redrawn from the errors; None without any freedom
    a_R: Array | None = hidden()


def unshifted(curve: IsoflopCurve, minimum: ArrayLike, law: PowerLaw, compute: Compute) -> Array:
    """log N* for which the parabola through this curve's sizes has its lowest point at `minimum`.

    `minimum` and the exponents of `law` broadcast. NaN where no such law exists.
    """
    minimum = np.asarray(minimum, dtype=np.float64)
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


def censored_slope(x_V: Array, y_RxV: Array, sd_V: Array, side_V: NDArray[np.int_]) -> Array:
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
        log_mass = log_ndtr(signed)
        mills = np.exp(-(signed**2) / 2 - HALF_LOG_2PI - log_mass)
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


def line_scatter(x_K: Array, y_K: Array, noise_K: Array) -> float:
    """Standard deviation of y about its line on x, less what the noise of the points explains."""
    x, y = x_K - x_K.mean(), y_K - y_K.mean()
    residual = y - (x @ y) / (x @ x) * x
    return float(np.sqrt(max(residual @ residual / (len(x) - 2) - np.mean(noise_K**2), 0.0)))


def percentile_sd(draws_RxV: Array) -> Array:
    """Standard deviations by percentiles: minima have heavy tails. NaN where a tail is lost."""
    lost = np.isnan(draws_RxV).mean(axis=0) > 0.16
    low, high = np.nanpercentile(np.where(lost, 0.0, draws_RxV), [16, 84], axis=0)
    return np.where(lost, np.nan, (high - low) / 2)


@dataclass(frozen=True)
class Draws:
    """Optima redrawn from their errors, and the exponent a_R; NaN where a curve has no minimum.

    Attributes:
        params: N*_RxK of the K budgets inside.
        minima_RxV: log N of the lowest points of all V curves.
    """

    params: Array
    a: Array
    minima_RxV: Array


@dataclass(frozen=True)
class CurveOptimum:
    """The lowest point of one budget; where `censored`, a bound, on the side that is named."""

    flops: float
    params: float
    tokens: float
    loss: float
    interval: list[float] | None
    censored: Side | None = None


@dataclass(frozen=True)
class Approach2:
    """Approach 2 of one family; `a` is None where it is refused."""

    method: Method = key("`parabola` or `akima`")
    a: float | None = key("exponent of N\\*; null if refused", default=None)
    intervals: dict[str, list[float] | None] = key(
        "interval of a", default_factory=lambda: {"a": None}
    )
    optima: tuple[CurveOptimum, ...] = key(
        "at each budget: `flops, params, tokens, loss, interval`; `censored` (above, below) where N\\* is only a bound",
        default=(),
    )
    debiased: Debiased | None = key(
        "the same without the bias of a parabola; null if not known", default=None
    )
    warnings: tuple[Diagnostic, ...] = key("warnings of this approach", default=())
    curves: tuple[IsoflopCurve, ...] = hidden(default=())
    draws: Draws | None = hidden(default=None)

    @property
    def inside(self) -> tuple[IsoflopCurve, ...]:
        return tuple(curve for curve in self.curves if curve.censored is None)


def fit(
    points: Points, compute: Compute, method: Method = "parabola", weight_n: Array | None = None
) -> Approach2:
    """IsoFLOP curves of all budgets, and the exponent through those with their optimum inside.

    Args:
        points: the runs.
        compute: what a run costs.
        method: the curve through the losses of one budget.
        weight_n: of the runs, inverse variances up to a factor; equal if None.
    """
    weight_n = np.ones(len(points.loss)) if weight_n is None else weight_n
    sd_n = noise.of(points).sd_n * points.loss if method == "akima" else None
    most = MAX_SPREAD if points.stated else SPREAD
    found, spread, few, no_minimum, wide = [], [], [], [], []
    for budget in points.budgets:
        mine = points.budget == budget
        params, apart = points.params[mine], budget_spread(points.flops[mine])
        if SPREAD < apart <= most:
            wide.append((budget, apart))
        if apart > most:
            spread.append(budget)
        elif _sizes(params, method) < MIN_SIZES[method]:
            few.append(budget)
        else:
            curve = fit_curve(
                budget,
                params=params,
                loss=points.loss[mine],
                weight=weight_n[mine],
                compute=compute,
                sd=None if sd_n is None else sd_n[mine],
            )
            (no_minimum if curve is None else found).append(curve or budget)
    diagnostics = _spread(points, spread, wide) + _left_out(few, no_minimum, method)
    diagnostics += _censored(found)
    inside = [curve for curve in found if curve.censored is None]
    a = None
    if len(inside) < MIN_BUDGETS:
        diagnostics.append(
            refuse(
                "too_few_budgets",
                f"approach 2 has {len(inside)} budgets with their optimum inside the sampled sizes; an exponent needs {MIN_BUDGETS}",
            )
        )
    else:
        a = float(_slope(inside) @ np.log([curve.optimum.params for curve in inside]))
    diagnostics += _grid(inside, a)
    return Approach2(
        method,
        a=a,
        optima=tuple(_optimum(curve, None) for curve in found),
        warnings=tuple(diagnostics),
        curves=tuple(found),
    )


def with_errors(found: Approach2, draws: Draws | None, level: float) -> Approach2:
    """The same with intervals, and with a warning where there can be none."""
    if draws is None:
        return replace(found, warnings=(*found.warnings, *why_no_interval(found, None, level)))
    ends = {"a": None if found.a is None else known_percentiles(draws.a, level)}
    columns = iter(draws.params.T)
    optima = tuple(
        _optimum(curve, None if curve.censored else known_percentiles(next(columns), level))
        for curve in found.curves
    )
    warnings = (*found.warnings, *why_no_interval(found, draws, level))
    return replace(found, intervals=ends, optima=optima, warnings=warnings, draws=draws)


def _optimum(curve: IsoflopCurve, interval: list[float] | None) -> CurveOptimum:
    best = curve.optimum
    return CurveOptimum(
        flops=float(best.flops),
        params=float(best.params),
        tokens=float(best.tokens),
        loss=float(best.loss),
        interval=interval,
        censored=curve.censored,
    )


def redraw(isoflop: Approach2, replicates: int, seed: int) -> Draws | None:
    """IsoFLOP curves redrawn under normal noise: for parabolas of one unknown variance, shared by
    all budgets; for interpolants of that which the error budget gives each run.

    The exponent also carries the scatter of the minima about their power law that this noise
    does not explain. None without a degree of freedom.
    """
    inside = isoflop.inside
    rng = np.random.default_rng(seed)
    sigma_R = noise_scale(isoflop.curves, replicates, rng)
    if sigma_R is None or not inside:
        return None
    minima = np.stack([redraw_curve(v, sigma_R, rng)[0] for v in isoflop.curves], 1)
    log_params = minima[:, [v.censored is None for v in isoflop.curves]]
    if isoflop.a is None:
        return Draws(np.exp(log_params), np.full(replicates, np.nan), minima)
    x = np.log([curve.flops for curve in inside])
    y = np.log([curve.optimum.params for curve in inside])
    excess = line_scatter(x, y, percentile_sd(log_params))
    noise = excess * rng.standard_normal(log_params.shape)
    return Draws(np.exp(log_params), (log_params + noise) @ _slope(inside), minima)


def take_shift_off(
    found: Approach2,
    draws: Draws | None,
    law: PowerLaw,
    replicates: PowerLaw,
    compute: Compute,
    seed: int,
    level: float = 0.95,
) -> Debiased | None:
    """The same optima and exponent without the bias of parabolas.

    Args:
        found: parabolas, with at least three that have their optimum inside.
        draws: their minima redrawn from their errors.
        law, replicates: of approach 3 and its bootstrap, for their exponents alone.
        compute: what a run costs.
        seed: of the scatter of the optima about their power law.
        level: of the intervals.

    Returns:
        None where the law cannot have brought forth one of the minima inside.
    """
    curves = found.curves
    side_V = np.array([{None: 0, "above": 1, "below": -1}[v.censored] for v in curves])
    raw_V = np.log([v.optimum.params for v in curves])
    x_V = np.log([v.flops for v in curves])
    y_V = np.array([unshifted(v, y, law, compute) for v, y in zip(curves, raw_V, strict=True)])
    inside = side_V == 0
    if not np.isfinite(y_V[inside]).all():
        return None
    shift = (raw_V - y_V)[inside]
    if draws is None:
        a = censored_slope(x_V[inside], y_V[None, inside], np.ones(inside.sum()), side_V[inside])
        return _debiased(
            found=found,
            y_K=y_V[inside],
            shift_K=shift,
            compute=compute,
            a=a.item(),
            a_R=None,
            log_params_RxK=None,
            level=level,
        )
    redrawn = np.stack(
        [unshifted(v, draws.minima_RxV[:, k], replicates, compute) for k, v in enumerate(curves)], 1
    )
    sd_V = percentile_sd(redrawn)
    known = np.isfinite(y_V) & (inside | np.isfinite(sd_V))
    worst = np.nanmax(sd_V[inside], initial=0.0) or 1.0
    sd_V = np.where(np.isfinite(sd_V), sd_V, worst)
    excess = line_scatter(x_V[inside], y_V[inside], sd_V[inside])
    sd_V = np.sqrt(sd_V**2 + excess**2 + 1e-18)  # noiseless data: no weight is infinite
    x, sd, side = x_V[known], sd_V[known], side_V[known]
    a = censored_slope(x, y_V[None, known], sd, side).item()
    rng = np.random.default_rng(seed)
    noisy = redrawn + excess * rng.standard_normal(redrawn.shape)
    y_RxV = np.where(inside, noisy, y_V)[:, known]
    whole = np.isfinite(y_RxV).all(axis=1)
    a_R = np.full(len(y_RxV), np.nan)
    a_R[whole] = censored_slope(x, y_RxV[whole], sd, side)
    return _debiased(
        found=found,
        y_K=y_V[inside],
        shift_K=shift,
        compute=compute,
        a=a,
        a_R=a_R,
        log_params_RxK=redrawn[:, inside],
        level=level,
    )


def implausible(found: Approach2, debiased: Debiased | None) -> Diagnostic | None:
    """What is wrong with optima that the law moves further than a bias of parabolas can."""
    if debiased is None:
        return warn(
            "debias_implausible",
            "no law with the exponents of approach 3 has its parabolas' minima where they are",
        )
    k = int(np.argmax(np.abs(debiased.shift_K)))
    curve, factor = found.inside[k], float(np.exp(np.abs(debiased.shift_K[k])))
    outside = [
        one.flops
        for one, best in zip(found.inside, debiased.optima, strict=True)
        if not one.low <= best.params <= one.high
    ]
    if factor > MAX_SHIFT:
        what = f"would move the optimum at {labels.flops(curve.flops)} FLOPs by a factor of {factor:.3g}"
    elif outside:
        what = f"would move the optimum out of the sampled sizes at {_list(outside)} FLOPs"
    elif abs(debiased.a - found.a) > MAX_CHANGE:
        what = f"would take a from {found.a:.3f} to {debiased.a:.3f}"
    else:
        return None
    return warn("debias_implausible", f"taking the bias off the parabolas {what}; it is left out")


def _debiased(
    found: Approach2,
    y_K: Array,
    shift_K: Array,
    compute: Compute,
    a: float,
    a_R: Array | None,
    log_params_RxK: Array | None,
    level: float,
) -> Debiased:
    optima = tuple(
        Unshifted(
            flops=curve.flops,
            params=float(size),
            tokens=float(compute.tokens(curve.flops, size)),
            loss=float(curve.loss(size)),
            interval=None
            if log_params_RxK is None
            else known_percentiles(np.exp(log_params_RxK[:, k]), level),
            shift=float(np.expm1(shift_K[k])),
        )
        for k, (curve, size) in enumerate(zip(found.inside, np.exp(y_K), strict=True))
    )
    ends = {"a": known_percentiles(a_R, level)}
    return Debiased(
        a=a, intervals=ends, optima=optima, shift_K=shift_K, log_params_RxK=log_params_RxK, a_R=a_R
    )


def why_no_interval(
    isoflop: Approach2, draws: Draws | None, level: float
) -> tuple[Diagnostic, ...]:
    """Why the exponent has no interval, if it has none."""
    curve = "parabola" if isoflop.method == "parabola" else "curve between the sampled sizes"
    if isoflop.a is None:
        return ()
    if draws is None:
        return (
            warn(
                "interval_unbounded",
                "approach 2 has no run to spare for an error: three sizes fix a parabola",
            ),
        )
    if known_percentiles(draws.a, level) is None:
        return (
            warn(
                "interval_unbounded",
                f"approach 2 has no interval: within the noise some {curve} has no minimum",
            ),
        )
    return ()


def _slope(inside: tuple[IsoflopCurve, ...] | list[IsoflopCurve]) -> Array:
    """Weights_K whose product with log N* is the least-squares slope on log C."""
    x = np.log([curve.flops for curve in inside])
    x = x - x.mean()
    return x / (x @ x)


def _spread(
    points: Points, spread: list[float], wide: list[tuple[float, float]]
) -> list[Diagnostic]:
    """Budgets whose runs differ in FLOPs: left out (`spread`), or believed as stated (`wide`)."""
    diagnostics = []
    if wide:
        most = max(apart for _, apart in wide)
        diagnostics.append(
            warn(
                "budget_spread",
                f"runs that state {_list([c for c, _ in wide])} FLOPs differ in theirs by up to {most - 1:.0%}; the statement is believed",
            )
        )
    if spread and points.stated:
        text = f"runs that state {_list(spread)} FLOPs differ in theirs by more than a factor of {MAX_SPREAD:g}; left out of approach 2"
        diagnostics.append(warn("budget_spread", text))
    elif spread:
        text = f"runs of {_list(spread)} FLOPs differ in their FLOPs by more than {SPREAD - 1:.0%}"
        diagnostics.append(warn("budget_ambiguous", text))
    return diagnostics


def _left_out(few: list[float], no_minimum: list[float], method: Method) -> list[Diagnostic]:
    diagnostics = []
    if few:
        least = MIN_SIZES[method]
        diagnostics.append(
            warn("too_few_points", f"fewer than {least} sizes at {_list(few)} FLOPs")
        )
    if no_minimum:
        diagnostics.append(
            warn("negative_curvature", f"the {method} has no minimum at {_list(no_minimum)} FLOPs")
        )
    return diagnostics


def _grid(inside: list[IsoflopCurve], a: float | None) -> list[Diagnostic]:
    """Sizes that are not laid around the optimum: what a minimum then owes to the grid."""
    diagnostics = []
    middle = np.array([np.log(v.low * v.high) / 2 for v in inside])
    half = np.array([np.log(v.high / v.low) / 2 for v in inside])
    best = np.log([v.optimum.params for v in inside])
    off = [
        v.flops
        for v, far in zip(inside, np.abs(middle - best) > OFF_CENTRE * half, strict=True)
        if far
    ]
    if off:
        diagnostics.append(
            warn(
                "off_centre_grid",
                f"the optimum is in the outer half of the sampled sizes at {_list(off)} FLOPs",
            )
        )
    if a is not None:
        grid = float(_slope(inside) @ middle)
        if abs(grid - a) > DRIFT:
            diagnostics.append(
                warn(
                    "drifting_grid",
                    f"the middle of the sampled sizes grows as C^{grid:.2f}, the optimum as C^{a:.2f}",
                )
            )
    return diagnostics


def _censored(curves: list[IsoflopCurve]) -> list[Diagnostic]:
    diagnostics = []
    for side, edge in (("below", "smallest"), ("above", "largest")):
        out = [curve for curve in curves if curve.censored == side]
        if out:
            where = ", ".join(
                f"{labels.count(v.optimum.params)} at {labels.flops(v.flops)} FLOPs" for v in out
            )
            diagnostics.append(
                warn("optimum_outside_range", f"the optimum lies {side} the {edge} size: {where}")
            )
    return diagnostics


def _list(values: list[float]) -> str:
    if len(values) > 5:
        return (
            f"{len(values)} budgets from {labels.flops(min(values))} to {labels.flops(max(values))}"
        )
    return ", ".join(labels.flops(value) for value in values)
