"""D3PM and SEDD with an absorbing state, from their own definitions, against the shipped losses."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import L, V, all_masks, all_pairs, codebook, identity_head, run_config, wrong
from test_enumeration import BOOKS, rows_of

from prime_jax import schedule
from prime_jax.evaluate import estimators
from prime_jax.kernels.subtoken_head_reference import subtoken_log_probs_reference
from prime_jax.objectives import loss_sums, make_head, masked_inputs

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def predictions(name: str, network) -> tuple[np.ndarray, np.ndarray]:
    """p [P, M, L*S, b] of every digit for all pairs and masks, and the true digits [P, L*S]."""
    length, codes = BOOKS[name]
    book, config = codebook(length, codes), run_config(length)
    pairs, masks = all_pairs(), all_masks(length)
    tokens = jnp.asarray(np.repeat(pairs, len(masks), axis=0))
    hidden = jnp.asarray(np.tile(masks, (len(pairs), 1, 1)))
    inputs = masked_inputs(config, book, tokens, hidden, jnp.ones(tokens.shape), -1)
    z, eye = network(inputs.digits_BxLxS, None, None)
    rows = jnp.asarray(book.rows)[tokens].reshape(-1)
    flat = (z.reshape(-1, V), eye, rows, hidden.reshape(-1, length))
    if length == 1:
        p = jax.nn.softmax(flat[0] @ eye.T)[:, None][..., book.rows]
    else:
        p = jnp.exp(subtoken_log_probs_reference(make_head(config, book), *flat)[1])
    shape = (len(pairs), len(masks), L * length, book.base)
    return np.asarray(p).reshape(shape), book.digits[pairs].reshape(len(pairs), -1)


def d3pm_bound(name: str, network, alphas: np.ndarray) -> np.ndarray:
    """The T-step bound of every pair (D3PM, arXiv 2107.03006, equation 1) in nats.

    From transition matrices Q_t over b digits and the absorbing state, Bayes' rule for the
    posterior q(x_{t-1} | x_t, x_0), and the x_0-parameterisation of the reverse step. Positions
    are independent given x_t, which is the mask; q(x_T | x_0) is the absorbing state.

    Args:
        alphas: probability of being visible at the times 0, 1/T .. 1.
    """
    p, truth = predictions(name, network)
    pairs, _, n, b = p.shape
    masks = all_masks(n // L).reshape(-1, n)
    steps, absorbing = len(alphas) - 1, np.eye(b + 1)[b]

    def jump(stay):  # [from, to]
        return stay * np.eye(b + 1) + (1 - stay) * absorbing[None, :]

    total, cumulative = np.zeros(pairs), np.eye(b + 1)
    for t in range(1, steps + 1):
        step, before = jump(alphas[t] / alphas[t - 1]), cumulative
        cumulative = before @ step
        # [x_0, x_t, x_{t-1}]; states that x_0 cannot reach have no posterior and never occur
        reach = cumulative[:, :, None]
        posterior = np.where(
            reach > 0, before[:, None, :] * step.T[None] / np.where(reach > 0, reach, 1), 0
        )
        chance = np.where(masks, cumulative[0, b], cumulative[0, 0]).prod(1)  # of x_t
        hidden = posterior[:b, b]  # [x_0, x_{t-1}] for an absorbed x_t
        q = hidden[truth][:, None]  # [P, 1, n, b + 1]
        model = p @ hidden
        kl = np.where(q > 0, q * np.log(np.where(q > 0, q, 1) / np.where(q > 0, model, 1)), 0).sum(
            -1
        )
        # A visible x_t leaves one state for x_{t-1}, the same in q and in the model.
        total += (kl * masks).sum(-1) @ chance
    return total  # at t = 1 the KL is the reconstruction term: x_0 is certain


def discrete_training_loss(name: str, network, config) -> np.ndarray:
    """The shipped loss at the discrete times of `objective.time_steps`, over all masks."""
    length, codes = BOOKS[name]
    book, o = codebook(length, codes), config.objective
    masks, pairs = all_masks(length), all_pairs()
    tokens = jnp.asarray(np.repeat(pairs, len(masks), axis=0))
    hidden = jnp.asarray(np.tile(masks, (len(pairs), 1, 1)))
    inputs = masked_inputs(config, book, tokens, hidden, jnp.ones(tokens.shape), -1)
    nats = jax.jit(partial(estimators.row_nats, make_head(config, book), network))(inputs)[0]
    k, n = masks.sum((1, 2)), L * length
    rows = jnp.arange(o.time_steps)
    t = schedule.times(o, jnp.float64(0.5), rows, o.time_steps)
    assert sorted(np.asarray(t * o.time_steps).round(9)) == list(range(1, o.time_steps + 1))
    a, w = np.asarray(schedule.alpha(o, t)), np.asarray(schedule.weight(o, t))
    q = (w[:, None] * (1 - a[:, None]) ** k * a[:, None] ** (n - k)).mean(0)
    return np.asarray(nats).reshape(len(pairs), -1) @ q


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("l1", "linear"),
        pytest.param("l1", "cosine", marks=SLOW),
        pytest.param("l4-affine", "linear", marks=SLOW),
        pytest.param("l4-affine", "cosine", marks=SLOW),
    ],
)
def test_d3pm_is_training_at_discrete_times(name, kind):
    config = run_config(BOOKS[name][0], time_steps=3, schedule=kind)
    network = wrong(codebook(*BOOKS[name]), 0)
    alphas = np.asarray(schedule.alpha(config.objective, jnp.arange(4) / 3))
    alphas = np.maximum(alphas, 0)  # cosine ends 1e-17 below
    got = discrete_training_loss(name, network, config)
    np.testing.assert_allclose(got, d3pm_bound(name, network, alphas), rtol=1e-12)


@pytest.mark.slow
def test_d3pm_is_the_finite_step_estimator():
    """Where a token is one sub-token, at every number of steps, for every sequence."""
    book, config = codebook(1), run_config(1)
    network, pairs = wrong(book, 0), all_pairs()
    task = estimators.make_task(config, book, -1)
    for steps in (1, 3):
        total = np.zeros(len(pairs))
        for seen in itertools.product(range(3), repeat=L):  # 0 visible, 1 revealed, 2 still hidden
            state = np.broadcast_to(np.array(seen)[:, None], (len(pairs), L, 1))
            inputs = estimators.hidden(task, rows_of(jnp.asarray(pairs)), jnp.asarray(state > 0))
            nats = estimators.row_nats(task.head, network, inputs, jnp.asarray(state == 2))[1]
            i = np.arange(1, steps + 1) / steps
            chance = np.stack([1 - i, np.full(steps, 1 / steps), i - 1 / steps])[list(seen)]
            total += chance.prod(0).sum() * np.asarray(nats)
        want = d3pm_bound("l1", network, 1 - np.arange(steps + 1) / steps)
        np.testing.assert_allclose(total, want, rtol=1e-12)


def score_entropy(config, t, log_p_NxB, truth_N, masked_N, free_NxB=None) -> jax.Array:
    """Denoising score entropy at time t, in nats per unit of time (SEDD, arXiv 2310.16834, eq. 4).

    Only the absorbing state can be left backwards, at the rate sigma'(t) of every digit y:
    sum_y sigma' (s_y - r_y log s_y + K(r_y)), K(a) = a (log a - 1), with the true ratio
    r_y = p_t(y | x_0) / p_t(absorbing | x_0) and the score s_y = alpha / (1 - alpha) p_y.

    Args:
        free_NxB: log s_y of a network whose score sums to anything; None for the one above.
    """
    objective = config.objective

    def sigma(t):
        return -jnp.log(schedule.alpha(objective, t))

    odds = 1 / jnp.expm1(sigma(t))  # alpha / (1 - alpha)
    log_s = jnp.log(odds) + log_p_NxB if free_NxB is None else free_NxB
    true = truth_N[:, None] == jnp.arange(log_p_NxB.shape[1])
    constant = odds * (jnp.log(odds) - 1)
    each = jnp.exp(log_s) + jnp.where(true, constant - odds * log_s, 0.0)
    return (jax.grad(sigma)(t) * each.sum(1) * masked_N).sum()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("l1", "log-linear", marks=SLOW),
        ("l4", "cosine"),
        *(
            pytest.param(n, k, marks=SLOW)
            for n in ("l1", "l2-affine")
            for k in ("linear", "cosine")
        ),
    ],
)
def test_score_entropy_is_the_loss_value_and_gradient(name, kind):
    """Of random logits under random masks; so for every network, by the chain rule."""
    length, codes = BOOKS[name]
    book, config = codebook(length, codes), run_config(length, schedule=kind)
    head, rng = make_head(config, book), np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, V, (6, L)))
    masked = jnp.asarray(rng.random((6, L, length)) < 0.6)
    z0 = jnp.asarray(rng.normal(0, 2, (6, L, V)))
    rows = jnp.asarray(book.rows)[tokens].reshape(-1)

    def ours(z, t):
        weight = jnp.full(tokens.shape, schedule.weight(config.objective, t))
        inputs = masked_inputs(config, book, tokens, masked, weight, -1)
        return loss_sums(head, lambda *_: (z, identity_head(book)), inputs).marginal

    def theirs(z, t):
        flat = (z.reshape(-1, V), identity_head(book), rows, masked.reshape(-1, length))
        if length == 1:
            log_p = jax.nn.log_softmax(flat[0])
        else:
            log_p = subtoken_log_probs_reference(head, *flat)[1].reshape(-1, book.base)
            log_p = jnp.maximum(log_p, -1e3)  # digits that no token has: s = 0
        truth = jnp.asarray(book.digits)[tokens].reshape(-1)
        return score_entropy(config, t, log_p, truth, masked.reshape(-1))

    both = jax.jit(lambda *a: (jax.value_and_grad(ours)(*a), jax.value_and_grad(theirs)(*a)))
    for t in (0.05, 0.4, 0.9):
        (value, gradient), (want, wanted) = both(z0, t)
        assert float(value) == pytest.approx(float(want), rel=1e-9)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-7, atol=1e-9)


def test_a_score_that_does_not_sum_to_the_odds_pays_for_it():
    """SEDD's own network: its score entropy is the loss of the normalised score and a penalty
    sum p - 1 - log sum p >= 0 per hidden token, so the optimum is the same."""
    config, rng = run_config(1), np.random.default_rng(0)
    free, truth = jnp.asarray(rng.normal(0, 1, (5, V))), jnp.asarray(rng.integers(0, V, 5))
    t, ones = 0.3, jnp.ones(5)
    odds = (1 - t) / t
    mass = jnp.exp(free).sum(1) / odds
    got = score_entropy(config, t, jax.nn.log_softmax(free), truth, ones, free)
    normal = score_entropy(config, t, jax.nn.log_softmax(free), truth, ones)
    penalty = (mass - 1 - jnp.log(mass)).sum() / t
    assert float(got) == pytest.approx(float(normal + penalty), rel=1e-12)
    assert float(penalty) > 0
