"""Entropies of sub-tokens, against the joint table written out."""

import itertools

import numpy as np
import pytest

from prime_jax.config import SubtokenConfig
from prime_jax.data.entropy import entropies, entropy_bits
from prime_jax.errors import UserError
from prime_jax.subtokens import Codebook

COUNTS = np.array([50, 31, 0, 7, 3, 90, 1, 1, 12, 6, 400, 2, 77], np.int64)


def bits(table):
    p = table.ravel() / table.sum()
    return -sum(x * np.log2(x) for x in p if x > 0)


@pytest.mark.parametrize("shuffle", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_equal_to_the_joint_table(length, shuffle):
    config = SubtokenConfig(length, shuffle, "vocab", 7)
    book = Codebook.create(len(COUNTS), config)
    joint = np.zeros((book.base,) * length)
    for token, count in enumerate(COUNTS):
        joint[tuple(book.digits[token])] += count
    axes = set(range(length))
    slots = [bits(joint.sum(axis=tuple(axes - {j}))) for j in range(length)]
    pairs = [
        slots[i] + slots[j] - bits(joint.sum(axis=tuple(axes - {i, j})))
        for i, j in itertools.combinations(range(length), 2)
    ]
    got = entropies(COUNTS, config)
    assert got.slots == pytest.approx(slots, abs=1e-12)
    assert got.mean == pytest.approx(np.mean(slots), abs=1e-12)
    assert got.token == pytest.approx(bits(joint), abs=1e-12)
    assert got.total_correlation == pytest.approx(sum(slots) - bits(joint), abs=1e-12)
    assert got.mutual_information == pytest.approx(np.mean(pairs) if pairs else 0, abs=1e-12)
    assert got.maximum == pytest.approx(np.log2(book.base))


def test_uniform_tokens_that_fill_the_codes_are_independent_bits():
    got = entropies(np.full(256, 3), SubtokenConfig(8, 1.0, "vocab", 0))
    assert got.slots == pytest.approx([1.0] * 8)
    assert got.total_correlation == pytest.approx(0, abs=1e-9)
    assert got.mutual_information == pytest.approx(0, abs=1e-9)


def test_two_bits_that_copy_each_other():
    got = entropies(np.array([5, 0, 0, 5]), SubtokenConfig(2, 0.0))
    assert got.slots == pytest.approx([1, 1])
    assert got.total_correlation == pytest.approx(1)
    assert got.mutual_information == pytest.approx(1)


def test_shuffling_evens_out_a_skewed_vocabulary():
    counts = (1e7 / np.arange(1, 4097)).astype(np.int64)
    identity, full = (entropies(counts, SubtokenConfig(12, s)) for s in (0.0, 1.0))
    assert identity.mean < full.mean <= full.maximum
    assert identity.token == pytest.approx(full.token)


def test_entropy_bits_ignores_what_does_not_occur():
    assert entropy_bits(np.array([2, 0, 2, 0])) == 1.0


@pytest.mark.parametrize("length", [0, 33])
def test_impossible_lengths_are_refused(length):
    with pytest.raises(UserError):
        entropies(COUNTS, SubtokenConfig(length))


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match="seed = -1"):
        entropies(COUNTS, SubtokenConfig(2, seed=-1))


def test_no_tokens_is_refused():
    with pytest.raises(UserError):
        entropies(np.zeros(4, np.int64), SubtokenConfig(2))
