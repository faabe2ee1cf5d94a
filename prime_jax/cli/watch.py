"""Sub-tokens resolving on the terminal: `prime-jax sample RUN --watch`."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
from rich.console import Console
from rich.text import Text

from prime_jax.cli.console import picture
from prime_jax.data.tokenizers import Tokenizer
from prime_jax.subtokens import Codebook

LEVELS = " ▁▂▃▄▅▆▇"  # fraction of a token's sub-tokens that is revealed
COLORS = ("grey35", "blue", "cyan", "green")


def shown(piece: bytes) -> str:
    """The text of a token on one line; what cannot be shown is a dot."""
    text = piece.decode("utf-8", "replace").replace("\n", "↵").replace("\t", "→")
    return "".join(c if c.isprintable() and c != "\ufffd" else "·" for c in text) or "¶"


def text_of(digits_LxS: np.ndarray, fresh_L: np.ndarray, book: Codebook, tokenizer: Tokenizer):
    """One text: finished tokens in full (new ones bright), others as bars of what is known."""
    text = Text()
    seen_L = (digits_LxS != book.base).mean(axis=1)
    token_L = book.decode(digits_LxS)
    for token, seen, fresh in zip(token_L, seen_L, fresh_L, strict=True):
        if seen == 1:
            piece = tokenizer.pieces[token] if token >= 0 else b"?"
            text.append(shown(piece), style="bold green" if fresh else "")
            if piece == b"\n":
                text.append("\n")
        else:
            bar = LEVELS[int(seen * len(LEVELS))]
            color = COLORS[int(seen * len(COLORS))]
            text.append("░" if bar == " " else bar, style=color)
    return text


@contextlib.contextmanager
def watcher(
    book: Codebook, tokenizer: Tokenizer, canvas_LxS: np.ndarray, out: Console
) -> Iterator[Callable[[np.ndarray, int], None]]:
    """Yields what draws the first text of a batch after every call."""
    last, drawn = canvas_LxS, canvas_LxS == book.base
    with picture(out) as renew:

        def draw(digits_BxLxS: np.ndarray, calls: int) -> None:
            nonlocal last
            now = digits_BxLxS[0, : len(canvas_LxS)]
            fresh_L = (last == book.base).any(axis=1) & (now != book.base).all(axis=1)
            known = (now != book.base)[drawn].mean()
            head = Text(f"call {calls}: {known:.0%} of {drawn.sum()} sub-tokens", style="dim")
            renew(head, text_of(now, fresh_L, book, tokenizer))
            last = now

        yield draw
