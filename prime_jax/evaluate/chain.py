"""Chain-rule likelihoods: the cost of revealing a text in a fixed order, one network call a step.

`l2r` reveals from left to right. `confidence`, `margin` and `entropy` reveal what the network is
surest of, judged by what is visible alone: each text is then reached along one path only, and the
sum of its costs is the exact negative log-likelihood of that sampler (DUEL, arXiv 2603.01367).
`random` draws an order of the tokens, `subtokens` one of all sub-tokens; their mean over orders
bounds the likelihood of the any-order model and equals the `token` and the `subtoken` NELBO.

With K > 1 a step reveals K tokens at once, each drawn on its own; a text's L targets take
ceil(L / K) calls.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prime_jax.errors import UserError
from prime_jax.evaluate.estimators import Task, Text, Values, hidden, shifted
from prime_jax.kernels.subtoken_head import subtoken_log_masses
from prime_jax.objectives import Network

ORDERS = ("l2r", "confidence", "margin", "entropy", "random", "subtokens")
ROWS = 256  # positions whose logits exist at one time


class Order(NamedTuple):
    name: str
    at_once: int = 1  # K, tokens revealed per call


def parse(text: str) -> Order | None:
    """`ORDER` or `ORDER:K`; None where it is neither."""
    name, colon, count = text.partition(":")
    if name not in ORDERS or (colon and not (count.isdigit() and int(count) > 0)):
        return None
    if name == "subtokens" and colon:
        return None  # several sub-tokens at once are what finite:T is for
    return Order(name, int(count or 1))


class Readout(NamedTuple):
    """What the network thinks of hidden tokens, nothing of them being visible."""

    sureness_N: jax.Array  # the larger, the sooner revealed
    best_N: jax.Array  # head row of the likeliest token


def readout(order: str, h_NxD: jax.Array, head_VxD: jax.Array) -> Readout:
    """Sureness by `confidence` (log p of the likeliest token), `margin` (p of it minus p of the
    next) or `entropy` (minus the entropy in nats)."""

    def one(h_D):
        z_V = jnp.einsum("d,vd->v", h_D, head_VxD, preferred_element_type=jnp.float32)
        log_p_V = jax.nn.log_softmax(z_V)
        (first, second), best = jax.lax.top_k(log_p_V, 2)
        if order == "margin":
            return jnp.exp(first) - jnp.exp(second), best[0]
        if order == "entropy":
            return (jnp.exp(log_p_V) * log_p_V).sum(), best[0]
        return first, best[0]

    return Readout(*jax.lax.map(one, h_NxD, batch_size=ROWS))


def chain(
    label: str, order: Order, task: Task, network: Network, text: Text, key_B, uniform_B
) -> Values:
    """Sum over the reveal steps of the cost of what each reveals, nats [B]."""
    return {label: reveal(order, task, network, text, key_B)[0]}


def reveal(order: Order, task: Task, network: Network, text: Text, key_B) -> tuple:
    """(nats [B], whether every revealed token was the likeliest one [B]; token orders only)."""
    batch, length = text.token_BxL.shape
    slots = task.book.length
    units = slots if order.name == "subtokens" else 1  # revealed on their own, per position
    row_BxL = jnp.asarray(task.book.rows)[text.token_BxL]
    fixed_BxU = _fixed(order, key_B, length, units)
    if fixed_BxU is None and order.at_once > 1 and task.config.objective.block_length:
        raise UserError(
            f"chain:{order.name}:{order.at_once}: block diffusion decides about one block at a "
            "time, so give no K here"
        )
    most = length if text.most is None else text.most
    steps = -(-most * units // order.at_once)

    def wide(unit_BxU):
        whole = unit_BxU.reshape(batch, length, units)
        return jnp.broadcast_to(whole, (batch, length, slots))

    def step(_, state):
        open_BxU, nats_B, greedy_B = state
        inputs = hidden(task, text, wide(open_BxU))
        h_BxLxD, head_VxD = network(inputs.digits_BxLxS, inputs.segment_ids_BxL, None)
        sureness_BxU = fixed_BxU
        if fixed_BxU is None:
            said = readout(order.name, h_BxLxD.reshape(batch * length, -1), head_VxD)
            sureness_BxU = said.sureness_N.reshape(batch, length)
            likeliest_BxL = said.best_N.reshape(batch, length) == row_BxL
        ranked_BxU = jnp.where(open_BxU, sureness_BxU, -jnp.inf)
        unit_BxK = jax.lax.top_k(ranked_BxU, order.at_once)[1]
        taken_BxK = _at(open_BxU, unit_BxK)  # False where fewer are left
        rows_B = jnp.arange(batch)[:, None]
        left_BxU = open_BxU.at[rows_B, unit_BxK].set(False)
        position_BxK = unit_BxK // units
        parts = (
            h_BxLxD[rows_B, position_BxK],
            row_BxL[rows_B, position_BxK],
            wide(open_BxU)[rows_B, position_BxK],
            wide(left_BxU)[rows_B, position_BxK],
        )
        h_NxD, *flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)
        log_p_N = subtoken_log_masses(task.head, h_NxD, head_VxD, *flat)[1]
        cost_BxK = jnp.where(taken_BxK, -log_p_N.reshape(batch, -1), 0.0)
        if fixed_BxU is None:
            greedy_B &= (_at(likeliest_BxL, unit_BxK) | ~taken_BxK).all(axis=1)
        return left_BxU, nats_B + cost_BxK.sum(axis=1), greedy_B

    target = jnp.broadcast_to(text.target_BxL[..., None], (batch, length, units))
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(float))
    start = (target.reshape(batch, -1), jnp.zeros(batch, dtype), jnp.ones(batch, bool))
    _, nats_B, greedy_B = jax.lax.fori_loop(0, steps, step, start)
    return nats_B, greedy_B


def _fixed(order: Order, key_B, length: int, units: int) -> jax.Array | None:
    """What an order that does not look at the text ranks units by [B, length * units], or None."""
    if order.name == "l2r":
        return jnp.broadcast_to(-jnp.arange(length, dtype=jnp.float32), (len(key_B), length))
    if order.name in ("random", "subtokens"):
        return jax.vmap(lambda key: jax.random.uniform(key, (length * units,)))(key_B)
    return None


def _at(x_BxU: jax.Array, unit_BxK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BxU, unit_BxK, axis=1)


def greedy(task: Task, network: Network, text: Text, key_B, uniform_B) -> Values:
    """1 where greedy decoding gives exactly these targets, else 0 [B].

    An autoregressive model decodes left to right, a diffusion model its surest token first.
    """
    if task.config.family != "arm":
        return {"greedy": reveal(Order("confidence"), task, network, text, key_B)[1] * 1.0}
    inputs = shifted(task, text)
    h_BxLxD, head_VxD = network(inputs.digits_BxLxS, inputs.segment_ids_BxL, None)
    best_N = readout("confidence", h_BxLxD.reshape(-1, h_BxLxD.shape[-1]), head_VxD).best_N
    row_BxL = jnp.asarray(task.book.rows)[text.token_BxL]
    right_BxL = best_N.reshape(row_BxL.shape) == row_BxL
    return {"greedy": (right_BxL | ~text.target_BxL).all(axis=1) * 1.0}
