"""Laws of several families that share a parameter, and the test whether they may.

The objective is the sum of the families' own (approach 3), each divided by its noise, the mean of
its terms at the free fit. The statistic 2 sum_f n_f log(Q_f shared / Q_f free) is minus twice the
log-likelihood ratio of the Laplace density that the robust objective stands for, with the scale of
each family profiled out. It is not chi-squared for seventy runs, so p comes from data simulated
under the shared laws with the residuals that these leave.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from prime_jax.scaling import approach3, newton
from prime_jax.scaling.approach3 import Fit, Problem
from prime_jax.scaling.laws import Law, PowerForm

Array = NDArray[np.float64]
Index = NDArray[np.intp]

NAMES = PowerForm.names
EXPONENTS, IRREDUCIBLE = ("alpha", "beta"), ("E",)
SILENT = 1e-9  # a statistic of this size is rounding, as of data without noise
START_STRIDE = 6  # every sixth start of approach 3, besides the laws of the families alone
MIN_SHARED = 10  # cells, for a correlation between families


@dataclass(frozen=True)
class Shared:
    """F families whose laws have the parameters of `names` in common.

    The unknowns theta_K are the free ones of each family in turn, then the shared ones; those of
    family f in its own standardised units are maps[f] @ theta.
    """

    problems: tuple[Problem, ...]
    names: tuple[str, ...]
    maps: tuple[Array, ...]  # [5, K] each

    def derivatives(self, theta_PxK: Array, weight_FxP: Array) -> tuple[Array, Array, Array]:
        """The sum over families f of `weight_FxP[f]` times its objective, and its derivatives."""
        value, gradient, hessian = 0.0, 0.0, 0.0
        for problem, to_family, weight_P in zip(self.problems, self.maps, weight_FxP, strict=True):
            weight_Pxn = weight_P[:, None] * problem.weight_n
            v, g, h = problem.derivatives(theta_PxK @ to_family.T, weight_Pxn)
            value, gradient = value + v, gradient + g @ to_family
            hessian = hessian + to_family.T @ h @ to_family
        return value, gradient, hessian

    def costs(self, theta_PxK: Array) -> Array:
        """The objective of each family, [F, P]."""
        pairs = zip(self.problems, self.maps, strict=True)
        return np.array([_costs(problem, theta_PxK @ to_family.T) for problem, to_family in pairs])

    def at(self, which: Index) -> "Shared":
        """As Problem.at."""
        return replace(self, problems=tuple(problem.at(which) for problem in self.problems))

    def stages(self) -> list["Shared"]:
        """As Problem.stages: the families have one objective and delta."""
        stages = zip(*(problem.stages() for problem in self.problems), strict=True)
        return [replace(self, problems=problems) for problems in stages]

    def box(self) -> tuple[Array, Array]:
        """Bounds_K; of a shared unknown, those that suit every family."""
        lower = np.full(self.maps[0].shape[1], -np.inf)
        upper = -lower
        for problem, to_family in zip(self.problems, self.maps, strict=True):
            rows, columns = np.nonzero(to_family)
            low, high = (bound[rows] / to_family[rows, columns] for bound in problem.box())
            lower[columns] = np.maximum(lower[columns], low)
            upper[columns] = np.minimum(upper[columns], high)
        return lower, np.maximum(lower, upper)

    def join(self, thetas_FxPx5: Sequence[Array]) -> Array:
        """Unknowns_PxK nearest to separate ones of the families."""
        inverse = np.linalg.pinv(np.concatenate(self.maps))
        return np.concatenate(thetas_FxPx5, axis=1) @ inverse.T

    def laws(self, theta_K: Array) -> tuple[Law, ...]:
        pairs = zip(self.problems, self.maps, strict=True)
        return tuple(problem.form.law(to_family @ theta_K) for problem, to_family in pairs)


@dataclass(frozen=True)
class SharedFit:
    """Whether families may share parameters.

    Attributes:
        laws: of the families, with the parameters of `names` in common.
        gradient: at the shared fit, scaled as in approach3.Certificate.
        statistic: minus twice the log-likelihood ratio of shared against free laws.
        p: how often data simulated under the shared laws give as large a statistic.
    """

    names: tuple[str, ...]
    laws: tuple[Law, ...]
    gradient: float
    statistic: float
    p: float
    replicates: int


def tied(problems: Sequence[Problem], names: tuple[str, ...]) -> Shared:
    """Families that share the parameters of `names`, out of E, alpha and beta."""
    own = [k for k, name in enumerate(NAMES) if name not in names]
    total = len(own) * len(problems) + len(names)
    maps = []
    for f, problem in enumerate(problems):
        to_family = np.zeros((5, total))
        to_family[own, f * len(own) + np.arange(len(own))] = 1.0
        for k, name in enumerate(names, total - len(names)):
            to_family[NAMES.index(name), k] = _unit(problem, name) / _unit(problems[0], name)
        maps.append(to_family)
    return Shared(tuple(problems), names, tuple(maps))


def likelihood_ratio(
    problems: Sequence[Problem],
    fits: Sequence[Fit],
    names: tuple[str, ...],
    cells: Sequence[Index],
    replicates: int,
    seed: int,
) -> SharedFit:
    """Fit the shared laws, and ask how surprising the data are under them.

    Args:
        problems: with the same objective and delta.
        fits: approach 3 of each family alone.
        names: the parameters that they share, out of E, alpha and beta.
        cells: of each family, the cell of the grid of every run, counted over all families.
        replicates: data sets that are simulated.
        seed: of those.
    """
    both = tied(problems, names)
    free_Fx1 = np.array([[fit.objective] for fit in fits])
    weight_Fx1 = 1 / _noise(both, free_Fx1)
    some = [problem.form.starts(problem.log_loss_n)[::START_STRIDE] for problem in problems]
    starts = both.join([np.vstack([fit.theta_K, own]) for fit, own in zip(fits, some, strict=True)])
    theta_SxK = _minimise(both, starts, np.repeat(weight_Fx1, len(starts), axis=1))
    value_S = np.sum(weight_Fx1 * both.costs(theta_SxK), axis=0)
    theta_1xK = theta_SxK[[np.argmin(value_S)]]
    statistic = _statistic(both, both.costs(theta_1xK), free_Fx1)[0]
    simulated = _simulate(both, theta_1xK[0], cells, replicates, seed)
    # Equal but for rounding is equal: both are 0 where the data have no noise.
    p = (1 + np.sum(simulated >= statistic - SILENT)) / (1 + replicates)
    gradient = _gradient(both, theta_1xK, weight_Fx1)
    return SharedFit(
        names=names,
        laws=both.laws(theta_1xK[0]),
        gradient=gradient,
        statistic=float(statistic),
        p=float(p),
        replicates=replicates,
    )


def _simulate(both: Shared, theta_K: Array, cells: Sequence[Index], count: int, seed: int) -> Array:
    """The statistic of data simulated under the shared laws, [count]."""
    rng = np.random.default_rng(seed)
    new = replace(both, problems=_redraw(both, theta_K, cells, count, rng))
    start = np.tile(theta_K, (count, 1))
    free = []
    for problem, to_family in zip(new.problems, new.maps, strict=True):
        weight = np.tile(problem.weight_n, (count, 1))
        free.append(_costs(problem, approach3.solve(problem, start @ to_family.T, weight)[0]))
    free_FxR = np.array(free)
    theta = _minimise(new, start, 1 / _noise(new, free_FxR))
    return _statistic(new, new.costs(theta), free_FxR)


def _redraw(
    both: Shared, theta_K: Array, cells: Sequence[Index], count: int, rng: np.random.Generator
) -> tuple[Problem, ...]:
    """The problems with `count` sets of losses: the shared laws, and residuals drawn anew.

    Every run gets a residual of its own family, of either sign. Ranks of the draws are normal
    with the correlation that residuals of different families have in the cells they share.
    """
    residuals = []
    for problem, to_family in zip(both.problems, both.maps, strict=True):
        runs, unknowns = problem.runs, len(theta_K) / len(both.problems)
        spread = np.sqrt(runs / max(runs - unknowns, 1.0))  # a fit hugs its data
        residual = problem.residual(to_family @ theta_K) * np.sqrt(problem.weight_n)
        residuals.append(spread * residual)
    families, last = len(cells), max(int(cell_n.max()) for cell_n in cells)
    eigenvalues, vectors = np.linalg.eigh(_correlation(residuals, cells))
    root = vectors * np.sqrt(np.maximum(eigenvalues, 0.0))
    z_RxMxF = rng.standard_normal((count, last + 1, families)) @ root.T
    out = []
    for f, (problem, to_family) in enumerate(zip(both.problems, both.maps, strict=True)):
        pool = np.sort(np.concatenate([residuals[f], -residuals[f]]))
        rank = (ndtr(z_RxMxF[:, cells[f], f]) * len(pool)).astype(np.intp)
        drawn = pool[np.minimum(rank, len(pool) - 1)] / np.sqrt(problem.weight_n)
        expected = problem.log_loss_n + problem.residual(to_family @ theta_K)
        out.append(replace(problem, log_loss_n=expected + drawn))
    return tuple(out)


def _correlation(residuals: Sequence[Array], cells: Sequence[Index]) -> Array:
    """Of the residuals in shared cells, [F, F]; 0 between families that share few."""
    out = np.eye(len(cells))
    for f in range(len(cells)):
        for g in range(f):
            _, here, there = np.intersect1d(cells[f], cells[g], return_indices=True)
            if len(here) >= MIN_SHARED:
                r, s = residuals[f][here], residuals[g][there]
                size = np.sqrt((r @ r) * (s @ s))
                out[f, g] = out[g, f] = (r @ s) / size if size > 0 else 0.0
    return out


def _minimise(both: Shared, start_PxK: Array, weight_FxP: Array) -> Array:
    theta = start_PxK
    for stage in both.stages():

        def derivatives(
            theta: Array, which: Index, stage: Shared = stage
        ) -> tuple[Array, Array, Array]:
            return stage.at(which).derivatives(theta, weight_FxP[:, which])

        floors = [p.floor * float(w.max()) for p, w in zip(both.problems, weight_FxP, strict=True)]
        theta = newton.minimise(derivatives, theta, *both.box(), sum(floors))[0]
    return theta


def _costs(problem: Problem, theta_PxK: Array) -> Array:
    return problem.cost(problem.residuals(theta_PxK)) @ problem.weight_n


def _noise(both: Shared, cost_FxP: Array) -> Array:
    """The mean term of each family's objective, never quite zero."""
    runs = np.array([[problem.runs] for problem in both.problems])
    rounding = np.array([[problem.floor] for problem in both.problems])
    return (cost_FxP + rounding) / runs


def _statistic(both: Shared, shared_FxP: Array, free_FxP: Array) -> Array:
    runs = np.array([[problem.runs] for problem in both.problems])
    ratio = _noise(both, shared_FxP) / _noise(both, free_FxP)
    return 2 * np.sum(runs * np.log(ratio), axis=0)


def _gradient(both: Shared, theta_1xK: Array, weight_Fx1: Array) -> float:
    gradient = both.derivatives(theta_1xK, weight_Fx1)[1]
    moves = newton.free(theta_1xK, gradient, *both.box())
    scale = sum(
        weight * problem.gradient_scale(theta_1xK @ to_family.T) @ np.abs(to_family)
        for problem, to_family, weight in zip(both.problems, both.maps, weight_Fx1, strict=True)
    )
    return float(np.max(np.abs(gradient / scale)[moves], initial=0.0))


def _unit(problem: Problem, name: str) -> float:
    """What a standardised exponent is multiplied by."""
    return dict(zip(("alpha", "beta"), problem.form.scale, strict=True)).get(name, 1.0)
