"""Entropies and mutual information of sub-tokens, for a codebook and a corpus.

All numbers are in bits and computed from token frequencies only (theory.md, "Sub-token codes"), so
they are cheap and help to choose the granularity before any training.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from prime_jax.config import SubtokenConfig
from prime_jax.errors import UserError
from prime_jax.subtokens import Codebook

SHUFFLES = (0.0, 0.25, 1.0)  # the columns of the table: identity, a quarter, full


@dataclass(frozen=True)
class Entropies:
    """Sub-tokens of one token drawn from the corpus, in bits.

    Attributes:
        length, base: the codebook.
        shuffle: fraction of its codes that is permuted; None where they are given.
        slots: entropy of each sub-token, most significant first.
        mean: their mean.
        maximum: log2 of the base, the upper bound for each slot.
        token: entropy of the token itself.
        total_correlation: sum of the slots less `token`; 0 where sub-tokens are independent.
        mutual_information: mean over the pairs of slots; 0 if there is one slot only.
    """

    length: int
    base: int
    shuffle: float | None
    slots: tuple[float, ...]
    mean: float
    maximum: float
    token: float
    total_correlation: float
    mutual_information: float


def entropy_bits(weights: np.ndarray) -> float:
    """Entropy in bits of the distribution proportional to non-negative weights."""
    p = weights[weights > 0] / weights.sum()
    return float(-(p * np.log2(p)).sum())


def entropies(counts: np.ndarray, config: SubtokenConfig) -> Entropies:
    """Entropies of the sub-tokens that `config` makes of tokens with these counts.

    Args:
        counts: int64 [V], occurrences of each id.
    Raises:
        UserError: a length outside 1..32, a negative seed, or no tokens.
    """
    if not 1 <= config.length <= 32:
        raise UserError(f"length {config.length}: must be between 1 and 32")
    if config.seed < 0:
        raise UserError(f"seed {config.seed}: must not be below 0")
    return of_codebook(counts, Codebook.create(len(counts), config), config.shuffle)


def of_codebook(counts: np.ndarray, book: Codebook, shuffle: float | None = None) -> Entropies:
    """Entropies of the sub-tokens that a codebook makes of tokens with these counts.

    Raises:
        UserError: no tokens.
    """
    if not counts.sum():
        raise UserError("the train split holds no tokens")
    b, digits_VxS = book.base, book.digits.astype(np.int64)
    weights = counts.astype(np.float64)
    slots = [entropy_bits(np.bincount(column, weights, b)) for column in digits_VxS.T]
    pairs = list(combinations(range(book.length), 2))
    shared = [
        slots[i] + slots[j] - entropy_bits(_joint(digits_VxS[:, i] * b + digits_VxS[:, j], weights))
        for i, j in pairs
    ]
    token = entropy_bits(weights)
    return Entropies(
        length=book.length,
        base=b,
        shuffle=shuffle,
        slots=tuple(slots),
        mean=sum(slots) / len(slots),
        maximum=math.log2(b),
        token=token,
        total_correlation=sum(slots) - token,
        mutual_information=sum(shared) / len(pairs) if pairs else 0.0,
    )


def _joint(pair_V: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weight of each pair of digits that occurs (b**2 cells would be too many for l = 1, 2)."""
    _, cell = np.unique(pair_V, return_inverse=True)
    return np.bincount(cell, weights)
