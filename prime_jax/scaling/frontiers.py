"""The lowest loss of a budget as a law of compute alone: L(C) = L_inf + A / C**a.

Free, or with L_inf pinned: seven budgets seldom tell L_inf from a (a smaller a goes with a smaller
L_inf), and a pinned L_inf, from approach 3 or given, then predicts better. The points are the
minima of approach 2, or the rows of a table that has C and a loss but neither N nor D.

The form is that of any law (`laws.Form`), but for sizes: it knows none. The objective is least
squares on log residuals, since so few points have no outliers to be robust against; for the same
reason intervals are profiles, and not bootstraps. The interval of L at a budget is a profile, too:
L there is made an unknown in place of L_inf, and is held.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prime_jax.errors import UserError
from prime_jax.scaling import approach3
from prime_jax.scaling.approach2 import Approach2
from prime_jax.scaling.approach3 import Certificate, Fit, Problem
from prime_jax.scaling.columns import choose_columns
from prime_jax.scaling.intervals import Ends, profiles
from prime_jax.scaling.laws import Quantity, quantity
from prime_jax.scaling.points import Runs
from prime_jax.scaling.rollout import ModelError, error_of
from prime_jax.scaling.schema import Diagnostic, hidden, key, refuse, warn
from prime_jax.scaling.settings import Choice, Settings
from prime_jax.scaling.table import Table, number, require, status, text

Array = NDArray[np.float64]

MIN_BUDGETS = 4  # one more than the unknowns: a fit through all of its points has no error


@dataclass(frozen=True)
class FrontierLaw:
    L_inf: Array | float
    A: Array | float
    a: Array | float

    formula = "L(C) = L∞ + A / C^a. L∞ is the loss that no amount of compute removes."

    @property
    def lowest(self) -> Array | float:
        return self.L_inf

    def loss(self, flops: ArrayLike) -> Array:
        return self.L_inf + self.A * np.power(flops, -self.a)


@dataclass(frozen=True)
class FrontierForm:
    """The unknowns are log L at the budget `at` (L_inf where that is infinite), the log of the
    term A / C**a at the centre of the data, and a * sd(log C). With `pinned` the first is known.
    """

    x_n: Array  # standardised log C
    centre: float
    scale: float
    pinned: float | None = None
    at: float = np.inf

    @classmethod
    def on(cls, flops: Array, pinned: float | None = None) -> "FrontierForm":
        """Needs two different C."""
        log_flops = np.log(flops)
        centre, scale = float(log_flops.mean()), float(log_flops.std())
        return cls((log_flops - centre) / scale, centre, scale, pinned)

    @property
    def names(self) -> tuple[str, ...]:
        return ("L_inf", "A", "a") if self.pinned is None else ("A", "a")

    @property
    def logs(self) -> tuple[int, ...]:
        return (0, 1) if self.pinned is None else (0,)

    def predict(self, theta_PxK: Array) -> tuple[Array, tuple[Array, Array]]:
        """log L; and the derivatives of L by the unknowns, and by a twice, over L."""
        first, m, a = self._unknowns(theta_PxK)
        base = np.full_like(m, self.pinned) if first is None else np.exp(first)
        term, here, (far, there) = np.exp(m), np.exp(-a * self.x_n), self._beyond(a)
        gap = term * (here - there)
        slope = term * (far * there - self.x_n * here)
        bend = term * (self.x_n**2 * here - far**2 * there)
        total = base + gap
        by = [np.broadcast_to(base, total.shape), gap, slope][-len(self.names) :]
        return np.log(total), (np.stack(by, -1) / total[..., None], bend / total)

    def derivatives(
        self, parts: tuple[Array, Array], slope_Pxn: Array, curve_Pxn: Array
    ) -> tuple[Array, Array]:
        one_PxnxK, bend_Pxn = parts
        gradient = np.einsum("pn,pnk->pk", slope_Pxn, one_PxnxK)
        hessian = np.einsum("pn,pnk,pnl->pkl", curve_Pxn - slope_Pxn, one_PxnxK, one_PxnxK)
        diagonal = np.arange(len(self.names) - 1)
        hessian[:, diagonal, diagonal] += gradient[:, :-1]  # those that are logs
        hessian[:, -1, -1] += np.sum(slope_Pxn * bend_Pxn, axis=1)
        hessian[:, -1, -2] += gradient[:, -1]
        hessian[:, -2, -1] += gradient[:, -1]
        return gradient, hessian

    def gradient_size(self, parts: tuple[Array, Array], weight_n: Array) -> Array:
        return np.einsum("n,pnk->pk", weight_n, np.abs(parts[0]))

    def starts(self, log_loss_n: Array) -> Array:
        """15: of L_inf and a; 5 of a where L_inf is pinned."""
        lowest, middle = np.exp(log_loss_n.min()), np.exp(np.median(log_loss_n))
        fractions = (0.3, 0.6, 0.9) if self.pinned is None else (self.pinned / lowest,)
        rows = [
            [np.log(f * lowest), np.log(middle - f * lowest), a * self.scale]
            for f, a in product(fractions, (0.02, 0.05, 0.1, 0.3, 1.0))
        ]
        return np.array(rows)[:, -len(self.names) :]

    def box(self, log_loss_n: Array) -> tuple[Array, Array]:
        """Terms of a millionth of the loss, a from .001 to 5; L before the data is above theirs."""
        low, high = log_loss_n.min(), log_loss_n.max()
        lower = [low - 14, low - 14, 0.001 * self.scale]
        upper = [high if np.isinf(self.at) else high + 5, high + 5, 5 * self.scale]
        mine = slice(-len(self.names), None)
        return np.array(lower)[mine], np.array(upper)[mine]

    def law(self, theta: Array) -> FrontierLaw:
        first, m, a = self._unknowns(theta)
        base = np.full_like(m, self.pinned) if first is None else np.exp(first)
        base = base - np.exp(m) * self._beyond(a)[1]
        term = np.exp(m + a / self.scale * self.centre)
        return FrontierLaw(*(part[..., 0] for part in (base, term, a / self.scale)))

    def theta(self, law: FrontierLaw) -> Array:
        parts = np.log(law.loss(self.at)), np.log(law.A) - law.a * self.centre, law.a * self.scale
        theta = np.stack([np.asarray(part, dtype=np.float64) for part in parts], -1)
        return theta[..., -len(self.names) :]

    def quantities(self) -> dict[str, Quantity]:
        mine = slice(-len(self.names), None)
        parts = {
            "L_inf": quantity(linear=(1, 0, 0)),
            "A": quantity(linear=(0, 1, self.centre / self.scale)[mine]),
            "a": quantity(-np.log(self.scale), logs=(0, 0, 1)[mine]),
        }
        return {name: parts[name] for name in self.names}

    def loss_at(self, flops: float) -> "tuple[FrontierForm, Quantity]":
        """L at a budget as a quantity, and the form that has it."""
        if self.pinned is None:
            return replace(self, at=flops), quantity(linear=(1, 0, 0))
        x = (np.log(flops) - self.centre) / self.scale
        return self, quantity(linear=(1, -x), natural=lambda g: self.pinned + np.exp(g))

    def _beyond(self, a: Array) -> tuple[float, Array | float]:
        """`at`, standardised, and by how much the term is smaller there; (0, 0) for no end of C."""
        if np.isinf(self.at):
            return 0.0, 0.0
        far = float((np.log(self.at) - self.centre) / self.scale)
        return far, np.exp(-a * far)

    def _unknowns(self, theta: Array) -> tuple[Array | None, Array, Array]:
        """log L there (None: pinned), the term and a, each [..., 1]."""
        first = theta[..., 0:1] if self.pinned is None else None
        return first, theta[..., -2:-1], theta[..., -1:]


# --- fits


@dataclass(frozen=True)
class HeldOutBudget:
    """A later budget by the law of earlier ones; `error` is predicted over measured, less 1."""

    fitted: float  # the largest C of the fit
    flops: float
    measured: float
    predicted: float
    error: float


@dataclass(frozen=True)
class LossAt:
    """What the law says of a budget.

    Attributes:
        decades: of C above the largest of the data; negative: below the smallest; 0 within.
        interval: by profile; an end that is None is open.
        with_model_error: the same, widened by the error of held-out budgets; None without one.
    """

    flops: float
    decades: float
    loss: float
    interval: Ends
    with_model_error: Ends | None


@dataclass(frozen=True)
class FrontierFit:
    """The law, free or pinned; nothing but warnings where it is refused."""

    pinned: float | None = key("the L_inf that is held; null: it is fitted")
    params: FrontierLaw | None = key("`{L_inf, A, a}`; null if refused", default=None)
    objective: float | None = key("sum of squared log residuals / 2", default=None)
    certificate: Certificate | None = key("as that of approach 3", default=None)
    profile: dict[str, Ends] | None = key(
        "`[low, high]` of each parameter by profile likelihood (null: open)", default=None
    )
    error: ModelError | None = key(
        "of budgets predicted from smaller ones: `bias, rms, inside, per_decade`", default=None
    )
    held_out: tuple[HeldOutBudget, ...] = key(
        "each later budget from each beginning: `fitted, flops, measured, predicted, error`",
        default=(),
    )
    predictions: tuple[LossAt, ...] = key(
        "at budgets that were asked for, `decades` from the data (below: negative): `flops, decades, loss, interval, with_model_error`",
        default=(),
    )
    warnings: tuple[Diagnostic, ...] = key("warnings of this law", default=())
    problem: Problem | None = hidden(default=None)
    data_range: tuple[float, float] = hidden(default=(0.0, 0.0))  # C of the data
    level: float = hidden(default=0.95)

    def at(self, flops: float) -> LossAt:
        """The loss at a budget, with its interval.

        Raises:
            UserError: the law was refused, or no budget is given.
        """
        if self.params is None:
            raise UserError(f"the frontier was refused: {self.warnings[0].message}")
        if not 0 < flops < np.inf:
            raise UserError(f"flops is {flops}; it must be a number above 0, like 1e21")
        value = float(self.params.loss(flops))
        form, quantity_ = self.problem.form.loss_at(flops)
        fitted = Fit(self.params, form.theta(self.params), self.objective, self.certificate)
        ends = profiles(replace(self.problem, form=form), fitted, [quantity_], self.level)[0]
        decades = float(np.log10(flops / np.clip(flops, *self.data_range)))
        wider = None
        if self.error is not None:
            known = (value if end is None else end for end in ends)
            moved = self.error.widen(value, *known, abs(decades), self.level)
            wider = tuple(
                None if end is None else float(new) for end, new in zip(ends, moved, strict=True)
            )
        return LossAt(float(flops), decades, value, ends, wider)


@dataclass(frozen=True)
class FrontierFits:
    """L(C) of a family.

    Attributes:
        pinned: None where nothing says where to pin it.
    """

    flops: Array = key("budgets of the points, FLOPs")
    loss: Array = key("the lowest loss at each: of approach 2, or of a table of C and loss")
    free: FrontierFit
    pinned: FrontierFit | None = key(
        "the same with L_inf held: at --floor, else at E of approach 3"
    )

    @property
    def fits(self) -> tuple[FrontierFit, ...]:
        return (self.free,) if self.pinned is None else (self.free, self.pinned)

    def asked(self, flops: Sequence[float]) -> "FrontierFits":
        """The same with predictions at these budgets."""
        told = [
            replace(one, predictions=tuple(map(one.at, flops))) if one.params else one
            for one in self.fits
        ]
        return replace(self, free=told[0], pinned=told[1] if len(told) > 1 else None)


def of_minima(two: Approach2, lowest: float | None, settings: Settings) -> FrontierFits:
    """The frontier through the minima of approach 2; `lowest` is E of approach 3, if known."""
    best = [(curve.optimum.flops, curve.optimum.loss) for curve in two.inside]
    flops, loss = np.array(best, dtype=np.float64).reshape(-1, 2).T
    pinned = lowest if settings.floor is None else settings.floor
    return of_points(flops, loss, pinned, settings.level)


def of_points(flops: Array, loss: Array, pinned: float | None, level: float) -> FrontierFits:
    """Both fits to the lowest losses of budgets, [n] each, smallest budget first."""
    found = None if pinned is None else fit(flops, loss, pinned, level)
    return FrontierFits(flops, loss, fit(flops, loss, None, level), found)


def fit(flops: Array, loss: Array, pinned: float | None = None, level: float = 0.95) -> FrontierFit:
    """One fit with its certificate, profiles and held-out budgets; or why there is none."""
    if refusal := _refusal(flops, loss, pinned):
        return FrontierFit(pinned, warnings=(refusal,))
    p = problem(flops, loss, pinned)
    found = approach3.fit(p)
    named = p.form.quantities()
    ends = dict(zip(named, profiles(p, found, list(named.values()), level), strict=True))
    held_out = _held_out(flops, loss, pinned)
    error = error_of(
        np.array([one.error for one in held_out]),
        np.array([np.log10(one.flops / one.fitted) for one in held_out]),
        np.expm1(p.residual(found.theta_K)),
    )
    return FrontierFit(
        pinned,
        params=found.law,
        objective=found.objective,
        certificate=found.certificate,
        profile=ends,
        error=error,
        held_out=held_out,
        warnings=tuple(_findings(found, ends, error, level)),
        problem=p,
        data_range=(float(flops[0]), float(flops[-1])),
        level=level,
    )


def problem(flops: Array, loss: Array, pinned: float | None = None) -> Problem:
    """Least squares of the log residuals."""
    return Problem(
        form=FrontierForm.on(flops, pinned),
        log_loss_n=np.log(loss),
        weight_n=np.ones(len(loss)),
        objective="ls",
        delta=np.inf,
    )


def _refusal(flops: Array, loss: Array, pinned: float | None) -> Diagnostic | None:
    if len(flops) < MIN_BUDGETS:
        return refuse(
            "too_few_budgets",
            f"only {len(flops)} budgets with a lowest loss; a frontier needs {MIN_BUDGETS}",
        )
    if pinned is not None and pinned >= loss.min():
        return refuse(
            "e_above_lowest_loss",
            f"L_inf is pinned at {pinned:.4g}, above the lowest loss, {loss.min():.4g}",
        )
    return None


def _held_out(flops: Array, loss: Array, pinned: float | None) -> tuple[HeldOutBudget, ...]:
    """The budgets after each beginning that leaves the fit one point to spare."""
    out = []
    for k in range(3 if pinned is not None else 4, len(flops)):
        law = approach3.fit(problem(flops[:k], loss[:k], pinned)).law
        for c, measured in zip(flops[k:].tolist(), loss[k:].tolist(), strict=True):
            told = float(law.loss(c))
            out.append(HeldOutBudget(float(flops[k - 1]), c, measured, told, told / measured - 1))
    return tuple(out)


def _findings(
    found: Fit, ends: dict[str, Ends], error: ModelError | None, level: float
) -> list[Diagnostic]:
    certificate, out = found.certificate, []
    if certificate.bounds:
        names = ", ".join(certificate.bounds)
        out.append(warn("bound_hit", f"{names} ended at a bound of the search"))
    elif not certificate.converged:
        gradient = f"the scaled gradient is {certificate.gradient:.1e}"
        out.append(refuse("not_converged", gradient))
    if certificate.agreeing < approach3.MIN_AGREEING:
        agree = f"{certificate.agreeing:.0%} of {certificate.starts} starts"
        out.append(warn("starts_disagree", f"{agree} reach the best objective"))
    open_ends = [name for name, pair in ends.items() if None in pair]
    if open_ends:
        names = ", ".join(open_ends)
        out.append(warn("not_identified", f"{level:.0%} profile intervals do not close: {names}"))
    if error is None:
        out.append(warn("too_few_budgets", "no later budget to predict: the error is not known"))
    return out


def is_bare(table: Table) -> bool:
    """Whether a table has neither N nor D."""
    return not any(c == "tokens" or c.partition("_")[0] == "params" for c in table.columns)


def read(table: Table, choice: Choice, settings: Settings) -> tuple[Runs, dict[str, FrontierFits]]:
    """The frontier of each family of a table with C and loss alone, and what was read.

    Raises:
        UserError: a missing column, or impossible values (with their rows).
    """
    columns = replace(choose_columns(table, choice, counts=1), params_convention="not given")
    used = [k for k, row in enumerate(table.rows) if status(row) in ("", "done")]
    done = replace(table, rows=[table.rows[k] for k in used], names=[table.names[k] for k in used])
    arrays = []
    for column in (columns.flops, columns.loss):
        values = np.array([number(row, column) for row in done.rows])
        good = np.isfinite(values) & (values > 0)
        require(done, column, good.tolist(), f"{column} must be a number above 0")
        arrays.append(values)
    labels = np.array([text(row, "family") for row in done.rows])
    require(done, "family", (labels != "").tolist(), "family is empty")
    families = {}
    for name in np.unique(labels).tolist():
        flops, loss = (values[labels == name] for values in arrays)
        budgets, which = np.unique(flops, return_inverse=True)
        lowest = np.full(len(budgets), np.inf)
        np.minimum.at(lowest, which, loss)
        families[name] = of_points(budgets, lowest, settings.floor, settings.level)
    runs = Runs({}, (), choice=choice, columns=columns, source=table.source, sha256=table.sha256)
    return runs, families
