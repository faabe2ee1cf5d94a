from dataclasses import replace

import numpy as np
import pytest
from scaling_cases import LAW, published, shared, surface
from scipy.optimize import minimize
from scipy.special import huber
from scipy.stats import f as f_distribution

from prime_jax.scaling import approach3, intervals
from prime_jax.scaling.laws import Compute, PowerLaw, exponent, optimum

OTHER = Compute(11.0, 0.92)


def fitted(points, **how):
    p = approach3.problem(points.params, points.tokens, points.loss, **how)
    return p, approach3.fit(p)


def all_quantities(p, compute, flops=(3e18, 1e23)):
    sizes = {flops: p.form.best_size(compute, flops) for flops in flops}
    return p.form.quantities(compute) | sizes


def value(quantity, theta_K):
    return quantity.natural(quantity.at(theta_K)[0])


@pytest.mark.parametrize("compute", [Compute(), OTHER], ids=["6ND", "other"])
def test_a_quantity_is_what_its_name_says(compute):
    p, fit = fitted(published("arm"))
    expected = vars(fit.law) | {"a": float(exponent(fit.law, compute))}
    for flops in (3e18, 1e23):
        expected[flops] = float(optimum(fit.law, compute, flops).params)
    found = {name: value(q, fit.theta_K) for name, q in all_quantities(p, compute).items()}
    assert found == pytest.approx(expected, rel=1e-10)


def test_a_quantity_takes_the_place_of_an_unknown():
    p, fit = fitted(published("mdm"))
    quantities = list(all_quantities(p, OTHER).values())
    held = intervals.Replaced.of(quantities)
    wanted = np.array([q.at(fit.theta_K)[0] + 0.1 for q in quantities])

    def fill(step=0.0):
        return held.fill(wanted, np.tile(fit.theta_K + step, (len(quantities), 1)))

    theta, first, second = fill()
    for k, quantity in enumerate(quantities):
        own = held.unknown[k]
        assert quantity.at(theta[k])[0] == pytest.approx(wanted[k], rel=1e-12)
        others = np.arange(5) != own
        np.testing.assert_array_equal(theta[k][others], fit.theta_K[others])
        slope = quantity.at(theta[k])[1]
        np.testing.assert_allclose(first[k][others], -(slope / slope[own])[others], rtol=1e-9)
    for k, step in enumerate(1e-5 * np.eye(5)):
        (_, up, _), (_, down, _) = fill(step), fill(-step)
        np.testing.assert_allclose(second[:, k], (up - down) / 2e-5, rtol=1e-5, atol=1e-7)


def test_gradients_of_quantities_against_differences():
    p, fit = fitted(published("mdm"))
    for quantity in all_quantities(p, OTHER).values():
        for k, step in enumerate(1e-5 * np.eye(5)):
            up, down = (quantity.at(fit.theta_K + sign * step)[0] for sign in (1, -1))
            expected = pytest.approx((up - down) / 2e-5, rel=1e-6, abs=1e-8)
            assert quantity.at(fit.theta_K)[1][k] == expected


@pytest.mark.parametrize("objective", ["huber", "ls"])
def test_at_an_end_the_constrained_minimum_has_risen_by_what_it_should(objective):
    p, fit = fitted(published("prime"), objective=objective)
    quantities = all_quantities(p, Compute())
    names = ("E", "beta", "a", 1e23)
    ends = intervals.profiles(p, fit, [quantities[name] for name in names])
    kappa, freedom = intervals.robust_scale(p, p.residual(fit.theta_K))
    limit = 0.5 * kappa * f_distribution.ppf(0.95, 1, freedom)
    for name, pair in zip(names, ends, strict=True):
        quantity = quantities[name]
        assert pair[0] < value(quantity, fit.theta_K) < pair[1]
        for end in pair:
            held = minimize(
                p.value, fit.theta_K, method="SLSQP", options={"ftol": 1e-16, "maxiter": 500},
                constraints={"type": "eq", "fun": lambda t, q=quantity, e=end: np.log(value(q, t) / e)},
            )  # fmt: skip
            assert held.fun - fit.objective == pytest.approx(limit, rel=1e-3)


def test_kappa_of_least_squares_is_the_residual_variance():
    p, fit = fitted(published("arm"), objective="ls")
    residual = p.residual(fit.theta_K)
    assert intervals.robust_scale(p, p.residual(fit.theta_K)) == pytest.approx(
        (residual @ residual / 60, 60)
    )
    wide = fitted(published("arm"), delta=1.0)
    assert intervals.robust_scale(wide[0], wide[0].residual(wide[1].theta_K))[0] == pytest.approx(
        residual @ residual / 60
    )


def test_the_objectives_agree_about_the_size_of_an_interval():
    points, log_widths = published("mdm"), []
    for objective in ("huber", "ls"):
        p, fit = fitted(points, objective=objective)
        (low, high), = intervals.profiles(p, fit, [p.form.best_size(Compute(), 1e23)])  # fmt: skip
        log_widths.append(np.log(high / low))
    assert max(log_widths) < 1.5 * min(log_widths)


def test_without_noise_an_interval_is_a_point():
    p, fit = fitted(surface())
    quantities = p.form.quantities(Compute())
    for (low, high), name in zip(
        intervals.profiles(p, fit, list(quantities.values())), quantities, strict=True
    ):
        truth = vars(LAW) | {"a": float(exponent(LAW, Compute()))}
        assert low == pytest.approx(truth[name], rel=1e-6)
        assert high == pytest.approx(truth[name], rel=1e-6)


def test_what_the_runs_do_not_bound_is_open():
    # E is far below the losses of these small budgets: it may as well be nothing.
    law = PowerLaw(E=0.05, A=40.0, B=60.0, alpha=0.2, beta=0.2)
    points = surface(law, budgets=(1e14, 3e14, 1e15), noise=0.02, seed=3)
    p, fit = fitted(points)
    (low, high), = intervals.profiles(p, fit, [p.form.quantities(Compute())["E"]])  # fmt: skip
    assert low is None
    assert high > 0.05


def test_checkpoints_of_a_run_count_once():
    points = published("arm")
    p, fit = fitted(points)
    four = np.arange(len(points.loss)) // 4
    quantity = [p.form.best_size(Compute(), 3e20)]
    (alone,), (shared_runs,) = (intervals.profiles(p, fit, quantity, runs=r) for r in (None, four))
    assert np.log(shared_runs[1] / shared_runs[0]) > 1.8 * np.log(alone[1] / alone[0])
    assert intervals.robust_scale(p, p.residual(fit.theta_K), four)[1] == 17 - 5


def data_constrained():
    """Muennighoff et al. 2023, equation 5, with the law of unrepeated data as published there:
    log residuals as a function of log R_D*, with the best R_N*."""
    column = shared("datablations_fit182.csv")
    params, tokens, unique, loss = (
        column[name].astype(float) for name in ("params", "tokens", "unique_tokens", "loss")
    )
    law = PowerLaw(np.exp(0.6254804), np.exp(6.255414), np.exp(7.3049974), 0.3526596, 0.3526596)
    enough = np.minimum(params, (law.A / law.B) ** (1 / law.alpha) * unique)

    def saturating(amount, part, r):
        return part - part * r * np.expm1(-(amount / part - 1) / r)

    def residuals(log_rd):
        effective = saturating(tokens, unique, np.exp(log_rd))
        every = (
            np.log(law.loss(saturating(params, enough, np.exp(log_rn)), effective) / loss)
            for log_rn in np.linspace(-1, 3, 401)
        )
        return min(every, key=lambda residual: huber(1e-3, residual).sum())

    return approach3.problem(params, tokens, loss), residuals


def test_half_life_of_repeated_data_is_not_identified():
    p, residuals = data_constrained()

    def objective(log_rd):
        return huber(1e-3, residuals(log_rd)).sum()

    for r_d, published_value in ((15, 0.015827), (80.8, 0.015808), (221.7, 0.015823)):
        assert objective(np.log(r_d)) == pytest.approx(published_value, abs=1.5e-6)
    kappa, freedom = intervals.robust_scale(p, residuals(np.log(80.8)))
    rise = 0.5 * kappa * f_distribution.ppf(0.95, 1, freedom)
    lowest = objective(np.log(80.8))
    assert lowest == min(map(objective, np.log([15, 40, 80.8, 120, 221.7])))
    for r_d in (15, 1e5):
        assert objective(np.log(r_d)) - lowest < rise


def test_another_level_is_another_width():
    p, fit = fitted(published("mdm"))
    quantity = [p.form.quantities(Compute())["a"]]
    widths = [np.ptp(intervals.profiles(p, fit, quantity, level)[0]) for level in (0.5, 0.8, 0.95)]
    assert widths == sorted(widths)


def test_weights_that_are_all_two_change_nothing():
    p, fit = fitted(published("mdm"))
    quantity = [p.form.quantities(Compute())["a"]]
    doubled = replace(p, weight_n=2 * p.weight_n)
    again = intervals.profiles(doubled, approach3.fit(doubled), quantity)
    assert again[0] == pytest.approx(intervals.profiles(p, fit, quantity)[0], rel=1e-3)
