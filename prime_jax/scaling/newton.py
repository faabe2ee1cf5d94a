"""Saddle-free damped Newton inside a box, for many small problems at once.

A problem has few unknowns (five here), so its Hessian is exact and cheap; what costs is the
thousands of problems (starts, bootstrap replicates), hence one numpy call for all of them.
Taking |eigenvalues| makes every step a descent direction also where the objective is not convex
(Dauphin et al., 2014).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# (theta_PxK, problem indices_P) -> value_P, gradient_PxK, Hessian_PxKxK
Derivatives = Callable[[Array, NDArray[np.intp]], tuple[Array, Array, Array]]

SHRINK, GROW = 0.1, 4.0
GOOD = 0.25  # damping shrinks after a step that gains this fraction of what its gradient promised
FIRST_DAMPING, MIN_DAMPING, MAX_DAMPING = 1e-3, 1e-14, 1e12
LONGEST = 1.0  # step; the unknowns should be scaled so that they are of order one
LARGEST_CUT = 0.9  # of an unknown whose log is the unknown
ROUNDING = 1e-15  # a problem ends with the step that promises less than this fraction of its value


def minimise(
    derivatives: Derivatives,
    start_PxK: Array,
    lower_K: Array,
    upper_K: Array,
    floor: float = 0.0,
    logs: Sequence[int] = (),
    steps: int = 500,
) -> tuple[Array, Array]:
    """Minimise P problems of K unknowns.

    Args:
        derivatives: value (not below 0), gradient and Hessian of the problems with the given
            indices.
        start_PxK: a start per problem; it is moved into the box.
        lower_K, upper_K: the box.
        floor: a value that is as good as 0, because rounding gives as much.
        logs: unknowns that are logs of what the objective is closer to a parabola in; steps are
            straight in that.
        steps: most evaluations per problem.

    Returns:
        theta_PxK and value_P. But for rounding, the value is never above that of the start.
    """
    theta = np.clip(np.asarray(start_PxK, dtype=np.float64), lower_K, upper_K)
    active = np.arange(len(theta))
    value, gradient, hessian = derivatives(theta, active)
    damping = np.full(len(theta), FIRST_DAMPING)
    for _ in range(steps):
        if not len(active):
            break
        here = theta[active]
        step, slope, promise = _step(
            here,
            gradient=gradient[active],
            hessian=hessian[active],
            damping=damping[active],
            lower_K=lower_K,
            upper_K=upper_K,
            logs=logs,
        )
        last = promise <= ROUNDING * value[active] + floor
        trial = np.clip(here + step, lower_K, upper_K)
        new_value, new_gradient, new_hessian = derivatives(trial, active)
        gain = value[active] - new_value
        better = gain >= np.where(last, -4 * ROUNDING * value[active], 0.0)
        done = active[better]
        theta[done], value[done] = trial[better], new_value[better]
        gradient[done], hessian[done] = new_gradient[better], new_hessian[better]
        damping[active] *= np.where(gain >= GOOD * slope, SHRINK, np.where(better, 1.0, GROW))
        damping = np.maximum(damping, MIN_DAMPING)
        stuck = np.all(trial == here, axis=1) | ~better & (damping[active] > MAX_DAMPING)
        active = active[~last & ~stuck]
    return theta, value


def free(theta: Array, gradient: Array, lower_K: Array, upper_K: Array) -> NDArray[np.bool_]:
    """Unknowns that may move: not held at a bound by a gradient that points out of the box."""
    return ~(((theta <= lower_K) & (gradient > 0)) | ((theta >= upper_K) & (gradient < 0)))


def _step(
    theta: Array,
    gradient: Array,
    hessian: Array,
    damping: Array,
    lower_K: Array,
    upper_K: Array,
    logs: Sequence[int],
) -> tuple[Array, Array, Array]:
    """The step, what the gradient promises along it, and the gain of one without damping."""
    moves = free(theta, gradient, lower_K, upper_K)
    gradient = np.where(moves, gradient, 0.0)
    hessian = hessian * (moves[:, :, None] & moves[:, None, :])
    hessian[:, logs, logs] -= gradient[:, logs]  # by z = exp(theta - here), which is 1 here
    eigenvalues, vectors = np.linalg.eigh(hessian)
    size = np.abs(eigenvalues)
    largest = np.maximum(size.max(axis=1, keepdims=True), 1e-300)
    size += 1e-15 * largest
    along = np.einsum("pij,pi->pj", vectors, gradient)
    step = np.einsum("pij,pj->pi", vectors, -along / (size + damping[:, None] * largest))
    step *= np.minimum(1.0, LONGEST / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
    slope = -np.sum(step * gradient, axis=1)
    step[:, logs] = np.log1p(np.maximum(step[:, logs], -LARGEST_CUT))
    return step, slope, 0.5 * np.sum(along**2 / size, axis=1)
