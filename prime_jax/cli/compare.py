"""`prime-jax scaling compare` and `prime-jax scaling validate`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.cli import fit as fit_commands
from prime_jax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from prime_jax.scaling.points import Runs
    from prime_jax.scaling.settings import Settings

MAX_ROWS = 40  # of the printed table of a rollout; validate.json has all
COMPARE = """\
Compares families with a baseline, all of them resampled together on the sizes and budgets that
they share: the compute multiplier m (how many times the compute of the baseline a family needs for
the same loss) as a curve with a band, from the fitted laws and between the optima of the budgets;
how probable it is at each budget that a family is the lower one; and whether exponents or E differ.
An m that uses a frontier beyond its data is an extrapolation and says so.

Families measured with different kinds of number (nll, nelbo / train_loss), tokenizers or evaluation
sets are refused unless --allow-mixed-kinds; then every result says what is mixed.

Exit code: 0 compared, 3 something was refused (compare.json says what and why), 2 bad input.
"""
VALIDATE = """\
Fits on the smallest budgets, predicts the rest, adds a budget, and so on: the signed error of
predictions of larger budgets, which no bootstrap sees.

Exit code: 0 validated, 3 for no family are there enough budgets, 2 bad input.
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "compare",
        help="families against a baseline: compute multiplier, tests, probability per budget",
        description=COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fit_commands.add_options(parser)
    parser.add_argument("--baseline", required=True, metavar="F", help="a family (required)")
    parser.add_argument("--against", nargs="+", default=[], metavar="F", help="default: the others")
    parser.set_defaults(run=compare)
    parser = commands.add_parser(
        "validate",
        help="predict the larger budgets from the smaller ones: signed errors",
        description=VALIDATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fit_commands.add_options(parser)
    parser.set_defaults(run=validate)


def compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import compare_record, labels
    from prime_jax.scaling.compare import compare

    console = Console(width=max(labels.WIDTH, Console().width))
    out = args.out or fit_commands.default_out(args.runs)
    fit_commands.spare(args, out, ("compare.json",), ("multiplier",))
    runs, settings = _read(args)
    with console.status("comparing") as status:
        found = compare(runs, args.baseline, args.against, settings, status.update)
    result = compare_record.as_dict(found)
    write_json_atomic(fit_commands.make(out) / "compare.json", result)
    fit_commands.print_head(console, result)
    for name, family in result["families"].items():
        _print_family(console, name, family, result)
    for path in (out / "compare.json", *_draw(result, list(runs.families), out)):
        console.print(f"wrote  {path}", soft_wrap=True, highlight=False)
    return 3 if found.refused else 0


def _draw(result: dict[str, Any], families: list[str], out: Path) -> list[Path]:
    """The figure, and the report of the fit if one lies there; returns what was written."""
    from prime_jax.scaling import figures, report

    try:
        drawn = figures.draw_comparison(result, families, fit_commands.complain)
        paths = figures.publish(drawn, ("multiplier",), out, fit_commands.complain)
        reports = [out / "report.html"] if report.refresh(out) else []
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error
    return [path for (_, suffix), path in paths.items() if suffix == "png"] + reports


def validate(args: argparse.Namespace) -> int:
    from rich.console import Console

    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import labels, record, validate

    console = Console(width=max(labels.WIDTH, Console().width))
    out = args.out or fit_commands.default_out(args.runs)
    fit_commands.spare(args, out, ("validate.json",), ())
    runs, settings = _read(args)
    families = {}
    with console.status("validating") as status:
        for name, points in runs.families.items():
            status.update(f"validating {name}")
            families[name] = validate.report(points, settings)
    result = {"schema": validate.SCHEMA, **record.origin(runs, settings), "families": families}
    path = fit_commands.make(out) / "validate.json"
    write_json_atomic(path, result)
    fit_commands.print_head(console, result)
    for name, family in families.items():
        rows = sum(len(step["budgets"]) for step in family["steps"])
        if rows:
            console.print((_steps if rows <= MAX_ROWS else _distances)(name, family))
        fit_commands.print_warnings(console, f"{name}: ", family["warnings"])
    console.print(f"wrote  {path}", soft_wrap=True, highlight=False)
    return 0 if any(family["steps"] for family in families.values()) else 3


def _read(args: argparse.Namespace) -> "tuple[Runs, Settings]":
    from prime_jax.scaling import points, table

    runs = points.select(table.read(args.runs), fit_commands.choice_of(args))
    return runs, fit_commands.settings_of(args)


def _print_family(
    console: "Console", name: str, family: dict[str, Any], result: dict[str, Any]
) -> None:
    base = result["baseline"]["family"]
    if "multiplier" in family:
        console.print(_multipliers(name, base, family, result["method"]["bootstrap"]))
        console.print(_tests(name, base, family))
    fit_commands.print_warnings(console, f"{name}: ", family["warnings"])


def _multipliers(name: str, base: str, family: dict[str, Any], replicates: int) -> "Table":
    from rich import box
    from rich.table import Table

    from prime_jax.scaling import labels

    title = f"{name} against {base}: compute of {name} / of {base} for one loss; P({name} lower)"
    if family["mixed"]:
        title += "\n[red]mixed kinds of number: no comparison of models[/]"
    columns = ("C", "spent by", "multiplier", "between optima", "range")
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("P lower")
    lower = {
        row["flops"]: labels.fraction(row["probability"], replicates) for row in family["lower"]
    }
    sides = (("at_family", name, f"{base} never"), ("at_baseline", base, f"{name} never"))
    for side, who, never in sides:
        for row in family["multiplier"][side]["budgets"]:
            table.add_row(
                labels.flops(row["flops"]),
                who,
                _with(row["value"], row["interval"], never),
                _with(row["interpolated"]["value"], row["interpolated"]["interval"], never)
                if row["interpolated"]
                else "",
                "in range" if row["in_range"] else "[yellow]extrapolated[/]",
                lower[row["flops"]],
            )
    return table


def _tests(name: str, base: str, family: dict[str, Any]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    for number in (3, 2):
        found = family["exponents"][f"approach{number}"]
        if found:
            ends = found["interval"]
            shown = f" ({ends[0]:+.3f} to {ends[1]:+.3f})" if ends else " (no interval)"
            verdict = (
                "differ significantly" if found["significant"] else "do not differ significantly"
            )
            label = f"a less {base}'s, approach {number}"
            table.add_row(label, f"{found['difference']:+.3f}{shown}", verdict)
    labels = {"exponents": "same alpha and beta?", "E": "same E?"}
    for key, test in family["tests"].items():
        table.add_row(labels[key], f"p = {test['p']:.2g}", f"{test['simulations']} simulations")
    return table


def _steps(name: str, family: dict[str, Any]) -> "Table":
    """A row for each step and held-out budget; errors as predicted / measured - 1."""
    from rich import box
    from rich.table import Table

    from prime_jax.scaling import labels

    columns = ("fitted up to", "predicted C", "decades", "runs", "loss, mean", "rms")
    table = Table(
        *columns,
        title=_error(name, family),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
    )
    for column in ("L*, appr. 3", "appr. 2", "N*, appr. 3", "appr. 2"):
        table.add_column(column)
    for step in family["steps"]:
        for k, row in enumerate(step["budgets"]):
            table.add_row(
                labels.flops(step["fitted"][-1]) if k == 0 else "",
                labels.flops(row["flops"]),
                f"{row['decades']:.2f}",
                str(row["runs"]),
                f"{row['mean']:+.2%}",
                f"{row['rms']:.2%}",
                *(
                    f"{row[approach][error]:+.1%}" if row[approach] and row["measured"] else ""
                    for error in ("loss_error", "params_error")
                    for approach in ("approach3", "approach2")
                ),
            )
    return table


def _distances(name: str, family: dict[str, Any]) -> "Table":
    """A row for each distance, where there are too many steps and budgets to show."""
    from rich import box
    from rich.table import Table

    columns = ("decades beyond the fitted budgets", "runs", "loss, mean", "rms")
    table = Table(
        *columns,
        title=_error(name, family),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
    )
    for row in family["by_distance"]:
        end = f" to {row['to']:g}" if row["to"] else " and more"
        cells = (str(row["runs"]), f"{row['mean']:+.2%}", f"{row['rms']:.2%}")
        table.add_row(f"{row['from']:g}{end}", *cells)
    return table


def _error(name: str, family: dict[str, Any]) -> str:
    return (
        f"{name}: held-out loss {family['bias']:+.1%} on average, {family['rms']:.1%} rms, "
        f"{family['per_decade']:.1%} for each decade of extrapolation"
    )


def _with(value: float | None, ends: list[float | None] | None, never: str) -> str:
    if value is None:
        return never
    if ends is None:
        return f"{value:.3g} (none)"
    low, high = ("…" if end is None else f"{end:.3g}" for end in ends)
    return f"{value:.3g} ({low}–{high})"
