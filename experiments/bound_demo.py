"""Which numbers are likelihoods? A comparison on a source whose entropy is known exactly.

A Markov chain of order one over V = 16 symbols, sequences of L = 32. Six small networks are
trained: ARM, MDM, MDM-Prime with the marginal loss, MDM-Prime with the published joint loss; and in
blocks of 8 units (BD3-LM) MDM and MDM-Prime, whose likelihood is summed exactly over all subsets.
Every `nll`, `exact` and `nelbo` must stay above the entropy of a sequence (no model of sequences can
be below it), and entropy <= exact <= nelbo. The joint loss has no such bound and falls below the
entropy; therefore its kind is `train_loss`.

Arithmetic: 6 runs x 1,200 steps x 64 x 32 tokens = 1.5e7 tokens, in blocks half as many that are
read twice; a network of 2 x 64 costs about 0.8 MFLOP a token with its head and attention: 1.2e13
FLOPs. An exact number is 2**8 - 1 network calls of 256 sequences, 1.5e12 FLOPs. Under seven minutes
on two CPU cores.
Expected (seed 0): docs/theory.md; the numbers are also in OUT/numbers.json.

    python experiments/bound_demo.py [--steps 1200] [--out runs/bound_demo]

The error of a number comes mostly from the choice of blocks, not from the model. As the source is
known, -log p_true of the same blocks serves as a control variate: the script prints
mean(model - true) + block entropy, with the standard error of that difference.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from prime_jax.cli.console import Progress
from prime_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
)
from prime_jax.data import loader, manifest, markov
from prime_jax.data.prepare import prepare
from prime_jax.runtime.records import write_json_atomic
from prime_jax.train import train

V, L = 16, 32
SOURCE = f"V={V},order=1,seed=0,tokens=4000000"
RUNS = {  # family, sub-tokens per token, loss, tokens of a block
    "arm": ("arm", 1, "marginal", 0),
    "mdm": ("mdm", 1, "marginal", 0),
    "prime": ("prime", 4, "marginal", 0),
    "prime_joint": ("prime", 4, "joint", 0),
    "mdm_blocks": ("mdm", 1, "marginal", 8),
    "prime_blocks": ("prime", 4, "marginal", 2),
}
SUMMED = EvalConfig(examples=256, batch_size=256, estimators=("exact:subtoken",))
NAMES = {
    "ar": "nll",
    "exact:subtoken": "exact",
    "subtoken": "nelbo",
    "exact:subtoken:nelbo": "nelbo",
    "token": "token_nelbo",
    "joint": "train_loss",
}


def config(name: str = "prime", steps: int = 1200, data: str = "data/bound_demo") -> RunConfig:
    """One of the runs; `prime-jax train experiments/bound_demo.py` trains MDM-Prime."""
    family, length, loss, block = RUNS[name]
    return RunConfig(
        family=family,
        steps=steps,
        batch_size=32 if block else 64,  # a block is read twice, noisy and clean
        model=ModelConfig(vocab_size=V, layers=2, width=64, heads=2),
        subtokens=SubtokenConfig(length=length),
        objective=ObjectiveConfig(loss=loss, block_length=block),
        data=DataConfig(path=data, seq_len=L),
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=min(100, steps // 10)),
        eval=SUMMED if block else EvalConfig(examples=1024, batch_size=512),
        checkpoint=CheckpointConfig(keep=1),
    )


def corrected(run_dir: Path, source: markov.Markov, blocks: loader.EvalBlocks) -> dict:
    """{"nll" | "exact" | "nelbo" | ...: value, ..., "se"}: nats per token with the control variate."""
    true_E = -source.log_prob(blocks.tokens)
    floor = source.block_entropy(L)
    out, errors = {}, {}
    with np.load(run_dir / "eval.npz") as draws:
        for estimator, name in NAMES.items():
            if estimator not in draws:
                continue
            nats_RxE = draws[estimator] - true_E
            replicates, examples = nats_RxE.shape
            out[name] = float(nats_RxE.mean() + floor) / L
            between = nats_RxE.mean(0).std(ddof=1) / examples**0.5
            within = nats_RxE.mean(1).std(ddof=1) / replicates**0.5 if replicates > 1 else 0.0
            errors[name] = float(np.hypot(between, within)) / L
    return {**out, "se": max(errors.values())}


def show(numbers: dict, console: Console) -> None:
    floor = numbers["block_entropy"]
    table = Table(title=f"nats per token; block entropy {floor:.4f}, rate {numbers['entropy']:.4f}")
    for column in ("run", "number", "kind", "value", "se", "above entropy?"):
        table.add_column(column)
    for run, values in numbers["runs"].items():
        for name in dict.fromkeys(NAMES.values()):
            if name in values:
                other = {"token_nelbo": "nelbo (token mask)", "exact": "nll (all subsets)"}
                kind = other.get(name, name)
                above = values[name] > floor
                verdict = "yes" if above else "NO: no bound"
                row = (f"{values[name]:.4f}", f"{values['se']:.4f}", verdict)
                table.add_row(run, "joint loss" if name == "train_loss" else "valid", kind, *row)
    console.print(table)


def finish(numbers: dict, out: Path) -> None:
    """The table, OUT/numbers.json, and the same numbers as one JSON object on the last line."""
    show(numbers, Console())
    write_json_atomic(out / "numbers.json", numbers)
    print(json.dumps(numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=Path("runs/bound_demo"))
    parser.add_argument("--data", type=Path, default=Path("data/bound_demo"))
    args = parser.parse_args()
    prepare(f"markov:{SOURCE}", f"synthetic:{V}", args.data, seq_len=L, workers=1)
    source = markov.parse(SOURCE)
    numbers = {
        "entropy": source.entropy_rate(),
        "block_entropy": source.block_entropy(L) / L,
        "runs": {},
    }
    for name in RUNS:
        run = config(name, args.steps, str(args.data))
        with Progress() as progress:
            progress.log(f"training {name} ({run.steps} steps)")
            train(run, args.out / name, heartbeat=progress.heartbeat, log=progress.log)
        blocks = loader.eval_blocks(manifest.load(args.data), "valid", run.eval.examples)
        numbers["runs"][name] = corrected(args.out / name, source, blocks)
    finish(numbers, args.out)


if __name__ == "__main__":
    main()
