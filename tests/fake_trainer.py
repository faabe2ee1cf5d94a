"""A stand-in for `prime_jax.train` and a small sweep to run with it; nothing here imports JAX.

As a program: `python fake_trainer.py ROOT [SECONDS]` is one worker whose runs take that long.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

from prime_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    run_id,
)
from prime_jax.sweep import grid, plan

BASE = RunConfig(
    model=ModelConfig(vocab_size=64, layers=2, width=32, heads=2), data=DataConfig(seq_len=16)
)


def sweep(**changes) -> grid.Sweep:
    """Two families, two budgets, two sizes: eight runs."""
    plain = grid.Sweep(
        name="tiny",
        base=BASE,
        families={"arm": {}, "prime": {"subtokens.length": 3}},
        budgets=(1e9, 2e9),
        sizes=((2, 32, 2), (3, 32, 2)),
        batch="fixed:4",
        lr="fixed:1e-3",
    )
    return dataclasses.replace(plain, **changes)


def planned(root: Path, **changes) -> list[str]:
    """Write the sweep to `root`, without data; the ids of its runs."""
    small = sweep(**changes)
    experiment = grid.Experiment(small.name, tuple(grid.rows(small)), "0" * 64)
    listed = plan.candidates(experiment, {})
    plan.write(root, experiment, listed)
    return [candidate.id for candidate in listed if not candidate.drop]


def planned_on(
    root: Path, data: Path, slice: str, budgets: tuple[float, ...] = (1e8,)
) -> list[str]:
    """Add runs that really train on `data` (V = 16, blocks of 16), for a slice; their ids."""
    base = RunConfig(
        model=ModelConfig(vocab_size=16, layers=1, width=32, heads=2),
        data=DataConfig(path=str(data), seq_len=16),
        optim=OptimConfig(warmup_steps=3),
        eval=EvalConfig(examples=16, replicates=2, batch_size=16, estimators=("subtoken",)),
        checkpoint=CheckpointConfig(every=100, keep=10),
        log=LogConfig(every=1),
    )
    made = sweep(
        name=f"on {slice}",
        base=base,
        families={"prime": {"subtokens.length": 4}},
        budgets=budgets,
        sizes=((1, 32, 2),),
        batch="fixed:8",
    )
    experiment = grid.Experiment(made.name, tuple(grid.rows(made)), "0" * 64, epochs_limit=1e9)
    listed = plan.candidates(experiment, plan.load_datasets(experiment, required=True))
    plan.write(root, experiment, listed, slice)
    return [candidate.id for candidate in listed if not candidate.drop]


def result(config: RunConfig) -> dict:
    kind, estimator = ("nll", "ar") if config.family == "arm" else ("nelbo", "subtoken")
    loss = {"kind": kind, "estimator": estimator, "value": 3.5, "se_mc": 0.01, "se_data": 0.02}
    loss |= {"n_tokens": 100, "n_mc": 8, "given": "", "unit": "nats/token"}
    return {
        "schema": 1,
        "run": run_id(config),
        "status": "done",
        "family": config.family,
        "seed": config.seed,
        "steps": config.steps,
        "epochs": 0.5,
        "losses": [loss],
        "hashes": {"data": "d", "tokenizer": "t", "permutation": "p", "eval_set": "e"},
        "seconds": {"total": 2.0, "train": 1.0, "compile": 0.5, "eval": 0.3, "checkpoint": 0.2},
    }


class Trainer:
    """Counts its calls; `act(config, call, heartbeat)` may sleep, report or raise.

    Attributes:
        shared: of each call, the donors by their ids and attempts, and the step that is pinned.
    """

    class Preempted(Exception):
        pass

    class Stopped(Exception):
        pass

    def __init__(self, act=lambda config, call, heartbeat: None):
        self.calls, self.shared, self.act = [], [], act

    def train(self, config, run_dir, *, earlier=(), donors=(), pinned=0, heartbeat=None, log=print):
        self.calls.append((run_id(config), run_dir, tuple(earlier)))
        names = [[f"{d.parent.name}/{d.name}" for d in run] for run in donors]
        self.shared.append((names, pinned))
        self.act(config, len(self.calls), heartbeat)
        return result(config)


def sleeper(seconds: float) -> Trainer:
    """Reports once, then trains for `seconds`, and leaves when told to."""

    def act(config, call, heartbeat):
        until = time.monotonic() + seconds
        while True:
            if not heartbeat(
                {
                    "step": 1,
                    "steps": config.steps,
                    "loss": 4.0,
                    "tokens_per_second": 100.0,
                    "mfu": None,
                }
            ):
                raise Trainer.Stopped
            if time.monotonic() > until:
                return
            time.sleep(0.01)

    return Trainer(act)


if __name__ == "__main__":
    from prime_jax.sweep.worker import work

    trainer = sleeper(float(sys.argv[2]))
    code = work(Path(sys.argv[1]), trainer=trainer, heartbeat_seconds=0.1)
    print(json.dumps([run for run, _, _ in trainer.calls]))
    raise SystemExit(code)
