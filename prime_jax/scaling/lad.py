"""The corner at which least absolute deviation has its minimum.

|r| has no second derivative at 0, and at the minimum a few residuals, up to the number of
unknowns, are exactly 0: the runs that the law goes through. There "the gradient is 0" becomes:
multipliers between -w and w of those runs balance the pull of all others (0 is a subgradient).
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import null_space
from scipy.optimize import lsq_linear

from prime_jax.scaling import newton

if TYPE_CHECKING:
    from prime_jax.scaling.approach3 import Problem

Array = NDArray[np.float64]

SMOOTHEST = 1e-7  # residual below which the objective is rounded off to find the corner
ZERO = 1e-10  # a residual that is none
NEAR = 100.0  # in units of that, a residual that may belong to the corner
STEPS = 20


def polish(p: "Problem", theta_5: Array) -> Array:
    """The exact minimum near that of the objective rounded off below `p.delta`.

    Newton's method on the conditions of optimality, with the runs of residual 0 given by the
    rounded-off minimum. The start is returned where that leads to nothing better.
    """
    size = np.abs(p.residual(theta_5))
    nearest = np.unique(size)[: len(theta_5)][-1]  # copies of a run count once
    through = size <= min(nearest, NEAR * p.delta)
    lower, upper = p.box()
    theta = theta_5
    for _ in range(STEPS):
        jacobian, pull, multiplier, hessian = _conditions(p, theta, through)
        moves = newton.free(theta, pull, lower, upper)
        corner = jacobian[through][:, moves]
        count, zeros = int(moves.sum()), np.zeros((len(corner), len(corner)))
        matrix = np.block([[hessian[np.ix_(moves, moves)], corner.T], [corner, zeros]])
        gradient = pull + jacobian[through].T @ multiplier
        right = np.concatenate([-gradient[moves], -p.residual(theta)[through]])
        step = np.zeros(5)
        step[moves] = np.linalg.lstsq(matrix, right, rcond=None)[0][:count]
        theta = np.clip(theta + step, lower, upper)
        if np.abs(step).max() < 1e-14:
            break
    return theta if p.value(theta) <= p.value(theta_5) else theta_5


def examine(p: "Problem", theta_5: Array) -> tuple[Array, float]:
    """The subgradient_5 closest to 0, and the curvature (as a share of the largest) in the
    directions that keep the residuals of the corner at 0; 1 where there is no such direction."""
    through = np.abs(p.residual(theta_5)) <= ZERO
    jacobian, pull, multiplier, hessian = _conditions(p, theta_5, through)
    moves = newton.free(theta_5, pull, *p.box())
    corner = jacobian[through]
    along = null_space(corner[:, moves]) if len(corner) else np.eye(int(moves.sum()))
    curvature = 1.0
    if along.size:
        reduced = np.linalg.eigvalsh(along.T @ hessian[np.ix_(moves, moves)] @ along)
        curvature = float(reduced[0] / np.abs(reduced).max())
    return pull + corner.T @ multiplier, curvature


def _conditions(
    p: "Problem", theta_5: Array, through_n: NDArray[np.bool_]
) -> tuple[Array, Array, Array, Array]:
    """Jacobian_nx5 of the residuals, pull_5 of the runs off the law, the best multipliers of those
    on it, and the Hessian_5x5 of the Lagrangian."""
    s_e, s_a, s_b, residual = p.shares(theta_5[None])
    features = (s_e, s_a, -p.x_n * s_a, s_b, -p.y_n * s_b)
    jacobian = np.concatenate(features).T
    slope = np.where(through_n, 0.0, p.weight_n * np.sign(residual[0]))
    pull = jacobian.T @ slope
    if through_n.any():
        scale = p.gradient_scale(theta_5[None])[0]
        limit = p.weight_n[through_n]
        moves = newton.free(theta_5, pull, *p.box())
        corner = (jacobian[through_n] / scale).T[moves]
        multiplier = lsq_linear(corner, -(pull / scale)[moves], (-limit, limit)).x
        slope[through_n] = multiplier
    else:
        multiplier = np.empty(0)
    hessian = p.assemble(s_e, s_a, s_b, slope[None], np.zeros_like(residual))[1][0]
    return jacobian, pull, multiplier, hessian
