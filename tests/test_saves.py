"""When a run is saved, and who may write into its directory."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import process_groups
import pytest

from prime_jax.cli import main
from prime_jax.config import CheckpointConfig, MeshConfig
from prime_jax.runtime import checkpoint, distributed
from prime_jax.runtime.records import read_json, write_json_atomic
from prime_jax.settings import to_dict
from prime_jax.train import train

SILENT = lambda _: None  # noqa: E731


class Machine:
    """A clock that only moves when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(checkpoint.time, "monotonic", lambda: self.now)

    def saves(self, schedule, paces, save_seconds=0.0) -> list[float]:
        """Times of the saves of a run whose steps take `paces` seconds."""
        found = []
        for step, pace in enumerate(paces, 1):
            self.now += pace
            if schedule.should_save(step):
                found.append(self.now - 1000.0)
                self.now += save_seconds
                schedule.restart(step)
        return found


@pytest.mark.parametrize("paces", [[20.0, *[0.5] * 800], [7.0] * 60, [*[0.1] * 900, *[0.2] * 900]])
def test_saves_are_minutes_apart(monkeypatch, paces):
    """After a slow first step, with long steps, and when they become slower."""
    machine = Machine(monkeypatch)
    times = machine.saves(checkpoint.Schedule(CheckpointConfig(minutes=1.0), 0), paces)
    apart = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert len(times) >= sum(paces) // 80
    assert all(60 <= gap < 90 for gap in apart)


def test_process_0_decides_for_all_and_is_asked_seldom(monkeypatch):
    told: list[int] = []
    machine = Machine(monkeypatch)

    def send(value):
        told.append(value)
        return value

    monkeypatch.setattr(distributed, "broadcast", send)
    config = CheckpointConfig(minutes=1.0)
    first = machine.saves(checkpoint.Schedule(config, 0), [0.1] * 2000)
    assert len(first) == 3
    assert len(told) < 3 * 16
    # Another process, whose clock is hours ahead and runs at twice the speed.
    monkeypatch.setattr(distributed, "broadcast", lambda _: told.pop(0))
    machine.now = 9000.0
    steps = {round(t / 0.1) for t in first}
    schedule, saved = checkpoint.Schedule(config, 0), set()
    for step in range(1, 2001):
        machine.now += 0.2
        if schedule.should_save(step):
            saved.add(step)
            schedule.restart(step)
    assert (saved, told) == (steps, [])


def test_steps_and_minutes_together(monkeypatch):
    config = CheckpointConfig(every=70, minutes=1.0)
    machine = Machine(monkeypatch)
    times = machine.saves(checkpoint.Schedule(config, 0), [1.0] * 200)
    assert times == [60, 70, 130, 140, 200]
    assert not checkpoint.Schedule(CheckpointConfig(minutes=0), 0).should_save(10**6)


def test_every_nth_save_is_kept(tmp_path):
    with checkpoint.Writer(tmp_path, {}, CheckpointConfig(keep=1, keep_every=4)) as writer:
        for step in range(2, 14, 2):
            writer.save(step, {"x": np.arange(8.0)})
    assert checkpoint.steps(tmp_path) == [4, 8, 12]


def test_it_is_said_when_no_whole_save_is_left(tmp_path):
    writer = checkpoint.Writer(tmp_path, {}, CheckpointConfig(keep=2))
    for step in (1, 2):
        writer.save(step, {"x": np.arange(8.0)})
        writer.wait()
        (tmp_path / f"{step:09d}.json").write_text("{")
    said = []
    assert checkpoint.restore([tmp_path], None, {}, said.append) is None
    assert ["trying the previous one" in line for line in said] == [True, False]
    assert "starting at step 0" in said[1]


def saved(folder, steps, **config):
    """Steps that a new process saves there, one after the other."""
    with checkpoint.Writer(folder, {}, CheckpointConfig(**config), SILENT) as writer:
        for step in steps:
            writer.save(step, {"x": np.arange(8.0) + step})


def restored(folder, said=SILENT):
    found = checkpoint.restore([folder], {"x": np.zeros(8)}, {}, said)
    return found and int(found["x"][0])


def without_data(folder, *steps):
    """What a copy that was cut short leaves: seals whose steps are not there."""
    for step in steps:
        shutil.rmtree(folder / f"{step:09d}")


def test_later_steps_that_are_damaged_prune_nothing(tmp_path):
    saved(tmp_path, (1960, 2000))
    without_data(tmp_path, 1960, 2000)
    assert restored(tmp_path) is None
    saved(tmp_path, (40, 80, 120), keep=2)
    assert checkpoint.steps(tmp_path) == [80, 120, 1960, 2000]
    assert restored(tmp_path) == 120
    saved(tmp_path, (160,), keep=1)
    assert checkpoint.steps(tmp_path) == [160, 1960, 2000]
    assert restored(tmp_path) == 160
    saved(tmp_path, (1960, 2000), keep=2)  # the run has come by
    assert checkpoint.steps(tmp_path) == [1960, 2000]
    assert restored(tmp_path) == 2000


def test_an_earlier_step_that_is_damaged_keeps_no_other_from_its_place(tmp_path):
    saved(tmp_path, (3, 6, 7), keep=3)
    without_data(tmp_path, 6)
    saved(tmp_path, (9,), keep=3)
    assert checkpoint.steps(tmp_path) == [3, 6, 7, 9]
    saved(tmp_path, (12,), keep=3)
    assert checkpoint.steps(tmp_path) == [7, 9, 12]


def test_a_step_that_is_known_to_be_damaged_is_not_saved(tmp_path):
    """A run that is asked to leave at such a step saves it again."""
    saved(tmp_path, (5,))
    without_data(tmp_path, 5)
    writer = checkpoint.Writer(tmp_path, {}, CheckpointConfig(), SILENT)
    note = lambda place, *found: writer.know(*found)  # noqa: E731
    assert checkpoint.restore([tmp_path], None, {}, SILENT, note) is None
    assert writer.steps() == []
    writer.save_with_retries(5, {"x": np.arange(8.0)}, 1.0)
    assert writer.steps() == [5]


GANG = """
import json, sys
from pathlib import Path
from prime_jax.runtime import distributed
from prime_jax.config import RunConfig
from prime_jax.settings import from_dict

distributed.start(print)
from prime_jax import train

def heartbeat(now):
    import time
    time.sleep(0.02 * (1 + now["step"] % 3))
    return True

train.HEARTBEAT_SECONDS = 0.0
config = from_dict(RunConfig, json.loads(Path(sys.argv[1]).read_text()))
print(train.train(config, Path(sys.argv[2]), heartbeat=heartbeat)["status"])
"""


@pytest.mark.slow
def test_a_gang_saves_by_the_clock(quick, tmp_path):
    """Its processes' clocks differ, and only process 0's counts: at each save they meet."""
    often = CheckpointConfig(keep=100, minutes=0.01)
    config = dataclasses.replace(quick, steps=150, checkpoint=often, mesh=MeshConfig())
    write_json_atomic(tmp_path / "config.json", to_dict(config))
    words = ["-c", GANG, str(tmp_path / "config.json"), str(tmp_path / "run")]
    codes, texts = process_groups.ended(process_groups.start(words, 2, 2))
    assert codes == [0, 0], texts
    assert len(checkpoint.steps(tmp_path / "run" / "checkpoints")) >= 4


def program(text: str, *words: object, **more: object) -> subprocess.Popen:
    command = [sys.executable, "-u", "-c", textwrap.dedent(text), *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def test_two_processes_never_train_in_one_directory(tmp_path):
    holder = program(
        """
        import sys, time
        from pathlib import Path
        from prime_jax.runtime import storage
        with storage.locked(Path(sys.argv[1])):
            print("mine")
            time.sleep(60)
        """,
        tmp_path / "run",
    )
    assert holder.stdout.readline() == "mine\n"
    with (
        pytest.raises(checkpoint.UserError, match="another process is training there"),
        checkpoint.storage.locked(tmp_path / "run"),
    ):
        pass
    holder.kill()
    holder.wait()
    with checkpoint.storage.locked(tmp_path / "run"):  # a killed process leaves no lock
        pass
    holder.stdout.close()
    holder.stderr.close()


def test_training_holds_the_lock(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("prime_jax.train.HEARTBEAT_SECONDS", 0.0)

    def heartbeat(_):
        with pytest.raises(checkpoint.UserError, match="another process"):
            train(quick, tmp_path, log=SILENT)
        return False

    with pytest.raises(Exception, match="stopped run"):
        train(quick, tmp_path, heartbeat=heartbeat, log=SILENT)


def test_a_log_that_cannot_grow_ends_in_one_line(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("prime_jax.train.HEARTBEAT_SECONDS", 0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    long = dataclasses.replace(quick, steps=2000)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def heartbeat(now):
        if now["step"] == 3:
            size = os.path.getsize(tmp_path / "run" / "metrics.jsonl")
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
        return True

    try:
        with pytest.raises(checkpoint.UserError, match=r"cannot write .*metrics.jsonl: File too"):
            train(long, tmp_path / "run", heartbeat=heartbeat, log=SILENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_takes_longer_than_the_grace_is_not_begun(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("prime_jax.train.HEARTBEAT_SECONDS", 0.0)
    config = dataclasses.replace(quick, checkpoint=CheckpointConfig(every=4, grace_seconds=5.0))

    def seconds(_):
        return 60.0  # each save took so long

    monkeypatch.setattr(
        checkpoint.Writer, "seconds", property(seconds, lambda *_: None), raising=False
    )
    with pytest.raises(
        Exception, match=r"longer than the grace period of 5 s: the last saved step is 4"
    ):
        train(config, tmp_path, heartbeat=lambda now: now["step"] < 6, log=SILENT)
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]


def test_a_pinned_dataset_is_checked(tiny, tmp_path, capsys):
    experiment = tmp_path / "pinned.py"
    experiment.write_text(
        "from prime_jax.config import RunConfig\n"
        "from prime_jax.settings import from_dict\n"
        f"def config():\n    return from_dict(RunConfig, {to_dict(tiny)!r})\n"
    )
    words = ["train", str(experiment), "--out", str(tmp_path / "run"), "--data.fingerprint", "abc"]
    assert main(words) == 2
    assert "data.fingerprint = abc, but" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_edited_manifest_is_refused(markov_data, tmp_path):
    import shutil

    from prime_jax.data import manifest

    copy = shutil.copytree(markov_data, tmp_path / "copy")
    values = read_json(copy / manifest.FILE)
    values["train"]["shards"][0]["sha256"] = "0" * 64
    (copy / manifest.FILE).write_text(json.dumps(values))
    with pytest.raises(checkpoint.UserError, match="was altered"):
        manifest.load(copy)


WORKER = """
import os, signal, sys, time
from prime_jax.runtime import distributed
from prime_jax.sweep import worker

with worker.signals() as stopping, distributed.PreemptionGuard() as guard:
    print("ready", flush=True)
    while not stopping.is_set():
        time.sleep(0.01)
    print("saving", guard.should_stop(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_worker_that_is_saving(number):
    with program(WORKER) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.send_signal(signal.SIGTERM)  # the same one from two sides: no second signal
        assert process.stdout.readline() == "saving True\n"
        time.sleep(1.2)
        process.send_signal(number)
        assert process.wait(timeout=20) in (-number, 1)
