import csv
from pathlib import Path

import numpy as np
import pytest
from scaling_cases import LAW, published, surface

from prime_jax.scaling import approach3, bootstrap, newton
from prime_jax.scaling.laws import Compute, optimum

EPOCH = Path(__file__).parents[2] / "shared" / "data" / "scaling" / "chinchilla_epoch_points.csv"


def test_weights_keep_the_number_of_runs_of_each_budget():
    strata = np.repeat([1.0, 2.0, 5.0], [4, 6, 3])
    weights = bootstrap.weights(strata, 500, seed=1)
    for stratum, size in ((1.0, 4), (2.0, 6), (5.0, 3)):
        np.testing.assert_array_equal(weights[:, strata == stratum].sum(axis=1), size)
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.2)
    np.testing.assert_array_equal(weights, bootstrap.weights(strata, 500, seed=1))
    assert (weights != bootstrap.weights(strata, 500, seed=2)).any()


def test_every_replicate_reaches_what_many_starts_reach():
    points = published("mdm")
    p = approach3.problem(points.params, points.tokens, points.loss)
    fit = approach3.fit(p)
    weights = bootstrap.weights(points.budget, 5, seed=0)
    laws = bootstrap.laws(p, fit, weights)
    values = p.derivatives(p.theta(laws), weights)[0]
    for k, value in enumerate(values):
        one = weights[k : k + 1]
        ends = newton.minimise(
            lambda t, _, w=one: p.derivatives(t, w), approach3.starts(p), *p.box()
        )
        assert value <= ends[1].min() * (1 + 1e-9)


def interval_of_best_size(noise, seed):
    """95 % interval of log N*(1e23), far beyond the data."""
    points = surface(noise=noise, seed=seed)
    p = approach3.problem(points.params, points.tokens, points.loss)
    laws = bootstrap.laws(p, approach3.fit(p), bootstrap.weights(points.budget, 120, seed))
    return np.log(bootstrap.interval(optimum(laws, Compute(), 1e23).params))


def test_intervals_cover_the_truth():
    truth = np.log(optimum(LAW, Compute(), 1e23).params)
    ends = [interval_of_best_size(0.004, seed) for seed in range(20)]
    assert sum(low <= truth <= high for low, high in ends) >= 16


def test_intervals_shrink_with_the_noise():
    wide, narrow = (np.ptp(interval_of_best_size(noise, 1)) for noise in (0.004, 0.0004))
    assert narrow < wide / 3


def test_share_of_replicates_at_a_bound():
    points = surface()
    p = approach3.problem(points.params, points.tokens, points.loss)
    lower = p.box()[0]
    middle = approach3.fit(p).theta_5
    at_e = np.where(np.arange(5) == 0, lower, middle)
    shares = bootstrap.at_bound(p, p.law(np.stack([middle, middle, middle, at_e])))
    assert shares == {"E": 0.25, "A": 0, "alpha": 0, "B": 0, "beta": 0}


def chinchilla():
    if not EPOCH.exists():
        pytest.skip("the Chinchilla points are not beside this checkout (../shared/data/scaling)")
    with EPOCH.open(newline="") as file:
        rows = [
            [float(row[name]) for name in ("params", "flops", "loss")]
            for row in csv.DictReader(file)
        ]
    params, flops, loss = np.array(sorted(rows, key=lambda row: row[2])[:-5]).T
    return approach3.problem(params, flops / (6 * params), loss)


def test_chinchilla_points():
    fit = approach3.fit(chinchilla())
    published = {"E": 1.817218, "A": 477.826, "B": 2143.417, "alpha": 0.347310, "beta": 0.367172}
    assert vars(fit.law) == pytest.approx(published, rel=2e-6)
    assert fit.objective == pytest.approx(0.0010182740178, rel=1e-10)
    assert fit.certificate.agreeing == 1


@pytest.mark.slow
def test_chinchilla_standard_errors():
    p = chinchilla()
    laws = bootstrap.laws(
        p, approach3.fit(p), bootstrap.weights(np.zeros(len(p.x_n)), 12_000, seed=0)
    )
    for name, error, within in (
        ("E", 0.025657, 0.05),
        ("A", 124.49, 0.05),
        ("B", 1293.17, 0.1),
        ("alpha", 0.015397, 0.05),
        ("beta", 0.020594, 0.05),
    ):
        assert np.std(getattr(laws, name)) == pytest.approx(error, rel=within), name
