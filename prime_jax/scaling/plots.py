"""Figures: IsoFLOP valleys, the loss frontier, and the best N and D against compute.

Each function returns a matplotlib figure; `save` writes it as SVG, PNG and PDF.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from prime_jax.scaling import approach2, bootstrap, labels
from prime_jax.scaling.fit import FamilyFit, ScalingFit, curve_budgets, optima
from prime_jax.scaling.laws import optimum

FORMATS = ("svg", "png", "pdf")
# Okabe and Ito's colours, told apart by all common kinds of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#555555"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#222222",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "prime_jax",  # the same data give the same file
}
DOUBT = "†"
BUDGET_COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.78, 256)))
MOST_LABELS = 10  # budgets named beside their curves; more get a colour bar
CENSORED = {"below": "<", "above": ">"}


def draw_all(fit: ScalingFit) -> dict[str, Figure]:
    """Every figure by its file name."""
    with matplotlib.rc_context(STYLE):
        return {"isoflop": isoflop(fit), "frontier": frontier(fit), "optimum": best_sizes(fit)}


def save(figures: dict[str, Figure], directory: Path) -> dict[tuple[str, str], Path]:
    """Write every figure in every format; returns the paths by figure name and format."""
    undated = {"svg": {"Date": None}, "png": {}, "pdf": {"CreationDate": None}}
    paths = {}
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once, for all formats
            for suffix in FORMATS:
                paths[name, suffix] = directory / f"{name}.{suffix}"
                figure.savefig(paths[name, suffix], dpi=200, metadata=undated[suffix])
    return paths


def isoflop(fit: ScalingFit) -> Figure:
    """Loss against N, a panel for each family, a colour for each budget."""
    columns = min(3, len(fit.families))
    rows = -(-len(fit.families) // columns)
    width = max(3.6 * columns, 6.4)
    figure = Figure(figsize=(width, 3.5 * rows + 0.35), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(fit.families) :]:
        panel.set_visible(False)
    budgets = np.concatenate([family.points.budgets for family in fit.families.values()])
    shades = ScalarMappable(LogNorm(budgets.min(), budgets.max()), BUDGET_COLOURS)
    for panel, (name, family) in zip(panels, fit.families.items(), strict=False):
        _valleys(panel, family, shades)
        panel.set_title(name)
        panel.set_xlabel(labels.params_axis(fit.runs.columns))
        panel.set_ylabel(labels.loss_axis([family.points.measure.kind]))
    if max(len(family.points.budgets) for family in fit.families.values()) > MOST_LABELS:
        figure.colorbar(shades, ax=panels, label=labels.flops_axis(fit.runs.columns))
    valleys = [v for f in fit.families.values() if f.isoflop for v in f.isoflop.valleys]
    handles = [
        _mark("o", "run", markersize=4),
        Line2D([], [], color=GREY, label="parabola (approach 2)"),
        Line2D([], [], color=GREY, linestyle=(0, (4, 2)), label="fitted law (approach 3)"),
        _mark("*", "vertex: N*", markersize=9, markeredgecolor="white", markeredgewidth=0.5),
    ]
    if any(valley.censored for valley in valleys):
        handles.append(_mark(">", "only a bound on N*", markersize=7, markerfacecolor="white"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles) if width > 7 else 3,
        title=f"colour: {labels.flops_axis(fit.runs.columns)}",
        title_fontsize=8,
    )
    return figure


def frontier(fit: ScalingFit) -> Figure:
    """The lowest loss at each budget; a panel for each group of comparable families."""
    width = 4.6 if len(fit.groups) > 1 else 6.4
    figure = Figure(figsize=(width * len(fit.groups), 3.9), layout="constrained")
    for panel, names in zip(
        figure.subplots(1, len(fit.groups), squeeze=False)[0], fit.groups, strict=True
    ):
        ends = []
        for name in names:
            family, colour = fit.families[name], _colour(fit, name)
            marks = _vertices(panel, family, "loss", colour, fit.settings.level)
            curve = _curve(panel, family, "loss", colour, fit.settings.level)
            ends += [(name, colour, *end) for end in (marks + curve)[-1:]]
        _room_for_names(panel)
        panel.set_xlabel(labels.flops_axis(fit.runs.columns))
        panel.set_ylabel(
            labels.loss_axis([fit.families[name].points.measure.kind for name in names])
        )
        _name_ends(panel, ends)
    _frontier_legend(figure, fit, [])
    return figure


def best_sizes(fit: ScalingFit) -> Figure:
    """N*(C) and D*(C) of all families: sizes may share an axis whatever the loss is."""
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    titles = {"params": labels.params_axis(fit.runs.columns), "tokens": "training tokens D"}
    for panel, quantity in zip(figure.subplots(1, 2), titles, strict=True):
        ends = []
        for name, family in fit.families.items():
            colour = _colour(fit, name)
            marks = _vertices(panel, family, quantity, colour, fit.settings.level)
            curve = _curve(panel, family, quantity, colour, fit.settings.level)
            ends += [(_marked(family), colour, *end) for end in (marks + curve)[-1:]]
        _room_for_names(panel)
        _count_axis(panel, "y")
        panel.set_xlabel(labels.flops_axis(fit.runs.columns))
        panel.set_ylabel(f"best {titles[quantity]}")
        _name_ends(panel, ends)
    doubtful = any(_marked(family) != name for name, family in fit.families.items())
    note = [_mark("", f"{DOUBT} sizes that are best for a training loss, not for a likelihood")]
    _frontier_legend(figure, fit, note if doubtful else [])
    return figure


def _valleys(panel: Axes, family: FamilyFit, shades: ScalarMappable) -> None:
    points = family.points
    valleys = {v.flops: v for v in family.isoflop.valleys} if family.isoflop else {}
    for budget in points.budgets:
        shade = shades.to_rgba(budget)
        mine = points.budget == budget
        params, loss, error = points.params[mine], points.loss[mine], points.loss_se[mine]
        panel.errorbar(
            params, loss, np.nan_to_num(error), fmt="o", color=shade, markersize=3, linewidth=1
        )
        grid = np.geomspace(params.min(), params.max(), 60)
        end = loss[np.argmax(params)]
        if family.parametric:
            law = family.parametric.fit.law.loss(grid, family.compute.tokens(budget, grid))
            panel.plot(grid, law, color=shade, linewidth=0.9, linestyle=(0, (4, 2)))
        if budget in valleys:
            panel.plot(grid, valleys[budget].loss(grid), color=shade, linewidth=1.2)
            _vertex(panel, valleys[budget], shade)
            end = valleys[budget].loss(grid[-1:])[0]
        if len(points.budgets) <= MOST_LABELS:
            panel.annotate(
                labels.flops(budget), (grid[-1], end), xytext=(4, 0), textcoords="offset points",
                fontsize=7, color=shade, va="center", annotation_clip=False,
            )  # fmt: skip
    _room_for_names(panel)
    _count_axis(panel, "x")


def _vertex(panel: Axes, valley: approach2.Valley, shade: Any) -> None:
    place = valley.optimum.params, valley.optimum.loss
    if valley.censored:
        panel.plot(
            *place,
            CENSORED[valley.censored],
            color=shade,
            markerfacecolor="white",
            markersize=7,
            zorder=5,
        )
    else:
        panel.plot(
            *place,
            "*",
            color=shade,
            markersize=10,
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=5,
        )


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
    valleys = family.isoflop.valleys if family.isoflop else ()
    places, inside = [], 0
    for valley in valleys:
        x, y = valley.flops, float(getattr(valley.optimum, quantity))
        places.append((x, y))
        if valley.censored:
            # Below the smallest N means above its D; a bound on the loss is always an upper one.
            up = (valley.censored == "above") == (quantity == "params") and quantity != "loss"
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
        _mark("o", "approach 2", markersize=5),
        *extra,
    ]
    valleys = [v for f in fit.families.values() if f.isoflop for v in f.isoflop.valleys]
    if any(valley.censored for valley in valleys):
        handles.append(
            _mark(
                "v",
                "approach 2, only a bound: the optimum lies beyond",
                markersize=6,
                markerfacecolor="white",
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _name_ends(panel: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Write each family's name at the end of its curve, moved apart where they would overlap."""
    heights = panel.transScale.transform([(1, y) for y in panel.get_ylim()])[:, 1]
    least = 0.055 * (heights[1] - heights[0])
    previous = -np.inf
    for name, colour, x, y in sorted(ends, key=lambda end: end[3]):
        previous = max(panel.transScale.transform((x, y))[1], previous + least)
        clear = panel.transScale.inverted().transform((0, previous))[1]
        panel.annotate(
            name, (x, clear), xytext=(6, 0), textcoords="offset points", color=colour,
            va="center", fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _room_for_names(panel: Axes) -> None:
    """A log x axis with space at its right end for what is written beside the curves."""
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    panel.set_xlim(low, high * (high / low) ** 0.1)


def _marked(family: FamilyFit) -> str:
    return family.points.family + (DOUBT if "train_loss" in family.points.measure.kind else "")


def _count_axis(panel: Axes, which: str) -> None:
    """A log axis that reads 25M, 100M, 1B."""
    axis = panel.xaxis if which == "x" else panel.yaxis
    (panel.set_xscale if which == "x" else panel.set_yscale)("log")
    low, high = panel.get_xlim() if which == "x" else panel.get_ylim()
    wide = high / low > 30
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: labels.count(v)))
    axis.set_minor_formatter(NullFormatter())


def _colour(fit: ScalingFit, name: str) -> str:
    return COLOURS[list(fit.families).index(name) % len(COLOURS)]


def _mark(marker: str, label: str, **style: Any) -> Line2D:
    return Line2D([], [], color=GREY, marker=marker, linestyle="none", label=label, **style)
