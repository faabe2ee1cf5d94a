"""Do 95 % intervals hold the truth 95 times in 100? Of log N*(1e23), far beyond the runs."""

import numpy as np
import pytest
from scaling_cases import LAW, surface

from prime_jax.scaling import approach3, intervals
from prime_jax.scaling.laws import Compute, optimum

TARGET = 1e23
TRUTH = float(optimum(LAW, Compute(), TARGET).params)
BUDGETS = (3e18, 6e18, 1e19, 3e19, 6e19, 1e20, 3e20)
RATIOS = tuple(2.0 ** np.linspace(-2, 2, 9))


def by_profile(p, fit, points, seed):
    return intervals.profiles(p, fit, [p.form.best_size(Compute(), TARGET)])[0]


def by_bootstrap(p, fit, points, seed):
    laws = intervals.resample(p, fit, intervals.bootstrap_weights(points.budget, 400, seed))
    return intervals.percentiles(optimum(laws, Compute(), TARGET).params)


def covered(interval, repeats, **how):
    """How many of `repeats` surfaces of 63 noisy runs have the truth within their interval."""
    count = 0
    for seed in range(repeats):
        points = surface(budgets=BUDGETS, ratios=RATIOS, noise=0.004, seed=seed)
        p = approach3.problem(points.params, points.tokens, points.loss, **how)
        low, high = interval(p, approach3.fit(p), points, seed)
        count += (low is None or low <= TRUTH) and (high is None or high >= TRUTH)
    return count


def test_intervals_cover_the_truth():
    assert covered(by_profile, 20) >= 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interval", "objective"),
    [
        (by_profile, "huber"),
        (by_profile, "ls"),
        (by_bootstrap, "huber"),
    ],
)
def test_intervals_cover_as_often_as_they_say(interval, objective):
    assert 0.93 <= covered(interval, 500, objective=objective) / 500 <= 0.97
