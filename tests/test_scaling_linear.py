"""The linearised law: its derivatives, and what robust objectives cost."""

import dataclasses

import numpy as np
import pytest
import scaling_cases

from prime_jax.errors import UserError
from prime_jax.scaling import fits
from prime_jax.scaling.designs import linearise, loss_of_efficiency
from prime_jax.scaling.laws import Compute, PowerLaw, optimum
from prime_jax.scaling.settings import Settings

TARGET = 1e21
SQUARES = Settings(replicates=100, objective="ls")


@pytest.fixture(scope="module")
def linear():
    return linearise(fits.fit_family(scaling_cases.surface(noise=3e-3), SQUARES), SQUARES)


def test_gradients_are_those_of_the_law(linear):
    linear = dataclasses.replace(linear, compute=Compute(5.0, 1.1))
    law, (x, y) = linear.law, linear.centre
    theta = np.array([np.log(law.E), np.log(law.A) - law.alpha * x, law.alpha, np.log(law.B) - law.beta * y, law.beta])  # fmt: skip

    def at(theta):
        e, a, alpha, b, beta = theta
        return PowerLaw(np.exp(e), np.exp(a + alpha * x), np.exp(b + beta * y), alpha, beta)

    for k, unit in enumerate(1e-6 * np.eye(5)):
        high, low = at(theta + unit), at(theta - unit)
        best = [np.log(optimum(one, linear.compute, TARGET).params) for one in (high, low)]
        loss = [np.log(one.loss(3e8, 2e10)) for one in (high, low)]
        assert linear.optimum_gradient(TARGET)[k] == pytest.approx(
            (best[0] - best[1]) / 2e-6, rel=1e-5, abs=1e-8
        )
        feature = linear.features(np.array([3e8]), np.array([2e10]))[0, k]
        assert feature == pytest.approx((loss[0] - loss[1]) / 2e-6, rel=1e-5)


def test_weights_are_repeats(linear):
    points = scaling_cases.surface()
    twice = [np.tile(values, 2) for values in (points.params, points.tokens)]
    ones = np.ones(len(points.loss))
    weighted = linear.sd(TARGET, points.params, points.tokens, 2 * ones)
    assert weighted == pytest.approx(linear.sd(TARGET, *twice, np.tile(ones, 2)), rel=1e-9)
    with pytest.raises(UserError, match="do not determine"):
        linear.sd(TARGET, points.params[:4], points.tokens[:4], ones[:4])


@pytest.mark.parametrize(("noise", "sd"), [(1e-5, 1.0), (1e-3, None), (1.0, np.sqrt(np.pi / 2))])
def test_what_a_huber_loses_against_least_squares(noise, sd):
    """Location of normal samples: the sd of the Huber estimate over that of the mean."""
    if sd is None:
        samples = noise * np.random.default_rng(0).standard_normal((4000, 200))
        centre = np.zeros((4000, 1))
        for _ in range(50):
            centre += np.clip(samples - centre, -1e-3, 1e-3).mean(axis=1, keepdims=True)
        sd = centre.std() / (noise / np.sqrt(200))
    assert loss_of_efficiency(noise, Settings(delta=1e-3)) == pytest.approx(sd, rel=0.03)
