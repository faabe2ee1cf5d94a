"""The slurm engine on a real Slurm: two pools, one of them a process group that a higher priority preempts."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from fake_trainer import planned_on

from prime_jax.launch import engine
from prime_jax.runtime import checkpoint
from prime_jax.sweep import state

pytestmark = pytest.mark.slurm
ALONE, GANG = "h100-1", "2xh100-1"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a cluster of two nodes with two GPUs each, for CPU workers."""
    folder = os.environ.get("PRIME_SLURM_CACHE")  # keeps the packages between calls
    try:
        place = Path(folder) if folder else tmp_path_factory.mktemp("slurm")
        with slurm_cluster.cluster(place, nodes=2, gpus=2) as environment:
            yield environment | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_backend_optimization_level=0",
                "PYTHONPATH": str(engine.REPO),
            }
    except slurm_cluster.Unavailable as reason:
        pytest.skip(f"no Slurm: {reason}")


def prime_jax(environment: dict[str, str], *words: object) -> str:
    command = [sys.executable, "-m", "prime_jax", "sweep", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def queue(environment: dict[str, str], what: str = "%j %T") -> list[str]:
    command = ["squeue", "-h", "--me", "-o", what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def until(true, what: str, root: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            logs = [path.read_text()[-3000:] for path in (root / "logs/slurm").glob("*.out")]
            pytest.fail("\n----\n".join([f"waited in vain: {what}", *logs]))
        time.sleep(0.3)


def test_two_pools_one_of_them_a_gang_that_is_preempted(slurm, markov_data, tmp_path):
    root = tmp_path / "sweep"
    short = planned_on(root, markov_data, ALONE, (2e8, 4e8))
    (long,) = planned_on(root, markov_data, GANG, (3e10,))
    prices = engine.REPO / "docs" / "prices.toml"
    options = ("--on", "slurm", "--yes", "--time", 30, "--tasks", 4, "--prices", prices)
    text = prime_jax(slurm, "up", root, *options)
    assert f"-{ALONE}: 2 runs" in text
    assert f"-{GANG}: 1 runs" in text
    assert "already in the queue" in prime_jax(slurm, "up", root, *options)

    first = root / "runs" / long / "1"
    until(lambda: steps(first)[-1:] > [150], "the process group trains", root)
    urgent = ["sbatch", "-p", "urgent", "-N2", "--gpus-per-node=2", "--wrap", "sleep 3"]
    subprocess.run(urgent, env=slurm, check=True, cwd=tmp_path, capture_output=True)

    done = [root / "state" / f"{run}.result" for run in (*short, long)]
    until(lambda: all(path.exists() for path in done), "every run finishes", root)
    until(lambda: not queue(slurm), "spare tasks leave", root)

    runs = {run.id: run for run in state.list_runs(root)}
    assert {run.state for run in runs.values()} == {"done"}
    group = runs[long]
    assert [attempt.end and attempt.end["state"] for attempt in group.attempts[:1]] == ["preempted"]
    assert group.k == 2
    saved = checkpoint.steps(first / "checkpoints")[-1]
    assert saved == steps(first)[-1], "saved where it was stopped"
    assert stopped_at(first) == [saved, saved], "both processes at one step"
    second = steps(root / "runs" / long / "2")
    assert second[0] == saved + 1, "and goes on from there"
    assert second[-1] == group.spec["config"]["steps"]
    assert "no jobs" in prime_jax(slurm, "down", root, "--on", "slurm", "--yes")


def test_a_sweep_moves_from_slurm_to_this_machine(slurm, markov_data, tmp_path):
    moved, stayed = tmp_path / "moved", tmp_path / "stayed"
    for root in (moved, stayed):
        runs = planned_on(root, markov_data, ALONE, (2e8, 4e8, 6e9))
    prime_jax(slurm, "up", moved, "--on", "slurm", "--yes", "--time", 30, "--tasks", 1)
    (longest,) = [run.id for run in state.list_runs(moved) if run.spec["budget"] == 6e9]
    until(lambda: steps(moved / "runs" / longest / "1")[-1:] > [100], "it trains", moved)
    prime_jax(slurm, "down", moved, "--on", "slurm", "--yes")
    until(lambda: not queue(slurm), "it saves and leaves", moved)
    assert [run.state for run in state.list_runs(moved)].count("preempted") == 1
    for root in (moved, stayed):
        prime_jax(slurm, "run", root)
        prime_jax(slurm, "collect", root, "-o", root / "runs.csv")
    text = (moved / "runs.csv").read_text()
    assert text == (stayed / "runs.csv").read_text()
    assert text.count(",done,") == len(runs)


def test_down_cancels_this_sweeps_jobs_and_no_others(slurm, markov_data, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for root in (one, other):
        planned_on(root, markov_data, ALONE, (2e8,))
        wait = ("--sbatch", "begin=now+1hour")
        prime_jax(slurm, "up", root, "--on", "slurm", "--yes", *wait)
    assert len(queue(slurm)) == 2
    prime_jax(slurm, "down", one, "--on", "slurm", "--yes")
    (left,) = queue(slurm, "%j")
    assert left.startswith(engine.sweep_at(other).name)
    prime_jax(slurm, "down", other, "--on", "slurm", "--yes")
    assert queue(slurm) == []


def test_slurms_refusal_in_its_own_words(slurm, markov_data, tmp_path):
    planned_on(tmp_path / "sweep", markov_data, ALONE, (2e8,))
    words = f"sweep up {tmp_path}/sweep --on slurm --yes --partition nowhere".split()
    command = [sys.executable, "-m", "prime_jax", *words]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "Invalid partition" in line


def steps(attempt: Path) -> list[int]:
    path = attempt / "metrics.jsonl"
    if not path.exists():
        return []
    return [int(n) for n in re.findall(r'"step": (\d+), "(?!eval)', path.read_text())]


def stopped_at(attempt: Path) -> list[int]:
    """The step at which each process of the process group says that it saved."""
    texts = [path.read_text() for path in attempt.glob("log.*.txt")]
    return [int(n) for text in texts for n in re.findall(r"saved step (\d+)", text)]
