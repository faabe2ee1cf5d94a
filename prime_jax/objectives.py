"""ARM, MDM and MDM-Prime behind one signature: a batch of tokens in, loss sums out.

The network is any function from digits to (hidden states, head rows): the transformer in training,
a probability table in the enumeration tests. ARM reads BOS, x_1 .. x_{L-1} and predicts x_1 .. x_L;
the loss of a diffusion model is over its masked sub-tokens, weighted by w(t). The targets are the
same for every family (theory.md, "Two losses").
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prime_jax.config import RunConfig
from prime_jax.corrupt import corrupt, row_keys
from prime_jax.kernels import selection
from prime_jax.kernels.common import target_kind
from prime_jax.kernels.subtoken_head import Head, HeadLoss, subtoken_loss
from prime_jax.subtokens import Codebook

Network = Callable[..., tuple[jax.Array, jax.Array]]  # digits, segment ids, dropout keys


class Inputs(NamedTuple):
    """Inputs of the network and of the loss.

    Attributes:
        digits_BxLxS: network input; the digit b means "masked" (ARM: BOS). In block diffusion
            [B, 2, L, S]: noisy and clean; a noisy block attends to the clean blocks before it.
        token_BxL: the true tokens.
        masked_BxLxS: sub-tokens to predict (all of them for ARM).
        weight_BxL: weight of each position's loss; 0 where it is not a target.
        target_BxL: positions that count in the denominator.
        segment_ids_BxL: attention segments, or None for attention between all positions.
        whole_BxL: positions revealed token by token (granularity mixing), or None.
    """

    digits_BxLxS: jax.Array
    token_BxL: jax.Array
    masked_BxLxS: jax.Array
    weight_BxL: jax.Array
    target_BxL: jax.Array
    segment_ids_BxL: jax.Array | None
    whole_BxL: jax.Array | None = None


def make_head(config: RunConfig, codebook: Codebook, axis_name: str | None = None) -> Head:
    """The head of a run.

    Args:
        axis_name: mesh axis of the surrounding `shard_map` that splits the head's rows.
    """
    o = config.objective
    choice = selection.head(config, target_kind())
    return Head(
        codebook=codebook,
        carry_over=o.carry_over,
        loss=o.loss,
        implementation=choice.implementation,
        blocks=choice.blocks,
        axis_name=axis_name,
    )


def segments(config: RunConfig, token_BxL: jax.Array, eos_id: int) -> jax.Array | None:
    """Document index of every position if attention is restricted to documents, else None."""
    if not config.data.segment_ids:
        return None
    ends_BxL = (token_BxL == eos_id).astype(jnp.int32)
    return jnp.cumsum(ends_BxL, axis=1) - ends_BxL  # an EOS belongs to the document it ends


def targets(config: RunConfig, token_BxL: jax.Array, eos_id: int) -> jax.Array:
    """Positions of the loss: all, or all but EOS where segment ids reveal the lengths."""
    if config.data.segment_ids:
        return token_BxL != eos_id
    return jnp.ones(token_BxL.shape, bool)


def autoregressive_inputs(config: RunConfig, book: Codebook, token_BxL, eos_id) -> Inputs:
    """ARM: shift right, with a BOS at the start of the sequence and of every segment."""
    segment_BxL = segments(config, token_BxL, eos_id)
    digit_BxL = jnp.asarray(book.digits)[token_BxL, 0]
    shifted_BxL = jnp.pad(digit_BxL[:, :-1], ((0, 0), (1, 0)), constant_values=book.base)
    if segment_BxL is not None:
        first_BxL = jnp.diff(segment_BxL, axis=1, prepend=-1) != 0
        shifted_BxL = jnp.where(first_BxL, book.base, shifted_BxL)
    target_BxL = targets(config, token_BxL, eos_id)
    return Inputs(
        digits_BxLxS=shifted_BxL[..., None],
        token_BxL=token_BxL,
        masked_BxLxS=target_BxL[..., None],
        weight_BxL=target_BxL.astype(jnp.float32),
        target_BxL=target_BxL,
        segment_ids_BxL=segment_BxL,
    )


def masked_inputs(
    config: RunConfig, book: Codebook, token_BxL, masked_BxLxS, weight_BxL, eos_id
) -> Inputs:
    """Diffusion: the given sub-tokens masked, the others visible."""
    clean_BxLxS = jnp.asarray(book.digits)[token_BxL]
    digits_BxLxS = jnp.where(masked_BxLxS, book.base, clean_BxLxS)
    if config.objective.block_length:
        digits_BxLxS = jnp.stack([digits_BxLxS, clean_BxLxS], axis=1)
    target_BxL = targets(config, token_BxL, eos_id)
    return Inputs(
        digits_BxLxS=digits_BxLxS,
        token_BxL=token_BxL,
        masked_BxLxS=masked_BxLxS & target_BxL[..., None],
        weight_BxL=weight_BxL * target_BxL,
        target_BxL=target_BxL,
        segment_ids_BxL=segments(config, token_BxL, eos_id),
    )


def training_inputs(
    config: RunConfig, book: Codebook, token_BxL, row_B, key, eos_id: int
) -> Inputs:
    """Inputs of one training step for the rows `row_B` of the global batch.

    Args:
        key: `corrupt.step_key(seed, step)`.
        eos_id: the document separator (read only with segment ids).
    """
    if config.family == "arm":
        return autoregressive_inputs(config, book, token_BxL, eos_id)
    target_BxL = targets(config, token_BxL, eos_id)
    corruption = corrupt(
        config.objective,
        key=key,
        row_B=row_B,
        count=config.batch_size,
        target_BxL=target_BxL,
        length=book.length,
    )
    inputs = masked_inputs(
        config,
        book=book,
        token_BxL=token_BxL,
        masked_BxLxS=corruption.masked_BxLxS,
        weight_BxL=corruption.weight_BxL,
        eos_id=eos_id,
    )
    if config.objective.token_mask_rho > 0 and book.length > 1:
        inputs = inputs._replace(
            whole_BxL=jnp.broadcast_to(corruption.whole_B[:, None], token_BxL.shape)
        )
    if config.objective.random_length > 0:
        inputs = cut(inputs, corruption.length_B)
    return inputs


def cut(inputs: Inputs, length_B: jax.Array) -> Inputs:
    """Random-length training: positions from `length_B` on are padding, with segment id -1."""
    inside_BxL = jnp.arange(inputs.token_BxL.shape[1]) < length_B[:, None]
    segment_BxL = inputs.segment_ids_BxL
    segment_BxL = jnp.zeros_like(inputs.token_BxL) if segment_BxL is None else segment_BxL
    return inputs._replace(
        weight_BxL=inputs.weight_BxL * inside_BxL,
        target_BxL=inputs.target_BxL & inside_BxL,
        segment_ids_BxL=jnp.where(inside_BxL, segment_BxL, -1),
    )


def guided(h_BxLxD: jax.Array, unprompted_BxLxD: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Classifier-free guidance: hidden states whose logits are z' + (1 + scale) (z - z').

    Logits are linear in the hidden states, so these are moved instead; a bound stays one, of the
    guided model. z' are those of a network that does not see the prompt.
    """
    dtype = jnp.promote_types(h_BxLxD.dtype, jnp.float32)
    h, u = h_BxLxD.astype(dtype), unprompted_BxLxD.astype(dtype)
    return (u + (1 + scale) * (h - u)).astype(h_BxLxD.dtype)


def loss_sums(
    head: Head, network: Network, inputs: Inputs, dropout_key=None, row_B=None
) -> HeadLoss:
    """Weighted sums of the marginal and the joint loss over the batch, in nats.

    Divide by `inputs.target_BxL.sum()` of the whole batch for nats per token.
    """
    keys_B = None if dropout_key is None else row_keys(dropout_key, row_B)
    h_BxLxD, head_VxD = network(inputs.digits_BxLxS, inputs.segment_ids_BxL, keys_B)
    return subtoken_loss(
        head,
        h_BxLxD.reshape(-1, h_BxLxD.shape[-1]),
        head_VxD,
        jnp.asarray(head.codebook.rows)[inputs.token_BxL].reshape(-1),
        inputs.masked_BxLxS.reshape(-1, inputs.masked_BxLxS.shape[-1]),
        inputs.weight_BxL.reshape(-1),
        None if inputs.whole_BxL is None else inputs.whole_BxL.reshape(-1),
    )
