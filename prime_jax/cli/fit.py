"""`prime-jax fit`: from runs to numbers, figures and a report."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.runtime import outputs, storage

if TYPE_CHECKING:
    from rich.console import Console

    from prime_jax.scaling.tables import Table

DESCRIPTION = """\
Fit scaling laws to finished runs: approach 1 (envelope of training curves), approach 2
(IsoFLOP parabolas) and approach 3 (L = E + A/N^alpha + B/D^beta) for each family, with
intervals, figures and a report.

RUNS_OR_CSV is a sweep directory, or any CSV with the columns family, loss and two of
flops, params, tokens (the third is then C = 6 N D), and optionally kind (nll, nelbo,
train_loss), loss_se, budget, run, seed, status, reason, step, epochs, unique_tokens, given, tokenizer, eval_set.

Exit code: 0 fitted, 3 fitted but something was refused (fit.json and the report say
what and why), 2 bad input.
"""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "fit",
        help="fit scaling laws to a sweep or a CSV: table, fit.json, figures, report.html",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument(
        "--curves",
        type=Path,
        metavar="FILE",
        help="training curves for approach 1 (a sweep has its own): a CSV with the columns run, step or tokens, loss, or a chart as W&B exports it; RUNS_OR_CSV has a row for each run",
    )
    parser.set_defaults(run=run, note="")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every command on RUNS_OR_CSV takes."""
    parser.add_argument(
        "runs",
        type=storage.path,
        metavar="RUNS_OR_CSV",
        help="the directory of a sweep, or a CSV with a row per run",
    )
    parser.add_argument(
        "--metric",
        default="best-valid",
        help="best-valid (exact NLL of arm, sub-token NELBO otherwise) or an estimator of the runs",
    )
    parser.add_argument("--flops", choices=("matmul", "reference"), help="how FLOPs are counted")
    parser.add_argument(
        "--params",
        choices=("total", "nonembedding", "nonembedding_plus_head", "reference"),
        help="which parameters N counts",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: RUNS/fit, or CSV's name + -fit"
    )
    parser.add_argument(
        "--formats",
        type=_formats,
        default=("svg",),
        metavar="F,F",
        help="of the figures: svg (the report needs it) and, besides, png or pdf",
    )
    parser.add_argument("--bootstrap", type=_replicates, default=1000, help="replicates (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument(
        "--objective",
        choices=("huber", "ls"),
        default="huber",
        help="of approach 3, on log residuals: Huber (default) or least squares",
    )
    parser.add_argument(
        "--delta", type=float, default=1e-3, help="log residual from which Huber is linear (0.001)"
    )
    parser.add_argument(
        "--approach2",
        choices=("parabola", "akima"),
        default="parabola",
        help="the curve through the losses of one budget (parabola)",
    )
    parser.add_argument(
        "--allow-mixed-kinds",
        action="store_true",
        help="fit and draw losses of different kinds together; every figure says so",
    )


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the library's functions."""
    return {
        "metric": args.metric,
        "flops": args.flops,
        "params": args.params,
        "allow_mixed_kinds": args.allow_mixed_kinds,
        "replicates": args.bootstrap,
        "seed": args.seed,
        "delta": args.delta,
        "objective": args.objective,
        "approach2": args.approach2,
    }


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from prime_jax import scaling
    from prime_jax.scaling import figures, record, tables

    console = Console()
    out = args.out or default_out(args.runs)
    spare(args, out, (record.FIT, record.POINTS), figures.NAMES)
    with console.status("fitting") as status:
        fitted = scaling.fit(
            args.runs, curves=args.curves, note=args.note, progress=status.update, **options(args)
        )
        result = record.write(fitted, out)
    print_head(console, result)
    show(console, tables.summary(result))
    print_warnings(console, result)
    if result["excluded"]:
        console.print(f"left out: {len(result['excluded'])}; the report says why", highlight=False)
    with console.status("drawing"):
        written = fitted.draw(out, args.formats, complain)
    print_paths(console, written)
    return 3 if fitted.refused else 0


def default_out(source: Path) -> Path:
    """RUNS/fit for a sweep; beside a CSV, or here for a bucket, its name and `-fit`."""
    if storage.is_remote(source):
        return Path(f"{source.stem}-fit")
    return source / "fit" if source.is_dir() else source.with_name(f"{source.stem}-fit")


def complain(text: str) -> None:
    """One line about what is missing beside the numbers."""
    print(f"prime-jax: {text}", file=sys.stderr)


def spare(args: argparse.Namespace, out: Path, files: Iterable[str], names: Iterable[str]) -> None:
    """Refuse a directory in which the runs or the curves would be overwritten.

    Raises:
        UserError: names the file.
    """
    from prime_jax.scaling import drawing

    given = [source for source in (args.runs, getattr(args, "curves", None)) if source]
    read = [part for g in given for part in (outputs.of_sweep(g) if g.is_dir() else [g])]
    pictures = [f"{name}.{suffix}" for name in names for suffix in drawing.FORMATS]
    outputs.refuse_overwrite(read, [out / name for name in (*files, "report.html", *pictures)])


def _replicates(value: str) -> int:
    """Percentile intervals of 95 % need some replicates in their tails."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 100:
        raise argparse.ArgumentTypeError(f"{value!r}: a whole number, 100 or more")
    return number


def _formats(value: str) -> tuple[str, ...]:
    known, given = ("svg", "png", "pdf"), tuple(value.split(","))
    if not set(given) <= set(known):
        raise argparse.ArgumentTypeError(f"{value!r}: some of {', '.join(known)}")
    return given


def print_head(console: "Console", result: dict[str, Any]) -> None:
    """What was read, and in which conventions."""
    from prime_jax.scaling import labels

    conventions = result["conventions"]
    console.print(
        f"{result['source']['name']}: {result['metric']}; N {labels.convention(conventions['params'])}, "
        f"FLOPs {labels.convention(conventions['flops'])}; {result['method']['level']:.0%} intervals",
        highlight=False,
    )


def print_warnings(console: "Console", result: dict[str, Any]) -> None:
    """One line for each."""
    from prime_jax.scaling import tables

    for line in tables.warnings_of(result):
        word, _, rest = line.partition(" ")
        colour = {"refused": "red", "warning": "yellow"}[word]
        console.print(f"[{colour}]{word}[/] {rest}", highlight=False)


def print_paths(console: "Console", written: Sequence[Path]) -> None:
    for path in written:
        what = "report" if path.suffix == ".html" else "figure"
        console.print(f"{what}  {path}", soft_wrap=True, highlight=False)


def show(console: "Console", table: "Table") -> None:
    """A table of `scaling.tables` in the terminal."""
    from rich import box
    from rich.table import Table as Drawn

    from prime_jax.scaling.tables import Cell

    drawn = Drawn(
        *table.head,
        title=table.title or None,
        title_justify="left",
        show_header=any(table.head),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for row in table.rows:
        strong = [isinstance(cell, Cell) and cell.strong for cell in row]
        cells = zip(map(str, row), strong, strict=True)
        drawn.add_row(*(f"[yellow]{cell}[/]" if noted else cell for cell, noted in cells))
    if table.rows:
        console.print(drawn)
    for note in table.notes:
        console.print(note, highlight=False)
