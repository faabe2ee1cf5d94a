"""Measure the implementations of every kernel on the device at hand, and choose.

At each shape first the values and gradients of each implementation are compared with the reference
twin, computed in float32 from the same numbers; then those that agree are timed, forward and
backward, in turns, so that a busy machine slows all alike. What is far worse than the plain XLA
form is never chosen on this chip, and the table says by how much it was off.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import RunConfig, SubtokenConfig
from prime_jax.hardware import chips
from prime_jax.kernels import selection
from prime_jax.kernels.attention import attention, attention_reference
from prime_jax.kernels.embedding import subtoken_embedding, subtoken_embedding_reference
from prime_jax.kernels.selection import OFF, Blocks, Choices, Kernel, Measured, Row
from prime_jax.kernels.subtoken_head import Head, subtoken_log_masses, subtoken_loss
from prime_jax.kernels.subtoken_head_base import in_joint_loss
from prime_jax.kernels.subtoken_head_reference import subtoken_head_reference
from prime_jax.subtokens import Codebook

# What is tried on which platform beside the default: an implementation and its blocks.
CANDIDATES: dict[tuple[str, Kernel], tuple[tuple[str, Blocks], ...]] = {
    ("cpu", "head"): (("xla", ()), ("xla", (64,)), ("xla", (256,)), ("xla", (512,))),
    ("gpu", "head"): (("xla", ()), ("xla", (2048,)), ("xla", (4096,)), ("xla", (8192,))),
    ("tpu", "head"): (
        *(("xla", ()), ("xla", (2048,))),
        *(("pallas", ()), ("pallas", (512, 512, 256)), ("pallas", (256, 512, 256))),
    ),
    ("cpu", "attention"): (("scan", ()), ("xla", ())),
    ("gpu", "attention"): (("cudnn", ()), ("xla", ()), ("scan", ())),
    ("tpu", "attention"): (
        *(("splash", ()), ("xla", ())),
        *(("pallas", ()), ("pallas", (512, 512)), ("pallas", (256, 512))),
    ),
    ("cpu", "embedding"): (("xla", ()),),
    ("gpu", "embedding"): (("xla", ()),),
    ("tpu", "embedding"): (("xla", ()), ("pallas", ())),
}
WIN = 0.97  # of the default's time: what is not clearly quicker is not worth a change
WORSE = 4.0  # times the error of plain XLA
FLOOR = {"float32": 1e-5, "bfloat16": 2e-2}  # relative errors that are never held against one
MAX_TOKENS = {"cpu": 4096, "gpu": 16384, "tpu": 16384}  # timed at a time
CHECKED_ELEMENTS = 1 << 25  # of what the head's reference stores
TURN_SECONDS = 0.2  # of each side in a turn
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Problem:
    """One kernel at one shape.

    Attributes:
        outputs: (implementation, blocks, *arguments) -> values and gradients.
        reference: the same from the arguments alone, by the twin.
        small, large: arguments to compare, and to time.
    """

    outputs: Callable[..., Any]
    reference: Callable[..., Any]
    small: tuple
    large: tuple


def tune(
    configs: Iterable[RunConfig],
    *,
    rounds: int = 5,
    progress: Progress = lambda _: None,
    candidates: dict | None = None,
) -> Choices:
    """A table for the first of this machine's devices, from the shapes of some runs.

    Args:
        rounds: turns; the medians count.
        progress: told each shape and each side.
        candidates: instead of `CANDIDATES`.
    """
    device = jax.local_devices()[0]
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    rows: list[Row] = []
    for config in configs:
        for kernel in selection.KERNELS:
            shape = selection.shape_of(kernel, config)
            if any((row.kernel, row.shape) == (kernel, shape) for row in rows):
                continue
            progress(f"{kernel}: " + ", ".join(f"{k} {v}" for k, v in shape.items()))
            usual = selection.default(kernel, config, device.device_kind)
            tried = (candidates or CANDIDATES).get((platform, kernel), ())
            sides = dict.fromkeys([(usual.implementation, ()), ("xla", ()), *tried])
            problem = PROBLEMS[kernel](config, MAX_TOKENS.get(platform, 4096))
            measured = measure(problem, list(sides), config.model.dtype, rounds, progress)
            rows.append(chosen(kernel, shape, usual.implementation, measured))
            progress(f"  {rows[-1].implementation}{_blocks(rows[-1].blocks)}: {rows[-1].why}")
    return Choices(device.device_kind, f"jax {jax.__version__}", tuple(rows))


def chosen(kernel: Kernel, shape: dict, usual: str, measured: Sequence[Measured]) -> Row:
    """The quickest that is right; the usual one unless another is clearly quicker."""
    right = [m for m in measured if not m.problem]
    if not right:
        return Row(
            kernel=kernel,
            shape=shape,
            implementation="xla",
            blocks=(),
            why="nothing else could be measured",
            measured=tuple(measured),
        )
    best = min(right, key=lambda m: m.milliseconds)
    kept = next((m for m in right if m.implementation == usual and not m.blocks), None)
    if kept and best.milliseconds > WIN * kept.milliseconds:
        why = f"{kept.milliseconds:.3g} ms; nothing else is clearly quicker"
        return Row(
            kernel=kernel,
            shape=shape,
            implementation=usual,
            blocks=(),
            why=why,
            measured=tuple(measured),
        )
    named = f"{kept.milliseconds:.3g} ms of {usual}" if kept else f"no right numbers of {usual}"
    why = f"{best.milliseconds:.3g} ms against {named}"
    return Row(
        kernel=kernel,
        shape=shape,
        implementation=best.implementation,
        blocks=best.blocks,
        why=why,
        measured=tuple(measured),
    )


def measure(
    problem: Problem,
    sides: Sequence[tuple[str, Blocks]],
    dtype: str,
    rounds: int,
    progress: Progress = lambda _: None,
) -> list[Measured]:
    """Errors, then times in turns, of each (implementation, blocks)."""
    with jax.default_matmul_precision("highest"):
        want = jax.device_get(jax.jit(problem.reference)(*problem.small))
    found = {side: _checked(problem, side, want) for side in sides}
    plain = found[("xla", ())].error
    allowed = max(FLOOR[dtype], WORSE * plain) if plain is not None else FLOOR[dtype]
    for side, m in found.items():
        if m.error is not None and not m.error <= allowed:
            off = f"{OFF} {m.error:.2g} where plain XLA is by {plain or 0.0:.2g}"
            found[side] = replace(m, problem=off)
    calls: dict[tuple[str, Blocks], Callable[[], Any]] = {}
    programs: set[str] = set()
    for side, m in list(found.items()):
        if m.problem:
            continue
        try:
            lowered = _lowered(problem, side, problem.large)
            if lowered.as_text() in programs:  # other blocks, cut to the same size
                del found[side]
                continue
            programs.add(lowered.as_text())
            calls[side] = _compiled(lowered, problem.large)
        except Exception as error:  # whatever a compiler throws is the finding
            found[side] = replace(m, problem=selection.cause(error))
    repeats = {side: max(1, round(TURN_SECONDS / _seconds(c, 1))) for side, c in calls.items()}
    turns: dict[tuple[str, Blocks], list[float]] = {side: [] for side in calls}
    for _ in range(rounds):
        for side, call in calls.items():
            turns[side].append(_seconds(call, repeats[side]))
    for side, times in turns.items():
        found[side] = replace(found[side], milliseconds=1e3 * statistics.median(times))
    for m in found.values():
        result = m.problem or f"{m.milliseconds:9.3f} ms, off by {m.error:.1g}"
        progress(f"  {m.implementation + _blocks(m.blocks):28}{result}")
    return list(found.values())


def _blocks(blocks: Blocks) -> str:
    return f" {'x'.join(map(str, blocks))}" if blocks else ""


def _checked(problem: Problem, side: tuple[str, Blocks], want: Any) -> Measured:
    try:
        call = _compiled(_lowered(problem, side, problem.small), problem.small)
        got = jax.device_get(call())
    except Exception as error:  # as above
        return Measured(*side, problem=selection.cause(error))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return Measured(*side, error=max(_distance(a, b) for a, b in pairs))


def _distance(got: np.ndarray, want: np.ndarray) -> float:
    """Relative, of two arrays; infinite where something is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.isfinite(got).all():
        return 1e30
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def _lowered(problem: Problem, side: tuple[str, Blocks], arguments: tuple) -> Any:
    return jax.jit(partial(problem.outputs, *side)).lower(*arguments)


def _compiled(lowered: Any, arguments: tuple) -> Callable[[], Any]:
    """A call that waits for its result."""
    made = lowered.compile(chips.compiler_options(jax.local_devices()[0].device_kind))
    return lambda: jax.block_until_ready(made(*arguments))


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def head_problem(config: RunConfig, most: int) -> Problem:
    """The training loss and what an evaluation reads, with gradients of the loss."""
    m, o = config.model, config.objective
    length = config.subtokens.length
    book = Codebook.create(m.vocab_size, SubtokenConfig(length=length))
    head = Head(book, carry_over=o.carry_over, loss=o.loss)

    def outputs(implementation, blocks, h_NxD, head_VxD, row_N, masked_NxS, weight_N):
        made = replace(head, implementation=implementation, blocks=blocks)
        rest = (row_N, masked_NxS)

        def loss(h_NxD, head_VxD):
            return getattr(subtoken_loss(made, h_NxD, head_VxD, *rest, weight_N), o.loss)

        read = subtoken_log_masses(made, h_NxD, head_VxD, *rest)
        return jax.value_and_grad(loss, (0, 1))(h_NxD, head_VxD), read

    def reference(h_NxD, head_VxD, row_N, masked_NxS, weight_N):
        h_NxD, head_VxD = h_NxD.astype(jnp.float32), head_VxD.astype(jnp.float32)

        def terms(h_NxD, head_VxD):
            slots_NxS, joint_N = subtoken_head_reference(head, h_NxD, head_VxD, row_N, masked_NxS)
            return slots_NxS.sum(1), jnp.where(in_joint_loss(head, masked_NxS), joint_N, 0)

        def loss(h_NxD, head_VxD):
            marginal_N, joint_N = terms(h_NxD, head_VxD)
            return -(weight_N * (joint_N if o.loss == "joint" else marginal_N)).sum()

        read = terms(h_NxD, head_VxD)
        return jax.value_and_grad(loss, (0, 1))(h_NxD, head_VxD), read

    def arguments(rows):
        rng = np.random.default_rng(0)
        masked_NxS = rng.random((rows, length)) < rng.random((rows, 1))
        return (
            jnp.asarray(rng.normal(size=(rows, m.width)), m.dtype),
            jnp.asarray(0.3 * rng.normal(size=(m.vocab_size, m.width)) / m.width**0.5, m.dtype),
            jnp.asarray(rng.integers(0, m.vocab_size, rows), jnp.int32),
            jnp.asarray(masked_NxS),
            jnp.asarray(rng.random(rows) + 0.1, jnp.float32),
        )

    digits = m.vocab_size * length * book.base if length > 1 else m.vocab_size
    few = min(256, max(8, CHECKED_ELEMENTS // digits))
    return Problem(outputs, reference, arguments(few), arguments(_tokens(config, most)))


def attention_problem(config: RunConfig, most: int) -> Problem:
    """Output and gradients of queries, keys and values."""
    shape = selection.shape_of("attention", config)
    rule = (shape["causal"], shape["block_length"])
    length, heads, groups = shape["tokens"], shape["heads"], shape["kv_heads"]

    def both(call):
        def run(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, ids_BxL, dout_BxLxHxK):
            ids_BxL = ids_BxL if shape["documents"] else None
            see = partial(call, segment_ids_BxL=ids_BxL)
            out, pull = jax.vjp(see, q_BxLxHxK, k_BxLxGxK, v_BxLxGxK)
            return out, pull(dout_BxLxHxK.astype(out.dtype))

        return run

    def outputs(implementation, blocks, *arguments):
        made = {"implementation": implementation, "blocks": blocks}
        return both(partial(attention, causal=rule[0], block_length=rule[1], **made))(*arguments)

    def reference(q, k, v, ids_BxL, dout):
        q, k, v, dout = (x.astype(jnp.float32) for x in (q, k, v, dout))
        twin = partial(attention_reference, causal=rule[0], block_length=rule[1])
        return both(twin)(q, k, v, ids_BxL, dout)

    def arguments(batch, few):
        key = jax.random.split(jax.random.key(0), 4)
        shared = heads // groups
        g = min(groups, few)
        sizes = [g * shared, g, g, g * shared]
        made = [
            jax.random.normal(k, (batch, length, n, shape["size"]), config.model.dtype)
            for k, n in zip(key, sizes, strict=True)
        ]
        copies = 2 if shape["block_length"] else 1
        ids_L = jnp.tile(jnp.arange(length // copies) // max(1, length // 8), copies)
        return *made[:3], jnp.broadcast_to(ids_L, (batch, length)), made[3]

    batch = max(1, min(_tokens(config, most) // length, config.batch_size))
    return Problem(outputs, reference, arguments(1, 2), arguments(batch, groups))


def embedding_problem(config: RunConfig, most: int) -> Problem:
    """Vectors, and the float32 gradient of their tables."""
    m, length = config.model, config.subtokens.length
    base = Codebook.create(m.vocab_size, SubtokenConfig(length=length)).base
    size = m.width if m.embedding == "sum" else m.width // length
    tables = 1 if m.embedding == "cat_shared" else length

    def both(embed, table_TxRxE, g_NxD):
        out_NxD, pull = jax.vjp(embed, table_TxRxE)
        return out_NxD, pull(g_NxD.astype(out_NxD.dtype))

    def outputs(implementation, _, table_TxRxE, digits_NxS, g_NxD):
        def embed(table_TxRxE):
            return subtoken_embedding(
                m.embedding,
                table_TxRxE=table_TxRxE,
                digits_NxS=digits_NxS,
                width=m.width,
                implementation=implementation,
                dtype=m.dtype,
            )

        return both(embed, table_TxRxE, g_NxD)

    def reference(table_TxRxE, digits_NxS, g_NxD):
        embed = lambda table: subtoken_embedding_reference(  # noqa: E731
            m.embedding, table, digits_NxS, m.width
        )
        return both(embed, table_TxRxE, g_NxD)

    def arguments(rows):
        rng = np.random.default_rng(0)
        return (
            jnp.asarray(rng.normal(size=(tables, base + 1, size)), jnp.float32),
            jnp.asarray(rng.integers(0, base + 1, (rows, length)), jnp.int32),
            jnp.asarray(rng.normal(size=(rows, m.width)), m.dtype),
        )

    return Problem(outputs, reference, arguments(256), arguments(_tokens(config, most)))


def _tokens(config: RunConfig, most: int) -> int:
    """Tokens of a micro-batch on one of this machine's devices, within reason."""
    rows = config.batch_size * config.data.seq_len // config.mesh.accumulate // jax.device_count()
    return max(1, min(rows, most))


PROBLEMS: dict[Kernel, Callable[[RunConfig, int], Problem]] = {
    "head": head_problem,
    "attention": attention_problem,
    "embedding": embedding_problem,
}
