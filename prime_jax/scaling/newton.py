"""Saddle-free damped Newton inside a box, for many small problems at once.

A problem has few unknowns (five here), so its Hessian is exact and cheap; what costs is the
thousands of problems (starts, bootstrap replicates), hence one numpy call for all of them.
Taking |eigenvalues| makes every step a descent direction also where the objective is not convex
(Dauphin et al., 2014).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# (theta_PxK, problem indices_P) -> value_P, gradient_PxK, Hessian_PxKxK
Derivatives = Callable[[Array, NDArray[np.intp]], tuple[Array, Array, Array]]

SHRINK, GROW = 0.1, 4.0
LEAST_DAMPING, MOST_DAMPING = 1e-14, 1e12
IDLE = 4  # consecutive accepted steps without progress in float64 that end a problem


def minimise(
    derivatives: Derivatives, start_PxK: Array, lower_K: Array, upper_K: Array, steps: int = 500
) -> tuple[Array, Array]:
    """Minimise P problems of K unknowns.

    Args:
        derivatives: value, gradient and Hessian of the problems with the given indices.
        start_PxK: a start per problem; it is moved into the box.
        lower_K, upper_K: the box.
        steps: most evaluations per problem.

    Returns:
        theta_PxK and value_P. The value is never above that of the start.
    """
    theta = np.clip(np.asarray(start_PxK, dtype=np.float64), lower_K, upper_K)
    active = np.arange(len(theta))
    value, gradient, hessian = derivatives(theta, active)
    damping = np.full(len(theta), 1e-2)
    idle = np.zeros(len(theta), dtype=int)
    for _ in range(steps):
        if not len(active):
            break
        here = theta[active]
        step = _step(here, gradient[active], hessian[active], damping[active], lower_K, upper_K)
        trial = np.clip(here + step, lower_K, upper_K)
        new_value, new_gradient, new_hessian = derivatives(trial, active)
        better = new_value <= value[active]
        gain = value[active] - new_value
        done = active[better]
        theta[done], value[done] = trial[better], new_value[better]
        gradient[done], hessian[done] = new_gradient[better], new_hessian[better]
        damping[active] *= np.where(better, SHRINK, GROW)
        damping = np.maximum(damping, LEAST_DAMPING)
        stalled = better & (gain <= 1e-15 * new_value)
        idle[active] = np.where(stalled, idle[active] + 1, np.where(better, 0, idle[active]))
        stuck = ~better & (np.all(trial == here, axis=1) | (damping[active] > MOST_DAMPING))
        active = active[(idle[active] < IDLE) & ~stuck]
    return theta, value


def free(theta: Array, gradient: Array, lower_K: Array, upper_K: Array) -> NDArray[np.bool_]:
    """Unknowns that may move: not held at a bound by a gradient that points out of the box."""
    return ~(((theta <= lower_K) & (gradient > 0)) | ((theta >= upper_K) & (gradient < 0)))


def _step(
    theta: Array, gradient: Array, hessian: Array, damping: Array, lower_K: Array, upper_K: Array
) -> Array:
    moves = free(theta, gradient, lower_K, upper_K)
    gradient = np.where(moves, gradient, 0.0)
    hessian = hessian * (moves[:, :, None] & moves[:, None, :])
    eigenvalues, vectors = np.linalg.eigh(hessian)
    size = np.abs(eigenvalues)
    largest = np.maximum(size.max(axis=1, keepdims=True), 1e-300)
    size += (damping[:, None] + 1e-15) * largest
    along = np.einsum("pij,pi->pj", vectors, gradient) / size
    return -np.einsum("pij,pj->pi", vectors, along)
