"""Exact likelihoods of diffusion models by subsets, and a two-sided bracket for larger blocks.

A process that reveals one unit at a time, in random order, is a mixture over orders. With P_j(M) the
network's probability of the true unit j while exactly the set M of a block is hidden,

    f[{}] = 1,   f[M] = mean over j in M of P_j(M) f[M - j],   p(block) = f[all]

(theory.md, "Exact likelihood by subsets"; the bracket draws orders in place of the sum). Units are
sub-tokens or whole tokens. All blocks of all rows are hidden in one network call: the masks are an
argument of one compiled program, and the sums are made in double precision on the host.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from math import comb, log
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.evaluate.estimators import Task, Text, hidden
from prime_jax.kernels.subtoken_head import subtoken_log_probs
from prime_jax.objectives import Network
from prime_jax.runtime.records import Loss

MAX_UNITS = 12  # of a block: 2**12 - 1 network calls
MIN_ORDERS = 4  # K of a bracket, whose ends at K/4 and K/2 are shown as well
MAX_ORDERS = 4096  # all orders of a batch are drawn at once
MAX_TAIL, MAX_ERROR = 0.7, 0.1  # Pareto index of the weights; nats per token of the lower end
AHEAD = 2  # calls queued on the device while earlier ones are read

Ask = Callable[[np.ndarray], jax.Array]  # hidden units [B, G, N] -> log P of each [B, G, N]
Watch = Callable[[int, int], None]  # network calls that are done, of how many


class Request(NamedTuple):
    """What an estimator of this module sums over: all subsets, or 2 K orders of each block."""

    level: Literal["subtoken", "token"]
    orders: int = 0  # K; 0 for all subsets

    def units(self, config: RunConfig) -> int:
        """Units of a block (of a sequence without blocks).

        Raises:
            UserError: too many to sum over all subsets.
        """
        tokens = config.objective.block_length or config.data.seq_len
        units = tokens * (config.subtokens.length if self.level == "subtoken" else 1)
        if units > MAX_UNITS and not self.orders:
            coarser = ""
            if units > tokens <= MAX_UNITS:
                coarser = f"exact:token ({tokens} units), "
            raise UserError(
                f"estimator exact:{self.level}: a block of {tokens} tokens has {units} units, which "
                f"are hidden in 2**{units} ways; at most {MAX_UNITS} units are feasible. Use "
                f"{coarser}bracket:16 (both sides, by sampled orders) or subtoken (a bound)"
            )
        return units

    def calls(self, units: int) -> int:
        """Network calls for a batch."""
        return 1 + 2 * self.orders * (units - 1) if self.orders else 2**units - 1


def requested(name: str) -> Request | None:
    """What `exact:subtoken`, `exact:token` or `bracket:K` ask for; None for other names.

    Raises:
        UserError: a bracket of too few or too many orders.
    """
    head, _, rest = name.partition(":")
    if name in ("exact:subtoken", "exact:token"):
        return Request("token" if rest == "token" else "subtoken")
    if head == "bracket" and rest.isdecimal():
        if not MIN_ORDERS <= int(rest) <= MAX_ORDERS:
            raise UserError(
                f"estimator {name!r}: K must be at least {MIN_ORDERS} and at most {MAX_ORDERS} "
                "orders, in each of two halves"
            )
        return Request("subtoken", int(rest))
    return None


def ahead(name: str) -> int:
    """Batches to queue on the device: none for an estimator that queues calls of its own."""
    return 0 if requested(name) else AHEAD


def log_probs(
    level: str, task: Task, network: Network, text: Text, hidden_BxGxN: jax.Array
) -> jax.Array:
    """log P of each hidden unit [B, G, N], from one network call and one pass of the head.

    0 for units that are visible, and for those of no target, which are never hidden: they leave the
    recursion and its weights as they are.
    """
    batch, length = text.token_BxL.shape
    units = task.book.length if level == "subtoken" else 1
    unit_BxLxU = hidden_BxGxN.reshape(batch, length, units) & text.target_BxL[..., None]
    masked_BxLxS = jnp.broadcast_to(unit_BxLxU, (batch, length, task.book.length))
    inputs = hidden(task, text, masked_BxLxS)
    h_BxLxD, head_VxD = network(inputs.digits_BxLxS, inputs.segment_ids_BxL, None)
    row_BxL = jnp.asarray(task.book.rows)[text.token_BxL]
    h_NxD, masked_NxS = (x.reshape(batch * length, -1) for x in (h_BxLxD, masked_BxLxS))
    found = subtoken_log_probs(task.head, h_NxD, head_VxD, row_BxL.reshape(-1), masked_NxS)
    _, marginals_NxSxb, log_p_N = found
    log_p_BxLxU = log_p_N.reshape(batch, length, 1)
    if level == "subtoken" and marginals_NxSxb is not None:
        digit_BxLxS = jnp.asarray(task.book.digits)[text.token_BxL]
        marginals = marginals_NxSxb.reshape(*digit_BxLxS.shape, -1)
        log_p_BxLxU = jnp.take_along_axis(marginals, digit_BxLxS[..., None], axis=3)[..., 0]
    return jnp.where(unit_BxLxU, log_p_BxLxU, 0.0).reshape(hidden_BxGxN.shape)


def evaluate(
    name: str, ask: Ask, example_B: np.ndarray, blocks: int, units: int, watch: Watch
) -> dict[str, np.ndarray]:
    """All numbers of an estimator for a batch: {label: nats float64 [B]}.

    Args:
        example_B: the orders of an example depend on its number alone.
        blocks, units: of a row, and of a block.
        watch: called after every network call.
    """
    asked = requested(name)
    shape = (len(example_B), blocks, units)
    if asked.orders:
        return _by_orders(name, asked, ask, example_B, shape, watch)
    nll_B, nelbo_B = by_subsets(ask, shape, watch)
    return {name: nll_B, f"{name}:nelbo": nelbo_B, f"{name}:looseness": nelbo_B - nll_B}


def _answers(ask: Ask, masks: Iterable[np.ndarray], calls: int, watch: Watch) -> Iterator:
    """What the network says to each of so many masks, in their order, in double precision."""
    waiting: deque[jax.Array] = deque()
    masks = iter(masks)
    for done in range(1, calls + 1):
        waiting.extend(ask(mask) for mask in islice(masks, 1 + AHEAD - len(waiting)))
        answer = np.asarray(waiting.popleft(), np.float64)
        watch(done, calls)
        yield answer


def by_subsets(
    ask: Ask, shape_BxGxN: tuple[int, int, int], watch: Watch
) -> tuple[np.ndarray, np.ndarray]:
    """(NLL, NELBO) of each row, nats float64 [B]; neither has a Monte-Carlo error.

    The subsets are walked by size, so two layers of f are kept: C(n, n/2) numbers a block at most.
    """
    rows, blocks, n = shape_BxGxN
    masks = sorted(range(1, 2**n), key=int.bit_count)
    hidden_N = (np.array([mask >> j & 1 for j in range(n)], bool) for mask in masks)
    hidden_BxGxN = (np.broadcast_to(hidden, shape_BxGxN) for hidden in hidden_N)
    nelbo_BxG = np.zeros((rows, blocks))
    layer, below, size = {0: np.zeros((rows, blocks))}, {}, 0  # log f of each set
    answers = _answers(ask, hidden_BxGxN, len(masks), watch)
    for mask, log_p_BxGxN in zip(masks, answers, strict=True):
        if mask.bit_count() > size:
            size, layer, below = mask.bit_count(), {}, layer
        of_mask = [j for j in range(n) if mask >> j & 1]
        paths = [log_p_BxGxN[..., j] + below[mask & ~(1 << j)] for j in of_mask]
        layer[mask] = np.logaddexp.reduce(paths) - log(size)
        nelbo_BxG -= log_p_BxGxN[..., of_mask].sum(axis=-1) / (size * comb(n, size))
    return -layer[2**n - 1].sum(axis=1), nelbo_BxG.sum(axis=1)


def _by_orders(name, asked: Request, ask: Ask, example_B, shape_BxGxN, watch: Watch):
    """Ends of the bracket at K, K/2 and K/4, and the tail index of the weights."""
    log_p_2KxBxG = along_orders(ask, orders(asked.orders, example_B, shape_BxGxN), watch)
    out = {}
    for k in dict.fromkeys((asked.orders, asked.orders // 2, asked.orders // 4)):
        label = f"{name}:{k}" if k < asked.orders else name
        out[label], out[f"{label}:lower"] = ends(log_p_2KxBxG, k)
    return out | {f"{name}:tail": tail_index(log_p_2KxBxG)}


def orders(k: int, example_B: np.ndarray, shape_BxGxN: tuple[int, int, int]) -> np.ndarray:
    """2 K random orders of the units of every block: int [2K, B, G, N]."""
    _, blocks, n = shape_BxGxN
    unit_2KxGxN = np.broadcast_to(np.arange(n, dtype=np.int32), (2 * k, blocks, n))
    drawn = [np.random.default_rng([2 * k, e]).permuted(unit_2KxGxN, axis=2) for e in example_B]
    return np.stack(drawn, axis=1)


def along_orders(ask: Ask, order_2KxBxGxN: np.ndarray, watch: Watch) -> np.ndarray:
    """S_k: log probability of each block along each order, nats float64 [2K, B, G]."""
    count, *shape, n = order_2KxBxGxN.shape

    def masks() -> Iterator[np.ndarray]:
        yield np.ones((*shape, n), bool)  # the first call is that of every order
        for order_BxGxN in order_2KxBxGxN:
            rank_BxGxN = np.argsort(order_BxGxN, axis=-1)
            for step in range(1, n):
                yield rank_BxGxN >= step

    answers = _answers(ask, masks(), 1 + count * (n - 1), watch)
    first_BxGxN = next(answers)
    out = np.zeros((count, *shape))
    for k, order_BxGxN in enumerate(order_2KxBxGxN):
        for step in range(n):
            log_p_BxGxN = next(answers) if step else first_BxGxN
            revealed = order_BxGxN[..., step, None]
            out[k] += np.take_along_axis(log_p_BxGxN, revealed, axis=-1)[..., 0]
    return out


def ends(log_p_2KxBxG: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(upper, lower) end of the NLL of each row [B] from the first k orders of each half.

    Bounds in expectation: by Jensen, and by log u <= log c + u / c - 1 with u the mean of one half
    and c that of the other, both ways.
    """
    half = len(log_p_2KxBxG) // 2
    one, two = (
        np.logaddexp.reduce(log_p_2KxBxG[start : start + k]) - log(k) for start in (0, half)
    )
    upper_BxG = -(np.logaddexp(one, two) - log(2))
    # Beyond e**100 the end is of no use, and an infinite one is no JSON.
    ratio, inverse = (np.exp(np.minimum(x, 100.0)) for x in (two - one, one - two))
    lower_BxG = 0.5 * ((1 - one - ratio) + (1 - two - inverse))
    return upper_BxG.sum(axis=1), lower_BxG.sum(axis=1)


def tail_index(log_p_2KxBxG: np.ndarray) -> np.ndarray:
    """Hill's estimate of the Pareto index of each row's weights exp(S_k) [B], all blocks together.

    Weights are relative to the median of their block; the largest min(n / 5, 3 sqrt(n)) of n count.
    """
    count, rows, blocks = log_p_2KxBxG.shape
    log_w = log_p_2KxBxG - np.median(log_p_2KxBxG, axis=0)
    sorted_BxN = np.sort(log_w.transpose(1, 0, 2).reshape(rows, -1), axis=1)
    n = count * blocks
    top = max(1, int(min(n / 5, 3 * n**0.5)))
    return sorted_BxN[:, -top:].mean(axis=1) - sorted_BxN[:, -top - 1]


def verdict(name: str, losses: dict[str, Loss], tail: float, blocks: int) -> str:
    """What is to be known of a bracket, in one line.

    Args:
        losses: by label; tail: mean index of the weights; blocks: all that were evaluated.
    """
    k = requested(name).orders
    upper, before, lower = losses[name], losses[f"{name}:{k // 2}"], losses[f"{name}:lower"]
    fall, problems = before.value - upper.value, []
    if upper.se_data is None or lower.se_data is None:
        problems.append("its errors are unknown (one window)")
    else:
        if fall > upper.se_data:
            problems.append(
                f"from K = {k // 2} to {k} the upper end falls by {fall:.4f}, more than its error "
                f"{upper.se_data:.4f}"
            )
        if lower.se_data > MAX_ERROR:
            problems.append(f"the lower end's error {lower.se_data:.3f} exceeds {MAX_ERROR}")
    if tail > MAX_TAIL:
        problems.append(f"the tail index {tail:.2f} exceeds {MAX_TAIL}")
    said = f"no bracket at this block size: {'; '.join(problems)}. " if problems else ""
    return said + (
        "Both ends are bounds in expectation only: orders rarer than about 1 in "
        f"{2 * k * blocks:,} (2K x blocks) are invisible, and then both may lie above the NLL; "
        f"Pareto tail index of the weights {tail:.2f}"
    )


class Cost:
    """Says what an evaluation takes as soon as a call is timed; a `Watch`."""

    def __init__(self, name: str, batches: int, log: Callable[[str], None]):
        self.name, self.batches, self.log = name, batches, log
        self.mark: float | None = None

    def __call__(self, done: int, calls: int) -> None:
        if self.mark is None:
            self.mark = time.monotonic()  # the first call compiles
        elif done == 2 and self.batches:
            total = calls * self.batches
            seconds = (time.monotonic() - self.mark) * total
            about = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:,.0f} minutes"
            self.log(f"{self.name}: {total:,} network calls, about {about}")
            self.batches = 0  # once
