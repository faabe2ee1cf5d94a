"""Samplers: what must not change a sample, what every order and filter promises, ARM's cache."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import (
    Run,
    affine,
    all_pairs,
    bayes,
    codebook,
    p_value,
    pair_probabilities,
    run_config,
    wrong,
)

from prime_jax import model
from prime_jax.config import DataConfig, ModelConfig, RunConfig, SubtokenConfig
from prime_jax.errors import UserError
from prime_jax.model import Cache
from prime_jax.sample import Options, Sampler, generate
from prime_jax.sample.filters import Filters, draw, keep_likeliest
from prime_jax.sample.grids import Rates, _cheapest, best, fewest, measure
from prime_jax.sample.options import validate
from prime_jax.sample.orders import NEVER, idle_fraction, plan, time_grid
from prime_jax.sample.quality import distinct, entropy, repetition
from prime_jax.sample.sampler import sampler
from prime_jax.subtokens import Codebook

PRIME = RunConfig(
    family="prime",
    model=ModelConfig(vocab_size=37, layers=1, width=24, heads=2),
    subtokens=SubtokenConfig(length=6),
    data=DataConfig(seq_len=40),
)
ARM = dataclasses.replace(
    PRIME,
    family="arm",
    model=dataclasses.replace(PRIME.model, layers=2, kv_heads=1),
    subtokens=SubtokenConfig(length=1),
)


def random_run(config: RunConfig, seed: int = 0):
    """A stand-in for a trained run, with random parameters."""
    book = Codebook.create(config.model.vocab_size, config.subtokens)
    network = model.build(config, book)
    digits = jnp.zeros((1, config.data.seq_len, book.length), jnp.int32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), digits)["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), shapes)

    def bound(params):
        return lambda *args, **more: network.apply({"params": params}, *args, **more)

    return Run(config, book, bound, params)


@pytest.fixture(scope="module")
def prime():
    return random_run(PRIME)


@pytest.fixture(scope="module")
def arm():
    return random_run(ARM)


PROMPTS = [[], [1, 2, 3], [30], [5] * 12, [7, 8], [9], [10] * 3, [36, 0]]
EIGHT = len(PROMPTS)  # with up to 32 tokens: one shape, so that most tests compile nothing


@pytest.mark.slow
@pytest.mark.parametrize("family", ["prime", "arm"])
def test_samples_do_not_depend_on_the_batch_or_the_devices(family, request):
    """Equal up to rounding of the network, which here changes no draw."""
    run = request.getfixturevalue(family)
    options = Options(steps=8) if family == "prime" else Options()
    assert jax.device_count() == 8
    everywhere, one = sampler(run), Sampler(run, jax.devices()[:1])
    canvases = [everywhere.canvas(prompt, 20) for prompt in PROMPTS]
    want = everywhere.sample(canvases, dataclasses.replace(options, batch_size=8)).tokens
    got = one.sample(canvases, dataclasses.replace(options, batch_size=2)).tokens
    later = one.sample(canvases[3:5], options, first=3).tokens
    for a, b in zip([*want, *want[3:5]], [*got, *later], strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({tuple(tokens[-20:]) for tokens in want}) == len(PROMPTS)
    for prompt, tokens in zip(PROMPTS, want, strict=True):
        assert tokens[: len(prompt)].tolist() == prompt
        assert len(tokens) == len(prompt) + 20
        assert tokens.min() >= 0  # no invalid code


@pytest.mark.parametrize(("slots", "idle"), [(1, 0.368), (2, 0.135), (3, 0.050), (4, 0.018)])
def test_idle_steps_are_as_rare_as_the_formula_says(slots, idle):
    """(1 - 1/T)^(L l) of T steps reveal nothing, here L = T = 1024 (docs/sampling.md)."""
    hidden = np.ones((1024, slots), bool)
    rng = np.random.default_rng(slots)
    options = Options(steps=1024)
    fractions = [idle_fraction(plan(options, hidden, rng)) for _ in range(20)]
    assert np.mean(fractions) == pytest.approx(idle, abs=0.006)


@pytest.mark.parametrize("order", ["random", "left-to-right", "first-hitting", "ancestral"])
def test_a_plan_reveals_everything_once_and_blocks_in_turn(order):
    hidden = np.ones((10, 3), bool)
    hidden[4] = False
    options = Options(steps=12, order=order, block_length=3)
    when, block, steps = plan(options, hidden, np.random.default_rng(0))
    assert ((when == NEVER) == ~hidden).all()
    assert steps == (27 if order == "first-hitting" else 12)
    last = -1
    for number in range(3):
        inside = when[block == number]
        inside = inside[inside < NEVER]
        assert len(inside) == 9
        assert inside.min() > last
        last = inside.max()
    if order in ("random", "left-to-right"):  # 9 sub-tokens of a block in 4 steps
        assert set(np.unique(when[hidden], return_counts=True)[1]) <= {2, 3}
    if order == "first-hitting":
        assert sorted(when[hidden]) == list(range(27))


@pytest.mark.parametrize("steps", [3, 7, 11])
def test_blocks_take_the_steps_asked_for_and_no_more(steps):
    hidden, rng = np.ones((13, 2), bool), np.random.default_rng(0)
    options = Options(steps=steps, order="random", block_length=5)
    made = plan(options, hidden, rng)
    assert made.steps == steps
    assert made.when_LxS.max() == steps - 1
    fewer = dataclasses.replace(options, steps=2)
    with pytest.raises(UserError, match=r"--steps 2: 13 tokens in blocks of 5 .* take at least 3"):
        plan(fewer, hidden, rng)
    assert plan(fewer, hidden, rng, fixed_blocks=True).steps == 3  # as the run was trained
    one_each = dataclasses.replace(fewer, order="first-hitting")
    assert plan(one_each, hidden, rng).steps == 26


def test_confidence_order_reveals_the_surest_tokens_of_the_first_open_block():
    """At a table network: the tokens revealed at each call are those of the highest p(drawn)."""
    config = dataclasses.replace(run_config(1), data=DataConfig(seq_len=8))
    book = codebook(1)
    z = np.random.default_rng(0).normal(0, 3, (8, 16)).astype(np.float32)

    def network(digits_BxLxS, segment_ids, dropout_keys):
        batch = digits_BxLxS.shape[0]
        return jnp.broadcast_to(z, (batch, 8, 16)), jnp.eye(16)

    run = Run(config, book, lambda _: network)
    made, seen = Sampler(run), []
    options = Options(order="confidence", temperature=0, steps=4, block_length=4)
    canvas = made.canvas([])
    made.sample([canvas], options, lambda digits, _: seen.append(digits[0, :, 0] != 16))
    p = np.exp(z).max(1) / np.exp(z).sum(1)
    first, second = np.argsort(-p[:4]), 4 + np.argsort(-p[4:])
    want = [first[:2], first, [*first, *second[:2]], range(8)]
    assert [set(np.flatnonzero(s)) for s in seen] == [set(w) for w in want]

    seen.clear()
    sure = dataclasses.replace(options, threshold=float(np.sort(p[:4])[1] - 1e-4))
    made.sample([canvas], sure, lambda digits, _: seen.append(digits[0, :, 0] != 16))
    assert set(np.flatnonzero(seen[0])) == set(first[:3])  # all beyond the threshold
    assert set(np.flatnonzero(seen[1])) == set(first)  # and at least one

    other = made.sample([canvas], dataclasses.replace(options, order="entropy", threshold=None))
    assert other.calls == [4]
    free = made.sample([canvas], dataclasses.replace(options, order="entropy", threshold=9.0))
    assert free.calls == [2]  # all of a block at once


@pytest.mark.slow
@pytest.mark.parametrize("order", ["margin", "entropy", "confidence"])
def test_adaptive_orders_of_a_prime_model_finish_in_their_steps(order, prime):
    canvas = sampler(prime).canvas([1], 9)
    samples = sampler(prime).sample([canvas], Options(order=order, steps=5))
    assert samples.calls == [5]
    assert samples.tokens[0].min() >= 0


def test_kept_subtokens_stay_and_impossible_ones_are_refused(prime):
    made, book = sampler(prime), prime.codebook
    canvas = made.canvas([1, 2, 3, 4], 4)
    canvas[1, 3:] = book.base  # the first three sub-tokens of token 2 are kept
    tokens = np.array(made.sample([canvas] * EIGHT, Options(steps=6)).tokens)
    assert (book.digits[tokens[:, 1], :3] == book.digits[2, :3]).all()
    assert (tokens[:, [0, 2, 3]] == [1, 3, 4]).all()
    assert book.codes.max() == 36  # so no token's code begins with 11
    canvas[2] = [1, 1, *[book.base] * 4]
    with pytest.raises(UserError, match="token 2: no token has"):
        made.sample([canvas], Options())


def test_generate_gives_what_follows_the_prompts_up_to_the_stop_token(prime, arm):
    for run in (prime, arm):
        free = generate(run, PROMPTS, Options(gen_length=16, seed=2))
        assert {len(tokens) for tokens in free} == {16}
        stop = free[1][5]
        at = free[1].index(stop)
        stopped = generate(run, PROMPTS, Options(gen_length=16, seed=2, stop=stop))
        assert stopped[1] == free[1][: at + 1]


# --- ARM


@pytest.mark.parametrize("family", ["arm", pytest.param("prime", marks=pytest.mark.slow)])
def test_reading_in_parts_equals_one_forward_pass(family, request):
    run = request.getfixturevalue(family)
    book, config = run.codebook, run.config
    digits = np.random.default_rng(0).integers(0, book.base, (2, 12, book.length))
    network = jax.jit(run.network(run.params))
    # Without a causal mask, a part sees the earlier ones and itself, not what comes later.
    size = 6 if family == "arm" else 12
    whole = network(digits)[0]
    cache, out = Cache.empty(config.model, 2, 16), []
    for start in range(0, 12, size):
        h, _, cache = network(digits[:, start : start + size], cache=cache)
        out.append(h)
    assert cache.length_B.tolist() == [12, 12]
    np.testing.assert_allclose(np.concatenate(out, 1), whole, atol=2e-5)


def next_logits(run, texts: list[list[int]]) -> list[np.ndarray]:
    """Logits [V] in token order of what follows each position of a text, by one full pass."""
    book, padded = run.codebook, np.zeros((len(texts), 32, 1), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text) + 1, 0] = [book.base, *book.digits[text, 0]]
    h_BxLxD, head_VxD = jax.jit(run.network(run.params))(padded)
    z_BxLxV = np.asarray(h_BxLxD @ head_VxD.T)[..., book.rows]
    return [z[: len(text) + 1] for z, text in zip(z_BxLxV, texts, strict=True)]


def test_decoding_equals_repeated_full_passes(arm):
    got = generate(arm, PROMPTS, Options(temperature=0, gen_length=12))
    texts = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, got, strict=True)]
    for z_LxV, prompt, tokens in zip(next_logits(arm, texts), PROMPTS, got, strict=True):
        assert z_LxV.argmax(1)[len(prompt) : -1].tolist() == tokens


def test_decoding_draws_from_the_softmax(arm):
    options = Options(gen_length=1, temperature=1.3, batch_size=EIGHT)
    draws = generate(arm, [[4, 9]] * 1024, options)
    law = np.exp(np.float64(next_logits(arm, [[4, 9]] * EIGHT)[0][-1]) / 1.3)
    assert p_value(np.bincount(np.ravel(draws), minlength=37), law) > 1e-3


# --- filters


def filters(temperature=1.0, top_k=0, top_p=1.0) -> Filters:
    return Filters(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.75}, [1, 3]),
        ({"top_p": 0.85}, [1, 2, 3]),
        ({"top_p": 0.85, "top_k": 1}, [1]),
        ({"top_p": 0.85, "temperature": 0.5}, [1, 3]),  # the nucleus of the sharper distribution
        ({"top_p": 0.01}, [1]),
    ],
)
def test_filters_keep_the_likeliest(options, kept):
    z = jnp.log(jnp.array([[0.05, 0.5, 0.15, 0.3]]))
    out = np.asarray(keep_likeliest(filters(**options), z)[0])
    assert np.flatnonzero(out > -1e29).tolist() == kept


@pytest.mark.slow
def test_rare_tokens_are_drawn_at_their_rate():
    """8,192 classes of probability 2e-8: default float32 noise would draw next to none."""
    classes, rows, p = 1 << 13, 1 << 13, 2e-8
    z_V = jnp.full(classes, np.log(p), jnp.float32).at[0].set(np.log1p(-p * (classes - 1)))

    @jax.jit
    def rare(key):
        z_NxV = jnp.broadcast_to(z_V, (rows, classes))
        return (draw(filters(), z_NxV, jax.random.split(key, rows)) != 0).sum()

    count = sum(int(rare(key)) for key in jax.random.split(jax.random.key(0), 4))
    assert 1 <= count <= 15  # 5.4 expected; 0.01 with the default noise


# --- grids


def bayes_rates(length: int) -> Rates:
    book, config = codebook(length, affine()), run_config(length)
    pairs = all_pairs()
    p = pair_probabilities()[pairs[:, 0], pairs[:, 1]]
    sequences_read = np.round(p * 32768).astype(int)
    table = Sampler(Run(config, book, lambda _: bayes(book)))
    tokens = np.random.default_rng(0).permutation(np.repeat(pairs, sequences_read, axis=0))
    return measure(table.model, {}, config, tokens, batch=len(tokens))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "finite"),
    [
        (1, {2: 4.5706, 8: 4.4602}),
        (4, {2: 4.5909, 8: 4.4669}),
    ],
)
def test_measured_rates_give_the_finite_step_bound(length, finite):
    """Loss of the uniform grid = the enumerated `finite:T` of test_enumeration, per pair."""
    rates = bayes_rates(length)
    assert 2 * rates.bound == pytest.approx(4.4234, abs=0.03)
    for steps, value in finite.items():
        uniform = time_grid(Options(), steps)
        assert 2 * rates.loss(uniform) == pytest.approx(value, abs=0.03)
        assert rates.loss(best(rates, steps)) <= rates.loss(uniform) + 1e-9
    assert best(rates, 1).tolist() == [1, 0]


def test_the_search_finds_the_cheapest_grid():
    rng = np.random.default_rng(0)
    u = np.linspace(0.2, 1.5, 12)[:, None]
    rates = Rates(u + 0.3 * rng.random((12, 5)))
    least, _ = _cheapest(rates, 8, 3)
    every = [np.array([8, *inner, 0]) / 8 for inner in itertools.combinations(range(7, 0, -1), 2)]
    assert least[2] == pytest.approx(min(rates.loss(grid) for grid in every))
    enough = fewest(rates, rates.loss(best(rates, 5)) + 1e-9)
    assert enough is not None
    assert enough <= 5
    assert fewest(rates, 0.0) is None


# --- quality and bad input


def test_quality_numbers():
    assert entropy([1, 1, 2, 2]) == pytest.approx(np.log(2))
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert distinct([[1, 2], [1, 2], [1, 3]], 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [
        ({"order": "confidnce"}, "prime", "must be one of ancestral"),
        ({"steps": 0}, "prime", "--steps 0: must be at least 1"),
        ({"threshold": 0.9}, "prime", "needs --order confidence"),
        ({"remasking": 0.5, "order": "random"}, "prime", "needs --order ancestral"),
        ({"top_p": 0.0}, "arm", "above 0"),
        ({"order": "random"}, "arm", "generates left to right"),
        ({"time_grid": (1.0, 0.5, 0.5, 0.0)}, "mdm", "fall from 1 to 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, family, message):
    with pytest.raises(UserError, match=message):
        validate(Options(**options), family)


def test_what_does_not_fit_the_context_is_refused(prime):
    made = sampler(prime)
    for prompt, length in (([1] * 40, 0), ([1] * 30, 11)):
        with pytest.raises(UserError, match="context of 40 tokens"):
            made.canvas(prompt, length)
    with pytest.raises(UserError, match="41 tokens is longer than the model's context of 40"):
        made.sample([np.zeros((41, 6), np.int32)], Options())


@pytest.mark.slow
def test_guidance_asks_about_the_same_canvas_with_everything_given_hidden():
    book, asked = codebook(2, affine()), []
    inner = wrong(book, 0)

    def network(digits_BxLxS, segment_ids, dropout_keys):
        jax.debug.callback(lambda d: asked.append(np.asarray(d)), digits_BxLxS)
        return inner(digits_BxLxS, segment_ids, dropout_keys)

    run = Run(run_config(2), book, lambda _: network)
    made = Sampler(run, jax.devices()[:1])
    made.sample([made.canvas([6])], Options(steps=1, cfg_scale=1.0))
    jax.effects_barrier()
    assert asked[0][0, 0].tolist() == book.digits[6].tolist()
    assert (asked[0][1] == book.base).all()
