"""`prime-jax sweep ...`: plan, run, work, status, report, logs, collect, retry, kill."""

import argparse
import contextlib
from pathlib import Path

from prime_jax.cli import launch as commands_of_launch
from prime_jax.cli import train as commands_of_train
from prime_jax.cli.fit_options import positive
from prime_jax.errors import UserError
from prime_jax.runtime import storage

ROOT = "the directory that holds the whole sweep: a folder, gs://BUCKET/... or s3://BUCKET/..."
WIDTH = 110  # that a plan needs at least; narrower terminals wrap its lines


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add `sweep` and its sub-commands."""
    sweep = subparsers.add_parser(
        "sweep",
        help="plan and run many trainings, collect their results",
        description="A sweep is a directory ROOT. `plan` fills it with runs, `run` trains them, "
        "`collect` writes what `prime-jax fit` reads. Everything can be interrupted and repeated.",
    )
    commands = sweep.add_subparsers(metavar="COMMAND", required=True)
    _plan(commands)
    _run(commands)
    _work(commands)
    _status(commands)
    _report(commands)
    _logs(commands)
    _collect(commands)
    _by_hand(
        commands,
        "retry",
        help="open failed, killed or stuck runs again",
        description="Runs that failed three times, or for a reason that only a person can mend, "
        "wait for this. A retried run continues from its newest checkpoint.",
    )
    _by_hand(
        commands,
        "kill",
        help="stop runs for good",
        description="A running worker leaves the run at its next heartbeat (within 30 seconds) and "
        "takes the next one. `retry` opens the run again.",
    )
    commands_of_launch.register(commands, {"type": storage.path, "help": ROOT})


def _plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="list the runs of an experiment; with ROOT, create or extend the sweep",
        description="Lists every candidate run as OK or DROP with the reason. With ROOT, writes "
        "the OK ones there. Planning again adds what is new and changes nothing else.",
        epilog="docs/experiments.md describes both forms of EXPERIMENT: the fields of a Sweep, "
        "its rules, and the schema of a JSON row.",
    )
    parser.add_argument(
        "experiment",
        type=Path,
        metavar="EXPERIMENT",
        help="a Python file with a function sweep() -> Sweep, or a .json file, a list of rows",
    )
    parser.add_argument(
        "root", type=storage.path, metavar="ROOT", nargs="?", help=f"{ROOT}; left out: only print"
    )
    parser.add_argument(
        "--flops-per-second",
        type=positive,
        metavar="F",
        help="speed to estimate hours with, e.g. 5e10",
    )
    commands_of_train.add_slice(parser)
    parser.add_argument(
        "--check",
        nargs="?",
        const="largest",
        choices=("largest", "all"),
        help="compile the largest shape of each family for the slice, and smaller ones until one "
        "fits; --check=all compiles every shape. What does not fit is dropped",
    )
    parser.set_defaults(run=plan)


def _run(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "run",
        help="train here until nothing is open",
        description="Trains the open runs, largest first. Ctrl-C saves and stops; the same "
        "command continues. Exit code: 0 all done, 1 runs failed, 2 nothing can train here (the data "
        "is not there; runs stay open), 85 interrupted.",
    )
    parser.add_argument("root", type=storage.path, metavar="ROOT", help=ROOT)
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that share this machine's cores (default 1)",
    )
    parser.set_defaults(run=run)


def _work(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "work",
        help="one worker, as every engine starts it",
        description="Claims the largest open run, trains it, publishes its result, and so on. "
        "Any number of workers may share ROOT. Exit code: 0 nothing left, 1 runs failed, 85 interrupted.",
    )
    parser.add_argument("root", type=storage.path, metavar="ROOT", help=ROOT)
    parser.add_argument(
        "--slice",
        default="",
        metavar="NAME",
        help="what this worker runs on, e.g. v5e-16: it leaves runs planned for others alone "
        "(default: it takes any run)",
    )
    parser.add_argument(
        "--time-limit",
        type=positive,
        metavar="MINUTES",
        help="when this machine is taken away: the worker saves and leaves (exit code 85) before",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure the kernels first, if ROOT has no table of this kind of chip",
    )
    parser.set_defaults(run=work)


def _status(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "status",
        help="where every run stands, and why some failed",
        description="Counts, then one line per run: id, budget C, size N, family, seed, state, progress.",
    )
    parser.add_argument("root", type=storage.path, metavar="ROOT", help=ROOT)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="a table that renews itself until nothing is left to run; Ctrl-C leaves it",
    )
    parser.add_argument(
        "--prices",
        type=Path,
        metavar="FILE",
        help="your price list, like docs/prices.toml: says what the sweep has cost so far",
    )
    parser.set_defaults(run=show_status)


def _report(commands: argparse._SubParsersAction) -> None:
    from prime_jax.cli import fit as commands_of_fit

    parser = commands.add_parser(
        "report",
        help="the fit's report; with --live from the runs that have finished so far",
        description="Fits and writes the report as `prime-jax fit ROOT` does. With --live it uses "
        "what has finished so far, and says of how many runs. Exit code: as `fit`.",
    )
    commands_of_fit.add_options(parser)
    parser.add_argument("--live", action="store_true", help="do not wait for the last run")
    parser.set_defaults(run=report, curves=None)


def _logs(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "logs",
        help="what the attempts at a run have said, host by host",
        description="Prints the log of every attempt and host of one run, tracebacks included.",
    )
    parser.add_argument("root", type=storage.path, metavar="ROOT", help=ROOT)
    parser.add_argument("id", metavar="ID", help="id of a run, or its beginning")
    parser.set_defaults(run=show_logs)


def _collect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "collect",
        help="write runs.csv, one row per run",
        description="Writes the table that `prime-jax fit` reads. Runs without a result are rows "
        "with a status and a reason.",
    )
    parser.add_argument("root", type=storage.path, metavar="ROOT", help=ROOT)
    parser.add_argument(
        "-o",
        "--out",
        type=storage.path,
        default=Path("runs.csv"),
        metavar="FILE",
        help="default runs.csv",
    )
    parser.set_defaults(run=collect)


def _by_hand(commands: argparse._SubParsersAction, name: str, **texts: str) -> None:
    parser = commands.add_parser(name, **texts)
    parser.add_argument("root", type=storage.path, metavar="ROOT", help=ROOT)
    parser.add_argument("ids", nargs="*", metavar="ID", help="ids of runs, or their beginnings")
    if name == "retry":
        parser.add_argument("--all-failed", action="store_true", help="every run that has failed")
    parser.set_defaults(run=by_hand, action=name)


def plan(args: argparse.Namespace) -> None:
    from rich.console import Console

    from prime_jax.sweep import grid
    from prime_jax.sweep import plan as planning

    experiment = grid.load_experiment(args.experiment)
    datasets = planning.load_datasets(experiment, required=args.root is not None)
    listed = planning.candidates(experiment, datasets)
    console = Console(width=max(WIDTH, Console().width))
    slice_, prices = commands_of_train.slice_of(args)
    if args.check:
        listed = _checked(args, listed, slice_, console)
    console.print(planning.table(experiment, listed, args.flops_per_second))
    if slice_:
        from prime_jax.cli import forecast

        good = [candidate.config for candidate in listed if not candidate.drop]
        console.print(forecast.cost_estimate(good, slice_, prices), soft_wrap=True)
    if args.root is not None:
        added = planning.write(args.root, experiment, listed, slice_.name if slice_ else "")
        console.print(
            f"{args.root}: {added} runs added; next: prime-jax sweep run {args.root}",
            soft_wrap=True,
        )


def _checked(args: argparse.Namespace, listed, slice_, console):
    """The candidates after the compiler has seen them."""
    from prime_jax import tuned
    from prime_jax.cli import forecast
    from prime_jax.cli.compilations import Compilations
    from prime_jax.sweep import check

    cache = args.root / check.CACHE if args.root else None
    choices = tuned.load(slice_.chip.device_kind, args.root)
    options = check.Options(args.check == "all", args.autofit, cache, choices)
    with Compilations(f"compiling for {slice_.name}", console) as progress:
        listed, verdicts = check.check(listed, slice_, options, progress=progress)
    if verdicts:
        forecast.show(verdicts, console)
    return listed


def run(args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    if args.workers == 1:
        return work(args)
    from prime_jax.data import manifest
    from prime_jax.sweep import state
    from prime_jax.sweep.pool import supervise
    from prime_jax.sweep.worker import with_data

    state.check_root(args.root)
    with_data(state.open_runs(args.root), manifest.of_run)
    return supervise(args.root, args.workers)


def work(args: argparse.Namespace) -> int:
    from prime_jax.hardware import slices
    from prime_jax.sweep import worker

    name = getattr(args, "slice", "")
    slice = slices.parse(name).name if name else ""
    minutes, tune = getattr(args, "time_limit", None), getattr(args, "tune", False)
    return worker.work(args.root, slice=slice, minutes=minutes, tune=tune)


def show_status(args: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from prime_jax.hardware.prices import load_prices
    from prime_jax.sweep import state, status

    state.check_root(args.root)
    prices = load_prices(args.prices) if args.prices else None
    if args.watch:
        with contextlib.suppress(KeyboardInterrupt):
            status.watch(args.root, Console(), prices)
        return
    runs = state.list_runs(args.root)
    if args.json:
        print(json.dumps(status.as_dicts(runs), indent=2))
    else:
        status.show(runs, Console(), status.summary(runs, prices))


def report(args: argparse.Namespace) -> int:
    from prime_jax.cli import fit as commands_of_fit
    from prime_jax.sweep import state

    state.check_root(args.runs)
    runs = state.list_runs(args.runs)
    done = sum(run.result is not None for run in runs)
    if done < len(runs) and not args.live:
        raise UserError(f"{args.runs}: {done} of {len(runs)} runs have finished; add --live")
    args.note = f"live: {done} of {len(runs)} runs" if done < len(runs) else ""
    return commands_of_fit.run(args)


def show_logs(args: argparse.Namespace) -> None:
    from prime_jax.sweep import state

    state.check_root(args.root)
    (run,) = state.select(state.list_runs(args.root), [args.id])
    for attempt in run.attempts:
        folder = args.root / "runs" / run.id / str(attempt.k)
        logs = sorted(name for name in storage.names(folder) if name.startswith("log."))
        how = f": {attempt.end['state']}, {attempt.end['reason']}" if attempt.end else ""
        print(f"=== attempt {attempt.k}{how}")
        for name in logs:
            print(f"--- process {name.split('.')[1]}")
            print(storage.read(folder / name).decode(errors="replace"), end="")


def collect(args: argparse.Namespace) -> None:
    from prime_jax.sweep import collect as collecting

    finished = collecting.write(args.root, args.out)
    print(f"{args.out}: {finished} runs with a result; next: prime-jax fit {args.out}")


def by_hand(args: argparse.Namespace) -> None:
    from prime_jax.sweep import state

    every = getattr(args, "all_failed", False)
    if bool(args.ids) == every:
        other = ", or --all-failed" if args.action == "retry" else ""
        raise UserError(f"{args.action}: give ids of runs{other}")
    state.check_root(args.root)
    if every:
        print(f"retry: {len(state.retry_failed(args.root))} failed runs are open again")
    for run in state.select(state.list_runs(args.root), args.ids):
        {"retry": state.retry, "kill": state.kill}[args.action](args.root, run)
        print(f"{args.action} {run.id}")
