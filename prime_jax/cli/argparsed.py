"""Commands that are still declared with argparse: `register(subparsers)` of their module."""

import argparse
import importlib
from collections.abc import Sequence
from typing import NoReturn

from prime_jax.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help)")


def parse(module: str, words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command of `prime_jax.cli.MODULE`.

    Raises:
        UserError: argparse's own words.
    """
    args, args.rest = _parser(module).parse_known_args(words)
    if args.rest and not getattr(args, "overridable", False):
        raise UserError(f"no such option: {' '.join(args.rest)}")
    return args


def _parser(module: str) -> argparse.ArgumentParser:
    top = _Parser(prog="prime-jax")
    importlib.import_module(f"prime_jax.cli.{module}").register(top.add_subparsers(required=True))
    return top
