"""`prime-jax scaling compare`, `validate`, `frontier`, `rates` and `downstream`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prime_jax.cli.console import Progress, say, show
from prime_jax.cli.fit import OfRuns, complain, show_head, show_warnings, spare
from prime_jax.errors import UserError
from prime_jax.runtime import outputs
from prime_jax.settings import REQUIRED, setting
from prime_jax.table import Table


@dataclass(frozen=True, kw_only=True)
class Compare(OfRuns):
    """Compare families with a baseline. Results: the compute multiplier m (how many times the compute
    of the baseline a family needs for the same loss) as a curve with an interval, from the fitted laws
    and between the optima of the budgets; the probability at each budget that a family has the lower
    loss; and tests whether exponents or E differ. All families are resampled together on the sizes
    and budgets that they share. An m beyond the data of a family is marked as an extrapolation.

    Families with different kinds of number (nll, nelbo / train_loss), tokenizers or evaluation sets
    are refused. With --allow-mixed-kinds they are compared, and every result says what is mixed.

    Exit code: 0 compared, 3 something was refused (compare.json says what and why), 2 bad input."""

    EXAMPLES = ("prime-jax scaling compare quickstart --baseline arm --against mdm prime",)

    baseline: str = setting(REQUIRED, "family to compare with", metavar="F")
    against: tuple[str, ...] = setting((), "families to compare (default: all others)", metavar="F")


def compare(args: Compare) -> int:
    from prime_jax import scaling
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import tables

    out = args.directory
    files = spare(args, ("compare.json",), ("multiplier",))
    with Progress(transient=True) as progress:
        progress.doing("comparing")
        found = scaling.compare(
            args.source, args.baseline, args.against, progress=progress.doing, **args.options()
        )
    result = found.to_dict()
    with outputs.folder(out, files, force=args.force):
        write_json_atomic(out / "compare.json", result)
        show_head(result)
        for table in tables.comparison(result):
            show(table)
        show_warnings(result)
        drawn = found.draw(out, args.suffixes, complain)
    for path in (out / "compare.json", *drawn):
        say(f"wrote  {path}")
    return 3 if found.refused else 0


@dataclass(frozen=True)
class Validate(OfRuns):
    """Fit the smallest budgets, predict the others, add a budget, and so on. The result is the signed
    error of predictions of larger budgets, which a bootstrap does not show.

    Exit code: 0 validated, 3 no family has enough budgets, 2 bad input."""

    EXAMPLES = ("prime-jax scaling validate quickstart",)


def validate(args: Validate) -> int:
    from prime_jax import scaling
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import tables

    files = spare(args, ("validate.json",), ())
    with Progress(transient=True) as progress:
        found = scaling.validate(args.source, progress=progress.doing, **args.options())
    result, path = found.to_dict(), args.directory / "validate.json"
    with outputs.folder(args.directory, files, force=args.force):
        write_json_atomic(path, result)
    show_head(result)
    for name, family in result["families"].items():
        if family["steps"]:
            show(tables.validation(name, family))
    show_warnings(result)
    say(f"wrote  {path}")
    return 0 if any(family["steps"] for family in result["families"].values()) else 3


@dataclass(frozen=True)
class Frontier(OfRuns):
    """Fit the lowest loss of each budget as a law of compute, L(C) = L_inf + A / C^a: free, and with
    L_inf pinned at --floor (default: E of approach 3). Each beginning of the budgets predicts the
    later ones. The points are the minima of approach 2. A CSV may also have flops and loss alone:
    then they are its lowest losses.

    Exit code: 0 fitted, 3 something was refused (frontier.json says what and why), 2 bad input."""

    EXAMPLES = (
        "prime-jax scaling frontier quickstart --at 1e15",
        "prime-jax scaling frontier best.csv --family arm --floor 1.6 --at 1e21 1e22",
    )

    at: tuple[float, ...] = setting(
        (), "budgets at which the loss is asked for, FLOPs", above=0, metavar="C"
    )


def frontier(args: Frontier) -> int:
    from prime_jax import scaling
    from prime_jax.scaling import tables

    files = spare(args, ("frontier.json",), ())
    with Progress(transient=True) as progress:
        found = scaling.frontier(args.source, args.at, progress=progress.doing, **args.options())
    result = found.to_dict()
    families = result["families"]
    shown = (tables.frontiers(families), tables.frontier_losses(families))
    _finish(args, files, result, shown, tables.frontier_notes(families))
    return 3 if found.refused else 0


@dataclass(frozen=True)
class Rates(OfRuns):
    """Fit the best learning rate as a law, lr* = k N^n D^d B^b, from cells (one N, D and batch size)
    that were run at three rates or more: a parabola in log lr for each cell, then the law through
    the best rates. A cell whose best rate is at the edge of those sampled is left out. B enters where
    it varies. rates.json can be a rule of a sweep: lr = "fitted:FILE".

    Exit code: 0 fitted, 3 something was refused (rates.json says what and why), 2 bad input."""

    EXAMPLES = ("prime-jax scaling rates tuning --out rates",)


def rates(args: Rates) -> int:
    from prime_jax import scaling
    from prime_jax.scaling import tables

    files = spare(args, ("rates.json", "report.html"), ())
    with Progress(transient=True) as progress:
        found = scaling.rates(args.source, progress=progress.doing, **args.options())
    result = found.to_dict()
    shown = (tables.rates(result), tables.rate_cells(result))
    _finish(args, files, result, shown, tables.warnings_of(result))
    return 3 if found.refused else 0


@dataclass(frozen=True)
class Downstream(OfRuns):
    """Fit the accuracy of tasks against compute. In two steps: the loss in (N, D), then a sigmoid from
    loss to accuracy. Directly: -log of the accuracy above chance as a power law of C. The later
    budgets are predicted from the earlier ones by both. The tasks are those of `prime-jax eval
    --tasks` on the runs of a sweep, or columns acc_TASK, acc_se_TASK and task_loss_TASK of a CSV. A
    task at chance is refused.

    Exit code: 0 fitted, 3 something was refused (downstream.json says what and why), 2 bad input."""

    EXAMPLES = (
        "prime-jax scaling downstream quickstart --task sciq boolq --at 1e15",
        "prime-jax scaling downstream runs.csv --chance mine=0.2 --ceiling mine=0.9",
    )

    task: tuple[str, ...] = setting((), "tasks to fit (default: all)", metavar="TASK")
    at: tuple[float, ...] = setting(
        (), "budgets at which the accuracy is asked for, FLOPs", above=0, metavar="C"
    )
    chance: tuple[str, ...] = setting(
        (), "accuracy of guessing, for tasks other than the usual ones", metavar="TASK=P"
    )
    ceiling: tuple[str, ...] = setting(
        (), "largest accuracy that there can be (default: 1)", metavar="TASK=P"
    )


def downstream(args: Downstream) -> int:
    from prime_jax import scaling
    from prime_jax.scaling import tables

    files = spare(args, ("downstream.json", "report.html"), ())
    with Progress(transient=True) as progress:
        found = scaling.downstream(
            args.source,
            args.task,
            args.at,
            chance=_by_task("--chance", args.chance),
            ceiling=_by_task("--ceiling", args.ceiling),
            progress=progress.doing,
            **args.options(),
        )
    result = found.to_dict()
    shown = (tables.tasks(result), tables.task_predictions(result))
    _finish(args, files, result, shown, tables.task_notes(result))
    return 3 if found.refused else 0


def _finish(
    args: OfRuns,
    files: Sequence[str],
    result: dict[str, Any],
    shown: Sequence[Table],
    notes: Sequence[str],
) -> None:
    """Write the record, the first of the files, renew the report if it is one of them, and show tables and notes."""
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import report

    path = args.directory / files[0]
    with outputs.folder(args.directory, files, force=args.force):
        write_json_atomic(path, result)
        if "report.html" in files:
            report.refresh(args.directory)
    show_head(result)
    for table in filter(None, shown):
        show(table)
    for line in notes:
        say(line, style="red" if line.startswith("refused") else "yellow")
    say(f"wrote  {path}")


def _by_task(flag: str, pairs: Sequence[str]) -> dict[str, float]:
    """Raises UserError for what is not TASK=NUMBER."""
    out = {}
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        try:
            out[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            raise UserError(f"{flag} {pair}: must be like hellaswag=0.25")
    return out
