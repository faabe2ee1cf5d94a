"""The output head of every family: hidden states and head rows in, losses and gradients out.

`p` is the softmax over the tokens consistent with the visible sub-tokens. There are two losses over
the masked sub-tokens of a row (theory.md, "The head"):

    marginal   sum_j -log P_j,  P_j = sum_v p_v [C_vj = y_j]     a valid bound
    joint      -log p_x                                          the published training loss

`subtoken_loss` is for training, with given row weights. `subtoken_log_probs` returns the
log-probabilities of every row and supports any cotangent; `subtoken_log_masses` is for evaluation.
[N, V] is never stored. The dense reference is in `subtoken_head_reference`.

Head rows are in the order of their codes: `row_N` is `codebook.rows[token]`.
"""

from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp

from prime_jax.kernels import subtoken_head_mosaic, subtoken_head_xla
from prime_jax.kernels.common import NEG
from prime_jax.kernels.subtoken_head_base import (
    TINY,
    Coefficients,
    Head,
    HeadLoss,
    Masses,
    true_digits,
)

__all__ = ["Head", "HeadLoss", "subtoken_log_masses", "subtoken_log_probs", "subtoken_loss"]


def _implementation(head: Head) -> ModuleType:
    pallas = head.implementation == "pallas" and subtoken_head_mosaic.supports(head)
    return subtoken_head_mosaic if pallas else subtoken_head_xla


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def subtoken_loss(
    head: Head,
    h_NxD: jax.Array,
    head_VxD: jax.Array,
    row_N: jax.Array,
    masked_NxS: jax.Array,
    weight_N: jax.Array,
    whole_N: jax.Array | None = None,
) -> HeadLoss:
    """Weighted loss sums over N rows, differentiable in `h` and `head` through `head.loss`.

    The other sum is only reported: its cotangent is ignored.

    Args:
        h_NxD: hidden states, any float dtype; products are in the dtype of `head_VxD`.
        row_N: head rows of the true tokens; masked_NxS: masked sub-tokens; weight_N: row weights.
        whole_N: rows whose tokens are revealed whole, so that the joint loss is the valid one
            (theory.md, "Granularity mixing"); None for no such rows.
    Returns:
        sum_n weight_n * loss_n for both losses, at least float32.
    """
    rows = (row_N, masked_NxS, weight_N, whole_N)
    return _implementation(head).loss_and_gradients(head, h_NxD, head_VxD, *rows, gradient=False)[0]


def _loss_forward(head, h_NxD, head_VxD, row_N, masked_NxS, weight_N, whole_N):
    rows = (row_N, masked_NxS, weight_N, whole_N)
    sums, dh_NxD, dhead_VxD = _implementation(head).loss_and_gradients(
        head, h_NxD, head_VxD, *rows, gradient=True
    )
    return sums, (dh_NxD.astype(h_NxD.dtype), dhead_VxD.astype(head_VxD.dtype))


def _loss_backward(head, residuals, cotangent: HeadLoss):
    dh_NxD, dhead_VxD = residuals
    g = cotangent.joint if head.loss == "joint" else cotangent.marginal
    if head.plain:  # both losses are the same there
        g = cotangent.marginal + cotangent.joint
    return g.astype(dh_NxD.dtype) * dh_NxD, g.astype(dhead_VxD.dtype) * dhead_VxD, *(4 * [None])


subtoken_loss.defvjp(_loss_forward, _loss_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def subtoken_log_probs(
    head: Head,
    h_NxD: jax.Array,
    head_VxD: jax.Array,
    row_N: jax.Array,
    masked_NxS: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Log-probabilities of every row, differentiable in `h` and `head` for any cotangent.

    Returns:
        log-sum-exp [N] over the consistent tokens; log-marginals [N, S, b] of every digit of every
        sub-token (-1e30 where no consistent token has it; None where l = 1, since they would be
        [N, V]); joint log-probability [N] of the true token.
        A marginal below the float32 range is -1e30 as well, but log p_x for the true digit.
    """
    return _log_probs_forward(head, h_NxD, head_VxD, row_N, masked_NxS)[0]


def _log_probs_forward(head, h_NxD, head_VxD, row_N, masked_NxS):
    masses = _implementation(head).masses(head, h_NxD, head_VxD, row_N, head.seen(masked_NxS))
    lse_N, joint_N = masses.lse_N, masses.truth_N - masses.lse_N
    marginals_NxSxb = None if head.plain else _log_marginals(head, masses, row_N, joint_N)
    residuals = (h_NxD, head_VxD, row_N, masked_NxS, lse_N, masses.mass_N, masses.digits_NxSxb)
    return (lse_N, marginals_NxSxb, joint_N), residuals


def _log_marginals(head: Head, masses: Masses, row_N, joint_N) -> jax.Array:
    safe_NxSxb = masses.digits_NxSxb >= TINY
    p_NxSxb = jnp.where(safe_NxSxb, masses.digits_NxSxb, 1) / masses.mass_N[:, None, None]
    floor_NxSxb = jnp.where(true_digits(head, row_N), joint_N[:, None, None], NEG)
    return jnp.where(safe_NxSxb, jnp.log(p_NxSxb), floor_NxSxb)


def _log_probs_backward(head, residuals, cotangent):
    h_NxD, head_VxD, row_N, masked_NxS, lse_N, mass_N, digits_NxSxb = residuals
    dlse_N, dmarginals_NxSxb, djoint_N = cotangent
    constant_N, slope_NxSxb = dlse_N - djoint_N, None
    if not head.plain:
        # Gradient of log P_jc: p_v ([C_vj = c] / P_jc - 1), or that of log p_x where underflowed.
        safe_NxSxb = digits_NxSxb >= TINY
        p_NxSxb = jnp.where(safe_NxSxb, digits_NxSxb, 1) / mass_N[:, None, None]
        slope_NxSxb = jnp.where(safe_NxSxb, dmarginals_NxSxb / p_NxSxb, 0)
        passed_NxSxb = jnp.where(safe_NxSxb | true_digits(head, row_N), dmarginals_NxSxb, 0)
        constant_N -= passed_NxSxb.sum(axis=(1, 2))
        djoint_N += jnp.where(safe_NxSxb, 0, passed_NxSxb).sum(axis=(1, 2))
    dh_NxD, dhead_VxD = _implementation(head).gradients(
        head,
        h_NxD,
        head_VxD,
        row_N,
        head.seen(masked_NxS),
        lse_N,
        Coefficients(constant_N, slope_NxSxb, djoint_N),
    )
    return dh_NxD.astype(h_NxD.dtype), dhead_VxD.astype(head_VxD.dtype), None, None


subtoken_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def subtoken_log_masses(
    head: Head,
    h_NxD: jax.Array,
    head_VxD: jax.Array,
    row_N: jax.Array,
    masked_NxS: jax.Array,
    later_NxS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities for evaluation, per row.

    Args:
        masked_NxS: masked sub-tokens.
        later_NxS: sub-tokens still masked after a reveal step (a subset of `masked_NxS`); None for
            none, which needs one pass instead of two.
    Returns:
        sum over masked slots of log P_j [N], and the log-probability [N] of revealing the true
        digits of `masked & ~later` together: log mass(later) - log mass(masked).
    """
    seen_NxW = head.seen(masked_NxS)
    masses = _implementation(head).masses(head, h_NxD, head_VxD, row_N, seen_NxW)
    joint_N = masses.truth_N - masses.lse_N
    revealed_NxS = masked_NxS if later_NxS is None else masked_NxS & ~later_NxS
    if head.plain:
        revealed_N = jnp.where(revealed_NxS[:, 0], joint_N, 0.0)
        return revealed_N, revealed_N
    marginals_NxSxb = _log_marginals(head, masses, row_N, joint_N)
    true_NxSxb = true_digits(head, row_N) & masked_NxS[..., None]
    marginal_N = jnp.where(true_NxSxb, marginals_NxSxb, 0.0).sum(axis=(1, 2))
    if later_NxS is None and head.carry_over:  # all revealed: only the true token is consistent
        return marginal_N, jnp.where(masked_NxS.any(axis=1), joint_N, 0.0)
    after_NxW = head.visible_words(revealed_NxS)
    after_NxW = after_NxW if seen_NxW is None else seen_NxW | after_NxW
    after = _implementation(head).masses(head, h_NxD, head_VxD, row_N, after_NxW)
    return marginal_N, after.lse_N - masses.lse_N
