"""The TPU kernels of the head, interpreted: numbers, races, tiles; and their lowering for TPUs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from head_cases import compare, log_prob_pair, loss_pair, problem
from jax.experimental.pallas import tpu as pltpu

from prime_jax.errors import UserError
from prime_jax.kernels import subtoken_head_mosaic, subtoken_head_xla
from prime_jax.kernels.subtoken_head import Head
from prime_jax.kernels.subtoken_head_base import Coefficients
from prime_jax.kernels.subtoken_head_reference import subtoken_log_probs_reference

SMALL = (32, 64, 32)  # tokens, head rows, part: several of each
CASES = [  # vocabulary, sub-tokens, scope, rows
    (200, 8, "codes", 65),
    (200, 1, "vocab", 100),
    (200, 3, "vocab", 40),  # b = 6
    pytest.param(64, 6, "vocab", 16, marks=pytest.mark.slow),  # one tile
]


def pallas(p, **changes) -> Head:
    return Head(p.book, implementation="pallas", **{"blocks": SMALL, **changes})


@pytest.mark.parametrize(("vocab", "length", "scope", "rows"), CASES)
def test_log_probs_take_any_cotangent(vocab, length, scope, rows):
    p = problem(vocab, length, rows, 16, scope=scope)
    compare(log_prob_pair(pallas(p), p), p.h, p.rows, rtol=1e-5)


@pytest.mark.parametrize(("loss", "carry_over"), [("marginal", True), ("joint", False)])
def test_loss_and_gradients(loss, carry_over):
    p = problem(200, 8, 65, 16)
    whole = jnp.arange(65) % 3 == 1
    compare(
        loss_pair(pallas(p, loss=loss, carry_over=carry_over), p, whole), p.h, p.rows, rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["vocab", "codes"])
@pytest.mark.parametrize("length", range(1, 17))
def test_every_length(length, scope):
    vocab = min(2**length, 300) - (length > 1)
    p = problem(vocab, length, 50, 16, seed=length, scope=scope)
    compare(loss_pair(pallas(p), p), p.h, p.rows, rtol=1e-5)
    compare(log_prob_pair(pallas(p), p), p.h, p.rows, rtol=1e-5)


@pytest.mark.parametrize(
    "pair_of", [loss_pair, pytest.param(log_prob_pair, marks=pytest.mark.slow)]
)
def test_half_precision_is_as_exact_as_xla(pair_of):
    """bfloat16 hidden states and head rows against float32 of the unrounded ones."""
    p = problem(500, 9, 96, 64, scale=0.4)
    half = p.h.astype(jnp.bfloat16), p.rows.astype(jnp.bfloat16)

    def errors(head):
        twin = jax.jit(jax.value_and_grad(pair_of(Head(p.book), p)[1], (0, 1)))(p.h, p.rows)
        got = jax.jit(jax.value_and_grad(pair_of(head, p)[0], (0, 1)))(*half)
        relative = lambda a, b: np.abs(np.float32(a) - b).max() / np.abs(b).max()  # noqa: E731
        return np.array(jax.tree.leaves(jax.tree.map(relative, got, twin)))

    ours, theirs = errors(pallas(p)), errors(Head(p.book))
    assert (ours < 1.5 * theirs + 2**-9).all(), (ours, theirs)


def test_evaluation_does_not_carry_the_rounding_of_exponentials():
    """With logits that bfloat16 products hold exactly, digit masses are exact to 1e-4."""
    p = problem(500, 9, 64, 64)
    rows = jnp.round(p.rows * 8) / 8
    h = jnp.round(p.h) / subtoken_head_mosaic.LOG2E  # whole once scaled, as exponents of 2
    twin = jax.jit(partial(subtoken_log_probs_reference, Head(p.book)))
    exact = twin(h, rows, p.true, p.masked)[1]
    ours = jax.jit(partial(subtoken_head_mosaic.masses, pallas(p)))
    masses = ours(h, rows.astype(jnp.bfloat16), p.true, Head(p.book).seen(p.masked))
    got = jnp.log(masses.digits_NxSxb / masses.mass_N[:, None, None])
    near = np.asarray(exact) > -20
    assert np.abs(np.where(near, got - exact, 0)).max() < 1e-4


def gradient_arguments(head, p):
    """Arguments of `gradients` with random coefficients."""
    rng, count = np.random.default_rng(0), len(p.true)
    lse = jax.nn.logsumexp(p.h @ p.rows.T, axis=1)
    random = lambda *shape: jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32)  # noqa: E731
    digits = random(p.book.length, p.book.base)
    return p.h, p.rows, p.true, head.seen(p.masked), lse, Coefficients(random(), digits, random())


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_copies_do_not_race(tiles):
    p = problem(100, 7, 16 * tiles, 128)
    head = pallas(p, blocks=(16, 32, 16))
    arguments = gradient_arguments(head, p)
    params = pltpu.InterpretParams(detect_races=True)
    got = jax.jit(partial(subtoken_head_mosaic.gradients, head, interpret=params))(*arguments)
    jax.block_until_ready(got)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found
    want = jax.jit(partial(subtoken_head_xla.gradients, head))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_two_cores_sum_gradients_of_their_own_share_of_the_head_rows(monkeypatch):
    monkeypatch.setattr(subtoken_head_mosaic, "core_count", lambda: 2)
    p = problem(270, 10, 50, 16)  # nine blocks of head rows: the second core has one less
    compare(log_prob_pair(pallas(p, blocks=(16, 32, 16)), p), p.h, p.rows, rtol=1e-5)


def test_what_the_kernels_do_not_support_is_left_to_xla():
    assert subtoken_head_mosaic.supports(Head(problem(200, 4).book))
    assert not subtoken_head_mosaic.supports(Head(problem(5000, 2).book))  # 142 columns
    assert not subtoken_head_mosaic.supports(Head(problem(40, 32).book))  # two words
    p = problem(5000, 2, 8, 8)
    assert np.isfinite(jax.jit(loss_pair(pallas(p), p)[0])(p.h, p.rows))


def test_blocks_that_do_not_fit_together_are_refused():
    p = problem()
    for blocks in ((32, 64), (32, 64, 48), (32, 0, 0)):
        with pytest.raises(UserError, match="head rows"):
            subtoken_head_mosaic.fitted(dataclasses.replace(pallas(p), blocks=blocks), 8, 4)
