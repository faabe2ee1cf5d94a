"""The parts of an HTML page: style, tables, notes, figures. No script, nothing from elsewhere."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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


def page(title: str, parts: Iterable[str]) -> str:
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{meta}<title>{title}</title><style>{STYLE}</style></head>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">{head}\n<body>\n{body}\n</body></html>\n'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], long: set[int] = frozenset()) -> str:
    """Cells are HTML; those of the columns `long` may break into lines."""
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


def notes(warnings: Sequence[dict[str, Any]], where: str = "") -> Iterable[str]:
    """A box for each warning, refusals first."""
    for item in sorted(warnings, key=lambda item: not item["refusal"]):
        style = "note stop" if item["refusal"] else "note"
        what = "Refused" if item["refusal"] else "Warning"
        sentence = f"{what}{where and f' ({where})'}: {item['message']}"
        yield (
            f'<div class="{style}">{html.escape(sentence)}. '
            f"<b>Hint:</b> {html.escape(item['hint'])}. <code>{item['code']}</code></div>"
        )


def figure(picture: str, caption: str) -> str:
    return f'<figure role="group">{picture}<figcaption>{caption}</figcaption></figure>'


def inline(path: Path) -> str:
    """The SVG element of an SVG file, without what only a file needs."""
    text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def within(value: float, ends: Sequence[float | None] | None, show: Any, extra: str = "") -> str:
    """A value above its interval, and a second line of small print."""
    more = f"<small>{extra}</small>" if extra else ""
    return f"{show(value)}<small>{between(ends, show)}</small>{more}"


def between(ends: Sequence[float | None] | None, show: Any) -> str:
    """An interval; an end that is None is open."""
    if ends is None:
        return "no interval"
    low, high = ("open" if end is None else show(end) for end in ends)
    return f"{low} – {high}"


def signed(fraction: float | None, digits: int = 1) -> str:
    if fraction is None:
        return "–"
    return (
        f"{fraction:+.{digits}%}"
        if abs(fraction) >= 0.5 * 10 ** -(digits + 2)
        else f"{0:.{digits}%}"
    )
