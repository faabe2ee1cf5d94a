"""What all figures share: style, colours, axes, names beside curves, and their files."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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

from prime_jax.scaling import labels
from prime_jax.scaling.points import Points

Say = Callable[[str], None]
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
    "text.parse_math": False,  # `$` in a name of a family or a file is itself
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
    axis.set_major_formatter(FuncFormatter(lambda v, _: labels.tick(v)))
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


def save(
    figures: dict[str, Figure],
    directory: Path,
    log: Say | None = None,
    formats: Sequence[str] = FORMATS,
) -> dict[tuple[str, str], Path]:
    """Write every figure in every format; returns the paths by figure name and format."""
    paths = {}
    for name, figure in figures.items():
        paths |= attempt(name, partial(_save, name, figure, directory, formats), log) or {}
    return paths


def publish(
    figures: dict[str, Figure],
    names: Iterable[str],
    directory: Path,
    log: Say | None = None,
    formats: Sequence[str] = FORMATS[:1],
) -> dict[tuple[str, str], Path]:
    """`save`; figures of these names that an earlier call left and this one has not, go."""
    paths = save(figures, directory, log, formats)
    gone = {(name, suffix) for name in names for suffix in FORMATS} - set(paths)
    forget(gone, directory)
    return paths


def _save(
    name: str, figure: Figure, directory: Path, formats: Sequence[str]
) -> dict[tuple[str, str], Path]:
    undated = {"svg": {"Date": None}, "png": {}, "pdf": {"CreationDate": None}}
    paths = {(name, suffix): directory / f"{name}.{suffix}" for suffix in formats}
    if len(formats) > 1:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, for all formats
    for (_, suffix), path in paths.items():
        figure.savefig(path, dpi=200, metadata=undated[suffix])
    return paths


def attempt(name: str, act: Callable[[], Any], log: Say | None = None) -> Any:
    """What `act` returns, or None where it cannot draw: numbers never wait for a picture."""
    try:
        with matplotlib.rc_context(STYLE), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = act()
        if said and log is not None:  # a font that lacks a letter of a name, mostly
            log(f"the figure {name}: {str(said[0].message).splitlines()[0]}")
        return made
    except OSError:
        raise
    except Exception as error:  # whatever matplotlib makes of unusual numbers
        if log is None:
            raise
        why = (str(error).splitlines() or [""])[0]
        log(f"the figure {name} cannot be drawn ({type(error).__name__}: {why})")
        return None


def forget(files: Iterable[tuple[str, str]], directory: Path) -> None:
    """Remove figures (name, format) of an earlier fit that this one has not drawn."""
    for name, suffix in files:
        (directory / f"{name}.{suffix}").unlink(missing_ok=True)
