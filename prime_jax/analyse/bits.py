"""Difficulty of each sub-token of a token: its part of the bound, and its error rate.

For the masked sub-token of slot j (0 = most significant), averaged over noise levels as in the
bound: `nats`, its -log P_j (summed over slots: the sub-token NELBO, nats per token), and `error`,
the rate at which the most likely digit is wrong. For comparison, both for the unigram distribution
of the corpus.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.analyse.subjects import SEED, Subject
from prime_jax.evaluate import likelihood
from prime_jax.evaluate.estimators import fixed_count
from prime_jax.kernels.subtoken_head import Head, subtoken_log_probs
from prime_jax.objectives import Inputs, make_head, masked_inputs, targets
from prime_jax.runtime.records import as_dict
from prime_jax.subtokens import Codebook


def hide(subject: Subject, token_BxL, key_B, uniform_B) -> tuple[Inputs, jax.Array]:
    """Inputs with exactly k of n sub-tokens masked, and their weight n / k [B]."""
    c, book, eos_id = subject.run.config, subject.run.codebook, subject.run.eos_id
    shape = (*token_BxL.shape, book.length)
    may = jnp.broadcast_to(targets(c, token_BxL, eos_id)[..., None], shape).reshape(shape[0], -1)
    score = jax.vmap(lambda key: jax.random.uniform(key, may.shape[1:]))(key_B)
    masked, weight_B = fixed_count(score, may, uniform_B)
    ones_BxL = jnp.ones(token_BxL.shape, jnp.float32)
    inputs = masked_inputs(
        c,
        book=book,
        token_BxL=token_BxL,
        masked_BxLxS=masked.reshape(shape),
        weight_BxL=ones_BxL,
        eos_id=eos_id,
    )
    return inputs, weight_B


def keys_of(replicate_B, example_B) -> jax.Array:
    fold = jax.random.fold_in
    return jax.vmap(lambda r, e: fold(fold(jax.random.key(SEED), r), e))(replicate_B, example_B)


def _draw(subject: Subject, head: Head, params, token_BxL, replicate_B, example_B, uniform_B):
    """Weighted nats and errors of each slot, both [B, S]."""
    inputs, weight_B = hide(subject, token_BxL, keys_of(replicate_B, example_B), uniform_B)
    network = subject.run.network(params)
    h_BxLxD, head_VxD = network(inputs.digits_BxLxS, inputs.segment_ids_BxL, None)
    row_BxL = jnp.asarray(head.codebook.rows)[token_BxL]
    flat: Callable = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    _, marginals, joint_N = subtoken_log_probs(
        head, flat(h_BxLxD), head_VxD, flat(row_BxL), flat(inputs.masked_BxLxS)
    )
    if marginals is None:
        likeliest = partial(jax.lax.map, lambda h_LxD: (h_LxD @ head_VxD.T).argmax(-1))
        nats_NxS, wrong_NxS = -joint_N[:, None], flat(likeliest(h_BxLxD) != row_BxL)[:, None]
    else:
        digit_NxS = jnp.asarray(head.codebook.digits)[flat(token_BxL)]
        nats_NxS = -jnp.take_along_axis(marginals, digit_NxS[..., None], 2)[..., 0]
        wrong_NxS = marginals.argmax(-1) != digit_NxS
    hidden = inputs.masked_BxLxS

    def total(x_NxS):
        x_BxLxS = x_NxS.reshape(hidden.shape).astype(jnp.float32)
        return weight_B[:, None] * jnp.where(hidden, x_BxLxS, 0).sum(axis=1)

    return total(nats_NxS), total(wrong_NxS)


def measure(
    subject: Subject, examples: int, replicates: int, tick: Callable[[], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each slot, and their sum, the bound."""
    run, blocks = subject.run, subject.blocks(examples)
    count = len(blocks.tokens)
    rows = likelihood.grid(count, replicates)
    draw = jax.jit(partial(_draw, subject, make_head(run.config, run.codebook)))
    size = min(run.config.eval.batch_size, len(rows.example))
    pending = []
    for row in likelihood.batches(rows, size):
        tokens = blocks.tokens[row.example]
        pending.append(draw(subject.params, tokens, row.replicate, row.example, row.uniform))
        tick()
    nats, wrong = (
        np.concatenate([np.asarray(x, np.float64) for x in part])[: len(rows.example)]
        .reshape(replicates, count, -1)
        for part in zip(*pending, strict=True)
    )  # fmt: skip
    about = (subject.target_counts(blocks.tokens), blocks.doc, subject.given)
    prior_nats, prior_error = unigram(run.codebook, subject.data.unigram())
    out = []
    for slot in range(run.codebook.length):
        loss = likelihood.summarise("subtoken", nats[..., slot], *about)
        error = likelihood.summarise("subtoken", wrong[..., slot], *about)
        out.append(
            {
                "run": subject.name,
                "slot": slot,
                "nats": loss.value,
                "nats_se_mc": loss.se_mc,
                "nats_se_data": loss.se_data,
                "error": error.value,
                "error_se_mc": error.se_mc,
                "error_se_data": error.se_data,
                "unigram_nats": float(prior_nats[slot]),
                "unigram_error": float(prior_error[slot]),
            }
        )
    bound = likelihood.summarise("subtoken", nats.sum(axis=-1), *about)
    summary = {"run": subject.name, "eval_set": blocks.hash, "examples": count}
    return out, summary | {"losses": [as_dict(bound)]}


def unigram(book: Codebook, count_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entropy in nats and minimal error rate of each slot, from token counts only."""
    p_SxC = np.zeros((book.length, book.base))
    for slot in range(book.length):
        np.add.at(p_SxC[slot], book.digits[:, slot], count_V / count_V.sum())
    logs = np.log(np.where(p_SxC > 0, p_SxC, 1))
    return -(p_SxC * logs).sum(axis=1), 1 - p_SxC.max(axis=1)
