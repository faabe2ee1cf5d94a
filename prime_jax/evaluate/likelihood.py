"""Valid likelihood numbers with standard errors: exact NLL, NELBOs by fixed-count masking.

Each estimator maps sequences to one unbiased draw of their bound in nats. A draw is repeated over
independent replicates of the whole evaluation set, inside which the noise level is stratified over
the examples; `se_mc` therefore comes from the spread over replicates, never from inside one
(math.md section 3). Keys depend on (replicate, example) only: all runs of a sweep are paired.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.kernels.subtoken_head import Head, subtoken_log_masses
from prime_jax.objectives import (
    Inputs,
    Network,
    autoregressive_inputs,
    make_head,
    masked_inputs,
    targets,
)
from prime_jax.records import Loss
from prime_jax.schedule import stratum
from prime_jax.subtokens import Codebook

Values = dict[str, jax.Array]  # estimator name -> nats [B]
EVAL_SEED = 20_260  # fixed: every run of every sweep hides the same sub-tokens


class Task(NamedTuple):
    """What an estimator needs besides the tokens; static under `jit`."""

    config: RunConfig
    head: Head
    eos_id: int

    @property
    def book(self) -> Codebook:
        return self.head.codebook


def row_nats(head: Head, network: Network, inputs: Inputs, later_BxLxS=None) -> tuple:
    """Per sequence: (marginal, joint) weighted cost in nats of the sub-tokens in `masked & ~later`.

    The marginal cost charges each of them alone, the joint cost within-token together. Without
    `later_BxLxS` nothing is left for later.
    """
    h_BxLxD, head_VxD = network(inputs.digits_BxLxS, inputs.segment_ids_BxL, None)
    row_BxL = jnp.asarray(head.codebook.rows)[inputs.token_BxL]
    parts = (row_BxL, inputs.masked_BxLxS, later_BxLxS)
    h_NxD, *flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (h_BxLxD, *parts))
    marginal_N, joint_N = subtoken_log_masses(head, h_NxD, head_VxD, *flat)
    weight_BxL = inputs.weight_BxL
    nats = (-(x_N.reshape(weight_BxL.shape) * weight_BxL).sum(1) for x_N in (marginal_N, joint_N))
    return tuple(nats)


def _hidden(task: Task, token_BxL, masked_BxLxS, weight_BxL=None) -> Inputs:
    if weight_BxL is None:
        weight_BxL = jnp.ones(token_BxL.shape, jnp.float32)
    return masked_inputs(task.config, task.book, token_BxL, masked_BxLxS, weight_BxL, task.eos_id)


def exact(task: Task, network: Network, token_BxL, key_B, uniform_B) -> Values:
    """-log p(x) of an autoregressive model, nats [B]."""
    inputs = autoregressive_inputs(task.config, task.book, token_BxL, task.eos_id)
    return {"ar": row_nats(task.head, network, inputs)[1]}


def fixed_count(score_BxN: jax.Array, candidate_BxN: jax.Array, uniform_B: jax.Array) -> tuple:
    """Hide exactly k of the n candidates, k uniform on 1..n: (mask [B, N], weight n / k [B])."""
    n_B = candidate_BxN.sum(axis=1)
    k_B = 1 + jnp.minimum(jnp.floor(uniform_B * n_B).astype(n_B.dtype), n_B - 1)
    rank_BxN = jnp.argsort(jnp.argsort(jnp.where(candidate_BxN, score_BxN, 2.0), axis=1), axis=1)
    weight_B = jnp.where(n_B > 0, n_B / jnp.maximum(k_B, 1), 0.0)
    return (rank_BxN < k_B[:, None]) & candidate_BxN, weight_B


def hide_in_blocks(
    config: RunConfig, score_BxLxS: jax.Array, candidate_BxLxS: jax.Array, uniform_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`fixed_count` in every block of block diffusion, else in the sequence: (mask, weight [B, L]).

    Blocks shift the stratified draw by a golden ratio each: every level stays uniform.
    """
    batch, length, _ = score_BxLxS.shape
    block = config.objective.block_length or length
    shift_G = jnp.arange(length // block) * 0.6180339887
    uniform_BxG = (uniform_B[:, None] + shift_G) % 1.0
    by_block = (x.reshape(uniform_BxG.size, -1) for x in (score_BxLxS, candidate_BxLxS))
    masked, weight = fixed_count(*by_block, uniform_BxG.reshape(-1))
    weight_BxL = jnp.repeat(weight.reshape(batch, -1), block, axis=1)
    return masked.reshape(score_BxLxS.shape), weight_BxL


def subtoken(task: Task, network: Network, token_BxL, key_B, uniform_B) -> Values:
    """Marginal NELBO over sub-tokens, fixed-count masking, nats [B].

    Where l > 1 the same pass gives the published joint loss, which is not a bound.
    """
    shape = (*token_BxL.shape, task.book.length)
    target_BxL = targets(task.config, token_BxL, task.eos_id)
    candidate_BxLxS = jnp.broadcast_to(target_BxL[..., None], shape)
    score = jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(key_B)
    hidden = hide_in_blocks(task.config, score, candidate_BxLxS, uniform_B)
    marginal_B, joint_B = row_nats(task.head, network, _hidden(task, token_BxL, *hidden))
    return {"subtoken": marginal_B} | ({"joint": joint_B} if task.book.length > 1 else {})


def token(task: Task, network: Network, token_BxL, key_B, uniform_B) -> Values:
    """NELBO of the token-level mask process: whole tokens hidden, joint cost, nats [B]."""
    target_BxL = targets(task.config, token_BxL, task.eos_id)
    score = jax.vmap(lambda key: jax.random.uniform(key, token_BxL.shape[1:]))(key_B)
    whole = (score[..., None], target_BxL[..., None])
    masked_BxLx1, weight_BxL = hide_in_blocks(task.config, *whole, uniform_B)
    masked_BxLxS = jnp.broadcast_to(masked_BxLx1, (*token_BxL.shape, task.book.length))
    inputs = _hidden(task, token_BxL, masked_BxLxS, weight_BxL)
    return {"token": row_nats(task.head, network, inputs)[1]}


def finite(steps: int, task: Task, network: Network, token_BxL, key_B, uniform_B) -> Values:
    """NELBO of the sampler with `steps` linear steps and within-token joint reveals, nats [B]."""
    step_B = 1 + jnp.minimum(jnp.floor(uniform_B * steps), steps - 1)
    shape = (*token_BxL.shape, task.book.length)
    target_BxL = targets(task.config, token_BxL, task.eos_id)
    score = jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(key_B)

    def hidden_at(t_B):
        return (score < t_B[:, None, None]) & target_BxL[..., None]

    inputs = _hidden(task, token_BxL, hidden_at(step_B / steps))
    later_BxLxS = hidden_at((step_B - 1) / steps)
    nats_B = row_nats(task.head, network, inputs, later_BxLxS)[1]
    return {f"finite:{steps}": steps * nats_B}


def estimator(name: str) -> Callable[..., Values]:
    """The function behind an estimator's name: `ar`, `subtoken`, `token`, `finite:T`.

    Raises:
        UserError: an unknown name.
    """
    head, _, steps = name.partition(":")
    if head == "finite" and steps.isdigit() and int(steps) > 0:
        return partial(finite, int(steps))
    if name in ("ar", "subtoken", "token"):
        return {"ar": exact, "subtoken": subtoken, "token": token}[name]
    raise UserError(
        f"eval.estimators: {name!r} is not one of subtoken, token, finite:T (T a number of steps)"
    )


def estimators_of(config: RunConfig, book: Codebook) -> list[str]:
    """The estimators that apply: `ar` alone for ARM; `token` equals `subtoken` where l = 1."""
    for name in config.eval.estimators:
        estimator(name)
    if config.family == "arm":
        return ["ar"]
    names = [name for name in config.eval.estimators if name != "ar"]
    if book.length == 1 and "subtoken" in names:
        names = [name for name in names if name != "token"]
    return names


def draw(task: Task, name: str, network: Network, token_BxL, replicate_B, example_B, uniform_B):
    """One draw for every row; keys depend on (replicate, example) alone."""
    key = jax.random.key(EVAL_SEED)
    fold = jax.vmap(lambda r, e: jax.random.fold_in(jax.random.fold_in(key, r), e))
    return estimator(name)(task, network, token_BxL, fold(replicate_B, example_B), uniform_B)


class Row(NamedTuple):
    """A batch of (replicate, example) pairs and their stratified draw in [0, 1)."""

    replicate: np.ndarray
    example: np.ndarray
    uniform: np.ndarray


def grid(examples: int, replicates: int) -> Row:
    """All pairs, with noise levels stratified over the examples of each replicate."""
    replicate = np.repeat(np.arange(replicates, dtype=np.int32), examples)
    example = np.tile(np.arange(examples, dtype=np.int32), replicates)
    offset = np.random.default_rng(EVAL_SEED).random(replicates)
    # A shuffled stratum per replicate: an example meets a new noise level each time.
    strata = [stratum(np.arange(examples) + 7919 * r, examples) for r in range(replicates)]
    uniform = (offset[:, None] + np.array(strata) / examples) % 1.0
    return Row(replicate, example, uniform.reshape(-1).astype(np.float32))


def batches(rows: Row, size: int) -> Iterator[Row]:
    """Equal batches; the last one is filled up by repeating its final row."""
    total = len(rows.example)
    for start in range(0, total, size):
        index = np.minimum(np.arange(start, start + size), total - 1)
        yield Row(*(x[index] for x in rows))


def summarise(
    name: str, nats_RxE: np.ndarray, n_tokens_E: np.ndarray, doc_E: np.ndarray, given: str
) -> Loss:
    """Mean per target token with its two standard errors.

    `se_mc` is the spread of the replicate means; `se_data` is clustered by document (the document
    of a block's first token) and contains what Monte-Carlo noise is left in the example means.
    """
    replicates, total = len(nats_RxE), int(n_tokens_E.sum())
    mean_R = nats_RxE.sum(axis=1) / total
    value = float(mean_R.mean())
    se_mc = float(mean_R.std(ddof=1) / replicates**0.5) if replicates > 1 else 0.0
    residual_E = nats_RxE.mean(axis=0) - value * n_tokens_E
    _, cluster_E = np.unique(doc_E, return_inverse=True)
    cluster_C = np.bincount(cluster_E, weights=residual_E)
    n = len(cluster_C)
    se_data = float((n / max(n - 1, 1) * (cluster_C**2).sum()) ** 0.5 / total)
    kind = {"ar": "nll", "joint": "train_loss"}.get(name, "nelbo")
    return Loss(kind, name, value, se_mc, se_data, total, replicates, given)


class Evaluation(NamedTuple):
    """Losses, and the draws behind them: {estimator: nats [R, E]} and target tokens [E].

    Runs that share an evaluation set share its draws, so differences can be paired.
    """

    losses: list[Loss]
    nats: dict[str, np.ndarray]
    n_tokens: np.ndarray


def evaluate(
    config: RunConfig,
    codebook: Codebook,
    run_batch: Callable[[str, Row], Values],
    token_ExL: np.ndarray,
    doc_E: np.ndarray,
    eos_id: int,
    tick: Callable[[], None] = lambda: None,
    devices: int = 1,
) -> Evaluation:
    """All estimators of a run on an evaluation set.

    Args:
        run_batch: compiled `draw` for a batch of rows of the set; batches all have one size.
        tick: called after every batch (progress, preemption).
        devices: that share a batch; its size is rounded up to a multiple of them.
    """
    size = -(-config.eval.batch_size // devices) * devices
    losses, nats = [], {}
    given = "lengths" if config.data.segment_ids else ""
    n_tokens_E = np.asarray(targets(config, jnp.asarray(token_ExL), eos_id)).sum(axis=1)
    for name in estimators_of(config, codebook):
        replicates = 1 if name == "ar" else config.eval.replicates
        rows = grid(len(token_ExL), replicates)
        pending = []
        for batch in batches(rows, size):
            pending.append(run_batch(name, batch))
            tick()
        for label in pending[0]:
            flat = np.concatenate([np.asarray(values[label], np.float64) for values in pending])
            nats[label] = flat[: len(rows.example)].reshape(replicates, -1)
            losses.append(summarise(label, nats[label], n_tokens_E, doc_E, given))
    return Evaluation(losses, nats, n_tokens_E)


def bits_per_byte(loss: Loss, n_bytes: int) -> float | None:
    """Bits per byte of the original text; None for numbers that are not likelihoods."""
    if loss.kind == "train_loss" or n_bytes == 0:
        return None
    return loss.value * loss.n_tokens / np.log(2) / n_bytes


def make_task(
    config: RunConfig, codebook: Codebook, eos_id: int, axis_name: str | None = None
) -> Task:
    """Args: axis_name: mesh axis that splits the head's rows (`make_head`)."""
    return Task(config, make_head(config, codebook, axis_name), eos_id)
