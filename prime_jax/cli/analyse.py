"""`prime-jax analyse`: spectra, attention, noise, bits."""

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.cli import runs
from prime_jax.cli.console import Progress, error, say, show
from prime_jax.cli.parse import Arguments
from prime_jax.cli.runs import RUN
from prime_jax.runtime import outputs
from prime_jax.settings import REQUIRED, setting
from prime_jax.table import Table

if TYPE_CHECKING:
    from prime_jax.analyse.subjects import Subject

SCHEMA = 1
WRITES = """
Writes NAME.json (with units and what it was measured on), NAME.csv (a row per number) and figures
(svg, png, pdf) into --out. Several runs are drawn side by side.
"""


@dataclass(frozen=True)
class OfRuns(Arguments):
    """What every analysis takes."""

    NOTES = WRITES

    runs: tuple[str, ...] = setting(REQUIRED, RUN, positional=True, metavar="RUN")
    out: Path | None = setting(
        None, "folder for the results (default: RUN/analysis of the first run)", metavar="DIR"
    )
    force: bool = setting(
        False, "also replace files there that prime-jax did not make or that were changed since"
    )


@dataclass(frozen=True)
class OnText(OfRuns):
    """An analysis of what runs make of a text."""

    examples: int = setting(64, "blocks of the validation split", at_least=1)
    data: Path | None = setting(None, "prepared dataset (default: the run's own)", metavar="DIR")


@dataclass(frozen=True)
class Spectra(OfRuns):
    """Singular values of the weight matrices, their ranks and tail exponents."""

    EXAMPLES = ("prime-jax analyse spectra quickstart:3f9a quickstart:77c1",)


@dataclass(frozen=True)
class Attention(OnText):
    """Mean attention maps, sinks, band and entropy, by the fraction of hidden sub-tokens."""

    EXAMPLES = ("prime-jax analyse attention quickstart:3f9a --ratios 0.3 0.7",)

    examples: int = setting(16, "blocks of the validation split", at_least=1)
    ratios: tuple[float, ...] = setting(
        (0.1, 0.3, 0.5, 0.7, 0.9),
        "fractions of hidden sub-tokens",
        above=0,
        at_most=1,
        metavar="U",
    )


@dataclass(frozen=True)
class Noise(OnText):
    """How much of the bound each noise level contributes, and the variance of the training loss with
    each distribution of training times (objective.times, objective.weight)."""

    EXAMPLES = ("prime-jax analyse noise quickstart:3f9a --levels 32",)

    levels: int = setting(16, "number of noise levels, and of steps", at_least=1)
    replicates: int = setting(2, "independent masks of every block", at_least=1)


@dataclass(frozen=True)
class Bits(OnText):
    """Cost and error of each sub-token of a token."""

    EXAMPLES = ("prime-jax analyse bits quickstart:3f9a",)

    replicates: int = setting(8, "independent masks of every block", at_least=1)


def spectra(args: Spectra) -> None:
    from prime_jax.analyse import figures, spectra

    found, out = _open(args, "spectra", "spectra", "spectra-by-layer")
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
    _write(args, out, name="spectra", found=found, rows=rows, about=about, drawn=drawn)
    medians = ["stable_rank", "effective_rank", "tail_exponent"]
    _show(rows, ["run", "matrix"], medians, "medians over layers")


def attention(args: Attention) -> None:

    from prime_jax.analyse import attention, figures

    maps_of = [f"attention-maps-{k}" for k in range(len(args.runs))]
    found, out = _open(args, "attention", "attention", *maps_of, arrays=True)
    rows, maps, abouts = [], {}, []
    with _progress(len(found) * len(args.ratios) * args.examples) as tick:
        for subject in found:
            part = attention.measure(subject, args.ratios, args.examples, tick)
            rows, maps, abouts = rows + part[0], maps | part[1], [*abouts, part[2]]
    drawn = {}
    with figures.styled():
        drawn["attention"] = figures.attention(rows, abouts)
        for figure, subject in zip(maps_of, found, strict=True):
            ratios = sorted({row["hidden"] for row in rows if row["run"] == subject.name})
            ratio = ratios[len(ratios) // 2]
            length = subject.run.config.data.seq_len
            shown = maps[f"{subject.name}/{ratio:g}"]
            drawn[figure] = figures.maps(subject.name, ratio, shown, length)
    about = {"method": attention.__doc__, "band": attention.BAND, "measured": abouts}
    _write(args, out, name="attention", found=found, rows=rows, about=about, drawn=drawn, maps=maps)
    _show(rows, ["run", "hidden"], list(attention.STATISTICS), "medians over layers and heads")


def noise(args: Noise) -> None:
    from prime_jax.analyse import figures, noise, subjects

    found, out = _open(args, "noise", "noise")
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
        args,
        out,
        name="noise",
        found=found,
        rows=rows,
        about={"method": noise.__doc__, "measured": abouts},
        drawn=drawn,
    )
    _show_losses(abouts)
    variances = [{"run": about["run"], **row} for about in abouts for row in about["variances"]]
    if variances:
        title = "training loss of a sequence: variance over the square of the mean"
        columns = ("run", "times", "weight", "relative_variance", "se")
        cells = [
            [row["run"], row["times"], row["weight"]]
            + [error(row[c]) for c in ("relative_variance", "relative_variance_se")]
            for row in variances
        ]
        show(Table(columns, cells, title=title))


def bits(args: Bits) -> None:
    from prime_jax.analyse import bits, figures, subjects

    found, out = _open(args, "bits", "bits")
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
        args,
        out,
        name="bits",
        found=found,
        rows=rows,
        about={"method": bits.__doc__, "measured": abouts},
        drawn=drawn,
    )
    _show(rows, ["run", "slot"], ["nats", "nats_se_data", "error", "error_se_data"])
    _show_losses(abouts)


def _open(
    args: OfRuns, name: str, *figures: str, arrays: bool = False
) -> "tuple[list[Subject], Path]":
    """The runs, and the folder for the results.

    Raises:
        UserError: the folder holds a file of somebody else by the name of one that will be written.
    """
    from prime_jax.analyse import subjects

    found = subjects.load([runs.attempts(name) for name in args.runs], getattr(args, "data", None))
    out = args.out or found[0].run.path / "analysis"
    outputs.check_folder(out, _files(name, figures, arrays=arrays), force=args.force)
    return found, out


def _files(name: str, figures: Iterable[str], *, arrays: bool) -> list[str]:
    from prime_jax.scaling import drawing

    files = [f"{name}.{suffix}" for suffix in ("json", "csv", *(["npz"] if arrays else []))]
    return files + [f"{figure}.{suffix}" for figure in figures for suffix in drawing.FORMATS]


@contextmanager
def _progress(total: int) -> Iterator[Callable[..., None]]:
    with Progress(transient=True) as progress:
        done = 0

        def tick(text: str = "measuring") -> None:
            nonlocal done
            done += 1
            progress.show("measuring", text, total or None, done)

        yield tick


def _write(
    args: OfRuns,
    out: Path,
    name: str,
    found: "list[Subject]",
    rows: list[dict[str, Any]],
    about: dict[str, Any],
    drawn: dict[str, Any],
    maps: dict[str, Any] | None = None,
) -> None:
    """NAME.csv, figures, arrays where there are some, and last NAME.json."""
    import numpy as np

    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import drawing

    with outputs.folder(out, _files(name, drawn, arrays=bool(maps)), force=args.force):
        with (out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        paths = drawing.save(drawn, out)
        if maps:
            np.savez(out / f"{name}.npz", **maps)
        record = {"schema": SCHEMA, "analysis": name, "runs": [s.about() for s in found]}
        write_json_atomic(out / f"{name}.json", record | about | {"rows": rows})
    for (_, suffix), path in paths.items():
        if suffix == "png":
            say(f"figure  {path}")
    say(f"numbers {out / name}.json, .csv")


def _show(rows: list[dict[str, Any]], by: list[str], columns: list[str], title: str = "") -> None:
    """A table of medians over everything that is not in `by`."""
    import statistics

    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    cells = []
    for key, group in groups.items():
        medians = []
        for name in columns:
            known = [row[name] for row in group if row[name] is not None]
            missing = "unknown" if "_se_" in name else ""
            medians.append(f"{statistics.median(known):.4g}" if known else missing)
        cells.append([*(f"{x:g}" if isinstance(x, float) else str(x) for x in key), *medians])
    show(Table((*by, *(name.replace("_", " ") for name in columns)), cells, title=title))


def _show_losses(abouts: list[dict[str, Any]]) -> None:
    for about in abouts:
        for loss in about["losses"]:
            say(
                f"{about['run']}: {loss['estimator']} {loss['kind']} {loss['value']:.4f} nats/token, "
                f"se {error(loss['se_mc'])} (MC) {error(loss['se_data'])} (data)"
            )
