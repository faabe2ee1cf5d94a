"""What a fit found: the objects that `fit` returns are, field by field, the schema of fit.json.

N and D are in units of one, losses in that of the data. An interval is [low, high]; an end that is
None is open: nothing in the runs bounds the number there.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prime_jax import __version__
from prime_jax.errors import UserError
from prime_jax.scaling.approach1 import Approach1
from prime_jax.scaling.approach2 import Approach2
from prime_jax.scaling.approach3 import Certificate, Fit, Problem
from prime_jax.scaling.frontiers import FrontierFits
from prime_jax.scaling.intervals import Ends, percentiles
from prime_jax.scaling.laws import Compute, Law, Optimum, optima, optimum
from prime_jax.scaling.noise import ErrorBudget
from prime_jax.scaling.points import Excluded, Points, Runs
from prime_jax.scaling.rollout import ModelError, Rollout, distance
from prime_jax.scaling.schema import Diagnostic, hidden, key
from prime_jax.scaling.settings import Settings
from prime_jax.scaling.table import Table

Array = NDArray[np.float64]
Bands = dict[str, list[Any]]  # of params, tokens, loss: [low, high], each a number or a list

SCHEMA = 2
CURVE = 49  # budgets at which the frontier is stored and drawn
QUANTITIES = ("params", "tokens", "loss")
OBJECTIVES = {
    "huber": "sum of Huber(log residual)",
    "ls": "sum of squared log residuals / 2",
}


@dataclass(frozen=True)
class Best:
    """The cheapest way to spend a budget, by the law.

    Attributes:
        intervals: of params, tokens and loss, by the bootstrap.
        profile: of params; None where it was not profiled (only budgets of the data are).
        intervals_with_model: of the loss, widened by the error of the rollout; None without one.
    """

    flops: float
    params: float
    tokens: float
    loss: float
    intervals: Bands
    profile: dict[str, Ends] | None
    intervals_with_model: dict[str, list[float]] | None


@dataclass(frozen=True)
class Frontier:
    """`Best` along a curve from the smallest budget of the data to the largest."""

    flops: Array
    params: Array
    tokens: Array
    loss: Array
    intervals: Bands
    intervals_with_model: dict[str, list[Array]] | None


@dataclass(frozen=True)
class Approach3:
    """The law of one family, with all that says how far to trust it."""

    params: Law | None = key("the law's parameters, `{E, A, B, alpha, beta}`; null if refused")
    a: float | None = key("exponent of N\\*", default=None)
    objective: float | None = key("the objective at the fit, summed over the runs", default=None)
    certificate: Certificate | None = key(
        "`converged`, scaled `gradient`, `smallest_eigenvalue` of the Hessian, `starts` and the fraction `agreeing`, `bounds` hit",
        default=None,
    )
    intervals: dict[str, list[float]] | None = key(
        "`[low, high]` of each parameter and of a, by bootstrap", default=None
    )
    profile: dict[str, Ends] | None = key(
        "the same by profile likelihood (null: open on that side)", default=None
    )
    optima: tuple[Best, ...] = key(
        "at each budget: `flops, params, tokens, loss, intervals, profile, intervals_with_model`",
        default=(),
    )
    frontier: Frontier | None = key("the same along a curve over C", default=None)
    warnings: tuple[Diagnostic, ...] = key("warnings of this approach", default=())
    problem: Problem | None = hidden(default=None)
    fit: Fit | None = hidden(default=None)
    replicates: Law | None = hidden(default=None)  # one law for each of the bootstrap
    sizes: dict[float, Ends] = hidden(default_factory=dict)  # profiles of N*, by budget
    data: Points | None = hidden(default=None)
    compute: Compute | None = hidden(default=None)
    level: float = hidden(default=0.95)
    error: ModelError | None = hidden(default=None)

    def __bool__(self) -> bool:
        """Whether there is a law."""
        return self.params is not None

    @property
    def law(self) -> Law:
        """Raises UserError where the approach was refused."""
        if self.params is None:
            raise UserError(f"approach 3 was refused: {self.warnings[0].message}")
        return self.params

    def optimum(self, flops: float) -> Best:
        """The cheapest way to spend `flops`, with intervals; beyond the data an extrapolation.

        Raises:
            UserError: the approach was refused, or no budget is given.
        """
        if not flops > 0:
            raise UserError(f"flops is {flops}; it must be a number above 0, like 1e21")
        return self.bests(np.array([float(flops)]))[0]

    def bests(self, flops_K: Array) -> tuple[Best, ...]:
        best, bands, wider = self._at(flops_K)
        return tuple(
            Best(
                flops=float(flops),
                **{name: float(getattr(best, name)[k]) for name in QUANTITIES},
                intervals={name: [ends[0][k], ends[1][k]] for name, ends in bands.items()},
                profile={"params": self.sizes[flops]} if flops in self.sizes else None,
                intervals_with_model=wider and {"loss": [float(end[k]) for end in wider]},
            )
            for k, flops in enumerate(flops_K.tolist())
        )

    def along(self, flops_K: Array) -> Frontier:
        best, bands, wider = self._at(flops_K)
        values = {name: np.asarray(getattr(best, name)) for name in QUANTITIES}
        return Frontier(
            flops=flops_K,
            **values,
            intervals=bands,
            intervals_with_model=wider and {"loss": wider},
        )

    def _at(self, flops_K: Array) -> tuple[Optimum, Bands, list[Array] | None]:
        best = optimum(self.law, self.compute, flops_K)
        draws = optima(self.replicates, self.compute, flops_K)
        bands = {name: percentiles(getattr(draws, name), self.level) for name in QUANTITIES}
        if self.error is None:
            return best, bands, None
        low, high = (np.asarray(end) for end in bands["loss"])
        decades = distance(self.data, flops_K)
        return best, bands, list(self.error.widen(best.loss, low, high, decades, self.level))


@dataclass(frozen=True)
class Counted:
    """A family as one convention counts it (`conventions.py`); None where approach 3 is refused."""

    flops: str
    params: str
    a: float | None
    profile: Ends | None  # interval of a
    approach2: float | None  # its a
    ratio: tuple[float, float] | None  # D*/N* at the smallest and at the largest budget
    growth: float | None  # D*/N* goes with C to this power


@dataclass(frozen=True)
class FamilyFit:
    """What was found for a family; a part that was refused says why in its warnings."""

    kind: str = key("kind of loss: nll, nelbo, train_loss, or empty")
    given: str = key("what the model is given besides the text, if anything")
    runs: int = key("how many runs were fitted")
    budgets: Array = key(
        "their compute budgets, FLOPs; for runs whose C has no gaps the smallest, the middle and the largest"
    )
    compute: Compute = key("fit of C = k N^q D to the runs")
    approach3: Approach3
    approach2: Approach2
    approach1: Approach1
    error_budget: ErrorBudget | None
    rollout: Rollout | None
    frontier: FrontierFits | None = key(
        "the lowest loss as a law of C, free and pinned", default=None
    )
    warnings: tuple[Diagnostic, ...] = key(
        "all warnings of the family: `{code, message, hint, refusal}`", default=()
    )
    template: dict[str, Any] | None = key(
        "settings that the runs of a sweep share, for `predict` and `design`; null for a table",
        default=None,
    )
    counted: tuple[Counted, ...] = key(
        "under every count of C and N that the runs record: `flops, params`, the exponent `a` with its `profile`, that of `approach2`, `ratio` D\\*/N\\* at the smallest and the largest budget, and its `growth` as a power of C",
        default=(),
    )
    points: Points = hidden(default=None)

    @property
    def fitted(self) -> bool:
        return bool(self.approach3) or not (self.approach2.a is self.approach1.a is None)

    @property
    def reason(self) -> str:
        """Why it is not fitted."""
        return next(warning.message for warning in self.warnings if warning.refusal)


@dataclass(frozen=True)
class Repetition:
    """R_D of a family over that of another: how much longer it profits from the same data.

    Attributes:
        interval: by bootstrap; an end is None where the search, not the runs, sets it.
        higher: fraction of the replicates in which it is the larger one.
    """

    family: str
    other: str
    ratio: float
    interval: list[float | None]
    higher: float
    significant: bool


@dataclass(frozen=True)
class Source:
    name: str
    sha256: str
    columns: Mapping[str, str] = field(default_factory=dict)
    points: str | None = None


@dataclass(frozen=True)
class Conventions:
    flops: str
    params: str


@dataclass(frozen=True)
class Method:
    objective: str
    delta: float | None
    bootstrap: int
    seed: int
    level: float
    allow_mixed_kinds: bool
    settings: Settings


@dataclass(frozen=True)
class Origin:
    """What was read, and how."""

    schema: int = key("2; a file of schema 1 is refused")
    source: Source = key(
        "name and SHA-256 of the data; `columns` that were read under another name; SHA-256 of `points.csv`, the runs in plain columns"
    )
    metric: str = key("which loss was fitted")
    conventions: Conventions = key("how `flops` and `params` are counted")
    method: Method = key(
        "`objective`, `delta`, `bootstrap` replicates, `seed`, `level`, and `settings`, which repeat the fit to the last bit"
    )
    versions: dict[str, str] = key("versions of prime_jax, Python, numpy, scipy")


@dataclass(frozen=True)
class ScalingFit(Origin):
    """The fit of every family."""

    comparable: tuple[tuple[str, ...], ...] = key(
        "groups of families whose losses may share an axis"
    )
    families: dict[str, FamilyFit]
    repetition: tuple[Repetition, ...] = key(
        "of a law with R_D, for each pair of families: `family, other, ratio` of R_D, `interval` (null: open), the fraction `higher` of replicates, and whether the difference is `significant`"
    )
    excluded: tuple[Excluded, ...] = key(
        "runs that were left out of the fit: `run, family, status, reason`"
    )
    warnings: tuple[Diagnostic, ...] = key("warnings about the data as a whole")
    data: Runs = hidden()
    settings: Settings = hidden()
    table: Table | None = hidden(default=None)  # as it was read

    @property
    def refused(self) -> bool:
        families = [w for family in self.families.values() for w in family.warnings]
        return any(warning.refusal for warning in (*self.warnings, *families))

    def family(self, name: str) -> FamilyFit:
        """Raises UserError if there is no such family."""
        self.data.points(name)
        return self.families[name]


def origin(runs: Runs, settings: Settings) -> dict[str, Any]:
    """The fields of `Origin`."""
    return {
        "schema": SCHEMA,
        "source": Source(runs.source, runs.sha256, runs.columns.read_as),
        "metric": runs.choice.metric,
        "conventions": Conventions(runs.columns.flops_convention, runs.columns.params_convention),
        "method": Method(
            objective=OBJECTIVES[settings.objective],
            delta=settings.delta if settings.objective == "huber" else None,
            bootstrap=settings.replicates,
            seed=settings.seed,
            level=settings.level,
            allow_mixed_kinds=runs.choice.allow_mixed_kinds,
            settings=settings,
        ),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("numpy", "scipy")}
    return {"prime_jax": __version__, "python": platform.python_version(), **libraries}


def curve_budgets(points: Points) -> Array:
    """Budgets from the smallest to the largest of the data, for curves; nothing beyond it."""
    return np.geomspace(points.levels[0], points.levels[-1], CURVE)
