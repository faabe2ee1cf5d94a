"""Likelihood estimators: each maps rows of tokens to one unbiased draw of its bound, in nats.

Sub-tokens are masked by fixed-count masking: exactly k of n, weight n / k, without a schedule. For
the cost of each and the kind of number it is see docs/theory.md, "What is reported". The chain rule
under fixed orders is in chain.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prime_jax.config import RunConfig
from prime_jax.kernels.subtoken_head import Head, subtoken_log_masses
from prime_jax.objectives import (
    Inputs,
    Network,
    autoregressive_inputs,
    cut,
    guided,
    make_head,
    masked_inputs,
)
from prime_jax.subtokens import Codebook

Values = dict[str, jax.Array]  # estimator name -> nats [B]


class Task(NamedTuple):
    """Inputs of an estimator besides the tokens; static under `jit`.

    `guidance` is the scale w of classifier-free guidance by the context; 0 for none.
    """

    config: RunConfig
    head: Head
    eos_id: int
    guidance: float = 0.0

    @property
    def book(self) -> Codebook:
        return self.head.codebook


class Text(NamedTuple):
    """Rows to score.

    Attributes:
        token_BxL: the true tokens.
        target_BxL: positions that are masked and scored; the others are visible context.
        stop_B: positions from here on are padding, masked in attention; None for no padding.
        max_targets: upper bound on the targets of any row, the same on all devices; None for L.
    """

    token_BxL: jax.Array
    target_BxL: jax.Array
    stop_B: jax.Array | None = None
    max_targets: jax.Array | None = None


def row_nats(head: Head, network: Network, inputs: Inputs, later_BxLxS=None) -> tuple:
    """Per sequence: (marginal, joint) weighted cost in nats of the sub-tokens in `masked & ~later`.

    The marginal cost scores each of them separately, the joint cost those of a token jointly.
    Without `later_BxLxS` all masked sub-tokens are scored.
    """
    h_BxLxD, head_VxD = network(inputs.digits_BxLxS, inputs.segment_ids_BxL, None)
    row_BxL = jnp.asarray(head.codebook.rows)[inputs.token_BxL]
    parts = (row_BxL, inputs.masked_BxLxS, later_BxLxS)
    h_NxD, *flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (h_BxLxD, *parts))
    marginal_N, joint_N = subtoken_log_masses(head, h_NxD, head_VxD, *flat)
    weight_BxL = inputs.weight_BxL
    nats = (-(x_N.reshape(weight_BxL.shape) * weight_BxL).sum(1) for x_N in (marginal_N, joint_N))
    return tuple(nats)


def hidden(task: Task, text: Text, masked_BxLxS, weight_BxL=None) -> Inputs:
    """The rows with these sub-tokens masked; the costs are weighted by position (default 1)."""
    if weight_BxL is None:
        weight_BxL = jnp.ones(text.token_BxL.shape, jnp.float32)
    inputs = masked_inputs(
        task.config,
        book=task.book,
        token_BxL=text.token_BxL,
        masked_BxLxS=masked_BxLxS,
        weight_BxL=weight_BxL,
        eos_id=task.eos_id,
    )
    return inputs if text.stop_B is None else cut(inputs, text.stop_B)


def shifted(task: Task, text: Text) -> Inputs:
    """The inputs of an autoregressive model, scored at the targets."""
    inputs = autoregressive_inputs(task.config, task.book, text.token_BxL, task.eos_id)
    inputs = inputs._replace(
        masked_BxLxS=text.target_BxL[..., None], weight_BxL=text.target_BxL.astype(jnp.float32)
    )
    return inputs if text.stop_B is None else cut(inputs, text.stop_B)


def autoregressive(task: Task, network: Network, text: Text, key_B, uniform_B) -> Values:
    """-log p(x) of an autoregressive model, nats [B]."""
    return {"ar": row_nats(task.head, network, shifted(task, text))[1]}


def fixed_count(score_BxN: jax.Array, candidate_BxN: jax.Array, uniform_B: jax.Array) -> tuple:
    """Mask exactly k of the n candidates, k uniform on 1..n: (mask [B, N], weight n / k [B])."""
    n_B = candidate_BxN.sum(axis=1)
    k_B = 1 + jnp.minimum(jnp.floor(uniform_B * n_B).astype(n_B.dtype), n_B - 1)
    rank_BxN = jnp.argsort(jnp.argsort(jnp.where(candidate_BxN, score_BxN, 2.0), axis=1), axis=1)
    weight_B = jnp.where(n_B > 0, n_B / jnp.maximum(k_B, 1), 0.0)
    return (rank_BxN < k_B[:, None]) & candidate_BxN, weight_B


def independent(score_BxN: jax.Array, candidate_BxN: jax.Array, uniform_B: jax.Array) -> tuple:
    """Mask each candidate with probability t, t uniform: (mask [B, N], weight 1 / t [B]).

    The same bound as `fixed_count` with more variance, for comparison with published numbers.
    """
    t_B = jnp.maximum(uniform_B, 1e-7)  # below that no float32 score is masked
    return (score_BxN < t_B[:, None]) & candidate_BxN, 1 / t_B


MASKINGS = {"": fixed_count, "independent": independent}


def _hide(masking: str, task: Task, score_BxLxU, candidate_BxLxU, uniform_B) -> tuple:
    """(mask [B, L, U], weight [B, L]), separately for each block of block diffusion.

    Each block shifts the stratified draw by the golden ratio, so every level stays uniform.
    """
    batch, length, _ = score_BxLxU.shape
    block = task.config.objective.block_length or length
    shift_G = jnp.arange(length // block) * 0.6180339887
    uniform_BxG = (uniform_B[:, None] + shift_G) % 1.0
    by_block = (x.reshape(uniform_BxG.size, -1) for x in (score_BxLxU, candidate_BxLxU))
    masked, weight = MASKINGS[masking](*by_block, uniform_BxG.reshape(-1))
    weight_BxL = jnp.repeat(weight.reshape(batch, -1), block, axis=1)
    return masked.reshape(score_BxLxU.shape), weight_BxL


def _scores(key_B, shape: tuple[int, ...]) -> jax.Array:
    """Uniform [B, *shape], one key per row."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(key_B)


def subtoken(masking: str, task: Task, network: Network, text: Text, key_B, uniform_B) -> Values:
    """Marginal NELBO over sub-tokens, nats [B].

    With fixed-count masking and l > 1 the same pass gives the published joint loss (not a bound).
    """
    shape = (*text.token_BxL.shape, task.book.length)
    candidate_BxLxS = jnp.broadcast_to(text.target_BxL[..., None], shape)
    drawn = _hide(masking, task, _scores(key_B, shape[1:]), candidate_BxLxS, uniform_B)
    marginal_B, joint_B = row_nats(task.head, network, hidden(task, text, *drawn))
    if masking:
        return {f"subtoken:{masking}": marginal_B}
    values = {"subtoken": marginal_B}
    if task.book.length > 1:
        values["joint"] = joint_B
    return values


def token(masking: str, task: Task, network: Network, text: Text, key_B, uniform_B) -> Values:
    """NELBO of the token-level mask process: whole tokens masked, joint cost, nats [B]."""
    score = _scores(key_B, text.token_BxL.shape[1:])
    whole = (score[..., None], text.target_BxL[..., None])
    masked_BxLx1, weight_BxL = _hide(masking, task, *whole, uniform_B)
    masked_BxLxS = jnp.broadcast_to(masked_BxLx1, (*score.shape, task.book.length))
    inputs = hidden(task, text, masked_BxLxS, weight_BxL)
    label = f"token:{masking}" if masking else "token"
    return {label: row_nats(task.head, network, inputs)[1]}


def finite(steps: int, task: Task, network: Network, text: Text, key_B, uniform_B) -> Values:
    """NELBO of the sampler with `steps` linear steps and within-token joint reveals, nats [B].

    One step is drawn at random, with the importance sampling of `one_step`.
    """
    shape = (*text.token_BxL.shape[1:], task.book.length)
    candidate_BxLxS = jnp.broadcast_to(text.target_BxL[..., None], (len(text.token_BxL), *shape))
    step_B = 1 + jnp.minimum(jnp.floor(uniform_B * steps), steps - 1)
    key_3xB = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(key_B)
    hide_BxLxS, reveal_BxLxS = (_scores(key_3xB[k], shape) for k in range(2))
    masked, later, weight = one_step(
        steps,
        step_B=step_B,
        pick_B=_scores(key_3xB[2], ()),
        hide_BxLxS=hide_BxLxS,
        reveal_BxLxS=reveal_BxLxS,
        candidate_BxLxS=candidate_BxLxS,
    )
    nats_B = row_nats(task.head, network, hidden(task, text, masked, weight), later)[1]
    return {f"finite:{steps}": nats_B}


def one_step(
    steps: int, step_B, pick_B, hide_BxLxS, reveal_BxLxS, candidate_BxLxS
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For one of `steps` linear steps: (masked before it, masked after it, weight per position).

    At step i each of the n candidates is masked with probability t = i / steps, and each masked one
    revealed with probability 1 / i. With many steps most reveal nothing, so draws are conditioned:
    one candidate is always masked (with k masked the weight is n / k), and each token with h > 0
    masked ones reveals at least one of them (weight i (1 - (1 - 1/i)**h), at most h). Both are
    exact: for the distribution p of a step, k p(k) / (n t) and p(R | R not empty) p(R not empty)
    (docs/theory.md). A weight is at most n for any `steps`; in the limit of infinitely many, each
    masked token scores one of its digits h times, and the mean is that of `subtoken`.

    Args:
        step_B: i, in 1..steps.
        pick_B: uniform in [0, 1): the candidate that is always masked.
        hide_BxLxS, reveal_BxLxS: uniform in [0, 1).
    """
    shape = candidate_BxLxS.shape
    flat_BxN = candidate_BxLxS.reshape(shape[0], -1)
    n_B = flat_BxN.sum(axis=1)
    rank_B = 1 + jnp.minimum(jnp.floor(pick_B * n_B).astype(n_B.dtype), n_B - 1)
    picked_BxLxS = (flat_BxN & (jnp.cumsum(flat_BxN, axis=1) == rank_B[:, None])).reshape(shape)
    step_Bx1x1 = step_B[:, None, None]
    masked_BxLxS = candidate_BxLxS & ((hide_BxLxS < step_Bx1x1 / steps) | picked_BxLxS)
    k_B = masked_BxLxS.sum((1, 2))

    def some(count):
        """1 - (1 - 1/i)**count: probability that any of `count` is revealed; exact for large i."""
        log_none = jnp.log1p(-1 / jnp.maximum(step_Bx1x1, 2))
        chance = jnp.where(step_Bx1x1 > 1, -jnp.expm1(count * log_none), 1.0)
        return jnp.where(count > 0, chance, 0.0)

    # Digit by digit with probability 1/i, given that at least one of the token is revealed.
    left_BxLxS = jnp.cumsum(masked_BxLxS[..., ::-1], axis=-1)[..., ::-1]
    first_BxLxS = masked_BxLxS & (reveal_BxLxS * some(left_BxLxS) * step_Bx1x1 < 1)
    before_BxLxS = jnp.cumsum(first_BxLxS, axis=-1) > first_BxLxS
    revealed_BxLxS = jnp.where(before_BxLxS, reveal_BxLxS * step_Bx1x1 < 1, first_BxLxS)
    weight_BxL = (step_Bx1x1 * some(left_BxLxS[..., :1]))[..., 0]
    weight_BxL *= jnp.where(k_B > 0, n_B / jnp.maximum(k_B, 1), 0.0)[:, None]
    return masked_BxLxS, masked_BxLxS & ~revealed_BxLxS, weight_BxL


def guided_by_context(task: Task, network: Network, context_BxL: jax.Array) -> Network:
    """The network, guided by its difference from one that does not see the context."""

    def combined(digits_BxLxS, segment_ids_BxL, keys_B):
        h_BxLxD, head_VxD = network(digits_BxLxS, segment_ids_BxL, keys_B)
        context = context_BxL[..., None]
        if digits_BxLxS.ndim == 4:  # noisy and clean, in block diffusion
            context = context[:, None]
        blind_BxLxS = jnp.where(context, task.book.base, digits_BxLxS)
        without_BxLxD, _ = network(blind_BxLxS, segment_ids_BxL, keys_B)
        return guided(h_BxLxD, without_BxLxD, task.guidance), head_VxD

    return combined


def make_task(
    config: RunConfig,
    codebook: Codebook,
    eos_id: int,
    axis_name: str | None = None,
    guidance: float = 0.0,
) -> Task:
    """Args: axis_name: mesh axis that splits the head's rows (`make_head`)."""
    return Task(config, make_head(config, codebook, axis_name), eos_id, guidance)
