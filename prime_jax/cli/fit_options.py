"""What the commands that read a DIR of `prime-jax fit` have in common."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.errors import UserError

if TYPE_CHECKING:
    from prime_jax.scaling.launchable import Template
    from prime_jax.scaling.library import Fit

SETTINGS = """\
Any setting of a run may follow, as with `prime-jax train` (--model.vocab-size 50304,
--data.seq-len 1024). What is left out is that of the sweep which was fitted, or of --sweep ROOT,
or the default.
"""


def parser(commands: Any, name: str, help: str, description: str) -> argparse.ArgumentParser:
    """A command on DIR, with what a run that can be launched needs to be known."""
    made = commands.add_parser(
        name,
        help=help,
        description=f"{description}\n{SETTINGS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("fit", type=Path, metavar="DIR", help="written by `prime-jax fit`")
    made.add_argument("--sweep", type=Path, metavar="ROOT", help="take a run's settings from it")
    made.add_argument(
        "--as",
        dest="kind",
        choices=("arm", "mdm", "prime"),
        help="what a run of the family is, where its name does not say",
    )
    made.add_argument("--json", action="store_true", help="print JSON, for programs")
    return made


def positive(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{value!r}: a number above 0, like 1e21")
    return number


def template(args: argparse.Namespace, fitted: "Fit", family: str) -> "Template":
    """The settings of new runs of a family.

    Raises:
        UserError: --sweep is none or has no such family, or a setting is unknown.
    """
    import dataclasses

    from prime_jax.cli.train import override
    from prime_jax.scaling import launchable

    known = fitted.family(family).template
    if args.sweep:
        families = launchable.of_sweep(args.sweep)
        if family not in families:
            raise UserError(f"{args.sweep}: no family {family!r}; it has {', '.join(families)}")
        known = families[family]
    made = launchable.template(family, vars(fitted.conventions), known, args.kind)
    if not args.rest:
        return made
    return dataclasses.replace(made, config=override(made.config, args.rest))
