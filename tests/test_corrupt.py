"""The forward process, as a law: of masks given their time, of whole tokens, of random lengths."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import codebook, run_config

from prime_jax import schedule
from prime_jax.config import ObjectiveConfig
from prime_jax.corrupt import Corruption, corrupt, step_key
from prime_jax.objectives import training_inputs

B, L, S = 1 << 16, 2, 2
SIGMAS = 5.0  # of binomial counts: by chance one test of 10,000 would fail
TIME_BINS = (0.02, 0.1, 0.25, 0.5, 0.75)  # narrow where a clip would hide
RARE = 5  # expected counts below this are no basis for a standard deviation


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def corrupted(config: ObjectiveConfig, rows=None, tokens: int = L, seed: int = 0) -> Corruption:
    """All rows of a batch of B sequences, or some, with S slots in each of their tokens."""
    rows = jnp.arange(B) if rows is None else rows
    targets = jnp.ones((len(rows), tokens), bool)
    run = jax.jit(lambda rows: corrupt(config, step_key(seed, 0), rows, B, targets, S))
    return jax.tree.map(np.asarray, run(rows))


def deviations(masks_BxN: np.ndarray, t_B: np.ndarray) -> np.ndarray:
    """By time bin and mask: standard deviations between how often the mask was drawn and
    sum_i t_i^k (1 - t_i)^(N - k), its mean over independent slots."""
    n = masks_BxN.shape[1]
    bins_B = np.digitize(t_B, TIME_BINS)
    out = []
    for mask in itertools.product([False, True], repeat=n):
        p_B = t_B ** sum(mask) * (1 - t_B) ** (n - sum(mask))
        drawn_B = (masks_BxN == mask).all(1)
        common = np.bincount(bins_B, p_B) >= RARE
        off, variance = (np.bincount(bins_B, x)[common] for x in (drawn_B - p_B, p_B * (1 - p_B)))
        out.append(off / np.sqrt(variance))
    return np.concatenate(out)


def worst(config: ObjectiveConfig) -> float:
    """The largest deviation of the 16 masks of two tokens; times are read from the weights 1 / t."""
    drawn = corrupted(config)
    t_B = 1 / drawn.weight_BxL[:, 0]
    return float(np.abs(deviations(drawn.masked_BxLxS.reshape(B, -1), t_B)).max())


def test_masks_have_the_law_of_independent_slots():
    assert worst(ObjectiveConfig()) < SIGMAS


def test_weighted_masks_of_bell_times_have_the_weights_of_the_bound():
    drawn = corrupted(ObjectiveConfig(times="bell"))
    count, weight = drawn.masked_BxLxS.reshape(B, -1).sum(1), drawn.weight_BxL[:, 0]
    for k, exact in enumerate([1, 1 / 2, 1 / 3, 1 / 4], 1):  # C(4, k) / (k C(4, k))
        each = np.where(count == k, weight, 0)
        assert abs(each.mean() - exact) < SIGMAS * each.std() / B**0.5


def off_by_two_percent(config, t):
    return 1 - 1.02 * t


def clipped(config, t):
    return 1 - jnp.maximum(t, 0.02)


@pytest.mark.parametrize("mutant", [off_by_two_percent, clipped])
def test_masks_of_another_law_are_caught(mutant, monkeypatch):
    monkeypatch.setattr(schedule, "alpha", mutant)
    assert worst(ObjectiveConfig()) > 1.3 * SIGMAS


def test_slots_that_are_hidden_together_are_caught():
    """The marginal of every slot is right here; only their independence is not."""
    assert worst(ObjectiveConfig(token_mask_rho=0.1)) > 2 * SIGMAS


def spacing_error(config: ObjectiveConfig) -> float:
    """How far the times of one batch, in order, are from even steps through [eps, 1)."""
    t_B = np.sort(1 / corrupted(config).weight_BxL[:, 0])
    return float(np.abs(np.diff(t_B) * B / (1 - config.time_eps) - 1).max())


def test_the_times_of_a_batch_are_evenly_spaced():
    assert spacing_error(ObjectiveConfig()) < 1e-5  # float32 keys, float64 times


@pytest.mark.parametrize("floor", [1e-2, 1e-3])
def test_clipped_times_are_caught(floor, monkeypatch):
    times = schedule.times
    monkeypatch.setattr(schedule, "times", lambda *args: jnp.maximum(times(*args), floor))
    assert spacing_error(ObjectiveConfig()) > 0.5


def test_weights_and_masks_belong_to_one_time():
    """Under another schedule w(t) tells t and the masks follow alpha of the same t."""
    config = ObjectiveConfig(schedule="cosine")
    drawn = corrupted(config)
    t_B = 1 - np.arctan(drawn.weight_BxL[:, 0] / (np.pi / 2)) / (np.pi / 2)
    hidden_B = 1 - np.asarray(schedule.alpha(config, t_B))
    masks = drawn.masked_BxLxS.reshape(B, -1)
    assert np.abs(deviations(masks, hidden_B)).max() < SIGMAS


def test_whole_tokens_have_their_share_and_their_law():
    drawn = corrupted(ObjectiveConfig(token_mask_rho=0.3))
    whole_B, masked_BxLxS = drawn.whole_B, drawn.masked_BxLxS
    assert abs(whole_B.mean() - 0.3) < SIGMAS * (0.3 * 0.7 / B) ** 0.5
    t_B = 1 / drawn.weight_BxL[:, 0]
    np.testing.assert_array_equal(masked_BxLxS[whole_B].all(-1), masked_BxLxS[whole_B].any(-1))
    tokens_BxL = masked_BxLxS[whole_B].all(-1)
    assert np.abs(deviations(tokens_BxL, t_B[whole_B])).max() < SIGMAS
    slots = masked_BxLxS[~whole_B].reshape(-1, L * S)
    assert np.abs(deviations(slots, t_B[~whole_B])).max() < SIGMAS


def test_rows_are_corrupted_alike_wherever_they_are():
    everything = corrupted(ObjectiveConfig(token_mask_rho=0.5, random_length=0.5))
    rows = jnp.array([7, B - 1, 0, 12345])
    some = corrupted(ObjectiveConfig(token_mask_rho=0.5, random_length=0.5), rows)
    for a, b in zip(everything, some, strict=True):
        np.testing.assert_array_equal(a[rows], b)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_random_lengths_have_their_law(fraction):
    """A fraction of the sequences has a length uniform on 1 .. L, the others are whole."""
    tokens = 5
    drawn = corrupted(ObjectiveConfig(random_length=fraction), tokens=tokens)
    law = np.full(tokens, fraction / tokens)
    law[-1] += 1 - fraction
    counts = np.bincount(drawn.length_B, minlength=tokens + 1)
    assert counts[0] == 0
    assert (np.abs(counts[1:] - B * law) <= SIGMAS * (B * law * (1 - law)) ** 0.5).all()
    # Inside a kept part the masks are those of any sequence, and nothing behind it is hidden.
    behind_BxL = np.arange(tokens) >= drawn.length_B[:, None]
    assert not drawn.masked_BxLxS[behind_BxL].any()
    at_least_two = drawn.length_B >= 2
    first = drawn.masked_BxLxS[at_least_two, :2].reshape(-1, 2 * S)
    t = 1 / drawn.weight_BxL[at_least_two, 0]
    assert np.abs(deviations(first, t)).max() < SIGMAS


@pytest.mark.parametrize("segment_ids", [False, True])
def test_what_is_cut_is_padding(segment_ids):
    """Behind the length: no charge, no target, a segment of its own; before it all as it was."""
    eos, tokens = 15, 6
    text = np.random.default_rng(0).integers(0, 16, (64, tokens))
    text[:, 2] = eos
    plain = run_config(S, batch=64)
    data = dataclasses.replace(plain.data, seq_len=tokens, segment_ids=segment_ids)
    plain = dataclasses.replace(plain, data=data)
    short = dataclasses.replace(plain, objective=ObjectiveConfig(random_length=1.0))
    whole, cut = (
        jax.tree.map(
            np.asarray,
            training_inputs(
                config, codebook(S), jnp.asarray(text), jnp.arange(64), step_key(0, 0), eos
            ),
        )
        for config in (plain, short)
    )
    kept = cut.segment_ids_BxL != -1
    lengths = kept.sum(1)
    np.testing.assert_array_equal(kept, np.arange(tokens) < lengths[:, None])
    assert set(lengths) == set(range(1, tokens + 1))
    for name in ("masked_BxLxS", "weight_BxL", "target_BxL"):
        np.testing.assert_array_equal(getattr(cut, name)[kept], getattr(whole, name)[kept])
    before = whole.segment_ids_BxL if segment_ids else np.zeros_like(text)
    np.testing.assert_array_equal(cut.segment_ids_BxL[kept], before[kept])
    assert not cut.weight_BxL[~kept].any()
    assert not cut.target_BxL[~kept].any()
