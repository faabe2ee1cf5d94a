"""Quality measures of samples without another model. A low generative perplexity alone is not
enough: repetitive text of low entropy has one too."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

REPEAT = 4  # length of the n-grams whose repetition is counted


class Quality(NamedTuple):
    """Means over samples, and fractions over all of them.

    Attributes:
        entropy: of the tokens of one sample, nats per token.
        repetition: fraction of 4-grams of a sample that occurred in it before.
        distinct: fraction of different n-grams among all, for n = 1, 2, 3.
    """

    entropy: float
    repetition: float
    distinct: tuple[float, ...]


def spans(drawn_L: np.ndarray) -> list[list[int]]:
    """[start, stop) of each run of drawn tokens; the others were given."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], drawn_L, [0]])))
    return edges.reshape(-1, 2).tolist()


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def entropy(tokens: Sequence[int]) -> float:
    """Entropy of the token frequencies, nats."""
    counts = np.unique(np.asarray(tokens), return_counts=True)[1]
    p = counts / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum())


def repetition(tokens: Sequence[int]) -> float:
    grams = ngrams(tokens, REPEAT)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(samples: Sequence[Sequence[int]], n: int) -> float:
    grams = [gram for tokens in samples for gram in ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def quality(samples: Sequence[Sequence[int]]) -> Quality:
    """Args: samples: token ids, without prompts."""
    lists = [[int(token) for token in tokens] for tokens in samples]
    return Quality(
        float(np.mean([entropy(tokens) for tokens in lists])),
        float(np.mean([repetition(tokens) for tokens in lists])),
        tuple(distinct(lists, n) for n in (1, 2, 3)),
    )
