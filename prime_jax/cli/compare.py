"""`prime-jax scaling compare` and `prime-jax scaling validate`."""

from dataclasses import dataclass

from prime_jax.cli.console import Progress, say, show
from prime_jax.cli.fit import OfRuns, complain, show_head, show_warnings, spare
from prime_jax.runtime import outputs
from prime_jax.settings import REQUIRED, setting


@dataclass(frozen=True, kw_only=True)
class Compare(OfRuns):
    """Compare families with a baseline. Results: the compute multiplier m (how many times the compute
    of the baseline a family needs for the same loss) as a curve with an interval, from the fitted laws
    and between the optima of the budgets; the probability at each budget that a family has the lower
    loss; and tests whether exponents or E differ. All families are resampled together on the sizes
    and budgets that they share. An m beyond the data of a family is marked as an extrapolation.

    Families with different kinds of number (nll, nelbo / train_loss), tokenizers or evaluation sets
    are refused. With --allow-mixed-kinds they are compared, and every result says what is mixed.

    Exit code: 0 compared, 3 something was refused (compare.json says what and why), 2 bad input."""

    EXAMPLES = ("prime-jax scaling compare quickstart --baseline arm --against mdm prime",)

    baseline: str = setting(REQUIRED, "family to compare with", metavar="F")
    against: tuple[str, ...] = setting((), "families to compare (default: all others)", metavar="F")


def compare(args: Compare) -> int:
    from prime_jax import scaling
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import tables

    out = args.directory
    files = spare(args, ("compare.json",), ("multiplier",))
    with Progress(transient=True) as progress:
        progress.doing("comparing")
        found = scaling.compare(
            args.source, args.baseline, args.against, progress=progress.doing, **args.options()
        )
    result = found.to_dict()
    with outputs.folder(out, files, force=args.force):
        write_json_atomic(out / "compare.json", result)
        show_head(result)
        for table in tables.comparison(result):
            show(table)
        show_warnings(result)
        drawn = found.draw(out, args.suffixes, complain)
    for path in (out / "compare.json", *drawn):
        say(f"wrote  {path}")
    return 3 if found.refused else 0


@dataclass(frozen=True)
class Validate(OfRuns):
    """Fit the smallest budgets, predict the others, add a budget, and so on. The result is the signed
    error of predictions of larger budgets, which a bootstrap does not show.

    Exit code: 0 validated, 3 no family has enough budgets, 2 bad input."""

    EXAMPLES = ("prime-jax scaling validate quickstart",)


def validate(args: Validate) -> int:
    from prime_jax import scaling
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import tables

    files = spare(args, ("validate.json",), ())
    with Progress(transient=True) as progress:
        found = scaling.validate(args.source, progress=progress.doing, **args.options())
    result, path = found.to_dict(), args.directory / "validate.json"
    with outputs.folder(args.directory, files, force=args.force):
        write_json_atomic(path, result)
    show_head(result)
    for name, family in result["families"].items():
        if family["steps"]:
            show(tables.validation(name, family))
    show_warnings(result)
    say(f"wrote  {path}")
    return 0 if any(family["steps"] for family in result["families"].values()) else 3
