"""Each kernel beside its XLA reference and a library baseline: time and temporary memory.

    python benchmarks/kernels.py [--kernels head ...] [--widths 512 768] [--rounds 7] [--out FILE]

All sides of a table run in one process and take turns, so that a busy machine slows all of them
alike. Printed are medians over the turns; `ratio` is the median over turns of a side's time against
the first side's, the baseline's, in that turn. `temporaries` is what the compiled program allocates
besides its arguments and results, as the compiler reports it, and its ratio to the baseline's.
Forward and backward are included.
Pallas kernels run on TPUs only; a side that does not compile prints why.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from prime_jax.config import SubtokenConfig
from prime_jax.hardware import chips
from prime_jax.kernels.attention import attention
from prime_jax.kernels.embedding import subtoken_embedding
from prime_jax.kernels.subtoken_head import (
    Head,
    subtoken_log_probs,
    subtoken_loss,
)
from prime_jax.kernels.subtoken_head_base import true_digits
from prime_jax.subtokens import Codebook


class Side(NamedTuple):
    """One row of a table: a function, all of whose outputs are computed, and its arguments."""

    name: str
    function: Callable[..., Any]
    arguments: tuple


class Table(NamedTuple):
    """Sides that compute the same as the first one, the baseline, or more."""

    title: str
    sides: list[Side]


def head_tables(widths: list[int], dtype: Any) -> list[Table]:
    return [_head_table(width, dtype) for width in widths]


def _head_table(width: int, dtype: Any, rows=4096, vocab_size=50257, length=16) -> Table:
    """Gradients of hidden states and head rows, from plain cross-entropy to all marginals."""
    rng = np.random.default_rng(0)
    h_NxD = jnp.asarray(rng.normal(size=(rows, width)), dtype)
    head_VxD = jnp.asarray(0.05 * rng.normal(size=(vocab_size, width)), dtype)
    true_N = jnp.asarray(rng.integers(0, vocab_size, rows), jnp.int32)
    weight_N = jnp.ones(rows, jnp.float32)
    hidden_NxS = rng.random((rows, length)) < rng.random((rows, 1))

    def dense(h_NxD, head_VxD):
        z_NxV = jnp.einsum("nd,vd->nv", h_NxD, head_VxD, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(z_NxV, true_N).sum()

    def form_a(slots, implementation):
        head, masked_NxS = problem(slots, implementation)
        return lambda h_NxD, head_VxD: (
            subtoken_loss(head, h_NxD, head_VxD, true_N, masked_NxS, weight_N).marginal
        )

    def form_b(slots, implementation):
        head, masked_NxS = problem(slots, implementation)

        def cost(h_NxD, head_VxD):
            outputs = subtoken_log_probs(head, h_NxD, head_VxD, true_N, masked_NxS)
            if slots == 1:
                return -outputs[2].sum()
            charged_NxSxb = true_digits(head, true_N) & masked_NxS[..., None]
            return -jnp.where(charged_NxSxb, outputs[1], 0).sum()

        return cost

    def problem(slots, implementation):
        book = Codebook.create(vocab_size, SubtokenConfig(length=slots))
        masked_NxS = jnp.asarray(hidden_NxS if slots > 1 else np.ones((rows, 1), bool))
        return Head(book, implementation=implementation), masked_NxS

    costs = {"optax cross-entropy": dense}
    implementations = ("xla", "pallas") if jax.default_backend() == "tpu" else ("xla",)
    for name in implementations:
        for slots in (1, length):
            costs[f"{name} (a) training loss, l={slots}"] = form_a(slots, name)
        for slots in (1, length):
            costs[f"{name} (b) any cotangent, l={slots}"] = form_b(slots, name)
    gradients = {name: jax.value_and_grad(cost, (0, 1)) for name, cost in costs.items()}
    title = f"head: N={rows} D={width} V={vocab_size} {jnp.dtype(dtype).name}"
    return Table(title, [Side(n, f, (h_NxD, head_VxD)) for n, f in gradients.items()])


def embedding_tables(widths: list[int], dtype: Any) -> list[Table]:
    return [_embedding_table(width, dtype) for width in widths]


def _embedding_table(width: int, dtype: Any, tokens=8192, length=16) -> Table:
    """Vectors of binary tokens, and the float32 gradient of their one shared table."""
    rng = np.random.default_rng(0)
    size = width // length
    table_Tx3xE = jnp.asarray(rng.normal(size=(1, 3, size)), jnp.float32)
    digits_NxS = jnp.asarray(rng.integers(0, 3, (tokens, length)), jnp.int32)
    g_NxD = jnp.asarray(rng.normal(size=(tokens, width)), dtype)

    def library(table_Tx3xE, digits_NxS):
        embed = nn.Embed(3, size, dtype=dtype)
        read_NxSxE = embed.apply({"params": {"embedding": table_Tx3xE[0]}}, digits_NxS)
        padding = width - length * size
        return jnp.pad(read_NxSxE.reshape(tokens, -1), ((0, 0), (0, padding)))

    def ours(implementation):
        return lambda table_Tx3xE, digits_NxS: subtoken_embedding(
            "cat_shared",
            table_TxRxE=table_Tx3xE,
            digits_NxS=digits_NxS,
            width=width,
            implementation=implementation,
            dtype=dtype,
        )

    def both(embed):
        def run(table_Tx3xE, digits_NxS, g_NxD):
            out_NxD, pull = jax.vjp(lambda table: embed(table, digits_NxS), table_Tx3xE)
            return out_NxD, pull(g_NxD)

        return run

    implementations = ["multi_hot", "select"] + ["pallas"] * (jax.default_backend() == "tpu")
    embeds = {"flax Embed": library} | {name: ours(name) for name in implementations}
    arguments = (table_Tx3xE, digits_NxS, g_NxD)
    title = f"embedding: N={tokens} D={width} l={length} {jnp.dtype(dtype).name}"
    return Table(title, [Side(name, both(embed), arguments) for name, embed in embeds.items()])


def attention_tables(widths: list[int], dtype: Any) -> list[Table]:
    return [_attention_table(width, dtype, packed) for width in widths for packed in (False, True)]


def _attention_table(width: int, dtype: Any, packed: bool) -> Table:
    """Output and gradients of q, k and v; the platform's library is the baseline."""
    platform = jax.default_backend()
    batch, length, size = (2, 512, 64) if platform == "cpu" else (8, 2048, 128)
    heads = width // size
    keys = jax.random.split(jax.random.key(0), 4)
    qkvg = [jax.random.normal(key, (batch, length, heads, size), dtype) for key in keys]
    ids_BxL = jnp.broadcast_to(jnp.arange(length) // (length // 8), (batch, length))

    def run(implementation, q, k, v, dout):
        ids = ids_BxL if packed else None
        call = partial(attention, segment_ids_BxL=ids, implementation=implementation)
        out, pull = jax.vjp(call, q, k, v)
        return out, *pull(dout)

    names = {"tpu": ("splash", "pallas", "xla"), "gpu": ("cudnn", "xla")}
    sides = [Side(name, partial(run, name), qkvg) for name in names.get(platform, ("xla", "scan"))]
    what = "8 documents a row" if packed else "one document"
    title = f"attention: B={batch} L={length} H={heads} K={size} {what} {jnp.dtype(dtype).name}"
    return Table(title, sides)


TABLES: dict[str, Callable[[list[int], Any], list[Table]]] = {
    "attention": attention_tables,
    "embedding": embedding_tables,
    "head": head_tables,
}


def compiled(side: Side) -> tuple[Callable[[], Any], int]:
    """(a call that waits for its result, bytes of temporaries)."""
    options = chips.compiler_options(jax.devices()[0].device_kind)
    program = jax.jit(side.function).lower(*side.arguments).compile(options)
    memory = program.memory_analysis()
    call = partial(lambda *args: jax.block_until_ready(program(*args)), *side.arguments)
    return call, memory.temp_size_in_bytes


def seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


COLUMNS = ("ms", "ratio", "temporaries", "ratio")


def measure(table: Table, rounds: int) -> list[tuple[str, ...]]:
    """Compile, warm up, take turns: (side, *COLUMNS) of every side, or why it does not compile."""
    calls, temporaries, failed = {}, {}, []
    for side in table.sides:
        try:
            calls[side.name], temporaries[side.name] = compiled(side)
        except Exception as error:  # whatever a compiler throws is the finding
            failed.append((side.name, str(error).splitlines()[0][:80], "", "", ""))
    repeats = {name: max(1, round(0.2 / seconds(call, 1))) for name, call in calls.items()}
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            turns[name].append(seconds(call, repeats[name]))
    peer = next(iter(calls), "")  # the library, unless it does not compile
    rows = []
    for name, times in turns.items():
        ratio = statistics.median(a / b for a, b in zip(times, turns[peer], strict=True))
        rows.append(
            (
                name,
                f"{1e3 * statistics.median(times):.2f}",
                f"{ratio:.3f}",
                f"{temporaries[name] / 1e6:.1f} MB",
                f"{temporaries[name] / max(temporaries[peer], 1):.3f}",
            )
        )
    return rows + failed


def markdown(title: str, rows: list[tuple[str, ...]]) -> str:
    lines = [("side", *COLUMNS), ("---",) * 5, *rows]
    return f"\n{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 768])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--out", type=Path, help="also write the tables here, as Markdown")
    args = parser.parse_args()
    chips.keep_heap()
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(args.dtype or ("float32" if on_cpu else "bfloat16"))
    text = (
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, medians of {args.rounds} turns\n"
    )
    print(text, flush=True)
    for kernel in args.kernels:
        for table in TABLES[kernel](args.widths, dtype):
            print(f"{table.title}\n{_line('side', *COLUMNS)}", flush=True)
            rows = measure(table, args.rounds)
            print("\n".join(_line(*row) for row in rows), flush=True)
            text += markdown(table.title, rows)
            if args.out:  # as far as it is measured
                args.out.write_text(text)


def _line(name: str, *cells: str) -> str:
    return f"{name:34}" + "".join(f"{cell:>13}" for cell in cells)


if __name__ == "__main__":
    main()
