"""`prime-jax kernels check`, for absent TPUs, and `prime-jax kernels tune`, on the devices here."""

import argparse
import os
from pathlib import Path
from typing import Any

from prime_jax.errors import UserError
from prime_jax.hardware import chips
from prime_jax.runtime import storage

KERNELS = ("embedding", "attention", "head")


def register(subparsers: Any) -> None:
    kernels = subparsers.add_parser(
        "kernels",
        help="measure the kernels here, or compile those of TPUs without one",
        description="What computes the head, the attention and the embedding: measured on the "
        "devices of this machine, or compiled for TPUs that need not be there.",
    )
    inner = kernels.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check = inner.add_parser(
        "check",
        help="compile every kernel for the chips named, and print what the compiler says",
        description="Compile forward and backward of each Pallas kernel for TPU chips that need "
        "not be there: memory, compile time, and the static schedule of each kernel (bundles are "
        "about cycles; shuffles and spills in the hot block cost time). Exit code 1 if a kernel "
        "does not compile. Needs libtpu; minutes for all chips.",
    )
    check.add_argument(
        "--chips",
        nargs="+",
        choices=chips.tpus(),
        default=["v5e", "v5p", "v6e"],
        help="to compile for (v5e v5p v6e)",
    )
    check.add_argument(
        "--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="which (all of them)"
    )
    check.add_argument(
        "--widths", nargs="+", type=int, default=[1024], help="model widths D (1024)"
    )
    check.add_argument("--vocab-size", type=int, default=51200, help="tokens V (51200)")
    check.add_argument("--no-schedule", action="store_true", help="quicker: memory and time only")
    check.set_defaults(run=run_check)
    _register_tune(inner)


def _register_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="measure every implementation on this machine's device, and keep the choice",
        description="Compares values and gradients of each implementation with the reference twin, "
        "then times those that agree, in turns. What is clearly quicker than the default is what "
        "`auto` means from then on: for this user's runs, or with --root for that sweep's. A run "
        "that has begun keeps its kernels.",
    )
    tune.add_argument(
        "--shapes",
        type=Path,
        metavar="EXPERIMENT",
        help="measure at the shapes of this experiment's runs (default: those of ROOT, or else of "
        "the default run)",
    )
    tune.add_argument(
        "--root", type=storage.path, metavar="ROOT", help="keep the table in ROOT/kernels"
    )
    tune.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each side (5)")
    tune.set_defaults(run=run_tune)


def run_tune(args: argparse.Namespace) -> int:
    from rich.console import Console

    from prime_jax import tuned
    from prime_jax.kernels.tune import tune

    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: must be at least 1")
    console = Console()
    say = lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    chips.keep_heap()
    choices = tune(_runs(args.shapes, args.root), rounds=args.rounds, progress=say)
    file = tuned.save(choices, args.root)
    say(f"{choices.device_kind}: {len(choices.rows)} choices in {file}")
    return 0


def _runs(experiment: Path | None, root: Any) -> list[Any]:
    """The runs whose shapes are measured."""
    from prime_jax.config import RunConfig, from_dict
    from prime_jax.sweep import grid, state

    if experiment:
        rows = grid.load_experiment(experiment).rows
        return [grid.to_config(row) for row in rows if not row.problem]
    if root is None:
        return [RunConfig()]
    state.check_root(root)
    return [from_dict(RunConfig, run.spec["config"], run.id) for run in state.list_runs(root)]


def run_check(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; a TPU that is there stays free
    from prime_jax.kernels.check import check_all

    reports = check_all(
        args.kernels, args.chips, args.widths, args.vocab_size, not args.no_schedule
    )
    failed = total = 0
    for report in reports:
        total += 1
        failed += bool(report.error)
        print(f"{report.chip:6}{report.case.name:48}{_result(report)}", flush=True)
        for s in report.schedules:
            print(
                f"{'':8}{s.kernel:46}{s.bundles:>7} bundles, hot block {s.hot_bundles}: "
                f"{s.matmuls} matmul, {s.shuffles} shuffle, {s.spills} spill slots"
            )
    print(f"{total - failed} of {total} compiled")
    return 1 if failed else 0


def _result(report: Any) -> str:
    if report.error:
        return f"FAILED after {report.seconds:.1f} s: {report.error}"
    options = " ".join(f"{k}={v}" for k, v in report.case.options.items())
    return (
        f"{report.seconds:5.1f} s  temporaries {report.temporary_bytes / 2**20:8.1f} MiB  "
        f"peak {report.peak_bytes / 2**20:8.1f} MiB  {options}"
    )
