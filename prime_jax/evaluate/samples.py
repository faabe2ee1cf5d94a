"""Generative perplexity: samples of one run, scored by another (or the same) run.

A sample file is JSON lines, each {"tokens": [ids], "text": "..."} as `prime-jax sample` writes.
If both runs have the same tokenizer the ids are scored, else the text is tokenized again. A low
perplexity alone is not evidence of quality, since repetitive samples score well: the measures of
sample/quality.py are reported as well.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prime_jax.errors import UserError
from prime_jax.evaluate import report
from prime_jax.evaluate.score import Scorer, Windows, cut
from prime_jax.evaluate.texts import TextSet
from prime_jax.evaluate.trained import Trained
from prime_jax.sample.quality import Quality, quality


def load(path: Path, of: Trained, scorer: Trained) -> tuple[TextSet, Quality]:
    """The samples as windows of the scorer, and their quality measures.

    Raises:
        UserError: not a sample file, or ids outside the vocabulary.
    """
    tokens_N, texts = _read(path)
    seen = quality([tokens.tolist() for tokens in tokens_N])
    n_bytes = sum(len(text.encode()) for text in texts)
    if not same_tokenizer(of, scorer):
        tokens_N = scorer.tokenizer.encode_batch(texts)
    largest = max((int(t.max()) for t in tokens_N if len(t)), default=0)
    if largest >= scorer.config.model.vocab_size:
        raise UserError(
            f"{path}: token {largest} is outside the vocabulary of {scorer.path} "
            f"({scorer.config.model.vocab_size})"
        )
    size = scorer.config.data.seq_len
    pieces = [(i, t[b:e]) for i, t in enumerate(tokens_N) for b, _, e in cut(len(t), size, size, 0)]
    if not pieces:
        raise UserError(f"{path}: holds no sample with a token")
    number, stretches = zip(*pieces, strict=True)
    windows = Windows([np.asarray(p, np.int32) for p in stretches], np.zeros(len(pieces), np.int32))
    texts_of = (str(path), "", windows, np.array(number), "texts", len(tokens_N), n_bytes, size, 0)
    return TextSet(*texts_of), seen


def same_tokenizer(a: Trained, b: Trained) -> bool:
    return a is b or a.tokenizer.hash == b.tokenizer.hash


def _read(path: Path) -> tuple[list[np.ndarray], list[str]]:
    tokens, texts = [], []
    try:
        lines = path.read_text("utf-8").split("\n")  # U+2028 and its like are text
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            tokens.append(np.array(value["tokens"], np.int64).reshape(-1))
            texts.append(str(value["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path} line {number}: not a sample, {{"tokens": [ids], "text": "..."}}'
            ) from error
        if len(tokens[-1]) and tokens[-1].min() < 0:
            raise UserError(f"{path} line {number}: negative token id")
    if not tokens:
        raise UserError(f"{path}: holds no sample")
    return tokens, texts


def score(
    path: Path,
    of: Trained,
    scorer: Scorer,
    names: list[str],
    replicates: int,
    tick: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """The entry of eval.json: losses under the scorer, and quality measures."""
    texts, seen = load(path, of, scorer.run)
    losses = report.evaluate(scorer, texts, names, replicates, tick=tick)
    by = {"run": scorer.run.id, "step": scorer.run.step, "family": scorer.run.config.family}
    return report.as_record(texts, losses) | {"scorer": by, "quality": seen._asdict()}
