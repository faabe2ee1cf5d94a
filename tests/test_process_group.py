"""Workers of several processes: one claims, all train, all leave together. The training is real."""

import signal
import subprocess
import textwrap
import time

import fake_store
import process_groups
import pytest
from process_groups import ended

from prime_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from prime_jax.data import manifest
from prime_jax.runtime import checkpoint, storage
from prime_jax.sweep import grid, plan, state

KEEP = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"
}  # a fast machine makes a step in less than 1 s


def planned(root, data, steps: int, **settings) -> list[str]:
    """A sweep of two real runs, one of them for v5e-8."""
    base = RunConfig(
        steps=steps,
        batch_size=8,
        model=ModelConfig(vocab_size=16, layers=1, width=32, heads=2),
        data=DataConfig(path=str(data), seq_len=16),
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=1),
        eval=EvalConfig(examples=8, replicates=1, batch_size=8, estimators=()),
        mesh=MeshConfig(replica=1),
        checkpoint=CheckpointConfig(every=4, keep=2),
        log=LogConfig(every=1),
    )
    small = grid.Sweep(
        name="process group",
        base=base,
        families={"arm": {}},
        budgets=(2e7,),
        sizes=((1, 32, 2),),
        seeds=(0, 1),
        batch="fixed:8",
        lr="fixed:1e-3",
        **settings,
    )
    experiment = grid.Experiment(small.name, tuple(grid.rows(small)), "0" * 64)
    listed = plan.candidates(experiment, {str(data): manifest.load(data)})
    plan.write(root, experiment, listed[:1], "v5e-8")
    plan.write(root, experiment, listed[1:], "v5e-16")
    return [candidate.id for candidate in listed]


def group(url: str, processes: int, *options: str) -> list[subprocess.Popen]:
    words = ["-m", "prime_jax", "sweep", "work", url, *options]
    return process_groups.start(words, processes, devices=4, **KEEP)


@pytest.mark.slow
def test_a_gang_trains_its_slice_in_a_bucket_and_another_finishes(markov_data, tmp_path):
    """Two processes do the run of their slice on `gs://`, checkpoints included; one does the rest."""
    with fake_store.bucket("gs") as made:
        root = storage.path(made.url)
        mine, other = planned(root, markov_data, 12)
        codes, texts = ended(group(made.url, 2, "--slice", "v5e-8"))
        assert codes == [0, 0], texts
        assert all("waiting for 2 processes" in text for text in texts)
        runs = {run.id: run for run in state.list_runs(root)}
        assert (runs[mine].state, runs[other].state) == ("done", "pending")
        folder = root / "runs" / mine / "1"
        kept = checkpoint.steps(folder / "checkpoints")
        assert kept[-1] == runs[mine].result["steps"]
        assert len(kept) <= 2
        assert {"log.0.txt", "log.1.txt", "metrics.jsonl"} <= set(storage.names(folder))
        assert storage.names(root / "cache" / "xla")  # what was compiled is kept with the sweep


@pytest.mark.slow
def test_a_worker_that_begins_anew_compiles_no_step_again(markov_data, tmp_path):
    """Two runs of one shape, each in a process of its own that has only the sweep's directory."""
    root = tmp_path / "sweep"
    planned(root, markov_data, 4)
    code = """
        import sys
        import jax
        names = []
        jax.monitoring.register_event_listener(lambda name, **_: names.append(name.split("/")[-1]))
        from prime_jax.cli import main
        code = main(sys.argv[1:])
        print("hits:", names.count("cache_hits"))
        sys.exit(code)
    """
    hits = []
    for name in ("v5e-8", "v5e-16"):
        words = ["-c", textwrap.dedent(code), "sweep", "work", str(root), "--slice", name]
        codes, (text,) = ended(process_groups.start(words, 1, devices=4, **KEEP))
        assert codes == [0], text
        hits.append(int(text.rpartition("hits: ")[2]))
    assert [run.state for run in state.list_runs(root)] == ["done", "done"]
    assert hits[0] < hits[1]


@pytest.mark.slow
def test_a_gang_that_is_told_to_stop_saves_and_its_run_is_finished_elsewhere(markov_data, tmp_path):
    planned(tmp_path, markov_data, 2000)
    workers = group(str(tmp_path), 2)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if any(state.list_runs(tmp_path)[i].k for i in range(2)) and list(
            tmp_path.glob("runs/*/1/checkpoints/*.json")
        ):
            break
        time.sleep(0.05)
    workers[1].send_signal(signal.SIGTERM)
    codes, texts = ended(workers)
    assert codes == [85, 85], texts
    assert sorted(run.state for run in state.list_runs(tmp_path)) == ["pending", "preempted"]
    codes, texts = ended(group(str(tmp_path), 1))
    assert codes == [0], texts
    assert [run.state for run in state.list_runs(tmp_path)] == ["done", "done"]
    assert any("continues at step" in text for text in texts)
