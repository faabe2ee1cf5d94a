"""Chain-rule likelihoods: the cost of revealing a text in some order, one network call per step.

`l2r` reveals from left to right. `confidence`, `margin` and `entropy` reveal the token of which the
network is most confident, given the visible ones only: there is then exactly one order for each
text, and the sum of its costs is the exact negative log-likelihood of that sampler (DUEL, arXiv
2603.01367). `random` draws an order of the tokens, `subtokens` one of all sub-tokens; their mean
over orders bounds the likelihood of the any-order model and equals the `token` and the `subtoken`
NELBO.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prime_jax.evaluate.estimators import Task, Text, Values, hidden, shifted
from prime_jax.kernels.subtoken_head import subtoken_log_masses
from prime_jax.objectives import Network
from prime_jax.sample.orders import SCORES, behind

ORDERS = ("l2r", "confidence", "margin", "entropy", "random", "subtokens")
ROWS = 256  # positions whose logits are computed at a time


class Readout(NamedTuple):
    """Predictions for fully masked tokens."""

    score_N: jax.Array  # larger is revealed earlier
    best_N: jax.Array  # head row of the most likely token


def readout(order: str, h_NxD: jax.Array, head_VxD: jax.Array) -> Readout:
    """Scores of a sampler that reveals in this order (`sample.orders.SCORES`)."""

    def one(h_D):
        z_V = jnp.einsum("d,vd->v", h_D, head_VxD, preferred_element_type=jnp.float32)
        log_p_V = jax.nn.log_softmax(z_V)
        best = log_p_V.argmax()
        return SCORES[order](log_p_V[None], best[None])[0], best

    return Readout(*jax.lax.map(one, h_NxD, batch_size=ROWS))


def chain(order: str, task: Task, network: Network, text: Text, key_B, uniform_B) -> Values:
    """Sum over the reveal steps of the cost of each, nats [B]."""
    return {f"chain:{order}": reveal(order, task, network, text, key_B)[0]}


def reveal(order: str, task: Task, network: Network, text: Text, key_B) -> tuple:
    """(nats [B], whether every revealed token was the most likely one [B]; token orders only)."""
    batch, length = text.token_BxL.shape
    slots = task.book.length
    units = slots if order == "subtokens" else 1  # units per position, revealed one by one
    row_BxL = jnp.asarray(task.book.rows)[text.token_BxL]
    fixed_BxU = _fixed(order, key_B, length, units)
    steps = length if text.max_targets is None else text.max_targets
    rows_B = jnp.arange(batch)

    def wide(unit_BxU):
        whole = unit_BxU.reshape(batch, length, units)
        return jnp.broadcast_to(whole, (batch, length, slots))

    def step(_, state):
        open_BxU, nats_B, greedy_B = state
        inputs = hidden(task, text, wide(open_BxU))
        h_BxLxD, head_VxD = network(inputs.digits_BxLxS, inputs.segment_ids_BxL, None)
        if fixed_BxU is None:
            out = readout(order, h_BxLxD.reshape(batch * length, -1), head_VxD)
            score_BxL = out.score_N.reshape(batch, length)
            later_BxU = behind(score_BxL, open_BxU, h_BxLxD.dtype)
            likeliest_BxL = out.best_N.reshape(batch, length) == row_BxL
        else:
            later_BxU = jnp.where(open_BxU, fixed_BxU, jnp.inf)
        unit_B = later_BxU.argmin(axis=1)
        taken_B = open_BxU[rows_B, unit_B]  # False where none is left
        left_BxU = open_BxU.at[rows_B, unit_B].set(False)
        here = rows_B, unit_B // units
        revealed = row_BxL[here], wide(open_BxU)[here], wide(left_BxU)[here]
        log_p_B = subtoken_log_masses(task.head, h_BxLxD[here], head_VxD, *revealed)[1]
        if fixed_BxU is None:
            greedy_B &= likeliest_BxL[here] | ~taken_B
        return left_BxU, nats_B + jnp.where(taken_B, -log_p_B, 0.0), greedy_B

    target = jnp.broadcast_to(text.target_BxL[..., None], (batch, length, units))
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(float))
    start = (target.reshape(batch, -1), jnp.zeros(batch, dtype), jnp.ones(batch, bool))
    _, nats_B, greedy_B = jax.lax.fori_loop(0, steps * units, step, start)
    return nats_B, greedy_B


def _fixed(order: str, key_B, length: int, units: int) -> jax.Array | None:
    """Times [B, length * units] of an order that does not depend on the text; None for others."""
    if order == "l2r":
        return jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32), (len(key_B), length))
    if order in ("random", "subtokens"):
        return -jax.vmap(lambda key: jax.random.uniform(key, (length * units,)))(key_B)
    return None


def greedy(task: Task, network: Network, text: Text, key_B, uniform_B) -> Values:
    """1 where greedy decoding gives exactly these targets, else 0 [B].

    An autoregressive model decodes left to right, a diffusion model the most confident token first.
    """
    if task.config.family != "arm":
        return {"greedy": reveal("confidence", task, network, text, key_B)[1] * 1.0}
    inputs = shifted(task, text)
    h_BxLxD, head_VxD = network(inputs.digits_BxLxS, inputs.segment_ids_BxL, None)
    best_N = readout("confidence", h_BxLxD.reshape(-1, h_BxLxD.shape[-1]), head_VxD).best_N
    row_BxL = jnp.asarray(task.book.rows)[text.token_BxL]
    right_BxL = best_N.reshape(row_BxL.shape) == row_BxL
    return {"greedy": (right_BxL | ~text.target_BxL).all(axis=1) * 1.0}
