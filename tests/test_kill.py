"""A run that is killed without warning loses nothing that was saved, and ends with the same numbers."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prime_jax.config import CheckpointConfig, RunConfig
from prime_jax.runtime import checkpoint
from prime_jax.settings import to_dict
from prime_jax.train import train

STEPS = {1: 30, 20: 480}  # by the number of kills, so that the last one comes well before the end
WORKER = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None
)
from prime_jax import train
from prime_jax.config import RunConfig
from prime_jax.settings import from_dict
config = from_dict(RunConfig, json.loads(Path(sys.argv[1]).read_text()))
log = lambda line: print(line, flush=True)
train.train(config, Path(sys.argv[2]), log=log)
log(f"compiled from the cache: {len(hits)}")
"""


@pytest.fixture(scope="module", params=[1, 20])
def kills(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def config(quick, kills) -> RunConfig:
    """Saves at every other step."""
    saving = CheckpointConfig(every=2, keep=3)
    return dataclasses.replace(quick, steps=STEPS[kills], checkpoint=saving)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """Starts the run in a directory; returns the process."""
    folder = tmp_path_factory.mktemp("kill")
    path = folder / "config.json"
    path.write_text(json.dumps(to_dict(config)))

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-u", "-c", WORKER, str(path), str(out), str(folder / "cache")]
        return subprocess.Popen(
            command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


def finish(process: subprocess.Popen) -> str:
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    return text


def losses(out: Path) -> dict[int, float]:
    """The loss of each step; a step that was made twice counts once, by its last row."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config, out, log=lambda _: None)
    return out


def kill(run, out: Path, rng: random.Random) -> int:
    """Let the run make some steps and kill it; how the process ended."""
    process = run(out)
    target = newest(out) + rng.randint(3, 12)
    while process.poll() is None:
        started = (out / "checkpoints" / f"{target:09d}").exists()  # perhaps half written
        if started or newest(out) >= target:
            break
        time.sleep(0.002)
    time.sleep(rng.random() * 0.05)
    process.kill()
    process.communicate()
    return process.returncode


def newest(out: Path) -> int:
    """Step of the newest finished save, 0 without one."""
    return max(checkpoint.steps(out / "checkpoints"), default=0)


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(run, config, whole, tmp_path, kills):
    rng, out, ends, saved = random.Random(kills), tmp_path / "run", [], [0]
    for _ in range(kills):
        ends.append(kill(run, out, rng))
        saved.append(newest(out))
    assert ends == [-signal.SIGKILL] * kills  # each of them met a living process
    assert saved == sorted(saved)  # what was saved once stays
    assert 0 < saved[-1] < config.steps
    text = finish(run(out))
    assert f"continues at step {saved[-1]} of {config.steps}" in text
    assert "first step after" in text
    assert "compiled from the cache: 0" not in text
    assert losses(out) == losses(whole)
    one, two = (json.loads((path / "result.json").read_text()) for path in (whole, out))
    assert two["losses"] == one["losses"]
