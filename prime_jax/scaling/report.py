"""report.html: one file that explains a fit; no network, no script, pictures inside.

It is made from the contents of fit.json, compare.json and the SVG figures, so that it says nothing
they do not.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prime_jax.runtime.records import read_json
from prime_jax.scaling import tables
from prime_jax.scaling.approach3 import law_of
from prime_jax.scaling.results import SCHEMA
from prime_jax.table import Cell, Table

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --line: #dde1e7;
  --page: #ffffff; --panel: #f5f7f9; --mark: #b45309; --stop: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #333c49;
  --page: #151a21; --panel: #1e252e; --mark: #f0a04b; --stop: #f97066; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .5rem 0; } .soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
td.long { white-space: normal; min-width: 20rem; overflow-wrap: anywhere; }
td small { color: var(--soft); display: block; }
figure { margin: 1rem 0; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: .75rem; } figure svg { max-width: 100%; height: auto; display: block; margin: auto; }
figcaption { color: #444c58; font-size: .88rem; padding-top: .5rem; }
.note { background: var(--panel); border-left: 4px solid var(--mark); padding: .6rem 1rem;
  margin: .6rem 0; border-radius: 0 6px 6px 0; } .note.stop { border-color: var(--stop); }
.answer { border: 1px solid var(--line); border-radius: 8px; padding: .25rem 1.1rem .6rem; }
.answer h2 { margin-top: 1rem; }
.note code { color: var(--soft); font-size: .8rem; } code { overflow-wrap: anywhere; }
"""
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
    "multiplier": "The multiplier against the compute that one side spends. Solid: both frontiers within their "
    "data. Dashed: extrapolated. Points: between the optima of approach 2, without a law.",
}
OF_A_FIT = tuple(name for name in CAPTIONS if name != "multiplier")  # known without matplotlib
Pictures = dict[str, str]


INTRODUCTION = (
    "<p>The multiplier m is how many times the compute of {base} a family needs for the same loss: "
    "below one, the family is the cheaper one. It is a curve, not a number, because the two laws "
    "differ in E. An m that needs a frontier beyond its data is an extrapolation.</p>"
)


def write(directory: Path) -> None:
    """Write report.html from what `fit`, `compare`, `rates` and `downstream` left in the directory."""
    pictures = {
        name: _inline(directory / f"{name}.svg")
        for name in CAPTIONS
        if (directory / f"{name}.svg").is_file()
    }
    others = {
        name: read_json(directory / f"{name}.json")
        for name in ("compare", "rates", "downstream")
        if (directory / f"{name}.json").is_file()
    }
    text = render(
        read_json(directory / "fit.json"),
        pictures,
        others.get("compare"),
        rates=others.get("rates"),
        downstream=others.get("downstream"),
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
    record: dict[str, Any],
    figures: Pictures,
    comparison: dict[str, Any] | None = None,
    rates: dict[str, Any] | None = None,
    downstream: dict[str, Any] | None = None,
) -> str:
    """The page of a fit.

    Args:
        record: the contents of fit.json.
        figures: SVG elements by file name, as in CAPTIONS.
        comparison, rates, downstream: the contents of compare.json, rates.json and downstream.json;
            left out where they are of other data.
    """
    families = record["families"]
    source = html.escape(record["source"]["name"])
    parts = [
        *_top(record, source),
        "<h2>What was measured</h2>",
        _table(tables.measured(record)),
        *_laws(record, figures),
        *_optima(families, figures),
        *_held_out(families, figures),
        *_compared(record, comparison, figures),
        *_rates(record, rates),
        *_tasks(record, downstream),
        "<h2>Warnings</h2>",
        *_warnings(families),
        *_trust(families, figures),
        "<h2>Runs left out</h2>",
        _excluded(record["excluded"]),
        "<h2>How this was made</h2>",
        _table(tables.provenance(record)),
    ]
    return _page(f"Scaling fit of {source}", parts)


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
    yield from _notes(record["warnings"])
    yield '<div class="answer">'
    yield "<h2>The answer</h2>"
    yield (
        "<p>For the largest budget C that was measured: the best size N*, the tokens D* to train it "
        f"on, and the loss it reaches (approach 3). Small print: {level} intervals. N* grows as "
        "C<sup>a</sup>.</p>"
    )
    yield _table(tables.answer(families))
    refused = [
        (name, item) for name, f in families.items() for item in f["warnings"] if item["refusal"]
    ]
    for name, item in refused:
        yield from _notes([item], name)
    yield f"<p>{_sure(families, len(refused))}</p>"
    yield "</div>"


def _sure(families: dict[str, Any], refused: int) -> str:
    others = sum(len(family["warnings"]) for family in families.values()) - refused
    start = "What is refused, the data cannot give." if refused else "Nothing is refused."
    count = "1 warning" if others == 1 else f"{others} warnings"
    return f"{start} Below the figures: {count}, each with a hint." if others else start


def _laws(record: dict[str, Any], figures: Pictures) -> Iterable[str]:
    families = record["families"]
    formula = law_of(record["method"]["settings"]["law"])[1].formula
    yield "<h2>The fitted laws</h2>"
    yield (
        f"<p>{html.escape(formula)} Small print: the bootstrap interval, and below it the profile "
        "interval, the range that the data themselves allow; “open” means that they set no end.</p>"
    )
    yield _table(tables.laws(families))
    pairs = tables.repetition(record)
    if pairs:
        yield "<h3>Which family profits longest from repeated data?</h3>"
        yield (
            "<p>R_D is about the number of epochs from which on repetition is of little use. Small "
            "print: the bootstrap interval of the ratio.</p>"
        )
        yield _table(pairs)
    yield from _figures(figures, "isoflop", "isoloss")
    yield "<h3>The exponent a by each approach</h3>"
    yield (
        "<p>Approach 1 follows training curves, approach 2 fits a parabola to each budget, approach 3 "
        "one law to all runs. A parabola misses the minimum of a lopsided curve; the de-biased "
        "approach 2 has that shift removed.</p>"
    )
    yield _table(tables.exponents(families))
    counted = tables.conventions(families)
    if counted:
        yield "<h3>The same runs, counted in every way</h3>"
        yield (
            "<p>What N and C count moves a and the number of tokens per parameter, D*/N*, at the "
            "optimum. Small print: the profile interval.</p>"
        )
        yield _table(counted)
    for name, family in families.items():
        differ = [w for w in family["warnings"] if w["code"] == "approaches_disagree"]
        yield from _notes(differ, name)
    yield from _figures(figures, "intervals")


def _optima(families: dict[str, Any], figures: Pictures) -> Iterable[str]:
    yield from _figures(figures, "frontier", "optimum")
    yield "<h2>The best size at each budget</h2>"
    yield (
        "<p>Small print of approach 3: the bootstrap interval; below it, the profile interval of N* "
        "and the interval of the loss widened by the error of held-out budgets. Of the de-biased "
        "approach 2: by how much the parabola alone misses.</p>"
    )
    yield _table(tables.optima(families))
    yield "<h3>The lowest loss as a law of compute</h3>"
    yield (
        "<p>L(C) = L∞ + A / C^a through the minima of approach 2: free, and with L∞ held at E of "
        "approach 3 or at --floor. Small print: the profile interval. Held-out budgets are predicted "
        "from the smaller ones, predicted over measured, less one.</p>"
    )
    yield _table(tables.frontiers({n: family.get("frontier") for n, family in families.items()}))
    envelopes = tables.envelopes(families)
    if envelopes:
        yield "<h3>Approach 1: sizes that win along training</h3>"
        yield _table(envelopes)


def _held_out(families: dict[str, Any], figures: Pictures) -> Iterable[str]:
    yield "<h2>How wrong predictions of larger budgets were</h2>"
    rollouts = tables.rollouts({n: family["rollout"] for n, family in families.items()})
    if not rollouts:
        yield "<p>Not known: a rollout needs four budgets or more.</p>"
        return
    yield (
        "<p>The law was fitted to the smaller budgets and asked for the larger ones. Errors are "
        "predicted over measured, less one: + means too high. L* and N* are the loss and the size at "
        "the optimum.</p>"
    )
    yield _table(rollouts)
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
    yield from _comparison(comparison, figures.get("multiplier"))


def _rates(record: dict[str, Any], found: dict[str, Any] | None) -> Iterable[str]:
    if found is None or found["source"]["sha256"] != record["source"]["sha256"]:
        return
    yield "<h2>The best learning rate</h2>"
    yield (
        "<p>lr* = k N^n D^d B^b through the best rates of cells (one N, D and batch size) that were "
        "run at several rates. Small print: the profile interval.</p>"
    )
    yield _table(tables.rates(found))
    yield _table(tables.rate_cells(found))
    for name, family in found["families"].items():
        yield from _notes(family["warnings"], name)


def _tasks(record: dict[str, Any], found: dict[str, Any] | None) -> Iterable[str]:
    if found is None or found["source"]["sha256"] != record["source"]["sha256"]:
        return
    yield "<h2>From loss to accuracy</h2>"
    yield (
        "<p>Accuracy of tasks against compute: directly, and through the loss. Small print: the "
        "profile interval. Errors of held-out runs are in points of accuracy.</p>"
    )
    yield _table(tables.tasks(found))
    if told := tables.task_predictions(found):
        yield _table(told)
    for name, family in found["families"].items():
        for task, part in family["tasks"].items():
            yield from _notes(part["warnings"], f"{name}, {task}")


def _warnings(families: dict[str, Any]) -> Iterable[str]:
    if not any(family["warnings"] for family in families.values()):
        yield "<p>None.</p>"
    for name, family in families.items():
        if family["warnings"]:
            yield f"<h3>{html.escape(name)}</h3>"
            yield from _notes(family["warnings"])


def _trust(families: dict[str, Any], figures: Pictures) -> Iterable[str]:
    yield "<h2>Can the fits be trusted?</h2>"
    yield (
        "<p>A fit has converged when its gradient is zero and its curvature positive. The more of the "
        "independent starts end at the same minimum, the less it depends on where one began.</p>"
    )
    yield _certificates(families)
    yield from _figures(figures, "residuals")
    yield "<h3>Error budget</h3>"
    yield (
        "<p>How far a loss is off for other reasons than N and D, as a fraction of it. Runs that are known "
        "less well weigh less.</p>"
    )
    yield _table(tables.error_budget(families))


def _certificates(families: dict[str, Any]) -> str:
    found = tables.certificates(families)
    return _table(found) if found else "<p>Nothing was fitted by approach 3.</p>"


def _excluded(runs: list[dict[str, str]]) -> str:
    return _table(tables.excluded(runs)) if runs else "<p>None: every run is in the fit.</p>"


def _figures(figures: Pictures, *names: str) -> Iterable[str]:
    return (_figure(figures[name], CAPTIONS[name]) for name in names if name in figures)


def _comparison(record: dict[str, Any], picture: str | None) -> Iterable[str]:
    base = record["baseline"]["family"]
    yield f"<h2>Compared with {html.escape(base)}</h2>"
    yield INTRODUCTION.format(base=html.escape(base))
    for name, family in record["families"].items():
        yield f"<h3>{html.escape(name)} against {html.escape(base)}</h3>"
        if family["mixed"]:
            yield f'<div class="note stop">{html.escape(family["mixed"])}</div>'
        if family["multiplier"]:
            count = record["method"]["bootstrap"]
            yield _table(tables.multipliers(name, base, family, count))
            yield _table(tables.tests(base, family))
        yield from _notes(family["warnings"])
    if picture:
        yield _figure(picture, CAPTIONS["multiplier"])


def _page(title: str, parts: Iterable[str]) -> str:
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{meta}<title>{title}</title><style>{STYLE}</style></head>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">{head}\n<body>\n{body}\n</body></html>\n'


def _table(table: Table) -> str:
    """A table as HTML, with its notes."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    body = "".join(f"<tr>{''.join(_cells(table, row))}</tr>" for row in table.rows)
    shown = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
    return f'<div class="wide">{shown}</div>{notes}'


def _cells(table: Table, row: Sequence[Any]) -> Iterable[str]:
    for k, cell in enumerate(row):
        found = cell if isinstance(cell, Cell) else Cell(str(cell))
        text = html.escape(found.text)
        text = f"<b>{text}</b>" if found.style else text
        small = "".join(f"<small>{html.escape(line)}</small>" for line in found.small)
        yield (
            f'<td class="long">{text}{small}</td>' if k in table.long else f"<td>{text}{small}</td>"
        )


def _notes(warnings: Sequence[dict[str, Any]], where: str = "") -> Iterable[str]:
    """A box for each warning, refusals first."""
    for item in sorted(warnings, key=lambda item: not item["refusal"]):
        style = "note stop" if item["refusal"] else "note"
        what = "Refused" if item["refusal"] else "Warning"
        sentence = f"{what}{where and f' ({where})'}: {item['message']}"
        yield (
            f'<div class="{style}">{html.escape(sentence)}. '
            f"<b>Hint:</b> {html.escape(item['hint'])}. <code>{item['code']}</code></div>"
        )


def _figure(picture: str, caption: str) -> str:
    return f'<figure role="group">{picture}<figcaption>{caption}</figcaption></figure>'


def _inline(path: Path) -> str:
    """The SVG element of an SVG file, without what only a file needs."""
    text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]
