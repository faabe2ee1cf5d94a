"""The loss frontier, and the best N and D, against compute."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prime_jax.scaling import approach2, bootstrap, labels
from prime_jax.scaling.drawing import (
    GREY,
    colour_of,
    count_axis,
    flops_axis,
    mark,
    name_ends,
    room_for_names,
)
from prime_jax.scaling.fit import FamilyFit, ScalingFit, curve_budgets, optima
from prime_jax.scaling.laws import optimum

DOUBT = "†"


def frontier(fit: ScalingFit) -> Figure:
    """The lowest loss at each budget; a panel for each group of comparable families."""
    width = 4.6 if len(fit.groups) > 1 else 6.4
    figure = Figure(figsize=(width * len(fit.groups), 3.9), layout="constrained")
    for panel, names in zip(
        figure.subplots(1, len(fit.groups), squeeze=False)[0], fit.groups, strict=True
    ):
        ends = []
        for name in names:
            family, colour = fit.families[name], colour_of(fit.families, name)
            marks = _vertices(panel, family, "loss", colour, fit.settings.level)
            curve = _curve(panel, family, "loss", colour, fit.settings.level)
            ends += [(name, colour, *end) for end in (marks + curve)[-1:]]
        room_for_names(panel)
        flops_axis(panel)
        panel.set_xlabel(labels.flops_axis(fit.runs.columns))
        panel.set_ylabel(
            labels.loss_axis([fit.families[name].points.measure.kind for name in names])
        )
        name_ends(panel, ends)
    _frontier_legend(figure, fit, [])
    return figure


def best_sizes(fit: ScalingFit) -> Figure:
    """N*(C) and D*(C) of all families: sizes may share an axis whatever the loss is."""
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    titles = {"params": labels.params_axis(fit.runs.columns), "tokens": "training tokens D"}
    for panel, quantity in zip(figure.subplots(1, 2), titles, strict=True):
        ends = []
        for name, family in fit.families.items():
            colour = colour_of(fit.families, name)
            marks = _vertices(panel, family, quantity, colour, fit.settings.level)
            curve = _curve(panel, family, quantity, colour, fit.settings.level)
            if _wins(family):
                places = [(best.flops, getattr(best, quantity)) for best in family.envelope.optima]
                panel.plot(*np.transpose(places), "D", color=colour, markersize=4, fillstyle="none")
            ends += [(_marked(family), colour, *end) for end in (marks + curve)[-1:]]
        room_for_names(panel)
        flops_axis(panel)
        count_axis(panel, "y")
        panel.set_xlabel(labels.flops_axis(fit.runs.columns))
        panel.set_ylabel(f"best {titles[quantity]}")
        name_ends(panel, ends)
    doubtful = any(_marked(family) != name for name, family in fit.families.items())
    notes = []
    if any(_wins(family) for family in fit.families.values()):
        notes.append(mark("D", "approach 1", markersize=4, fillstyle="none"))
    if doubtful:
        text = f"{DOUBT} sizes that are best for a training loss, not for a likelihood"
        notes.append(mark("", text))
    _frontier_legend(figure, fit, notes)
    return figure


def _wins(family: FamilyFit) -> bool:
    """Whether approach 1 found anything."""
    return family.envelope is not None and family.envelope.line is not None


def _curve(
    panel: Axes, family: FamilyFit, quantity: str, colour: str, level: float
) -> list[tuple[float, float]]:
    """The fitted law's curve with its band, within the data; its points."""
    if family.parametric is None:
        return []
    grid = curve_budgets(family.points)
    line = getattr(optimum(family.parametric.fit.law, family.compute, grid), quantity)
    spread = getattr(optima(family.parametric.replicates, family.compute, grid), quantity)
    low, high = bootstrap.interval(spread, level)
    panel.fill_between(grid, low, high, color=colour, alpha=0.16, linewidth=0)
    panel.plot(grid, line, color=colour, linewidth=1.6, zorder=2)
    return list(zip(grid.tolist(), line.tolist(), strict=True))


def _vertices(
    panel: Axes, family: FamilyFit, quantity: str, colour: str, level: float
) -> list[tuple[float, float]]:
    """The optima of approach 2, those that are bounds as open arrows; their places."""
    curves = family.isoflop.curves if family.isoflop else ()
    places, inside = [], 0
    for curve in curves:
        x, y = curve.flops, float(getattr(curve.optimum, quantity))
        places.append((x, y))
        if curve.censored:
            # Below the smallest N means above its D; a bound on the loss is always an upper one.
            up = (curve.censored == "above") == (quantity == "params") and quantity != "loss"
            panel.plot(x, y, "^" if up else "v", color=colour, markerfacecolor="white", zorder=4)
            continue
        panel.plot(
            x,
            y,
            "o",
            color=colour,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=4,
        )
        if quantity != "loss" and family.draws is not None:
            ends = approach2.interval(family.draws.params[:, inside], level)
            if ends:
                ends = ends if quantity == "params" else family.compute.tokens(x, np.array(ends))
                panel.plot([x, x], ends, color=colour, linewidth=1, zorder=3)
        inside += 1
    return places


def _frontier_legend(figure: Figure, fit: ScalingFit, extra: Sequence[Line2D]) -> None:
    handles = [
        Line2D([], [], color=GREY, label=f"approach 3 with {fit.settings.level:.0%} band"),
        mark("o", "approach 2", markersize=5),
        *extra,
    ]
    curves = [v for f in fit.families.values() if f.isoflop for v in f.isoflop.curves]
    if any(curve.censored for curve in curves):
        handles.append(
            mark(
                "v",
                "approach 2, only a bound: the optimum lies beyond",
                markersize=6,
                markerfacecolor="white",
            )
        )
    most = 3 if figure.get_figwidth() > 7 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), most))


def _marked(family: FamilyFit) -> str:
    return family.points.family + (DOUBT if "train_loss" in family.points.measure.kind else "")
