"""The zero-shot perplexity sets: their cleaning and layout. Versioned: a rule that changes a result
gets a new version, which every result records.

The user provides the files. A preset undoes the tokenisation of the set (`detokenise`), and defines
what one text is in a plain file (`unit`) and the `layout`: one stream in which an EOS follows each
text and is scored, as in training, or each text separately, without EOS. Texts get no prefix: every
family scores the first token (ARM reads BOS there).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Rule = tuple[str, str]

# Punctuation without a space before it, after it, or (quotes) on the inside.
CLOSING: list[Rule] = [(r" +([.,;:!?%)\]}])", r"\1")]
OPENING: list[Rule] = [(r"([(\[{$£€]) +", r"\1")]
QUOTED: list[Rule] = [(r'" ([^"\n]*?) "', r'"\1"')]
CONTRACTED: list[Rule] = [(r" (n't|'(?:s|S|re|ve|ll|d|m|t))\b", r"\1"), (r"s ' ", "s' ")]
TEX_QUOTES: list[Rule] = [(r"`` ?", '"'), (r" ?''", '"')]


def rewriter(*groups: Iterable[Rule]) -> Callable[[str], str]:
    rules = [(re.compile(pattern), new) for group in groups for pattern, new in group]

    def rewrite(text: str) -> str:
        for pattern, new in rules:
            text = pattern.sub(new, text)
        return text

    return rewrite


ENGLISH = (QUOTED, CONTRACTED, CLOSING, OPENING)


@dataclass(frozen=True)
class Preset:
    """One set.

    Attributes:
        version: of the rules below.
        unit: what one text is in a .txt file: the whole `file` or each `line`.
        layout: `stream` or `documents` (see above).
    """

    version: int
    detokenise: Callable[[str], str]
    unit: Literal["file", "line"]
    layout: Literal["stream", "documents"]


PRESETS = {
    "lambada": Preset(1, rewriter([("[“”]", '"'), ("[‘’]", "'")], TEX_QUOTES), "line", "stream"),
    "wikitext2": Preset(
        1,
        # Numbers and compounds were split at " @-@ ", headings are " = = Title = = ".
        rewriter([(r" @([-,.])@ ", r"\1"), (r"= (?==)", "=")], *ENGLISH),
        "file",
        "stream",
    ),
    "ptb": Preset(
        1,
        rewriter([(r"([$#]) (?=N\b)", r"\1")], TEX_QUOTES, *ENGLISH),
        "line",
        "stream",
    ),
    "lm1b": Preset(1, rewriter(*ENGLISH), "line", "documents"),
    "ag_news": Preset(1, rewriter(), "line", "stream"),
    "pubmed": Preset(1, rewriter(*ENGLISH), "line", "stream"),
    "arxiv": Preset(1, rewriter(*ENGLISH), "line", "stream"),
}
