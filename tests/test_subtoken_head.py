"""The head against its dense twin: values and gradients, over bases, lengths and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax.config import SubtokenConfig
from prime_jax.kernels import subtoken_head
from prime_jax.kernels.subtoken_head import (
    Head,
    chunk_rows,
    consistent,
    subtoken_head_reference,
    subtoken_log_masses,
    subtoken_loss,
)
from prime_jax.subtokens import Codebook


def problem(vocab=37, length=6, rows=24, width=8, seed=0, scope="vocab"):
    """A random batch whose first rows are: all visible, all masked, one slot masked."""
    rng = np.random.default_rng(seed)
    book = Codebook.create(vocab, SubtokenConfig(length=length, scope=scope, seed=seed))
    h = jnp.asarray(rng.normal(0, 1, (rows, width)), jnp.float32)
    head = jnp.asarray(rng.normal(0, 1, (vocab, width)), jnp.float32)
    token = jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)
    masked = rng.random((rows, length)) < rng.random((rows, 1))
    masked[0], masked[1], masked[2] = False, True, np.arange(length) == 0
    weight = jnp.asarray(rng.random(rows) + 0.1, jnp.float32)
    return book, h, head, token, jnp.asarray(masked), weight


def reference_loss(head, h, rows, token, masked, weight, whole=None):
    """The weighted sums of `subtoken_loss`, from the dense twin."""
    slots, joint = subtoken_head_reference(head, h, rows, token, masked)
    pays = subtoken_head.charged(head, masked)
    marginal = -slots.sum(1)
    if whole is not None:
        marginal = jnp.where(whole & masked.any(1), -joint, marginal)
    return (weight * marginal).sum(), -(jnp.where(pays, weight, 0) * joint).sum()


CASES = [
    (37, 1, "vocab"),
    (37, 2, "codes"),  # b = 7
    (200, 2, "vocab"),  # b = 15: digits compared instead of multiplied
    (37, 6, "vocab"),
    (64, 6, "codes"),
    (37, 17, "vocab"),  # two words
    (2, 1, "vocab"),
]


@pytest.mark.parametrize(("vocab", "length", "scope"), CASES)
@pytest.mark.parametrize(
    ("loss", "carry_over"), [("marginal", True), ("joint", True), ("joint", False)]
)
def test_loss_and_gradients_equal_the_dense_twin(vocab, length, scope, loss, carry_over):
    book, h, rows, token, masked, weight = problem(vocab, length, scope=scope)
    head = Head(book, carry_over, loss)
    index = 0 if loss == "marginal" else 1

    def ours(h, rows):
        return subtoken_loss(head, h, rows, token, masked, weight)[index]

    def twin(h, rows):
        return reference_loss(head, h, rows, token, masked, weight)[index]

    with jax.default_matmul_precision("highest"):
        sums = subtoken_loss(head, h, rows, token, masked, weight)
        np.testing.assert_allclose(
            sums, reference_loss(head, h, rows, token, masked, weight), rtol=2e-5
        )
        got, want = jax.grad(ours, (0, 1))(h, rows), jax.grad(twin, (0, 1))(h, rows)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4)


def test_whole_tokens_pay_jointly():
    book, h, rows, token, masked, weight = problem()
    whole = jnp.arange(24) % 2 == 1
    masked = jnp.where(whole[:, None], masked.any(1, keepdims=True), masked)
    head = Head(book)
    ours = lambda h: subtoken_loss(head, h, rows, token, masked, weight, whole).marginal  # noqa: E731
    twin = lambda h: reference_loss(head, h, rows, token, masked, weight, whole)[0]  # noqa: E731
    np.testing.assert_allclose(ours(h), twin(h), rtol=2e-5)
    np.testing.assert_allclose(jax.grad(ours)(h), jax.grad(twin)(h), atol=2e-5, rtol=2e-4)


def test_chunks_do_not_change_the_result(monkeypatch):
    book, h, rows, token, masked, weight = problem()
    head = Head(book)
    whole = jax.value_and_grad(lambda h: subtoken_loss(head, h, rows, token, masked, weight)[0])(h)
    monkeypatch.setattr(subtoken_head, "CHUNK_ELEMENTS", 37 * 3)
    parts = jax.value_and_grad(lambda h: subtoken_loss(head, h, rows, token, masked, weight)[0])(h)
    assert chunk_rows(24, 37) == 3
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-6)
    np.testing.assert_allclose(whole[1], parts[1], atol=1e-6)


@pytest.mark.parametrize(("vocab", "length", "scope"), CASES)
def test_log_masses_equal_the_dense_twin(vocab, length, scope):
    book, h, rows, token, masked, _ = problem(vocab, length, scope=scope)
    head = Head(book)
    later = jnp.asarray(np.random.default_rng(1).random(masked.shape) < 0.5) & masked
    digits = jnp.asarray(book.digits)[token]
    slots, joint = subtoken_head_reference(head, h, rows, token, masked)
    got, revealed = subtoken_log_masses(head, h, rows, token, masked, later)
    if length > 1:  # for l = 1 nothing but the reveal itself is charged
        np.testing.assert_allclose(got, slots.sum(1), atol=2e-4)
    z = jnp.where(consistent(book, digits, masked) | (length == 1), h @ rows.T, -1e30)
    kept = consistent(book, digits, ~(masked & ~later))
    want = jax.nn.logsumexp(jnp.where(kept, z, -1e30), 1) - jax.nn.logsumexp(z, 1)
    np.testing.assert_allclose(revealed, want, atol=2e-4)
    everything = subtoken_log_masses(head, h, rows, token, masked, jnp.zeros_like(masked))[1]
    np.testing.assert_allclose(everything, jnp.where(masked.any(1), joint, 0), atol=2e-4)


@pytest.mark.parametrize("length", [1, 6, 16, 17, 32])
def test_consistency_by_bits_is_consistency_by_digits(length):
    book, _, _, token, masked, _ = problem(min(40, 2**length), length)
    digits = book.digits[np.asarray(token)]
    by_digit = ((digits[:, None] == book.digits[None]) | np.asarray(masked)[:, None]).all(-1)
    assert (np.asarray(consistent(book, jnp.asarray(digits), masked)) == by_digit).all()


@pytest.mark.parametrize("loss", [0, 1])
def test_extreme_logits_stay_finite_and_above_the_truth(loss):
    """Where a slot's mass underflows it is charged -log p_x: finite, and never too little."""
    book, h, rows, token, masked, weight = problem()
    head = Head(book, loss=("marginal", "joint")[loss])
    ours = lambda h: subtoken_loss(head, h, rows, token, masked, weight)[loss]  # noqa: E731
    value, gradient = jax.value_and_grad(ours)(60 * h)
    assert np.isfinite(gradient).all()
    with jax.enable_x64(True):
        exact = reference_loss(head, np.float64(60 * h), np.float64(rows), token, masked, weight)
    assert np.isfinite(value)
    exact = [float(x) for x in exact]
    assert float(value) >= exact[loss] * (1 - 1e-6)
    assert float(value) <= 1.5 * exact[1] * book.length
