"""`prime-jax sweep ...`: plan, run, work, status, logs, collect, retry, kill."""

import contextlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prime_jax.cli import runs
from prime_jax.cli.console import Progress, console, say, show, write
from prime_jax.cli.launch import ROOT
from prime_jax.cli.parse import Arguments
from prime_jax.cli.train import DryRun
from prime_jax.errors import UserError
from prime_jax.runtime import outputs, storage
from prime_jax.settings import REQUIRED, setting
from prime_jax.table import Cell, Table

if TYPE_CHECKING:
    from prime_jax.sweep.grid import Experiment
    from prime_jax.sweep.plan import Candidate


@dataclass(frozen=True)
class OfSweep(Arguments):
    """A command on a sweep."""

    root: str = setting(REQUIRED, ROOT, positional=True)

    @property
    def place(self) -> storage.Path:
        return storage.path(self.root)


# --- plan


@dataclass(frozen=True)
class Plan(Arguments):
    """List every candidate run as OK, or as DROP with the reason. With ROOT, store the OK runs there;
    planning again adds new runs and changes nothing else."""

    NOTES = """
        docs/experiments.md describes both forms of EXPERIMENT: the fields of a Sweep, its rules,
        and the schema of a JSON row.
        """
    EXAMPLES = (
        "prime-jax sweep plan preset:quickstart",
        "prime-jax sweep plan preset:quickstart quickstart",
        "prime-jax sweep plan preset:c4_grid --slice v5e-16 --check",
        "prime-jax sweep plan ladder.py ladder --share-prefixes",
    )

    experiment: Path = setting(
        REQUIRED,
        "a Python file with a function sweep() -> Sweep, or a .json file with a list of rows",
        positional=True,
    )
    root: str | None = setting(
        None, f"{ROOT}; without it the plan is only printed", positional=True
    )
    flops_per_second: float | None = setting(
        None, "speed in FLOP/s for estimated hours, e.g. 5e10", above=0, metavar="F"
    )
    check: Literal["largest", "all"] | None = setting(
        None,
        "compile for the slice and drop runs that do not fit; --check: the largest shape of each "
        "family, then smaller ones until one fits; --check=all: every shape",
        bare="largest",
    )
    share_prefixes: bool = setting(
        False,
        "runs that differ only in their length and end train their common steps once: needs the "
        "schedule wsd, and rules for batch, rate and warm-up that ignore budget and steps",
    )
    drift_check: bool = setting(
        False,
        "also run the corner cells of each family's grid at half and at twice the learning rate; fit warns if the best rate moves by more than the rule says",
    )
    dry_run: DryRun = setting(DryRun(), "predictions")


def plan(args: Plan) -> None:
    from prime_jax.sweep import grid, prefixes, state
    from prime_jax.sweep import plan as planning

    experiment = grid.load_experiment(args.experiment)
    if args.drift_check:
        experiment = replace(experiment, rows=tuple(grid.drift_check(experiment.rows)))
    datasets = planning.load_datasets(experiment, required=args.root is not None)
    listed = planning.candidates(experiment, datasets)
    slice_, prices = args.dry_run.understood(check=bool(args.check))
    if args.check:
        listed = _checked(args, listed, slice_)
    shared = prefixes.plan(listed) if args.share_prefixes else None
    listed = shared.listed if shared else listed
    show(plan_table(experiment, listed, args.flops_per_second))
    for text in shared.summary(args.flops_per_second) if shared else ():
        say(text)
    if slice_:
        from prime_jax.cli import forecast

        good = [candidate.config for candidate in listed if not candidate.drop]
        trained = [shared.own(config) for config in good] if shared else good
        say(forecast.cost_estimate(trained, slice_, prices))
    if args.root is not None:
        root, name = storage.path(args.root), slice_.name if slice_ else ""
        share = args.share_prefixes
        added = planning.write(root, experiment, listed, name, share_prefixes=share)
        if shared and (alone := shared.planned_alone(state.list_runs(root))):
            say(f"{alone} runs were planned before without --share-prefixes, and train alone")
        say(f"{root}: {added} runs added; next: prime-jax sweep run {shlex.quote(str(root))}")


def _checked(args: Plan, listed: "list[Candidate]", slice_: Any) -> "list[Candidate]":
    """The candidates after the compiler has seen them."""
    from prime_jax import tuned
    from prime_jax.cli import forecast
    from prime_jax.cli.compilations import Compilations
    from prime_jax.sweep import check

    root = storage.path(args.root) if args.root else None
    choices = tuned.load(slice_.chip.device_kind, root)
    options = check.Options(
        every=args.check == "all",
        autofit=args.dry_run.autofit,
        cache=root / check.CACHE if root else None,
        choices=choices,
    )
    with Compilations(f"compiling for {slice_.name}") as progress:
        listed, verdicts = check.check(listed, slice_, options, progress=progress)
    if verdicts:
        forecast.show_verdicts(verdicts)
    return listed


def plan_table(
    experiment: "Experiment", listed: "Sequence[Candidate]", flops_per_second: float | None
) -> Table:
    """The plan as people read it."""
    from prime_jax import flops

    good = [candidate for candidate in listed if not candidate.drop]
    total = sum(flops.train_flops(c.config, "matmul") for c in good)
    summary = f"{len(good)} OK, {len(listed) - len(good)} DROP, {total:.3g} FLOPs (matmul)"
    final = sum(flops.evaluation_flops(c.config, "matmul") for c in good)
    if total:
        summary += f" and {100 * final / total:.2g} % more to evaluate at the end"
    if flops_per_second:
        summary += f", {total / flops_per_second / 3600:.3g} h at {flops_per_second:.3g} FLOP/s"
    if any(candidate.epochs is None for candidate in good):
        summary += "; the data is not prepared: ids are provisional, epochs unknown"
    hours = ("hours",) if flops_per_second else ()
    head = ("id", "family", "seed", "shape", "N", "D", "C", "steps", "batch", "lr", "epochs")
    rows = [_plan_row(candidate, flops_per_second) for candidate in listed]
    return Table((*head, *hours, "verdict"), rows, (summary,), title=experiment.name)


def _plan_row(candidate: "Candidate", flops_per_second: float | None) -> list[str | Cell]:
    from prime_jax import flops
    from prime_jax.sweep.plan import PARAMS

    row, config = candidate.row, candidate.config
    shape = f"{row.layers}x{row.width}x{row.heads}" if row.layers else ""
    n, d, *rest = [""] * (7 if flops_per_second else 6)
    if config is not None:
        params = flops.param_counts(config)[PARAMS[row.flops]]
        n, d = flops.human(params), flops.human(config.tokens)
        epochs = "?" if candidate.epochs is None else f"{candidate.epochs:.2f}"
        rest = [str(config.steps), str(config.batch_size), f"{row.peak_lr:.2g}", epochs]
        if flops_per_second:
            hours = flops.train_flops(config, "matmul") / flops_per_second / 3600
            rest.append(f"{hours:.2g}")
    drop = Cell(f"DROP: {candidate.drop}", style="bad")
    verdict = drop if candidate.drop else f"OK {candidate.note}"
    head = [candidate.id, row.family, str(row.seed), shape]
    return [*head, n, d, f"{row.budget:.3g}", *rest, verdict]


# --- run, work


@dataclass(frozen=True)
class Run(OfSweep):
    """Train the open runs on this machine, largest first. Ctrl-C saves and stops; the same command
    continues.

    Exit code: 0 all done, 1 runs failed, 2 no run can train here (the data is missing; runs stay
    open), 85 interrupted."""

    EXAMPLES = ("prime-jax sweep run quickstart --workers 2",)

    workers: int = setting(
        1, "number of worker processes, which share this machine's cores", at_least=1
    )


def run(args: Run) -> int:
    if args.workers == 1:
        return work(Work(args.root))
    from prime_jax.cli.workers import WorkerBars
    from prime_jax.data import manifest
    from prime_jax.sweep.pool import supervise
    from prime_jax.sweep.worker import with_data

    root, listed = runs.sweep(args.root)
    with_data([run for run in listed if run.opens_in() is not None], manifest.of_run)
    with Progress() as progress:
        return supervise(root, args.workers, progress=WorkerBars(progress))


@dataclass(frozen=True)
class Work(OfSweep):
    """Run one worker; engines (Slurm, TPU, k8s, sky) start this command. It claims the largest open
    run, trains it, publishes its result, and takes the next. Any number of workers may share ROOT.

    Exit code: 0 no run is left, 1 runs failed, 85 interrupted."""

    EXAMPLES = ("prime-jax sweep work gs://BUCKET/c4 --slice v5e-16 --time-limit 240",)

    slice: str = setting(
        "",
        "accelerators of this worker, e.g. v5e-16: it skips runs planned for other slices (default: "
        "it takes any run)",
        metavar="NAME",
    )
    time_limit: float | None = setting(
        None,
        "time until this machine is taken away: the worker saves and leaves before (exit code 85)",
        above=0,
        metavar="MINUTES",
    )
    tune: bool = setting(
        False, "time the kernels first, if ROOT has no table for this kind of chip"
    )


def work(args: Work) -> int:
    from prime_jax.cli.workers import WorkerBars
    from prime_jax.hardware import slices
    from prime_jax.sweep import worker

    slice_ = slices.parse(args.slice).name if args.slice else ""
    with Progress() as progress:
        return worker.work(
            args.place,
            slice=slice_,
            minutes=args.time_limit,
            tune=args.tune,
            progress=WorkerBars(progress),
        )


# --- status, logs, collect


@dataclass(frozen=True)
class Status(OfSweep):
    """Show the state of every run, and why some failed: counts, then one line per run with id, budget
    C, size N, family, seed, state, progress."""

    EXAMPLES = ("prime-jax sweep status quickstart --watch",)

    json: bool = setting(False, "print JSON, for programs")
    watch: bool = setting(
        False, "show a table that is updated until no run is left; Ctrl-C ends it"
    )
    prices: Path | None = setting(
        None,
        "your price list, in the format of docs/prices.toml: show the cost of the sweep so far",
        metavar="FILE",
    )


def status(args: Status) -> None:
    from prime_jax.cli import workers
    from prime_jax.hardware.prices import load_prices
    from prime_jax.sweep import status

    root, listed = runs.sweep(args.root)
    prices = load_prices(args.prices) if args.prices else None
    if args.watch:
        with contextlib.suppress(KeyboardInterrupt):
            workers.watch(root, prices)
        return
    if args.json:
        write(json.dumps(status.as_dicts(listed), indent=2))
        return
    say(status.summary(listed, prices))
    for run in listed:
        say(status.line(run))
        if run.state == "failed":
            say(status.failure(run), style="red")


@dataclass(frozen=True)
class Logs(OfSweep):
    """Print the logs of all attempts at a run, host by host, with tracebacks."""

    EXAMPLES = ("prime-jax sweep logs quickstart 3f9a",)

    id: str = setting(REQUIRED, "id of a run, or its beginning", positional=True)


def logs(args: Logs) -> None:
    from prime_jax.sweep import state

    root, listed = runs.sweep(args.root)
    (run,) = state.select(root, listed, [args.id])
    for attempt in run.attempts:
        folder = root / "runs" / run.id / str(attempt.k)
        how = f": {attempt.end['state']}, {attempt.end['reason']}" if attempt.end else ""
        say(f"=== attempt {attempt.k}{how}")
        for name in sorted(name for name in storage.names(folder) if name.startswith("log.")):
            say(f"--- process {name.split('.')[1]}")
            write(storage.read(folder / name).decode(errors="replace"))


@dataclass(frozen=True)
class Collect(OfSweep):
    """Write a CSV for `prime-jax fit`, one row per run. Runs without a result have a row with a status
    and a reason."""

    EXAMPLES = ("prime-jax sweep collect quickstart -o quickstart/runs.csv",)

    out: str = setting(
        "runs.csv",
        "file to write, also gs://... or s3://...; - is stdout",
        alias="-o",
        metavar="FILE",
    )


def collect(args: Collect) -> None:
    from prime_jax.sweep import collect as collecting

    finished = collecting.write(args.place, storage.path(args.out))
    to_stdout = args.out == outputs.STDOUT
    then = "" if to_stdout else f"; next: prime-jax fit {shlex.quote(args.out)}"
    say(f"{args.out}: {finished} runs with a result{then}", console(stderr=to_stdout))


# --- by hand


@dataclass(frozen=True)
class Retry(OfSweep):
    """Open runs again that failed three times, failed for a reason that does not go away by itself,
    were killed, or are stuck. A retried run continues from its newest checkpoint."""

    EXAMPLES = ("prime-jax sweep retry ROOT 3f9a", "prime-jax sweep retry ROOT --all-failed")

    ids: tuple[str, ...] = setting(
        (), "ids of runs, or their beginnings", positional=True, metavar="ID"
    )
    all_failed: bool = setting(False, "reopen every run that has failed")


def retry(args: Retry) -> None:
    from prime_jax.sweep import state

    if bool(args.ids) == args.all_failed:
        raise UserError("retry: give ids of runs, or --all-failed")
    place, listed = runs.sweep(args.root)
    if args.all_failed:
        say(f"retry: {len(state.retry_failed(place, listed))} failed runs are open again")
    for run in state.select(place, listed, args.ids):
        state.retry(place, run)
        say(f"retry {run.id}")


@dataclass(frozen=True)
class Kill(OfSweep):
    """Stop runs permanently. A worker leaves the run at its next heartbeat (within 30 seconds) and
    takes another. `retry` opens the run again."""

    EXAMPLES = ("prime-jax sweep kill ROOT 3f9a",)

    ids: tuple[str, ...] = setting(
        REQUIRED, "ids of runs, or their beginnings", positional=True, metavar="ID"
    )


def kill(args: Kill) -> None:
    from prime_jax.sweep import state

    place, listed = runs.sweep(args.root)
    for run in state.select(place, listed, args.ids):
        state.kill(place, run)
        say(f"kill {run.id}")
