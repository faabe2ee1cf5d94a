"""The `prime-jax` command. Only the standard library is imported until a command runs."""

import argparse
import sys

from prime_jax import __version__
from prime_jax.errors import UserError


def parser() -> argparse.ArgumentParser:
    from prime_jax.cli import analyse as analyse_commands
    from prime_jax.cli import data as data_commands
    from prime_jax.cli import evaluate as eval_commands
    from prime_jax.cli import fit as fit_commands
    from prime_jax.cli import interchange as interchange_commands
    from prime_jax.cli import kernels as kernels_commands
    from prime_jax.cli import sample as sample_commands
    from prime_jax.cli import scaling
    from prime_jax.cli import sweep as sweep_commands
    from prime_jax.cli import train as commands

    top = argparse.ArgumentParser(
        prog="prime-jax",
        description="Scale masked diffusion language models over sub-tokens, with valid numbers.",
        epilog="prime-jax COMMAND --help says more. Start with: make quickstart",
    )
    top.add_argument("--version", action="version", version=f"prime-jax {__version__}")
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for package in (
        commands,
        data_commands,
        sweep_commands,
        fit_commands,
        scaling,
        kernels_commands,
        eval_commands,
        analyse_commands,
        interchange_commands,
        sample_commands,
    ):
        package.register(subparsers)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; bad input ends in one line on stderr and exit code 2."""
    top = parser()
    try:
        args, args.rest = top.parse_known_args(argv)
        if args.rest and not getattr(args, "overridable", False):
            top.error(f"no such option: {' '.join(args.rest)}")
        return args.run(args) or 0
    except UserError as error:
        print(f"prime-jax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
