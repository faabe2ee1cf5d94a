import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_trainer
import pytest
from rich.console import Console

from prime_jax.launch import engine, local
from prime_jax.sweep import state

WORKER = """
import sys
from pathlib import Path
import fake_trainer
from prime_jax.launch import engine, local
from prime_jax.sweep import pool, worker
from rich.console import Console
worker._jax_trainer = lambda *_: fake_trainer.sleeper(float(sys.argv[3]))
pool.COMMAND = (sys.executable, "-c", sys.argv[4])
sweep = engine.sweep_at(Path(sys.argv[1]), int(sys.argv[2]))
raise SystemExit(local.up(sweep, local.Options(), engine.Desk(Console(), True, None)))
"""
ONE = """
import sys
from pathlib import Path
import fake_trainer
from prime_jax.sweep import worker
raise SystemExit(worker.work(Path(sys.argv[3]), trainer=fake_trainer.sleeper(0.0)))
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    fake_trainer.planned(tmp_path / "sweep")
    return engine.sweep_at(tmp_path / "sweep", 2)


@pytest.fixture
def desk():
    return engine.Desk(Console(quiet=True), True, None)


def start(sweep, workers: int, seconds: float) -> subprocess.Popen:
    path = os.pathsep.join([str(engine.REPO), str(Path(__file__).parent)])
    command = [sys.executable, "-c", WORKER, sweep.root, str(workers), str(seconds), ONE]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_up_works_until_nothing_is_open(sweep, workers):
    assert start(sweep, workers, 0.0).wait(timeout=60) == 0
    assert {run.state for run in state.list_runs(sweep.source)} == {"done"}


def test_down_asks_the_worker_to_save_and_leave(sweep, desk):
    worker = start(sweep, 1, 60.0)
    try:
        while not any(run.state == "running" for run in state.list_runs(sweep.source)):
            assert worker.poll() is None
            time.sleep(0.05)
        assert local.down(sweep, local.Options(), desk) == 0
        assert worker.wait(timeout=30) == 85
    finally:
        worker.kill()
    assert [run.state for run in state.list_runs(sweep.source)].count("preempted") == 1


def test_down_where_nothing_runs_or_the_worker_was_killed(sweep, desk):
    assert local.down(sweep, local.Options(), desk) == 0
    worker = start(sweep, 1, 60.0)
    while not any(run.state == "running" for run in state.list_runs(sweep.source)):
        assert worker.poll() is None
        time.sleep(0.05)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert local.down(sweep, local.Options(), desk) == 0
    assert not list(local._folder(sweep).iterdir())


def test_render_is_the_workers_command(sweep):
    (text,) = local.render(sweep, local.Options()).values()
    assert text == f"prime-jax sweep work {sweep.root}\n"
