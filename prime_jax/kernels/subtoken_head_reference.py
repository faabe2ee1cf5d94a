"""Dense reference of the head, written for readability: all logits, all digits compared."""

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.kernels.common import NEG
from prime_jax.kernels.subtoken_head_base import Head


def restricted_logits(head: Head, h_NxD, head_VxD, row_N, masked_NxS) -> jax.Array:
    """Logits [N, V] in at least float32, NEG where a visible sub-token disagrees with the truth."""
    dtype = jnp.promote_types(h_NxD.dtype, jnp.float32)
    z_NxV = jnp.einsum("nd,vd->nv", h_NxD, head_VxD, preferred_element_type=dtype)
    if head.plain or not head.carry_over:
        return z_NxV
    digits_VxS = jnp.asarray(head.digits_VxS)
    same_NxVxS = digits_VxS[row_N][:, None] == digits_VxS
    return jnp.where((same_NxVxS | masked_NxS[:, None]).all(axis=2), z_NxV, NEG)


def subtoken_head_reference(
    head: Head, h_NxD: jax.Array, head_VxD: jax.Array, row_N: jax.Array, masked_NxS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-marginals and joint log-probability of the truth.

    Returns:
        log P [N, S] of the true digit at masked slots (0 elsewhere), and log p_x [N].
    """
    _, marginals_NxSxb, joint_N = subtoken_log_probs_reference(
        head, h_NxD, head_VxD, row_N, masked_NxS
    )
    if head.plain:
        return jnp.where(masked_NxS, joint_N[:, None], 0.0), joint_N
    digits_NxS = jnp.asarray(head.digits_VxS)[row_N]
    slots_NxS = jnp.take_along_axis(marginals_NxSxb, digits_NxS[..., None], axis=2)[..., 0]
    return jnp.where(masked_NxS, slots_NxS, 0.0), joint_N


def subtoken_log_probs_reference(head: Head, h_NxD, head_VxD, row_N, masked_NxS) -> tuple:
    """Reference for `subtoken_head.subtoken_log_probs`, without its rule for underflow."""
    z_NxV = restricted_logits(head, h_NxD, head_VxD, row_N, masked_NxS)
    lse_N = jax.nn.logsumexp(z_NxV, axis=1)
    joint_N = jnp.take_along_axis(z_NxV, row_N[:, None], axis=1)[:, 0] - lse_N
    if head.plain:
        return lse_N, None, joint_N

    has_VxSxb = head.digits_VxS[..., None] == np.arange(head.codebook.base)
    z_NxVxSxb = jnp.where(has_VxSxb, z_NxV[:, :, None, None], NEG)
    return lse_N, jax.nn.logsumexp(z_NxVxSxb, axis=1) - lse_N[:, None, None], joint_N
