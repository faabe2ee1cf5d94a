"""`prime-jax kernels check`."""

import os
from dataclasses import dataclass
from typing import Any, Literal

from prime_jax.cli.console import say
from prime_jax.cli.parse import Arguments
from prime_jax.kernels.check_case import CHIPS
from prime_jax.settings import setting

KERNELS = ("embedding", "attention", "head")


@dataclass(frozen=True)
class Check(Arguments):
    """Compile forward and backward of each Pallas kernel for TPU chips that need not be there:
    memory, compile time, and the static schedule of each kernel (bundles are about cycles; shuffles
    and spills in the hot block cost time). Needs libtpu; minutes for all chips.

    Exit code 1 if a kernel does not compile."""

    EXAMPLES = ("prime-jax kernels check --chips v5e --kernels head --no-schedule",)

    chips: tuple[Literal[CHIPS], ...] = setting(("v5e", "v5p", "v6e"), "to compile for")
    kernels: tuple[Literal[KERNELS], ...] = setting(KERNELS, "which of them")
    widths: tuple[int, ...] = setting((1024,), "model widths D", at_least=1, metavar="D")
    vocab_size: int = setting(51200, "tokens V", at_least=1, metavar="V")
    no_schedule: bool = setting(False, "quicker: memory and time only")


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
