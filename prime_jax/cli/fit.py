"""`prime-jax fit` and `prime-jax sweep report`: from runs to numbers, figures and a report."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_jax.cli import runs
from prime_jax.cli.console import Progress, say, show
from prime_jax.cli.parse import Arguments
from prime_jax.errors import UserError
from prime_jax.runtime import outputs, storage
from prime_jax.scaling.settings import Choice, Settings
from prime_jax.settings import REQUIRED, setting, to_dict

FORMATS = ("svg", "png", "pdf")


@dataclass(frozen=True)
class OfRuns(Arguments):
    """A command on a table of runs."""

    runs: str = setting(
        REQUIRED,
        "the directory of a sweep; a CSV or JSON file with a row for each run; or a directory of "
        "TensorBoard's event files, or of histories as JSON lines (W&B)",
        positional=True,
        metavar="RUNS_OR_CSV",
    )
    out: Path | None = setting(
        None,
        "folder for the results (default: RUNS/fit, or the CSV's name with -fit)",
        metavar="DIR",
    )
    formats: str = setting(
        "svg",
        "formats of the figures: svg, which the report needs, and also png or pdf",
        metavar="F,F",
    )
    force: bool = setting(
        False, "also replace files there that prime-jax did not make or that were changed since"
    )
    choice: Choice = setting(Choice(), "what to fit")
    settings: Settings = setting(Settings(), "how to fit")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.suffixes) <= set(FORMATS):
            raise UserError(f"--formats {self.formats}: must be some of {', '.join(FORMATS)}")

    @property
    def suffixes(self) -> list[str]:
        return [name.strip() for name in self.formats.split(",")]

    @property
    def source(self) -> storage.Path:
        return storage.path(self.runs)

    @property
    def directory(self) -> Path:
        return self.out or default_out(self.source)

    def options(self) -> dict[str, Any]:
        """Those of the library's functions."""
        return to_dict(self.choice) | to_dict(self.settings)


@dataclass(frozen=True)
class Fit(OfRuns):
    """Fit scaling laws to finished runs: approach 1 (envelope of training curves), approach 2
    (IsoFLOP parabolas) and approach 3 (L = E + A/N^alpha + B/D^beta) for each family, with
    intervals, figures and a report.

    RUNS_OR_CSV is a sweep directory, or any CSV with the columns family, loss and two of flops,
    params, tokens (the third follows from C = 6 N D). Optional columns: kind (nll, nelbo,
    train_loss), loss_se, budget, run, seed, status, reason, step, epochs, unique_tokens, given,
    tokenizer, eval_set. Common other names (val_loss, n_params) are recognised and reported;
    --columns and --name-pattern give the rest. 354M and 20B are numbers. Of TensorBoard's event
    files and W&B's histories the last values are used, and the losses before them are curves.

    Exit code: 0 fitted, 3 fitted but something was refused (fit.json and the report say what and
    why), 2 bad input."""

    EXAMPLES = (
        "prime-jax fit quickstart",
        "prime-jax fit isoflop.csv --out fits/first --bootstrap 2000 --formats svg,pdf",
        "prime-jax fit theirs.csv --family arm --columns 'loss=final,params=N [M]'",
        "prime-jax fit logs --name-pattern '{family}_{FLOPs}_{N}'",
    )

    curves: Path | None = setting(
        None,
        "training curves for approach 1 (a sweep has its own): a CSV with the columns run, step or "
        "tokens, loss, a chart exported from W&B, event files or histories; RUNS_OR_CSV must have a "
        "row for each run",
        metavar="FILE",
    )


def fit(args: Fit) -> int:
    return _fit(args, args.curves)


@dataclass(frozen=True)
class Report(OfRuns):
    """Fit and write the report as `prime-jax fit ROOT` does. With --live it uses the runs that have
    finished so far and reports how many these are. Exit codes are those of `fit`."""

    EXAMPLES = ("prime-jax sweep report quickstart --live",)

    runs: str = setting(
        REQUIRED, "the directory of a sweep, here or in a bucket", positional=True, metavar="ROOT"
    )
    out: Path | None = setting(None, "folder for the results (default: ROOT/fit)", metavar="DIR")
    live: bool = setting(False, "use the runs that have finished; do not require all")


def report(args: Report) -> int:
    root, listed = runs.sweep(args.runs)
    done = sum(run.result is not None for run in listed)
    if done < len(listed) and not args.live:
        raise UserError(f"{root}: {done} of {len(listed)} runs have finished; add --live")
    return _fit(args, note=f"live: {done} of {len(listed)} runs" if done < len(listed) else "")


def _fit(args: OfRuns, curves: Path | None = None, note: str = "") -> int:
    from prime_jax import scaling
    from prime_jax.scaling import record, report, tables

    out = args.directory
    files = spare(args, (record.FIT, record.POINTS), report.OF_A_FIT, curves)
    with Progress(transient=True) as progress:
        fitted = scaling.fit(
            args.source, curves=curves, note=note, progress=progress.doing, **args.options()
        )
    with outputs.folder(out, files, force=args.force):
        result = record.write(fitted, out)
        show_head(result)
        show(tables.summary(result))
        if pairs := tables.repetition(result):
            show(pairs)
        show_warnings(result)
        if result["excluded"]:
            say(f"left out: {len(result['excluded'])}; the report says why")
        with Progress(transient=True) as progress:
            progress.doing("drawing")
            written = fitted.draw(out, args.suffixes, complain)
    show_paths(written)
    return 3 if fitted.refused else 0


def default_out(source: Path) -> Path:
    """RUNS/fit for a sweep; beside a CSV, or here for a bucket, its name and `-fit`."""
    if storage.is_remote(source):
        return Path(f"{source.stem}-fit")
    return source / "fit" if source.is_dir() else source.with_name(f"{source.stem}-fit")


def complain(text: str) -> None:
    """One line about what is missing beside the numbers."""
    print(f"prime-jax: {text}", file=sys.stderr)


def spare(
    args: OfRuns, files: Iterable[str], names: Iterable[str], curves: Path | None = None
) -> list[str]:
    """The names of the files that will be written, where all of them may be.

    Raises:
        UserError: names the file that is an input, or somebody else's.
    """
    given = [args.source, *([curves] if curves else [])]
    read = [part for g in given for part in (outputs.of_sweep(g) if g.is_dir() else [g])]
    pictures = [f"{name}.{suffix}" for name in names for suffix in FORMATS]
    written = [*files, *(["report.html", *pictures] if pictures else [])]
    outputs.refuse_overwrite(read, [args.directory / name for name in written])
    outputs.check_folder(args.directory, written, force=args.force)
    return written


def show_head(result: dict[str, Any]) -> None:
    """What was read, and in which conventions."""
    from prime_jax.scaling import labels, tables

    conventions = result["conventions"]
    say(
        f"{result['source']['name']}: {result['metric']}; N {labels.convention(conventions['params'])}, "
        f"FLOPs {labels.convention(conventions['flops'])}; {result['method']['level']:.0%} intervals"
    )
    if columns := tables.read_as(result["source"]):
        say(f"read {columns}")


def show_warnings(result: dict[str, Any]) -> None:
    """One line for each."""
    from prime_jax.scaling import tables

    for line in tables.warnings_of(result):
        say(line, style="red" if line.startswith("refused") else "yellow")


def show_paths(written: Sequence[Path]) -> None:
    for path in written:
        say(f"{'report' if path.suffix == '.html' else 'figure'}  {path}")
