from dataclasses import replace

import numpy as np
import pytest
from scaling_cases import LAW, points, surface

from prime_jax.scaling import noise
from prime_jax.scaling.laws import Compute, optimum


def grid(repeats, lrs=(1.0,), noise=0.0, curvature=0.0, seed=0):
    """Runs at five sizes of four budgets, `repeats` times at each learning rate; the best is 1."""
    rng = np.random.default_rng(seed)
    flops = np.repeat([1e18, 3e18, 1e19, 3e19], 5 * repeats * len(lrs))
    ratio = np.tile(np.repeat([0.25, 0.5, 1, 2, 4], repeats * len(lrs)), 4)
    lr = np.tile(np.tile(lrs, repeats), 20)
    params = optimum(LAW, Compute(), flops).params * ratio
    loss = LAW.loss(params, flops / (6 * params))
    loss = loss * np.exp(noise * rng.standard_normal(len(loss))) + curvature * np.log(lr) ** 2
    return replace(points("grid", flops, params, loss), lr=lr)


def test_without_repeats_a_floor_is_assumed_and_all_runs_weigh_the_same():
    errors = noise.of(surface())
    assert errors.seed.relative_sd == 0.0014
    assert errors.seed.basis == "assumed"
    assert errors.tuning is None
    assert errors.evaluation is None
    np.testing.assert_array_equal(errors.run_weights(0.004), 1.0)


def test_the_noise_of_repeats_is_measured():
    errors = noise.of(grid(repeats=6, noise=0.01))
    assert errors.seed.relative_sd == pytest.approx(0.01, rel=0.15)
    assert errors.seed.runs == 120
    np.testing.assert_array_equal(errors.run_weights(0.01), 1.0)


def test_what_the_evaluation_explains_of_repeats_is_not_counted_twice():
    runs = grid(repeats=6, noise=0.01)
    runs = replace(runs, loss_se=0.008 * runs.loss)
    errors = noise.of(runs)
    assert errors.evaluation.relative_sd == pytest.approx(0.008)
    assert errors.seed.relative_sd == pytest.approx(0.006, rel=0.3)
    np.testing.assert_allclose(errors.sd_n, 0.01, rtol=0.15)


def test_runs_of_another_learning_rate_are_no_repeats():
    runs = grid(repeats=1, lrs=(0.5, 1.0, 2.0), curvature=0.05)
    assert noise.repeated(runs.params, runs.tokens, runs.lr) == []
    assert len(noise.repeated(runs.params, runs.tokens, None)) == 20
    assert noise.of(runs).seed.basis == "assumed"


def test_the_curvature_of_learning_rates_is_measured():
    runs = grid(repeats=1, lrs=(0.25, 1.0, 2.0), curvature=0.05)
    errors = noise.of(runs)
    given_away = 0.05 * np.log(runs.lr) ** 2 / runs.loss
    assert errors.tuning.relative_sd == pytest.approx(np.sqrt(np.mean(given_away**2)), rel=1e-6)
    assert errors.tuning.runs == 60
    assert "measured" in errors.tuning.basis
    np.testing.assert_allclose(errors.sd_n**2, 0.0014**2 + given_away**2, rtol=1e-5)
    weight = errors.run_weights(0.0)
    assert weight.mean() == pytest.approx(1)
    assert weight[runs.lr == 1].min() > 20 * weight[runs.lr == 0.25].max()


def test_two_learning_rates_need_an_assumed_curvature():
    errors = noise.of(grid(repeats=1, lrs=(1.0, 2.0), curvature=0.03))
    assert "assumed" in errors.tuning.basis
    expected = 0.03 * np.log(2) ** 2
    assert errors.sd_n.max() == pytest.approx(expected / 3, rel=0.5)


def test_unknown_errors_are_taken_for_typical_ones():
    runs = surface()
    se = np.where(np.arange(20) < 5, np.nan, 0.002 * runs.loss)
    errors = noise.of(replace(runs, loss_se=se))
    assert errors.evaluation.runs == 15
    np.testing.assert_allclose(errors.run_weights(0.0), 1.0)


def test_a_precise_run_weighs_more_but_not_than_the_scatter_allows():
    runs = surface()
    se = np.where(np.arange(20) % 2, 0.01, 1e-5) * runs.loss
    errors = noise.of(replace(runs, loss_se=se))
    ratios = [np.ptp(np.log(errors.run_weights(scatter))) for scatter in (0.0, 0.02, 0.2)]
    assert np.exp(ratios[0]) == pytest.approx((0.01**2 + 0.0014**2) / 0.0014**2, rel=0.01)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[2] < 0.01


def test_scatter_is_that_of_normal_numbers_and_ignores_odd_ones():
    residual = 0.004 * np.random.default_rng(0).standard_normal(4000)
    residual[:40] = 10.0
    assert noise.scatter(residual, 5) == pytest.approx(0.004, rel=0.05)
