"""`prime-jax scaling predict`."""

import argparse
from typing import TYPE_CHECKING, Any

from prime_jax.cli import fit as fit_commands
from prime_jax.cli import fit_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from prime_jax.scaling.predict import Best, Estimate, Launch, Prediction

SCHEMA = 1
UNIT = "nats / token"  # of a loss whose kind is stated
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
    import dataclasses
    import json

    from rich.console import Console

    from prime_jax.scaling import predict, saved

    fitted = saved.read(args.fit)
    found = []
    for name in args.family or fitted.runs.families:
        template = fit_options.template(args, fitted, name)
        limit = args.data_limit or fitted.unique_tokens.get(name)
        family = fitted.refit(name)
        found.append(predict.predict(family, fitted.settings, args.flops, template, limit))
    if args.json:
        head = {"schema": SCHEMA, "level": fitted.settings.level}
        head |= {name: fitted.result[name] for name in ("source", "metric", "conventions")}
        rows = [
            dataclasses.asdict(one)
            | {"findings": _as_dicts(one), "loss_unit": UNIT if one.kind else None}
            for one in found
        ]
        print(json.dumps(head | {"predictions": rows}, indent=2))
    else:
        _show(found, fitted.result, Console())


def _as_dicts(prediction: "Prediction") -> list[dict[str, Any]]:
    return [diagnostic.as_dict() for diagnostic in prediction.diagnostics]


def _show(found: "list[Prediction]", result: dict[str, Any], console: "Console") -> None:
    from prime_jax.scaling import labels

    conventions, level = result["conventions"], result["method"]["level"]
    console.print(
        f"{result['source']['name']} at C = {labels.flops(found[0].flops)} FLOPs "
        f"({labels.convention(conventions['flops'])}); "
        f"N {labels.convention(conventions['params'])}; {level:.0%} intervals",
        highlight=False,
    )
    console.print(_table(found))
    for one in found:
        if one.launch:
            for note in one.launch.notes:
                console.print(f"[dim]note[/] {one.family}: {note}", highlight=False)
        warnings = [diagnostic.as_dict() for diagnostic in one.diagnostics]
        fit_commands.print_warnings(console, f"{one.family}: ", warnings)


def _table(found: "list[Prediction]") -> "Table":
    """A column for each family."""
    from rich import box
    from rich.table import Table

    table = Table("", *(one.family for one in found), box=box.SIMPLE_HEAD, pad_edge=False)
    unit = f" ({UNIT})" if all(one.kind for one in found) else ""
    columns = [_cells(one, unit) for one in found]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _cells(one: "Prediction", unit: str) -> dict[str, str]:
    from prime_jax.scaling import labels

    three, two = one.approach3, one.approach2
    where = "within the data" if one.in_range else f"{one.decades:.2g} decades beyond"
    out = {"kind of loss": labels.kind(one.kind), "C lies": where}
    out |= {
        "N* (parameters), approach 3": _with(three, "params", labels.count),
        "N* (parameters), approach 2": _with(two, "params", labels.count),
        "D* (tokens), approach 3": _with(three, "tokens", labels.count),
        "D* (tokens), approach 2": _with(two, "tokens", labels.count),
        f"loss{unit}": _with(three, "loss", labels.value),
        "  with model error": _with(three, "loss_with_model_error", labels.value),
    }
    error = one.rollout
    out["  error of the rollout"] = (
        f"{error.bias:+.2%} on average, {error.rms:.2%} rms" if error else "not known"
    )
    unique = one.unique_tokens
    out["D* / unique tokens"] = (
        f"{one.epochs:.3g} ({labels.count(unique)})" if unique else "not known"
    )
    return out | _launch_cells(one.launch)


def _launch_cells(launch: "Launch | None") -> dict[str, str]:
    from prime_jax.scaling import labels

    names = (
        "nearest run: layers x width x heads",
        "its N",
        "its steps x sequences",
        "its tokens D",
    )
    names += ("its loss, expected",)
    if launch is None:
        return dict.fromkeys(names, "none")
    cells = (
        f"{launch.layers} x {launch.width} x {launch.heads}",
        f"{launch.params:,} ({labels.convention(launch.count)})",
        f"{launch.steps:,} x {launch.batch_size:,}",
        f"{launch.tokens:,}",
        "refused" if launch.loss is None else labels.value(launch.loss),
    )
    return dict(zip(names, cells, strict=True))


def _with(best: "Best | None", quantity: str, show: Any) -> str:
    if best is None:
        return "refused"
    estimate: Estimate | None = getattr(best, quantity)
    if estimate is None:
        return "not known"
    ends = estimate.interval
    between = f" ({show(ends[0])}–{show(ends[1])})" if ends else " (no interval)"
    return f"{show(estimate.value)}{between}"
