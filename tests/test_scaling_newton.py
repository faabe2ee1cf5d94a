import numpy as np

from prime_jax.scaling import newton

WIDE = np.full(2, -10.0), np.full(2, 10.0)


def rosenbrock(theta, _):
    x, y = theta.T
    value = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    gradient = np.stack([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)], 1)
    hessian = np.empty((len(theta), 2, 2))
    hessian[:, 0, 0] = 2 - 400 * (y - 3 * x**2)
    hessian[:, 0, 1] = hessian[:, 1, 0] = -400 * x
    hessian[:, 1, 1] = 200
    return value, gradient, hessian


def test_many_starts_reach_the_minimum_of_a_curved_valley():
    start = np.random.default_rng(0).uniform(-3, 3, (50, 2))
    end, value = newton.minimise(rosenbrock, start, *WIDE)
    np.testing.assert_allclose(end, 1.0, rtol=1e-9)
    assert value.max() < 1e-18


def test_a_saddle_is_left():
    def saddle(theta, _):
        x, y = theta.T
        value = x**2 - y**2 + y**4 + 1
        gradient = np.stack([2 * x, -2 * y + 4 * y**3], 1)
        hessian = np.zeros((len(theta), 2, 2))
        hessian[:, 0, 0], hessian[:, 1, 1] = 2, -2 + 12 * y**2
        return value, gradient, hessian

    end, value = newton.minimise(saddle, np.array([[3.0, 1e-3]]), *WIDE)
    np.testing.assert_allclose(np.abs(end), [[0, np.sqrt(0.5)]], atol=1e-7)
    np.testing.assert_allclose(value, 0.75)


def test_the_box_holds_and_the_other_unknown_still_converges():
    lower, upper = np.array([-10.0, -10.0]), np.array([0.5, 10.0])
    end, _ = newton.minimise(rosenbrock, np.array([[-1.0, 2.0], [4.0, 4.0]]), lower, upper)
    np.testing.assert_allclose(end, [[0.5, 0.25], [0.5, 0.25]], atol=1e-9)


def test_each_problem_gets_its_own_derivatives():
    targets = np.arange(10.0)

    def derivatives(theta, which):
        off = theta - targets[which][:, None]
        return (off**2).sum(1), 2 * off, np.tile(2 * np.eye(2), (len(theta), 1, 1))

    end, _ = newton.minimise(derivatives, np.zeros((10, 2)), np.full(2, -99.0), np.full(2, 99.0))
    np.testing.assert_allclose(end, np.stack([targets, targets], 1), atol=1e-9)


def test_a_step_below_rounding_ends_a_problem():
    """The minimum lies between two floats: neither better nor worse, and never nearer."""
    calls = []

    def derivatives(theta, which):
        calls.append(len(which))
        away = theta[:, 0] - 1e8 - 1e-9
        return 1 + 5e3 * away**2, 1e4 * away[:, None], np.full((len(theta), 1, 1), 1e4)

    start, bound = np.array([[1e8]]), np.array([1e9])
    theta, _ = newton.minimise(derivatives, start, -bound, bound)
    assert theta == start
    assert len(calls) == 2
