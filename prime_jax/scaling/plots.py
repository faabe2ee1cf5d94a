"""Figures of a fit and of a comparison, by file name, and their files in three formats."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from prime_jax.scaling import figures_checks, figures_compare, figures_frontier, figures_isoflop
from prime_jax.scaling.drawing import STYLE
from prime_jax.scaling.fit import ScalingFit

Say = Callable[[str], None]
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


def draw_all(fit: ScalingFit, log: Say | None = None) -> dict[str, Figure]:
    """Every figure that the fit has something for, by its file name.

    Args:
        log: told in one line about each figure that cannot be drawn; without it that is raised.
    """
    makers = {
        "isoflop": figures_isoflop.isoflop,
        "frontier": figures_frontier.frontier,
        "optimum": figures_frontier.best_sizes,
        "intervals": figures_checks.intervals,
    }
    if figures_checks.fitted(fit):
        makers |= {"isoloss": figures_checks.isoloss, "residuals": figures_checks.residuals}
    if figures_checks.predicted(fit):
        makers["rollout"] = figures_checks.rollout
    drawn = {name: _attempt(name, partial(make, fit), log) for name, make in makers.items()}
    return {name: figure for name, figure in drawn.items() if figure}


def draw_comparison(
    record: dict[str, Any], families: Iterable[str], log: Say | None = None
) -> dict[str, Figure]:
    """The figure of a compare.json; none where all of it was refused.

    `families` are all those of the data, which have the colours that they have in their fit.
    """
    make = partial(figures_compare.multiplier, record, list(families))
    figure = _attempt("multiplier", make, log)
    return {"multiplier": figure} if figure else {}


def save(
    figures: dict[str, Figure], directory: Path, log: Say | None = None
) -> dict[tuple[str, str], Path]:
    """Write every figure in every format; returns the paths by figure name and format."""
    paths = {}
    for name, figure in figures.items():
        paths |= _attempt(name, partial(_save, name, figure, directory), log) or {}
    return paths


def publish(figures: dict[str, Figure], names: Iterable[str], directory: Path, log: Say) -> dict:
    """`save`; figures of these names that an earlier call left and this one has not, go."""
    paths = save(figures, directory, log)
    forget(set(names) - {name for name, _ in paths}, directory)
    return paths


def _save(name: str, figure: Figure, directory: Path) -> dict[tuple[str, str], Path]:
    undated = {"svg": {"Date": None}, "png": {}, "pdf": {"CreationDate": None}}
    paths = {(name, suffix): directory / f"{name}.{suffix}" for suffix in FORMATS}
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, for all formats
    for (_, suffix), path in paths.items():
        figure.savefig(path, dpi=200, metadata=undated[suffix])
    return paths


def _attempt(name: str, act: Callable[[], Any], log: Say | None) -> Any:
    """What `act` returns, or None where it cannot draw: numbers never wait for a picture."""
    try:
        with matplotlib.rc_context(STYLE):
            return act()
    except OSError:
        raise
    except Exception as error:  # whatever matplotlib makes of unusual numbers
        if log is None:
            raise
        why = (str(error).splitlines() or [""])[0]
        log(f"the figure {name} cannot be drawn ({type(error).__name__}: {why})")
        return None


def forget(names: set[str], directory: Path) -> None:
    """Remove figures that an earlier fit drew and this one has nothing for."""
    for name in names:
        for suffix in FORMATS:
            (directory / f"{name}.{suffix}").unlink(missing_ok=True)
