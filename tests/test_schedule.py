"""Training times, exactly: integrals over them are integrals over [eps, 1)."""

import dataclasses
import re
import typing
from collections.abc import Callable
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax import schedule
from prime_jax.config import ObjectiveConfig, RunConfig, run_id, validate
from prime_jax.errors import UserError

CONFIG = ObjectiveConfig()
EPS = CONFIG.time_eps
SLOTS = 6
TOLERANCE = 1e-9  # polynomials under Gauss-Legendre quadrature leave rounding only


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def reveals(t: np.ndarray) -> np.ndarray:
    """w(t) q(mask | t) for masks of k = 1 .. SLOTS hidden slots, and t: all are polynomials."""
    k = np.arange(1, SLOTS + 1).reshape(-1, *[1] * t.ndim)
    return np.concatenate([t ** (k - 1) * (1 - t) ** (SLOTS - k), t[None]])


def integrals() -> np.ndarray:
    """Means of `reveals` over [eps, 1), from their antiderivatives."""
    out = []
    for k in range(1, SLOTS + 1):
        powers = [(comb(SLOTS - k, j) * (-1) ** j, k + j) for j in range(SLOTS - k + 1)]
        out.append(sum(c * (1 - EPS**p) / p for c, p in powers) / (1 - EPS))
    return np.array([*out, (1 + EPS) / 2])


def error(times: Callable, count: int, hosts: int, stratum: int = 0) -> float:
    """Largest error of the mean of `reveals` over all offsets of one stratum and all rows.

    As the offset passes through a stratum of width 1 / count, the rows of a batch together pass
    once through [0, 1): a quadrature over offsets is a composite one over times.
    """
    node, fraction = np.polynomial.legendre.leggauss(40)
    rows = np.arange(count).reshape(hosts, -1)
    total = np.zeros(SLOTS + 1)
    for offset, part in zip((stratum + (node + 1) / 2) / count, fraction / 2, strict=True):
        t = np.stack([times(CONFIG, jnp.float64(offset), jnp.asarray(row), count) for row in rows])
        total += part * reveals(t).mean((1, 2))
    return float(np.abs(total - integrals()).max())


def clipped(floor: float) -> Callable:
    return lambda *args: np.maximum(schedule.times(*args), floor)


@pytest.mark.parametrize(
    ("count", "hosts"), [(1, 1), (2, 1), (5, 1), (6, 3), (16, 1), (16, 4), (24, 8)]
)
def test_times_integrate_exactly(count, hosts):
    for stratum in {0, count // 2, count - 1}:
        assert error(schedule.times, count, hosts, stratum) < TOLERANCE


@pytest.mark.parametrize("floor", [1e-2, 1e-3])
@pytest.mark.parametrize(("count", "hosts"), [(1, 1), (16, 4)])
def test_a_clip_of_the_times_is_caught(count, hosts, floor):
    assert error(clipped(floor), count, hosts) > 2 * TOLERANCE


@pytest.mark.parametrize("count", [2, 5, 16])
def test_every_row_sees_all_times(count):
    """Over all offsets each row alone is uniform: no row, hence no host, keeps to some noise."""
    node, fraction = np.polynomial.legendre.leggauss(40)
    row, got = jnp.arange(count), np.zeros((SLOTS + 1, count))
    for stratum in range(count):
        for offset, part in zip((stratum + (node + 1) / 2) / count, fraction / 2, strict=True):
            t = np.asarray(schedule.times(CONFIG, jnp.float64(offset), row, count))
            got += part / count * reveals(t)
    np.testing.assert_allclose(got, np.tile(integrals(), (count, 1)).T, atol=TOLERANCE)


@pytest.mark.parametrize("hosts", [2, 4, 8])
@pytest.mark.parametrize("count", [16, 48, 256, 512, 1000])
def test_a_share_of_the_batch_spreads_over_all_times(count, hosts):
    """What a host or a micro-batch holds leaves no gap above three times its even spacing, or 0.05
    (where the stride is close to a fraction of small terms, as 317 / 512 is to 8 / 13)."""
    for part in np.arange(count).reshape(hosts, -1):
        u = np.sort(np.asarray(schedule.stratum(part, count)) / count)
        assert np.diff(u, append=1 + u[0]).max() <= max(3 / len(part), 0.05)


@pytest.mark.parametrize("count", [46_341, 100_000, 262_144])
def test_the_strata_of_a_very_large_batch_are_a_permutation(count):
    """Block diffusion counts blocks: index times stride must not leave int32."""
    with jax.enable_x64(False):
        found = np.asarray(jax.jit(schedule.stratum, static_argnums=1)(jnp.arange(count), count))
    assert np.array_equal(np.sort(found), np.arange(count))


@pytest.mark.parametrize("steps", [4, 10])
def test_discrete_times_are_drawn_equally_often(steps):
    config = dataclasses.replace(CONFIG, time_steps=steps)
    t = schedule.times(config, jnp.float64(0.3 / steps), jnp.arange(3 * steps), 3 * steps)
    values, counts = np.unique(np.round(np.asarray(t) * steps, 9), return_counts=True)
    np.testing.assert_array_equal(values, np.arange(1, steps + 1))
    np.testing.assert_array_equal(counts, 3)


NAMES = typing.get_args(typing.get_type_hints(ObjectiveConfig)["schedule"])


def test_every_name_of_the_config_has_a_schedule():
    assert tuple(schedule.SCHEDULES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_is_enough_for_a_weight_everywhere(name):
    """From both ends of (0, 1), against double precision."""
    config = dataclasses.replace(CONFIG, schedule=name)
    near = np.geomspace(1e-7, 0.5, 400, dtype=np.float32)
    t = np.unique(np.concatenate([near, 1 - near]))
    t = t[(t > 0) & (t < 1)]
    single, double = (np.asarray(schedule.weight(config, jnp.asarray(t, d))) for d in ("f4", "f8"))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, rtol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_the_rate_of_its_schedule(name):
    """w = -alpha' / (1 - alpha), by differentiation."""
    config = dataclasses.replace(CONFIG, schedule=name)
    t = jnp.linspace(0.01, 0.99, 99)
    slope = jax.vmap(jax.grad(lambda x: schedule.alpha(config, x)))(t)
    expected = -slope / (1 - schedule.alpha(config, t))
    np.testing.assert_allclose(schedule.weight(config, t), expected, rtol=1e-9)


def test_the_refusal_of_a_schedule_names_what_is_accepted():
    def sigmas(low, high):
        return dataclasses.replace(CONFIG, schedule="geometric", sigma_min=low, sigma_max=high)

    with pytest.raises(UserError) as error:
        schedule.check(sigmas(0.1, 1.0))
    low, high = (float(x) for x in re.findall(r"at (?:most|least) ([0-9.]+)\b", str(error.value)))
    schedule.check(sigmas(low, high))
    for refused in (sigmas(1.01 * low, high), sigmas(low, 0.99 * high)):
        with pytest.raises(UserError, match="geometric"):
            schedule.check(refused)


@pytest.mark.parametrize(
    ("changes", "other"), [({"schedule": "cosine"}, "schedule cosine"), ({"time_steps": 8}, "8")]
)
def test_bell_with_another_schedule_or_outside_its_range_is_refused(changes, other):
    bell = dataclasses.replace(CONFIG, times="bell")
    validate(RunConfig(objective=bell, steps=2000))
    with pytest.raises(UserError, match=f"needs schedule linear and time_steps 0, not .*{other}"):
        validate(RunConfig(objective=dataclasses.replace(bell, **changes), steps=2000))
    with pytest.raises(UserError, match=r"times_sd = 0.14: must be at least 0.15"):
        dataclasses.replace(bell, times_sd=0.14)


def test_a_spread_is_part_of_a_run_only_with_bell_times():
    def named(times: str, sd: float) -> str:
        return run_id(RunConfig(objective=ObjectiveConfig(times=times, times_sd=sd)))

    assert named("uniform", 0.3) == named("uniform", 0.2) == run_id(RunConfig())
    assert len({named("uniform", 0.3), named("bell", 0.2), named("bell", 0.3)}) == 3
