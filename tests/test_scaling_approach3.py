from dataclasses import replace

import numpy as np
import pytest
from scaling_cases import LAW, ORACLE, published, surface
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

from prime_jax.scaling import approach3
from prime_jax.scaling.laws import Compute, Law, optimum

FAMILIES = tuple(ORACLE["families"])


def problem_of(points):
    return approach3.problem(points.params, points.tokens, points.loss)


def plain_objective(points):
    """The published objective, written down without any of our code; x = e, a, alpha, b, beta."""
    n, d, loss = np.log(points.params), np.log(points.tokens), np.log(points.loss)

    def objective(x):
        terms = np.stack([np.full_like(n, x[0]), x[1] - x[2] * n, x[3] - x[4] * d])
        return huber(1e-3, logsumexp(terms, axis=0) - loss).sum()

    return objective


@pytest.mark.parametrize("family", FAMILIES)
def test_published_points(family):
    points, expected = published(family), ORACLE["families"][family]["expected"]
    fit = approach3.fit(problem_of(points))
    assert fit.objective == pytest.approx(expected["objective"], rel=1e-9)
    named = {name: expected[name] for name in vars(fit.law)}
    assert vars(fit.law) == pytest.approx(named, rel=2e-4)
    best = optimum(fit.law, Compute(), 2.887e20)
    assert best.params == pytest.approx(expected["params_at_2_887e20"], rel=1e-4)
    assert fit.certificate.converged
    assert fit.certificate.agreeing == 1
    assert fit.certificate.bounds == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_never_worse_than_many_starts_of_lbfgsb(family):
    points = published(family)
    problem, objective = problem_of(points), plain_objective(points)
    fit = approach3.fit(problem)
    law = fit.law
    ours = objective([np.log(law.E), np.log(law.A), law.alpha, np.log(law.B), law.beta])
    assert ours == pytest.approx(fit.objective, rel=1e-9)
    rng = np.random.default_rng(0)
    for theta in rng.choice(approach3.starts(problem), 6, replace=False):
        start = problem.law(theta)
        x = [np.log(start.E), np.log(start.A), start.alpha, np.log(start.B), start.beta]
        found = minimize(objective, x, method="L-BFGS-B", options={"maxiter": 300})
        assert ours <= found.fun * (1 + 1e-12)


def test_exact_recovery_without_noise():
    fit = approach3.fit(problem_of(surface()))
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(fit.law, name) == pytest.approx(getattr(LAW, name), rel=1e-8)
    assert fit.certificate.converged
    assert fit.certificate.agreeing > approach3.MOST


def test_gradient_and_hessian_against_differences():
    points = surface(noise=0.01)
    problem = problem_of(points)
    rng = np.random.default_rng(1)
    theta = approach3.starts(problem)[rng.choice(54, 6)] + 0.1 * rng.standard_normal((6, 5))
    # Residuals far from the kink at delta, on both sides of it, so that differences are smooth.
    for delta in (1e-6, 10.0):
        smooth = replace(problem, delta=delta)
        weight = rng.uniform(0, 2, (6, len(points.loss)))
        value, gradient, hessian = smooth.derivatives(theta, weight)
        assert value.shape == (6,)
        np.testing.assert_array_equal(hessian, hessian.transpose(0, 2, 1))
        for k in range(5):
            step = 1e-5 * np.eye(5)[k]
            up, down = (
                smooth.derivatives(theta + step, weight),
                smooth.derivatives(theta - step, weight),
            )
            np.testing.assert_allclose(
                gradient[:, k], (up[0] - down[0]) / 2e-5, rtol=1e-6, atol=1e-9 * delta
            )
            scale = np.abs(hessian).max()
            np.testing.assert_allclose(
                hessian[:, k], (up[1] - down[1]) / 2e-5, rtol=1e-6, atol=1e-8 * scale
            )


def test_the_value_is_the_published_objective_with_weights_as_copies():
    points = surface(noise=0.01)
    problem = problem_of(points)
    theta = approach3.starts(problem)[:1]
    law = problem.law(theta[0])
    x = [np.log(law.E), np.log(law.A), law.alpha, np.log(law.B), law.beta]
    one = problem.derivatives(theta, np.ones((1, len(points.loss))))[0][0]
    assert one == pytest.approx(plain_objective(points)(x), rel=1e-12)
    twice = np.ones((1, len(points.loss)))
    twice[0, 3] = 2
    copied = approach3.problem(
        *(np.append(v, v[3]) for v in (points.params, points.tokens, points.loss))
    )
    with_copy = copied.derivatives(copied.theta(law)[None], np.ones((1, len(points.loss) + 1)))[0][
        0
    ]
    assert problem.derivatives(theta, twice)[0][0] == pytest.approx(with_copy, rel=1e-12)


def test_law_and_theta_are_inverse():
    problem = problem_of(surface())
    again = problem.law(problem.theta(LAW))
    assert vars(again) == pytest.approx(vars(LAW), rel=1e-12)


def test_the_certificate_catches_a_fit_that_stopped_short():
    # The plotting script of MDM-Prime-v2 leaves A and B at their start, 400, and moves the rest.
    points = published("arm")
    problem = problem_of(points)
    objective = plain_objective(points)
    stuck = minimize(
        lambda x: objective([x[0], np.log(400), x[1], np.log(400), x[2]]), [0.5, 0.3, 0.3], method="Nelder-Mead",
        options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000},
    )  # fmt: skip
    law = Law(np.exp(stuck.x[0]), 400.0, 400.0, stuck.x[1], stuck.x[2])
    assert stuck.fun > 1.05 * approach3.fit(problem).objective
    certificate = approach3.certify(problem, problem.theta(law), np.array([]))
    assert not certificate.converged
    assert certificate.gradient > 100 * approach3.STATIONARY


def test_a_term_that_is_not_there_ends_at_a_bound():
    points = surface(
        Law(E=1.8, A=1e-30, B=2000.0, alpha=0.34, beta=0.38), ratios=(1, 2, 4, 8), noise=1e-3
    )
    params = np.tile([1e6, 3e6, 1e7, 3e7], 4)
    tokens = points.flops / (6 * params)
    loss = 1.8 + 2000 * tokens**-0.38
    fit = approach3.fit(approach3.problem(params, tokens, loss))
    assert fit.certificate.bounds
