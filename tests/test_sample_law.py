"""Samplers draw from the right law: exact enumeration of the reverse process, and chi-square."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import (
    L,
    Run,
    V,
    affine,
    all_pairs,
    bayes,
    codebook,
    p_value,
    pair_probabilities,
    run_config,
    wrong,
)

from prime_jax.errors import UserError
from prime_jax.evaluate import chain, estimators, likelihood
from prime_jax.sample import Options, Sampler
from prime_jax.sample.loop import remasking_rates
from prime_jax.sample.orders import time_grid
from prime_jax.subtokens import Codebook

DRAWS = 6144


def table_run(network, book: Codebook) -> Run:
    return Run(run_config(book.length), book, lambda _: network)


def counts(network, book: Codebook, options: Options, canvas=None) -> np.ndarray:
    """How often each pair is drawn: int [V, V]."""
    sampler = Sampler(table_run(network, book))
    canvas = sampler.canvas([]) if canvas is None else canvas
    options = dataclasses.replace(options, batch_size=1024)
    tokens = np.array(sampler.sample([canvas] * DRAWS, options).tokens)
    assert tokens.min() >= 0  # every code is a token's
    return np.histogram2d(tokens[:, 0], tokens[:, 1], bins=np.arange(V + 1))[0]


class Enumeration:
    """All states of two tokens: local state s of a token is its digits, the digit b hidden."""

    def __init__(self, network, book: Codebook):
        self.book, rows = book, (book.base + 1) ** book.length
        powers = (book.base + 1) ** np.arange(book.length)[::-1]
        self.local = np.arange(rows)[:, None] // powers % (book.base + 1)  # [R, S]
        self.number = (book.digits * powers).sum(1)  # [V], local state of a whole token
        self.powers = powers
        hidden = self.local == book.base
        self.fits = (hidden[:, None] | (self.local[:, None] == book.digits)).all(2)  # [R, V]
        first, second = np.divmod(np.arange(rows * rows), rows)
        digits = np.stack([self.local[first], self.local[second]], axis=1)
        z, head = network(digits, None, None)
        z = np.asarray(z @ head.T, np.float64)[:, :, book.rows]  # token order
        z = np.where(np.stack([self.fits[first], self.fits[second]], 1), z, -np.inf)
        with np.errstate(invalid="ignore"):
            e = np.exp(z - z.max(2, keepdims=True))
            p = e / e.sum(2, keepdims=True)
        self.p = np.nan_to_num(p).reshape(rows, rows, L, V)

    def start(self) -> np.ndarray:
        law = np.zeros(self.p.shape[:2])
        law[-1, -1] = 1
        return law

    def transition(self, show: float, hide: float) -> np.ndarray:
        """P(s -> s' | drawn token v): [R, V, R'] where each hidden sub-token is revealed with
        probability `show`, and each visible one hidden with probability `hide`."""
        base, rows = self.book.base, len(self.local)
        out = np.zeros((rows, V, rows))
        for s, v in zip(*np.nonzero(self.fits), strict=True):
            row = np.ones(1)
            target = np.zeros(1, int)
            for j, power in enumerate(self.powers):
                hidden = self.local[s, j] == base
                stay = 1 - show if hidden else hide
                row = np.concatenate([row * (1 - stay), row * stay])
                seen = self.book.digits[v, j]
                target = np.concatenate([target + seen * power, target + base * power])
            np.add.at(out[s, v], target, row)
        return out

    def step(self, law, show, hide=0.0) -> np.ndarray:
        move = self.transition(show, hide)
        q1 = np.einsum("stv,svx->stx", self.p[:, :, 0], move)
        q2 = np.einsum("stv,tvy->sty", self.p[:, :, 1], move)
        return np.einsum("st,stx,sty->xy", law, q1, q2, optimize=True)

    def pairs(self, law: np.ndarray) -> np.ndarray:
        out = law[self.number][:, self.number]
        assert out.sum() == pytest.approx(1)
        return out


def ancestral_law(network, book, steps: int, grid: str = "uniform") -> np.ndarray:
    table = Enumeration(network, book)
    law, u = table.start(), time_grid(Options(grid=grid), steps)
    for before, after in itertools.pairwise(u):
        law = table.step(law, (before - after) / before)
    return table.pairs(law)


@pytest.mark.parametrize(
    ("length", "steps", "grid"),
    [
        (2, 3, "uniform"),
        pytest.param(1, 3, "uniform", marks=pytest.mark.slow),
        pytest.param(2, 1, "uniform", marks=pytest.mark.slow),
        pytest.param(2, 4, "cosine", marks=pytest.mark.slow),
        pytest.param(4, 2, "uniform", marks=pytest.mark.slow),
        pytest.param(4, 16, "uniform", marks=pytest.mark.slow),
    ],
)
def test_ancestral_samples_have_the_law_of_their_number_of_steps(length, steps, grid):
    book = codebook(length, affine())
    network = wrong(book, seed=7, scale=1.5)
    observed = counts(network, book, Options(steps=steps, grid=grid))
    assert p_value(observed, ancestral_law(network, book, steps, grid)) > 1e-3
    other = 1 if steps > 1 else 3
    assert p_value(observed, ancestral_law(network, book, other, grid)) < 1e-6


def test_skipping_idle_steps_changes_nothing_but_the_calls():
    book = codebook(2, affine())
    sampler = Sampler(table_run(wrong(book, seed=1), book))
    canvases = [sampler.canvas([])] * 32
    plain = sampler.sample(canvases, Options(steps=200, cached=False))
    cached = sampler.sample(canvases, Options(steps=200))
    np.testing.assert_array_equal(plain.tokens, cached.tokens)
    assert cached.calls[0] <= 4 < 100 < plain.calls[0]
    assert np.mean(cached.idle) == pytest.approx(1 - 4 / 200, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "length"),
    [
        ("first-hitting", 2),
        ("first-hitting", 4),
        ("left-to-right", 4),
    ],
)
def test_one_reveal_per_call_is_exact_at_the_bayes_tables(order, length):
    book = codebook(length, affine())
    observed = counts(bayes(book), book, Options(order=order, steps=64))
    assert p_value(observed, pair_probabilities()) > 1e-3
    few = ancestral_law(bayes(book), book, 1)
    assert p_value(observed, few) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_an_adaptive_sampler_has_the_law_that_its_chain_rule_says(order):
    """One token a step at temperature 1; ranked by what was drawn, the law is another."""
    book = codebook(2, affine())
    network = wrong(book, seed=11, scale=2.0)
    task, pairs = estimators.make_task(run_config(2), book, -1), jnp.asarray(all_pairs())
    text = estimators.Text(pairs, jnp.ones(pairs.shape, bool))
    key_B = jax.random.split(jax.random.key(0), len(pairs))
    law = np.exp(-np.asarray(chain.reveal(order, task, network, text, key_B)[0], np.float64))
    assert law.sum() == pytest.approx(1, abs=1e-5)
    law = law.reshape(V, V)
    assert p_value(counts(network, book, Options(order=order, steps=L)), law) > 1e-3
    drawn = counts(network, book, Options(order="confidence-drawn", steps=L))
    assert p_value(drawn, law) < 1e-6
    with pytest.raises(UserError, match="no likelihood"):
        likelihood.estimator("chain:confidence-drawn")


@pytest.mark.slow
def test_remasking_has_its_law():
    book = codebook(2, affine())
    network, steps, strength = wrong(book, seed=3, scale=1.5), 4, 0.7
    observed = counts(network, book, Options(steps=steps, remasking=strength))
    table = Enumeration(network, book)
    law = table.start()
    for show, hide in remasking_rates(time_grid(Options(), steps), strength):
        law = table.step(law, show, hide)
    assert p_value(observed, table.pairs(law)) > 1e-3
    assert p_value(observed, ancestral_law(network, book, steps)) < 1e-6


@pytest.mark.slow
def test_temperature_and_guidance_change_the_law_as_defined():
    """One step from a given first token: softmax(z / T) of z_u + (1 + scale) (z - z_u)."""
    book = codebook(2, affine())
    network, scale, temperature = wrong(book, seed=5), 0.8, 1.7
    canvas = np.stack([book.digits[6], np.full(2, book.base, np.int32)])
    options = Options(steps=1, temperature=temperature, cfg_scale=scale)
    observed = counts(network, book, options, canvas)[6]
    blank = np.full_like(canvas, book.base)
    z, head = network(np.stack([canvas, blank]), None, None)
    with_prompt, without = np.asarray(z @ head.T)[:, 1][:, book.rows]
    guided = without + (1 + scale) * (with_prompt - without)
    law = np.exp(guided / temperature)
    assert p_value(observed, law / law.sum()) > 1e-3
