"""`prime-jax analyse`: spectra, attention, noise, bits."""

import argparse
import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.cli import runs
from prime_jax.cli.runs import RUN
from prime_jax.errors import UserError

if TYPE_CHECKING:
    from prime_jax.analyse.subjects import Subject

SCHEMA = 1
DESCRIPTION = """\
Look inside finished runs. Each analysis writes NAME.json (with units and what it was
measured on), NAME.csv (a row per number) and figures (svg, png, pdf) into --out, by default
RUN/analysis of the first run. Several runs are drawn side by side.
"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "analyse",
        help="spectra of weights, attention, loss by noise level and by sub-token",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(metavar="WHAT", required=True)

    def add(name: str, run: Any, summary: str, examples: int = 0) -> argparse.ArgumentParser:
        one = kinds.add_parser(name, help=summary, description=summary)
        one.add_argument("runs", nargs="+", metavar="RUN", help=RUN)
        one.add_argument(
            "--out", type=Path, metavar="DIR", help="default: RUN/analysis of the first run"
        )
        if examples:
            one.add_argument(
                "--examples",
                type=_positive,
                default=examples,
                help=f"blocks of the validation split ({examples})",
            )
            one.add_argument(
                "--data", type=Path, metavar="DIR", help="another dataset that was prepared"
            )
        one.set_defaults(run=run)
        return one

    add("spectra", run_spectra, "singular values of the weight matrices, ranks, tail exponents")
    look = add(
        "attention", run_attention, "mean maps, sinks, band, entropy, by hidden fraction", 16
    )
    look.add_argument(
        "--ratios",
        type=_share,
        nargs="+",
        default=[0.1, 0.3, 0.5, 0.7, 0.9],
        metavar="U",
        help="fractions of hidden sub-tokens (0.1 0.3 0.5 0.7 0.9)",
    )
    noise = add("noise", run_noise, "where between noise and text the bound is paid", 64)
    noise.add_argument("--levels", type=_positive, default=16, help="noise levels, and steps (16)")
    bits = add("bits", run_bits, "cost and error of each sub-token of a token", 64)
    for one, default in ((noise, 2), (bits, 8)):
        one.add_argument(
            "--replicates",
            type=_positive,
            default=default,
            help=f"independent masks of every block ({default})",
        )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value


def run_spectra(args: argparse.Namespace) -> None:
    from prime_jax.analyse import figures, spectra

    found, out = _open(args)
    with _progress(0) as tick:
        rows, values = spectra.measure(found, tick)
    names = [subject.name for subject in found]
    with figures.styled():
        drawn = {
            "spectra": figures.spectra(rows, values, names),
            "spectra-by-layer": figures.spectra_by_layer(rows, names),
        }
    about = {
        "method": spectra.__doc__,
        "interval": spectra.LEVEL,
        "singular_values": {name: values[name].tolist() for name in values},
    }
    _write(out, name="spectra", found=found, rows=rows, about=about, drawn=drawn)
    medians = ["stable_rank", "effective_rank", "tail_exponent"]
    _show(rows, ["run", "matrix"], medians, "medians over layers")


def run_attention(args: argparse.Namespace) -> None:
    import numpy as np

    from prime_jax.analyse import attention, figures

    found, out = _open(args)
    rows, maps, abouts = [], {}, []
    with _progress(len(found) * len(args.ratios) * args.examples) as tick:
        for subject in found:
            part = attention.measure(subject, args.ratios, args.examples, tick)
            rows, maps, abouts = rows + part[0], maps | part[1], [*abouts, part[2]]
    drawn = {}
    with figures.styled():
        drawn["attention"] = figures.attention(rows, abouts)
        for k, subject in enumerate(found):
            ratios = sorted({row["hidden"] for row in rows if row["run"] == subject.name})
            ratio = ratios[len(ratios) // 2]
            length = subject.run.config.data.seq_len
            shown = maps[f"{subject.name}/{ratio:g}"]
            drawn[f"attention-maps-{k}"] = figures.maps(subject.name, ratio, shown, length)
    about = {"method": attention.__doc__, "band": attention.BAND, "measured": abouts}
    _write(out, name="attention", found=found, rows=rows, about=about, drawn=drawn)
    np.savez(out / "attention.npz", **maps)
    _show(rows, ["run", "hidden"], list(attention.STATISTICS), "medians over layers and heads")


def run_noise(args: argparse.Namespace) -> None:
    from prime_jax.analyse import figures, noise, subjects

    found, out = _open(args)
    subjects.diffusion_only(found, "analyse noise")
    rows, abouts = [], []
    sizes = (args.levels, args.examples, args.replicates)
    with _progress(sum(noise.batches(subject, *sizes) for subject in found)) as tick:
        for subject in found:
            part, about = noise.measure(subject, *sizes, tick)
            rows, abouts = rows + part, [*abouts, about]
    with figures.styled():
        drawn = {"noise": figures.noise(rows, [subject.name for subject in found])}
    _write(
        out,
        name="noise",
        found=found,
        rows=rows,
        about={"method": noise.__doc__, "measured": abouts},
        drawn=drawn,
    )
    _show_losses(abouts)


def run_bits(args: argparse.Namespace) -> None:
    from prime_jax.analyse import bits, figures, subjects

    found, out = _open(args)
    subjects.diffusion_only(found, "analyse bits")
    rows, abouts = [], []
    calls = [
        -(-args.examples * args.replicates // subject.run.config.eval.batch_size)
        for subject in found
    ]
    with _progress(sum(calls)) as tick:
        for subject in found:
            part, about = bits.measure(subject, args.examples, args.replicates, tick)
            rows, abouts = rows + part, [*abouts, about]
    with figures.styled():
        drawn = {"bits": figures.bits(rows, [subject.name for subject in found])}
    _write(
        out,
        name="bits",
        found=found,
        rows=rows,
        about={"method": bits.__doc__, "measured": abouts},
        drawn=drawn,
    )
    _show(rows, ["run", "slot"], ["nats", "nats_se_data", "error", "error_se_data"])
    _show_losses(abouts)


def _open(args: argparse.Namespace) -> "tuple[list[Subject], Path]":
    from prime_jax.analyse import subjects

    found = subjects.load([runs.attempts(name) for name in args.runs], getattr(args, "data", None))
    out = args.out or found[0].run.path / "analysis"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {out}: {error.strerror}") from error
    return found, out


@contextmanager
def _progress(total: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("measuring", total=total or None)

        def tick(text: str = "measuring") -> None:
            bar.update(task, advance=1, description=text)

        yield tick


def _write(
    out: Path,
    name: str,
    found: "list[Subject]",
    rows: list[dict[str, Any]],
    about: dict[str, Any],
    drawn: dict[str, Any],
) -> None:
    """NAME.csv, figures, and last NAME.json."""
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import drawing

    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    paths = drawing.save(drawn, out)
    record = {"schema": SCHEMA, "analysis": name, "runs": [subject.about() for subject in found]}
    write_json_atomic(out / f"{name}.json", record | about | {"rows": rows})
    for (_, suffix), path in paths.items():
        if suffix == "png":
            print(f"figure  {path}")
    print(f"numbers {out / name}.json, .csv")


def _show(rows: list[dict[str, Any]], by: list[str], columns: list[str], title: str = "") -> None:
    """A table of medians over everything that is not in `by`."""
    import statistics

    from rich.console import Console
    from rich.table import Table

    table = Table(*by, *(name.replace("_", " ") for name in columns), title=title or None)
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    for key, group in groups.items():
        cells = []
        for name in columns:
            known = [row[name] for row in group if row[name] is not None]
            cells.append(f"{statistics.median(known):.4g}" if known else "")
        table.add_row(*(f"{x:g}" if isinstance(x, float) else str(x) for x in key), *cells)
    Console().print(table)


def _show_losses(abouts: list[dict[str, Any]]) -> None:
    for about in abouts:
        for loss in about["losses"]:
            print(
                f"{about['run']}: {loss['estimator']} {loss['kind']} {loss['value']:.4f} nats/token, "
                f"se {loss['se_mc']:.4f} (MC) {loss['se_data']:.4f} (data)"
            )
