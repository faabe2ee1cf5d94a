"""What people import: fits of a path, a data frame or a dict of columns, and what one asks of them.

Every function raises UserError with one line for bad input. docs/scaling-python.md has an example.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.errors import UserError
from prime_jax.runtime import outputs, storage
from prime_jax.runtime.records import write_json_atomic
from prime_jax.scaling import conventions, frontiers, launchable, record, tables
from prime_jax.scaling import tasks as task_laws
from prime_jax.scaling.approach1 import join_curves
from prime_jax.scaling.comparison import Comparison
from prime_jax.scaling.comparison import compare as compare_runs
from prime_jax.scaling.designs import Design, choose
from prime_jax.scaling.fits import fit_runs, frontier_of
from prime_jax.scaling.frontiers import FrontierFits
from prime_jax.scaling.logs import Logs
from prime_jax.scaling.points import Runs, select
from prime_jax.scaling.prediction import (
    Prediction,
    RunPrediction,
    predict_family,
    predict_run,
)
from prime_jax.scaling.rate_laws import RateFit
from prime_jax.scaling.rate_laws import fit as fit_rates
from prime_jax.scaling.readers import Progress, is_sweep, quiet, read_with_curves
from prime_jax.scaling.results import Origin, ScalingFit, origin
from prime_jax.scaling.rollout import Validation, validate_family
from prime_jax.scaling.schema import as_dict, hidden, key
from prime_jax.scaling.settings import DEFAULT_METRIC, Choice, Settings
from prime_jax.scaling.table import Table, of_columns
from prime_jax.scaling.tasks import FamilyTasks
from prime_jax.settings import from_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Source = str | Path | Mapping[str, Sequence[Any]] | Any  # a path, a dict of columns, a data frame
Log = Callable[[str], None]


class Fit(ScalingFit):
    """The fit of all families; `families[NAME].approach3.optimum(flops)` and so on."""

    def to_dict(self) -> dict[str, Any]:
        """The contents of fit.json."""
        return as_dict(self)

    def summary(self) -> str:
        """The numbers in short, and the warnings."""
        found = self.to_dict()
        return "\n".join([str(tables.summary(found)), *tables.warnings_of(found)])

    def plot(self, name: str = "isoflop") -> "Figure":
        """A matplotlib figure, one of `figures.NAMES`.

        Raises:
            UserError: no such figure, or the fit has nothing to draw in it.
        """
        from prime_jax.scaling import figures

        figure = figures.draw(self, name)
        if figure is None:
            raise UserError(f"{self.source.name}: nothing to draw in the figure {name!r}")
        return figure

    def save(self, path: str | Path, formats: Sequence[str] = ("svg",)) -> Path:
        """Write fit.json, points.csv, the figures and report.html; `load` reads them back.

        Raises:
            UserError: the directory cannot be written to.
        """
        from prime_jax.scaling import figures

        path = Path(path)
        drawn = [f"{name}.{suffix}" for name in figures.NAMES for suffix in formats]
        made = [record.FIT, record.POINTS, "report.html", *drawn]
        with outputs.folder(path, made, force=True):
            record.write(self, path)
            self.draw(path, formats)
        return path

    def draw(
        self, path: Path, formats: Sequence[str] = ("svg",), log: Log | None = None
    ) -> list[Path]:
        """Draw each figure once beside fit.json, and write the report; returns the figures.

        Args:
            log: told in one line about each figure that cannot be drawn; without it that is raised.
        """
        from prime_jax.scaling import figures

        return _publish(figures.draw_all(self, log), figures.NAMES, path, formats, log)


class Compared(Comparison):
    """Families against a baseline."""

    def to_dict(self) -> dict[str, Any]:
        """The contents of compare.json."""
        return as_dict(self)

    def summary(self) -> str:
        found = self.to_dict()
        parts = [str(part) for part in tables.comparison(found)]
        return "\n\n".join([*parts, "\n".join(tables.warnings_of(found))])

    def plot(self) -> "Figure":
        """The compute multiplier. Raises UserError where all was refused."""
        from prime_jax.scaling import figures

        drawn = figures.draw_comparison(self.to_dict(), list(self.data.families))
        if not drawn:
            raise UserError(f"{self.source.name}: nothing to draw; every comparison was refused")
        return drawn["multiplier"]

    def save(self, path: str | Path, formats: Sequence[str] = ("svg",)) -> Path:
        """Write compare.json and the figure, and a section into the report of a fit there."""
        path = Path(path)
        drawn = [f"multiplier.{suffix}" for suffix in formats]
        with outputs.folder(path, ["compare.json", "report.html", *drawn], force=True):
            write_json_atomic(path / "compare.json", self.to_dict())
            self.draw(path, formats)
        return path

    def draw(
        self, path: Path, formats: Sequence[str] = ("svg",), log: Log | None = None
    ) -> list[Path]:
        """The figure, and the report if a fit lies there; returns what was written."""
        from prime_jax.scaling import figures

        drawn = figures.draw_comparison(self.to_dict(), list(self.data.families), log)
        return _publish(drawn, ("multiplier",), path, formats, log)


@dataclass(frozen=True)
class Validations(Origin):
    """validate.json: how wrong predictions of larger budgets from smaller ones were."""

    families: dict[str, Validation] = key("of each family")
    data: Runs = hidden()

    def to_dict(self) -> dict[str, Any]:
        return as_dict(self)

    def summary(self) -> str:
        found = self.to_dict()
        parts = [str(tables.validation(n, f)) for n, f in found["families"].items() if f["steps"]]
        return "\n\n".join([*parts, "\n".join(tables.warnings_of(found))])


@dataclass(frozen=True)
class Frontiers(Origin):
    """frontier.json: the lowest loss of each budget as a law of compute alone."""

    families: dict[str, FrontierFits] = key("of each family")

    @property
    def refused(self) -> bool:
        fits = [fit for family in self.families.values() for fit in family.fits]
        return any(warning.refusal for fit in fits for warning in fit.warnings)

    def to_dict(self) -> dict[str, Any]:
        """The contents of frontier.json."""
        return as_dict(self)

    def summary(self) -> str:
        found = self.to_dict()["families"]
        parts = [tables.frontiers(found), tables.frontier_losses(found)]
        return "\n\n".join([*map(str, filter(None, parts)), *tables.frontier_notes(found)])


@dataclass(frozen=True)
class Rates(Origin):
    """rates.json: the best learning rate as a law of N, D and batch size."""

    families: dict[str, RateFit] = key("of each family")

    @property
    def refused(self) -> bool:
        return any(w.refusal for family in self.families.values() for w in family.warnings)

    def to_dict(self) -> dict[str, Any]:
        """The contents of rates.json."""
        return as_dict(self)

    def summary(self) -> str:
        found = self.to_dict()
        parts = filter(None, (tables.rates(found), tables.rate_cells(found)))
        return "\n\n".join([*map(str, parts), "\n".join(tables.warnings_of(found))])


@dataclass(frozen=True)
class Downstream(Origin):
    """downstream.json: accuracies of tasks against compute, directly and through the loss."""

    families: dict[str, FamilyTasks] = key("of each family")

    @property
    def refused(self) -> bool:
        fits = [fit for family in self.families.values() for fit in family.tasks.values()]
        return any(warning.refusal for fit in fits for warning in fit.warnings)

    def to_dict(self) -> dict[str, Any]:
        """The contents of downstream.json."""
        return as_dict(self)

    def summary(self) -> str:
        found = self.to_dict()
        parts = filter(None, (tables.tasks(found), tables.task_predictions(found)))
        return "\n\n".join([*map(str, parts), "\n".join(tables.task_notes(found))])


class Predictions(dict[str, Prediction]):
    """A prediction of a budget for each family."""

    def summary(self) -> str:
        rows = [as_dict(one) for one in self.values()]
        return "\n".join([str(tables.predictions(rows)), *tables.prediction_notes(rows)])


class RunPredictions(dict[str, RunPrediction]):
    """A prediction of a run for each family."""

    def summary(self) -> str:
        rows = [as_dict(one) for one in self.values()]
        return "\n".join([str(tables.run_predictions(rows)), *tables.prediction_notes(rows)])


def fit(
    source: Source,
    *,
    curves: Source | None = None,
    metric: str = DEFAULT_METRIC,
    flops: str | None = None,
    params: str | None = None,
    allow_mixed_kinds: bool = False,
    columns: str = "",
    name_pattern: str = "",
    family: str = "",
    note: str = "",
    progress: Progress = quiet,
    **settings: Any,
) -> Fit:
    """Fit the laws of all families.

    Args:
        source: a sweep directory, a CSV, a data frame or a dict of columns, with a row for each
            run: family, loss, and two of flops, params, tokens; or histories of runs.
        curves: training curves for approach 1, alike.
        metric, flops, params, allow_mixed_kinds, columns, name_pattern, family: as the options of
            `prime-jax fit`.
        note: put behind the name of the source.
        progress: called with what is being done.
        settings: of `Settings`: replicates, seed, level, objective, delta, approach2.

    Raises:
        UserError: bad input, in one line.
    """
    choice = Choice(
        metric=metric,
        flops=flops,
        params=params,
        allow_mixed_kinds=allow_mixed_kinds,
        columns=columns,
        name_pattern=name_pattern,
        family=family,
    )
    found = from_dict(Settings, settings)
    table, logs = _read(source, curves, choice, progress)
    if note:
        table = replace(table, source=f"{table.source} ({note})")
    runs = select(table, choice)
    lines = join_curves(logs, table, runs, asked=curves is not None) if logs else None
    fitted = fit_runs(runs, found, lambda name: progress(f"fitting {name}"), lines)
    templates = _templates(source)
    counted = conventions.every(table, choice, found, progress)
    families = {
        name: replace(family, template=templates.get(name), counted=counted.get(name, ()))
        for name, family in fitted.families.items()
    }
    return _as(Fit, replace(fitted, families=families, table=table))


def load(path: str | Path, families: Sequence[str] | None = None) -> Fit:
    """Read what `save` or `prime-jax fit` wrote, and fit it again: the same numbers to the bit.

    Args:
        families: only these; all of them by default.
    """
    return _as(Fit, record.load(Path(path), families))


def compare(
    source: ScalingFit | Source,
    baseline: str,
    against: Sequence[str] = (),
    *,
    progress: Progress = quiet,
    **options: Any,
) -> Compared:
    """Compare families with a baseline: compute multipliers, probabilities, tests.

    Args:
        source: a fit, or what `fit` takes.
        against: the families; all others if empty.
        options: as those of `fit`; of a fit only allow_mixed_kinds, else they are its own.
    """
    runs, settings = _runs(source, options, progress)
    names = [against] if isinstance(against, str) else list(against)
    return _as(Compared, compare_runs(runs, baseline, names, settings, progress))


def validate(
    source: ScalingFit | Source, *, progress: Progress = quiet, **options: Any
) -> Validations:
    """Predict larger budgets from smaller ones, and say how wrong that was."""
    runs, settings = _runs(source, options, progress)
    families = {}
    for name, points in runs.families.items():
        progress(f"validating {name}")
        families[name] = validate_family(points, settings)
    return Validations(**origin(runs, settings), families=families, data=runs)


def frontier(
    source: ScalingFit | Source,
    at: Sequence[float] = (),
    *,
    progress: Progress = quiet,
    **options: Any,
) -> Frontiers:
    """Fit the lowest loss of each budget as L(C) = L_inf + A / C**a, free and with L_inf pinned.

    Args:
        source: a fit, or what `fit` takes; a table may also have flops and loss but no N or D.
        at: budgets at which the loss is asked for.
        options: as those of `fit`; `floor` is where L_inf is pinned, by default E of approach 3.
    """
    if isinstance(source, ScalingFit):
        runs, settings = _runs(source, options, progress)
        found = {name: family.frontier for name, family in source.families.items()}
    else:
        table, choice, settings = _asked(source, options, progress)
        if frontiers.is_bare(table):
            runs, found = frontiers.read(table, choice, settings)
        else:
            runs = select(table, choice)
            found = {n: frontier_of(points, settings) for n, points in runs.families.items()}
    asked = {name: part.asked([float(c) for c in at]) for name, part in found.items() if part}
    return Frontiers(**origin(runs, settings), families=asked)


def rates(source: ScalingFit | Source, *, progress: Progress = quiet, **options: Any) -> Rates:
    """Fit the best learning rate as lr* = k N**n D**d B**b; cells need three rates or more.

    Args:
        source, options: as those of `fit`.
    """
    runs, settings = _runs(source, options, progress)
    found = {name: fit_rates(points, settings.level) for name, points in runs.families.items()}
    return Rates(**origin(runs, settings), families=found)


def downstream(
    source: Source,
    tasks: str | Sequence[str] = (),
    at: Sequence[float] = (),
    *,
    chance: Mapping[str, float] | None = None,
    ceiling: Mapping[str, float] | None = None,
    progress: Progress = quiet,
    **options: Any,
) -> Downstream:
    """Accuracy of tasks against compute: through a law of the loss, and directly.

    Args:
        source: a sweep whose runs were evaluated on tasks, or what `fit` takes with columns
            acc_TASK, acc_se_TASK and perhaps task_loss_TASK.
        tasks: only these, or this one; all by default.
        at: budgets at which the accuracy is asked for.
        chance: accuracy of guessing by task, for tasks that `tasks.CHANCE` does not know.
        ceiling: largest accuracy that there can be, by task; 1 by default.
        options: as those of `fit`.
    """
    table, choice, settings = _asked(source, options, progress)
    path = _readable(source)
    if is_sweep(path):
        from prime_jax.sweep import collect

        rows = collect.with_tasks(path, table.rows)
        table = replace(table, rows=rows, columns=list(dict.fromkeys(k for r in rows for k in r)))
    if not all(0 < c < math.inf for c in at):
        raise UserError("downstream: at are budgets in FLOPs, numbers above 0, like 1e21")
    tasks, known = [tasks] if isinstance(tasks, str) else tasks, task_laws.names(table)
    if missing := [task for task in tasks if task not in known]:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"{table.source}: no accuracy of {', '.join(missing)}; {has}")
    wanted = list(tasks) or known
    if not wanted:
        raise UserError(
            f"{table.source}: no accuracy of a task; evaluate runs with prime-jax eval --tasks, or "
            "give columns acc_TASK and acc_se_TASK"
        )
    limits = task_laws.limits(wanted, chance or {}, ceiling or {})
    runs, out = select(table, choice), {}
    for name, points in runs.families.items():
        found = {}
        for task, (low, high) in limits.items():
            progress(f"fitting {name}, {task}")
            found[task] = task_laws.fit(
                points,
                table=table,
                task=task,
                chance=low,
                ceiling=high,
                settings=settings,
                flops=[float(c) for c in at],
            )
        out[name] = FamilyTasks(found)
    return Downstream(**origin(runs, settings), families=out)


def predict(
    fit: ScalingFit,
    flops: float | None = None,
    family: str | None = None,
    unique_tokens: float | None = None,
    *,
    params: float | None = None,
    tokens: float | None = None,
) -> Predictions | RunPredictions:
    """The best size, tokens and loss at a budget, or the loss of a run, with intervals.

    Args:
        flops: C, in the FLOPs of the fit.
        family: only this one.
        unique_tokens: of the training data; by default what the runs say.
        params, tokens: N and D of a run, in place of flops.

    Raises:
        UserError: neither flops nor both of params and tokens are given, or a number is not above 0.
    """
    given = [value for value in (flops, params, tokens) if value is not None]
    if (flops is None) == (params is None) or (params is None) != (tokens is None):
        raise UserError("predict: give flops, or params and tokens")
    if not all(0 < value < math.inf for value in given):
        raise UserError("predict: flops, params and tokens are numbers above 0, like 1e21")
    known = record.unique_tokens(fit.table) if fit.table else {}
    names = fit.families if family is None else [family]
    limits = {name: unique_tokens or known.get(name) for name in names}
    if flops is None:
        return RunPredictions(
            {n: predict_run(fit.family(n), fit.settings, params, tokens, limits[n]) for n in names}
        )
    out = Predictions()
    for name in names:
        found = fit.family(name)
        template = launchable.template(name, vars(fit.conventions), found.template)
        out[name] = predict_family(found, fit.settings, float(flops), template, limits[name])
    return out


def design(fit: ScalingFit, family: str, target: float, budget: float, **options: Any) -> Design:
    """Which runs to add, for `budget` FLOPs, to know N* at `target` best; see `design.choose`."""
    return choose(fit.family(family), fit.settings, float(target), float(budget), **options)


def _read(
    source: Source, curves: Source | None, choice: Choice, progress: Progress
) -> tuple[Table, Logs | None]:
    known = None if curves is None else _readable(curves)
    return read_with_curves(_readable(source), known, choice, progress)


def _readable(source: Source) -> Path | Table:
    if isinstance(source, str):
        return storage.path(source)
    return source if hasattr(source, "read_bytes") else of_columns(source)


def _runs(
    source: ScalingFit | Source, options: dict[str, Any], progress: Progress
) -> tuple[Runs, Settings]:
    if isinstance(source, ScalingFit):
        mixed = options.pop("allow_mixed_kinds", source.data.choice.allow_mixed_kinds)
        if options:
            raise UserError(f"{', '.join(options)}: those of the fit are used; leave them out")
        choice = replace(source.data.choice, allow_mixed_kinds=mixed)
        return replace(source.data, choice=choice), source.settings
    table, choice, settings = _asked(source, options, progress)
    return select(table, choice), settings


def _asked(
    source: Source, options: dict[str, Any], progress: Progress
) -> tuple[Table, Choice, Settings]:
    """What is read, and what of it and how, from the options of `fit`."""
    names = [field.name for field in fields(Choice)]
    choice = Choice(**{name: options.pop(name) for name in names if name in options})
    settings = from_dict(Settings, options)
    return _read(source, None, choice, progress)[0], choice, settings


def _templates(source: Source) -> dict[str, Any]:
    """What new runs of each family would share with those of a sweep; a table does not say."""
    path = storage.path(source) if isinstance(source, str) else source
    return launchable.of_sweep(path) if is_sweep(path) else {}


def _publish(
    drawn: Any, names: Iterable[str], path: Path, formats: Sequence[str], log: Log | None
) -> list[Path]:
    """Write figures, SVG for the report and what else is asked for; returns what was written."""
    from prime_jax.scaling import drawing, report

    for suffix in formats:
        if suffix not in drawing.FORMATS:
            raise UserError(f"no format {suffix!r}; figures are {', '.join(drawing.FORMATS)}")
    formats = tuple(dict.fromkeys(("svg", *formats)))
    try:
        paths = drawing.publish(drawn, names, path, log, formats)
        reports = [path / "report.html"] if report.refresh(path) else []
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from error
    return [*paths.values(), *reports]


def _as(kind: type, found: Any) -> Any:
    """The same with the methods of `kind`, a subclass."""
    return kind(**{field.name: getattr(found, field.name) for field in fields(found)})
