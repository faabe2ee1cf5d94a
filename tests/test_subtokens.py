"""Codes: the base, permutations and inverses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_jax.config import SubtokenConfig
from prime_jax.errors import UserError
from prime_jax.subtokens import Codebook, base

FIRST = [84, 752, 296, 982]


@pytest.mark.parametrize(
    ("vocab", "length", "expected"),
    [
        (50257, 2, 225),
        (50257, 3, 37),
        (50257, 4, 15),
        (50257, 6, 7),
        (50257, 8, 4),
        (50257, 16, 2),
        (32000, 15, 2),
        (32000, 3, 32),
        (32768, 5, 8),
        (32769, 5, 9),
        (1, 1, 2),
    ],
)
def test_base_is_the_smallest_that_holds_the_vocabulary(vocab, length, expected):
    assert base(vocab, length) == expected


@given(st.integers(1, 10**12), st.integers(1, 32))
def test_base_bounds(vocab, length):
    b = base(vocab, length)
    assert b**length >= vocab
    assert b == 2 or (b - 1) ** length < vocab


@given(
    st.integers(2, 3000),
    st.integers(1, 32),
    st.floats(0, 1),
    st.sampled_from(["vocab", "codes"]),
    st.integers(0, 99),
)
def test_decode_inverts_encode(vocab, length, shuffle, scope, seed):
    if scope == "codes" and base(vocab, length) ** length > 1 << 16:
        return
    book = Codebook.create(vocab, SubtokenConfig(length, shuffle, scope, seed))
    tokens = np.arange(vocab)
    digits = book.encode(tokens)
    assert digits.min() >= 0
    assert digits.max() < book.base
    assert (book.decode(digits) == tokens).all()


def test_permutation_scopes():
    identity = Codebook.create(100, SubtokenConfig(7, shuffle=0.0))
    assert (identity.codes == np.arange(100)).all()
    first = Codebook.create(100, SubtokenConfig(7, scope="vocab"))
    assert sorted(first.codes) == list(range(100))
    assert (first.codes != np.arange(100)).sum() > 90
    every = Codebook.create(100, SubtokenConfig(7, scope="codes"))
    assert every.codes.max() >= 100
    assert len(set(every.codes)) == 100
    quarter = Codebook.create(100, SubtokenConfig(7, shuffle=0.25))
    assert (quarter.codes[25:] == np.arange(25, 100)).all()
    assert sorted(quarter.codes[:25]) == list(range(25))
    assert len({b.hash for b in (identity, first, every, quarter)}) == 4


def test_seeds_are_reproducible():
    """The stored permutation must not change between releases: these are the first entries."""
    book = Codebook.create(1024, SubtokenConfig(10, seed=0))
    again = Codebook.create(1024, SubtokenConfig(10, seed=0))
    assert (book.codes == again.codes).all()
    assert book.codes[:4].tolist() == FIRST
    assert Codebook.create(1024, SubtokenConfig(10, seed=1)).hash != book.hash


def test_unused_codes_decode_to_nothing():
    book = Codebook.create(5, SubtokenConfig(3, shuffle=0.0))
    assert book.decode(np.array([[1, 1, 1], [1, 0, 0]])).tolist() == [-1, 4]


def test_bad_tokens_and_too_large_permutations_are_refused():
    book = Codebook.create(5, SubtokenConfig(3))
    with pytest.raises(UserError, match="token 5 at index 1"):
        book.encode(np.array([0, 5]))
    with pytest.raises(UserError, match="use scope vocab"):
        Codebook.create(5, SubtokenConfig(32, scope="codes"))
