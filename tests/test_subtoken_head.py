"""The head against its dense twin: values and gradients, over bases, lengths and shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from head_cases import compare, log_prob_pair, loss_pair, problem, reference_loss

from prime_jax.config import RunConfig, SubtokenConfig
from prime_jax.kernels import subtoken_head_xla
from prime_jax.kernels.subtoken_head import (
    Head,
    subtoken_log_masses,
    subtoken_log_probs,
    subtoken_loss,
)
from prime_jax.kernels.subtoken_head_base import consistent
from prime_jax.kernels.subtoken_head_reference import (
    restricted_logits,
    subtoken_head_reference,
    subtoken_log_probs_reference,
)
from prime_jax.objectives import autoregressive_inputs
from prime_jax.subtokens import Codebook

FEW = [(37, 1, "vocab"), (37, 6, "codes")]
CASES = [
    *FEW,
    (37, 2, "vocab"),  # b = 7; 37 rows of 7 digits: a last, shorter one
    (37, 17, "vocab"),
    (32, 5, "codes"),  # every code is a token
    pytest.param(37, 2, "codes", marks=pytest.mark.slow),
    pytest.param(37, 6, "vocab", marks=pytest.mark.slow),
    pytest.param(37, 12, "codes", marks=pytest.mark.slow),
    pytest.param(2, 1, "vocab", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("vocab", "length", "scope"), CASES)
def test_loss_and_gradients_equal_the_dense_twin(vocab, length, scope):
    p = problem(vocab, length, scope=scope)
    compare(loss_pair(Head(p.book), p), p.h, p.rows, rtol=1e-5)


@pytest.mark.parametrize("carry_over", [True, False])
@pytest.mark.parametrize(("vocab", "length", "scope"), FEW)
def test_joint_loss_and_both_sums_equal_the_dense_twin(vocab, length, scope, carry_over):
    p = problem(vocab, length, scope=scope)
    head = Head(p.book, carry_over, "joint")
    compare(loss_pair(head, p), p.h, p.rows, rtol=1e-5)
    sums, want = (jax.jit(partial(f, head))(*p[1:]) for f in (subtoken_loss, reference_loss))
    np.testing.assert_allclose(sums, want, rtol=1e-5)


@pytest.mark.parametrize(("vocab", "length", "scope"), CASES)
def test_log_probs_take_any_cotangent(vocab, length, scope):
    p = problem(vocab, length, scope=scope)
    compare(log_prob_pair(Head(p.book), p), p.h, p.rows, rtol=1e-5)


def test_log_probs_without_carry_over():
    p = problem()
    compare(log_prob_pair(Head(p.book, carry_over=False), p), p.h, p.rows, rtol=1e-5)


def test_log_probs_equal_the_dense_twin():
    p = problem()
    head = Head(p.book)
    got, want = (
        jax.jit(partial(f, head))(p.h, p.rows, p.true, p.masked)
        for f in (subtoken_log_probs, subtoken_log_probs_reference)
    )
    assert got[1].shape == (24, 6, 2)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, np.maximum(b, -1e30), atol=1e-5)


def test_whole_tokens_pay_jointly():
    p = problem()
    whole = jnp.arange(24) % 2 == 1
    p = p._replace(masked=jnp.where(whole[:, None], p.masked.any(1, keepdims=True), p.masked))
    compare(loss_pair(Head(p.book), p, whole), p.h, p.rows, rtol=1e-5)


def test_chunks_do_not_change_the_result(monkeypatch):
    p = problem(rows=23)  # 6 x 4 - 1: padded

    def both():
        head = Head(p.book)  # a new one: nothing compiled is used again
        pairs = loss_pair(head, p), log_prob_pair(head, p)
        return [jax.jit(jax.value_and_grad(ours, (0, 1)))(p.h, p.rows) for ours, _ in pairs]

    whole = both()
    monkeypatch.setattr(subtoken_head_xla, "CHUNK_ELEMENTS", 37 * 4)
    monkeypatch.setattr(subtoken_head_xla, "MIN_ROWS", 1)
    assert [subtoken_head_xla.chunk_rows(rows, 37) for rows in (23, 24, 3)] == [4, 4, 3]
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    jax.tree.map(close, whole, both())


@pytest.mark.parametrize(
    ("vocab", "length", "scope", "carry_over", "implementation"),
    [(*case, carry_over, "xla") for case in FEW for carry_over in (True, False)]
    + [(*FEW[1], True, "pallas")],
)
def test_log_masses_equal_the_dense_twin(vocab, length, scope, carry_over, implementation):
    p = problem(vocab, length, scope=scope)
    head = Head(p.book, carry_over, implementation=implementation)
    later = jnp.asarray(np.random.default_rng(1).random(p.masked.shape) < 0.5) & p.masked
    log_masses = jax.jit(partial(subtoken_log_masses, head))
    reference = jax.jit(partial(subtoken_head_reference, head))
    slots, joint = reference(p.h, p.rows, p.true, p.masked)
    got, revealed = log_masses(p.h, p.rows, p.true, p.masked, later)
    if length > 1:  # for l = 1 nothing but the reveal itself is charged
        np.testing.assert_allclose(got, slots.sum(1), atol=2e-4)
    z = restricted_logits(head, p.h, p.rows, p.true, p.masked)
    digits = head.digits_VxS[p.true]
    kept = ((digits[:, None] == head.digits_VxS) | ~np.asarray(p.masked & ~later)[:, None]).all(-1)
    want = jax.nn.logsumexp(jnp.where(kept, z, -1e30), 1) - jax.nn.logsumexp(z, 1)
    np.testing.assert_allclose(revealed, want, atol=2e-4)
    if carry_over:
        everything = log_masses(p.h, p.rows, p.true, p.masked)[1]
        np.testing.assert_allclose(everything, jnp.where(p.masked.any(1), joint, 0), atol=2e-4)


@pytest.mark.parametrize(
    ("vocab", "length"), [(40, 1), (40, 6), (40, 16), (40, 17), (40, 32), (200, 2), (200, 3)]
)
def test_consistency_by_words_is_consistency_by_digits(vocab, length):
    p = problem(vocab, length)
    head = Head(p.book)
    digits, masked = head.digits_VxS[p.true], np.asarray(p.masked)
    by_digit = ((digits[:, None] == head.digits_VxS) | masked[:, None]).all(-1)
    words = jnp.asarray(head.words_VxW)[p.true]
    by_word = consistent(head.words_VxW, words, head.visible_words(~p.masked))
    assert (np.asarray(by_word) == by_digit).all()


@pytest.mark.parametrize("scope", ["vocab", "codes"])
def test_head_rows_are_in_the_order_of_codes(scope):
    book = Codebook.create(37, SubtokenConfig(length=6, scope=scope, seed=3))
    head = Head(book)
    assert (np.diff(head.words_VxW[:, 0]) > 0).all()
    assert (head.digits_VxS[book.rows] == book.digits).all()
    assert head.dense_codes == (scope == "vocab")


def test_a_tied_head_ties_each_token_to_its_own_embedding():
    book = Codebook.create(37, SubtokenConfig(length=1, seed=3))  # embedded by digit
    assert (book.rows == book.digits[:, 0]).all()
    token = jnp.arange(37)[None]
    read = autoregressive_inputs(RunConfig(family="arm"), book, token, -1).digits_BxLxS
    assert (read[0, 1:, 0] == book.rows[:-1]).all()  # ARM embeds by digit as well


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("loss", [0, 1])
def test_extreme_logits_stay_finite_and_above_the_truth(loss, implementation):
    """Where a slot's mass underflows it is charged -log p_x: finite, and never too little."""
    p = problem(scale=60)
    head = Head(p.book, loss=("marginal", "joint")[loss], implementation=implementation)
    ours, _ = loss_pair(head, p)
    value, gradient = jax.jit(jax.value_and_grad(ours))(p.h, p.rows)
    assert np.isfinite(gradient).all()
    with jax.enable_x64(True):
        exact = jax.jit(partial(reference_loss, head))(np.float64(p.h), np.float64(p.rows), *p[3:])
    assert np.isfinite(value)
    exact = [float(x) for x in exact]
    assert float(value) >= exact[loss] * (1 - 1e-6)
    assert float(value) <= 1.5 * exact[1] * p.book.length
    if loss == 0:
        log_probs = jax.jit(partial(subtoken_log_probs, head))
        assert np.isfinite(log_probs(p.h, p.rows, p.true, p.masked)[1]).all()


def test_products_are_made_in_the_dtype_of_the_head():
    p = problem(width=64)
    half = p._replace(rows=p.rows.astype(jnp.bfloat16))
    ours, _ = loss_pair(Head(p.book), half)
    value, gradients = jax.value_and_grad(ours, (0, 1))(half.h, half.rows)
    assert [g.dtype for g in gradients] == [jnp.float32, jnp.bfloat16]
    assert value == ours(half.h.astype(jnp.bfloat16), half.rows)


@pytest.mark.parametrize(
    ("vocab", "length", "scope"),
    [
        (37, 6, "codes"),
        pytest.param(64, 6, "vocab", marks=pytest.mark.slow),
        pytest.param(37, 1, "vocab", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_head_rows_split_over_devices(vocab, length, scope, implementation):
    """Eight devices with ceil(V / 8) head rows each; gradients are taken inside."""
    devices = 8
    p = problem(vocab, length, scope=scope, width=16)
    mesh = jax.make_mesh((devices,), ("vocabulary",), axis_types=(jax.sharding.AxisType.Auto,))
    head = Head(p.book, implementation=implementation, axis_name="vocabulary")
    padding = -vocab % devices
    rows = jnp.pad(p.rows, ((0, padding), (0, 0)), constant_values=3.0)

    def device(pair_of):
        inside = jax.value_and_grad(pair_of(head, p)[0], (0, 1))
        split, whole = jax.P("vocabulary"), jax.P()
        return jax.jit(
            jax.shard_map(
                inside,
                mesh=mesh,
                in_specs=(whole, split),
                out_specs=(whole, (whole, split)),
                check_vma=False,
            )
        )

    for pair_of in (loss_pair, log_prob_pair):
        with jax.default_matmul_precision("highest"):
            value, (dh, drows) = device(pair_of)(p.h, rows)
            twin = jax.jit(jax.value_and_grad(pair_of(Head(p.book), p)[1], (0, 1)))
            want = twin(p.h, p.rows)
        np.testing.assert_allclose(value, want[0], rtol=1e-5)
        scale = np.abs(want[1][1]).max()
        np.testing.assert_allclose(dh, want[1][0], atol=1e-5 * np.abs(want[1][0]).max(), rtol=0)
        np.testing.assert_allclose(drows[:vocab], want[1][1], atol=1e-5 * scale, rtol=0)
        assert not np.asarray(drows[vocab:]).any()


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(
    ("vocab", "length"),
    [
        pytest.param(131072, 17, marks=pytest.mark.slow),
        pytest.param(262144, 18, marks=pytest.mark.slow),
    ],
)
def test_large_vocabularies(vocab, length, implementation):
    p = problem(vocab, length, rows=8, width=4)
    head = Head(p.book, implementation=implementation, blocks=(8, 8192, 8192))
    compare(loss_pair(head, p), p.h, p.rows, rtol=1e-5)
