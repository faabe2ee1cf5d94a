"""Generative perplexity: samples of one run, scored by another (or the same) run.

A sample file is JSON lines, each {"tokens": [ids], "text": "...", "drawn": [[start, stop]]} as
`prime-jax sample` writes; without `drawn` all tokens count as drawn. If both runs have the same
tokenizer the ids are scored, else the text is tokenized again. A low perplexity alone is not
evidence of quality, since repetitive samples score well: the measures of sample/quality.py are
reported as well.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prime_jax.errors import UserError
from prime_jax.evaluate import report
from prime_jax.evaluate.score import Scorer, Windows
from prime_jax.evaluate.texts import TextSet
from prime_jax.evaluate.trained import Trained
from prime_jax.sample.quality import Quality, quality


class Sample(NamedTuple):
    """One line of a sample file: its tokens, of which those from `prompt` on were drawn."""

    tokens: np.ndarray
    text: str
    prompt: int


def load(path: Path, of: Trained, scorer: Trained) -> tuple[TextSet, Quality]:
    """The samples as windows of the scorer, and their quality measures.

    What was given is context: only what was drawn is scored, measured and counted in bytes.

    Raises:
        UserError: not a sample file, or ids outside the vocabulary.
    """
    found = [sample for sample in _read(path) if len(sample.tokens) > sample.prompt]
    if not found:
        raise UserError(f"{path}: holds no sample with a drawn token")
    seen = quality([sample.tokens[sample.prompt :].tolist() for sample in found])
    if not same_tokenizer(of, scorer):
        found = [_again(sample, of, scorer) for sample in found]
    vocab = scorer.config.model.vocab_size
    largest = max(int(sample.tokens.max()) for sample in found)
    if largest >= vocab:
        raise UserError(
            f"{path}: token {largest} is outside the vocabulary of {scorer.path} ({vocab})"
        )
    size = scorer.config.data.seq_len
    windows, starts, numbers, n_bytes = [], [], [], 0
    for number, (tokens, _, prompt) in enumerate(found):
        n_bytes += int(scorer.tokenizer.token_bytes[tokens[prompt:]].sum())
        for begin, start, stop in pieces(len(tokens), prompt, size):
            windows.append(np.asarray(tokens[begin:stop], np.int32))
            starts.append(start - begin)
            numbers.append(number)
    texts = TextSet(
        name=str(path),
        rules="",
        windows=Windows(windows, np.array(starts, np.int32)),
        doc=np.array(numbers),
        texts=len(found),
        n_bytes=n_bytes,
        stride=size,
        context=0,
    )
    return texts, seen


def pieces(length: int, prompt: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(begin, start, stop) of a sample's windows: all that was drawn, behind its prompt.

    Of a prompt that does not fit the last `size // 2` tokens are read; what does not fit behind it
    is scored in windows of its own.
    """
    begin = 0 if length <= size else prompt - min(prompt, size // 2)
    stop = min(length, begin + size)
    yield begin, prompt, stop
    for at in range(stop, length, size):
        yield at, at, min(at + size, length)


def _again(sample: Sample, of: Trained, scorer: Trained) -> Sample:
    """A sample in the scorer's tokens."""
    parts = sample.tokens[: sample.prompt], sample.tokens[sample.prompt :]
    prompt, drawn = scorer.tokenizer.encode_batch([of.tokenizer.decode(part) for part in parts])
    return Sample(np.concatenate([prompt, drawn]), sample.text, len(prompt))


def same_tokenizer(a: Trained, b: Trained) -> bool:
    return a is b or a.tokenizer.hash == b.tokenizer.hash


def _read(path: Path) -> list[Sample]:
    samples = []
    try:
        lines = path.read_text("utf-8").split("\n")  # U+2028 and its like are text
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            tokens = np.array(value["tokens"], np.int64).reshape(-1)
            drawn = [(int(a), int(b)) for a, b in value.get("drawn", [(0, len(tokens))])]
            samples.append(
                Sample(tokens, str(value["text"]), drawn[0][0] if drawn else len(tokens))
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path} line {number}: not a sample, {{"tokens": [ids], "text": "..."}}'
            ) from error
        if len(tokens) and tokens.min() < 0:
            raise UserError(f"{path} line {number}: negative token id")
        if drawn and drawn != [(samples[-1].prompt, len(tokens))]:
            raise UserError(
                f"{path} line {number}: holes in a text that was given; only continuations are "
                "scored, whose drawn tokens are the last ones"
            )
    if not samples:
        raise UserError(f"{path}: holds no sample")
    return samples


def score(
    path: Path,
    of: Trained,
    scorer: Scorer,
    names: list[str],
    replicates: int,
    tick: Callable[[str, int, float], None],
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The entry of eval.json: losses under the scorer, and quality measures."""
    texts, seen = load(path, of, scorer.run)
    losses = report.evaluate(scorer, texts, names, replicates, tick=tick, log=log)
    by = {"run": scorer.run.id, "step": scorer.run.step, "family": scorer.run.config.family}
    return report.as_record(texts, losses) | {"scorer": by, "quality": seen._asdict()}
