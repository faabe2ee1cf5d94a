"""Random problems for the head, and its losses from the dense twin."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import SubtokenConfig
from prime_jax.kernels.subtoken_head import Head, subtoken_log_probs, subtoken_loss
from prime_jax.kernels.subtoken_head_base import in_joint_loss
from prime_jax.kernels.subtoken_head_reference import (
    subtoken_head_reference,
    subtoken_log_probs_reference,
)
from prime_jax.subtokens import Codebook


class Problem(NamedTuple):
    """Arguments of the head; the first rows are: all visible, all masked, one slot masked."""

    book: Codebook
    h: jax.Array
    rows: jax.Array  # of the head
    true: jax.Array  # head row of each true token
    masked: jax.Array
    weight: jax.Array


def problem(vocab=37, length=6, rows=24, width=8, seed=0, scope="vocab", scale=1.0) -> Problem:
    rng = np.random.default_rng(seed)
    book = Codebook.create(vocab, SubtokenConfig(length=length, scope=scope, seed=seed))
    masked = rng.random((rows, length)) < rng.random((rows, 1))
    masked[:3] = np.array([[False], [True], [False]])[: min(rows, 3)]
    masked[2:3, 0] = True
    return Problem(
        book,
        jnp.asarray(rng.normal(0, scale, (rows, width)), jnp.float32),
        jnp.asarray(rng.normal(0, 1, (vocab, width)), jnp.float32),
        jnp.asarray(rng.integers(0, vocab, rows), jnp.int32),
        jnp.asarray(masked),
        jnp.asarray(rng.random(rows) + 0.1, jnp.float32),
    )


def reference_loss(head: Head, h, rows, true, masked, weight, whole=None):
    """The weighted sums of `subtoken_loss`, from the dense twin."""
    slots, joint = subtoken_head_reference(head, h, rows, true, masked)
    marginal = -slots.sum(1)
    if whole is not None:
        marginal = jnp.where(whole & masked.any(1), -joint, marginal)
    pays = jnp.where(in_joint_loss(head, masked), weight, 0)
    return (weight * marginal).sum(), -(pays * joint).sum()


def all_outputs(log_probs, head: Head, p: Problem, h, rows):
    """A number that depends on every output of `subtoken_log_probs` in its own way."""
    lse, marginals, joint = log_probs(head, h, rows, p.true, p.masked)
    total = (jnp.sin(lse) * p.weight).sum() + (joint**2 * p.weight).sum()
    if marginals is None:
        return total
    place = 1 + jnp.arange(marginals[0].size).reshape(marginals.shape[1:])
    return total + jnp.where(marginals > -40, jnp.cos(marginals) * place, 0).sum()


def loss_pair(head: Head, p: Problem, whole=None):
    """(the loss that trains, its dense twin) as functions of hidden states and head rows."""
    index = 0 if head.loss == "marginal" else 1
    rest = (p.true, p.masked, p.weight, whole)
    ours = lambda h, rows: subtoken_loss(head, h, rows, *rest)[index]  # noqa: E731
    twin = lambda h, rows: reference_loss(head, h, rows, *rest)[index]  # noqa: E731
    return ours, twin


def log_prob_pair(head: Head, p: Problem):
    """(a function of everything `subtoken_log_probs` returns, the same of its dense twin)."""
    return tuple(
        partial(all_outputs, f, head, p) for f in (subtoken_log_probs, subtoken_log_probs_reference)
    )


def compare(pair, *arguments, rtol: float) -> None:
    """Values, and gradients relative to their largest entry."""
    number = tuple(range(len(arguments)))
    with jax.default_matmul_precision("highest"):
        got, want = (jax.jit(jax.value_and_grad(f, number))(*arguments) for f in pair)
    np.testing.assert_allclose(got[0], want[0], rtol=rtol)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max(), rtol=0)
