"""`prime-jax kernels check`, for absent TPUs, and `prime-jax kernels tune`, on the devices here."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prime_jax.cli.console import say
from prime_jax.cli.parse import Arguments
from prime_jax.hardware.chips import tpus
from prime_jax.kernels.selection import KERNELS, Kernel
from prime_jax.runtime import storage
from prime_jax.settings import setting

CHIPS = tuple(tpus())


@dataclass(frozen=True)
class Tune(Arguments):
    """Time every kernel implementation on this machine's device, and store the choice. Values and
    gradients of each are compared with a plain reference; those that agree are timed in turns. An
    implementation that is clearly faster than the default is what `auto` then selects: for this
    user's runs, or with --root for the runs of that sweep. A run that has begun keeps its kernels."""

    EXAMPLES = ("prime-jax kernels tune --shapes preset:quickstart",)

    shapes: Path | None = setting(
        None,
        "measure at the shapes of this experiment's runs (default: those of ROOT, or else of the "
        "default run)",
        metavar="EXPERIMENT",
    )
    root: str | None = setting(
        None, "store the table in ROOT/kernels, for this sweep", metavar="ROOT"
    )
    rounds: int = setting(5, "timed turns of each implementation", at_least=1, metavar="N")


def tune(args: Tune) -> None:
    from prime_jax import tuned
    from prime_jax.hardware import chips
    from prime_jax.kernels.tune import tune

    root = None if args.root is None else storage.path(args.root)
    chips.keep_heap()
    choices = tune(_runs(args.shapes, root), rounds=args.rounds, progress=say)
    say(f"{choices.device_kind}: {len(choices.rows)} choices in {tuned.save(choices, root)}")


def _runs(experiment: Path | None, root: Any) -> list[Any]:
    """The runs whose shapes are measured."""
    from prime_jax.config import RunConfig
    from prime_jax.settings import from_dict
    from prime_jax.sweep import grid, state

    if experiment:
        rows = grid.load_experiment(experiment).rows
        return [grid.to_config(row) for row in rows if not row.problem]
    if root is None:
        return [RunConfig()]
    state.check_root(root)
    return [from_dict(RunConfig, run.spec["config"], run.id) for run in state.list_runs(root)]


@dataclass(frozen=True)
class Check(Arguments):
    """Compile forward and backward of each Pallas kernel for absent TPU chips. Prints memory, compile
    time and the static schedule of each kernel (a bundle is about a cycle; shuffles and spills in
    the hot block cost time). Needs libtpu, and takes minutes for all chips.

    Exit code 1 if a kernel does not compile."""

    EXAMPLES = ("prime-jax kernels check --chips v5e --kernels head --no-schedule",)

    chips: tuple[Literal[CHIPS], ...] = setting(("v5e", "v5p", "v6e"), "chips to compile for")
    kernels: tuple[Kernel, ...] = setting(KERNELS, "kernels to compile")
    widths: tuple[int, ...] = setting((1024,), "model widths D", at_least=1, metavar="D")
    vocab_size: int = setting(51200, "vocabulary size V", at_least=1, metavar="V")
    no_schedule: bool = setting(
        False, "skip the schedule: faster, gives memory and compile time only"
    )


def check(args: Check) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; a TPU that is there stays free
    from prime_jax.kernels.check import check_all

    reports = check_all(
        args.kernels, args.chips, args.widths, args.vocab_size, not args.no_schedule
    )
    failed = total = 0
    for report in reports:
        total += 1
        failed += bool(report.error)
        say(f"{report.chip:6}{report.case.name:48}{_result(report)}")
        for s in report.schedules:
            say(
                f"{'':8}{s.kernel:46}{s.bundles:>7} bundles, hot block {s.hot_bundles}: "
                f"{s.matmuls} matmul, {s.shuffles} shuffle, {s.spills} spill slots"
            )
    say(f"{total - failed} of {total} compiled")
    return 1 if failed else 0


def _result(report: Any) -> str:
    if report.error:
        return f"FAILED after {report.seconds:.1f} s: {report.error}"
    options = " ".join(f"{k}={v}" for k, v in report.case.options.items())
    return (
        f"{report.seconds:5.1f} s  temporaries {report.temporary_bytes / 2**20:8.1f} MiB  "
        f"peak {report.peak_bytes / 2**20:8.1f} MiB  {options}"
    )
