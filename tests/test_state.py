import json
import os
import signal
import subprocess
import sys

import fake_trainer
import pytest

from prime_jax.errors import UserError
from prime_jax.sweep import grid, plan, state, status


@pytest.fixture
def root(tmp_path):
    fake_trainer.planned(tmp_path, budgets=(1e9,), families={"arm": {}})
    return tmp_path


def only(root, watch=None) -> state.Run:
    return state.list_runs(root, watch)[-1]


def test_creation_is_exclusive_and_whole(tmp_path):
    path = tmp_path / "x"
    assert state.create(path, {"a": 1})
    assert not state.create(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_exactly_one_of_two_claims_the_same_attempt(root):
    run = only(root)
    assert [state.claim(root, run.id, 1), state.claim(root, run.id, 1)] == [True, False]


def test_a_full_or_read_only_disk_is_a_user_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.os, "link", full)
    with pytest.raises(UserError, match="No space left"):
        state.create(tmp_path / "x", {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot write"):
        state.create(tmp_path / "absent" / "x", {})


def test_derived_states(root):
    run = only(root)
    assert (run.state, run.k) == ("pending", 0)
    state.claim(root, run.id, 1)
    assert (only(root).state, only(root).certain) == ("running", True)  # this very process
    for k, (how, seen) in enumerate(
        [
            ("failed", "failed"),
            ("preempted", "preempted"),
            ("killed", "killed"),
            ("reset", "pending"),
        ],
        2,
    ):
        state.claim(root, run.id, k)
        state.end(root, run.id, k, how, "why")
        assert (only(root).state, only(root).k, only(root).reason) == (seen, k, "why")
    assert state.publish(root, run.id, {"status": "done", "losses": []})
    assert not state.publish(root, run.id, {"status": "done", "losses": []})
    assert only(root).state == "done"
    assert only(root).opens_in() is None


def elsewhere(root, run, k=1):
    """A claim by a process that cannot be looked up from here."""
    claim = state.identity() | {"host": "another", "by": "worker", "time": 0.0}
    assert state.create(root / "state" / f"{run.id}.{k}.claim", claim)


def test_a_beat_that_stands_still_on_the_readers_clock_is_lost(root):
    run, now = only(root), 1000.0
    elsewhere(root, run)
    watch = state.Watch(timeout=300, clock=lambda: now)
    assert (only(root, watch).state, only(root, watch).certain) == ("running", False)
    now += 200
    state.heartbeat(root, run.id, 1, {"count": 1})
    assert (only(root, watch).state, only(root, watch).certain) == ("running", True)
    now += 299
    assert only(root, watch).state == "running"
    now += 2
    assert only(root, watch).state == "lost"
    assert only(root).state == "running"  # another reader has not waited yet
    state.heartbeat(root, run.id, 1, {"count": 2})
    assert only(root, watch).state == "running"


def test_a_killed_local_process_is_lost_at_once(root):
    run = only(root)
    code = (
        "import sys, time; from pathlib import Path; from prime_jax.sweep import state;"
        "state.claim(Path(sys.argv[1]), sys.argv[2], 1); print('claimed', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(root), run.id], stdout=subprocess.PIPE
    )
    with owner:
        assert owner.stdout.readline() == b"claimed\n"
        assert (only(root).state, only(root).certain) == ("running", True)
        os.kill(owner.pid, signal.SIGKILL)
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # dead, but still a zombie
        assert only(root).state == "lost"
        assert only(root).opens_in() == 0.0
    assert only(root).state == "lost"


def test_a_reused_process_number_is_another_process(root):
    claim = state.identity()
    assert state.process_alive(claim) is True
    assert state.process_alive(claim | {"started": claim["started"] - 1}) is False
    assert state.process_alive(claim | {"host": "another"}) is None


def test_failures_back_off_on_the_readers_clock_and_end(root):
    run, now = only(root), 1000.0
    watch = state.Watch(clock=lambda: now)
    for k, wait in ((1, 30.0), (2, 60.0)):
        state.claim(root, run.id, k)
        state.end(root, run.id, k, "failed", "boom")
        assert only(root, watch).opens_in() == wait
        now += wait - 1
        assert only(root, watch).opens_in() == 1.0
        now += 2
        assert only(root, watch).opens_in() == 0.0
    state.claim(root, run.id, 3)
    state.end(root, run.id, 3, "failed", "boom")
    assert (only(root).failures, only(root).opens_in()) == (3, None)
    state.retry(root, only(root))
    assert (only(root).state, only(root).failures, only(root).opens_in()) == ("pending", 0, 0.0)


def test_failures_that_need_a_person_are_not_repeated(root):
    run = only(root)
    state.claim(root, run.id, 1)
    state.end(root, run.id, 1, "failed", "bad data", retry=False)
    assert only(root).opens_in() is None


def test_interruptions_have_a_larger_budget(root, monkeypatch):
    run = only(root)
    monkeypatch.setattr(state, "INTERRUPTIONS", 2)
    state.claim(root, run.id, 1)
    state.end(root, run.id, 1, "preempted", "signal")
    assert (only(root).interruptions, only(root).opens_in()) == (1, 0.0)
    state.claim(root, run.id, 2)  # left without an end: lost
    state.claim(root, run.id, 3)
    assert only(root).interruptions == 2
    state.end(root, run.id, 3, "preempted", "signal")
    assert (only(root).interruptions, only(root).opens_in()) == (3, None)


def test_kill_fences_the_owner_and_closes_the_run(root):
    run = only(root)
    state.claim(root, run.id, 1)
    assert not state.superseded(root, run.id, 1)
    state.kill(root, only(root))
    assert state.superseded(root, run.id, 1)
    assert (only(root).state, only(root).opens_in()) == ("killed", None)
    state.retry(root, only(root))
    assert only(root).state == "pending"


def test_a_finished_run_stays_finished(root):
    run = only(root)
    state.publish(root, run.id, {"status": "done", "losses": []})
    for act in (state.kill, state.retry):
        with pytest.raises(UserError, match="done"):
            act(root, only(root))


def test_runs_are_selected_by_unique_beginnings(root):
    runs = state.list_runs(root)
    assert state.select(root, runs, [runs[0].id[:6]]) == [runs[0]]
    with pytest.raises(UserError, match="prime-jax sweep status"):
        state.select(root, runs, ["zz"])
    with pytest.raises(UserError, match=runs[0].id):
        state.select(root, runs, [""])


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (None, "no sweep here"),
        ('{"schema": 2}', "version 2"),
        ("[]", "version None"),
        ("{", "JSON"),
    ],
)
def test_other_directories_are_refused(tmp_path, header, says):
    if header is not None:
        (tmp_path / "sweep.json").write_text(header)
    with pytest.raises(UserError, match=says):
        state.check_root(tmp_path)


def test_status_lines_and_json(root):
    run = only(root)
    state.claim(root, run.id, 1)
    state.end(root, run.id, 1, "preempted", "signal")
    state.claim(root, run.id, 2)
    steps = run.spec["config"]["steps"]
    values = {
        "step": steps // 2,
        "loss": 3.125,
        "mfu": 0.41,
        "tokens_per_second": run.spec["tokens"] / 2 / 6720,
    }
    state.heartbeat(root, run.id, 2, values)
    text = status.line(only(root))
    for part in (
        run.id,
        "1e+09",
        "arm",
        f"step {steps // 2}/{steps}",
        "3.125",
        "0.41",
        "1h5",
        "attempt 2",
        "(1 ",
    ):
        assert part in text
    assert status.counts(state.list_runs(root)) == "2 runs: 1 running, 1 pending"
    described = {d["run"]: d for d in status.as_dicts(state.list_runs(root))}[run.id]
    assert (described["status"], described["attempts"], described["heartbeat"]["loss"]) == (
        "running",
        2,
        3.125,
    )
    json.dumps(described)


def test_planning_and_reading_a_sweep_need_no_jax():
    code = (
        "import sys; from prime_jax.sweep import collect, grid, plan, pool, rules, state, status, worker;"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_runs_belong_to_the_slice_that_they_were_planned_for(tmp_path):
    small = fake_trainer.sweep(families={"arm": {}}, budgets=(1e9,))
    experiment = grid.Experiment(small.name, tuple(grid.rows(small)), "0" * 64)
    listed = plan.candidates(experiment, {})
    plan.write(tmp_path, experiment, listed[:1], "v5e-16")
    plan.write(tmp_path, experiment, listed)
    owned, free = (candidate.id for candidate in listed)
    for slice, expected in (("v5e-16", {owned, free}), ("v5e-8", {free}), ("", {owned, free})):
        assert {run.id for run in state.open_runs(tmp_path, slice)} == expected
    state.claim(tmp_path, free, 1)
    assert [run.id for run in state.open_runs(tmp_path)] == [owned]


def test_an_owner_whose_training_stands_still_is_stalled(root):
    run, now = only(root), 1000.0
    elsewhere(root, run)
    watch = state.Watch(timeout=300, stall=600, clock=lambda: now)
    for count, quiet in ((1, 1.0), (2, 599.0)):
        state.heartbeat(root, run.id, 1, {"count": count, "quiet": quiet})
        assert only(root, watch).state == "running"
    state.heartbeat(root, run.id, 1, {"count": 3, "quiet": 601.0})
    stalled = only(root, watch)
    assert (stalled.state, stalled.interruptions, stalled.opens_in()) == ("stalled", 1, 0.0)


def test_only_what_can_matter_is_read(root, monkeypatch):
    """One listing; of a finished run its spec and result, nothing twice."""
    done, running = state.list_runs(root)
    for run in (done, running):
        state.claim(root, run.id, 1)
        state.heartbeat(root, run.id, 1, {"count": 1})
    state.publish(root, done.id, {"status": "done", "losses": []})
    read = []

    def reading(folder, names):
        read.append(sorted(names))
        return real(folder, names)

    real = state.storage.read_all
    monkeypatch.setattr(state.storage, "read_all", reading)
    watch = state.Watch()
    state.list_runs(root, watch)
    state.list_runs(root, watch)
    first = [f"{done.id}.{kind}" for kind in ("result", "spec")]
    first += [f"{running.id}.{kind}" for kind in ("1.beat", "1.claim", "spec")]
    assert read == [sorted(first), [f"{running.id}.1.beat"]]
