"""`prime-jax sweep report`: it takes what `fit` takes."""

import argparse
from typing import Any

from prime_jax.cli import fit
from prime_jax.errors import UserError


def register(subparsers: Any) -> None:
    sweep = subparsers.add_parser("sweep").add_subparsers(required=True)
    parser = sweep.add_parser(
        "report",
        description="Fits and writes the report as `prime-jax fit ROOT` does. With --live it uses "
        "what has finished so far, and says of how many runs. Exit code: as `fit`.",
    )
    fit.add_options(parser)
    parser.add_argument("--live", action="store_true", help="do not wait for the last run")
    parser.set_defaults(run=report, curves=None)


def report(args: argparse.Namespace) -> int:
    from prime_jax.sweep import state

    state.check_root(args.runs)
    runs = state.list_runs(args.runs)
    done = sum(run.result is not None for run in runs)
    if done < len(runs) and not args.live:
        raise UserError(f"{args.runs}: {done} of {len(runs)} runs have finished; add --live")
    args.note = f"live: {done} of {len(runs)} runs" if done < len(runs) else ""
    return fit.run(args)
