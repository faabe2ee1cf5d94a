"""The part of the report on a comparison, from the contents of compare.json."""

import html
from collections.abc import Iterable
from typing import Any

from prime_jax.scaling import labels
from prime_jax.scaling.report_page import figure, notes, table

INTRODUCTION = (
    "<p>The multiplier m is how many times the compute of {base} a family needs for the same loss: "
    "below one, the family is the cheaper one. It is a curve, not a number, because the two laws "
    "differ in E. An m that needs a frontier beyond its data is an extrapolation.</p>"
)
CAPTION = (
    "The multiplier against the compute that one side spends. Solid: both frontiers within their "
    "data. Dashed: extrapolated. Points: between the optima of approach 2, without a law."
)


def section(record: dict[str, Any], picture: str | None) -> Iterable[str]:
    base = html.escape(record["baseline"]["family"])
    yield f"<h2>Compared with {base}</h2>"
    yield INTRODUCTION.format(base=base)
    for name, family in record["families"].items():
        yield f"<h3>{html.escape(name)} against {base}</h3>"
        if family["mixed"]:
            yield f'<div class="note stop">{html.escape(family["mixed"])}</div>'
        if "multiplier" in family:
            yield _multipliers(family, html.escape(name), base, record["method"]["bootstrap"])
            yield _tests(family)
        yield from notes(family["warnings"])
    if picture:
        yield figure(picture, CAPTION)


def _multipliers(family: dict[str, Any], name: str, base: str, replicates: int) -> str:
    lower = {
        row["flops"]: labels.fraction(row["probability"], replicates) for row in family["lower"]
    }
    rows = []
    for side, who, never in (("at_family", name, base), ("at_baseline", base, name)):
        for row in family["multiplier"][side]["budgets"]:
            between = row["interpolated"] or {"value": None, "interval": None}
            rows.append(
                (
                    labels.flops(row["flops"]),
                    who,
                    f"{never} never reaches it"
                    if row["value"] is None
                    else _with(row["value"], row["interval"]),
                    "–"
                    if between["value"] is None
                    else _with(between["value"], between["interval"]),
                    "in range" if row["in_range"] else "<b>extrapolated</b>",
                    html.escape(lower[row["flops"]]),
                )
            )
    head = ("C", "spent by", "m, fitted laws", "m, between optima", "range")
    return table((*head, f"P({name} lower)"), rows)


def _tests(family: dict[str, Any]) -> str:
    rows = []
    for key, label in (("approach3", "approach 3"), ("approach2", "approach 2")):
        found = family["exponents"][key]
        if found:
            ends = found["interval"]
            shown = f" ({ends[0]:+.3f} to {ends[1]:+.3f})" if ends else " (no interval)"
            verdict = (
                "differ significantly" if found["significant"] else "do not differ significantly"
            )
            rows.append(
                (f"difference of a, {label}", f"{found['difference']:+.3f}{shown}", verdict)
            )
    questions = {"exponents": "one α and one β for both?", "E": "one E for both?"}
    for key, question in questions.items():
        test = family["tests"][key]
        rows.append((question, f"p = {test['p']:.2g}", f"{test['simulations']} simulations"))
    return table(("", "", ""), rows)


def _with(value: float, ends: list[float | None] | None) -> str:
    if ends is None:
        return f"{value:.3g}<small>no interval</small>"
    low, high = ("…" if end is None else f"{end:.3g}" for end in ends)
    return f"{value:.3g}<small>{low} – {high}</small>"
