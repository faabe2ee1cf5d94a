"""Small folders of awkward text, and datasets made of them."""

from pathlib import Path

import numpy as np

from prime_jax.data import prepare

WORDS = ["alpha", "beta", "gamma", "\u2581", "naïve", "\0", "漢字", "\t", "tab\r\n", "end"]


def corpus(directory: Path, documents: int = 60, words: int = 120, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        text = " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), words + 7 * i))
        (directory / f"{seed}-{i:03d}.txt").write_bytes(text.encode())
    return f"text:{directory}/{seed}-*.txt"


def make(source, out, tokenizer="bytes", seq_len=32, workers=1, **options):
    return prepare.prepare(source, tokenizer, out, seq_len, workers=workers, **options)
