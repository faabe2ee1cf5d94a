"""The lowest loss as a law of compute alone."""

from dataclasses import replace

import numpy as np
import pytest
from scaling_cases import published, write_csv
from scipy.optimize import least_squares

from prime_jax import scaling
from prime_jax.cli import main
from prime_jax.errors import UserError
from prime_jax.scaling import approach2, approach3, frontiers
from prime_jax.scaling.frontiers import FrontierForm, FrontierLaw
from prime_jax.scaling.intervals import profiles
from prime_jax.scaling.laws import fit_compute
from prime_jax.scaling.settings import DEFAULTS

# Seven budgets of a published suite, and what its law with L_inf = 1.6 said of the last.
FLOPS = np.array([1e18, 3e18, 1e19, 3e19, 1e20, 3e20, 1e21])
LOSS = np.array([3.522, 3.339, 3.154, 3.000, 2.848, 2.725, 2.599])
LAW = FrontierLaw(1.7, 350.0, 0.13)


def test_the_published_prediction():
    found = frontiers.fit(FLOPS[:-1], LOSS[:-1], pinned=1.6)
    assert round(found.at(1e21).loss, 3) == 2.606
    low, high = found.at(1e21).interval
    assert low < 2.606 < high < 2.62
    told = frontiers.fit(FLOPS, LOSS, pinned=1.6).held_out
    last = next(one for one in told if one.fitted == 3e20)
    assert (last.flops, last.measured, round(last.predicted, 3)) == (1e21, 2.599, 2.606)


@pytest.mark.parametrize("pinned", [None, LAW.L_inf])
def test_without_noise_the_law_comes_back(pinned):
    found = frontiers.fit(FLOPS, LAW.loss(FLOPS), pinned)
    assert vars(found.params) == pytest.approx(vars(LAW), rel=1e-6)
    assert found.certificate.converged
    assert found.certificate.agreeing == 1
    assert found.error.rms < 1e-9
    assert found.at(1e22).loss == pytest.approx(LAW.loss(1e22))


@pytest.mark.parametrize(("pinned", "at"), [(None, np.inf), (None, 1e22), (1.6, np.inf)])
def test_derivatives_are_those_of_differences(pinned, at):
    form = FrontierForm.on(FLOPS, pinned)
    form = FrontierForm(form.x_n, form.centre, form.scale, pinned, at)
    law = FrontierLaw(pinned or LAW.L_inf, LAW.A, LAW.a)
    theta, weight = form.theta(law), np.linspace(1, 2, len(FLOPS))
    assert vars(form.law(theta)) == pytest.approx(vars(law))

    def value(theta):
        return np.sum(weight * form.predict(theta[None])[0] ** 2 / 2)

    def gradient(theta):
        log_loss, parts = form.predict(theta[None])
        return form.derivatives(parts, weight * log_loss, weight[None])[0][0]

    log_loss, parts = form.predict(theta[None])
    np.testing.assert_allclose(np.exp(log_loss[0]), law.loss(FLOPS))
    step = 1e-5 * np.eye(len(theta))
    slopes = [(value(theta + h) - value(theta - h)) / 2e-5 for h in step]
    np.testing.assert_allclose(gradient(theta), slopes, rtol=1e-7)
    bends = [(gradient(theta + h) - gradient(theta - h)) / 2e-5 for h in step]
    hessian = form.derivatives(parts, weight * log_loss, weight[None])[1][0]
    np.testing.assert_allclose(hessian, bends, rtol=1e-6, atol=1e-8)


def test_it_is_the_minimum_that_scipy_finds():
    found = frontiers.fit(FLOPS, LOSS)

    def residuals(u):
        return np.log(u[0] + np.exp(u[1]) * (FLOPS / 1e19) ** -u[2]) - np.log(LOSS)

    other = least_squares(residuals, [1.6, 0.4, 0.1], xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert found.objective == pytest.approx(other.cost, rel=1e-8)
    assert [found.params.L_inf, found.params.a] == pytest.approx(other.x[[0, 2]], rel=1e-5)


def test_a_profile_ends_where_the_objective_has_risen_enough():
    """Of the loss at a budget: refitted with a penalty that holds it there."""
    found = frontiers.fit(FLOPS, LOSS)
    told = found.at(1e22)
    scatter = 2 * found.objective / (len(FLOPS) - 3)
    limit = 7.708647  # F(1, 4) at 95 %
    for end in told.interval:

        def residuals(u, end=end):
            base = end - np.exp(u[0]) * 1e3 ** -u[1]
            return np.log(base + np.exp(u[0]) * (FLOPS / 1e19) ** -u[1]) - np.log(LOSS)

        held = least_squares(residuals, [0.4, found.params.a], xtol=1e-14, ftol=1e-14)
        rise = 2 * (held.cost - found.objective) / scatter
        assert rise == pytest.approx(limit, rel=1e-4)


def test_a_budget_below_the_data_has_an_interval_and_is_called_so():
    found = frontiers.fit(FLOPS, LOSS)
    low, high = found.at(1e17).interval
    assert low < found.at(1e17).loss < high < 4.2
    assert [found.at(c).decades for c in (1e17, 3e19, 1e22)] == pytest.approx([-1, 0, 1])
    wide = found.at(1e17).with_model_error
    assert wide[0] < low < high < wide[1]


def covered(pinned, repeats):
    """How often the profile intervals of a, and of the loss at 1e22, hold the truth."""
    counts = np.zeros(2)
    for seed in range(repeats):
        noise = 0.002 * np.random.default_rng(seed).standard_normal(len(FLOPS))
        p = frontiers.problem(FLOPS, LAW.loss(FLOPS) * np.exp(noise), pinned)
        found = approach3.fit(p)
        form, loss = p.form.loss_at(1e22)
        there = replace(found, theta_K=form.theta(found.law))
        pairs = (
            (profiles(p, found, [p.form.quantities()["a"]])[0], LAW.a),
            (profiles(replace(p, form=form), there, [loss])[0], LAW.loss(1e22)),
        )
        counts += [
            (low is None or low <= truth) and (high is None or truth <= high)
            for (low, high), truth in pairs
        ]
    return counts / repeats


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [None, LAW.L_inf])
def test_intervals_cover_as_often_as_they_say(pinned):
    for fraction in covered(pinned, 500):
        assert 0.93 <= fraction <= 0.97


def test_few_budgets_and_a_wrong_pin_are_refused():
    few = frontiers.fit(FLOPS[:3], LOSS[:3])
    assert not few.params
    assert few.warnings[0].code == "too_few_budgets"
    with pytest.raises(UserError, match="only 3 budgets"):
        few.at(1e21)
    high = frontiers.fit(FLOPS, LOSS, pinned=2.7)
    assert high.warnings[0].code == "e_above_lowest_loss"


def test_of_a_fit_it_goes_through_the_minima_of_approach_2():
    points = published("arm")
    compute = fit_compute(points.flops, points.params, points.tokens)
    two = approach2.fit(points, compute)
    found = frontiers.of_minima(two, 2.0, DEFAULTS)
    assert found.flops.tolist() == [curve.flops for curve in two.inside]
    assert found.pinned.pinned == 2.0
    assert found.pinned.params.L_inf == 2.0


def test_a_table_of_budgets_and_losses(tmp_path, capsys):
    rows = [{"flops": c, "loss": loss} for c, loss in zip(FLOPS[:-1], LOSS[:-1], strict=True)]
    rows = [row | {"tokens_per_second": 1e5} for row in rows]  # which is no D
    path = write_csv(tmp_path / "best.csv", rows)
    words = ["scaling", "frontier", str(path), "--family", "arm", "--floor", "1.6", "--at", "1e21"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "2.606" in said
    found = scaling.frontier(path, [1e21], family="arm", floor=1.6)
    assert round(found.families["arm"].pinned.predictions[0].loss, 3) == 2.606
    assert "2.606" in found.summary()
    low = scaling.frontier(path, [1e17], family="arm").summary()
    assert "1 decades below" in low
    assert main(["scaling", "frontier", str(path)]) == 2
    assert "no column 'family'" in capsys.readouterr().err
