import numpy as np
import pytest
from scaling_cases import LAW
from scipy.optimize import minimize_scalar

from prime_jax.scaling.laws import Compute, PowerLaw, exponent, fit_compute, optimum


@pytest.mark.parametrize("compute", [Compute(), Compute(11.0, 0.93)], ids=["6ND", "other"])
def test_optimum_is_the_minimum_along_a_budget(compute):
    for flops in (1e14, 1e21):
        best = optimum(LAW, compute, flops)

        def loss(x, flops=flops):
            return LAW.loss(np.exp(x), compute.tokens(flops, np.exp(x)))

        found = minimize_scalar(
            loss, bracket=(np.log(best.params) - 2, np.log(best.params) + 3), tol=1e-12
        )
        assert np.log(best.params) == pytest.approx(found.x, abs=1e-6)
        assert best.loss == pytest.approx(found.fun, rel=1e-12)
        assert compute.k * best.params**compute.q * best.tokens == pytest.approx(flops, rel=1e-12)


def test_exponent_is_the_slope_of_the_best_size():
    compute = Compute(9.0, 0.9)
    best = optimum(LAW, compute, np.array([1e18, 1e20]))
    slope = np.log(best.params[1] / best.params[0]) / np.log(100)
    assert exponent(LAW, compute) == pytest.approx(slope, rel=1e-12)
    assert exponent(LAW, Compute()) == pytest.approx(0.38 / (0.34 + 0.38))


def test_laws_of_arrays_give_one_optimum_each():
    laws = PowerLaw(*(np.array([v, 1.1 * v]) for v in (LAW.E, LAW.A, LAW.B, LAW.alpha, LAW.beta)))
    both = optimum(laws, Compute(), 1e19)
    assert both.params[0] == pytest.approx(optimum(LAW, Compute(), 1e19).params)
    assert both.loss.shape == (2,)


def test_huge_coefficients_do_not_overflow():
    steep = PowerLaw(E=1.0, A=np.exp(100.0), B=np.exp(150.0), alpha=4.9, beta=5.0)
    assert np.isfinite(optimum(steep, Compute(), 1e20).params)


def test_compute_of_6nd_is_exact_and_another_is_found():
    rng = np.random.default_rng(0)
    params, tokens = np.exp(rng.uniform(10, 20, 30)), np.exp(rng.uniform(15, 25, 30))
    assert fit_compute(6 * params * tokens, params, tokens) == Compute(6.0, 1.0, 0.0)
    other = fit_compute(8.5 * params**0.95 * tokens, params, tokens)
    assert (other.k, other.q) == pytest.approx((8.5, 0.95), rel=1e-9)
    assert other.error < 1e-9
    one_size = fit_compute(7 * 1e6 * tokens, np.full(30, 1e6), tokens)
    assert (one_size.k, one_size.q) == pytest.approx((7.0, 1.0))
