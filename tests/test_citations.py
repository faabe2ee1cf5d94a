"""What docstrings and comments cite is in the repository: pages by name, their headings in quotes."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("prime_jax", "tests", "experiments", "benchmarks")
NOT_OURS = {
    "table.md",  # what benchmarks/scaling_out.py prints
    "c.md",  # a file of test_sources.py
    "text/README.md",  # in the repository of MDM-Prime (prime_jax/presets/owt_92m.py)
}
PAGE = re.compile(r"(?<![\w./{}*-])[\w-][\w./-]*\.md\b")
CITATION = re.compile(rf'({PAGE.pattern}),((?: (?:and )?"[^"]+",?)+)')


def joined(text: str) -> str:
    """All on one line, without the marks of comments: a citation may be broken across lines."""
    return re.sub(r"\s*\n\s*(?:# )?", " ", text)


def citations(text: str) -> set[tuple[str, str]]:
    """(page, heading) pairs."""
    found = CITATION.findall(text)
    return {(page, heading) for page, quoted in found for heading in re.findall('"(.+?)"', quoted)}


def headings(page: str) -> list[str] | None:
    """Of a page in docs/ or at the top level; None if there is no such page."""
    for path in (ROOT / "docs" / page, ROOT / page):
        if path.is_file():
            text = re.sub(r"(?ms)^```.*?^```", "", path.read_text())  # where # opens a comment
            return re.findall(r"(?m)^#+ (.+)$", text)
    return None


def test_pages_and_headings_exist():
    wrong = []
    for path in sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py")):
        if path == Path(__file__):
            continue
        text, name = joined(path.read_text()), path.relative_to(ROOT)
        pages = set(PAGE.findall(text)) - NOT_OURS
        wrong += [f"{name}: no page {page}" for page in pages if headings(page) is None]
        wrong += [
            f'{name}: {page} has no heading "{heading}"'
            for page, heading in citations(text)
            if heading not in (headings(page) or ())
        ]
        numbered = re.findall(r"[\w-]+\.md,? sections? \d+", text)
        wrong += [f"{name}: {cited}, but headings have no numbers" for cited in numbered]
    assert not wrong, "\n".join(wrong)


def test_a_citation_is_recognised_across_lines():
    text = joined('# as in\n    # docs/theory.md, "The\n    # head", "FLOPs" (and "no heading")')
    assert citations(text) == {("docs/theory.md", "The head"), ("docs/theory.md", "FLOPs")}
    assert citations(joined((ROOT / "prime_jax" / "schedule.py").read_text()))
