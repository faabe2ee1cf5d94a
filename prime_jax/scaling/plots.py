"""Figures of a fit and of a comparison, by file name, and their files in three formats."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from prime_jax.scaling import figures_checks, figures_compare, figures_frontier, figures_isoflop
from prime_jax.scaling.drawing import STYLE
from prime_jax.scaling.fit import ScalingFit

FORMATS = ("svg", "png", "pdf")
NAMES = (
    "isoflop",
    "frontier",
    "optimum",
    "isoloss",
    "residuals",
    "intervals",
    "rollout",
)  # of a fit


def draw_all(fit: ScalingFit) -> dict[str, Figure]:
    """Every figure that the fit has something for, by its file name."""
    with matplotlib.rc_context(STYLE):
        figures = {
            "isoflop": figures_isoflop.isoflop(fit),
            "frontier": figures_frontier.frontier(fit),
            "optimum": figures_frontier.best_sizes(fit),
            "intervals": figures_checks.intervals(fit),
        }
        if figures_checks.fitted(fit):
            figures["isoloss"] = figures_checks.isoloss(fit)
            figures["residuals"] = figures_checks.residuals(fit)
        if figures_checks.predicted(fit):
            figures["rollout"] = figures_checks.rollout(fit)
        return figures


def draw_comparison(record: dict[str, Any], families: Iterable[str]) -> dict[str, Figure]:
    """The figure of a compare.json; none where all of it was refused.

    `families` are all those of the data, which have the colours that they have in their fit.
    """
    with matplotlib.rc_context(STYLE):
        figure = figures_compare.multiplier(record, list(families))
    return {"multiplier": figure} if figure else {}


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


def forget(names: set[str], directory: Path) -> None:
    """Remove figures that an earlier fit drew and this one has nothing for."""
    for name in names:
        for suffix in FORMATS:
            (directory / f"{name}.{suffix}").unlink(missing_ok=True)
