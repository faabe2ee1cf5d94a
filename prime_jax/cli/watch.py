"""Sub-tokens resolving on the terminal: `prime-jax sample RUN --watch`."""

from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from prime_jax.data.tokenizers import Tokenizer
from prime_jax.subtokens import Codebook

LEVELS = " ▁▂▃▄▅▆▇"  # fraction of a token's sub-tokens that is revealed
COLORS = ("grey35", "blue", "cyan", "green")


def shown(piece: bytes) -> str:
    """The text of a token on one line; what cannot be shown is a dot."""
    text = piece.decode("utf-8", "replace").replace("\n", "↵").replace("\t", "→")
    return "".join(c if c.isprintable() and c != "\ufffd" else "·" for c in text) or "¶"


def picture(digits_LxS: np.ndarray, fresh_L: np.ndarray, book: Codebook, tokenizer: Tokenizer):
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


class Watcher:
    """Draws the first text of a batch after every call; a context manager."""

    def __init__(self, book: Codebook, tokenizer: Tokenizer, canvas: np.ndarray, console: Console):
        self.book, self.tokenizer, self.canvas = book, tokenizer, canvas
        self.last = canvas
        self.live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> "Watcher":
        self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.live.stop()

    def __call__(self, digits_BxLxS: np.ndarray, calls: int) -> None:
        base = self.book.base
        now = digits_BxLxS[0, : len(self.canvas)]
        fresh_L = (self.last == base).any(axis=1) & (now != base).all(axis=1)
        drawn = self.canvas == base
        known = (now != base)[drawn].mean()
        head = Text(f"call {calls}: {known:.0%} of {drawn.sum()} sub-tokens", style="dim")
        body = picture(now, fresh_L, self.book, self.tokenizer)
        self.live.update(Group(head, body), refresh=True)
        self.last = now
