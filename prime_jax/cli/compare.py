"""`prime-jax scaling compare` and `prime-jax scaling validate`."""

import argparse

from prime_jax.cli import fit as fit_commands

COMPARE = """\
Compares families with a baseline, all of them resampled together on the sizes and budgets that
they share: the compute multiplier m (how many times the compute of the baseline a family needs for
the same loss) as a curve with a band, from the fitted laws and between the optima of the budgets;
how probable it is at each budget that a family is the lower one; and whether exponents or E differ.
An m that uses a frontier beyond its data is an extrapolation and says so.

Families measured with different kinds of number (nll, nelbo / train_loss), tokenizers or evaluation
sets are refused unless --allow-mixed-kinds; then every result says what is mixed.

Exit code: 0 compared, 3 something was refused (compare.json says what and why), 2 bad input.
"""
VALIDATE = """\
Fits on the smallest budgets, predicts the rest, adds a budget, and so on: the signed error of
predictions of larger budgets, which no bootstrap sees.

Exit code: 0 validated, 3 for no family are there enough budgets, 2 bad input.
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "compare",
        help="families against a baseline: compute multiplier, tests, probability per budget",
        description=COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fit_commands.add_options(parser)
    parser.add_argument("--baseline", required=True, metavar="F", help="a family (required)")
    parser.add_argument("--against", nargs="+", default=[], metavar="F", help="default: the others")
    parser.set_defaults(run=compare)
    parser = commands.add_parser(
        "validate",
        help="predict the larger budgets from the smaller ones: signed errors",
        description=VALIDATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fit_commands.add_options(parser)
    parser.set_defaults(run=validate)


def compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from prime_jax import scaling
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import labels, record, tables

    console = Console(width=max(labels.WIDTH, Console().width))
    out = args.out or fit_commands.default_out(args.runs)
    fit_commands.spare(args, out, ("compare.json",), ("multiplier",))
    with console.status("comparing") as status:
        found = scaling.compare(
            args.runs,
            args.baseline,
            args.against,
            progress=status.update,
            **fit_commands.options(args),
        )
    result = found.to_dict()
    write_json_atomic(record.make(out) / "compare.json", result)
    fit_commands.print_head(console, result)
    for table in tables.comparison(result):
        fit_commands.show(console, table)
    fit_commands.print_warnings(console, result)
    written = found.draw(out, args.formats, fit_commands.complain)
    for path in (out / "compare.json", *written):
        console.print(f"wrote  {path}", soft_wrap=True, highlight=False)
    return 3 if found.refused else 0


def validate(args: argparse.Namespace) -> int:
    from rich.console import Console

    from prime_jax import scaling
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.scaling import labels, record, tables

    console = Console(width=max(labels.WIDTH, Console().width))
    out = args.out or fit_commands.default_out(args.runs)
    fit_commands.spare(args, out, ("validate.json",), ())
    with console.status("validating") as status:
        found = scaling.validate(args.runs, progress=status.update, **fit_commands.options(args))
    result, path = found.to_dict(), record.make(out) / "validate.json"
    write_json_atomic(path, result)
    fit_commands.print_head(console, result)
    for name, family in result["families"].items():
        if family["steps"]:
            fit_commands.show(console, tables.validation(name, family))
    fit_commands.print_warnings(console, result)
    console.print(f"wrote  {path}", soft_wrap=True, highlight=False)
    return 0 if any(family["steps"] for family in result["families"].values()) else 3
