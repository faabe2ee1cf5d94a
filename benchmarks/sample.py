"""Sampling speed: ancestral steps with idle ones skipped beside every step called, and ARM's cache.

    python benchmarks/sample.py [--batches 1 8 64] [--steps 256] [--length 64] [--rounds 3]

Random parameters; the order of reveals does not depend on them. The two sides draw the same samples
(checked) and take turns; printed are medians. `programs` counts what was compiled for all rows of a
family: one per batch size and side. `idle` is the fraction of steps that reveal nothing, expected
(1 - 1/T)^(L l). Neither the data pipeline nor the command line is imported.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from prime_jax import model  # noqa: E402
from prime_jax.config import DataConfig, ModelConfig, RunConfig, SubtokenConfig  # noqa: E402
from prime_jax.sample import Options, Sampler  # noqa: E402
from prime_jax.sample.orders import idle_fraction, plan  # noqa: E402
from prime_jax.subtokens import Codebook  # noqa: E402

VOCAB, LAYERS, WIDTH = 4096, 2, 128
FAMILIES = {"mdm": ("mdm", 1), "prime l=2": ("prime", 2), "prime l=12": ("prime", 12)}


def random_run(family: str, slots: int, length: int) -> SimpleNamespace:
    config = RunConfig(
        family=family,
        model=ModelConfig(vocab_size=VOCAB, layers=LAYERS, width=WIDTH, heads=2),
        subtokens=SubtokenConfig(length=slots),
        data=DataConfig(seq_len=length),
    )
    book = Codebook.create(VOCAB, config.subtokens)
    network = model.build(config, book)
    digits = jnp.zeros((1, length, book.length), jnp.int32)
    params = jax.jit(network.init)(jax.random.key(0), digits)["params"]

    def bound(params):
        return lambda *args, **more: network.apply({"params": params}, *args, **more)

    return SimpleNamespace(config=config, codebook=book, params=params, network=bound)


def timed(sampler: Sampler, batch: int, options: Options) -> tuple[float, int, list]:
    """(seconds, network calls, samples) of one batch."""
    canvases = [sampler.canvas([])] * batch
    began = time.perf_counter()
    samples = sampler.sample(canvases, options)
    return time.perf_counter() - began, samples.calls[0], samples.tokens


def programs(sampler: Sampler) -> int:
    return sum(function._cache_size() for function in sampler.compiled.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(
        f"{jax.devices()[0].device_kind}, L = {args.length}, T = {args.steps}, V = {VOCAB}, "
        f"{LAYERS} layers of {WIDTH}"
    )
    print("| family | batch | idle (expected) | calls | tokens/s plain | cached | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, (family, slots) in FAMILIES.items():
        sampler = Sampler(random_run(family, slots, args.length))
        for batch in args.batches:
            _row(name, sampler, batch, args)
        print(f"{name}: {programs(sampler)} programs", flush=True)
    arm = Sampler(random_run("arm", 1, args.length))
    for batch in args.batches:
        options = Options(batch_size=batch)
        timed(arm, batch, options)
        seconds = statistics.median(timed(arm, batch, options)[0] for _ in range(args.rounds))
        speed = batch * args.length / seconds
        print(f"| arm, kv cache | {batch} | | {args.length} | | {speed:.0f} | |", flush=True)
    print(f"arm: {programs(arm)} programs")


def _row(name: str, sampler: Sampler, batch: int, args: argparse.Namespace) -> None:
    sides = [Options(steps=args.steps, batch_size=batch, cached=side) for side in (False, True)]
    warm = [timed(sampler, batch, side) for side in sides]  # compiles
    np.testing.assert_array_equal(warm[0][2], warm[1][2])
    seconds: list[list[float]] = [[], []]
    for _ in range(args.rounds):
        for turn, side in zip(seconds, sides, strict=True):
            turn.append(timed(sampler, batch, side)[0])
    plain, cached = (batch * args.length / statistics.median(turn) for turn in seconds)
    hidden = np.ones((args.length, sampler.codebook.length), bool)
    rng = np.random.default_rng(0)
    idle = np.mean([idle_fraction(plan(sides[0], hidden, rng)) for _ in range(50)])
    expected = (1 - 1 / args.steps) ** hidden.size
    print(
        f"| {name} | {batch} | {idle:.1%} ({expected:.1%}) | {warm[0][1]} / {warm[1][1]} "
        f"| {plain:.0f} | {cached:.0f} | {cached / plain:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
