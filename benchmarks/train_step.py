"""Training speed and memory of ARM, MDM and MDM-Prime beside a plain eager PyTorch MDM.

    python benchmarks/train_step.py [--sizes 6M 19M 34M] [--dtypes float32 bfloat16] [--rounds 7]

Every (side, size, dtype) is a process of its own. The sides of one size take turns, one side
stepping while the others wait, so that a busy machine slows all of them alike; printed are medians
over the turns, and `ratio` is the median over turns of tokens/s against PyTorch in that turn.
Sizes are named by their non-embedding parameters; the vocabulary has 4096 tokens, so Prime has
12 binary sub-tokens. GFLOP/s counts matrix products (prime_jax/flops.py, convention `matmul`).

Memory is what a side adds on top of its imported libraries: on a CPU the peak resident size during
the timed steps less the resident size after the imports (Linux; before them, heap freed since the
warm-up is returned, so what the compiler needed does not count), on a GPU the allocator's peak.
The tokens are random; neither the data pipeline nor the command line is imported.
"""

import argparse
import ctypes
import importlib.util
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
from prime_jax.flops import flops_per_token, param_counts  # noqa: E402

VOCAB = 4096
# layers, width, heads; sequences, tokens in each; steps per turn
SIZES = {
    "6M": (6, 256, 4, 4, 256, 8),
    "19M": (8, 384, 6, 2, 512, 2),
    "34M": (8, 512, 8, 1, 2048, 1),
}
PEER = "torch mdm"
SIDES = (PEER, "jax arm", "jax mdm", "jax prime")
DTYPES = ("float32", "bfloat16")


def run_config(side: str, size: str, dtype: str) -> configs.RunConfig:
    layers, width, heads, batch, length, _ = SIZES[size]
    family = side.split()[1]
    slots = (VOCAB - 1).bit_length() if family == "prime" else 1
    return configs.validate(
        configs.RunConfig(
            family=family,
            batch_size=batch,
            model=configs.ModelConfig(
                vocab_size=VOCAB, layers=layers, width=width, heads=heads, dtype=dtype
            ),
            subtokens=configs.SubtokenConfig(length=slots),
            data=configs.DataConfig(seq_len=length),
            mesh=configs.MeshConfig(replica=1, data=1, remat="dots"),
        )
    )


def jax_side(config: configs.RunConfig):
    """Generator: yields the device's name, then, for each number of steps sent, (loss, GPU peak)."""
    import jax
    import numpy as np

    from prime_jax import optim, step
    from prime_jax.runtime import sharding
    from prime_jax.runtime.metrics import Clock

    device = jax.devices()[0]
    yield device.device_kind

    program, clock = step.program(config, eos_id=0), Clock()
    state = program.init(clock, config.seed)
    shape = (config.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(0, VOCAB, shape, np.int32)
    rows = np.arange(config.batch_size, dtype=np.int32)
    batch = sharding.shard(program.mesh, (tokens, rows))
    horizon, seed = optim.horizon(config), np.uint32(config.seed)
    result = None
    while True:
        for _ in range((yield result)):
            state, metrics = program.train(clock, state, *batch, seed, horizon)
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        result = float(metrics.loss), peak


def torch_side(config: configs.RunConfig):
    """The same for the PyTorch twin."""
    import torch
    from torch_twin import Trainer

    cuda = torch.cuda.is_available()
    yield torch.cuda.get_device_name() if cuda else "cpu"

    trainer = Trainer(config)
    shape = (config.batch_size, config.data.seq_len)
    tokens = torch.randint(0, VOCAB, shape, device=trainer.device)
    result = None
    while True:
        for _ in range((yield result)):
            loss = trainer.step(tokens)
        result = float(loss), torch.cuda.max_memory_allocated() if cuda else None


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in bytes; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def forget_peak() -> None:
    """Give the compiler's freed heap back and start a new peak (Linux with glibc)."""
    peak_reset = Path("/proc/self/clear_refs")
    if peak_reset.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)
        peak_reset.write_text("5")


def serve(side: str, size: str, dtype: str) -> None:
    """A side as a process: answers each number of steps on its input with a line of JSON."""
    config = run_config(side, size, dtype)
    run = (torch_side if side == PEER else jax_side)(config)
    device = next(run)
    before = resident("VmRSS")
    next(run)
    run.send(2)  # compilation, first allocations
    forget_peak()
    print(json.dumps({"device": device}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        loss, peak = run.send(int(line))
        seconds = time.perf_counter() - start
        peak = resident("VmHWM") - before if peak is None else peak
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak}), flush=True)


class Side:
    """The parent's end of a side's process."""

    def __init__(self, side: str, size: str, dtype: str):
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, __file__, "--serve", side, size, dtype]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.device = self._answer()["device"]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side died; its message is above")
        return json.loads(line)

    def turn(self, steps: int) -> dict:
        print(steps, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


HEADER = (
    f"{'size':4}  {'dtype':8}  {'side':9}  {'ms/step':>8}  {'tokens/s':>9}  {'GFLOP/s':>8}  "
    f"{'peak MB':>8}  {'ratio':>6}  loss"
)


def measure(names: list[str], size: str, dtype: str, rounds: int) -> None:
    """Start the sides of one size, let them take turns, print a row for each."""
    sides = {name: Side(name, size, dtype) for name in names}
    turns: dict[str, list[dict]] = {name: [] for name in names}
    *_, batch, length, steps = SIZES[size]
    for _ in range(rounds):
        for name, side in sides.items():
            turns[name].append(side.turn(steps))
    for side in sides.values():
        side.close()
    for name in names:
        config = run_config(name, size, dtype)
        speeds = [steps * batch * length / turn["seconds"] for turn in turns[name]]
        speed = statistics.median(speeds)
        ratio = "-"
        if PEER in turns:
            peer = [steps * batch * length / turn["seconds"] for turn in turns[PEER]]
            ratio = f"{statistics.median(a / b for a, b in zip(speeds, peer, strict=True)):.2f}"
        gflops = speed * flops_per_token(config, "matmul") / 1e9
        peak = max(turn["peak"] for turn in turns[name]) / 1e6
        print(
            f"{size:4}  {dtype:8}  {name:9}  {1e3 * batch * length / speed:8.1f}  {speed:9.0f}  "
            f"{gflops:8.1f}  {peak:8.0f}  {ratio:>6}  {turns[name][-1]['loss']:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve)
    names = list(SIDES)
    if importlib.util.find_spec("torch") is None:
        names.remove(PEER)
        print("no PyTorch in this environment: its rows and the ratios are left out")
    for size, (layers, width, heads, batch, length, _) in SIZES.items():
        if size in args.sizes:
            total = param_counts(run_config("jax mdm", size, "float32"))["total"]
            print(
                f"{size}: {layers} layers x {width} x {heads} heads, vocabulary {VOCAB}, "
                f"{total:,} parameters in all; {batch} x {length} tokens a step"
            )
    print(HEADER, flush=True)
    for dtype in args.dtypes:
        for size in args.sizes:
            measure(names, size, dtype, args.rounds)


if __name__ == "__main__":
    main()
