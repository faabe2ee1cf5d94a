"""Every valid estimator against an obvious reference on enumerable tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import (
    L,
    V,
    affine,
    all_pairs,
    bayes,
    codebook,
    identity_head,
    pair_probabilities,
    run_config,
    wrong,
)

from prime_jax.evaluate import chain, estimators, likelihood
from prime_jax.kernels.subtoken_head_reference import subtoken_head_reference
from prime_jax.sample.orders import most_confident

BOOK = codebook(2, affine())
TASK = estimators.make_task(run_config(2), BOOK, eos_id=-1)
ALL = estimators.Text(jnp.asarray(all_pairs()), jnp.ones((V * V, L), bool))


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), count)


def nats_of(order: str, network, text=ALL, key_B=None) -> np.ndarray:
    key_B = keys(len(text.token_BxL)) if key_B is None else key_B
    return np.asarray(chain.reveal(order, TASK, network, text, key_B)[0])


def whole_token_log_probs(network) -> np.ndarray:
    """log p [pairs, masks, L] of each true token where `mask` (bit i: token i) is hidden."""
    out = np.zeros((V * V, 4, L))
    for mask in range(1, 4):
        hidden_L = np.array([mask >> i & 1 for i in range(L)], bool)
        masked = jnp.broadcast_to(hidden_L[:, None], (V * V, L, 2))
        inputs = estimators.hidden(TASK, ALL, masked)
        z, eye = network(inputs.digits_BxLxS, None, None)
        row_N = jnp.asarray(BOOK.rows)[ALL.token_BxL].reshape(-1)
        flat = masked.reshape(-1, 2)
        _, joint_N = subtoken_head_reference(TASK.head, z.reshape(-1, V), eye, row_N, flat)
        out[:, mask] = np.asarray(joint_N).reshape(V * V, L)
    return out


def test_left_to_right_is_the_chain_rule():
    log_p = whole_token_log_probs(wrong(BOOK, 0))
    want = -(log_p[:, 3, 0] + log_p[:, 2, 1])
    np.testing.assert_allclose(nats_of("l2r", wrong(BOOK, 0)), want, atol=1e-9)


@pytest.mark.parametrize("order", ["l2r", "confidence", "margin", "entropy"])
def test_a_deterministic_order_is_a_distribution(order):
    """It leads to each text along one path, so its likelihoods sum to one: they are exact."""
    assert np.exp(-nats_of(order, wrong(BOOK, 1))).sum() == pytest.approx(1, abs=1e-9)
    assert likelihood.kind(f"chain:{order}") == "nll"


def test_confidence_reveals_the_surest_token_first():
    network = wrong(BOOK, 3, scale=3.0)
    z, _ = network(jnp.full((1, L, 2), BOOK.base), None, None)
    first = int(np.argmax(jax.nn.log_softmax(z, axis=-1).max(-1)[0]))
    log_p = whole_token_log_probs(network)
    left = 3 & ~(1 << first)
    want = -(log_p[:, 3, first] + log_p[:, left, 1 - first])
    np.testing.assert_allclose(nats_of("confidence", network), want, atol=1e-9)


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_ties_go_to_the_first_position_however_a_network_rounds(order):
    """While nothing is visible all positions tie, but for rounding that depends on the batch."""
    table = wrong(BOOK, 3)

    noise_BxLxV = jnp.asarray(np.random.default_rng(0).normal(0, 3e-6, (V * V, L, V)))

    def network(digits_BxLxS, *_):
        z_BxLxV, eye = table(digits_BxLxS, None, None)
        blind_B = (digits_BxLxS == BOOK.base).all((1, 2))
        return jnp.where(blind_B[:, None, None], z_BxLxV[:, :1] + noise_BxLxV, z_BxLxV), eye

    np.testing.assert_allclose(nats_of(order, network), nats_of("l2r", network), atol=1e-9)
    score_BxL = jnp.asarray(np.random.default_rng(0).normal(-2, 3e-6, (8, 9)))
    active_BxL = jnp.arange(9) > jnp.zeros((8, 1))
    chosen = most_confident(active_BxL, score_BxL, jnp.full(8, 3), jnp.inf, jnp.float32)
    assert (np.asarray(chosen) == ((np.arange(9) > 0) & (np.arange(9) < 4))).all()


@pytest.mark.parametrize(
    ("order", "bound"),
    [("random", "token"), pytest.param("subtokens", "subtoken", marks=pytest.mark.slow)],
)
def test_random_orders_average_to_their_bound(order, bound):
    """The chain rule in uniformly random order has the NELBO as its mean: three standard errors."""
    network, pair = wrong(BOOK, 4), jnp.asarray([[3, 11]])
    many = estimators.Text(jnp.tile(pair, (2048, 1)), jnp.ones((2048, L), bool))
    got = nats_of(order, network, many)
    rows = likelihood.grid(2048, 1)
    values = likelihood.draw(TASK, bound, network, many.token_BxL, *map(jnp.asarray, rows[:3]))
    want = np.asarray(values[bound])
    error = np.hypot(got.std() / 2048**0.5, want.std() / 2048**0.5)
    assert abs(got.mean() - want.mean()) < 3 * error
    assert likelihood.kind(f"chain:{order}") == "nelbo"


@pytest.mark.parametrize("order", ["l2r", "confidence", "random", "subtokens"])
def test_context_and_padding_cost_nothing(order):
    """Scoring the second token behind the first gives its conditional, with any padding."""
    pairs = jnp.asarray(all_pairs()[::7])
    network = bayes(BOOK)
    target = jnp.tile(jnp.asarray([[False, True]]), (len(pairs), 1))
    got = nats_of(order, network, estimators.Text(pairs, target))
    p = pair_probabilities()
    a, b = np.asarray(pairs).T
    np.testing.assert_allclose(got, -np.log(p[a, b] / p[a].sum(1)), atol=1e-9)


SOME = ["subtoken", "token", "finite:4", "chain:l2r", "chain:confidence"]
OTHERS = ["subtoken:independent", "token:independent", "chain:margin", "chain:entropy"]
OTHERS += ["chain:random", "chain:subtokens", "finite:1"]


@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_valid_numbers_lie_above_the_entropy_of_the_source(name):
    """In the mean over the source no valid number of a wrong network beats it."""
    p = pair_probabilities().reshape(-1)
    entropy, network = -(p * np.log(p)).sum(), wrong(BOOK, 5)
    rows = likelihood.grid(V * V, 8)
    part = [jnp.asarray(x) for x in rows[:3]]
    values = likelihood.draw(TASK, name, network, ALL.token_BxL[rows.example], *part)
    assert p @ np.asarray(values[name]).reshape(8, -1).mean(0) > entropy


@pytest.mark.slow
def test_independent_masks_estimate_the_same_bound():
    rows = likelihood.grid(V * V, 400)
    part = [jnp.asarray(x) for x in rows[:3]]
    means = {}
    for name in ("token", "token:independent"):
        drawn = likelihood.draw(TASK, name, wrong(BOOK, 6), ALL.token_BxL[rows.example], *part)
        mean_R = np.asarray(drawn[name]).reshape(400, -1).mean(1)
        means[name] = (mean_R.mean(), mean_R.std() / 20)
    (a, ea), (b, eb) = means.values()
    assert abs(a - b) < 4 * np.hypot(ea, eb)
    assert ea < eb  # which is why fixed counts are the default


@pytest.mark.slow
def test_finite_steps_approach_the_marginal_bound():
    """With many steps at most one sub-token is revealed in each."""
    p = pair_probabilities().reshape(-1)
    rows = likelihood.grid(V * V, 64)
    part = [jnp.asarray(x) for x in rows[:3]]
    got = {}
    for name in ("subtoken", "finite:512"):
        drawn = likelihood.draw(TASK, name, wrong(BOOK, 7), ALL.token_BxL[rows.example], *part)
        mean_R = np.asarray(drawn[name]).reshape(64, -1) @ p
        got[name] = (mean_R.mean(), mean_R.std() / 8)
    (a, ea), (b, eb) = got.values()
    assert abs(a - b) < 4 * np.hypot(ea, eb) + 0.01


@pytest.mark.slow
def test_one_digit_per_token_makes_both_bounds_one():
    book = codebook(1)
    task = estimators.make_task(run_config(1), book, eos_id=-1)
    rows = likelihood.grid(V * V, 1)
    part = [jnp.asarray(x) for x in rows[:3]]
    draws = [
        likelihood.draw(task, name, wrong(book, 8), ALL.token_BxL, *part)[name]
        for name in ("subtoken", "token")
    ]
    np.testing.assert_allclose(*draws, atol=1e-12)


@pytest.mark.slow
def test_standard_errors_cover():
    """Eight replicates and Student's t give 95 % intervals that contain the bound 95 % of the time."""
    evaluations, network = 120, bayes(BOOK)
    rows = likelihood.grid(V * V, 8 * evaluations)
    part = [jnp.asarray(x) for x in rows[:3]]
    draw = jax.jit(lambda *rows: likelihood.draw(TASK, "subtoken", network, *rows)["subtoken"])
    nats = np.asarray(draw(ALL.token_BxL[rows.example], *part)).reshape(evaluations, 8, -1)
    exact = nats.mean() / L  # over 960 replicates: its own error is small
    inside = 0
    for replicates in nats:
        loss = likelihood.summarise("subtoken", replicates, np.full(V * V, L), np.arange(V * V), "")
        inside += abs(loss.value - exact) < 2.365 * loss.se_mc
    assert 0.95 - 0.06 < inside / evaluations <= 1.0


def causal(book):
    """A random autoregressive network: position i sees the tokens before it."""
    first_V, *rest = np.random.default_rng(0).normal(0, 1, (V + 2, V))
    second_XxV = np.array(rest)

    def network(digits_BxLxS, *_):
        first = jnp.broadcast_to(jnp.asarray(first_V), (len(digits_BxLxS), V))
        second = jnp.asarray(second_XxV)[digits_BxLxS[:, 1, 0]]
        return jnp.stack([first, second], axis=1), identity_head(book)

    return network


@pytest.mark.parametrize("family", ["prime", "arm"])
def test_greedy_decoding_gives_one_text(family):
    task, network = TASK, wrong(BOOK, 9)
    if family == "arm":
        book = codebook(1)
        config = dataclasses.replace(run_config(1), family="arm")
        task, network = estimators.make_task(config, book, eos_id=-1), causal(book)
    assert float(chain.greedy(task, network, ALL, keys(V * V), None)["greedy"].sum()) == 1
