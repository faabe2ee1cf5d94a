"""Common code of all implementations of the head: packed codes, digit masses, coefficients.

Head rows are in the order of their codes. A token's digits are fields of one or more 31-bit words
(for base 2 a word is the code itself), so that "row v agrees with every visible sub-token of the
truth" is `((word_v ^ true_n) & visible_n) == 0` in any base. The sign bit is always visible, and
set in padding rows of the vocabulary, which therefore never agree.

Losses and gradients depend on the logits of a row only through a few sums (`Masses`) and
coefficients (`Coefficients`); implementations differ in how they stream over the logits.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.subtokens import Codebook

# Mass, relative to the most likely token, below which a digit's sum has underflowed. The loss of
# the true digit is then -log p_x, computed in log space: a bound, since P_j >= p_x, and finite.
TINY = 1e-30
PADDING = np.int32(-(2**31))  # the word of a padding row
WORD_BITS = 31


@dataclass(frozen=True, eq=False)
class Head:
    """Static description of the head; hashable by identity, so `jit` can close over it.

    Attributes:
        codebook: V tokens, l digits each.
        carry_over: restrict the softmax to the tokens consistent with the visible sub-tokens.
        loss: the quantity that `subtoken_loss` differentiates.
        implementation: `pallas` needs one word per code and at most 127 columns, else XLA is used.
        blocks: (tokens, head rows, head rows of a part) of the Pallas kernels, (tokens,) of a chunk
            of the XLA form; empty for default.
        axis_name: mesh axis of the surrounding `shard_map` over which head rows are sharded, each
            device with ceil(V / devices) of them (the last ones padded). Hidden states and
            results are replicated over the axis; gradients are computed inside.
    """

    codebook: Codebook
    carry_over: bool = True
    loss: Literal["marginal", "joint"] = "marginal"
    implementation: Literal["xla", "pallas"] = "xla"
    blocks: tuple[int, ...] = ()
    axis_name: str | None = None

    @property
    def plain(self) -> bool:
        """l = 1: no restriction, and both losses are the token's cross-entropy."""
        return self.codebook.length == 1

    @property
    def columns(self) -> int:
        """Digit masses per row, l * b; 0 if l = 1."""
        return 0 if self.plain else self.codebook.length * self.codebook.base

    @cached_property
    def dense_codes(self) -> bool:
        """Whether row numbers are the codes, i.e. the codes are 0 .. V-1."""
        return int(self.codebook.codes.max()) == self.codebook.vocab_size - 1

    @cached_property
    def digits_VxS(self) -> np.ndarray:
        return self.codebook.digits[self.codebook.tokens]

    @cached_property
    def fields_SxW(self) -> np.ndarray:
        """int64 weight of each slot's digit in each word; 0 where the slot is in another word."""
        width = self.field_bits
        per_word = WORD_BITS // width
        slots = np.arange(self.codebook.length)
        words = -(-len(slots) // per_word)
        last = np.minimum((slots // per_word + 1) * per_word, len(slots)) - 1
        weight = np.int64(1) << (width * (last - slots))
        return np.where(slots[:, None] // per_word == np.arange(words), weight[:, None], 0)

    @property
    def field_bits(self) -> int:
        return (self.codebook.base - 1).bit_length()

    @cached_property
    def words_VxW(self) -> np.ndarray:
        """int32 [V, W]: the packed digits of every head row."""
        return (self.digits_VxS.astype(np.int64) @ self.fields_SxW).astype(np.int32)

    def visible_words(self, visible_NxS: jax.Array) -> jax.Array:
        """int32 [N, W]: all bits of the visible slots, and the sign bit."""
        masks_SxW = (self.fields_SxW * (2**self.field_bits - 1)).astype(np.int32)
        bits_NxW = (visible_NxS[..., None] * masks_SxW).sum(axis=1, dtype=jnp.int32)
        return bits_NxW | PADDING

    def seen(self, masked_NxS: jax.Array) -> jax.Array | None:
        """`visible_words` to which the softmax is restricted; None if it is not restricted."""
        if self.plain or not self.carry_over:
            return None
        return self.visible_words(~masked_NxS)


class Shard(NamedTuple):
    """The head rows on this device (all of them without `axis_name`).

    Attributes:
        words_VxW: their packed codes; a NumPy array if known at compile time.
        true_N: index of each row's true token among them; outside [0, V) if on another device.
    """

    words_VxW: Any
    true_N: jax.Array


def shard(head: Head, row_N: jax.Array, count: int) -> Shard:
    """The `count` head rows on this device."""
    if head.axis_name is None:
        return Shard(head.words_VxW, row_N)
    padding = count * jax.lax.axis_size(head.axis_name) - head.codebook.vocab_size
    words = np.pad(head.words_VxW, ((0, padding), (0, 0)), constant_values=PADDING)
    first = jax.lax.axis_index(head.axis_name) * count
    return Shard(jax.lax.dynamic_slice_in_dim(jnp.asarray(words), first, count), row_N - first)


def consistent(words_VxW: Any, true_NxW: jax.Array, visible_NxW: jax.Array) -> jax.Array:
    """bool [N, V]: head rows that agree with every visible sub-token of the truth."""
    ok_NxV = True
    for word_V, true_N, visible_N in zip(words_VxW.T, true_NxW.T, visible_NxW.T, strict=True):
        ok_NxV &= ((word_V[None, :] ^ true_N[:, None]) & visible_N[:, None]) == 0
    return ok_NxV


def one_hot(head: Head, words_VxW: Any, dtype) -> Any:
    """[V, S*b] indicator of each slot's digit."""
    word_S = np.argmax(head.fields_SxW > 0, axis=1)
    shift_S = np.log2(head.fields_SxW.max(axis=1)).astype(np.int32)
    digits_VxS = (words_VxW[:, word_S] >> shift_S) & np.int32(2**head.field_bits - 1)
    hot_VxSxb = digits_VxS[..., None] == np.arange(head.codebook.base, dtype=np.int32)
    return hot_VxSxb.reshape(-1, head.columns).astype(dtype)


class Masses(NamedTuple):
    """Sums over the consistent tokens of a row, relative to exp(top).

    Attributes:
        top_N: the largest logit (or a number near it); truth_N: the true token's logit.
        mass_N: sum_v exp(z_v - top).
        digits_NxSxb: the same over the tokens with each digit in each slot; None where l = 1.
    """

    top_N: jax.Array
    truth_N: jax.Array
    mass_N: jax.Array
    digits_NxSxb: jax.Array | None

    @property
    def lse_N(self) -> jax.Array:
        return self.top_N + jnp.log(self.mass_N)


def combined(head: Head, masses: Masses) -> Masses:
    """Masses over the head rows of all devices."""
    if head.axis_name is None:
        return masses
    top_N = jax.lax.pmax(masses.top_N, head.axis_name)
    scale_N = jnp.exp(masses.top_N - top_N)
    sums = (masses.truth_N, masses.mass_N * scale_N)
    digits = masses.digits_NxSxb
    digits = None if digits is None else digits * scale_N[:, None, None]
    return Masses(top_N, *jax.lax.psum((*sums, digits), head.axis_name))


def summed(head: Head, dh_NxD: jax.Array) -> jax.Array:
    """Gradient of the hidden states, summed over the head rows of all devices."""
    return dh_NxD if head.axis_name is None else jax.lax.psum(dh_NxD, head.axis_name)


class HeadLoss(NamedTuple):
    """Weighted sums over rows, in nats: both losses come from one pass."""

    marginal: jax.Array
    joint: jax.Array


class Coefficients(NamedTuple):
    """Gradient of the logits: dz_nv = p_nv (constant_n + sum_j digits_njc) + truth_n [v = x_n],

    where c is the digit of v in slot j. `digits_NxSxb` is None where it would be zero.
    """

    constant_N: jax.Array
    digits_NxSxb: jax.Array | None
    truth_N: jax.Array

    def over(self, mass_N: jax.Array) -> "Coefficients":
        """The same for masses p_nv * mass_n in place of probabilities."""
        digits = self.digits_NxSxb
        digits = None if digits is None else digits / mass_N[:, None, None]
        return Coefficients(self.constant_N / mass_N, digits, self.truth_N)


def in_joint_loss(head: Head, masked_NxS: jax.Array) -> jax.Array:
    """bool [N]: rows that count in the joint loss: without carry-over all, unless l = 1."""
    if head.carry_over or head.plain:
        return masked_NxS.any(axis=1)
    return jnp.ones(masked_NxS.shape[0], bool)


def true_digits(head: Head, row_N: jax.Array, dtype=bool) -> jax.Array:
    """[N, S, b] indicator of the true digit of each slot."""
    return jax.nn.one_hot(jnp.asarray(head.digits_VxS)[row_N], head.codebook.base, dtype=dtype)


def loss_terms(
    head: Head, masses: Masses, row_N, masked_NxS, weight_N, whole_N
) -> tuple[HeadLoss, Coefficients]:
    """Loss sums of some rows, and the coefficients of the gradient of `head.loss`."""
    weight_N = weight_N.astype(masses.mass_N.dtype)
    joint_weight_N = jnp.where(in_joint_loss(head, masked_NxS), weight_N, 0.0)
    joint_N = masses.lse_N - masses.truth_N
    joint = (joint_weight_N * joint_N).sum()
    joint_gradient = Coefficients(joint_weight_N, None, -joint_weight_N)
    if head.plain:
        return HeadLoss(joint, joint), joint_gradient

    picked_NxSxb = true_digits(head, row_N)
    mass_NxS = jnp.where(picked_NxSxb, masses.digits_NxSxb, 0).sum(axis=2)
    lost_NxS = masked_NxS & (mass_NxS < TINY)
    usable_NxS = masked_NxS & ~lost_NxS
    # The inner `where` comes before the log, so that visible slots do not give log(0).
    ratio_NxS = jnp.where(usable_NxS, mass_NxS / masses.mass_N[:, None], 1.0)
    lost_N = lost_NxS.sum(axis=1).astype(joint_N.dtype)
    marginal_N = lost_N * joint_N - jnp.log(ratio_NxS).sum(axis=1)
    if whole_N is not None:
        marginal_N = jnp.where(whole_N & masked_NxS.any(axis=1), joint_N, marginal_N)
    losses = HeadLoss((weight_N * marginal_N).sum(), joint)
    if head.loss == "joint":
        return losses, joint_gradient
    # d/dz_v sum_j -log P_j = p_v (k - sum_j [C_vj = y_j] / P_j), k masked sub-tokens.
    slope_NxS = jnp.where(usable_NxS, -weight_N[:, None] / ratio_NxS, 0.0)
    constant_N = weight_N * masked_NxS.sum(axis=1).astype(joint_N.dtype)
    truth_N = -weight_N * lost_N
    if whole_N is not None:
        slope_NxS = jnp.where(whole_N[:, None], 0.0, slope_NxS)
        constant_N = jnp.where(whole_N, joint_weight_N, constant_N)
        truth_N = jnp.where(whole_N, -joint_weight_N, truth_N)
    digits_NxSxb = jnp.where(picked_NxSxb, slope_NxS[..., None], 0.0)
    return losses, Coefficients(constant_N, digits_NxSxb, truth_N)
