"""`prime-jax kernels check`."""

import argparse
import os
from typing import Any

from prime_jax.hardware import chips

KERNELS = ("embedding", "attention", "head")


def register(subparsers: Any) -> None:
    kernels = subparsers.add_parser(
        "kernels",
        help="compile the TPU kernels without a TPU",
        description="The Pallas kernels of the head, the attention and the embedding, as the TPU "
        "compiler sees them. No TPU is needed, or used if there is one.",
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
