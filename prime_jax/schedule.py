"""Masking schedules: alpha_t, the NELBO weight w(t), and stratified training times.

`alpha` is the probability that a sub-token is visible at time t. Every schedule gives the same bound
if 1 - alpha covers [0, 1] (theory.md, "Forward process"); `check` rejects others.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import ObjectiveConfig
from prime_jax.errors import UserError

LOG_LINEAR_FLOOR = 1e-3  # MDLM's eps: alpha_1
BELL = 0.75  # the rest is uniform, so that no weight grows by more than 1 / (1 - BELL)
PIECES = 1024  # on which the density of bell is constant
EDGE = 1e-3  # alpha must reach within this of 1 and of 0


class Schedule(NamedTuple):
    """How sub-tokens become hidden; both functions are elementwise in t.

    Attributes:
        hidden: 1 - alpha_t.
        weight: w(t) = -alpha'_t / (1 - alpha_t), the rate at which hidden ones are revealed.
    """

    hidden: Callable[[ObjectiveConfig, jax.Array], jax.Array]
    weight: Callable[[ObjectiveConfig, jax.Array], jax.Array]


def _cosine_weight(config: ObjectiveConfig, t: jax.Array) -> jax.Array:
    """pi / 2 cot(pi t / 2), from the nearer end: there 1 - t, or t, is exact."""
    angle = jnp.pi / 2 * jnp.minimum(t, 1 - t)
    tangent = jnp.tan(angle)
    return jnp.pi / 2 * jnp.where(t < 0.5, 1 / jnp.where(t < 0.5, tangent, 1.0), tangent)


def _sigma(config: ObjectiveConfig, t: jax.Array) -> jax.Array:
    return config.sigma_min ** (1 - t) * config.sigma_max**t


def _geometric_weight(config: ObjectiveConfig, t: jax.Array) -> jax.Array:
    sigma = _sigma(config, t)
    return sigma * math.log(config.sigma_max / config.sigma_min) / jnp.expm1(sigma)


SCHEDULES: dict[str, Schedule] = {
    "linear": Schedule(lambda _, t: t, lambda _, t: 1 / t),
    "log-linear": Schedule(lambda _, t: (1 - LOG_LINEAR_FLOOR) * t, lambda _, t: 1 / t),
    "cosine": Schedule(lambda _, t: jnp.sin(jnp.pi / 2 * t), _cosine_weight),
    "poly": Schedule(lambda c, t: t**c.power, lambda c, t: c.power / t),
    "geometric": Schedule(lambda c, t: -jnp.expm1(-_sigma(c, t)), _geometric_weight),
}


def alpha(config: ObjectiveConfig, t: jax.Array) -> jax.Array:
    """Probability that a sub-token is visible at time t, elementwise."""
    return 1 - SCHEDULES[config.schedule].hidden(config, t)


def weight(config: ObjectiveConfig, t: jax.Array) -> jax.Array:
    """The weight of the cost at time t, elementwise: w(t).

    With discrete times it is n (alpha_s - alpha_t) / (1 - alpha_t), s = t - 1/n: n times the chance
    that a step reveals a masked sub-token. The mean over the n times is then D3PM's bound.
    """
    chosen, n = SCHEDULES[config.schedule], config.time_steps
    if n:
        hidden = chosen.hidden(config, t)
        return n * (hidden - chosen.hidden(config, t - 1 / n)) / hidden
    return chosen.weight(config, t)


def check(config: ObjectiveConfig) -> None:
    """Reject a schedule whose mask probability does not cover [0, 1].

    Raises:
        UserError: alpha_0 below 1 - 1e-3 or alpha_1 above 1e-3, with the values.
    """
    start, end = (float(alpha(config, jnp.float32(t))) for t in (0.0, 1.0))
    if start < 1 - EDGE - 1e-7 or end > EDGE + 1e-7:
        raise UserError(
            f"objective.schedule = {config.schedule}: alpha runs from {start:.4f} to {end:.4f} and "
            f"must reach {1 - EDGE} at t = 0 and {EDGE} at t = 1 (geometric: sigma_min at most "
            f"{-math.log(1 - EDGE):.4f}, sigma_max at least {-math.log(EDGE):.2f})"
        )


def stratum(index: jax.Array, count: int) -> jax.Array:
    """Interleaved strata: a permutation of range(count) in which every contiguous run of indices
    covers the whole range evenly, so that each device and micro-batch sees all noise levels."""
    # The stride is count times the golden ratio, but small enough for int32 products.
    stride = max(1, min(round(count * 0.6180339887), (2**31 - 1) // count - 64))
    while np.gcd(stride, count) != 1:
        stride += 1
    return index * stride % count


@cache
def _bell(sd: float, bell: float) -> tuple[np.ndarray, np.ndarray]:
    """Distribution function at the ends of PIECES, and the density on each, of `bell` parts of a
    normal distribution about 1/2 that is cut to [0, 1]; the rest is uniform."""
    t = np.linspace(0, 1, PIECES + 1)
    normal = np.array([math.erf((x - 0.5) / (sd * math.sqrt(2))) for x in t])
    below = bell * (normal - normal[0]) / (normal[-1] - normal[0]) + (1 - bell) * t
    return below, np.diff(below) * PIECES


def _law(config: ObjectiveConfig) -> tuple[np.ndarray, np.ndarray]:
    """`_bell` of a config; with the flat weight the density is the weighting, and is not mixed."""
    return _bell(config.times_sd, 1.0 if config.weight == "flat" else BELL)


def density(config: ObjectiveConfig, t: jax.Array) -> jax.Array:
    """Density of the training times at t, elementwise: the integrand is divided by it."""
    if config.times == "uniform":
        return jnp.ones_like(t)
    piece = jnp.clip(jnp.floor(t * PIECES).astype(jnp.int32), 0, PIECES - 1)
    return jnp.asarray(_law(config)[1], t.dtype)[piece]


def times(config: ObjectiveConfig, offset: jax.Array, row: jax.Array, count: int) -> jax.Array:
    """Stratified training times t in [eps, 1), one per block of the *global* batch.

    With `times = bell` the strata go through the inverse of its distribution function.

    Args:
        offset: [] in [0, 1), shared by all hosts (drawn from seed and step).
        row: int, any shape: the blocks of the global batch on this device (without block
            diffusion a sequence is one block).
        count: blocks in the global batch.
    """
    u = (offset + stratum(row, count) / count) % 1.0
    if config.times == "bell":
        below = jnp.asarray(_law(config)[0], u.dtype)
        u = jnp.interp(u, below, jnp.linspace(0, 1, PIECES + 1, dtype=u.dtype))
    t = config.time_eps + (1 - config.time_eps) * u
    return jnp.ceil(t * config.time_steps) / config.time_steps if config.time_steps else t
