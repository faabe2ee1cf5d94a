"""The cost of an exact likelihood: network calls per second, and time beside that of a NELBO.

    python benchmarks/exact.py [--units 4 8 10 12] [--rows 4] [--tokens 120]

Random parameters, l = 1, blocks of n tokens; the sums on the host are part of the time. The NELBO is
that of eight draws, as in an evaluation. Neither the data pipeline nor the command line is imported.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from prime_jax import model  # noqa: E402
from prime_jax.config import (  # noqa: E402
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
)
from prime_jax.evaluate import estimators, exact, likelihood  # noqa: E402
from prime_jax.subtokens import Codebook  # noqa: E402

VOCAB, LAYERS, WIDTH, DRAWS = 4096, 2, 128, 8


def timed(n: int, rows: int, length: int) -> tuple[float, float]:
    """Seconds of an exact number and of a NELBO, for all rows."""
    config = RunConfig(
        family="mdm",
        model=ModelConfig(vocab_size=VOCAB, layers=LAYERS, width=WIDTH, heads=2),
        objective=ObjectiveConfig(block_length=n),
        data=DataConfig(seq_len=length),
    )
    book = Codebook.create(VOCAB, config.subtokens)
    network, task = model.build(config, book), estimators.make_task(config, book, -1)
    digits = jnp.zeros((1, 2, length, 1), jnp.int32)
    params = jax.jit(network.init)(jax.random.key(0), digits)["params"]
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, VOCAB)
    text = estimators.Text(tokens, jnp.ones((rows, length), bool))

    def apply(params):
        return lambda *args: network.apply({"params": params}, *args)

    @jax.jit
    def log_probs(params, hidden):
        return exact.log_probs("token", task, apply(params), text, hidden)

    @jax.jit
    def bound(params, *row):
        return likelihood.draw(task, "subtoken", apply(params), tokens, *row)["subtoken"]

    def summed() -> float:
        began, ask = time.perf_counter(), lambda hidden: log_probs(params, hidden)
        shape = (rows, length // n, n)
        exact.by_subsets(ask, shape, lambda done, calls: None)
        return time.perf_counter() - began

    def drawn() -> float:
        began, all_rows = time.perf_counter(), likelihood.grid(rows, DRAWS)
        for row in likelihood.batches(all_rows, rows):
            np.asarray(bound(params, *row[:3]))
        return time.perf_counter() - began

    jax.block_until_ready(log_probs(params, np.ones((rows, length // n, n), bool)))
    drawn()
    return summed(), drawn()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, nargs="+", default=[4, 8, 10, 12])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=120, help="of a row; a multiple of all units")
    args = parser.parse_args()
    print(f"{args.rows} rows of {args.tokens} tokens, {jax.devices()[0].device_kind}")
    print(" n  calls  calls/s  exact s  NELBO s  ratio")
    for n in args.units:
        whole, bound = timed(n, args.rows, args.tokens)
        calls = 2**n - 1
        print(
            f"{n:2d}  {calls:5d}  {calls / whole:7.1f}  {whole:7.2f}  {bound:7.2f}  "
            f"{whole / bound:5.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
