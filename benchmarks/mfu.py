"""Tokens/s, MFU and memory of the real training step for ARM, MDM and MDM-Prime, in bfloat16.

    python benchmarks/mfu.py [--sizes 92M 354M 1.1B] [--length 2048] [--tokens 32768] [--rounds 3]
        [--families mdm arm prime] [--json FILE]

Every (size, family) is a process of its own, run one after the other; families of one size are
measured in turn `rounds` times and the median is printed, with the ratio of tokens/s to MDM in the
same run: what sub-tokens cost. MFU is given in both FLOP conventions (prime_jax/flops.py) against
the data sheet's dense bfloat16 peak; it is left out where the peak is not known (CPUs). Memory is
the allocator's peak. Tokens are random; neither the data pipeline nor the command line is imported.
The micro-batch is lowered by halves until a step fits. On several hosts the same command on each
measures all of them together (PRIME_COORDINATOR and so on); the first host prints.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from prime_jax import config as configs  # noqa: E402
from prime_jax.flops import CONVENTIONS, flops_per_token, param_counts  # noqa: E402

VOCAB = 50257  # GPT-2's, but of `tiny`, which is for tests of this script
# layers, width, heads, feed-forward multiple; named by their non-embedding parameters, about
SIZES = {
    "tiny": (2, 128, 2, 4),
    "92M": (12, 768, 12, 3),
    "354M": (26, 1024, 16, 3),
    "1.1B": (20, 1792, 14, 4),
}
FAMILIES = ("mdm", "arm", "prime")
STEPS = 5


class DoesNotRun(Exception):
    """A size that does not fit, or fails; with the last line of its output."""


def run_config(family: str, size: str, length: int, tokens: int, accumulate: int):
    layers, width, heads, ffn = SIZES[size]
    vocab = 300 if size == "tiny" else VOCAB
    slots = (vocab - 1).bit_length() if family == "prime" else 1
    return configs.validate(
        configs.RunConfig(
            family=family,
            batch_size=max(tokens // length, 1),
            model=configs.ModelConfig(
                vocab_size=vocab,
                layers=layers,
                width=width,
                heads=heads,
                ffn_multiple=ffn,
                dtype="bfloat16",
            ),
            subtokens=configs.SubtokenConfig(length=slots),
            data=configs.DataConfig(seq_len=length),
            optim=configs.OptimConfig(warmup_steps=1),
            mesh=configs.MeshConfig(accumulate=accumulate),
        )
    )


def measure(config) -> dict:
    """Median seconds of a step of `config` on this machine, and the memory it took."""
    import jax
    import numpy as np

    from prime_jax import optim, step
    from prime_jax.hardware.chips import peak_flops
    from prime_jax.runtime import distributed, sharding
    from prime_jax.runtime.metrics import Clock, memory_high_water

    distributed.start(lambda line: print(line, file=sys.stderr))
    program, clock = step.program(config, eos_id=0), Clock()
    state = program.init(clock, config.seed)
    shape = (config.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    rows = np.arange(config.batch_size, dtype=np.int32)
    batch = sharding.shard(program.mesh, (tokens, rows))
    horizon, seed = optim.horizon(config), np.uint32(0)
    seconds = []
    for turn in range(4):
        began = time.perf_counter()
        for _ in range(STEPS):
            state, metrics = program.train(clock, state, *batch, seed, horizon)
        loss = float(metrics.loss)
        if turn:  # the first one compiles
            seconds.append((time.perf_counter() - began) / STEPS)
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "seconds": statistics.median(seconds),
        "memory": memory_high_water(),
        "peak": peak and peak * jax.device_count(),
        "compile": clock.seconds["compile"],
        "loss": loss,
    }


def in_a_process(family: str, size: str, length: int, tokens: int) -> tuple[dict, object]:
    """The measurement with the largest micro-batch that fits, and its config."""
    accumulate, reason = 1, ""
    while accumulate <= max(tokens // length, 1):
        config = run_config(family, size, length, tokens, accumulate)
        command = [sys.executable, __file__, "--serve", json.dumps(configs.to_dict(config))]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1]), config
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        if "RESOURCE_EXHAUSTED" not in done.stderr and "out of memory" not in done.stderr.lower():
            break
        accumulate *= 2
    raise DoesNotRun(reason)


HEADER = (
    f"{'size':5}  {'family':6}  {'params':>7}  {'micro':>5}  {'ms/step':>8}  {'tokens/s':>9}  "
    f"{'MFU matmul':>10}  {'MFU ref.':>8}  {'GiB':>6}  {'to first':>8}  {'compile s':>9}"
)


def measured(size: str, args: argparse.Namespace) -> list[dict]:
    """A row for each family of a size, or the one that says why there is none."""
    turns: dict[str, list[dict]] = {family: [] for family in args.families}
    settings = {}
    for _ in range(args.rounds):
        for family in args.families:
            try:
                found, config = in_a_process(family, size, args.length, args.tokens)
            except DoesNotRun as error:
                return [{"size": size, "family": family, "error": str(error)}]
            settings[family] = config
            turns[family].append(found)
    rows = []
    for family, found in turns.items():
        config, peak = settings[family], found[0]["peak"]
        tokens = config.batch_size * config.data.seq_len
        seconds = statistics.median(turn["seconds"] for turn in found)
        pairs = zip(turns[args.families[0]], found, strict=True)
        speed = tokens / seconds
        mfu = {n: flops_per_token(config, n) * speed / peak if peak else None for n in CONVENTIONS}
        rows.append(
            {
                "size": size,
                "family": family,
                "device": found[0]["device"],
                "length": config.data.seq_len,
                "tokens": tokens,
                "params": param_counts(config)["total"],
                "micro_batch": config.batch_size // config.mesh.accumulate,
                "step_seconds": seconds,
                "tokens_per_second": speed,
                "mfu": mfu,
                "memory_bytes": found[0]["memory"],
                "to_first": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
                "compile_seconds": found[0]["compile"],
            }
        )
    return rows


def shown(row: dict) -> str:
    if "error" in row:
        return f"{row['size']:5}  {row['family']:6}  {row['error']}"
    mfu = [f"{x:.3f}" if x else "-" for x in row["mfu"].values()]
    return (
        f"{row['size']:5}  {row['family']:6}  {row['params'] / 1e6:6.0f}M  "
        f"{row['micro_batch']:5}  {1e3 * row['step_seconds']:8.1f}  "
        f"{row['tokens_per_second']:9.0f}  {mfu[0]:>10}  {mfu[1]:>8}  "
        f"{row['memory_bytes'] / 2**30:6.1f}  {row['to_first']:8.3f}  {row['compile_seconds']:9.1f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["92M", "354M", "1.1B"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=32768, help="of a step (default 32768)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each family (default 3)")
    parser.add_argument("--json", type=Path, help="also write the rows into this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        config = configs.from_dict(configs.RunConfig, json.loads(args.serve))
        print(json.dumps(measure(config)))
        return 0
    rows = []
    for size in args.sizes:
        found = measured(size, args)
        if not rows:
            device = found[0].get("device", "no device")
            print(f"{device}, length {args.length}, {args.tokens} tokens a step\n{HEADER}")
        rows += found
        print("\n".join(map(shown, found)), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return any("error" in row for row in rows)


if __name__ == "__main__":
    sys.exit(main())
