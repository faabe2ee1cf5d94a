"""`prime-jax scaling predict` and `prime-jax scaling design`: what a fit says of other budgets."""

import dataclasses
import functools
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prime_jax.cli.console import say, show, write
from prime_jax.cli.fit import show_warnings
from prime_jax.cli.parse import Arguments, override
from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.settings import REQUIRED, setting

if TYPE_CHECKING:
    from prime_jax.scaling.designs import Cell
    from prime_jax.scaling.launchable import Template
    from prime_jax.scaling.library import Fit
    from prime_jax.sweep.grid import Row

SCHEMA = 1
BUDGET = "FLOPs, in the convention of the fit"


@dataclass(frozen=True)
class OfFit(Arguments):
    """A command on what `fit` wrote, with what a run that can be launched needs to be known."""

    SETTINGS = RunConfig
    NOTES = """
        Any setting of a run may follow, as with `prime-jax train` (--model.vocab-size 50304,
        --data.seq-len 1024). Other settings are those of the fitted sweep, else of --sweep ROOT,
        else the defaults.
        """

    fit: Path = setting(REQUIRED, "written by `prime-jax fit`", positional=True, metavar="DIR")
    sweep: Path | None = setting(None, "sweep whose settings a new run takes", metavar="ROOT")
    kind: Literal["arm", "mdm", "prime"] | None = setting(
        None, "kind of the family's runs, if its name is not one of these", flag="as"
    )
    json: bool = setting(False, "print JSON, for programs")
    overrides: tuple[str, ...] = setting((), "dotted settings", flag=False)

    def template(self, fitted: "Fit", family: str) -> "Template":
        """The settings of new runs of a family.

        Raises:
            UserError: --sweep is none or has no such family, or a setting is unknown.
        """
        from prime_jax.scaling import launchable

        known = fitted.family(family).template
        if self.sweep:
            families = launchable.of_sweep(self.sweep)
            if family not in families:
                has = ", ".join(families)
                raise UserError(f"{self.sweep}: no family {family!r}; it has {has}")
            known = families[family]
        made = launchable.template(family, vars(fitted.conventions), known, self.kind)
        return dataclasses.replace(made, config=override(made.config, self.overrides))


@dataclass(frozen=True, kw_only=True)
class Predict(OfFit):
    """Read DIR of `prime-jax fit` and predict for a compute budget C: the best size N*, its tokens D*
    and the loss there, each with its interval (approach 3 from the bootstrap, approach 2 from the
    power law through its optima), whether C lies within the data, and the nearest run that can be
    launched. With --params and --tokens in place of --flops: the loss of a run of N parameters on D
    tokens, wherever it lies (over-trained models, too). The interval of the loss is also widened by
    the rollout error: how wrong predictions of larger budgets from smaller ones were.

    Exit code: 0 predicted, 3 no family has an answer (the output says why), 2 bad input."""

    EXAMPLES = (
        "prime-jax scaling predict quickstart/fit --flops 1e21 --family arm prime",
        "prime-jax scaling predict quickstart/fit --params 1e9 --tokens 1e12",
    )

    flops: float | None = setting(None, f"compute budget: {BUDGET}", above=0, metavar="C")
    params: float | None = setting(
        None, "parameters N of a run, as the fit counts them", above=0, metavar="N"
    )
    tokens: float | None = setting(None, "tokens D of a run", above=0, metavar="D")
    family: tuple[str, ...] = setting((), "families to predict (default: all)", metavar="F")
    data_limit: float | None = setting(
        None,
        "unique tokens of the training data (default: as recorded by the runs)",
        above=0,
        metavar="TOKENS",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        run = (self.params is None, self.tokens is None)
        if run[0] != run[1] or (self.flops is None) == run[0]:
            raise UserError("give --flops C, or --params N and --tokens D")


def predict(args: Predict) -> int:
    from prime_jax import scaling
    from prime_jax.scaling import labels, record, tables
    from prime_jax.scaling.prediction import predict_family, predict_run
    from prime_jax.scaling.schema import as_dict

    fitted = scaling.load(args.fit, args.family or None)
    unique, rows = record.unique_tokens(fitted.table), []
    for name, family in fitted.families.items():
        limit = args.data_limit or unique.get(name)
        if args.flops is None:
            found = predict_run(family, fitted.settings, args.params, args.tokens, limit)
        else:
            template = args.template(fitted, name)
            found = predict_family(family, fitted.settings, args.flops, template, limit)
        rows.append(as_dict(found))
    head = {"schema": SCHEMA, "level": fitted.settings.level, **_origin(fitted)}
    answers = ("approach3", "approach2") if args.flops else ("loss",)
    code = 0 if any(row[key] for row in rows for key in answers) else 3
    if args.json:
        units = [row | {"loss_unit": tables.UNIT if row["kind"] else None} for row in rows]
        write(json.dumps(head | {"predictions": units}, indent=2))
        return code
    at = f" at C = {labels.flops(args.flops)} FLOPs" if args.flops else ": one run; FLOPs"
    say(
        f"{fitted.source.name}{at} ({labels.convention(fitted.conventions.flops)}); "
        f"N {labels.convention(fitted.conventions.params)}; {head['level']:.0%} intervals"
    )
    show(tables.predictions(rows) if args.flops else tables.run_predictions(rows))
    for row in rows:
        for note in (row.get("launch") or {"notes": []})["notes"]:
            say(f"note {row['family']}: {note}", style="dim")
    show_warnings({"families": {row["family"]: {"warnings": row["findings"]} for row in rows}})
    return code


def _origin(fitted: "Fit") -> dict[str, Any]:
    from prime_jax.scaling.schema import as_dict

    return {key: as_dict(getattr(fitted, key)) for key in ("source", "metric", "conventions")}


@dataclass(frozen=True, kw_only=True)
class Design(OfFit):
    """Read DIR of `prime-jax fit` and choose the runs that reduce the uncertainty of N* at the target
    budget most per FLOP, every cell at least twice. --emit writes them as rows for `prime-jax sweep
    plan`. If the fit is not of a sweep directory, --emit also needs --sweep ROOT or --data.path.

    Exit code: 0 runs were chosen, 3 none is worth it (the output says why), 2 bad input."""

    EXAMPLES = (
        "prime-jax scaling design quickstart/fit --family prime --target 1e15 --budget 1e13 "
        "--emit next.json",
    )

    target: float = setting(
        REQUIRED, f"compute budget at which N* should be known: {BUDGET}", above=0, metavar="C"
    )
    budget: float = setting(
        REQUIRED, "FLOPs that all new runs together may use", above=0, metavar="C"
    )
    family: str | None = setting(
        None, "family to design for; required if the fit has several", metavar="F"
    )
    emit: Path | None = setting(None, "file for the rows, as JSON", metavar="FILE")
    least_gain: float = setting(
        0.05,
        "stop when the next runs, repeated for the whole budget, would lower the standard deviation by a smaller fraction",
        above=0,
        metavar="FRACTION",
    )


def design(args: Design) -> int:
    from prime_jax import scaling
    from prime_jax.runtime import outputs
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import labels, record, tables
    from prime_jax.scaling.designs import REPEATS, merged
    from prime_jax.scaling.schema import as_dict

    if args.emit:
        read = [args.fit / record.FIT, args.fit / record.POINTS]
        read += outputs.of_sweep(args.sweep) if args.sweep else []
        outputs.refuse_overwrite(read, [args.emit])
    name = args.family or _only(record.families(args.fit))
    fitted = scaling.load(args.fit, [name])
    template = args.template(fitted, name)
    if args.emit:
        _check_launch(args, fitted, template)
    cells = _Launcher(template) if args.emit or template.known else None
    snap = {"snap": functools.cache(cells.snap)} if cells else {}
    found = scaling.design(
        fitted, name, args.target, args.budget, least_gain=args.least_gain, **snap
    )
    # Above every seed of the data, so that no run is one that exists.
    seed = max(record.seeds(fitted.table), default=-1) + 1
    rows = [_row(row) for row in cells.rows(merged(found), seed)] if cells else []
    if args.emit and rows:
        write_json_atomic(args.emit, rows)
    if args.json:
        head = {"schema": SCHEMA, "notes": list(template.notes), **_origin(fitted)}
        write(json.dumps(head | as_dict(found) | {"cost": found.cost, "rows": rows}, indent=2))
        return 0 if found.picks else 3
    say(
        f"{fitted.source.name}, {found.family}: runs for {labels.flops(found.flops_budget)} FLOPs "
        f"({labels.convention(fitted.conventions.flops)}) that tell most about N* "
        f"({labels.convention(fitted.conventions.params)}) at {labels.flops(found.target)}"
    )
    show(tables.design(as_dict(found), REPEATS))
    for note in template.notes if args.emit or template.known else ():
        say(f"note {note}", style="dim")
    if args.emit and found.picks:
        say(f"{args.emit}: written; next: prime-jax sweep plan {shlex.quote(str(args.emit))} ROOT")
    return 0 if found.picks else 3


class _Launcher:
    """Cells as they can be run, and the shapes of those that were looked at."""

    def __init__(self, template: "Template"):
        self.template = template
        self.shapes: dict[Cell, Any] = {}

    def snap(self, cell: "Cell") -> "Cell | None":
        from prime_jax.scaling import launchable
        from prime_jax.scaling.designs import Cell

        try:
            shape = launchable.shape_near(self.template, cell.params)
            row = launchable.rows(self.template, cell.flops, shape, [0])[0]
        except UserError:
            return None
        tokens = row.steps * row.batch_size * self.template.config.data.seq_len
        exact = Cell(cell.flops, float(launchable.count(self.template, shape)), float(tokens))
        self.shapes[exact] = shape
        return exact

    def rows(self, cells: "Sequence[tuple[Cell, int]]", seed: int) -> "list[Row]":
        from prime_jax.scaling import launchable

        out = []
        for cell, repeats in cells:
            seeds = range(seed, seed + repeats)
            out += launchable.rows(self.template, cell.flops, self.shapes[cell], list(seeds))
        return out


def _only(families: Sequence[str]) -> str:
    families = list(families)
    if len(families) > 1:
        raise UserError(f"--family is required: the fit has {', '.join(families)}")
    return families[0]


def _check_launch(args: Design, fitted: "Fit", template: "Template") -> None:
    """Raises UserError if rows would have to guess what they train on, or what they are."""
    from prime_jax.config import FAMILIES

    given = [word.partition("=")[0] for word in args.overrides]
    if not template.known and "--data.path" not in given:
        raise UserError(
            f"--emit: {fitted.source.name} does not say what its runs trained on; give --sweep ROOT, "
            "or --data.path (and --model.vocab-size, --data.seq-len where they are not the default)"
        )
    if not template.known and not args.kind and template.label not in FAMILIES:
        raise UserError(
            f"--emit: {template.label!r} is no family of runs; say --as arm, mdm or prime"
        )


def _row(row: "Row") -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(row).items() if k != "problem"}
