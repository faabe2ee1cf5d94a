"""How far to trust a fit: isoloss contours, residuals, exponents side by side, held-out errors.

Each family has its own panel, so that losses of different kinds never share an axis.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FixedLocator,
    MaxNLocator,
)
from scipy.stats import norm

from prime_jax.scaling import labels, validate
from prime_jax.scaling.drawing import (
    GREY,
    colour_of,
    count_axis,
    flops_axis,
    mark,
    panels_of,
    percent_axis,
    shades_of,
)
from prime_jax.scaling.fit import FamilyFit, ScalingFit, curve_budgets, exponents
from prime_jax.scaling.laws import optimum

MARGIN = 1.4  # of the sampled N and D, as a ratio, that contours reach beyond them
CONTOURS = 9


def isoloss(fit: ScalingFit) -> Figure:
    """Contours of the law in the plane of N and D, with the runs and the efficient frontier."""
    names = fitted(fit)
    figure, panels = panels_of(len(names), 3.5)
    shades = shades_of(fit.families[name].points for name in names)
    for panel, name in zip(panels, names, strict=True):
        _contours(panel, fit.families[name], shades, colour_of(fit.families, name))
        kind = fit.families[name].points.measure.kind
        panel.set_title(f"{name}: {labels.kind(kind)}" if kind else name)
        panel.set_xlabel(labels.params_axis(fit.runs.columns))
        panel.set_ylabel("training tokens D")
    handles = [
        Line2D([], [], color=GREY, linewidth=0.9, label="equal loss, by the law"),
        mark("o", "run, darker: smaller budget", markersize=4),
        Line2D([], [], color=GREY, linewidth=2, label="best N and D, within the budgets"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=_columns(figure, handles))
    return figure


def residuals(fit: ScalingFit) -> Figure:
    """Measured over fitted loss, against the fitted loss and against C; a row for each family."""
    names = fitted(fit)
    figure = Figure(figsize=(7.6, 2.4 * len(names) + 0.5), layout="constrained")
    rows = figure.subplots(len(names), 2, squeeze=False, sharey="row")
    shades = shades_of(fit.families[name].points for name in names)
    for (by_loss, by_flops), name in zip(rows, names, strict=True):
        family = fit.families[name]
        points, part = family.points, family.parametric
        predicted = part.fit.law.loss(points.params, points.tokens)
        above = points.loss / predicted - 1
        floor = norm.ppf(0.975) * part.errors.seed.relative_sd
        for panel, x in ((by_loss, predicted), (by_flops, points.flops)):
            panel.axhspan(-floor, floor, color=GREY, alpha=0.15, linewidth=0)
            panel.axhline(0, color=GREY, linewidth=0.8)
            panel.scatter(
                x, above, s=13, c=points.budget, cmap=shades.cmap, norm=shades.norm, zorder=3
            )
        flops_axis(by_flops)
        by_loss.set_title(name, loc="left")
        percent_axis(by_loss)
        by_loss.set_ylabel("measured above fitted")
        by_loss.set_xlabel(f"fitted {labels.loss_axis([points.measure.kind])}")
        by_flops.set_xlabel(labels.flops_axis(fit.runs.columns))
    handles = [
        mark("o", "run, darker: smaller budget", markersize=4),
        Patch(color=GREY, alpha=0.15, label=f"95% of runs, by {_floors(fit, names)}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def intervals(fit: ScalingFit) -> Figure:
    """The exponent a of every approach, with its interval: sizes may share an axis."""
    rows: list[tuple[str, str, float, list[float | None] | None, str]] = []
    for name, family in fit.families.items():
        for approach, (a, ends) in exponents(family, fit.settings.level).items():
            debiased = approach == "approach 2" and family.debiased
            note = {"approach 2": ", de-biased" if debiased else "", "approach 3": ", bootstrap"}
            rows.append((name, approach + note.get(approach, ""), a, ends, "o"))
        if family.parametric:
            a, ends = rows[-1][2], list(family.parametric.profile["a"])
            rows.append((name, "approach 3, profile", a, ends, "s"))
    figure = Figure(figsize=(7.2, 0.27 * len(rows) + 1.1), layout="constrained")
    panel = figure.subplots()
    known = [end for *_, a, ends, _ in rows for end in (a, *(ends or ())) if end is not None]
    edge = max(np.ptp(known), 0.05) * 0.06
    low, high = max(min(known), -0.5) - edge, min(max(known), 1.5) + edge
    heights = []
    for k, (name, _, a, ends, marker) in enumerate(rows):
        heights.append(k + 0.6 * len({row[0] for row in rows[: k + 1]}))
        colour = colour_of(fit.families, name)
        if ends:
            shown = [low if ends[0] is None else ends[0], high if ends[1] is None else ends[1]]
            panel.plot(shown, [heights[-1]] * 2, color=colour, linewidth=1.4)
            for end, place, arrow in zip(ends, (low, high), "<>", strict=True):
                if end is None or not low <= end <= high:
                    panel.plot(place, heights[-1], arrow, color=colour, clip_on=False)
        filled = colour if ends else "white"
        panel.plot(a, heights[-1], marker, color=colour, markersize=5, markerfacecolor=filled)
    panel.set_xlim(low, high)
    panel.set_ylim(heights[-1] + 0.8, heights[0] - 0.8)
    panel.yaxis.set_major_locator(FixedLocator(heights))
    panel.set_yticklabels([f"{name}: {label}" for name, label, *_ in rows])
    for label, row in zip(panel.get_yticklabels(), rows, strict=True):
        label.set_color(colour_of(fit.families, row[0]))
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0)
    panel.set_xlabel(
        f"exponent a of N* ∝ C$^a$ (N {labels.convention(fit.runs.columns.params_convention)}, "
        f"FLOPs {labels.convention(fit.runs.columns.flops_convention)}), "
        f"{fit.settings.level:.0%} intervals"
    )
    return figure


def rollout(fit: ScalingFit) -> Figure:
    """Signed error of losses beyond the fitted budgets, against how far beyond they are."""
    names = predicted(fit)
    figure, panels = panels_of(len(names), 3.1)
    for panel, name in zip(panels, names, strict=True):
        found = fit.families[name].rollout
        colour = colour_of(fit.families, name)
        runs = [(p.decades, error) for p in found.predictions for error in p.errors_n]
        panel.plot(*np.transpose(runs), "o", color=colour, markersize=2.5, alpha=0.35)
        means = [(p.decades, p.errors_n.mean()) for p in found.predictions]
        panel.plot(
            *np.transpose(means), "D", color=colour, markersize=5, markeredgecolor="white", zorder=4
        )
        grid = np.linspace(0, max(decades for decades, _ in runs), 40)
        spread = norm.ppf((1 + fit.settings.level) / 2) * validate.model_error(found).at(grid)
        panel.fill_between(grid, -spread, spread, color=colour, alpha=0.12, linewidth=0)
        panel.axhline(0, color=GREY, linewidth=0.8)
        percent_axis(panel)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.set_title(name)
        panel.set_xlabel("decades of C beyond the fitted budgets")
        kind = labels.kind(fit.families[name].points.measure.kind)
        panel.set_ylabel(f"predicted above measured {kind}")
    handles = [
        mark("o", "held-out run", markersize=3, alpha=0.5),
        mark("D", "mean of a held-out budget", markersize=5),
        Patch(color=GREY, alpha=0.2, label=f"model error, {fit.settings.level:.0%} band"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def fitted(fit: ScalingFit) -> list[str]:
    """Families with a law."""
    return [name for name, family in fit.families.items() if family.parametric]


def predicted(fit: ScalingFit) -> list[str]:
    """Families of which larger budgets were predicted."""
    return [n for n, family in fit.families.items() if family.rollout and family.rollout.steps]


def _contours(panel: Axes, family: FamilyFit, shades: ScalarMappable, colour: str) -> None:
    points, law = family.points, family.parametric.fit.law
    best = optimum(law, family.compute, curve_budgets(points))
    params, tokens = (
        np.geomspace(values.min() / MARGIN, values.max() * MARGIN, 80)
        for values in (points.params, points.tokens)
    )
    loss = law.loss(params[None, :], tokens[:, None])
    levels = MaxNLocator(CONTOURS).tick_values(points.loss.min(), points.loss.max())
    lines = panel.contour(params, tokens, loss, levels, colors=GREY, linewidths=0.7)
    for text in panel.clabel(lines, fontsize=6.5, inline=False, fmt=lambda v: f"{v:.4g}"):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    panel.plot(best.params, best.tokens, color=colour, linewidth=2, zorder=4)
    panel.scatter(
        points.params, points.tokens, s=14, c=points.budget, cmap=shades.cmap, norm=shades.norm,
        edgecolors="white", linewidths=0.4, zorder=3,
    )  # fmt: skip
    panel.set_xlim(params[[0, -1]])
    panel.set_ylim(tokens[[0, -1]])
    panel.grid(visible=False)
    count_axis(panel, "x")
    count_axis(panel, "y")


def _floors(fit: ScalingFit, names: list[str]) -> str:
    """What the band of the residuals rests on."""
    bases = {fit.families[name].parametric.errors.seed.basis for name in names}
    return " or ".join(sorted(f"the seed floor ({basis})" for basis in bases))


def _columns(figure: Figure, handles: list[Line2D]) -> int:
    return len(handles) if figure.get_figwidth() > 7 else 2
