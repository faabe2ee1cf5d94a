"""Which runs next: those that tell most about N*(C) at a target budget, per FLOP.

Around the fit log L is linear in five unknowns, so the variance of log N*(C) that any set of runs
leaves is known before they are trained: g' (J'J)^-1 g times the variance of one run (`Linear`).
Runs are added one cell after another, each where it falls most per FLOP (a sequential c-optimal
design; Pukelsheim, "Optimal design of experiments", chapter 2). Left alone, such a design trusts
the law and runs to extreme sizes, so sizes stay within a factor of eight of the predicted optimum,
every cell is run at least twice, and what the lopsided grid costs approach 2 is said.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv, ndtr

from prime_jax.errors import UserError
from prime_jax.scaling import approach2, labels
from prime_jax.scaling.laws import Compute, PowerForm, PowerLaw, optima, optimum
from prime_jax.scaling.points import Points
from prime_jax.scaling.results import FamilyFit
from prime_jax.scaling.rollout import distance
from prime_jax.scaling.settings import Settings

Array = NDArray[np.float64]

WORST_CONDITION = 1e14
SPAN, SIZES = 8.0, 13  # candidate sizes: from N*/8 to 8 N*
REPEATS, MAX_PICKS = 2, 2  # runs of a cell each time it is picked, and how often it may be
MAX_BUDGETS = 12
MIN_STEP = 2.0  # between budgets beyond the data
MIN_GAIN = 0.05  # of the sd: what the whole budget would have to gain at the rate of a next cell
MIN_PICK = 0.01  # of the sd: what two more runs have to gain to be worth the trouble
MIN_TOKENS_PER_PARAM = 1.0


@dataclass(frozen=True)
class Linear:
    """The law linearised at its fit, in log E, alpha and beta and the two terms at a centre.

    Attributes:
        free: which of the five unknowns the fit determines (the others are at a bound).
        sigma: of log loss of one run, times what the objective loses against least squares.
    """

    law: PowerLaw
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
    three, points = family.approach3, family.points
    centre = float(np.log(points.params).mean()), float(np.log(points.tokens).mean())
    free = np.array([name not in three.certificate.bounds for name in PowerForm.names])
    noise = noise_sd(family)
    return Linear(
        three.law, family.compute, centre, free, noise * loss_of_efficiency(noise, settings)
    )


def noise_sd(family: FamilyFit) -> float:
    """Residual standard deviation of the log loss about the law: noise, and what the law misses.

    Of a run of weight one; those of the error budget differ between runs.
    """
    points, part = family.points, family.approach3
    residual = np.log(points.loss) - np.log(points.expected(part.law))
    squares = float(part.problem.weight_n @ residual**2)
    return math.sqrt(squares / max(1, len(residual) - len(PowerForm.names)))


def loss_of_efficiency(noise: float, settings: Settings) -> float:
    """Standard error under the fit's objective over that of least squares, for normal noise.

    Huber, "Robust estimation of a location parameter" (1964): E psi^2 / (E psi')^2.
    """
    if settings.objective == "ls":
        return 1.0
    k = settings.delta / noise if noise > 0 else math.inf
    if k > 8:
        return 1.0
    density = math.exp(-(k**2) / 2) / math.sqrt(2 * math.pi)
    inside = 2 * ndtr(k) - 1
    psi2 = inside - 2 * k * density + 2 * k**2 * ndtr(-k)
    return float(math.sqrt(psi2) / inside)


Policy = Literal["per FLOP", "per run"]


@dataclass(frozen=True)
class Cell:
    flops: float
    params: float
    tokens: float


@dataclass(frozen=True)
class Pick:
    """A cell to run `REPEATS` times, and the sd of log N*(target) once it and all before are."""

    cell: Cell
    cost: float
    sd: float


@dataclass(frozen=True)
class Design:
    """The runs to add.

    Attributes:
        picks: in the order in which they were chosen; a cell may come twice.
        sd_before, sd_after: of log N*(target), from the linearised law.
        sd_bootstrap: that of the fit's replicates, to compare `sd_before` with.
        model_sd: by how much log N*(target) is off because the law is not exact; 0 if the rollout
            shows nothing beyond noise, None if there is none.
        noise: sd of the log loss of one run about the law.
        bias_before, bias_after: relative error of approach 2's N*(target) that the grid alone
            causes, without noise; None where approach 2 is refused.
        stop: why no more runs were chosen.
    """

    family: str
    target: float
    flops_budget: float
    picks: tuple[Pick, ...]
    sd_before: float
    sd_after: float
    sd_bootstrap: float
    model_sd: float | None
    noise: float
    bias_before: float | None
    bias_after: float | None
    stop: str

    @property
    def cost(self) -> float:
        return sum(pick.cost for pick in self.picks)


def choose(
    family: FamilyFit,
    settings: Settings,
    target: float,
    flops_budget: float,
    *,
    least_gain: float = MIN_GAIN,
    snap: Callable[[Cell], Cell | None] = lambda cell: cell,
) -> Design:
    """Choose runs for `flops_budget` FLOPs that make N*(target) best known.

    Args:
        least_gain: stop where `flops_budget`, spent at the gain per FLOP of the next cell, would lower
            the sd by less than this fraction.
        snap: the nearest cell that can be run, None if there is none.

    Raises:
        UserError: no law was fitted, the target lies below the data, or the budget does not
            buy one cell.
    """
    points = family.points
    if not family.approach3:
        why = next(warning.message for warning in family.warnings if warning.refusal)
        raise UserError(f"{points.family}: a design needs approach 3, which was refused: {why}")
    if not target >= points.levels[0]:
        raise UserError(
            f"target {labels.flops(target)} FLOPs lies below the data of {points.family}, "
            f"which begin at {labels.flops(points.levels[0])}"
        )
    if not isinstance(family.approach3.law, PowerLaw):
        raise UserError(f"{points.family}: a design knows only the law {PowerLaw.formula}")
    linear = linearise(family, settings)
    model_sd = _model_sd(family, linear, target)
    cells = candidates(points, linear, target, flops_budget)
    policies: tuple[Policy, ...] = ("per FLOP", "per run")
    plans = [
        _greedy(
            family,
            linear=linear,
            target=target,
            flops_budget=flops_budget,
            cells=cells,
            policy=policy,
            least_gain=least_gain,
            model_sd=model_sd,
            snap=snap,
        )
        for policy in policies
    ]
    # Greedy per FLOP may be left with change that buys nothing good; greedy per run spends it.
    picks, stop = min(plans, key=lambda plan: plan[0][-1].sd if plan[0] else math.inf)
    weight = family.approach3.problem.weight_n
    before = linear.sd(target, points.params, points.tokens, weight)
    draws = optima(family.approach3.replicates, family.compute, np.array([target])).params
    added = _added(picks)
    return Design(
        family=points.family,
        target=target,
        flops_budget=flops_budget,
        picks=tuple(picks),
        sd_before=before,
        sd_after=picks[-1].sd if picks else before,
        sd_bootstrap=float(np.std(np.log(draws))),
        model_sd=model_sd,
        noise=noise_sd(family),
        bias_before=approach2_bias(linear, target, points.budget, points.params),
        bias_after=approach2_bias(
            linear,
            target,
            np.concatenate([points.budget, added[:, 0]]),
            np.concatenate([points.params, added[:, 1]]),
        ),
        stop=stop,
    )


def candidates(points: Points, linear: Linear, target: float, flops_budget: float) -> list[Cell]:
    """The ladder of budgets, continued towards the target, by sizes about each optimum.

    Raises:
        UserError: `flops_budget` does not buy one cell of the smallest budget, or no size is sensible.
    """
    ladder = points.levels
    if len(ladder) > MAX_BUDGETS:
        ladder = np.array([float(f"{c:.3g}") for c in np.geomspace(*ladder[[0, -1]], MAX_BUDGETS)])
    if flops_budget < REPEATS * ladder[0]:
        raise UserError(
            f"{labels.flops(flops_budget)} FLOPs buy no cell: {REPEATS} runs of the smallest budget of "
            f"the data are {labels.flops(REPEATS * ladder[0])}"
        )
    step = max(MIN_STEP, (ladder[-1] / ladder[0]) ** (1 / max(1, len(ladder) - 1)))
    beyond = [float(f"{ladder[-1] * step:.2g}")]
    while beyond[-1] * step <= min(target, flops_budget):
        beyond.append(float(f"{beyond[-1] * step:.2g}"))
    budgets = [c for c in [*ladder.tolist(), *beyond] if REPEATS * c <= flops_budget]
    budgets = [c for c in budgets if c <= max(target, ladder[-1])]
    cells = []
    for budget in budgets:
        best = float(optimum(linear.law, linear.compute, budget).params)
        for ratio in np.geomspace(1 / SPAN, SPAN, SIZES):
            params = best * float(ratio)
            tokens = float(linear.compute.tokens(budget, params))
            if tokens >= MIN_TOKENS_PER_PARAM * params:
                cells.append(Cell(budget, params, tokens))
    if not cells:
        raise UserError(
            f"{points.family}: around the optima of {labels.flops(budgets[0])} FLOPs and more, "
            "every size has more parameters than tokens; such runs tell nothing"
        )
    return cells


def approach2_bias(linear: Linear, target: float, budget: Array, params: Array) -> float | None:
    """N*(target) of approach 2 over the law's own, less 1, on noise-free losses of this grid.

    A parabola is not the law: its minimum moves with the sizes that it sees, and a line through
    the moved minima misses the target. None with fewer than three minima.
    """
    x, y = [], []
    for c in np.unique(budget):
        sizes = params[budget == c]
        if len(np.unique(sizes)) < 3:
            continue
        losses = linear.law.loss(sizes, linear.compute.tokens(c, sizes))
        centre = np.log(sizes).mean()
        curvature, slope, _ = np.polyfit(np.log(sizes) - centre, losses, 2)
        minimum = centre - slope / (2 * curvature) if curvature > 0 else np.inf
        if np.log(sizes).min() < minimum < np.log(sizes).max():
            x.append(np.log(c))
            y.append(minimum)
    if len(x) < 3:
        return None
    there = np.polyval(np.polyfit(x, y, 1), np.log(target))
    return float(np.expm1(there - np.log(optimum(linear.law, linear.compute, target).params)))


def _greedy(
    family: FamilyFit,
    linear: Linear,
    target: float,
    flops_budget: float,
    cells: list[Cell],
    policy: Policy,
    least_gain: float,
    model_sd: float | None,
    snap: Callable[[Cell], Cell | None],
) -> tuple[list[Pick], str]:
    """The picks and why they end."""
    points = family.points
    gradient = linear.optimum_gradient(target)
    inverse = linear.covariance(points.params, points.tokens, family.approach3.problem.weight_n)
    flops, sizes, tokens = np.array([(c.flops, c.params, c.tokens) for c in cells]).T
    features = linear.features(sizes, tokens)
    left, picks = np.full(len(cells), MAX_PICKS), []
    variance = float(gradient @ inverse @ gradient)
    least = least_gain * linear.sigma * math.sqrt(variance) / flops_budget  # gain per FLOP
    while True:
        sd = linear.sigma * math.sqrt(variance)
        open_cells = (left > 0) & (REPEATS * flops <= flops_budget)
        if not open_cells.any():
            return picks, "the budget is spent"
        if model_sd is not None and sd < model_sd:
            open_cells &= flops > points.levels[-1]
            if not open_cells.any():
                return picks, "model error dominates: more runs at this scale do not help"
        drop = REPEATS * (features @ inverse @ gradient) ** 2
        drop /= 1 + REPEATS * np.einsum("ni,ij,nj->n", features, inverse, features)
        gain = sd - linear.sigma * np.sqrt(np.maximum(variance - drop, 0.0))
        rate = gain / (REPEATS * flops)
        open_cells &= (rate >= least) & (gain >= MIN_PICK * sd)
        if not open_cells.any():
            return picks, (
                f"{REPEATS} more runs would lower the sd by less than {MIN_PICK:.0%}, "
                f"or all FLOPs at their rate by less than {least_gain:.0%}"
            )
        worth = rate if policy == "per FLOP" else gain
        k = int(np.argmax(np.where(open_cells, worth, -1.0)))
        cell = snap(cells[k])
        if cell is None or sum(pick.cell == cell for pick in picks) == MAX_PICKS:
            left[k] = 0
            continue
        j = linear.features(np.array([cell.params]), np.array([cell.tokens]))[0]
        reach = inverse @ j
        inverse = inverse - REPEATS * np.outer(reach, reach) / (1 + REPEATS * (j @ reach))
        variance = float(gradient @ inverse @ gradient)
        left[k] -= 1
        flops_budget -= REPEATS * cell.flops
        picks.append(Pick(cell, REPEATS * cell.flops, linear.sigma * math.sqrt(variance)))


def _added(picks: list[Pick]) -> Array:
    """Budget and size of every run to be, [runs, 2]."""
    runs = [(pick.cell.flops, pick.cell.params) for pick in picks for _ in range(REPEATS)]
    return np.array(runs).reshape(-1, 2)


def _model_sd(family: FamilyFit, linear: Linear, target: float) -> float | None:
    """How far log N*(target) is off beyond noise, from predictions of held-out minima.

    Zero where they are no further off than chance takes them in 39 of 40 cases. It grows with the
    decades of extrapolation, as `validate.ModelError` has it for the loss.
    """
    points = family.points
    known = points.params, points.tokens, family.approach3.problem.weight_n
    squares, chance, decades, budgets = [], [], [], set()
    for step in family.rollout.steps:
        fitted = points.budget <= step.fitted[-1]
        for prediction in step.budgets:
            minimum = _minimum_sd(family, prediction.flops)
            if prediction.measured is None or minimum is None:
                continue
            error = np.log(prediction.approach3.params / prediction.measured.params)
            try:
                noise = linear.sd(prediction.flops, *(values[fitted] for values in known))
            except UserError:  # so few budgets do not determine the law
                continue
            squares.append(float(error) ** 2)
            chance.append(noise**2 + minimum**2)
            decades.append(prediction.decades**2)
            budgets.add(prediction.flops)
    if not squares:
        return None
    # Predictions of one budget share its minimum, so they count as one.
    limit = 2 * gammaincinv(len(budgets) / 2, 0.975)  # of chi-squared
    if sum(squares) <= sum(chance) * limit / len(budgets):
        return 0.0
    per_decade = math.sqrt((sum(squares) - sum(chance)) / sum(decades))
    return per_decade * float(distance(points, target))


def _minimum_sd(family: FamilyFit, flops: float) -> float | None:
    """Of log N* of approach 2 at a budget; None where it has none."""
    inside = [curve.flops for curve in family.approach2.inside]
    if family.approach2.draws is None or flops not in inside:
        return None
    sd = float(approach2.percentile_sd(np.log(family.approach2.draws.params))[inside.index(flops)])
    return sd if math.isfinite(sd) else None


def merged(design: Design) -> list[tuple[Cell, int]]:
    """Cells and their number of runs, cheapest first."""
    runs: dict[Cell, int] = {}
    for pick in design.picks:
        runs[pick.cell] = runs.get(pick.cell, 0) + REPEATS
    return sorted(runs.items(), key=lambda item: (item[0].flops, item[0].params))
