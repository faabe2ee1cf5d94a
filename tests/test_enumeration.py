"""The mathematics, by exact enumeration through the shipped functions (theory.md, "Two losses")."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import (
    ENTROPY,
    L,
    V,
    affine,
    all_masks,
    all_pairs,
    bayes,
    codebook,
    identity_head,
    pair_probabilities,
    run_config,
    wrong,
)

from prime_jax import objectives, schedule
from prime_jax.corrupt import step_key
from prime_jax.evaluate import estimators, likelihood
from prime_jax.kernels.subtoken_head_reference import subtoken_head_reference
from prime_jax.objectives import Inputs, loss_sums, make_head, masked_inputs, training_inputs

BOOKS = {
    "l1": (1, None),
    "l2": (2, None),
    "l2-affine": (2, affine()),
    "l4": (4, None),
    "l4-affine": (4, affine()),
}
JOINT = {
    "l1": ENTROPY,
    "l2": 4.390800,
    "l2-affine": 4.174225,
    "l4": 4.369851,
    "l4-affine": 4.105567,
}


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def rows_of(tokens) -> estimators.Text:
    return estimators.Text(jnp.asarray(tokens), jnp.ones(tokens.shape, bool))


def mask_weights(config, n: int) -> np.ndarray:
    """int w(t) q(mask | t) dt for masks with k = 0..n hidden, by Gauss-Legendre quadrature in the
    root of t, which is exact enough for a weight that is steep at 0."""
    node, fraction = np.polynomial.legendre.leggauss(400)
    root = jnp.asarray((node + 1) / 2)
    a, w = schedule.alpha(config, root**2), schedule.weight(config, root**2)
    k = np.arange(n + 1)[:, None]
    return np.asarray((fraction * root * w * (1 - a) ** k * a ** (n - k)).sum(1))


def enumerate_losses(name: str, **objective):
    """(marginal, joint) in nats per pair, exactly, through `masked_inputs` and `loss_sums`."""
    length, codes = BOOKS[name]
    book, config = codebook(length, codes), run_config(length, **objective)
    masks = all_masks(length)
    counts = masks.reshape(len(masks), -1).sum(1)
    q = np.where(counts > 0, mask_weights(config.objective, L * length)[counts], 0.0)
    pairs = all_pairs()
    p = pair_probabilities()[pairs[:, 0], pairs[:, 1]]
    tokens = np.repeat(pairs, len(masks), axis=0)
    weights = np.outer(p, q).reshape(-1, 1) * np.ones((1, L))
    inputs = masked_inputs(
        config,
        book,
        jnp.asarray(tokens),
        jnp.asarray(np.tile(masks, (len(pairs), 1, 1))),
        jnp.asarray(weights),
        eos_id=-1,
    )
    sums = loss_sums(make_head(config, book), bayes(book), inputs)
    return float(sums.marginal), float(sums.joint)


def entropy() -> float:
    p = pair_probabilities()
    return float(-(p * np.log(p)).sum())


def test_the_source_has_the_stated_entropy():
    assert entropy() == pytest.approx(ENTROPY, abs=5e-7)


@pytest.mark.parametrize("name", BOOKS)
def test_marginal_is_the_entropy_and_joint_lies_below(name):
    marginal, joint = enumerate_losses(name)
    assert marginal == pytest.approx(entropy(), abs=1e-12)
    assert joint == pytest.approx(JOINT[name], abs=6e-7)


@pytest.mark.parametrize("kind", schedule.SCHEDULES)
def test_every_schedule_gives_the_same_bound(kind):
    # log-linear and geometric leave out at most the ends that `schedule.check` allows.
    tolerance = {"log-linear": 6e-3, "geometric": 2e-3}.get(kind, 1e-9)
    config = run_config(2, schedule=kind).objective
    schedule.check(config)
    got = mask_weights(config, 4)[1:]
    exact = [1 / 4, 1 / (2 * 6), 1 / (3 * 4), 1 / 4]  # 1 / (k C(4, k))
    np.testing.assert_allclose(got, exact, atol=tolerance)


@pytest.mark.parametrize("sd", [0.15, 0.4])
@pytest.mark.parametrize("weight", ["nelbo", "flat"])
def test_times_about_a_half_give_the_same_bound_or_their_own_weighting(sd, weight):
    """All strata of a large batch, integrated: their mean is the integral over times."""
    config = run_config(2, times="bell", times_sd=sd, weight=weight).objective
    count, n = 1 << 17, 4
    t = schedule.times(config, jnp.float64(0.5 / count), jnp.arange(count), count)
    k = np.arange(1, n + 1)[:, None]
    law = np.asarray(t**k * (1 - t) ** (n - k))
    if weight == "nelbo":
        found = (law * np.asarray(schedule.weight(config, t) / schedule.density(config, t))).mean(1)
        exact = [1 / 4, 1 / (2 * 6), 1 / (3 * 4), 1 / 4]  # 1 / (k C(4, k))
        assert float((1 / schedule.density(config, t)).max()) < 4
    else:
        found = law.mean(1)
        node, fraction = np.polynomial.legendre.leggauss(200)
        u = (node + 1) / 2
        normal = fraction * np.exp(-(((u - 0.5) / sd) ** 2) / 2)
        exact = (normal * u**k * (1 - u) ** (n - k)).sum(1) / normal.sum()
    np.testing.assert_allclose(found, exact, rtol=2e-5)


@pytest.mark.parametrize("distance", [1, 2, 4, 8])
def test_hamming_law(distance):
    """Two equally likely values at Hamming distance d: joint = H / d, marginal = H."""
    length, other = 8, 2**distance - 1
    codes = np.array([0, other, *(c for c in range(256) if c not in (0, other))])[:V]
    book = codebook(length, codes)
    config = run_config(length)
    masks = (np.arange(256)[:, None] >> np.arange(length) & 1).astype(bool)[:, None]
    q = np.where(masks.any((1, 2)), mask_weights(config.objective, length)[masks.sum((1, 2))], 0)

    def network(digits_BxLxS, *_):
        z = jnp.full((*digits_BxLxS.shape[:2], V), -1e3).at[..., :2].set(0.0)
        return z, identity_head(book)

    tokens = jnp.asarray(np.repeat([[0], [1]], 256, axis=0))
    weights = jnp.asarray(np.tile(q, 2)[:, None] / 2)
    masked = jnp.asarray(np.tile(masks, (2, 1, 1)))
    inputs = masked_inputs(config, book, tokens, masked, weights, -1)
    sums = loss_sums(make_head(config, book), network, inputs)
    assert float(sums.marginal) == pytest.approx(np.log(2), abs=1e-9)
    assert float(sums.joint) == pytest.approx(np.log(2) / distance, abs=1e-9)


FINITE = {
    "l1": [4.7179, 4.5706, 4.4970, 4.4602, 4.4418, 4.4280],
    "l4": [4.7179, 4.5870, 4.5072, 4.4655, 4.4445, 4.4287],
    "l4-affine": [4.7179, 4.5909, 4.5098, 4.4669, 4.4452, 4.4288],
}


def finite_nelbos(name: str, numbers: Sequence[int]) -> list[float]:
    """For each number of steps: sum over them and (mask, later mask) pairs of their probability
    times the reveal cost."""
    length, codes = BOOKS[name]
    book, config = codebook(length, codes), run_config(length)
    n, pairs = L * length, all_pairs()
    p = pair_probabilities()[pairs[:, 0], pairs[:, 1]]
    task = estimators.make_task(config, book, eos_id=-1)

    @jax.jit
    def cost(masked_LxS, later_LxS):
        shape = (len(pairs), L, length)
        inputs = estimators.hidden(task, rows_of(pairs), jnp.broadcast_to(masked_LxS, shape))
        later = jnp.broadcast_to(later_LxS, shape)
        return (p * estimators.row_nats(task.head, bayes(book), inputs, later)[1]).sum()

    states = np.array(list(itertools.product(range(3), repeat=n)))  # 0 seen, 1 revealed, 2 later
    masked, later = (states > 0), (states == 2)
    shape = (-1, L, length)
    costs = np.asarray(
        jax.lax.map(
            lambda pair: cost(*pair),
            (jnp.asarray(masked.reshape(shape)), jnp.asarray(later.reshape(shape))),
            batch_size=27,
        )
    )

    def chance(t: float, s: float) -> np.ndarray:
        return np.array([1 - t, t - s, s])[states].prod(1)

    return [
        sum(float(chance(i / steps, (i - 1) / steps) @ costs) for i in range(1, steps + 1))
        for steps in numbers
    ]


@pytest.mark.parametrize(
    "name", ["l1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("l4", "l4-affine"))]
)
def test_finite_step_bound(name):
    got = finite_nelbos(name, (1, 2, 4, 8, 16, 64))
    np.testing.assert_allclose(got, FINITE[name], atol=6e-5)


@pytest.mark.parametrize(("name", "seed"), [("l1", 0), ("l2", 1), ("l2-affine", 2), ("l4", 3)])
def test_wrong_tables_never_beat_their_exact_likelihood(name, seed):
    """NELBO(x) >= -log p_theta(x) of the any-order model, for every sequence.

    The exact value comes by dynamic programming over subsets: f[M] = mean_{j in M} P_j f[M - j].
    """
    length, codes = BOOKS[name]
    book, config = codebook(length, codes), run_config(length)
    masks, pairs, n = all_masks(length), all_pairs(), L * length
    task = estimators.make_task(config, book, -1)
    network = wrong(book, seed)
    tokens = jnp.asarray(np.repeat(pairs, len(masks), axis=0))
    inputs = estimators.hidden(
        task, rows_of(tokens), jnp.asarray(np.tile(masks, (len(pairs), 1, 1)))
    )
    nats_B, _ = estimators.row_nats(task.head, network, inputs)
    counts = masks.sum((1, 2))
    q = np.where(counts > 0, mask_weights(config.objective, n)[counts], 0.0)
    nelbo = np.asarray(nats_B).reshape(len(pairs), len(masks)) @ q

    z, eye = network(inputs.digits_BxLxS, None, None)
    slots, _ = subtoken_head_reference(
        task.head,
        z.reshape(-1, V),
        eye,
        jnp.asarray(book.rows)[tokens].reshape(-1),
        inputs.masked_BxLxS.reshape(-1, length),
    )
    p = np.exp(np.asarray(slots)).reshape(len(pairs), len(masks), n)
    f = np.ones((len(pairs), len(masks)))
    for m in range(1, len(masks)):
        hidden = [j for j in range(n) if m >> j & 1]
        f[:, m] = np.mean([p[:, m, j] * f[:, m & ~(1 << j)] for j in hidden], axis=0)
    exact = -np.log(f[:, -1])
    assert (nelbo >= exact - 1e-12).all()
    assert (nelbo > exact + 1e-3).mean() > 0.9  # and a wrong table does leave a gap


def sampled_training_loss(make_inputs: Callable[..., Inputs], count: int = 1 << 17) -> tuple:
    """Mean marginal loss per pair of `training_inputs` on samples of the source, and its target."""
    length, codes = BOOKS["l2-affine"]
    book, config = codebook(length, codes), run_config(length, batch=count)
    p = pair_probabilities().reshape(-1)
    rng = np.random.default_rng(0)
    # Systematic resampling: the sample's own entropy is known and close to the source's.
    index = np.searchsorted(np.cumsum(p), (np.arange(count) + rng.random()) / count)
    pairs = all_pairs()[np.minimum(rng.permutation(index), V * V - 1)]
    inputs = make_inputs(config, book, jnp.asarray(pairs), jnp.arange(count), step_key(0, 0), -1)
    sums = loss_sums(make_head(config, book), bayes(book), inputs)
    return float(sums.marginal) * L / float(inputs.target_BxL.sum()), inputs, sums


# About four standard errors of 131,072 sequences (heavy 1/t tail); what this cannot see, clips of
# small times above all, test_schedule.py and test_corrupt.py check exactly.
SAMPLED_TOLERANCE = 0.05


def test_corruption_and_weights_give_the_entropy():
    value, inputs, _ = sampled_training_loss(training_inputs)
    assert value == pytest.approx(entropy(), abs=SAMPLED_TOLERANCE)
    hidden = np.asarray(inputs.masked_BxLxS).mean()
    assert hidden == pytest.approx(0.5, abs=0.005)


def mutant_weight_one_over_k(*args):
    inputs = training_inputs(*args)
    n = inputs.masked_BxLxS[0].size
    k = inputs.masked_BxLxS.sum((1, 2))
    return inputs._replace(
        weight_BxL=jnp.where(k > 0, n / jnp.maximum(k, 1), 0)[:, None] * jnp.ones((1, L))
    )


def mutant_divide_by_masked(*args):
    inputs = training_inputs(*args)
    return inputs._replace(target_BxL=inputs.masked_BxLxS.any(-1))


def mutant_shifted_target(*args):
    inputs = training_inputs(*args)
    return inputs._replace(token_BxL=jnp.roll(inputs.token_BxL, 1, axis=1))


def mutant_clipped_time(*args):
    inputs = training_inputs(*args)
    return inputs._replace(weight_BxL=jnp.minimum(inputs.weight_BxL, 1 / 0.3))


@pytest.mark.parametrize(
    "mutant",
    [mutant_weight_one_over_k, mutant_divide_by_masked, mutant_shifted_target, mutant_clipped_time],
)
def test_mutants_are_caught(mutant):
    value, *_ = sampled_training_loss(mutant)
    assert abs(value - entropy()) > 2 * SAMPLED_TOLERANCE


def test_the_joint_loss_in_place_of_the_marginal_is_caught():
    _, inputs, sums = sampled_training_loss(training_inputs)
    joint = float(sums.joint) * L / float(inputs.target_BxL.sum())
    assert abs(joint - entropy()) > 2 * SAMPLED_TOLERANCE


def test_token_masks_with_joint_reveals_are_a_bound_too():
    """Granularity mixing at rho = 1: whole tokens, charged jointly, give the entropy again."""

    def whole(config, *rest):
        mixed = dataclasses.replace(config.objective, token_mask_rho=1.0)
        return training_inputs(dataclasses.replace(config, objective=mixed), *rest)

    value, inputs, _ = sampled_training_loss(whole)
    assert value == pytest.approx(entropy(), abs=SAMPLED_TOLERANCE)
    masked = np.asarray(inputs.masked_BxLxS)
    assert (masked.all(-1) == masked.any(-1)).all()


@pytest.mark.parametrize("estimator", ["subtoken", "token", "finite:4"])
def test_evaluators_through_the_table(estimator):
    """Each shipped evaluator agrees with the exact value within its own standard error."""
    length, codes = BOOKS["l4-affine"]
    book, config = codebook(length, codes), run_config(length)
    task = estimators.make_task(config, book, -1)
    pairs = all_pairs()
    p = pair_probabilities()[pairs[:, 0], pairs[:, 1]]
    examples = np.repeat(pairs, np.maximum(1, np.round(p * 4096)).astype(int), axis=0)
    fraction = np.unique(examples, axis=0, return_counts=True)[1] / len(examples)
    rows = likelihood.grid(len(examples), 16)
    values = likelihood.draw(
        task,
        estimator,
        bayes(book),
        jnp.asarray(examples)[rows.example],
        jnp.asarray(rows.replicate),
        jnp.asarray(rows.example),
        jnp.asarray(rows.uniform),
    )
    nats = np.asarray(values[estimator]).reshape(16, -1)
    loss = likelihood.summarise(
        estimator, nats, np.full(len(examples), L), np.arange(len(examples)), ""
    )
    if estimator == "finite:4":
        got, want = loss.value * L, 4.5098
        assert abs(got - want) < 5 * loss.se_data * L
    else:  # Bayes tables: the bound of a sample is its cross-entropy under the source
        want = float(-(fraction * np.log(p)).sum())
        assert loss.value * L == pytest.approx(want, abs=5 * loss.se_mc * L)
    assert 0 < loss.se_mc < 0.01
    assert loss.kind == "nelbo"


def test_arm_is_charged_for_all_targets_without_outside_context():
    """A uniform i.i.d. source costs log V for ARM: BOS replaces the token before the block."""
    config = dataclasses.replace(run_config(1), family="arm")
    inputs = objectives.autoregressive_inputs(config, codebook(1), jnp.asarray([[3, 5]]), -1)
    assert inputs.digits_BxLxS[0, :, 0].tolist() == [V, 3]
    assert inputs.target_BxL.sum() == 2
