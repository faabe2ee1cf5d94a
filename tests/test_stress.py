"""Workers that are killed and frozen at random, with clocks an hour apart, on one sweep."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_trainer
import pytest
import stress_worker

from prime_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from prime_jax.data import manifest
from prime_jax.sweep import grid, plan, state, worker

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}"}
FROZEN = 2 * stress_worker.TIMEOUT  # seconds


def planned(root: Path, data: Path, stubs: int, real: int) -> None:
    """So many runs that only pretend, and so many that train."""
    fake_trainer.planned(
        root, families={"arm": {}}, budgets=(1e9,), sizes=((2, 32, 2),), seeds=range(stubs)
    )
    config = RunConfig(
        family="arm",
        steps=40,
        batch_size=4,
        model=ModelConfig(vocab_size=16, layers=1, width=32, heads=2),
        data=DataConfig(path=str(data), seq_len=16),
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=1),
        eval=EvalConfig(examples=8, replicates=1, batch_size=8, estimators=()),
        mesh=MeshConfig(replica=1, data=1, model=1),
        checkpoint=CheckpointConfig(every=5),
    )
    one = grid.rows(fake_trainer.sweep(base=config, families={"arm": {}}))[0]
    rows = tuple(
        dataclasses.replace(one, seed=seed, steps=40, batch_size=4) for seed in range(real)
    )
    experiment = grid.Experiment("real", rows, "1" * 64)
    listed = plan.candidates(experiment, {str(data): manifest.load(data)})
    plan.write(root, experiment, listed)


def start(root: Path, skew: float) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "stress_worker.py"), str(root), str(skew)]
    log = (root / f"worker{skew:+.0f}.txt").open("a")
    with log:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)


def chaos(root: Path, workers: int, kills: int, freezes: int, rng: random.Random) -> list[int]:
    """Run the sweep to its end; the exit codes of the workers that were left in peace."""
    skews = [3600.0 * (i - workers // 2) for i in range(workers)]
    team = [start(root, skew) for skew in skews]
    events = ["kill"] * kills + ["freeze"] * freezes
    rng.shuffle(events)
    thaw: list[tuple[float, subprocess.Popen]] = []
    try:
        while any(process.poll() is None for process in team):
            now = time.monotonic()
            for when, process in [entry for entry in thaw if entry[0] <= now]:
                process.send_signal(signal.SIGCONT)
                thaw.remove((when, process))
            frozen = {process for _, process in thaw}
            free = [i for i, p in enumerate(team) if p.poll() is None and p not in frozen]
            if events and len(free) > 1 and len(frozen) < workers // 2:
                victim = rng.choice(free)
                if events.pop() == "freeze":
                    team[victim].send_signal(signal.SIGSTOP)
                    thaw.append((now + FROZEN, team[victim]))
                else:
                    team[victim].kill()
                    team[victim].wait()
                    team[victim] = start(root, skews[victim])
            time.sleep(rng.uniform(0.1, 0.3))
        assert not events, "the sweep was over too soon for this test"
        return [process.returncode for process in team]
    finally:
        for process in team:
            process.kill()
            process.wait()


def outcome(runs: list[state.Run]) -> dict[str, tuple]:
    return {run.id: (run.result["losses"], run.result.get("state")) for run in runs}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stubs", "real", "workers", "kills", "freezes"), [(24, 1, 3, 2, 2), (194, 6, 6, 20, 20)]
)
def test_killed_and_frozen_workers_change_nothing(
    markov_data, tmp_path, stubs, real, workers, kills, freezes
):
    root, quiet = tmp_path / "stormy", tmp_path / "quiet"
    for place in (root, quiet):
        planned(place, markov_data, stubs, real)
    codes = chaos(root, workers, kills, freezes, random.Random(workers))
    assert set(codes) == {0}, [path.read_text()[-2000:] for path in root.glob("worker*.txt")]
    assert worker.work(quiet, trainer=stress_worker.Trainer(0.0), backoff=0.0) == 0
    runs = state.list_runs(root)
    assert [run.state for run in runs] == ["done"] * (stubs + real)
    assert outcome(runs) == outcome(state.list_runs(quiet))
    for run in runs:
        owners_wrote_alone(root, run)
        published_once(root, run)


def owners_wrote_alone(root: Path, run: state.Run) -> None:
    """Every row of an attempt's log comes from the process that claimed it."""
    for path in (root / "runs" / run.id).glob("*/metrics.jsonl"):
        claim = json.loads((root / "state" / f"{run.id}.{path.parent.name}.claim").read_text())
        rows = [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"]
        assert {row["pid"] for row in rows if "pid" in row} <= {claim["pid"]}


def published_once(root: Path, run: state.Run) -> None:
    """The published result is that of one attempt; later attempts, if any, have not published."""
    own = root / "runs" / run.id / str(run.result["attempt"]) / "result.json"
    assert json.loads(own.read_text()) == run.result
