"""`prime-jax fit`: from runs to numbers, figures and a report."""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.errors import UserError
from prime_jax.runtime import outputs, storage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from prime_jax.scaling.columns import Choice
    from prime_jax.scaling.settings import Settings

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


def choice_of(args: argparse.Namespace) -> "Choice":
    from prime_jax.scaling.columns import Choice

    return Choice(args.metric, args.flops, args.params, args.allow_mixed_kinds)


def settings_of(args: argparse.Namespace) -> "Settings":
    from prime_jax.scaling.settings import Settings

    return Settings(
        args.bootstrap,
        args.seed,
        delta=args.delta,
        objective=args.objective,
        approach2=args.approach2,
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from prime_jax.scaling import curves, fit, plots, points, record, saved

    console = Console()
    choice = choice_of(args)
    out = args.out or default_out(args.runs)
    spare(args, out, ("fit.json", saved.POINTS), plots.NAMES)
    data, logs = curves.read(args.runs, args.curves, args.metric)
    if args.note:
        data = dataclasses.replace(data, source=f"{data.source} ({args.note})")
    runs = points.select(data, choice)
    lines = curves.join(logs, data, runs, asked=bool(args.curves)) if logs else None
    settings = settings_of(args)
    with console.status("fitting") as status:
        fitted = fit.fit_runs(runs, settings, lambda name: status.update(f"fitting {name}"), lines)
        result = record.as_dict(fitted)
        saved.write(make(out), result, data, runs, _templates(args.runs))
    _print(console, result)
    with console.status("drawing"):
        pictures = _draw(fitted, out)
    for path in pictures:
        console.print(f"figure  {path}", soft_wrap=True, highlight=False)
    console.print(f"report  {out / 'report.html'}", soft_wrap=True, highlight=False)
    return 3 if fitted.refused else 0


def _templates(source: Path) -> dict[str, Any]:
    """What new runs of each family would share with those of a sweep; a CSV does not say."""
    from prime_jax.scaling import launchable

    return launchable.of_sweep(source) if source.is_dir() else {}


def default_out(source: Path) -> Path:
    """RUNS/fit for a sweep; beside a CSV, or here for a bucket, its name and `-fit`."""
    if storage.is_remote(source):
        return Path(f"{source.stem}-fit")
    return source / "fit" if source.is_dir() else source.with_name(f"{source.stem}-fit")


def _draw(fitted: Any, out: Path) -> list[Path]:
    """Write figures and report; returns the PNG files."""
    from prime_jax.scaling import plots, report

    try:
        paths = plots.publish(plots.draw_all(fitted, complain), plots.NAMES, out, complain)
        report.write(out)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error
    return [path for (_, suffix), path in paths.items() if suffix == "png"]


def complain(text: str) -> None:
    """One line about what is missing beside the numbers."""
    print(f"prime-jax: {text}", file=sys.stderr)


def spare(
    args: argparse.Namespace, out: Path, files: Iterable[str], figures: Iterable[str]
) -> None:
    """Refuse a directory in which the runs or the curves would be overwritten.

    Raises:
        UserError: names the file.
    """
    from prime_jax.scaling import plots

    given = [source for source in (args.runs, getattr(args, "curves", None)) if source]
    read = [part for g in given for part in (outputs.of_sweep(g) if g.is_dir() else [g])]
    pictures = [f"{name}.{suffix}" for name in figures for suffix in plots.FORMATS]
    outputs.refuse_overwrite(read, [out / name for name in (*files, "report.html", *pictures)])


def make(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror}") from error
    return out


def _replicates(value: str) -> int:
    """Percentile intervals of 95 % need some replicates in their tails."""
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 100:
        raise argparse.ArgumentTypeError(f"{value!r}: a whole number, 100 or more")
    return number


def print_head(console: "Console", result: dict[str, Any]) -> None:
    """What was read, and in which conventions."""
    from prime_jax.scaling import labels

    conventions = result["conventions"]
    console.print(
        f"{result['source']['name']}: {result['metric']}; N {labels.convention(conventions['params'])}, "
        f"FLOPs {labels.convention(conventions['flops'])}; {result['method']['level']:.0%} intervals",
        highlight=False,
    )


def print_warnings(console: "Console", where: str, warnings: list[dict[str, Any]]) -> None:
    """One line for each; `where` stands before its message."""
    for item in warnings:
        colour, word = ("red", "refused") if item["refusal"] else ("yellow", "warning")
        console.print(f"[{colour}]{word}[/] {where}{item['message']}", highlight=False)


def _print(console: "Console", result: dict[str, Any]) -> None:
    print_head(console, result)
    console.print(_summary(result))
    print_warnings(console, "", result["warnings"])
    for name, family in result["families"].items():
        print_warnings(console, f"{name}: ", family["warnings"])
    if result["excluded"]:
        console.print(f"left out: {len(result['excluded'])}; the report says why", highlight=False)


def _summary(result: dict[str, Any]) -> "Table":
    """A column for each family."""
    from rich import box
    from rich.table import Table

    families = result["families"]
    summary = Table("", *families, box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [_cells(family) for family in families.values()]
    for name in columns[0]:
        summary.add_row(name, *(column[name] for column in columns))
    return summary


def _cells(family: dict[str, Any]) -> dict[str, str]:
    from prime_jax.scaling import labels

    three, two = family["approach3"], family["approach2"]
    out = {"kind of loss": labels.kind(family["kind"]), "runs": str(family["runs"])}
    names = ("E", "alpha", "beta", "a, approach 3")
    if three["params"] is None:
        out |= dict.fromkeys(names, "refused")
    else:
        values = {**three["params"], "a": three["a"]}
        for name in names:
            key = name.split(",")[0]
            out[name] = _with(values[key], three["intervals"][key], labels.value)
    for name, part in (
        ("a, approach 2", two),
        ("  de-biased", two["debiased"] or {"a": None}),
        ("a, approach 1", family["approach1"]),
    ):
        refused = part["a"] is None
        out[name] = "refused" if refused else _with(part["a"], part["intervals"]["a"], labels.value)
    if (
        family["approach1"]["warnings"][:1]
        and family["approach1"]["warnings"][0]["code"] == "no_curves"
    ):
        out["a, approach 1"] = "no curves"
    best = three["optima"][-1] if three["params"] else None
    out["largest C"] = labels.flops(family["budgets"][-1])
    for quantity, name, show, digits in (
        ("params", "N* there", labels.count, 2),
        ("tokens", "D* there", labels.count, 2),
        ("loss", "loss there", labels.value, 3),
    ):
        ends = best["intervals"][quantity] if best else None
        out[name] = _with(best[quantity], ends, show, digits) if best else "refused"
    known = family["rollout"] and family["rollout"]["steps"]
    out["held-out loss error"] = (
        "{bias:+.1%} on average, {rms:.1%} rms".format(**family["rollout"])
        if known
        else "not known"
    )
    out["warnings"] = str(len(family["warnings"]))
    return out


def _with(value: float, ends: list[float] | None, show: Any, digits: int = 2) -> str:
    between = f" ({show(ends[0], digits)}–{show(ends[1], digits)})" if ends else " (no interval)"
    return f"{show(value, 3)}{between}"
