"""report.html: one file that explains a fit; no network, no script, pictures inside.

It is made from the contents of fit.json and the SVG figures, so that it says nothing they do not.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prime_jax.scaling import labels

CAPTIONS = {
    "isoflop": "Loss against size at each budget. Solid: a parabola through the runs of one budget "
    "(approach 2); its vertex, the star, is the best size. Dashed: the law fitted to all runs of the "
    "family at once (approach 3). An open arrow means that the best size lies beyond the sampled ones.",
    "frontier": "The lowest loss that each budget can reach. Families share an axis only where their "
    "losses are numbers of one kind.",
    "optimum": "The size and the number of tokens that reach it.",
}
PARAMETERS = ("E", "A", "B", "alpha", "beta")
SYMBOLS = {"alpha": "α", "beta": "β"}

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --line: #dde1e7;
  --page: #ffffff; --panel: #f5f7f9; --mark: #b45309; --stop: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #333c49;
  --page: #151a21; --panel: #1e252e; --mark: #f0a04b; --stop: #f97066; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
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
.note code { color: var(--soft); font-size: .8rem; } code { overflow-wrap: anywhere; }
"""


def inline(path: Path) -> str:
    """The SVG element of an SVG file, without what only a file needs."""
    text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def render(record: dict[str, Any], figures: dict[str, str]) -> str:
    """The page of a fit.

    Args:
        record: the contents of fit.json.
        figures: SVG elements by the names of CAPTIONS.
    """
    families = record["families"]
    runs = sum(family["runs"] for family in families.values())
    source = html.escape(record["source"]["name"])
    parts = [
        f"<h1>Scaling fit of {source}</h1>",
        f'<p class="soft">{runs} runs of {len(families)} '
        f"{'family' if len(families) == 1 else 'families'}: {html.escape(', '.join(families))}</p>",
        *_notes(record["warnings"]),
        "<h2>What was measured</h2>",
        *_measured(record),
        "<h2>The fitted laws</h2>",
        "<p>L(N, D) = E + A / N<sup>α</sup> + B / D<sup>β</sup>, and the exponent a of "
        f"N*(C) ∝ C<sup>a</sup>. Small print: {record['method']['level']:.0%} intervals.</p>",
        _laws(families),
        *(_figure(name, figures[name]) for name in CAPTIONS if name in figures),
        "<h2>The best size at each budget</h2>",
        _optima(families),
        "<h2>Warnings</h2>",
        *_warnings(families),
        "<h2>Can the fits be trusted?</h2>",
        "<p>A fit has converged when its gradient is zero and its curvature positive. The more of the "
        "independent starts end at the same minimum, the less it depends on where one began.</p>",
        _certificates(families),
        "<h2>Runs left out</h2>",
        _excluded(record["excluded"]),
        "<h2>How this was made</h2>",
        _provenance(record),
    ]
    title = f"<title>Scaling fit of {source}</title>"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{meta}{title}<style>{STYLE}</style></head>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">{head}\n<body>\n{body}\n</body></html>\n'


def _measured(record: dict[str, Any]) -> Iterable[str]:
    conventions = record["conventions"]
    yield _table(
        ("family", "kind of loss", "runs", "budgets (FLOPs)", "FLOPs of a run"),
        (
            (
                html.escape(name),
                html.escape(labels.kind(family["kind"]))
                + (f", given {html.escape(family['given'])}" if family["given"] else ""),
                family["runs"],
                ", ".join(labels.flops(budget) for budget in _ends(family["budgets"])),
                f"{labels.value(family['compute']['k'], 3)} N{_power(family['compute']['q'])} D",
            )
            for name, family in record["families"].items()
        ),
    )
    yield (
        f"<p>N counts parameters by the convention <b>{html.escape(labels.convention(conventions['params']))}</b>, "
        f"C counts FLOPs by <b>{html.escape(labels.convention(conventions['flops']))}</b>; "
        "another convention gives other exponents. "
        f"The metric is <b>{html.escape(record['metric'])}</b>.</p>"
    )
    kinds = {kind for family in record["families"].values() for kind in family["kind"].split("+")}
    if kinds & {"nelbo", "nll"}:
        yield "<p>An NLL is exact; a NELBO is an upper bound on it: the model may be better than the number.</p>"
    if "train_loss" in kinds:
        yield (
            "<p>A training loss is neither: it can lie below the entropy of the text, "
            "is no perplexity, and is not comparable with an NLL or a NELBO.</p>"
        )


def _ends(budgets: list[float]) -> list[float | str]:
    return budgets if len(budgets) <= 8 else [*budgets[:3], *budgets[-3:]]


def _power(q: float) -> str:
    return "" if q == 1 else f"<sup>{q:.3f}</sup>"


def _laws(families: dict[str, Any]) -> str:
    rows = []
    for name, family in families.items():
        three, two = family["approach3"], family["approach2"]
        if three["params"] is None:
            cells = ["refused"] + ["–"] * 5
        else:
            values = {**three["params"], "a": three["a"]}
            cells = [
                _with(values[p], three["intervals"][p], labels.value) for p in (*PARAMETERS, "a")
            ]
        last = (
            "refused" if two["a"] is None else _with(two["a"], two["intervals"]["a"], labels.value)
        )
        rows.append((html.escape(name), *cells, last))
    names = [SYMBOLS.get(p, p) for p in PARAMETERS]
    return _table(("family", *names, "a, approach 3", "a, approach 2"), rows)


def _optima(families: dict[str, Any]) -> str:
    rows = []
    for name, family in families.items():
        law = {row["flops"]: row for row in family["approach3"].get("optima", [])}
        valleys = {row["flops"]: row for row in family["approach2"]["optima"]}
        if len(law) > len(valleys) and not valleys:
            law = {key: law[key] for key in _edges(sorted(law))}
        for budget in sorted({*law, *valleys}):
            rows.append(
                (
                    html.escape(name),
                    labels.flops(budget),
                    *_law_cells(law.get(budget)),
                    *_valley_cells(valleys.get(budget)),
                )
            )
    return _table(
        ("family", "C", "N*, approach 3", "D*", "loss", "N*, approach 2", "D*", "loss"), rows
    )


def _edges(budgets: list[float]) -> list[float]:
    """Without IsoFLOP budgets every run may be one: the first, the middle and the last do."""
    return sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]})


def _law_cells(row: dict[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return "–", "–", "–"
    spread = row["intervals"]
    return (
        _with(row["params"], spread["params"], labels.count),
        _with(row["tokens"], spread["tokens"], labels.count),
        _with(row["loss"], spread["loss"], labels.value),
    )


def _valley_cells(row: dict[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return "no estimate", "–", "–"
    size, tokens, loss = (
        labels.count(row["params"]),
        labels.count(row["tokens"]),
        labels.value(row["loss"]),
    )
    if "censored" in row:
        below, above = "below ", "above "
        size_side, tokens_side = (below, above) if row["censored"] == "below" else (above, below)
        return f"{size_side}{size}<small>a bound</small>", tokens_side + tokens, f"at most {loss}"
    return _with(row["params"], row["interval"], labels.count), tokens, loss


def _warnings(families: dict[str, Any]) -> Iterable[str]:
    if not any(family["warnings"] for family in families.values()):
        yield "<p>None.</p>"
    for name, family in families.items():
        if family["warnings"]:
            yield f"<h3>{html.escape(name)}</h3>"
            yield from _notes(family["warnings"])


def _notes(warnings: list[dict[str, Any]]) -> Iterable[str]:
    for item in sorted(warnings, key=lambda item: not item["refusal"]):
        style, what = ("note stop", "Refused: ") if item["refusal"] else ("note", "")
        message = html.escape(item["message"])
        sentence = message if what else message[:1].upper() + message[1:]
        yield (
            f'<div class="{style}">{what}{sentence}. <b>Cure:</b> {html.escape(item["cure"])}. '
            f"<code>{item['code']}</code></div>"
        )


def _certificates(families: dict[str, Any]) -> str:
    rows = []
    for name, family in families.items():
        three = family["approach3"]
        if three["params"] is None:
            continue
        certificate = three["certificate"]
        rows.append(
            (
                html.escape(name),
                "yes" if certificate["converged"] else "<b>no</b>",
                labels.value(three["objective"]),
                f"{certificate['gradient']:.1e}",
                f"{certificate['smallest_eigenvalue']:.1e}",
                f"{certificate['agreeing']:.0%} of {certificate['starts']}",
                ", ".join(SYMBOLS.get(p, p) for p in certificate["bounds"]) or "none",
            )
        )
    head = (
        "family",
        "converged",
        "objective",
        "scaled gradient",
        "least curvature",
        "starts that agree",
        "at a bound",
    )
    return _table(head, rows) if rows else "<p>Nothing was fitted by approach 3.</p>"


def _excluded(runs: list[dict[str, str]]) -> str:
    if not runs:
        return "<p>None: every run is in the fit.</p>"
    shown = [
        tuple(html.escape(run[key]) for key in ("run", "family", "status", "reason"))
        for run in runs
    ]
    return _table(("run", "family", "status", "reason"), shown, long={3})


def _provenance(record: dict[str, Any]) -> str:
    method = record["method"]
    rows = (
        ("data", f"{html.escape(record['source']['name'])}, SHA-256 <code>{record['source']['sha256']}</code>"),
        ("objective of approach 3", f"{html.escape(method['objective'])}, δ = {method['delta']:g}"),
        ("intervals", f"{method['level']:.0%}; approach 3: {method['bootstrap']} bootstrap replicates, runs redrawn within each budget; approach 2: {method['bootstrap']} draws from the errors of the parabolas; seed {method['seed']}"),
        ("versions", html.escape(", ".join(f"{k} {v}" for k, v in record["versions"].items()))),
        ("numbers", "fit.json beside this file; figures as SVG, PNG and PDF"),
    )  # fmt: skip
    return _table(("", ""), rows, long={1})


def _figure(name: str, picture: str) -> str:
    return f'<figure role="group">{picture}<figcaption>{CAPTIONS[name]}</figcaption></figure>'


def _with(value: float, ends: Sequence[float] | None, show: Any) -> str:
    """A value above its interval; the cells are HTML already."""
    between = f"{show(ends[0])} – {show(ends[1])}" if ends else "no interval"
    return f"{show(value)}<small>{between}</small>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], long: set[int] = frozenset()) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="long">{c}</td>' if k in long else f"<td>{c}</td>"
            for k, c in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )
