"""report.html: one file that explains a fit; no network, no script, pictures inside.

It is made from the contents of fit.json, compare.json and the SVG figures, so that it says nothing
they do not.
"""

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prime_jax.runtime.records import read_json
from prime_jax.scaling import report_compare, report_tables
from prime_jax.scaling.record import SCHEMA
from prime_jax.scaling.report_page import figure, inline, notes, page

CAPTIONS = {
    "isoflop": "Loss against size at each budget. Solid: a parabola through the runs of one budget "
    "(approach 2); its minimum, the star, is the best size. Dashed: the law fitted to all runs of the "
    "family at once (approach 3). An open arrow means that the best size lies beyond the sampled ones.",
    "frontier": "The lowest loss that each budget can reach. Families share an axis only where their "
    "losses are numbers of one kind.",
    "optimum": "The size and the number of tokens that reach it.",
    "intervals": "The exponent a by every approach. An open point has no interval; an arrow marks an "
    "interval that goes on, or has no end.",
    "isoloss": "The fitted law in the plane of N and D. Along a grey line the law gives one loss; the "
    "coloured line joins the best sizes of the budgets. Where no run is near, a contour is a guess.",
    "residuals": "Measured loss over the fitted one. A law that holds leaves no pattern; runs outside "
    "the grey band are off by more than another seed explains.",
    "rollout": "Laws fitted to the smaller budgets predict the runs of larger ones. Points above zero: "
    "the prediction was too high. The band is what is added to intervals of the loss.",
}
Pictures = dict[str, str]


def write(directory: Path) -> None:
    """Write report.html from what `fit` and `compare` left in the directory."""
    pictures = {
        name: inline(directory / f"{name}.svg")
        for name in (*CAPTIONS, "multiplier")
        if (directory / f"{name}.svg").is_file()
    }
    comparison = directory / "compare.json"
    text = render(
        read_json(directory / "fit.json"),
        pictures,
        read_json(comparison) if comparison.is_file() else None,
    )
    (directory / "report.html").write_text(text, encoding="utf-8")


def refresh(directory: Path) -> bool:
    """Write it again if a fit of this version lies there; whether one does."""
    path = directory / "fit.json"
    found = read_json(path) if path.is_file() else {}
    if (
        not isinstance(found, dict)
        or found.get("schema") != SCHEMA
        or "points" not in found["source"]
    ):
        return False
    write(directory)
    return True


def render(
    record: dict[str, Any], figures: Pictures, comparison: dict[str, Any] | None = None
) -> str:
    """The page of a fit.

    Args:
        record: the contents of fit.json.
        figures: SVG elements by file name, as in CAPTIONS.
        comparison: the contents of compare.json; left out where it is of other data.
    """
    families = record["families"]
    source = html.escape(record["source"]["name"])
    parts = [
        *_top(record, source),
        "<h2>What was measured</h2>",
        *report_tables.measured(record),
        *_laws(record, figures),
        *_optima(families, figures),
        *_held_out(families, figures),
        *_compared(record, comparison, figures),
        "<h2>Warnings</h2>",
        *_warnings(families),
        *_trust(families, figures),
        "<h2>Runs left out</h2>",
        report_tables.excluded(record["excluded"]),
        "<h2>How this was made</h2>",
        report_tables.provenance(record),
    ]
    return page(f"Scaling fit of {source}", parts)


def _top(record: dict[str, Any], source: str) -> Iterable[str]:
    """The answer, and what is refused."""
    families = record["families"]
    runs = sum(family["runs"] for family in families.values())
    plural = "family" if len(families) == 1 else "families"
    level = f"{record['method']['level']:.0%}"
    yield f"<h1>Scaling fit of {source}</h1>"
    yield (
        f'<p class="soft">{runs} runs of {len(families)} {plural}: '
        f"{html.escape(', '.join(families))}</p>"
    )
    yield from notes(record["warnings"])
    yield '<div class="answer">'
    yield "<h2>The answer</h2>"
    yield (
        "<p>For the largest budget C that was measured: the best size N*, the tokens D* to train it "
        f"on, and the loss it reaches (approach 3). Small print: {level} intervals. N* grows as "
        "C<sup>a</sup>.</p>"
    )
    yield report_tables.answer(families)
    refused = [
        (name, item) for name, f in families.items() for item in f["warnings"] if item["refusal"]
    ]
    for name, item in refused:
        yield from notes([item], name)
    yield f"<p>{_sure(families, len(refused))}</p>"
    yield "</div>"


def _sure(families: dict[str, Any], refused: int) -> str:
    others = sum(len(family["warnings"]) for family in families.values()) - refused
    start = "What is refused, the data cannot give." if refused else "Nothing is refused."
    count = "1 warning" if others == 1 else f"{others} warnings"
    return f"{start} Below the figures: {count}, each with a hint." if others else start


def _laws(record: dict[str, Any], figures: Pictures) -> Iterable[str]:
    families = record["families"]
    yield "<h2>The fitted laws</h2>"
    yield (
        "<p>L(N, D) = E + A / N<sup>α</sup> + B / D<sup>β</sup>. E is the loss that no amount of "
        "compute removes. Small print: the bootstrap interval, and below it the profile interval, "
        "the range that the data themselves allow; “open” means that they set no end.</p>"
    )
    yield report_tables.laws(families)
    yield from _figures(figures, "isoflop", "isoloss")
    yield "<h3>The exponent a by each approach</h3>"
    yield (
        "<p>Approach 1 follows training curves, approach 2 fits a parabola to each budget, approach 3 "
        "one law to all runs. A parabola misses the minimum of a lopsided curve; the de-biased "
        "approach 2 has that shift removed.</p>"
    )
    yield report_tables.exponents(families)
    for name, family in families.items():
        differ = [w for w in family["warnings"] if w["code"] == "approaches_disagree"]
        yield from notes(differ, name)
    yield from _figures(figures, "intervals")


def _optima(families: dict[str, Any], figures: Pictures) -> Iterable[str]:
    yield from _figures(figures, "frontier", "optimum")
    yield "<h2>The best size at each budget</h2>"
    yield (
        "<p>Small print of approach 3: the bootstrap interval; below it, the profile interval of N* "
        "and the interval of the loss widened by the error of held-out budgets. Of the de-biased "
        "approach 2: by how much the parabola alone misses.</p>"
    )
    yield report_tables.optima(families)
    envelopes = report_tables.envelopes(families)
    if envelopes:
        yield "<h3>Approach 1: sizes that win along training</h3>"
        yield envelopes


def _held_out(families: dict[str, Any], figures: Pictures) -> Iterable[str]:
    yield "<h2>How wrong predictions of larger budgets were</h2>"
    rollouts = report_tables.rollouts(families)
    if not rollouts:
        yield "<p>Not known: a rollout needs four budgets or more.</p>"
        return
    yield (
        "<p>The law was fitted to the smaller budgets and asked for the larger ones. Errors are "
        "predicted over measured, less one: + means too high. L* and N* are the loss and the size at "
        "the optimum.</p>"
    )
    yield rollouts
    yield from _figures(figures, "rollout")


def _compared(
    record: dict[str, Any], comparison: dict[str, Any] | None, figures: Pictures
) -> Iterable[str]:
    if comparison is None:
        return
    same = ("metric", "conventions")
    if comparison["source"]["sha256"] != record["source"]["sha256"] or any(
        comparison[key] != record[key] for key in same
    ):
        yield (
            "<h2>Comparison</h2><p>compare.json beside this file is of other data, or of other "
            "conventions; compare again.</p>"
        )
        return
    yield from report_compare.section(comparison, figures.get("multiplier"))


def _warnings(families: dict[str, Any]) -> Iterable[str]:
    if not any(family["warnings"] for family in families.values()):
        yield "<p>None.</p>"
    for name, family in families.items():
        if family["warnings"]:
            yield f"<h3>{html.escape(name)}</h3>"
            yield from notes(family["warnings"])


def _trust(families: dict[str, Any], figures: Pictures) -> Iterable[str]:
    yield "<h2>Can the fits be trusted?</h2>"
    yield (
        "<p>A fit has converged when its gradient is zero and its curvature positive. The more of the "
        "independent starts end at the same minimum, the less it depends on where one began.</p>"
    )
    yield report_tables.certificates(families)
    yield from _figures(figures, "residuals")
    yield "<h3>Error budget</h3>"
    yield (
        "<p>How far a loss is off for other reasons than N and D, as a fraction of it. Runs that are known "
        "less well weigh less.</p>"
    )
    yield report_tables.error_budget(families)


def _figures(figures: Pictures, *names: str) -> Iterable[str]:
    return (figure(figures[name], CAPTIONS[name]) for name in names if name in figures)
