"""`prime-jax scaling predict`."""

import argparse

from prime_jax.cli import fit as fit_commands
from prime_jax.cli import fit_options

SCHEMA = 1
DESCRIPTION = """\
Reads DIR of `prime-jax fit` and gives, for a compute budget C in the fit's FLOPs: the best size
N*, its tokens D* and the loss there, each with its interval (approach 3 from the bootstrap,
approach 2 from the power law through its optima), whether C lies within the data, and the nearest
run that can be launched. The rollout, how wrong losses of larger budgets were when predicted from
smaller ones, widens the interval of the loss.
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = fit_options.parser(
        commands, "predict", "N*, D* and the loss at a budget, with intervals", DESCRIPTION
    )
    parser.add_argument(
        "--flops",
        type=fit_options.positive,
        required=True,
        metavar="C",
        help="the budget (required)",
    )
    parser.add_argument("--family", nargs="+", metavar="F", help="default: all of them")
    parser.add_argument(
        "--data-limit",
        type=fit_options.positive,
        metavar="TOKENS",
        help="unique tokens of the training data (default: what the runs say)",
    )
    parser.set_defaults(run=run, overridable=True)


def run(args: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from prime_jax import scaling
    from prime_jax.scaling import labels, record, tables
    from prime_jax.scaling.prediction import predict_family
    from prime_jax.scaling.schema import as_dict

    fitted = scaling.load(args.fit, args.family)
    unique, rows = record.unique_tokens(fitted.table), []
    for name, family in fitted.families.items():
        template = fit_options.template(args, fitted, name)
        limit = args.data_limit or unique.get(name)
        rows.append(as_dict(predict_family(family, fitted.settings, args.flops, template, limit)))
    head = {"schema": SCHEMA, "level": fitted.settings.level}
    head |= {name: as_dict(getattr(fitted, name)) for name in ("source", "metric", "conventions")}
    if args.json:
        found = [row | {"loss_unit": tables.UNIT if row["kind"] else None} for row in rows]
        print(json.dumps(head | {"predictions": found}, indent=2))
        return
    console = Console()
    console.print(
        f"{fitted.source.name} at C = {labels.flops(args.flops)} FLOPs "
        f"({labels.convention(fitted.conventions.flops)}); "
        f"N {labels.convention(fitted.conventions.params)}; {head['level']:.0%} intervals",
        highlight=False,
    )
    fit_commands.show(console, tables.predictions(rows))
    for row in rows:
        for note in (row["launch"] or {"notes": []})["notes"]:
            console.print(f"[dim]note[/] {row['family']}: {note}", highlight=False)
    families = {row["family"]: {"warnings": row["findings"]} for row in rows}
    fit_commands.print_warnings(console, {"families": families})
