"""Probability tables in place of the network, for exact enumeration (theory.md, "By enumeration").

Two tokens, V = 16: u(v) ~ 1/(v+1), P = .7 u u^T + .3 diag(u). A table network returns logits as
hidden states with an identity head, so that the shipped functions run unchanged; tables are in
token order, and `identity_head` has its rows in the order of codes.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import stats

from prime_jax.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, SubtokenConfig
from prime_jax.subtokens import Codebook, base

V, L = 16, 2
ENTROPY = 4.423373  # nats per pair


@dataclass(frozen=True, eq=False)
class Run:
    """What a sampler needs of a trained run; `network` is a function of `params`."""

    config: RunConfig
    codebook: Codebook
    network: Callable[[Any], Any]
    params: Any = ()


def pair_probabilities() -> np.ndarray:
    u = 1.0 / np.arange(1, V + 1)
    u /= u.sum()
    return 0.7 * np.outer(u, u) + 0.3 * np.diag(u)


def codebook(length: int, codes: np.ndarray | None = None) -> Codebook:
    return Codebook(length, base(V, length), np.arange(V) if codes is None else codes)


def affine() -> np.ndarray:
    return (5 * np.arange(V) + 3) % V


def run_config(length: int, batch: int = 1, **objective) -> RunConfig:
    return RunConfig(
        family="prime",
        batch_size=batch,
        model=ModelConfig(vocab_size=V),
        subtokens=SubtokenConfig(length=length),
        objective=ObjectiveConfig(**objective),
        data=DataConfig(seq_len=L),
    )


def all_pairs() -> np.ndarray:
    """Every sequence of two tokens: int32 [256, 2]."""
    return np.array(list(itertools.product(range(V), repeat=L)), np.int32)


def all_masks(slots: int) -> np.ndarray:
    """Every mask over L * slots sub-tokens: bool [2**(L*slots), L, slots]."""
    n = L * slots
    bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
    return bits.astype(bool).reshape(-1, L, slots)


def identity_head(book: Codebook):
    return jnp.eye(V)[book.tokens]


def bayes(book: Codebook):
    """The network that knows the source: p(x^i | all visible sub-tokens)."""
    pairs = jnp.asarray(pair_probabilities())
    digits = jnp.asarray(book.digits)

    def network(digits_BxLxS, segment_ids, dropout_keys):
        seen = digits_BxLxS[:, :, None, :]  # [B, L, 1, S] against [V, S]
        fits_BxLxV = ((seen == digits) | (seen == book.base)).all(-1)
        first = fits_BxLxV[:, 0] * (fits_BxLxV[:, 1] @ pairs.T)
        second = fits_BxLxV[:, 1] * (fits_BxLxV[:, 0] @ pairs)
        p_BxLxV = jnp.stack([first, second], axis=1)
        z_BxLxV = jnp.where(p_BxLxV > 0, jnp.log(jnp.where(p_BxLxV > 0, p_BxLxV, 1.0)), -1e3)
        return z_BxLxV, identity_head(book)

    return network


def wrong(book: Codebook, seed: int, scale: float = 1.0):
    """A network with random logits for every pattern of visible sub-tokens."""
    n = L * book.length
    count = (book.base + 1) ** n
    table = np.random.default_rng(seed).normal(0, scale, (count, L, V))
    powers = (book.base + 1) ** np.arange(n)

    def network(digits_BxLxS, segment_ids, dropout_keys):
        index_B = (digits_BxLxS.reshape(-1, n) * powers).sum(1)
        return jnp.asarray(table)[index_B], identity_head(book)

    return network


def p_value(observed: np.ndarray, law: np.ndarray) -> float:
    """Of the chi-square test of counts against probabilities; rare cells are taken together."""
    expected = law.reshape(-1).astype(float)
    expected *= observed.sum() / expected.sum()
    cell = np.where(expected < 5, 0, np.arange(expected.size) + 1)
    got = np.bincount(cell, observed.reshape(-1))
    wanted = np.bincount(cell, expected)
    return stats.chisquare(got[wanted > 0], wanted[wanted > 0]).pvalue
