"""Loss against size at each budget: parabolas, their vertices, and the fitted law."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prime_jax.scaling import approach2, labels
from prime_jax.scaling.drawing import GREY, count_axis, mark, panels_of, room_for_names, shades_of
from prime_jax.scaling.fit import FamilyFit, ScalingFit

MOST_LABELS = 10  # budgets named beside their curves; more get a colour bar
CENSORED = {"below": "<", "above": ">"}


def isoflop(fit: ScalingFit) -> Figure:
    """Loss against N, a panel for each family, a colour for each budget."""
    figure, panels = panels_of(len(fit.families), 3.5)
    shades = shades_of(family.points for family in fit.families.values())
    for panel, (name, family) in zip(panels, fit.families.items(), strict=True):
        _valleys(panel, family, shades)
        panel.set_title(name)
        panel.set_xlabel(labels.params_axis(fit.runs.columns))
        panel.set_ylabel(labels.loss_axis([family.points.measure.kind]))
    if max(len(family.points.budgets) for family in fit.families.values()) > MOST_LABELS:
        figure.colorbar(shades, ax=panels, label=labels.flops_axis(fit.runs.columns))
    valleys = [v for f in fit.families.values() if f.isoflop for v in f.isoflop.valleys]
    handles = [
        mark("o", "run", markersize=4),
        Line2D([], [], color=GREY, label="parabola (approach 2)"),
        Line2D([], [], color=GREY, linestyle=(0, (4, 2)), label="fitted law (approach 3)"),
        mark("*", "vertex: N*", markersize=9, markeredgecolor="white", markeredgewidth=0.5),
    ]
    if any(valley.censored for valley in valleys):
        handles.append(mark(">", "only a bound on N*", markersize=7, markerfacecolor="white"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles) if figure.get_figwidth() > 7 else 3,
        title=f"colour: {labels.flops_axis(fit.runs.columns)}",
        title_fontsize=8,
    )
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
    room_for_names(panel)
    count_axis(panel, "x")


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
