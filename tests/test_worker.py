import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fake_trainer
import pytest
from fake_trainer import Trainer

from prime_jax.cli import main
from prime_jax.data import manifest
from prime_jax.data.prepare import prepare
from prime_jax.errors import NoData, UserError
from prime_jax.runtime import storage
from prime_jax.sweep import grid, plan, pool, state, status, worker

PROGRAM = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture
def root(tmp_path):
    fake_trainer.planned(tmp_path)
    return tmp_path


@pytest.fixture
def progress():
    return Told()


class Told(status.WorkerProgress):
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def log(self, text, style=""):
        self.lines.append(text)


def shown(progress) -> str:
    return "\n".join(progress.lines)


def work(root, trainer, **kwargs) -> int:
    return worker.work(
        root, trainer=trainer, **({"heartbeat_seconds": 0.02, "backoff": 0.0} | kwargs)
    )


def keep_one(root) -> str:
    """Leave a single run in the sweep."""
    first, *others = state.list_runs(root)
    for run in others:
        state.kill(root, run)
    return first.id


def find(root, run) -> state.Run:
    return state.select(root, state.list_runs(root), [run])[0]


def test_every_run_is_done_once_and_never_again(root):
    trainer = Trainer()
    assert work(root, trainer) == 0
    assert max(Counter(run for run, *_ in trainer.calls).values()) == 1
    runs = state.list_runs(root)
    assert [run.state for run in runs] == ["done"] * 8
    for run in runs:
        extra = {
            "budget": run.spec["budget"],
            "rules": run.spec["rules"],
            "attempt": 1,
            "preemptions": 0,
        }
        assert run.result.items() >= extra.items()
        assert json.loads((root / "runs" / run.id / "1" / "result.json").read_text()) == run.result
    again = Trainer()
    assert work(root, again) == 0
    assert again.calls == []


def test_largest_first_but_one_compilation_for_one_shape(root):
    trainer = Trainer()
    work(root, trainer)
    runs = {run.id: run for run in state.list_runs(root)}
    order = [runs[run] for run, *_ in trainer.calls]
    assert order[0].spec["flops"]["matmul"] == max(r.spec["flops"]["matmul"] for r in order)
    shapes = [(r.spec["family"], r.spec["config"]["model"]["layers"]) for r in order]
    changes = sum(a != b for a, b in itertools.pairwise(shapes))
    assert changes == len(set(shapes)) - 1
    assert order[0].spec["budget"] > order[1].spec["budget"]


def test_a_failure_is_recorded_shown_and_retried_three_times(root, progress):
    bad = state.list_runs(root)[-1].id
    trainer = Trainer(failing_on(bad, ZeroDivisionError("lost the plot")))
    assert work(root, trainer, progress=progress) == 1
    assert Counter(run for run, *_ in trainer.calls)[bad] == state.FAILURES
    run = find(root, bad)
    assert (run.state, run.reason) == ("failed", "ZeroDivisionError: lost the plot")
    assert "in act" in run.attempts[0].end["traceback"]
    assert "Traceback" in shown(progress)
    assert [r.state for r in state.list_runs(root)].count("done") == 7


def failing_on(bad, error, times=99):
    left = [times]

    def act(config, call, heartbeat):
        if fake_trainer.run_id(config) == bad and left[0]:
            left[0] -= 1
            raise error

    return act


def test_a_failure_that_passes_leaves_a_good_sweep(root):
    flaky = state.list_runs(root)[0].id
    assert work(root, Trainer(failing_on(flaky, OSError("hiccup"), times=1))) == 0
    assert find(root, flaky).result["attempt"] == 2


def test_bad_input_fails_once_in_one_line(root, progress):
    bad = keep_one(root)
    trainer = Trainer(failing_on(bad, UserError("the data is gone")))
    assert work(root, trainer, progress=progress) == 1
    assert len(trainer.calls) == 1
    assert find(root, bad).reason == "the data is gone"
    assert "Traceback" not in shown(progress)


def test_a_preempted_run_continues_from_its_attempts(root):
    run = keep_one(root)
    first = Trainer(failing_on(run, Trainer.Preempted()))
    assert work(root, first) == 85
    assert find(root, run).state == "preempted"
    second = Trainer()
    assert work(root, second) == 0
    assert second.calls == [(run, root / "runs" / run / "2", (root / "runs" / run / "1",))]
    assert (find(root, run).result["attempt"], find(root, run).result["preemptions"]) == (2, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_trainer_and_the_worker(root, number):
    def act(config, call, heartbeat):
        assert heartbeat({"step": 1})
        os.kill(os.getpid(), number)
        assert not heartbeat({"step": 2})
        raise Trainer.Stopped

    before = signal.getsignal(number)
    trainer = Trainer(act)
    assert work(root, trainer) == 85
    assert len(trainer.calls) == 1
    assert find(root, trainer.calls[0][0]).state == "preempted"
    assert signal.getsignal(number) is before


def test_a_killed_run_is_left_at_the_next_beat(root):
    victim = keep_one(root)

    def act(config, call, heartbeat):
        state.kill(root, find(root, victim))
        while heartbeat({"step": 1}):
            time.sleep(0.005)
        raise Trainer.Stopped

    assert work(root, Trainer(act)) == 0
    run = find(root, victim)
    assert (run.state, run.k, run.attempts[0].end) == ("killed", 2, None)


def test_a_store_hiccup_does_not_stop_training(root, monkeypatch):
    def broken(*_):
        raise UserError("no space")

    monkeypatch.setattr(state, "heartbeat", broken)
    assert work(root, fake_trainer.sleeper(0.03)) == 0


def test_the_beat_carries_progress_and_ends_before_the_end(root):
    run = keep_one(root)

    def act(config, call, heartbeat):
        heartbeat({"step": 7, "loss": float("nan")})
        while (find(root, run).attempts[0].heartbeat or {}).get("step") != 7:
            time.sleep(0.005)
        raise ValueError("now")

    assert work(root, Trainer(act), heartbeat_seconds=0.01) == 1
    folder = root / "state"
    assert (folder / f"{run}.1.beat").stat().st_mtime_ns <= (
        folder / f"{run}.1.end"
    ).stat().st_mtime_ns


def test_a_diverged_run_is_a_result(root):
    keep_one(root)

    class Diverging(Trainer):
        def train(self, *args, **kwargs):
            lost = {"status": "diverged", "losses": [], "reason": "loss is not finite at step 3"}
            return super().train(*args, **kwargs) | lost

    assert work(root, Diverging()) == 0
    assert [r.result["status"] for r in state.list_runs(root) if r.result] == ["diverged"]


def test_a_damaged_spec_stops_no_other_run(root, progress):
    bad = root / "state" / f"{keep_one(root)}.spec"
    state.retry(root, state.list_runs(root)[-1])
    bad.write_text("{")
    assert work(root, Trainer(), progress=progress) == 1
    (done,) = (run for run in state.list_runs(root) if run.result)
    assert done.state == "done"
    assert len([line for line in progress.lines if str(bad) in line]) == 1


def test_other_versions_and_unwritable_places_are_refused(root, monkeypatch):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(state.os, "link", read_only)
        with pytest.raises(UserError, match="Read-only"):
            work(root, Trainer())
    (root / "sweep.json").write_text('{"schema": 0}')
    with pytest.raises(UserError, match="version 0"):
        work(root, Trainer())
    with pytest.raises(UserError, match="version 0"):
        pool.supervise(root, 2)


class Reader(Trainer):
    """A trainer that reads data."""

    check_data = staticmethod(manifest.of_run)


@pytest.fixture
def without_data(tmp_path, markov_data):
    """A sweep of several runs on a dataset that has gone, and where it was."""
    data = shutil.copytree(markov_data, tmp_path / "data")
    fake_trainer.planned_on(tmp_path / "sweep", data, "", (1e8, 2e8, 4e8))
    data.rename(tmp_path / "elsewhere")
    return tmp_path / "sweep", data


@pytest.mark.parametrize("more", [[], ["--workers", "2"]])
def test_data_that_is_not_there_is_no_fault_of_the_runs(without_data, more, capsys):
    root, data = without_data
    assert main(["sweep", "run", str(root), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    runs = state.list_runs(root)
    assert f"{data} holds no dataset" in line
    assert line.endswith(f"; {len(runs)} runs stay open")
    assert [run.attempts for run in runs] == [()] * len(runs)
    data.with_name("elsewhere").rename(data)
    assert work(root, Reader()) == 0
    assert {(run.state, run.k) for run in state.list_runs(root)} == {("done", 1)}


def test_data_that_cannot_be_read_or_is_another_stops_the_worker(without_data, monkeypatch):
    root, data = without_data
    other = "markov:V=16,order=1,seed=1,tokens=4000"
    prepare(other, "synthetic:16", data, seq_len=16, workers=1)
    with pytest.raises(NoData, match="fingerprint"):
        work(root, Reader())

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest, "load", denied)
    with pytest.raises(NoData, match="Permission denied"):
        work(root, Reader())
    assert not any(run.attempts for run in state.list_runs(root))


def test_runs_whose_data_is_there_are_done_first(without_data, markov_data):
    root, _ = without_data
    gone = len(state.list_runs(root))
    fake_trainer.planned_on(root, markov_data, "", (3e8,))
    with pytest.raises(NoData, match=f"{gone} runs stay open"):
        work(root, Reader())
    runs = state.list_runs(root)
    assert sum(run.state == "done" for run in runs) == len(runs) - gone > 0
    assert sum(run.k == 0 for run in runs) == gone


def test_data_that_goes_while_a_run_begins_is_no_failure_either(root):
    run = keep_one(root)
    with pytest.raises(NoData):
        work(root, Trainer(failing_on(run, NoData("the folder has gone"))))
    found = find(root, run)
    assert (found.state, found.failures, found.opens_in()) == ("preempted", 0, 0.0)
    assert work(root, Trainer()) == 0


def test_all_failed_runs_are_opened_at_once(root, capsys):
    assert work(root, Trainer(fail)) == 1
    first, *others = state.list_runs(root)
    state.retry(root, first)
    state.kill(root, others[0])
    assert main(["sweep", "retry", str(root), "--all-failed"]) == 0
    assert f"{len(others) - 1} failed runs" in capsys.readouterr().out
    assert Counter(run.state for run in state.list_runs(root)) == {"pending": 7, "killed": 1}
    for words in ([], [first.id, "--all-failed"]):
        assert main(["sweep", "retry", str(root), *words]) == 2
    assert main(["sweep", "kill", str(root)]) == 2


def fail(config, call, heartbeat):
    raise UserError("no such thing")


def test_the_share_of_training_leaves_compilation_out():
    spent = [{"train": 30.0, "compile": 5.0}, {"train": 42.0, "compile": 5.0}, {}]
    assert "80%" in worker.step_fraction(spent, 100.0)


def start(root, seconds) -> subprocess.Popen:
    command = (*PROGRAM, str(root), str(seconds))
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def test_two_workers_finish_twenty_runs_exactly_once(tmp_path):
    ids = fake_trainer.planned(tmp_path, families={"arm": {}}, seeds=range(5))
    assert len(ids) == 20
    workers = [start(tmp_path, 0.02) for _ in range(2)]
    taken = []
    for process in workers:
        out, _ = process.communicate()
        assert process.returncode == 0
        taken.append(json.loads(out.splitlines()[-1]))
    assert sorted(taken[0] + taken[1]) == sorted(ids)
    assert {run.state for run in state.list_runs(tmp_path)} == {"done"}
    assert {run.k for run in state.list_runs(tmp_path)} == {1}


def test_a_worker_killed_in_the_middle_is_replaced_at_once(root):
    run = keep_one(root)
    with start(root, 600) as victim:
        while not (
            find(root, run).attempts and (find(root, run).attempts[0].heartbeat or {}).get("step")
        ):
            time.sleep(0.02)
        victim.kill()
    trainer = Trainer()
    assert work(root, trainer, timeout=1e9) == 0
    assert trainer.calls == [(run, root / "runs" / run / "2", (root / "runs" / run / "1",))]
    assert find(root, run).result["preemptions"] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pool_finishes_a_sweep_and_replaces_a_killed_worker(root, progress, workers):
    """The first process to arrive kills itself while it owns a run."""
    code = (
        "import os, sys, fake_trainer; from pathlib import Path; from prime_jax.sweep.worker import work\n"
        "def act(config, call, heartbeat):\n"
        "    try: os.mkdir(Path(sys.argv[1]) / 'died')\n"
        "    except FileExistsError: return\n"
        "    os.kill(os.getpid(), 9)\n"
        "raise SystemExit(work(Path(sys.argv[1]), trainer=fake_trainer.Trainer(act)))"
    )
    environment = f"PYTHONPATH={Path(__file__).parent}:{ENVIRONMENT['PYTHONPATH']}"
    command = ("env", environment, sys.executable, "-c", code, str(root))
    assert pool.supervise(root, workers, command=command, progress=progress) == 0
    runs = state.list_runs(root)
    assert [run.state for run in runs] == ["done"] * 8
    assert sorted(run.k for run in runs) == [1] * 7 + [2]
    text = shown(progress)
    assert len(re.findall(r"^[0-9a-f]{10} .* done", text, re.M)) == 8
    assert ("restarted" in text) or workers == 2  # else the other may have done all in time


def test_a_pool_passes_a_signal_on_and_says_so(root, progress):
    """SIGTERM reaches the workers, which save and leave; the pool returns 85."""
    command = ("env", f"PYTHONPATH={ENVIRONMENT['PYTHONPATH']}", *PROGRAM, str(root), "600")
    code = (
        "import sys; from pathlib import Path; from prime_jax.sweep.pool import supervise;"
        "raise SystemExit(supervise(Path(sys.argv[1]), 2, command=sys.argv[2:]))"
    )
    with subprocess.Popen(
        (sys.executable, "-c", code, str(root), *command), env=ENVIRONMENT
    ) as boss:
        while sum(bool(r.attempts and r.attempts[0].heartbeat) for r in state.list_runs(root)) < 2:
            time.sleep(0.02)
        boss.terminate()
    assert boss.returncode == 85
    assert Counter(run.state for run in state.list_runs(root)) == {"preempted": 2, "pending": 6}


def test_a_pool_whose_workers_cannot_start_shows_why(root, progress):
    command = (sys.executable, "-c", "raise SystemExit('no such luck')")
    assert pool.supervise(root, 1, command=command, progress=progress) == 1
    assert "no such luck" in shown(progress)


def test_a_worker_leaves_the_runs_of_other_slices_alone(tmp_path):
    small = fake_trainer.sweep(families={"arm": {}}, budgets=(1e9,))
    experiment = grid.Experiment(small.name, tuple(grid.rows(small)), "0" * 64)
    one, two = plan.candidates(experiment, {})
    plan.write(tmp_path, experiment, [one], "v5e-16")
    plan.write(tmp_path, experiment, [two], "v5e-8")
    trainer = Trainer()
    assert work(tmp_path, trainer, slice="v5e-8") == 0
    assert [run for run, *_ in trainer.calls] == [two.id]
    with pytest.raises(UserError, match="no run is planned for v4-8; there are: v5e-16, v5e-8"):
        work(tmp_path, trainer, slice="v4-8")


def test_a_worker_saves_and_leaves_before_its_time_is_up(root):
    """And begins nothing that it could not save."""

    def act(config, call, heartbeat):
        while heartbeat({"step": 1}):
            time.sleep(0.01)
        raise Trainer.Stopped

    trainer = Trainer(act)
    began = time.monotonic()
    assert work(root, trainer, minutes=1 / 60) == 85
    assert time.monotonic() - began < 1.0
    assert len(trainer.calls) == 1
    assert find(root, trainer.calls[0][0]).state == "preempted"
    assert work(root, trainer, minutes=1e-9) == 85
    assert len(trainer.calls) == 1


def test_the_limit_leaves_time_for_what_saving_and_starting_took():
    limit = worker.Limit(60.0)
    assert not limit.out_of_time(60.0)
    assert limit.out_of_time(1801.0)
    assert limit.allows(1700.0)
    assert not limit.allows(1800.0)
    assert not worker.Limit(None).out_of_time(1e9)


def test_an_unreachable_store_is_an_interruption_of_the_run_not_a_failure(root):
    run = keep_one(root)
    trainer = Trainer(failing_on(run, storage.Unreachable("gone"), times=1))
    assert work(root, trainer) == 0
    assert (find(root, run).result["attempt"], find(root, run).result["preemptions"]) == (2, 1)


def test_a_superseded_owner_does_not_publish(root):
    run = keep_one(root)

    def act(config, call, heartbeat):
        if call == 1:
            state.claim(root, run, 2)
            state.end(root, run, 2, "preempted", "by the test")

    trainer = Trainer(act)
    assert work(root, trainer, heartbeat_seconds=60) == 0
    assert find(root, run).result["attempt"] == 3
    assert len(trainer.calls) == 2


def test_logs_tell_what_happened_attempt_by_attempt(root, capsys):
    from prime_jax.cli import main

    run = keep_one(root)
    work(root, Trainer(failing_on(run, ZeroDivisionError("lost the plot"), times=1)))
    assert main(["sweep", "logs", str(root), run[:5]]) == 0
    text = capsys.readouterr().out
    first, second = text.split("=== attempt 2")
    assert "Traceback" in first
    assert "ZeroDivisionError: lost the plot" in first
    assert "Traceback" not in second


def test_machine_time_adds_up_over_attempts(root):
    run = keep_one(root)

    def act(config, call, heartbeat):
        time.sleep(0.15)
        if find(root, run).k == 1:
            raise Trainer.Preempted

    work(root, Trainer(act), heartbeat_seconds=0.02)
    work(root, Trainer(act), heartbeat_seconds=0.02)
    assert find(root, run).result["machine_seconds"] >= 0.2


def test_a_worker_measures_the_kernels_once_for_its_sweep(tmp_path, monkeypatch):
    """`--tune` makes a table where there is none; without it, the one that is there counts."""
    from prime_jax import train, tuned
    from prime_jax.kernels import tune
    from prime_jax.kernels.selection import NOTHING, Choices

    root, asked, given = tmp_path / "sweep", [], []
    fake_trainer.planned(root, families={"arm": {}}, budgets=(1e9,))
    monkeypatch.setattr(train, "train", lambda config, folder, **rest: given.append(rest))
    monkeypatch.setattr("jax.config.update", lambda *_: None)  # the cache of compiled programs
    trainer = worker.JaxTrainer(root)
    trainer.choose(root, None, print)
    trainer.train(None, None)

    def measured(configs, progress):
        asked.extend(configs)
        return Choices("cpu", "jax")

    monkeypatch.setattr(tune, "tune", measured)
    for _ in range(2):
        trainer = worker.JaxTrainer(root)
        trainer.choose(root, "", print)
        trainer.train(None, None)
    assert [rest["choices"] for rest in given] == [NOTHING, *[Choices("cpu", "jax")] * 2]
    assert [c.family for c in asked] == ["arm"] * len(state.open_runs(root))
    assert tuned.file_of("cpu", root).exists()


def test_an_interrupted_attempt_counts_as_training(root, progress):
    def interrupted(*_):
        stop = Trainer.Preempted("saved")
        stop.seconds = {"train": 1000.0, "compile": 0.0}
        raise stop

    assert work(root, Trainer(interrupted), progress=progress) == 85
    fraction = re.search(r"training steps: (\d+)% of", shown(progress))
    assert int(fraction[1]) > 100
