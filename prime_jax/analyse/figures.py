"""Figures of the four analyses. Bands and bars are 95 % intervals from the standard errors."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from prime_jax.analyse.attention import BAND, STATISTICS
from prime_jax.analyse.spectra import MATRICES
from prime_jax.scaling.drawing import COLOURS, GREY, STYLE, mark, panels_of

Z95 = 1.96
NAMES = {
    "qkv": "query, key, value",
    "attention_out": "attention output",
    "gate": "MLP gate",
    "up": "MLP up",
    "down": "MLP down",
}
SHAPES = {
    "stable_rank": "stable rank / size",
    "effective_rank": "effective rank / size",
    "tail_exponent": "tail exponent",
}
MEASURES = {
    "sink": "weight on the most\nattended position",
    "band": f"weight within ±{BAND}\npositions",
    "entropy": "entropy (nats)",
}
MAX_LAYERS, MAX_HEADS = 6, 8  # of a figure of maps
MARKERS = "osD^vPX"


def of_run(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["run"] == name]


def column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row[key] is None else row[key] for row in rows], float)


def noise(rows: list[dict[str, Any]], names: Sequence[str]) -> Figure:
    """The bound's integrand, and the cost of each sampler step, against the hidden fraction."""
    figure, (left, right) = panels_of(2, 3.2)
    for k, name in enumerate(names):
        mine, colour = of_run(rows, name), COLOURS[k % len(COLOURS)]
        at = (column(mine, "from") + column(mine, "to")) / 2
        for panel, key in ((left, "nats"), (right, "step")):
            value, error = column(mine, key), Z95 * column(mine, f"{key}_se_data")
            panel.fill_between(at, value - error, value + error, color=colour, alpha=0.2, lw=0)
            panel.plot(at, value, color=colour, marker=MARKERS[k % 7], markersize=3, label=name)
    steps = len(of_run(rows, names[0]))
    left.set_ylabel("nats / token at this noise level")
    left.set_title("integrand of the NELBO")
    right.set_ylabel("nats / token of this step")
    right.set_title(f"cost of each of {steps} uniform steps")
    for panel in (left, right):
        panel.set_xlabel("fraction of hidden sub-tokens")
        panel.xaxis.set_major_formatter(PercentFormatter(1))
        panel.set_xlim(0, 1)
        panel.set_ylim(bottom=0)
    legend(figure, names)
    return figure


def bits(rows: list[dict[str, Any]], names: Sequence[str]) -> Figure:
    """Cost and error of each sub-token, beside those of the unigram distribution."""
    figure, (left, right) = panels_of(2, 3.2)
    for k, name in enumerate(names):
        mine, colour = of_run(rows, name), COLOURS[k % len(COLOURS)]
        shift = 0.5 * ((k + 0.5) / len(names) - 0.5)
        at = column(mine, "slot") + shift
        for panel, key in ((left, "nats"), (right, "error")):
            error = Z95 * column(mine, f"{key}_se_data")
            panel.errorbar(
                at, column(mine, key), error, color=colour, fmt=MARKERS[k % 7], markersize=4, lw=1.2
            )
            panel.plot(
                at,
                column(mine, f"unigram_{key}"),
                "_",
                color=colour,
                markersize=9,
                markeredgewidth=1.5,
            )
    left.set_ylabel("nats / hidden sub-token")
    left.set_title("cost: the slots' sum is the NELBO (nats / token)", fontsize=9)
    right.set_ylabel("likeliest digit is wrong")
    right.set_title("error, averaged over noise levels", fontsize=9)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for panel in (left, right):
        panel.set_xlabel("sub-token of the token (0 = most significant)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylim(bottom=0)
    legend(figure, names, [mark("_", "unigram distribution alone", markersize=9)])
    return figure


def spectra(
    rows: list[dict[str, Any]], values: dict[str, np.ndarray], names: Sequence[str]
) -> Figure:
    """Singular values by rank; thin lines are layers, the thick one is their median."""
    figure, panels = panels_of(len(MATRICES), 2.9)
    for panel, matrix in zip(panels, MATRICES, strict=True):
        for k, name in enumerate(names):
            colour = COLOURS[k % len(COLOURS)]
            layers = sorted({row["layer"] for row in of_run(rows, name)})
            all_ZxN = np.stack([values[f"{name}/{layer}/{matrix}"] for layer in layers])
            all_ZxN = all_ZxN / np.sqrt((all_ZxN**2).mean(axis=1, keepdims=True))
            at = (np.arange(all_ZxN.shape[1]) + 0.5) / all_ZxN.shape[1]
            for row_N in all_ZxN:
                panel.plot(at, row_N, color=colour, lw=0.5, alpha=0.35)
            panel.plot(at, np.median(all_ZxN, axis=0), color=colour, lw=1.8)
        panel.set_yscale("log")
        wide = np.ptp(np.log10(panel.get_ylim())) > 2
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(NAMES[matrix])
        panel.set_xlabel("rank / number of singular values")
        panel.set_ylabel("singular value / rms")
    legend(figure, names, [Line2D([], [], color=GREY, lw=0.6, label="one layer")])
    return figure


def spectra_by_layer(rows: list[dict[str, Any]], names: Sequence[str]) -> Figure:
    """The three numbers of each spectrum, by layer."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    panels = figure.subplots(len(SHAPES), len(MATRICES), sharex=True, sharey="row")
    for (key, label), line in zip(SHAPES.items(), panels, strict=True):
        for panel, matrix in zip(line, MATRICES, strict=True):
            for k, name in enumerate(names):
                mine = [row for row in of_run(rows, name) if row["matrix"] == matrix]
                size = 1 if key == "tail_exponent" else column(mine, "singular_values")
                colour, at = COLOURS[k % len(COLOURS)], column(mine, "layer")
                at = at + 0.3 * ((k + 0.5) / len(names) - 0.5)
                panel.plot(
                    at,
                    column(mine, key) / size,
                    color=colour,
                    marker=MARKERS[k % 7],
                    markersize=4,
                    lw=1,
                )
                if key == "tail_exponent":
                    panel.vlines(
                        at, column(mine, "tail_low"), column(mine, "tail_high"), colour, lw=1
                    )
            layer_axis(panel, rows)
            if key == "stable_rank":
                panel.set_title(NAMES[matrix])
            if key == "tail_exponent":
                panel.set_xlabel("layer")
        line[0].set_ylabel(label)
    legend(figure, names, [Line2D([], [], color=GREY, lw=1, label="95 % interval of the exponent")])
    return figure


def attention(rows: list[dict[str, Any]], abouts: list[dict[str, Any]]) -> Figure:
    """Sink, band and entropy by layer, a line for each fraction of hidden sub-tokens."""
    figure = Figure(figsize=(max(3.4 * len(abouts), 5.2), 6.4), layout="constrained")
    panels = figure.subplots(
        len(STATISTICS), len(abouts), squeeze=False, sharey="row", sharex="col"
    )
    ratios = sorted({row["hidden"] for row in rows})
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, max(len(ratios), 2)))
    for about, line in zip(abouts, panels.T, strict=True):
        mine = of_run(rows, about["run"])
        for name, panel in zip(STATISTICS, line, strict=True):
            for ratio, shade in zip(ratios, shades, strict=False):
                part = [row for row in mine if row["hidden"] == ratio]
                layers = sorted({row["layer"] for row in part})
                value_ZxH = [[r[name] for r in part if r["layer"] == layer] for layer in layers]
                for head_Z in np.array(value_ZxH).T if part else []:
                    panel.plot(layers, head_Z, ".", color=shade, markersize=3, alpha=0.6)
                if part:
                    panel.plot(
                        layers, np.mean(value_ZxH, axis=1), color=shade, lw=1.5, marker="o", ms=4
                    )
            panel.axhline(about["uniform"][name], color=GREY, lw=0.9, ls=(0, (3, 2)))
            layer_axis(panel, mine)
        line[0].set_title(about["run"])
        line[-1].set_xlabel("layer")
    for name, panel in zip(STATISTICS, panels[:, 0], strict=True):
        panel.set_ylabel(MEASURES[name])
        panel.set_ylim(bottom=0)  # shared by the row; last, since it disables autoscaling
    handles = [
        Line2D(
            [],
            [],
            color=shade,
            lw=1.5,
            marker="o",
            ms=4,
            label=f"{ratio:.0%} hidden" if ratio else "none hidden",
        )
        for ratio, shade in zip(ratios, shades, strict=False)
    ]
    handles += [
        mark(".", "one head (line: their mean)", markersize=4),
        Line2D([], [], color=GREY, lw=0.9, ls=(0, (3, 2)), label="uniform attention"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def maps(name: str, ratio: float, map_ZxHxCxC: np.ndarray, length: int) -> Figure:
    """Mean attention of up to six layers and eight heads."""
    layers = np.unique(np.linspace(0, len(map_ZxHxCxC) - 1, MAX_LAYERS).round().astype(int))
    heads = range(min(map_ZxHxCxC.shape[1], MAX_HEADS))
    size = max(1.25 * len(heads) + 1.4, 4.2), 1.3 * len(layers) + 1.1
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(layers), len(heads), squeeze=False)
    even = 1 / map_ZxHxCxC.shape[-1]
    norm = LogNorm(even / 10, 1)
    for (i, j), panel in np.ndenumerate(panels):
        shown = np.maximum(map_ZxHxCxC[layers[i], heads[j]], norm.vmin)
        image = panel.imshow(
            shown, norm=norm, cmap="viridis", extent=(0, length, length, 0), interpolation="nearest"
        )
        panel.grid(visible=False)
        panel.set_xticks([0, length])
        panel.set_yticks([0, length])
        panel.tick_params(labelsize=6, labelbottom=i == len(layers) - 1, labelleft=j == 0)
        if i == 0:
            panel.set_title(f"head {heads[j]}", fontsize=8)
        if j == 0:
            panel.set_ylabel(f"layer {layers[i]}\nquery", fontsize=8)
        if i == len(layers) - 1:
            panel.set_xlabel("key", fontsize=8)
    hidden = f", {ratio:.0%} of the sub-tokens hidden" if ratio else ""
    figure.suptitle(f"{name}: mean attention{hidden}", fontsize=9)
    bar = figure.colorbar(image, ax=panels, shrink=0.9, pad=0.02)
    bar.set_label(
        f"weight on {'a position' if len(shown) == length else 'a cell of positions'}", fontsize=8
    )
    bar.ax.tick_params(labelsize=7)
    return figure


def layer_axis(panel: Axes, rows: list[dict[str, Any]]) -> None:
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlim(-0.5, max(row["layer"] for row in rows) + 0.5)


def legend(figure: Figure, names: Sequence[str], more: Sequence[Line2D] = ()) -> None:
    handles = [
        Line2D([], [], color=COLOURS[k % len(COLOURS)], marker=MARKERS[k % 7], ms=4, label=name)
        for k, name in enumerate(names)
    ]
    figure.legend(
        handles=[*handles, *more], loc="outside lower center", ncols=min(4, len(handles) + 1)
    )


def styled() -> Any:
    """The style of all figures, as a context."""
    return matplotlib.rc_context(STYLE)
