"""Tokens as digits: the codebook that maps a token id to `l` base-`b` sub-tokens and back.

`y = f(x)` are the digits, most significant first, of `code = perm[x]` (theory.md, "Sub-token
codes"). NumPy only.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prime_jax.config import SubtokenConfig
from prime_jax.errors import UserError

MAX_PERMUTED = 1 << 26  # largest permutation over all codes, which is stored whole


def base(vocab_size: int, length: int) -> int:
    """The smallest `b >= 2` with `b**length >= vocab_size`, by integer bisection (no floats)."""
    low, high = 2, max(2, vocab_size)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if middle**length >= vocab_size else (middle + 1, high)
    return low


def digits_of(codes: np.ndarray, length: int, base: int) -> np.ndarray:
    """Digits int32 [..., length] of non-negative codes [...], most significant first."""
    powers = np.array([base**j for j in reversed(range(length))], np.int64)
    return (np.asarray(codes, np.int64)[..., None] // powers % base).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Codebook:
    """One code per token; part of the model and stored with it.

    Attributes:
        length: sub-tokens per token, l.
        base: b; the digit `base` itself means "masked".
        codes: int64 [V], the code of each token, distinct and below b**l.
    """

    length: int
    base: int
    codes: np.ndarray

    @classmethod
    def create(cls, vocab_size: int, config: SubtokenConfig) -> "Codebook":
        """The codebook that a config describes.

        Raises:
            UserError: a permutation over all codes that would be too large to store, or codes that
                came from a file or with imported weights and cannot be generated.
        """
        if config.codes:
            raise UserError(
                f"subtokens.codes = {config.codes}: these codes came from a file or with imported "
                "weights and cannot be made from a seed; leave it empty"
            )
        b = base(vocab_size, config.length)
        if config.scope == "codes" and b**config.length > MAX_PERMUTED:
            raise UserError(
                f"subtokens.scope = codes: a permutation of {b}**{config.length} codes is above "
                f"{MAX_PERMUTED}; use scope vocab"
            )
        size = vocab_size if config.scope == "vocab" else b**config.length
        perm = np.arange(size, dtype=np.int64)
        first = round(config.shuffle * size)
        perm[:first] = np.random.Generator(np.random.PCG64(config.seed)).permutation(first)
        return cls(config.length, b, perm[:vocab_size])

    @property
    def vocab_size(self) -> int:
        return len(self.codes)

    @cached_property
    def digits(self) -> np.ndarray:
        """int32 [V, l]: the sub-tokens of every token."""
        return digits_of(self.codes, self.length, self.base)

    @cached_property
    def tokens(self) -> np.ndarray:
        """int32 [V]: tokens in the order of their codes, which is the order of the head's rows."""
        return np.argsort(self.codes).astype(np.int32)

    @cached_property
    def rows(self) -> np.ndarray:
        """int32 [V]: each token's row of the head, the rank of its code; inverse of `tokens`."""
        return np.argsort(self.tokens).astype(np.int32)

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens int [...] to digits int32 [..., l].

        Raises:
            UserError: a token outside [0, V).
        """
        tokens = np.asarray(tokens)
        bad = (tokens < 0) | (tokens >= self.vocab_size)
        if bad.any():
            raise UserError(
                f"token {tokens[bad].flat[0]} at index {int(np.argmax(bad))} is outside the "
                f"vocabulary of {self.vocab_size}"
            )
        return self.digits[tokens]

    def decode(self, digits: np.ndarray) -> np.ndarray:
        """Inverse of `encode`: digits [..., l] to tokens [...]; -1 where no token has them."""
        powers = np.array([self.base**j for j in reversed(range(self.length))], np.int64)
        codes = (np.asarray(digits, np.int64) * powers).sum(-1)
        order = self.tokens
        index = np.searchsorted(self.codes, codes, sorter=order)
        tokens = order[np.minimum(index, self.vocab_size - 1)]
        return np.where(self.codes[tokens] == codes, tokens, -1)

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits that identify the permutation, the granularity and the base."""
        head = f"{self.vocab_size} {self.length} {self.base} ".encode()
        return hashlib.sha256(head + self.codes.astype("<i8").tobytes()).hexdigest()[:12]
