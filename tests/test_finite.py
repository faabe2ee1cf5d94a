"""`finite:T` at every T: the law of its draws by enumeration, and its limit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import V, all_pairs, bayes, codebook, pair_probabilities, run_config, wrong

from prime_jax.errors import UserError
from prime_jax.evaluate import estimators, likelihood

ONE_STEP = jax.jit(estimators.one_step, static_argnums=0)
P = pair_probabilities().reshape(-1)


def drawn(name: str, network, length: int, replicates: int) -> np.ndarray:
    """Nats of every pair, [R, pairs]."""
    task = estimators.make_task(run_config(length), codebook(length), -1)
    rows, pairs = likelihood.grid(V * V, replicates), jnp.asarray(all_pairs())
    draw = jax.jit(lambda *row: likelihood.draw(task, name, network, pairs[row[1]], *row)[name])
    return np.asarray(draw(*(jnp.asarray(x) for x in rows[:3])), float).reshape(replicates, -1)


def expected_charges(steps: int, candidate_LxS: np.ndarray) -> dict:
    """By definition: how often (mask, position, digits revealed there) is charged, over all steps."""
    shape, where = candidate_LxS.shape, np.argwhere(candidate_LxS)
    out: dict = {}
    for states in itertools.product(range(3), repeat=len(where)):  # seen, revealed, later
        states = np.array(states)
        chance = 0.0
        for i in range(1, steps + 1):
            law = np.array([1 - i / steps, 1 / steps, (i - 1) / steps])
            chance += law[states].prod()
        grid = np.zeros(shape, int)
        grid[tuple(where.T)] = states
        for row in range(shape[0]):
            if (grid[row] == 1).any():
                key = ((grid > 0).tobytes(), row, (grid[row] == 1).tobytes())
                out[key] = out.get(key, 0.0) + chance
    return out


def drawn_charges(steps: int, candidate_LxS: np.ndarray) -> dict:
    """The same of `one_step`: its uniforms are enumerated between the thresholds that matter."""
    length = candidate_LxS.shape[1]
    n, out = int(candidate_LxS.sum()), {}
    where = tuple(np.argwhere(candidate_LxS).T)
    for i in range(1, steps + 1):
        hides = sorted({0.0, i / steps, 1.0})
        some = [1 - (1 - 1 / i) ** m for m in range(1, length + 1)]
        reveals = sorted({0.0, 1.0, 1 / i, *(min(1.0, 1 / i / chance) for chance in some)})
        reveals = [x for k, x in enumerate(reveals) if k == 0 or x - reveals[k - 1] > 1e-9]

        def cells(ends):
            return [((a + b) / 2, b - a) for a, b in itertools.pairwise(ends)]

        rows = list(
            itertools.product(
                [((k + 0.5) / n, 1 / n) for k in range(n)],
                *[cells(hides)] * n,
                *[cells(reveals)] * n,
            )
        )
        points = np.array([[x for x, _ in row] for row in rows])
        chance_B = np.array([[c for _, c in row] for row in rows]).prod(1) / steps
        fields = np.zeros((2, len(rows), *candidate_LxS.shape))
        fields[0][(slice(None), *where)] = points[:, 1 : 1 + n]
        fields[1][(slice(None), *where)] = points[:, 1 + n :]
        masked, later, weight = ONE_STEP(
            steps,
            jnp.full(len(rows), float(i)),
            jnp.asarray(points[:, 0]),
            jnp.asarray(fields[0]),
            jnp.asarray(fields[1]),
            jnp.broadcast_to(jnp.asarray(candidate_LxS), fields[0].shape),
        )
        masked, later, weight = (np.asarray(x) for x in (masked, later, weight))
        for b, row in itertools.product(range(len(rows)), range(len(candidate_LxS))):
            now = masked[b, row] & ~later[b, row]
            assert now.any() == (weight[b, row] > 0)
            if now.any():
                key = (masked[b].tobytes(), row, now.tobytes())
                out[key] = out.get(key, 0.0) + chance_B[b] * weight[b, row]
    return out


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("hidden", [[[1, 1, 1]], [[1], [1], [1]], [[1, 1], [1, 0]]])
def test_the_draws_have_the_law_of_the_steps(steps, hidden):
    """Every charge, in expectation, exactly as often as the T steps together make it."""
    candidate = np.array(hidden, bool)
    wanted = {key: c for key, c in expected_charges(steps, candidate).items() if c}
    found = {key: c for key, c in drawn_charges(steps, candidate).items() if c}
    assert wanted.keys() == found.keys()
    for key, chance in wanted.items():
        assert found[key] == pytest.approx(chance, rel=2e-5)


@pytest.mark.parametrize("length", [1, 2])
def test_one_step_reveals_everything_at_once(length):
    """And has no noise: finite:1 is the product of the tokens' own laws."""
    one = drawn("finite:1", wrong(codebook(length), 3), length, 2)
    np.testing.assert_array_equal(one[0], one[1])
    p = pair_probabilities().sum(1)
    alone = drawn("finite:1", bayes(codebook(length)), length, 1)[0]
    np.testing.assert_allclose(alone, -np.log(np.outer(p, p).reshape(-1)), rtol=2e-5)


@pytest.mark.parametrize("steps", [10**3, 10**5, 10**9])
def test_many_steps_tend_to_the_subtoken_bound(steps):
    """Within the errors, which do not grow with the steps; nothing is ever missed."""
    network, runs = wrong(codebook(4), 7), 64
    many = drawn(f"finite:{steps}", network, 4, runs)
    marginal = drawn("subtoken", network, 4, runs)
    assert many.min() > 0
    (a, ea), (b, eb) = ((m.mean(), m.std(ddof=1) / runs**0.5) for m in (many @ P, marginal @ P))
    assert abs(a - b) < 3.5 * np.hypot(ea, eb)
    assert 0.3 * eb < ea < 3 * eb


def test_a_step_of_many_weighs_no_more_than_the_candidates():
    rng, rows = np.random.default_rng(0), 4000
    field = lambda *shape: jnp.asarray(rng.random((rows, *shape)), jnp.float32)  # noqa: E731
    candidate = jnp.ones((rows, 3, 4), bool)
    for steps in (2**20, 10**9):
        step = 1 + jnp.floor(field() ** 4 * steps)
        masked, later, weight = ONE_STEP(steps, step, field(), field(3, 4), field(3, 4), candidate)
        assert np.isfinite(weight).all()
        assert weight.sum(1).max() <= 12 * (1 + 1e-5)
        assert (weight.sum(1) > 0).all()
        now = masked & ~later
        np.testing.assert_array_equal(now.any(-1), masked.any(-1))
        one = now.sum(-1) == 1
        k, h = masked.sum((1, 2)), masked.sum(-1)
        assert one[np.asarray(step) > 1000].mean() > 0.4
        wanted = 12 / k[:, None] * h
        far = np.asarray(step) > 10**5
        np.testing.assert_allclose(weight[far], wanted[far], rtol=2e-4)


def test_a_row_without_anything_to_hide_costs_nothing():
    none = jnp.zeros((1, 2, 2), bool)
    half = jnp.full((1, 2, 2), 0.5)
    masked, _, weight = ONE_STEP(3, jnp.ones(1), jnp.zeros(1), half, half, none)
    assert not masked.any()
    np.testing.assert_array_equal(weight, 0)


@pytest.mark.parametrize("name", ["finite:0", "finite:-1", "finite:²", "finite:1000000001"])
def test_numbers_of_steps_that_are_none(name):
    with pytest.raises(UserError, match="finite:T"):
        likelihood.estimator(name)
