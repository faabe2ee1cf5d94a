"""What all figures share: style, colours, axes, and names beside curves."""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from prime_jax.scaling import labels
from prime_jax.scaling.points import Points

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
BUDGET_COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.78, 256)))


def name_ends(panel: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
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


def room_for_names(panel: Axes) -> None:
    """A log x axis with space at its right end for what is written beside the curves."""
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    panel.set_xlim(low, high * (high / low) ** 0.1)


def count_axis(panel: Axes, which: str) -> None:
    """A log axis that reads 25M, 100M, 1B."""
    axis = panel.xaxis if which == "x" else panel.yaxis
    (panel.set_xscale if which == "x" else panel.set_yscale)("log")
    low, high = panel.get_xlim() if which == "x" else panel.get_ylim()
    wide = high / low > 30
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: labels.count(v)))
    axis.set_minor_formatter(NullFormatter())


def flops_axis(panel: Axes) -> None:
    """A log x axis that reads 3e18, 1e19, without crowding."""
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    subs = (1.0,) if high / low > 300 else (1.0, 3.0) if high / low > 10 else (1.0, 2.0, 5.0)
    panel.xaxis.set_major_locator(LogLocator(subs=subs))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda v, _: labels.flops(v)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def percent_axis(panel: Axes) -> None:
    """A y axis of signed fractions."""
    panel.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:+.3g}%" if v else "0"))


def colour_of(families: Iterable[str], name: str) -> str:
    """The colour of a family, the same in all figures of one set of families."""
    return COLOURS[list(families).index(name) % len(COLOURS)]


def shades_of(points: Iterable[Points]) -> ScalarMappable:
    """A colour for each budget."""
    budgets = np.concatenate([part.budgets for part in points])
    return ScalarMappable(LogNorm(budgets.min(), budgets.max()), BUDGET_COLOURS)


def panels_of(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most three in a row."""
    columns = min(3, count)
    rows = -(-count // columns)
    size = max(3.6 * columns, 6.4), height * rows + 0.35
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, list(panels[:count])


def mark(marker: str, label: str, **style: Any) -> Line2D:
    return Line2D([], [], color=GREY, marker=marker, linestyle="none", label=label, **style)
