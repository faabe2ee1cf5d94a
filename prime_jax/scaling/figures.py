"""The figures of a fit and of a comparison. Families share an axis only where their losses may."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.special import ndtri

from prime_jax.errors import UserError
from prime_jax.scaling import approach2, labels
from prime_jax.scaling.drawing import (
    GREY,
    Say,
    attempt,
    colour_of,
    count_axis,
    flops_axis,
    mark,
    name_ends,
    panels_of,
    percent_axis,
    room_for_names,
    shades_of,
)
from prime_jax.scaling.fits import exponents
from prime_jax.scaling.intervals import known_percentiles
from prime_jax.scaling.laws import optimum
from prime_jax.scaling.results import FamilyFit, ScalingFit, curve_budgets
from prime_jax.scaling.rollout import model_error
from prime_jax.settings import nearest

MAX_LABELS = 10  # budgets named beside their curves; more get a colour bar
CENSORED = {"below": "<", "above": ">"}
TRAIN_LOSS_MARK = "†"
MARGIN = 1.4  # of the sampled N and D, as a ratio, that contours reach beyond them
CONTOURS = 9
MIXED = "#b42318"
FARTHEST = 30.0  # a multiplier is drawn up to this many times beyond those in range


def isoflop(fit: ScalingFit) -> Figure:
    """Loss against N, a panel for each family, a colour for each budget."""
    figure, panels = panels_of(len(fit.families), 3.5)
    shades = shades_of(family.points for family in fit.families.values())
    for panel, (name, family) in zip(panels, fit.families.items(), strict=True):
        _valleys(panel, family, shades)
        panel.set_title(name)
        panel.set_xlabel(labels.params_axis(fit.data.columns))
        panel.set_ylabel(labels.loss_axis([family.points.measure.kind]))
    if max(len(family.points.budgets) for family in fit.families.values()) > MAX_LABELS:
        figure.colorbar(shades, ax=panels, label=labels.flops_axis(fit.data.columns))
    curves = [v for f in fit.families.values() for v in f.approach2.curves]
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
        title=f"colour: {labels.flops_axis(fit.data.columns)}",
        title_fontsize=8,
    )
    return figure


def _valleys(panel: Axes, family: FamilyFit, shades: ScalarMappable) -> None:
    points = family.points
    curves = {v.flops: v for v in family.approach2.curves}
    for budget in points.budgets:
        shade = shades.to_rgba(budget)
        mine = points.budget == budget
        params, loss, error = points.params[mine], points.loss[mine], points.loss_se[mine]
        panel.errorbar(
            params, loss, np.nan_to_num(error), fmt="o", color=shade, markersize=3, linewidth=1
        )
        grid = np.geomspace(params.min(), params.max(), 60)
        end = loss[np.argmax(params)]
        if family.approach3:
            law = family.approach3.law.loss(grid, family.compute.tokens(budget, grid))
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


def frontier(fit: ScalingFit) -> Figure:
    """The lowest loss at each budget; a panel for each group of comparable families."""
    width = 4.6 if len(fit.comparable) > 1 else 6.4
    figure = Figure(figsize=(width * len(fit.comparable), 3.9), layout="constrained")
    for panel, names in zip(
        figure.subplots(1, len(fit.comparable), squeeze=False)[0], fit.comparable, strict=True
    ):
        ends = []
        for name in names:
            family, colour = fit.families[name], colour_of(fit.families, name)
            marks = _vertices(panel, family, "loss", colour, fit.settings.level)
            curve = _curve(panel, family, "loss", colour, fit.settings.level)
            ends += [(name, colour, *end) for end in (marks + curve)[-1:]]
        room_for_names(panel)
        flops_axis(panel)
        panel.set_xlabel(labels.flops_axis(fit.data.columns))
        panel.set_ylabel(
            labels.loss_axis([fit.families[name].points.measure.kind for name in names])
        )
        name_ends(panel, ends)
    _frontier_legend(figure, fit, [])
    return figure


def best_sizes(fit: ScalingFit) -> Figure:
    """N*(C) and D*(C) of all families: sizes may share an axis whatever the loss is."""
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    titles = {"params": labels.params_axis(fit.data.columns), "tokens": "training tokens D"}
    for panel, quantity in zip(figure.subplots(1, 2), titles, strict=True):
        ends = []
        for name, family in fit.families.items():
            colour = colour_of(fit.families, name)
            marks = _vertices(panel, family, quantity, colour, fit.settings.level)
            curve = _curve(panel, family, quantity, colour, fit.settings.level)
            if _wins(family):
                places = [(best.flops, getattr(best, quantity)) for best in family.approach1.optima]
                panel.plot(*np.transpose(places), "D", color=colour, markersize=4, fillstyle="none")
            ends += [(_marked(family), colour, *end) for end in (marks + curve)[-1:]]
        room_for_names(panel)
        flops_axis(panel)
        count_axis(panel, "y")
        panel.set_xlabel(labels.flops_axis(fit.data.columns))
        panel.set_ylabel(f"best {titles[quantity]}")
        name_ends(panel, ends)
    doubtful = any(_marked(family) != name for name, family in fit.families.items())
    notes = []
    if any(_wins(family) for family in fit.families.values()):
        notes.append(mark("D", "approach 1", markersize=4, fillstyle="none"))
    if doubtful:
        text = f"{TRAIN_LOSS_MARK} sizes that are best for a training loss, not for a likelihood"
        notes.append(mark("", text))
    _frontier_legend(figure, fit, notes)
    return figure


def _wins(family: FamilyFit) -> bool:
    """Whether approach 1 found anything."""
    return family.approach1.a is not None


def _curve(
    panel: Axes, family: FamilyFit, quantity: str, colour: str, level: float
) -> list[tuple[float, float]]:
    """The fitted law's curve with its band, within the data; its points."""
    if not family.approach3:
        return []
    curve = family.approach3.frontier
    grid, line = curve.flops, getattr(curve, quantity)
    low, high = curve.intervals[quantity]
    panel.fill_between(grid, low, high, color=colour, alpha=0.16, linewidth=0)
    panel.plot(grid, line, color=colour, linewidth=1.6, zorder=2)
    return list(zip(grid.tolist(), line.tolist(), strict=True))


def _vertices(
    panel: Axes, family: FamilyFit, quantity: str, colour: str, level: float
) -> list[tuple[float, float]]:
    """The optima of approach 2, those that are bounds as open arrows; their places."""
    places, inside = [], 0
    for curve in family.approach2.curves:
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
        if quantity != "loss" and family.approach2.draws is not None:
            ends = known_percentiles(family.approach2.draws.params[:, inside], level)
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
    curves = [v for f in fit.families.values() for v in f.approach2.curves]
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
    return family.points.family + (
        TRAIN_LOSS_MARK if "train_loss" in family.points.measure.kind else ""
    )


def isoloss(fit: ScalingFit) -> Figure:
    """Contours of the law in the plane of N and D, with the runs and the efficient frontier."""
    names = fitted(fit)
    figure, panels = panels_of(len(names), 3.5)
    shades = shades_of(fit.families[name].points for name in names)
    for panel, name in zip(panels, names, strict=True):
        _contours(panel, fit.families[name], shades, colour_of(fit.families, name))
        kind = fit.families[name].points.measure.kind
        panel.set_title(f"{name}: {labels.kind(kind)}" if kind else name)
        panel.set_xlabel(labels.params_axis(fit.data.columns))
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
        points, part = family.points, family.approach3
        predicted = points.expected(part.law)
        above = points.loss / predicted - 1
        floor = ndtri(0.975) * family.error_budget.seed.relative_sd
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
        by_flops.set_xlabel(labels.flops_axis(fit.data.columns))
    handles = [
        mark("o", "run, darker: smaller budget", markersize=4),
        Patch(color=GREY, alpha=0.15, label=f"95% of runs, by {_floors(fit, names)}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def exponent_intervals(fit: ScalingFit) -> Figure:
    """The exponent a of every approach, with its interval: sizes may share an axis."""
    rows: list[tuple[str, str, float, list[float | None] | None, str]] = []
    for name, family in fit.families.items():
        parts = family.approach3, family.approach2, family.approach1
        for approach, (a, ends) in exponents(*parts).items():
            debiased = approach == "approach 2" and family.approach2.debiased
            note = {"approach 2": ", de-biased" if debiased else "", "approach 3": ", bootstrap"}
            rows.append((name, approach + note.get(approach, ""), a, ends, "o"))
        if family.approach3:
            a, ends = rows[-1][2], list(family.approach3.profile["a"])
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
        f"exponent a of N* ∝ Cᵃ (N {labels.convention(fit.data.columns.params_convention)}, "
        f"FLOPs {labels.convention(fit.data.columns.flops_convention)}), "
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
        spread = ndtri((1 + fit.settings.level) / 2) * model_error(found).at(grid)
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
    return [name for name, family in fit.families.items() if family.approach3]


def predicted(fit: ScalingFit) -> list[str]:
    """Families of which larger budgets were predicted."""
    return [n for n, family in fit.families.items() if family.rollout and family.rollout.steps]


def _contours(panel: Axes, family: FamilyFit, shades: ScalarMappable, colour: str) -> None:
    points, law = family.points, family.approach3.law
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
    bases = {fit.families[name].error_budget.seed.basis for name in names}
    return " or ".join(sorted(f"the seed floor ({basis})" for basis in bases))


def _columns(figure: Figure, handles: list[Line2D]) -> int:
    return len(handles) if figure.get_figwidth() > 7 else 2


def multiplier(record: dict[str, Any], families: list[str]) -> Figure | None:
    """m against C, a row for each family; None where every comparison was refused."""
    base, level = record["baseline"]["family"], record["method"]["level"]
    compared = {n: f for n, f in record["families"].items() if f["multiplier"]}
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
            _multiplier_curve(panel, family["multiplier"][side], colour)
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


def _multiplier_curve(panel: Axes, side: dict[str, Any], colour: str) -> None:
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


def draw(fit: ScalingFit, name: str) -> Figure | None:
    """One figure; None where the fit has nothing for it.

    Raises:
        UserError: there is no such figure.
    """
    if name not in MAKERS:
        raise UserError(f"no figure {name!r}{nearest(name, MAKERS)}; there are {', '.join(MAKERS)}")
    make, known = MAKERS[name]
    return attempt(name, partial(make, fit)) if known(fit) else None


def draw_all(fit: ScalingFit, log: Say | None = None) -> dict[str, Figure]:
    """Every figure that the fit has something for, by its file name.

    Args:
        log: told in one line about each figure that cannot be drawn; without it that is raised.
    """
    makers = {name: make for name, (make, known) in MAKERS.items() if known(fit)}
    drawn = {name: attempt(name, partial(make, fit), log) for name, make in makers.items()}
    return {name: figure for name, figure in drawn.items() if figure}


def draw_comparison(
    record: dict[str, Any], families: Iterable[str], log: Say | None = None
) -> dict[str, Figure]:
    """The figure of a compare.json; none where all of it was refused.

    `families` are all those of the data, which have the colours that they have in their fit.
    """
    make = partial(multiplier, record, list(families))
    figure = attempt("multiplier", make, log)
    return {"multiplier": figure} if figure else {}


def _always(fit: ScalingFit) -> bool:
    return True


MAKERS = {  # the figures of a fit, and which fits have something for them
    "isoflop": (isoflop, _always),
    "frontier": (frontier, _always),
    "optimum": (best_sizes, _always),
    "isoloss": (isoloss, fitted),
    "residuals": (residuals, fitted),
    "intervals": (exponent_intervals, _always),
    "rollout": (rollout, predicted),
}
NAMES = tuple(MAKERS)
