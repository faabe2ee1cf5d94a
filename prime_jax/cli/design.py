"""`prime-jax scaling design`."""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.cli import fit_options
from prime_jax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from prime_jax.scaling.design import Cell, Design
    from prime_jax.scaling.launchable import Template
    from prime_jax.scaling.saved import Saved
    from prime_jax.sweep.grid import Row

SCHEMA = 1
DESCRIPTION = """\
Reads DIR of `prime-jax fit` and chooses the runs that make N* at the target budget best known for
the FLOPs they cost, every cell at least twice. With --emit, writes them as rows for
`prime-jax sweep plan`; where the fit is not of a sweep directory, --sweep ROOT or --data.path
is then required.

Exit code: 0 runs were chosen, 3 none is worth it (the output says why), 2 bad input.
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = fit_options.parser(
        commands, "design", "which runs to train next, as rows for `sweep plan`", DESCRIPTION
    )
    parser.add_argument(
        "--target",
        type=fit_options.positive,
        required=True,
        metavar="C",
        help="the budget at which N* is to be known, FLOPs (required)",
    )
    parser.add_argument(
        "--budget",
        type=fit_options.positive,
        required=True,
        metavar="C",
        help="FLOPs that all new runs together may cost (required)",
    )
    parser.add_argument("--family", metavar="F", help="required where the fit has several")
    parser.add_argument("--emit", type=Path, metavar="FILE", help="write the rows there, as JSON")
    parser.add_argument(
        "--least-gain",
        type=fit_options.positive,
        metavar="SHARE",
        help="stop where all FLOPs, at the next runs' rate, would lower the sd by less (0.05)",
    )
    parser.set_defaults(run=run, overridable=True)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from prime_jax.runtime import outputs
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import design, saved

    if args.emit:
        read = [args.fit / "fit.json", args.fit / saved.POINTS]
        outputs.refuse_overwrite(
            [*read, *(outputs.of_sweep(args.sweep) if args.sweep else ())], [args.emit]
        )
    fitted = saved.read(args.fit)
    name = args.family or _only(fitted)
    template = fit_options.template(args, fitted, name)
    if args.emit:
        _check_launch(args, fitted, template)
    exact = bool(args.emit) or template.known
    cells = _Launcher(template) if exact else None
    least = design.MIN_GAIN if args.least_gain is None else args.least_gain
    snap = {"snap": functools.cache(cells.snap)} if cells else {}
    found = design.choose(
        fitted.refit(name), fitted.settings, args.target, args.budget, least_gain=least, **snap
    )
    rows = cells.rows(design.merged(found), _next_seed(fitted)) if cells else []
    if args.emit and rows:
        write_json_atomic(args.emit, [_row(row) for row in rows])
    if args.json:
        _print_json(found, fitted, template, rows)
    else:
        _show(found, fitted, template, args, Console())
    return 0 if found.picks else 3


class _Launcher:
    """Cells as they can be run, and the shapes of those that were looked at."""

    def __init__(self, template: "Template"):
        self.template = template
        self.shapes: dict[Cell, Any] = {}

    def snap(self, cell: "Cell") -> "Cell | None":
        from prime_jax.scaling import design, launchable

        try:
            shape = launchable.shape_near(self.template, cell.params)
            row = launchable.rows(self.template, cell.flops, shape, [0])[0]
        except UserError:
            return None
        tokens = row.steps * row.batch_size * self.template.config.data.seq_len
        exact = design.Cell(
            cell.flops, float(launchable.count(self.template, shape)), float(tokens)
        )
        self.shapes[exact] = shape
        return exact

    def rows(self, cells: "Sequence[tuple[Cell, int]]", seed: int) -> "list[Row]":
        from prime_jax.scaling import launchable

        out = []
        for cell, repeats in cells:
            seeds = range(seed, seed + repeats)
            out += launchable.rows(self.template, cell.flops, self.shapes[cell], list(seeds))
        return out


def _only(fitted: "Saved") -> str:
    families = list(fitted.runs.families)
    if len(families) > 1:
        raise UserError(f"--family is required: the fit has {', '.join(families)}")
    return families[0]


def _check_launch(args: argparse.Namespace, fitted: "Saved", template: "Template") -> None:
    """Raises UserError if rows would have to guess what they train on, or what they are."""
    from prime_jax.config import FAMILIES

    given = [word.partition("=")[0] for word in args.rest]
    if not template.known and "--data.path" not in given:
        raise UserError(
            f"--emit: {fitted.runs.source} does not say what its runs trained on; give --sweep ROOT, "
            "or --data.path (and --model.vocab-size, --data.seq-len where they are not the default)"
        )
    if not template.known and not args.kind and template.label not in FAMILIES:
        raise UserError(
            f"--emit: {template.label!r} is no family of runs; say --as arm, mdm or prime"
        )


def _next_seed(fitted: "Saved") -> int:
    """Above every seed of the data, so that no run is one that exists."""
    return max(fitted.seeds, default=-1) + 1


def _row(row: "Row") -> dict[str, Any]:
    import dataclasses

    return {k: v for k, v in dataclasses.asdict(row).items() if k != "problem"}


def _print_json(found: "Design", fitted: "Saved", template: "Template", rows: "list[Row]") -> None:
    import dataclasses
    import json

    head = {"schema": SCHEMA, "notes": list(template.notes)}
    head |= {name: fitted.result[name] for name in ("source", "metric", "conventions")}
    body = dataclasses.asdict(found) | {"cost": found.cost, "rows": [_row(row) for row in rows]}
    print(json.dumps(head | body, indent=2))


def _show(
    found: "Design",
    fitted: "Saved",
    template: "Template",
    args: argparse.Namespace,
    console: "Console",
) -> None:
    from prime_jax.scaling import labels

    conventions = fitted.result["conventions"]
    console.print(
        f"{fitted.runs.source}, {found.family}: runs for {labels.flops(found.flops_budget)} FLOPs "
        f"({labels.convention(conventions['flops'])}) that tell most about N* "
        f"({labels.convention(conventions['params'])}) at {labels.flops(found.target)}",
        highlight=False,
    )
    if found.picks:
        console.print(_table(found))
    for line in _summary(found):
        console.print(line, highlight=False)
    for note in template.notes if args.emit or template.known else ():
        console.print(f"[dim]note[/] {note}", highlight=False)
    if args.emit and found.picks:
        console.print(
            f"{args.emit}: written; next: prime-jax sweep plan {args.emit} ROOT",
            soft_wrap=True,
            highlight=False,
        )


def _table(found: "Design") -> "Table":
    from rich import box
    from rich.table import Table

    from prime_jax.scaling import design, labels

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("C of a run", "N", "D", "runs", "FLOPs", "sd of log N* after"):
        table.add_column(name, justify="right")
    for pick in found.picks:
        cell = pick.cell
        table.add_row(
            labels.flops(cell.flops),
            labels.count(cell.params),
            labels.count(cell.tokens),
            str(design.REPEATS),
            labels.flops(pick.cost),
            f"{pick.sd:.3g}",
        )
    return table


def _summary(found: "Design") -> list[str]:
    from prime_jax.scaling import labels

    lines = [
        f"cost      {labels.flops(found.cost)} of {labels.flops(found.flops_budget)} FLOPs; {found.stop}",
        f"sd        of log N*: {found.sd_before:.3g} now (bootstrap {found.sd_bootstrap:.3g}), "
        f"{found.sd_after:.3g} with these runs",
    ]
    if found.model_sd is None:
        lines.append(
            "model     too few budgets for a rollout: the error of the law itself is not known"
        )
    else:
        lines.append(
            f"model     the law itself is off by {found.model_sd:.3g} in log N* (rollout, beyond noise)"
        )
    before, after = found.bias_before, found.bias_after
    if before is None or after is None:
        lines.append("approach 2 has fewer than three budgets with their optimum inside the sizes")
    else:
        lines.append(
            f"approach 2 on this grid misses N* by {before:+.1%} now, by {after:+.1%} with these "
            "runs (parabolas on lopsided sizes; approach 3 does not)"
        )
    return lines
