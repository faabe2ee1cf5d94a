"""Loss against size at each budget: parabolas, their minima, and the fitted law."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prime_jax.scaling import approach2, labels
from prime_jax.scaling.drawing import GREY, count_axis, mark, panels_of, room_for_names, shades_of
from prime_jax.scaling.fit import FamilyFit, ScalingFit

MAX_LABELS = 10  # budgets named beside their curves; more get a colour bar
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
    if max(len(family.points.budgets) for family in fit.families.values()) > MAX_LABELS:
        figure.colorbar(shades, ax=panels, label=labels.flops_axis(fit.runs.columns))
    curves = [v for f in fit.families.values() if f.isoflop for v in f.isoflop.curves]
    handles = [
        mark("o", "run", markersize=4),
        Line2D([], [], color=GREY, label="parabola (approach 2)"),
        Line2D([], [], color=GREY, linestyle=(0, (4, 2)), label="fitted law (approach 3)"),
        mark("*", "minimum: N*", markersize=9, markeredgecolor="white", markeredgewidth=0.5),
    ]
    if any(curve.censored for curve in curves):
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
    curves = {v.flops: v for v in family.isoflop.curves} if family.isoflop else {}
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
        if budget in curves:
            panel.plot(grid, curves[budget].loss(grid), color=shade, linewidth=1.2)
            _minimum(panel, curves[budget], shade)
            end = curves[budget].loss(grid[-1:])[0]
        if len(points.budgets) <= MAX_LABELS:
            panel.annotate(
                labels.flops(budget), (grid[-1], end), xytext=(4, 0), textcoords="offset points",
                fontsize=7, color=shade, va="center", annotation_clip=False,
            )  # fmt: skip
    room_for_names(panel)
    count_axis(panel, "x")


def _minimum(panel: Axes, curve: approach2.IsoflopCurve, shade: Any) -> None:
    place = curve.optimum.params, curve.optimum.loss
    if curve.censored:
        panel.plot(
            *place,
            CENSORED[curve.censored],
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
