"""From loss to accuracy: the accuracy of a task against compute, in two steps and directly.

With Q = (accuracy - chance) / (ceiling - chance):

* Two steps: the loss in (N, D) by approach 3 (of the task's own loss, where the table has it, else
  of the loss of the runs), then Q = 1 / (1 + exp(k (loss - L0))).
* Directly: Q = exp(-A / C**alpha), so -log Q is a power law of compute (Krajewski et al., arXiv
  2512.08894). Its runs are those with the lowest loss of each budget, which do not owe their place
  to the luck of the task.

Both are least squares on Q, weighted by the standard errors of the accuracies, with forms as those
of any law (`laws.Form`): a link of one line in two unknowns. A task that most budgets answer at
chance says nothing about larger budgets: it is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, ndtr, stdtrit

from prime_jax.errors import UserError
from prime_jax.scaling import approach3, labels
from prime_jax.scaling.approach3 import Certificate, Problem
from prime_jax.scaling.fits import too_few, weighted_fit
from prime_jax.scaling.intervals import Ends, percentiles, profiles, wild_resample
from prime_jax.scaling.laws import Compute, Law, Quantity, fit_compute, quantity
from prime_jax.scaling.points import Points
from prime_jax.scaling.schema import Diagnostic, hidden, key, refuse, warn
from prime_jax.scaling.settings import Settings
from prime_jax.scaling.table import Table, number, require
from prime_jax.settings import nearest

Array = NDArray[np.float64]

ACC, SE, LOSS = "acc_", "acc_se_", "task_loss_"  # columns of a task, before its name
RANGES = {ACC: (0.0, 1.0), SE: (0.0, 1.0), LOSS: (1e-9, 1e9)}  # of their cells
MIN_BUDGETS = 4  # above chance
ABOVE = 2.0  # standard errors
CHANCE = {  # of tasks by the number of their answers
    "anli_r1": 1 / 3, "anli_r2": 1 / 3, "anli_r3": 1 / 3, "arc_challenge": 0.25, "arc_easy": 0.25,
    "boolq": 0.5, "copa": 0.5, "hellaswag": 0.25, "lambada_openai": 0.0, "mmlu": 0.25,
    "openbookqa": 0.25, "piqa": 0.5, "race": 0.25, "sciq": 0.25, "social_iqa": 1 / 3,
    "winogrande": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Direct:
    """Q = exp(-A / C**alpha)."""

    A: Array | float
    alpha: Array | float

    def fraction(self, flops: ArrayLike) -> Array:
        return np.exp(-self.A * np.power(flops, -self.alpha))


@dataclass(frozen=True)
class Sigmoid:
    """Q = 1 / (1 + exp(k (loss - L0)))."""

    k: Array | float
    L0: Array | float

    def fraction(self, loss: ArrayLike) -> Array:
        return expit(self.k * (self.L0 - np.asarray(loss)))


# A link f(z), with f' and f''.
Link = Callable[[Array], tuple[Array, Array, Array]]


def gumbel(z: Array) -> tuple[Array, Array, Array]:
    """exp(-exp(z))."""
    u = np.exp(np.minimum(z, 700.0))
    value = np.exp(-u)
    by_z = np.where(value > 0, -u * value, 0.0)
    return value, by_z, np.where(value > 0, (u - 1) * u * value, 0.0)


def logistic(z: Array) -> tuple[Array, Array, Array]:
    value = expit(z)
    by_z = value * (1 - value)
    return value, by_z, by_z * (1 - 2 * value)


@dataclass(frozen=True)
class LinkForm:
    """Q = f(c - s x), x standardised: log C of `Direct`, the loss of `Sigmoid`; unknowns c and s."""

    x_n: Array
    centre: float
    scale: float
    link: Link

    names = ("c", "s")
    logs = ()

    @classmethod
    def on(cls, x: Array, link: Link) -> "LinkForm":
        return cls((x - x.mean()) / x.std(), float(x.mean()), float(x.std()), link)

    def predict(self, theta_PxK: Array) -> tuple[Array, tuple[Array, Array]]:
        """Q, f' and f''."""
        value, *parts = self.link(theta_PxK[:, :1] - theta_PxK[:, 1:] * self.x_n)
        return value, tuple(parts)

    def derivatives(
        self, parts: tuple[Array, Array], slope_Pxn: Array, curve_Pxn: Array
    ) -> tuple[Array, Array]:
        features = np.stack([np.ones_like(self.x_n), -self.x_n], -1)
        first, second = parts
        weight = curve_Pxn * first**2 + slope_Pxn * second
        return (slope_Pxn * first) @ features, np.einsum(
            "pn,nk,nl->pkl", weight, features, features
        )

    def gradient_size(self, parts: tuple[Array, Array], weight_n: Array) -> Array:
        features = np.stack([np.ones_like(self.x_n), np.abs(self.x_n)], -1)
        return (weight_n * np.abs(parts[0])) @ features

    def starts(self, fraction_n: Array) -> Array:
        return np.array([[c, s] for c in (-2.0, 0.0, 2.0) for s in (0.1, 0.5, 2.0)])

    def box(self, fraction_n: Array) -> tuple[Array, Array]:
        """Q of the centre from e**-30 on; s of either sign for what gets worse."""
        return np.array([-30.0, -30.0]), np.array([30.0, 30.0])

    def law(self, theta: Array) -> Direct | Sigmoid:
        c, s = theta[..., 0], theta[..., 1] / self.scale
        if self.link is gumbel:
            return Direct(np.exp(c + s * self.centre), s)
        return Sigmoid(s, self.centre + c / s)

    def theta(self, law: Direct | Sigmoid) -> Array:
        if isinstance(law, Direct):
            c, s = np.log(law.A) - law.alpha * self.centre, law.alpha
        else:
            c, s = law.k * (law.L0 - self.centre), law.k
        return np.stack([np.asarray(c), np.asarray(s * self.scale)], -1)

    def quantities(self) -> dict[str, Quantity]:
        slope = quantity(linear=(0, 1 / self.scale), natural=lambda g: g)
        if self.link is gumbel:
            return {"A": quantity(linear=(1, self.centre / self.scale)), "alpha": slope}
        half = quantity(
            linear=(1, 0), plain=0.0, divide=(0, 1 / self.scale), natural=lambda g: g + self.centre
        )
        return {"k": slope, "L0": half}

    def fraction_at(self, x: float) -> Quantity:
        """Q at log C, or at a loss; as what increases."""
        z = (x - self.centre) / self.scale
        if self.link is gumbel:
            return quantity(linear=(-1, z), natural=lambda g: np.exp(-np.exp(-g)))
        return quantity(linear=(1, -z), natural=expit)


# --- fits


@dataclass(frozen=True)
class Step:
    """A fitted link, with its certificate; intervals by profile likelihood."""

    params: Direct | Sigmoid
    objective: float
    certificate: Certificate
    profile: dict[str, Ends]
    problem: Problem = hidden()
    fit: approach3.Fit = hidden()
    runs: NDArray[np.intp] | None = hidden()


@dataclass(frozen=True)
class HeldOutTask:
    """The best run of a later budget, by the laws of the earlier ones; errors are predicted less
    measured."""

    fitted: float
    flops: float
    measured: float
    direct: float
    two_steps: float | None
    direct_error: float
    two_steps_error: float | None


@dataclass(frozen=True)
class TaskAt:
    """The accuracy at a budget: directly (interval by profile), and in two steps (by bootstrap).

    `decades` are those above the largest C of the data; negative: below the smallest; 0 within.
    """

    flops: float
    decades: float
    direct: float
    direct_interval: Ends
    two_steps: float | None
    two_steps_interval: list[float] | None


@dataclass(frozen=True)
class TaskFit:
    """One task of one family; nothing but warnings where it is refused."""

    chance: float = key("accuracy of guessing")
    ceiling: float = key("largest accuracy that there can be")
    runs: int = key("runs with an accuracy")
    above_chance: int = key(
        "budgets whose best run is above chance by two standard errors or more (where one is unknown: by twice the scatter about the direct law)"
    )
    loss: str = key(
        "the loss of the two steps: `task_loss_TASK`, or `loss` of the runs", default=""
    )
    direct: Step | None = key(
        "Q = exp(-A / C^alpha): `params, objective, certificate, profile`", default=None
    )
    law: Law | None = key("first of the two steps: the loss in N and D", default=None)
    sigmoid: Step | None = key("second step, Q = 1 / (1 + exp(k (loss - L0))): alike", default=None)
    held_out: tuple[HeldOutTask, ...] = key(
        "the best run of each later budget: `fitted, flops, measured, direct, two_steps` and their errors",
        default=(),
    )
    direct_rms: float | None = key("rms of the errors of the direct law", default=None)
    two_steps_rms: float | None = key("rms of the errors of the two steps", default=None)
    predictions: tuple[TaskAt, ...] = key("at budgets that were asked for", default=())
    warnings: tuple[Diagnostic, ...] = key("warnings of this task", default=())


@dataclass(frozen=True)
class FamilyTasks:
    """All tasks of a family."""

    tasks: dict[str, TaskFit] = key("by the name of the task")


@dataclass(frozen=True)
class Scores:
    """A task on the runs of a family, [n] each.

    Attributes:
        points: the runs; their losses are those of the task, where the table has them.
        fraction, se: Q and its standard error.
        best: index of the run with the lowest loss of each budget.
    """

    points: Points
    fraction: Array
    se: Array
    best: NDArray[np.intp]

    def only(self, mine: NDArray[np.bool_]) -> "Scores":
        points = self.points.only(mine)
        return Scores(points, self.fraction[mine], self.se[mine], _best(points))


def names(table: Table) -> list[str]:
    """The tasks of a table."""
    others = (SE,)
    return [
        c.removeprefix(ACC) for c in table.columns if c.startswith(ACC) and not c.startswith(others)
    ]


def limits(
    tasks: Sequence[str], chance: Mapping[str, float], ceiling: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """Chance and ceiling of each task, of those given.

    Raises:
        UserError: a chance is not known, one is impossible, or is given for a task that is not there.
    """
    for what, given in (("chance", chance), ("ceiling", ceiling)):
        for name in given:
            if name not in tasks:
                raise UserError(f"{what} of {name!r}: no such task{nearest(name, tasks)}")
    known = {**CHANCE, **chance}
    if missing := [name for name in tasks if name not in known]:
        raise UserError(
            f"chance of {', '.join(missing)} is not known; say --chance {missing[0]}=0.25 or the like"
        )
    out = {name: (known[name], ceiling.get(name, 1.0)) for name in tasks}
    for name, (low, high) in out.items():
        if not 0 <= low < 1:
            raise UserError(f"chance of {name} is {low:g}; it must be 0 or more, and below 1")
        if not low < high <= 1:
            raise UserError(f"ceiling of {name} is {high:g}; it lies above chance, up to 1")
    return out


def fit(
    points: Points,
    table: Table,
    task: str,
    chance: float,
    ceiling: float,
    settings: Settings,
    flops: Sequence[float] = (),
) -> TaskFit:
    """Both laws of a task, or why there is none; `points` are of the table."""
    scores, loss = _scores(points, table, task, chance, ceiling)
    above = _above(scores)
    found = TaskFit(chance, ceiling, len(scores.fraction), int(above.sum()), loss)
    if refusal := _refusal(scores, above, task):
        return replace(found, warnings=(refusal,))
    compute = fit_compute(points.flops, points.params, points.tokens)
    direct, two = _direct(scores, settings), _two_steps(scores, settings)
    held_out = _held_out(scores, settings, chance, ceiling)
    rms = [
        _rms([getattr(one, name) for one in held_out])
        for name in ("direct_error", "two_steps_error")
    ]
    span = ceiling - chance
    told = []
    for c in flops:
        best = direct.problem.form.fraction_at(float(np.log(c)))
        ends = profiles(direct.problem, direct.fit, [best], settings.level, direct.runs)[0]
        more = two and two.at(compute, c, settings)
        told.append(
            TaskAt(
                flops=c,
                decades=float(np.log10(c / np.clip(c, *scores.points.levels[[0, -1]]))),
                direct=chance + span * float(direct.params.fraction(c)),
                direct_interval=tuple(None if end is None else chance + span * end for end in ends),
                two_steps=more and chance + span * more[0],
                two_steps_interval=more and [chance + span * end for end in more[1]],
            )
        )
    return replace(
        found,
        direct=direct,
        law=two and two.law,
        sigmoid=two and two.sigmoid,
        held_out=held_out,
        direct_rms=rms[0],
        two_steps_rms=rms[1],
        predictions=tuple(told),
        warnings=tuple(_findings(scores, direct, two, held_out, settings.law)),
    )


def _scores(
    points: Points, table: Table, task: str, chance: float, ceiling: float
) -> tuple[Scores, str]:
    """The runs that have an accuracy, and the name of the loss that goes with it.

    Raises:
        UserError: a cell is out of range, such as an accuracy in percent.
    """
    accuracy, se, loss = (_column(table, prefix, task)[points.row] for prefix in RANGES)
    known = np.isfinite(accuracy)
    if own := bool(np.isfinite(loss[known]).all() and known.any()):
        points = replace(
            points, loss=np.where(known, loss, points.loss), loss_se=np.full(len(loss), np.nan)
        )
    points = points.only(known)
    span = ceiling - chance
    fraction = (accuracy[known] - chance) / span
    return Scores(
        points, fraction, se[known] / span, _best(points)
    ), f"{LOSS}{task}" if own else "loss"


def _column(table: Table, prefix: str, task: str) -> Array:
    """Of all rows; NaN where there is no number."""
    column, (low, high) = f"{prefix}{task}", RANGES[prefix]
    values = np.array([number(row, column) for row in table.rows])
    good = ~((values < low) | (values > high))
    require(table, column, good.tolist(), f"{column} must be from {low:g} to {high:g}, or empty")
    return values


def _best(points: Points) -> NDArray[np.intp]:
    """The run with the lowest loss of each budget."""
    return np.array(
        [
            members[np.argmin(points.loss[members])]
            for members in (np.flatnonzero(points.budget == c) for c in points.budgets)
        ],
        dtype=np.intp,
    )


def _above(scores: Scores) -> NDArray[np.bool_]:
    """Whether the best run of each budget is above chance.

    An unknown standard error is not 0: the scatter about the direct law stands for it.
    """
    fraction, se = scores.fraction[scores.best], scores.se[scores.best]
    unknown = ~(se > 0)
    if unknown.any():
        scatter = np.inf
        if len(fraction) >= MIN_BUDGETS:
            p = _direct_problem(scores)
            residual = p.residual(approach3.fit(p).theta_K)
            scatter = np.sqrt(residual @ residual / (len(residual) - p.unknowns))
        se = np.where(unknown, scatter, se)
    return fraction > ABOVE * se


def _refusal(scores: Scores, above: NDArray[np.bool_], task: str) -> Diagnostic | None:
    budgets = scores.points.budgets
    if above.sum() >= MIN_BUDGETS:
        return None
    if not len(budgets):
        return refuse("at_chance", f"no run has an accuracy of {task}")
    chance = f"above chance in {above.sum()} of {len(budgets)} budgets, up to {labels.flops(budgets[-1])} FLOPs"
    return refuse(
        "at_chance",
        f"{task} is {chance}: nothing can be said of larger ones ({MIN_BUDGETS} are needed)",
    )


def _problem(x: Array, scores: Scores, mine: NDArray[np.intp] | slice, link: Link) -> Problem:
    """Least squares on Q by its errors; evenly where one of them is not known."""
    fraction, se = scores.fraction[mine], scores.se[mine]
    weight = 1 / se**2 if (se > 0).all() else np.ones(len(fraction))
    return Problem(
        form=LinkForm.on(x, link),
        log_loss_n=fraction,
        weight_n=weight / weight.mean(),
        objective="ls",
        delta=np.inf,
    )


def _step(p: Problem, level: float, runs: NDArray[np.intp] | None) -> Step:
    """`runs` are those of the points, where several are of one."""
    found = approach3.fit(p)
    named = p.form.quantities()
    ends = dict(zip(named, profiles(p, found, list(named.values()), level, runs), strict=True))
    return Step(found.law, found.objective, found.certificate, ends, p, found, runs)


def _direct_problem(scores: Scores) -> Problem:
    log_flops = np.log(scores.points.flops[scores.best])
    return _problem(log_flops, scores, scores.best, gumbel)


def _direct(scores: Scores, settings: Settings) -> Step:
    runs = scores.points.run
    return _step(
        _direct_problem(scores), settings.level, None if runs is None else runs[scores.best]
    )


@dataclass(frozen=True)
class TwoSteps:
    law: Law
    sigmoid: Step
    laws: Law  # replicates
    sigmoids: Sigmoid
    freedom: int  # runs less the unknowns of both steps

    def at(self, compute: Compute, flops: float, settings: Settings) -> tuple[float, list[float]]:
        """Q of the best model of a budget, and its interval."""
        drawn = self.laws.optimum(compute, flops).loss
        best = float(self.law.optimum(compute, flops).loss)
        wider = stdtrit(max(self.freedom, 1), (1 + settings.level) / 2)  # than of normal numbers
        ends = percentiles(self.sigmoids.fraction(drawn), 2 * float(ndtr(wider)) - 1)
        return float(self.sigmoid.params.fraction(best)), ends


def _two_steps(scores: Scores, settings: Settings) -> TwoSteps | None:
    """None where approach 3 is refused.

    Both steps are drawn by the wild bootstrap with the same factors: few runs hug two curves, which
    it allows for, and redrawn runs do not.
    """
    points = scores.points
    if too_few(points, settings.law):
        return None
    first, fitted, _ = weighted_fit(points, settings)
    second = _problem(points.loss, scores, slice(None), logistic)
    sigmoid = _step(second, settings.level, points.run)
    units = np.arange(len(points.loss)) if points.run is None else points.run
    drawn = [
        wild_resample(p, one, units, settings.replicates, settings.seed)
        for p, one in ((first, fitted), (second, sigmoid.fit))
    ]
    freedom = len(np.unique(units)) - first.unknowns - second.unknowns
    return TwoSteps(fitted.law, sigmoid, *drawn, freedom)


def _held_out(
    scores: Scores, settings: Settings, chance: float, ceiling: float
) -> tuple[HeldOutTask, ...]:
    """The best runs after each beginning of four budgets or more."""
    points, span, out = scores.points, ceiling - chance, []
    budgets = points.budgets
    for last in budgets[MIN_BUDGETS - 1 : -1]:
        known = scores.only(points.budget <= last)
        direct = approach3.fit(_direct_problem(known)).law
        law = sigmoid = None
        if not too_few(known.points, settings.law):
            law = weighted_fit(known.points, settings)[1].law
            second = _problem(known.points.loss, known, slice(None), logistic)
            sigmoid = approach3.fit(second).law
        for k in (k for k in scores.best if points.budget[k] > last):
            measured = chance + span * float(scores.fraction[k])
            straight = chance + span * float(direct.fraction(points.flops[k]))
            two = None
            if law is not None:
                loss = law.loss(points.params[k], points.tokens[k], points.available[k])
                two = chance + span * float(sigmoid.fraction(loss))
            out.append(
                HeldOutTask(
                    fitted=float(last),
                    flops=float(points.budget[k]),
                    measured=measured,
                    direct=straight,
                    two_steps=two,
                    direct_error=straight - measured,
                    two_steps_error=None if two is None else two - measured,
                )
            )
    return tuple(out)


def _rms(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return float(np.sqrt(np.mean(np.square(known)))) if known else None


def _findings(
    scores: Scores,
    direct: Step,
    two: TwoSteps | None,
    held_out: Sequence[HeldOutTask],
    law: str,
) -> list[Diagnostic]:
    out = []
    for name, step in (("direct law", direct), ("sigmoid", two and two.sigmoid)):
        if step and not step.certificate.converged:
            gradient = f"the scaled gradient of the {name} is {step.certificate.gradient:.1e}"
            out.append(refuse("not_converged", gradient))
        if step and any(None in pair for pair in step.profile.values()):
            out.append(warn("not_identified", f"profile intervals of the {name} do not close"))
    if not (scores.se > 0).all():
        out.append(
            warn(
                "task_error_unknown",
                "runs without a standard error of the accuracy: all weigh the same",
            )
        )
    if why := too_few(scores.points, law):
        out.append(
            warn("loss_not_predicted", f"no two steps, since approach 3 is refused: {why.message}")
        )
    if not held_out:
        out.append(warn("too_few_budgets", "no later budget to predict: the error is not known"))
    return out
