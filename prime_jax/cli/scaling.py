"""`prime-jax scaling`: compare and validate fits, predict from them, design the next runs."""

import argparse

from prime_jax.cli import compare, design, predict


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "scaling",
        help="compare families, validate, predict, design the next runs",
        description="What scaling laws are for, once there are runs to fit them to.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (compare, predict, design):
        module.register(commands)
