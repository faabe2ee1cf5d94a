"""The output head of every family: hidden states and head rows in, losses and gradients out.

`p` is the softmax over the tokens consistent with the visible sub-tokens. A row is charged for its
hidden sub-tokens in one of two ways (math.md sections 2-4):

    marginal   sum_j -log P_j,  P_j = sum_v p_v [C_vj = y_j]     a valid bound
    joint      -log p_x                                          the published training loss

`subtoken_head_reference` is the plain dense twin. `subtoken_loss` is the training form: row weights
are known, so gradients are made in the forward pass, one chunk of rows at a time, and [N, V] is
never stored. `subtoken_log_masses` is the evaluation form.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.subtokens import Codebook, pack, unpack

NEG = -1e30  # finite stand-in for -inf: no NaN from inf - inf
# Mass, relative to the likeliest token, below which a slot's sum has underflowed. As P_j >= p_x,
# the slot is then charged -log p_x, which is exact in log space: still a bound, and finite.
TINY = 1e-30
ONE_HOT_BASE = 8  # up to this base marginals are a matmul; above it digits are compared
CHUNK_ELEMENTS = 1 << 20  # logits of a chunk: stays in a CPU's cache, large enough for its cores


@dataclass(frozen=True, eq=False)
class Head:
    """What the head needs to know about the codes; hashable by identity, so `jit` can close over it.

    Attributes:
        codebook: V tokens, l digits each.
        carry_over: restrict the softmax to the tokens consistent with the visible sub-tokens.
        loss: the quantity that `subtoken_loss` differentiates.
    """

    codebook: Codebook
    carry_over: bool = True
    loss: Literal["marginal", "joint"] = "marginal"

    @property
    def plain(self) -> bool:
        """l = 1: nothing to restrict, and both losses are the token's own cross-entropy."""
        return self.codebook.length == 1

    @cached_property
    def one_hot_VxC(self) -> np.ndarray:
        """[V, l*b] indicator of each slot's digit, float32."""
        book = self.codebook
        eye = np.eye(book.base, dtype=np.float32)
        return eye[book.digits].reshape(book.vocab_size, book.length * book.base)


class HeadLoss(NamedTuple):
    """Weighted sums over rows, in nats: both losses come from one pass."""

    marginal: jax.Array
    joint: jax.Array


def consistent(book: Codebook, digits_NxS: jax.Array, masked_NxS: jax.Array) -> jax.Array:
    """bool [N, V]: tokens that agree with every visible sub-token (all, where all are masked)."""
    if book.base == 2:
        seen_N, hidden_N = unpack(pack(digits_NxS, masked_NxS), book.length)
        full = np.uint32((1 << book.length) - 1)
        visible_N = full & ~hidden_N
        codes_V = book.codes.astype(np.uint32)
        return ((codes_V[None, :] ^ seen_N[:, None]) & visible_N[:, None]) == 0
    ok_NxV = jnp.ones((digits_NxS.shape[0], book.vocab_size), bool)
    for j in range(book.length):
        same_NxV = digits_NxS[:, j, None] == book.digits[None, :, j]
        ok_NxV &= same_NxV | masked_NxS[:, j, None]
    return ok_NxV


def _logits(head: Head, h_NxD, head_VxD, digits_NxS, masked_NxS) -> jax.Array:
    """Restricted logits [N, V] in at least float32."""
    dtype = jnp.promote_types(h_NxD.dtype, jnp.float32)
    z_NxV = jnp.einsum("nd,vd->nv", h_NxD, head_VxD, preferred_element_type=dtype)
    if head.plain or not head.carry_over:
        return z_NxV
    return jnp.where(consistent(head.codebook, digits_NxS, masked_NxS), z_NxV, NEG)


def subtoken_head_reference(
    head: Head,
    h_NxD: jax.Array,
    head_VxD: jax.Array,
    token_N: jax.Array,
    masked_NxS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Dense twin, written to be read: log-marginals and joint log-probability of the truth.

    Returns:
        log P [N, S] of the true digit at masked slots (0 elsewhere), and log p_x [N].
    """
    book = head.codebook
    digits_NxS = jnp.asarray(book.digits)[token_N]
    logp_NxV = jax.nn.log_softmax(_logits(head, h_NxD, head_VxD, digits_NxS, masked_NxS))
    joint_N = jnp.take_along_axis(logp_NxV, token_N[:, None], axis=1)[:, 0]
    slots = []
    for j in range(book.length):
        same_NxV = digits_NxS[:, j, None] == book.digits[None, :, j]
        logP_N = jax.nn.logsumexp(jnp.where(same_NxV, logp_NxV, NEG), axis=1)
        slots.append(jnp.where(masked_NxS[:, j], logP_N, 0.0))
    return jnp.stack(slots, axis=1), joint_N


def charged(head: Head, masked_NxS: jax.Array) -> jax.Array:
    """bool [N]: rows that pay the joint loss; without carry-over every sub-token row does."""
    if head.carry_over or head.plain:
        return masked_NxS.any(axis=1)
    return jnp.ones(masked_NxS.shape[0], bool)


def chunk_rows(n_rows: int, vocab_size: int) -> int:
    """Rows per chunk: the largest divisor of n_rows whose logits stay below CHUNK_ELEMENTS."""
    limit = max(1, CHUNK_ELEMENTS // vocab_size)
    return max(d for d in range(1, min(limit, n_rows) + 1) if n_rows % d == 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def subtoken_loss(
    head: Head,
    h_NxD: jax.Array,
    head_VxD: jax.Array,
    token_N: jax.Array,
    masked_NxS: jax.Array,
    weight_N: jax.Array,
    whole_N: jax.Array | None = None,
) -> HeadLoss:
    """Weighted loss sums over N rows, differentiable in `h` and `head` through `head.loss`.

    The other sum is a by-product for the records: its cotangent is ignored.

    Args:
        h_NxD, head_VxD: hidden states and head rows (token order), any float dtype.
        token_N: true tokens; masked_NxS: hidden sub-tokens; weight_N: row weights.
        whole_N: rows whose tokens are revealed whole, so that the joint loss is the valid one
            (math.md section 3, granularity mixing); None for no such rows.
    Returns:
        sum_n weight_n * loss_n for both losses, at least float32.
    """
    rows = (h_NxD, token_N, masked_NxS, weight_N, whole_N)
    return _forward(head, head_VxD, rows, gradients=False)[0]


def _forward(head, head_VxD, rows, gradients=True):
    n_rows, width = rows[0].shape
    dtype = jnp.promote_types(rows[0].dtype, jnp.float32)

    def step(carry, row):
        (marginal, joint), dhead_VxD = carry
        h_cxD = row[0]
        losses, dz_cxV = _chunk(head, head_VxD, row, gradients)
        sums = HeadLoss(marginal + losses.marginal, joint + losses.joint)
        if not gradients:
            return (sums, dhead_VxD), None
        dz_cxV = dz_cxV.astype(h_cxD.dtype)
        dh_cxD = jnp.einsum("nv,vd->nd", dz_cxV, head_VxD, preferred_element_type=dtype)
        dhead_VxD += jnp.einsum("nv,nd->vd", dz_cxV, h_cxD, preferred_element_type=dtype)
        return (sums, dhead_VxD), dh_cxD.astype(h_cxD.dtype)

    zero = jnp.zeros((), dtype)
    start = (HeadLoss(zero, zero), jnp.zeros(head_VxD.shape if gradients else (), dtype))
    (sums, dhead_VxD), dh = jax.lax.scan(step, start, _chunked(rows, head_VxD.shape[0]))
    return sums, (dh.reshape(n_rows, width) if gradients else None, dhead_VxD)


def _chunked(rows, vocab_size: int):
    """Split the leading axis of every array into [chunks, rows per chunk]."""
    chunk = chunk_rows(rows[0].shape[0], vocab_size)
    return jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), rows)


def _chunk(head, head_VxD, row, gradients):
    """Loss sums of one chunk and, for the loss that trains, the gradient of the logits [c, V]."""
    h_cxD, token_c, masked_cxS, weight_c, whole_c = row
    book = head.codebook
    digits_cxS = jnp.asarray(book.digits)[token_c]
    z_cxV = _logits(head, h_cxD, head_VxD, digits_cxS, masked_cxS)
    top_cx1 = jax.lax.stop_gradient(z_cxV.max(axis=1, keepdims=True))
    e_cxV = jnp.exp(z_cxV - top_cx1)
    mass_c = e_cxV.sum(axis=1)
    true_c = jnp.take_along_axis(z_cxV, token_c[:, None], axis=1)[:, 0]
    weight_c = weight_c.astype(z_cxV.dtype)
    pays_c = jnp.where(charged(head, masked_cxS), weight_c, 0.0)
    joint_c = jnp.log(mass_c) + top_cx1[:, 0] - true_c
    joint = (pays_c * joint_c).sum()

    def at_truth(value_c):
        columns = jax.lax.broadcasted_iota(jnp.int32, z_cxV.shape, 1)
        return jnp.where(columns == token_c[:, None], value_c[:, None], 0)

    def joint_gradient():
        return e_cxV * (pays_c / mass_c)[:, None] - at_truth(pays_c)

    if head.plain:
        return HeadLoss(joint, joint), joint_gradient() if gradients else None

    mass_cxS = _slot_mass(head, e_cxV, digits_cxS)
    lost_cxS = masked_cxS & (mass_cxS < TINY)
    usable_cxS = masked_cxS & ~lost_cxS
    # The inner `where` comes before the log: visible slots must not see log(0).
    ratio_cxS = jnp.where(usable_cxS, mass_cxS / mass_c[:, None], 1.0)
    lost_c = lost_cxS.sum(axis=1).astype(z_cxV.dtype)
    marginal_c = lost_c * joint_c - jnp.log(ratio_cxS).sum(axis=1)
    if whole_c is not None:
        marginal_c = jnp.where(whole_c & masked_cxS.any(axis=1), joint_c, marginal_c)
    losses = HeadLoss((weight_c * marginal_c).sum(), joint)
    if not gradients:
        return losses, None
    if head.loss == "joint":
        return losses, joint_gradient()
    # d/dz_v sum_j -log P_j = p_v (k - sum_j [C_vj = y_j] / P_j), k masked sub-tokens.
    inverse_cxS = jnp.where(usable_cxS, 1.0 / ratio_cxS, 0.0)
    share_cxV = _slot_spread(head, inverse_cxS, digits_cxS)
    count_c = masked_cxS.sum(axis=1).astype(z_cxV.dtype)
    scale_c = weight_c / mass_c
    dz_cxV = e_cxV * scale_c[:, None] * (count_c[:, None] - share_cxV)
    dz_cxV -= at_truth(weight_c * lost_c)
    if whole_c is not None:
        dz_cxV = jnp.where(whole_c[:, None], joint_gradient(), dz_cxV)
    return losses, dz_cxV


def _picked(head: Head, digits_NxS: jax.Array, dtype) -> jax.Array:
    """[N, S, b] indicator of the true digit of each slot."""
    return jax.nn.one_hot(digits_NxS, head.codebook.base, dtype=dtype)


def _slot_mass(head: Head, e_NxV: jax.Array, digits_NxS: jax.Array) -> jax.Array:
    """sum_v e_v [C_vj = y_j] for every slot: [N, S]."""
    book = head.codebook
    if book.base <= ONE_HOT_BASE:
        mass_NxC = e_NxV @ head.one_hot_VxC.astype(e_NxV.dtype)
        mass_NxSxb = mass_NxC.reshape(*digits_NxS.shape, book.base)
        return (mass_NxSxb * _picked(head, digits_NxS, e_NxV.dtype)).sum(-1)
    columns = [digits_NxS[:, j, None] == book.digits[None, :, j] for j in range(book.length)]
    return jnp.stack([jnp.where(same, e_NxV, 0).sum(axis=1) for same in columns], axis=1)


def _slot_spread(head: Head, value_NxS: jax.Array, digits_NxS: jax.Array) -> jax.Array:
    """sum_j value_j [C_vj = y_j] for every token: [N, V], the transpose of `_slot_mass`."""
    book = head.codebook
    if book.base <= ONE_HOT_BASE:
        coefficient_NxSxb = value_NxS[..., None] * _picked(head, digits_NxS, value_NxS.dtype)
        coefficient_NxC = coefficient_NxSxb.reshape(value_NxS.shape[0], -1)
        return coefficient_NxC @ head.one_hot_VxC.T.astype(value_NxS.dtype)
    columns = [digits_NxS[:, j, None] == book.digits[None, :, j] for j in range(book.length)]
    return sum(jnp.where(same, value_NxS[:, j, None], 0) for j, same in enumerate(columns))


def _loss_forward(head, h_NxD, head_VxD, token_N, masked_NxS, weight_N, whole_N):
    rows = (h_NxD, token_N, masked_NxS, weight_N, whole_N)
    sums, (dh_NxD, dhead_VxD) = _forward(head, head_VxD, rows)
    return sums, (dh_NxD, dhead_VxD.astype(head_VxD.dtype))


def _loss_backward(head, residuals, cotangent: HeadLoss):
    dh_NxD, dhead_VxD = residuals
    g = cotangent.joint if head.loss == "joint" else cotangent.marginal
    if head.plain:  # the two sums are one number there
        g = cotangent.marginal + cotangent.joint
    g = g.astype(dh_NxD.dtype)
    return g * dh_NxD, g.astype(dhead_VxD.dtype) * dhead_VxD, None, None, None, None


subtoken_loss.defvjp(_loss_forward, _loss_backward)


def subtoken_log_masses(
    head: Head,
    h_NxD: jax.Array,
    head_VxD: jax.Array,
    token_N: jax.Array,
    masked_NxS: jax.Array,
    later_NxS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Per-row evaluation form, streaming over chunks of rows.

    Args:
        masked_NxS: sub-tokens hidden from the network.
        later_NxS: sub-tokens still hidden after a reveal step (a subset of `masked_NxS`).
    Returns:
        sum over masked slots of log P_j [N], and the log-probability [N] of revealing the true
        digits of `masked & ~later` together: log mass(later) - log mass(masked).
    """
    book = head.codebook
    rows = _chunked((h_NxD, token_N, masked_NxS, later_NxS), head_VxD.shape[0])

    def one(row):
        h_cxD, token_c, masked_cxS, later_cxS = row
        digits_cxS = jnp.asarray(book.digits)[token_c]
        z_cxV = _logits(head, h_cxD, head_VxD, digits_cxS, masked_cxS)
        top_cx1 = z_cxV.max(axis=1, keepdims=True)
        e_cxV = jnp.exp(z_cxV - top_cx1)
        mass_c = e_cxV.sum(axis=1)
        true_c = jnp.take_along_axis(z_cxV, token_c[:, None], axis=1)[:, 0]
        log_p_c = true_c - top_cx1[:, 0] - jnp.log(mass_c)
        if head.plain:
            charged_c = jnp.where(masked_cxS[:, 0] & ~later_cxS[:, 0], log_p_c, 0.0)
            return charged_c, charged_c
        revealed_cxS = masked_cxS & ~later_cxS
        # Tokens that agree on the revealed slots; agreement on the visible ones is in z already.
        agree_cxV = consistent(book, digits_cxS, ~revealed_cxS)
        kept_c = jnp.where(agree_cxV, e_cxV, 0.0).sum(axis=1)

        def log_share(mass, floor):
            safe = mass >= TINY
            return jnp.where(safe, jnp.log(jnp.where(safe, mass, 1.0)), floor)

        log_mass_c = jnp.log(mass_c)
        slots_cxS = log_share(_slot_mass(head, e_cxV, digits_cxS), (log_p_c + log_mass_c)[:, None])
        marginal_cxS = jnp.where(masked_cxS, slots_cxS - log_mass_c[:, None], 0.0)
        joint_c = log_share(kept_c, log_p_c + log_mass_c) - log_mass_c
        return marginal_cxS.sum(axis=1), joint_c

    marginal, joint = jax.lax.map(one, rows)
    return marginal.reshape(-1), joint.reshape(-1)
