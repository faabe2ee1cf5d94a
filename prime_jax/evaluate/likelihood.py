"""Likelihoods with standard errors: exact NLL, NELBOs by fixed-count masking.

Each estimator maps sequences to one unbiased draw of their bound in nats. Draws are repeated over
independent replicates of the whole evaluation set, in each of which the noise level is stratified
over the examples; `se_mc` is therefore the standard error over replicates (theory.md, "What is
reported"). Keys depend on (replicate, example) only, so all runs of a sweep are paired.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.evaluate import chain, exact
from prime_jax.evaluate.estimators import (
    MASKINGS,
    Task,
    Text,
    Values,
    autoregressive,
    finite,
    guided_by_context,
    subtoken,
    token,
)
from prime_jax.evaluate.partial import Partial
from prime_jax.objectives import Network, targets
from prime_jax.runtime.records import VALID, Kind, Loss
from prime_jax.schedule import stratum
from prime_jax.subtokens import Codebook

MAX_STEPS = 10**9  # of `finite`: float32 still resolves the probabilities of such a step
CLUSTERS = 20  # texts needed for a standard error clustered by text
EVAL_SEED = 20_260  # fixed: every run of every sweep has the same masks


def estimator(name: str) -> Callable[..., Values] | None:
    """The function behind an estimator's name.

    `ar`, `subtoken`, `token` (and `subtoken:independent`, `token:independent`), `finite:T`,
    `chain:ORDER`; and `greedy`, which is not a likelihood (chain.py). Those of `exact` take many
    calls for one draw, and are no function here.

    Raises:
        UserError: an unknown name.
    """
    head, _, rest = name.partition(":")
    if exact.requested(name):
        return None
    if name in ("ar", "greedy"):
        return {"ar": autoregressive, "greedy": chain.greedy}[name]
    if head in ("subtoken", "token") and rest in MASKINGS:
        return partial({"subtoken": subtoken, "token": token}[head], rest)
    if head == "finite" and rest.isdecimal() and 0 < int(rest) <= MAX_STEPS:
        return partial(finite, int(rest))
    if head == "chain" and rest in chain.ORDERS:
        return partial(chain.chain, rest)
    if name == "chain:confidence-drawn":
        raise UserError(
            f"estimator {name!r}: this sampler has no likelihood, since its order depends on draws "
            "that it throws away; chain:confidence is that of sample --order confidence"
        )
    raise UserError(
        f"estimator {name!r} is unknown; use subtoken, token, finite:T (T steps, at most "
        f"{MAX_STEPS}), exact:subtoken, exact:token, bracket:K or chain:ORDER (one token per network "
        f"call), ORDER one of {', '.join(chain.ORDERS)}"
    )


def estimators_of(config: RunConfig) -> list[str]:
    """The estimators that apply: `ar` alone for ARM; `token` equals `subtoken` where l = 1."""
    for name in config.eval.estimators:
        estimator(name)  # unknown names are refused for every family
    if config.family == "arm":
        return ["ar"]
    names = [name for name in config.eval.estimators if name != "ar"]
    for name in names:
        feasible(config, name)
    for level in ("", "exact:"):  # of one sub-token, two names of one number
        if config.subtokens.length == 1 and f"{level}subtoken" in names:
            names = [name for name in names if name != f"{level}token"]
    return names


def feasible(config: RunConfig, name: str) -> None:
    """Raises: UserError: an unknown estimator, or more units than it can sum over."""
    estimator(name)
    if asked := exact.requested(name):
        asked.units(config)


def kind(name: str) -> Kind:
    """Whether an estimator's number is a likelihood, a bound on it, or neither.

    With a fixed order, or one determined by the visible tokens, the chain rule is the exact
    likelihood of that sampler. With a random order it is a bound (Jensen).
    """
    head, _, order = name.partition(":")
    if head == "joint":
        return "train_loss"
    if head in ("exact", "bracket"):
        ends = {"looseness": "difference", "lower": "lower_bound", "nelbo": "nelbo"}
        return ends.get(name.rpartition(":")[2], "nll" if head == "exact" else "nelbo")
    random = order in ("random", "subtokens")
    return "nll" if head == "ar" or (head == "chain" and not random) else "nelbo"


def is_determined(name: str) -> bool:
    """Whether nothing is drawn for a number."""
    return kind(name) == "nll" or name.startswith("exact:")


def passes(name: str, replicates: int) -> int:
    """How often an estimator is drawn: once where nothing is random, or where it repeats itself."""
    return 1 if is_determined(name) or exact.requested(name) else replicates


def note(config: RunConfig, name: str) -> str:
    """What to know of an estimator's number for this run, one line; empty for nothing."""
    head, last = name.partition(":")[0], name.rpartition(":")[2]
    notes, loose = [], not config.objective.carry_over and config.subtokens.length > 1
    if head in ("exact", "bracket") and config.data.segment_ids:
        notes.append("the lengths of documents are given: EOS is visible and not charged")
    if loose and (name == "exact:subtoken" or (head == "bracket" and last != "lower")):
        notes.append(
            "sub-normalised: without carry-over digits of no token have a part of the probability; "
            "still an upper bound"
        )
    if loose and head == "joint":
        notes.append("not this run's training loss, which charges visible digits as well")
    if loose and head == "finite":
        notes.append("bounds a sampler without carry-over; `prime-jax sample` has it always")
    return ". ".join(notes)


def draw(
    task: Task,
    name: str,
    network: Network,
    token_BxL,
    replicate_B,
    example_B,
    uniform_B,
    start_B=None,
    stop_B=None,
    max_targets_B=None,
) -> Values:
    """One draw for every row; keys depend on (replicate, example) alone.

    Args:
        start_B, stop_B: range of the scored positions; before it is context, after it padding.
            None: everything is scored.
        max_targets_B: the largest number of them in any row of the call, repeated for each row.
    """
    network, text = scored(task, network, token_BxL, start_B, stop_B, max_targets_B)
    key = jax.random.key(EVAL_SEED)
    fold = jax.vmap(lambda r, e: jax.random.fold_in(jax.random.fold_in(key, r), e))
    return estimator(name)(task, network, text, fold(replicate_B, example_B), uniform_B)


def scored(
    task: Task, network: Network, token_BxL, start_B=None, stop_B=None, max_targets_B=None
) -> tuple[Network, Text]:
    """The rows with their targets, and the network with its guidance (arguments as for `draw`)."""
    target_BxL = targets(task.config, token_BxL, task.eos_id)
    if start_B is not None:
        at_L = jnp.arange(token_BxL.shape[1])
        before_BxL = at_L < start_B[:, None]
        target_BxL &= ~before_BxL & (at_L < stop_B[:, None])
        if task.guidance:
            network = guided_by_context(task, network, before_BxL)
    most = None if max_targets_B is None else max_targets_B[0]
    return network, Text(token_BxL, target_BxL, stop_B, most)


class Row(NamedTuple):
    """A batch of (replicate, example) pairs, with the other arguments of `draw`; `uniform` is the
    stratified draw in [0, 1)."""

    replicate: np.ndarray
    example: np.ndarray
    uniform: np.ndarray
    start: np.ndarray | None = None
    stop: np.ndarray | None = None
    max_targets: np.ndarray | None = None

    def take(self, index: np.ndarray) -> "Row":
        return Row(*(None if x is None else x[index] for x in self))


def grid(examples: int, replicates: int) -> Row:
    """All pairs, with noise levels stratified over the examples of each replicate."""
    replicate = np.repeat(np.arange(replicates, dtype=np.int32), examples)
    example = np.tile(np.arange(examples, dtype=np.int32), replicates)
    offset = np.random.default_rng(EVAL_SEED).random(replicates)
    # Other strata in each replicate: an example gets a new noise level each time.
    strata = [stratum(np.arange(examples) + 7919 * r, examples) for r in range(replicates)]
    uniform = (offset[:, None] + np.array(strata) / examples) % 1.0
    return Row(replicate, example, uniform.reshape(-1).astype(np.float32))


def batch_size(config: RunConfig, devices: int) -> int:
    """Rows of a batch: `eval.batch_size`, rounded up to a multiple of the devices."""
    return -(-config.eval.batch_size // devices) * devices


def batches(rows: Row, size: int) -> Iterator[Row]:
    """Batches of equal size; the last one is padded by repetition."""
    for index in spans(np.arange(len(rows.example)), size):
        yield rows.take(np.resize(index, size))


def spans(index: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The index in parts of `size`; the last one may be smaller."""
    for start in range(0, len(index), size):
        yield index[start : start + size]


def clusters(doc_E: np.ndarray) -> tuple[np.ndarray, str]:
    """What a standard error is clustered by: (number of each block [E], its kind).

    By document (`texts`) where there are enough; by block (`windows`) for fewer, which is too small
    where the blocks of one text resemble each other, but can be known.
    """
    text_E = np.unique(doc_E, return_inverse=True)[1]
    if text_E.size and text_E.max() + 1 >= CLUSTERS:
        return text_E, "texts"
    return np.arange(len(doc_E)), "windows"


def summarise(
    name: str,
    nats_RxE: np.ndarray,
    n_tokens_E: np.ndarray,
    doc_E: np.ndarray,
    given: str,
    note: str = "",
) -> Loss:
    """Mean per target token with its two standard errors, None where they cannot be known.

    `se_mc` is that of the replicate means; `se_data` is clustered by document (that of a block's
    first token; see `clusters`) and includes the Monte-Carlo noise that remains in the example
    means.
    """
    replicates, total = len(nats_RxE), int(n_tokens_E.sum())
    mean_R = nats_RxE.sum(axis=1) / total
    value = float(mean_R.mean())
    se_mc = 0.0 if is_determined(name) else None
    if replicates > 1:
        se_mc = float(mean_R.std(ddof=1) / replicates**0.5)
    residual_E = nats_RxE.mean(axis=0) - value * n_tokens_E
    cluster_C = np.bincount(clusters(doc_E)[0], weights=residual_E)
    n, se_data = len(cluster_C), None
    if n > 1:
        se_data = float((n / (n - 1) * (cluster_C**2).sum()) ** 0.5 / total)
    return Loss(
        kind=kind(name),
        estimator=name,
        value=value,
        se_mc=se_mc,
        se_data=se_data,
        n_tokens=total,
        n_mc=replicates,
        given=given,
        note=note,
    )


def losses_of(
    config: RunConfig,
    name: str,
    nats: dict[str, np.ndarray],
    n_tokens_E: np.ndarray,
    doc_E: np.ndarray,
) -> list[Loss]:
    """The numbers of one estimator from its draws {label: nats [R, E]}, with their notes."""
    given = "lengths" if config.data.segment_ids else ""
    found = {
        label: summarise(label, nats_RxE, n_tokens_E, doc_E, given, note(config, label))
        for label, nats_RxE in nats.items()
        if not label.endswith(":tail")
    }
    if name.startswith("bracket:"):
        size = config.objective.block_length or config.data.seq_len
        blocks = -(-int(n_tokens_E.sum()) // size)
        said = exact.verdict(name, found, float(nats[f"{name}:tail"].mean()), blocks)
        said = ". ".join(filter(None, (found[name].note, said)))
        found[name] = replace(found[name], note=said)
    return list(found.values())


class Evaluation(NamedTuple):
    """Losses and their draws: {estimator: nats [R, E]}, and target tokens [E].

    Runs that share an evaluation set share its draws, so differences can be paired.
    """

    losses: list[Loss]
    nats: dict[str, np.ndarray]
    n_tokens: np.ndarray


def evaluate(
    config: RunConfig,
    codebook: Codebook,
    run_batch: Callable[[str, Row, exact.Watch], Values],
    token_ExL: np.ndarray,
    doc_E: np.ndarray,
    eos_id: int,
    tick: Callable[[], None] = lambda: None,
    devices: int = 1,
    log: Callable[[str], None] = lambda line: None,
    partial_of: Callable[[str, int], Partial] = lambda name, rows: Partial(None, {}, rows),
) -> Evaluation:
    """All estimators of a run on an evaluation set.

    Args:
        run_batch: compiled `draw` for a batch of rows of the set, all batches of the same size; the
            last argument is called after each network call of an estimator that takes many.
        tick: called after every batch, and every such call (progress, preemption).
        devices: over which a batch is sharded; its size is rounded up to a multiple of them.
        log: receives a line that says what a long evaluation will take.
        partial_of: where the draws of an estimator, so many rows, are kept until all are done.
    """
    size = batch_size(config, devices)
    losses, nats, partials = [], {}, []
    n_tokens_E = np.asarray(targets(config, jnp.asarray(token_ExL), eos_id)).sum(axis=1)
    for name in estimators_of(config):
        replicates = passes(name, config.eval.replicates)
        rows = grid(len(token_ExL), replicates)
        partial = partial_of(name, len(rows.example))
        partials.append(partial)
        todo = partial.remaining()  # whole batches: the same ones as without an interruption
        cost = exact.Cost(name, -(-len(todo) // size), log)

        def watch(done: int, calls: int, cost=cost) -> None:
            cost(done, calls)
            tick()

        partial.fill(
            (
                (index, run_batch(name, rows.take(np.resize(index, size)), watch), tick)
                for index in spans(todo, size)
            ),
            exact.ahead(name),
        )
        own = {label: flat.reshape(replicates, -1) for label, flat in partial.nats.items()}
        losses += losses_of(config, name, own, n_tokens_E, doc_E)
        nats |= own
    for partial in partials:
        partial.discard()
    return Evaluation(losses, nats, n_tokens_E)


def bits_per_byte(loss: Loss, n_bytes: int) -> float | None:
    """Bits per byte of the original text; None for numbers that are not likelihoods."""
    if loss.kind not in VALID or n_bytes == 0:
        return None
    return loss.value * loss.n_tokens / np.log(2) / n_bytes
