"""`prime-jax scaling compare` and `prime-jax scaling validate`."""

from dataclasses import dataclass

from prime_jax.cli.console import Progress, say, show
from prime_jax.cli.fit import OfRuns, complain, show_head, show_warnings, spare
from prime_jax.runtime import outputs
from prime_jax.settings import REQUIRED, setting


@dataclass(frozen=True, kw_only=True)
class Compare(OfRuns):
    """Compares families with a baseline, all of them resampled together on the sizes and budgets
    that they share: the compute multiplier m (how many times the compute of the baseline a family
    needs for the same loss) as a curve with a band, from the fitted laws and between the optima of
    the budgets; how probable it is at each budget that a family is the lower one; and whether
    exponents or E differ. An m that uses a frontier beyond its data is an extrapolation and says
    so.

    Families measured with different kinds of number (nll, nelbo / train_loss), tokenizers or
    evaluation sets are refused unless --allow-mixed-kinds; then every result says what is mixed.

    Exit code: 0 compared, 3 something was refused (compare.json says what and why), 2 bad input."""

    EXAMPLES = ("prime-jax scaling compare quickstart --baseline arm --against mdm prime",)

    baseline: str = setting(REQUIRED, "a family", metavar="F")
    against: tuple[str, ...] = setting((), "families (default: the others)", metavar="F")


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
    """Fits on the smallest budgets, predicts the rest, adds a budget, and so on: the signed error
    of predictions of larger budgets, which no bootstrap sees.

    Exit code: 0 validated, 3 for no family are there enough budgets, 2 bad input."""

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
