import numpy as np
import pytest
from scaling_cases import LAW, chinchilla, published, surface

from prime_jax.scaling import approach3, intervals, newton
from prime_jax.scaling.laws import Compute, optimum


def test_weights_keep_the_number_of_runs_of_each_budget():
    strata = np.repeat([1.0, 2.0, 5.0], [4, 6, 3])
    weights = intervals.bootstrap_weights(strata, 500, seed=1)
    for stratum, size in ((1.0, 4), (2.0, 6), (5.0, 3)):
        np.testing.assert_array_equal(weights[:, strata == stratum].sum(axis=1), size)
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.2)
    np.testing.assert_array_equal(weights, intervals.bootstrap_weights(strata, 500, seed=1))
    assert (weights != intervals.bootstrap_weights(strata, 500, seed=2)).any()


def test_every_replicate_reaches_what_many_starts_reach():
    points = published("mdm")
    p = approach3.problem(points.params, points.tokens, points.loss)
    fit = approach3.fit(p)
    weights = intervals.bootstrap_weights(points.budget, 5, seed=0)
    laws = intervals.resample(p, fit, weights)
    values = p.derivatives(p.form.theta(laws), weights)[0]
    for k, value in enumerate(values):
        one = weights[k : k + 1]
        ends = newton.minimise(
            lambda t, _, w=one: p.derivatives(t, w), p.form.starts(p.log_loss_n), *p.box()
        )
        assert value <= ends[1].min() * (1 + 1e-9)


def interval_of_best_size(noise, seed):
    """95 % interval of log N*(1e23)."""
    points = surface(noise=noise, seed=seed)
    p = approach3.problem(points.params, points.tokens, points.loss)
    laws = intervals.resample(
        p, approach3.fit(p), intervals.bootstrap_weights(points.budget, 120, seed)
    )
    return np.log(intervals.percentiles(optimum(laws, Compute(), 1e23).params))


def test_intervals_shrink_with_the_noise():
    wide, narrow = (np.ptp(interval_of_best_size(noise, 1)) for noise in (0.004, 0.0004))
    assert narrow < wide / 3


def test_wild_errors_of_independent_runs_give_the_spread_of_redrawn_ones():
    points = published("prime")
    for objective in ("huber", "ls"):
        p = approach3.problem(points.params, points.tokens, points.loss, objective=objective)
        fit = approach3.fit(p)
        drawn = intervals.resample(p, fit, intervals.bootstrap_weights(points.budget, 300, seed=0))
        wild = intervals.wild_resample(p, fit, np.arange(len(points.loss)), 300, seed=0)
        widths = [
            np.ptp(np.log(intervals.percentiles(optimum(laws, Compute(), 1e21).params, 0.8)))
            for laws in (drawn, wild)
        ]
        assert widths[1] == pytest.approx(widths[0], rel=0.35)


def test_checkpoints_of_one_run_share_its_luck():
    # Sixteen runs of six checkpoints; what is off is off for all of a run.
    rng = np.random.default_rng(0)
    params, run = np.repeat(np.geomspace(3e7, 3e9, 16), 6), np.repeat(np.arange(16), 6)
    tokens = params * np.tile(np.geomspace(2, 100, 6), 16)
    loss = LAW.loss(params, tokens) * np.exp(4e-3 * rng.standard_normal(16)[run])
    p = approach3.problem(params, tokens, loss * np.exp(4e-4 * rng.standard_normal(96)))
    fit = approach3.fit(p)
    together, apart = (
        np.std(intervals.wild_resample(p, fit, of, 200, seed=0).alpha)
        for of in (run, np.arange(96))
    )
    assert together > 1.5 * apart
    again = intervals.wild_resample(p, fit, run, 200, seed=0)
    assert np.std(again.alpha) == together


def test_factors_of_the_wild_bootstrap():
    factors = intervals.WEBB
    assert (factors.mean(), np.mean(factors**2)) == pytest.approx((0, 1))
    assert len(np.unique(factors)) == 6


def test_share_of_replicates_at_a_bound():
    points = surface()
    p = approach3.problem(points.params, points.tokens, points.loss)
    lower = p.box()[0]
    middle = approach3.fit(p).theta_K
    at_e = np.where(np.arange(5) == 0, lower, middle)
    fractions = intervals.at_bound(p, p.form.law(np.stack([middle, middle, middle, at_e])))
    assert fractions == {"E": 0.25, "A": 0, "alpha": 0, "B": 0, "beta": 0}


@pytest.mark.slow
def test_chinchilla_standard_errors():
    p = approach3.problem(*chinchilla())
    laws = intervals.resample(
        p, approach3.fit(p), intervals.bootstrap_weights(np.zeros(p.runs), 12_000, seed=0)
    )
    for name, error, within in (
        ("E", 0.025657, 0.05),
        ("A", 124.49, 0.05),
        ("B", 1293.17, 0.1),
        ("alpha", 0.015397, 0.05),
        ("beta", 0.020594, 0.05),
    ):
        assert np.std(getattr(laws, name)) == pytest.approx(error, rel=within), name
