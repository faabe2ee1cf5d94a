"""The compute multiplier of `prime-jax scaling compare`, from the contents of compare.json."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from prime_jax.scaling import labels
from prime_jax.scaling.drawing import GREY, colour_of, flops_axis, mark

MIXED = "#b42318"
FARTHEST = 30.0  # a multiplier is drawn up to this many times beyond those in range


def multiplier(record: dict[str, Any], families: list[str]) -> Figure | None:
    """m against C, a row for each family; None where every comparison was refused."""
    base, level = record["baseline"]["family"], record["method"]["level"]
    compared = {n: f for n, f in record["families"].items() if "multiplier" in f}
    if not compared:
        return None
    figure = Figure(figsize=(7.8, 3.1 * len(compared) + 0.6), layout="constrained")
    convention = labels.convention(record["conventions"]["flops"])
    for panels, (name, family) in zip(
        figure.subplots(len(compared), 2, squeeze=False), compared.items(), strict=True
    ):
        colour = colour_of(families, name)
        for panel, side, who in zip(
            panels, ("at_family", "at_baseline"), (name, base), strict=True
        ):
            _curve(panel, family["multiplier"][side], colour)
            panel.set_xlabel(f"C that {who} spends (FLOPs, {convention})")
        panels[0].set_ylabel(f"m = C of {name} / C of {base}\nfor one loss")
        panels[0].set_title(f"{name} against {base}", loc="left")
        if family["mixed"]:
            panels[0].set_title(
                f"{name} against {base}: mixed kinds of number", loc="left", color=MIXED
            )
            panels[1].set_title("no comparison of models", loc="left", color=MIXED)
    handles = [
        Line2D([], [], color=GREY, label="fitted laws, in range"),
        Line2D([], [], color=GREY, linestyle=(0, (3, 2)), label="extrapolated"),
        Patch(color=GREY, alpha=0.2, label=f"{level:.0%} band"),
        mark("o", "between optima of approach 2", markersize=5),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _curve(panel: Axes, side: dict[str, Any], colour: str) -> None:
    curve, budgets = side["curve"], side["budgets"]
    flops, value = np.array(curve["flops"]), np.array(curve["value"], dtype=float)
    inside = np.array(curve["in_range"])
    low, high = (np.array(ends, dtype=float) for ends in curve["interval"])
    points = [row for row in budgets if row["interpolated"]]
    bottom, top = _limits(
        value, inside, low, high, [row["interpolated"]["value"] for row in points]
    )
    panel.set_yscale("log")
    panel.set_xlim(*_ends(flops, [row["flops"] for row in budgets]))
    # An end that is no number is beyond the panel.
    low, high = (
        np.where(np.isfinite(low), low, bottom / 10),
        np.where(np.isfinite(high), high, top * 10),
    )
    reached = np.isfinite(value)
    panel.fill_between(flops, low, high, where=reached, color=colour, alpha=0.14, linewidth=0)
    panel.plot(flops, value, color=colour, linewidth=1.2, linestyle=(0, (3, 2)))
    panel.plot(flops, np.where(inside, value, np.nan), color=colour, linewidth=2.2)
    for row in points:
        found = row["interpolated"]
        if found["interval"]:
            panel.plot([row["flops"]] * 2, found["interval"], color=colour, linewidth=1)
        panel.plot(
            row["flops"], found["value"], "o", color=colour, markersize=5, markeredgecolor="white"
        )
    panel.axhline(1, color=GREY, linewidth=0.8)
    if not reached.any() and not points:
        panel.text(
            0.5, 0.6, "no loss that both reach", transform=panel.transAxes, ha="center", color=GREY
        )
    panel.set_ylim(bottom, top)
    flops_axis(panel)
    subs = (1.0,) if top / bottom > 300 else (1.0, 2.0, 5.0)
    panel.yaxis.set_major_locator(
        LogLocator(subs=subs if top / bottom > 5 else (1, 1.5, 2, 3, 5, 7))
    )
    panel.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _ends(flops: np.ndarray, budgets: list[float]) -> tuple[float, float]:
    """Of the x axis: what was spent, with a margin, whether or not anything is drawn there."""
    spent = np.log(np.concatenate([flops, budgets]))
    margin = max(0.05 * np.ptp(spent), 0.05)
    return float(np.exp(spent.min() - margin)), float(np.exp(spent.max() + margin))


def _limits(
    value: np.ndarray, inside: np.ndarray, low: np.ndarray, high: np.ndarray, points: list[float]
) -> tuple[float, float]:
    """Of the axis: all that is in range, and no more than FARTHEST times beyond it."""
    known = value[np.isfinite(value)]
    core = np.concatenate([a[inside & np.isfinite(a)] for a in (value, low, high)] + [points])
    core = core if len(core) else known[:1]
    if not len(core):
        return 0.1, 10.0
    wanted = np.concatenate([core, known])
    bottom = max(wanted.min(), core.min() / FARTHEST)
    top = min(wanted.max(), core.max() * FARTHEST)
    return float(bottom / 1.3), float(top * 1.3)
