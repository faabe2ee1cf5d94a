"""`prime-jax scaling design`."""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.cli import fit as fit_commands
from prime_jax.cli import fit_options
from prime_jax.errors import UserError

if TYPE_CHECKING:
    from prime_jax.scaling.designs import Cell
    from prime_jax.scaling.launchable import Template
    from prime_jax.scaling.library import Fit
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
    import json

    from rich.console import Console

    from prime_jax import scaling
    from prime_jax.runtime import outputs
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import labels, record, tables
    from prime_jax.scaling.designs import MIN_GAIN, REPEATS, merged
    from prime_jax.scaling.schema import as_dict

    if args.emit:
        read = [args.fit / record.FIT, args.fit / record.POINTS]
        outputs.refuse_overwrite(
            [*read, *(outputs.of_sweep(args.sweep) if args.sweep else ())], [args.emit]
        )
    name = args.family or _only(record.families(args.fit))
    fitted = scaling.load(args.fit, [name])
    template = fit_options.template(args, fitted, name)
    if args.emit:
        _check_launch(args, fitted, template)
    cells = _Launcher(template) if args.emit or template.known else None
    least = MIN_GAIN if args.least_gain is None else args.least_gain
    snap = {"snap": functools.cache(cells.snap)} if cells else {}
    found = scaling.design(fitted, name, args.target, args.budget, least_gain=least, **snap)
    # Above every seed of the data, so that no run is one that exists.
    seed = max(record.seeds(fitted.table), default=-1) + 1
    rows = [_row(row) for row in cells.rows(merged(found), seed)] if cells else []
    if args.emit and rows:
        write_json_atomic(args.emit, rows)
    if args.json:
        head = {"schema": SCHEMA, "notes": list(template.notes)}
        head |= {key: as_dict(getattr(fitted, key)) for key in ("source", "metric", "conventions")}
        print(json.dumps(head | as_dict(found) | {"cost": found.cost, "rows": rows}, indent=2))
        return 0 if found.picks else 3
    console = Console()
    console.print(
        f"{fitted.source.name}, {found.family}: runs for {labels.flops(found.flops_budget)} FLOPs "
        f"({labels.convention(fitted.conventions.flops)}) that tell most about N* "
        f"({labels.convention(fitted.conventions.params)}) at {labels.flops(found.target)}",
        highlight=False,
    )
    fit_commands.show(console, tables.design(as_dict(found), REPEATS))
    for note in template.notes if args.emit or template.known else ():
        console.print(f"[dim]note[/] {note}", highlight=False)
    if args.emit and found.picks:
        console.print(
            f"{args.emit}: written; next: prime-jax sweep plan {args.emit} ROOT",
            soft_wrap=True,
            highlight=False,
        )
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


def _check_launch(args: argparse.Namespace, fitted: "Fit", template: "Template") -> None:
    """Raises UserError if rows would have to guess what they train on, or what they are."""
    from prime_jax.config import FAMILIES

    given = [word.partition("=")[0] for word in args.rest]
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
    import dataclasses

    return {k: v for k, v in dataclasses.asdict(row).items() if k != "problem"}
