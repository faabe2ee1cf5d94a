"""Runs of one trajectory train their common steps once, and end as if each had run alone."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time

import fake_store
import fake_trainer
import jax
import numpy as np
import process_groups
import pytest

from prime_jax import train as training
from prime_jax.cli import main
from prime_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    run_id,
)
from prime_jax.evaluate import trained
from prime_jax.runtime import checkpoint, lineage, storage
from prime_jax.runtime.records import read_json
from prime_jax.settings import from_dict
from prime_jax.sweep import grid, plan, prefixes, state, worker
from prime_jax.train import Stopped, train

SILENT = lambda _: None  # noqa: E731
STEPS = (12, 20, 36)  # at a constant rate through steps 9, 15 and 27
ENDS = (9, 15, 27)


def config(data, steps: int = STEPS[0], width: int = 16, **more) -> RunConfig:
    wsd = OptimConfig(schedule="wsd", cooldown_fraction=0.25, peak_lr=3e-3, warmup_steps=3, ema=0.9)
    return RunConfig(
        family="arm",
        steps=steps,
        batch_size=8,
        model=ModelConfig(vocab_size=16, layers=1, width=width, heads=1),
        data=DataConfig(path=str(data), seq_len=16),
        optim=wsd,
        eval=EvalConfig(examples=16, replicates=1, batch_size=16, estimators=(), every=6),
        mesh=MeshConfig(replica=1, data=1, model=1),
        checkpoint=CheckpointConfig(every=4, keep=1),
        log=LogConfig(every=1),
        **more,
    )


def ladders(
    data, steps=STEPS, widths=(16,), **changes
) -> tuple[grid.Experiment, list[plan.Candidate]]:
    """A ladder of runs for each width, shortest first."""
    made = grid.Sweep(
        name="ladder",
        base=dataclasses.replace(config(data), **changes),
        families={"arm": {}},
        budgets=(1e9,),
        sizes=[(1, width, 1) for width in widths],
        batch="fixed:8",
        lr="fixed:3e-3",
        warmup="fixed:3",
    )
    rows = [dataclasses.replace(row, steps=n) for row in grid.rows(made) for n in steps]
    experiment = grid.Experiment("ladder", tuple(rows), "0" * 64)
    return experiment, plan.candidates(experiment, plan.load_datasets(experiment, required=True))


def planned(root, data, steps=STEPS, widths=(16,), share=True, **changes) -> list[str]:
    """Write `ladders` to a sweep; their ids."""
    experiment, listed = ladders(data, steps, widths, **changes)
    plan.write(root, experiment, listed, share_prefixes=share)
    return [candidate.id for candidate in listed]


def work(root, trainer=training) -> int:
    return worker.work(root, trainer=trainer, heartbeat_seconds=0.1, backoff=0.0)


def rows_of(*attempts) -> list[dict]:
    """What a run's log says of its training and evaluations, without times and names of runs."""
    kept, out = ("step", "loss", "grad_norm", "lr", "eval"), {}
    for attempt in attempts:
        for line in storage.read(attempt / "metrics.jsonl").decode().splitlines():
            row = json.loads(line)
            out[row["step"], "eval" in row] = {k: row[k] for k in kept if k in row}
    return [out[key] for key in sorted(out)]


def params_of(*attempts) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(trained.load(*attempts, log=SILENT).params)]


def same_to_the_bit(one, *other) -> None:
    """Logs, evaluations and weights of a run alone and of one in a sweep, whose attempts these
    are, newest first."""
    assert rows_of(one) == rows_of(*reversed(other))
    for a, b in zip(params_of(one), params_of(*other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def alone(markov_data, tmp_path_factory):
    """Directories of the runs, by their steps, each trained from its start."""
    made = {}
    for steps in STEPS:
        made[steps] = tmp_path_factory.mktemp("alone") / str(steps)
        train(config(markov_data, steps), made[steps], log=SILENT)
    return made


@pytest.mark.parametrize(
    ("where", "rungs"), [("folder", 3), pytest.param("gs", 2, marks=pytest.mark.slow)]
)
def test_the_runs_of_a_ladder_end_as_if_each_had_run_alone(
    markov_data, alone, tmp_path, where, rungs
):
    with contextlib.ExitStack() as stack:
        root = tmp_path / "sweep"
        if where != "folder":
            root = storage.path(stack.enter_context(fake_store.bucket(where)).url)
        ids = planned(root, markov_data, STEPS[:rungs])
        assert work(root) == 0
        runs = {run.id: run for run in state.list_runs(root)}
        starts = (0, *ENDS[:-1])
        for k, (run, steps, start) in enumerate(zip(ids, STEPS, starts, strict=False)):
            result, directory = runs[run].result, root / "runs" / run / "1"
            same_to_the_bit(alone[steps], directory)
            assert result["losses"] == read_json(alone[steps] / "result.json")["losses"]
            expected = {"run": ids[k - 1], "steps": start} if k else None
            assert (result["shared_prefix"], result["first_step"]) == (expected, start)
            for name, whole in result["flops"].items():
                assert result["flops_spent"][name] == pytest.approx(whole * (1 - start / steps))
            log = storage.read(directory / "metrics.jsonl").decode().splitlines()
            marks = {row["step"]: row.get("run") for row in map(json.loads, log)}
            owners = np.repeat(ids, np.diff((0, *ENDS[:rungs])))[:start].tolist()
            assert list(marks.values()) == owners + [None] * (steps - start)
            # The branch point lay outside `keep` only as long as somebody might have needed it.
            assert checkpoint.steps(directory / "checkpoints") == [steps]


@pytest.fixture(scope="module")
def lower(markov_data, tmp_path_factory):
    """A run of 12 steps that keeps its branch point, step 9, and step 12."""
    out = tmp_path_factory.mktemp("lower") / "1"
    train(config(markov_data), out, pinned=ENDS[0], log=SILENT)
    assert checkpoint.steps(out / "checkpoints") == [9, 12]
    return out


def first_step(data, out, donor, monkeypatch, said=None) -> int:
    """Where a run of 20 steps begins that may continue from those in `donor`."""
    monkeypatch.setattr(training, "HEARTBEAT_SECONDS", 0.0)
    begun = []

    def heartbeat(now):
        begun.append(now["step"])
        return False

    log = SILENT if said is None else said.append
    with pytest.raises(Stopped):
        train(config(data, 20), out, donors=[[donor]], heartbeat=heartbeat, log=log)
    return begun[0] - 1


def edited(directory, change) -> None:
    """Change every seal of a run."""
    for step in checkpoint.steps(directory / "checkpoints"):
        path = directory / "checkpoints" / f"{step:09d}.json"
        seal = json.loads(path.read_text())
        change(seal)
        path.write_text(json.dumps(seal))


def test_a_run_continues_at_the_branch_point_and_where_that_is_refused_starts_anew(
    markov_data, lower, tmp_path, monkeypatch
):
    def begins(name, change=lambda seal: None, said=None):
        donor = shutil.copytree(lower, tmp_path / name / "1")
        edited(donor, change)
        return first_step(markov_data, tmp_path / f"{name}-upper", donor, monkeypatch, said)

    assert begins("as it is") == 9
    assert begins("older version", lambda seal: seal.pop("lineage")) == 0
    other = lambda seal: seal["lineage"].update(trajectory="0123456789")  # noqa: E731
    assert begins("another trajectory", other) == 0
    said: list[str] = []
    newer = lambda seal: seal["lineage"]["made"]["versions"].update(jax="9.9")  # noqa: E731
    assert begins("another JAX", newer, said) == 0
    assert any("on another versions" in line for line in said)
    # Without its branch point only states of its cool-down are left.
    cooling = shutil.copytree(lower, tmp_path / "cooling" / "1")
    (cooling / "checkpoints" / f"{ENDS[0]:09d}.json").unlink()
    assert first_step(markov_data, tmp_path / "cooling-upper", cooling, monkeypatch) == 0
    monkeypatch.setattr(lineage, "_cores", lambda: 1000)  # XLA would split its sums otherwise
    assert begins("other cores", said=said) == 0
    assert any("on another device" in line for line in said)


@pytest.mark.parametrize("when", ["before its seal is read", "while it is read"])
def test_a_checkpoint_that_its_run_prunes_meanwhile_is_not_used(
    markov_data, lower, tmp_path, monkeypatch, when
):
    """Neither what is left of it, nor is the run given up: another one is looked for."""
    donor = shutil.copytree(lower, tmp_path / "lower" / "1")
    inside = when == "while it is read"
    name = "load" if inside else "_newest"
    usual = getattr(checkpoint, name)

    def interrupted(*args):
        found = usual(*args)  # as if it had just been read, in whatever state it was
        seal = donor / "checkpoints" / f"{ENDS[0]:09d}.json"
        seal.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(checkpoint, name, interrupted)
    assert first_step(markov_data, tmp_path / "upper", donor, monkeypatch) == 0


def test_steps_of_two_kinds_of_machine_are_for_nobody_else(markov_data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "HEARTBEAT_SECONDS", 0.0)
    first, second = tmp_path / "1", tmp_path / "2"
    with pytest.raises(Stopped):
        train(config(markov_data), first, heartbeat=lambda now: now["step"] < 5, log=SILENT)
    with monkeypatch.context() as patch:
        patch.setattr(lineage, "_cores", lambda: 1000)
        train(config(markov_data), second, earlier=[first], pinned=ENDS[0], log=SILENT)
        seal = read_json(second / "checkpoints" / f"{ENDS[0]:09d}.json")
        assert seal["lineage"]["made"] is None
        assert first_step(markov_data, tmp_path / "upper", second, monkeypatch) == 0


def test_a_run_that_branched_off_and_was_interrupted_knows_it(
    markov_data, alone, lower, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "HEARTBEAT_SECONDS", 0.0)
    longer, first, second = config(markov_data, 20), tmp_path / "1", tmp_path / "2"
    with pytest.raises(Stopped):
        train(longer, first, donors=[[lower]], heartbeat=lambda now: now["step"] < 13, log=SILENT)
    result = train(longer, second, earlier=[first], donors=[[lower]], log=SILENT)
    assert result["first_step"] == 13
    assert result["shared_prefix"] == {"run": run_id_of(lower), "steps": 9}
    spent = result["flops_spent"]["matmul"] / result["flops"]["matmul"]
    assert spent == pytest.approx(11 / 20)
    same_to_the_bit(alone[20], second, first)


def run_id_of(directory) -> str:
    return run_id(from_dict(RunConfig, read_json(directory / "config.json")))


def test_evaluations_on_the_way_are_copied_from_runs_that_evaluate_alike(
    markov_data, lower, tmp_path
):
    other = dataclasses.replace(config(markov_data, 20), eval=EvalConfig(examples=16, replicates=1, batch_size=16, estimators=(), every=9))  # fmt: skip
    out = tmp_path / "upper"
    assert train(other, out, donors=[[lower]], log=SILENT)["first_step"] == 9
    found = rows_of(out)
    assert [row["step"] for row in found if "eval" in row] == [9, 18, 20]  # 9: its own
    assert [row["step"] for row in found if "loss" in row] == list(range(1, 21))


def test_who_finds_a_branch_point_in_a_bucket_finds_the_log_of_its_steps(markov_data, monkeypatch):
    """A log there is copied seldom, and the run may train on for long."""
    monkeypatch.setattr(training, "HEARTBEAT_SECONDS", 0.0)
    logged = []
    with fake_store.bucket("gs") as made:
        out = storage.path(made.url) / "1"

        def heartbeat(now):
            if now["step"] <= ENDS[0]:
                return True
            while not checkpoint.is_sealed(out / "checkpoints", ENDS[0]):
                time.sleep(0.01)
            logged.extend(row["step"] for row in rows_of(out) if "loss" in row)
            return False

        with pytest.raises(Stopped):
            train(config(markov_data), out, pinned=ENDS[0], heartbeat=heartbeat, log=SILENT)
    assert logged == list(range(1, ENDS[0] + 1))


# --- a sweep whose lower run has not left what it should


def test_a_damaged_branch_point_costs_time_only(markov_data, alone, tmp_path):
    lower, upper = planned(tmp_path, markov_data, STEPS[:2])
    state.kill(tmp_path, find(tmp_path, upper))
    assert work(tmp_path) == 0
    saves = tmp_path / "runs" / lower / "1" / "checkpoints"
    assert checkpoint.steps(saves) == [9, 12]  # it may yet be opened again
    largest = max((saves / "000000009").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    state.retry(tmp_path, find(tmp_path, upper))
    assert work(tmp_path) == 0
    result = find(tmp_path, upper).result
    assert (result["shared_prefix"], result["first_step"]) == (None, 0)
    assert result["flops_spent"] == result["flops"]
    (attempt,) = (tmp_path / "runs" / upper).glob("*")
    same_to_the_bit(alone[20], attempt)


def find(root, run: str) -> state.Run:
    return state.select(root, state.list_runs(root), [run])[0]


def failing_on(bad: str):
    def act(config, call, heartbeat):
        if run_id(config) == bad:
            raise ValueError("lost the plot")

    return act


def test_the_shortest_run_first_and_the_next_knows_where_to_look(markov_data, tmp_path):
    one, two, three = planned(tmp_path, markov_data)
    trainer = fake_trainer.Trainer()
    assert work(tmp_path, trainer) == 0
    assert [run for run, *_ in trainer.calls] == [one, two, three]
    assert trainer.shared == [
        ([], 9),
        ([[f"{one}/1"]], 15),
        ([[f"{one}/1"], [f"{two}/1"]], 0),
    ]


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_a_lower_run_that_is_given_up_keeps_no_other_waiting(markov_data, tmp_path, how):
    one, two, three = planned(tmp_path, markov_data)
    if how == "is killed":
        state.kill(tmp_path, find(tmp_path, one))
    trainer = fake_trainer.Trainer(failing_on(one))
    assert work(tmp_path, trainer) == (1 if how == "fails" else 0)
    order = [run for run, *_ in trainer.calls]
    assert order == [one] * (state.FAILURES if how == "fails" else 0) + [two, three]
    donors, pinned = trainer.shared[-2]
    assert pinned == 15
    assert {d.partition("/")[0] for run in donors for d in run} == {one}


def test_a_run_waits_behind_other_work_while_the_lower_one_trains(markov_data, tmp_path):
    one, two, *_, other = planned(tmp_path, markov_data, STEPS[:2], widths=(16, 24))[:3]
    for run in state.list_runs(tmp_path):
        if run.id not in (one, two, other):
            state.kill(tmp_path, run)
    assert state.claim(tmp_path, one, 1)  # by this process, which is alive

    def act(config, call, heartbeat):
        if call == 1:  # meanwhile the lower run comes to its end
            state.publish(tmp_path, one, fake_trainer.result(config))

    trainer = fake_trainer.Trainer(act)
    assert work(tmp_path, trainer) == 0
    assert [run for run, *_ in trainer.calls] == [other, two]
    assert trainer.shared[1] == ([[f"{one}/1"]], 0)


def test_whom_a_run_waits_for(markov_data, tmp_path):
    one, two, three = planned(tmp_path, markov_data)
    assert state.claim(tmp_path, one, 1)

    def waits(run: str, ready=(two, three)) -> str | None:
        found = {run.id: run for run in state.list_runs(tmp_path)}
        ladders = prefixes.Ladders(tmp_path, list(found.values()))
        lower = ladders.waits_for(found[run], set(ready), 1.0)
        return lower and lower.id

    assert (waits(two), waits(three)) == (one, two)
    state.kill(tmp_path, find(tmp_path, two))
    assert waits(three, [three]) == one
    saves = tmp_path / "runs" / one / "1" / "checkpoints"
    saves.mkdir(parents=True)
    (saves / "000000009.json").write_text("{}")  # it cools down: its branch point is there
    assert waits(three, [three]) is None
    shutil.rmtree(saves)
    state.end(tmp_path, one, 1, "failed", "lost the plot")
    assert waits(three, [three]) == one  # it will be tried again
    state.end(tmp_path, one, 2, "killed", "by hand")
    assert state.claim(tmp_path, one, 2)
    assert waits(three, [three]) is None


def test_a_run_whose_data_is_not_here_keeps_no_other_waiting(markov_data, tmp_path):
    one, two, _ = planned(tmp_path, markov_data)
    found = {run.id: run for run in state.list_runs(tmp_path)}
    ladders = prefixes.Ladders(tmp_path, list(found.values()))
    assert ladders.waits_for(found[two], {two}, 1.0) is None
    assert ladders.waits_for(found[two], {one, two}, 1.0).id == one


def test_runs_for_other_slices_or_of_an_older_plan_share_nothing(markov_data, tmp_path):
    ids = planned(tmp_path, markov_data, share=False)
    listed = state.list_runs(tmp_path)
    assert {run.branch_point for run in listed} == {0}
    assert len({run.spec["trajectory"] for run in listed}) == 1  # which the table has all the same
    again = prefixes.plan(ladders(markov_data)[1])
    assert again.planned_alone(listed) == 3
    for run in listed:
        path = tmp_path / "state" / f"{run.id}.spec"
        spec = json.loads(path.read_text())
        older = {k: v for k, v in spec.items() if k not in ("trajectory", "branch_point")}
        path.write_text(json.dumps(older if run.id != ids[-1] else spec | {"branch_point": 27, "slice": "v5e-8"}))  # fmt: skip
    trainer = fake_trainer.Trainer()
    assert work(tmp_path, trainer) == 0
    assert [run for run, *_ in trainer.calls] == ids[::-1]  # largest first, as ever
    assert trainer.shared == [([], 0)] * 3


# --- the plan

LADDER = """
from prime_jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from prime_jax.sweep.grid import Sweep

def falling(cell):
    return 1.0 / cell.steps

def sweep():
    base = RunConfig(
        model=ModelConfig(vocab_size=16),
        data=DataConfig(path="nowhere", seq_len=16),
        optim=OptimConfig(schedule="SCHEDULE", warmup_steps=10),
    )
    rules = dict(batch="fixed:8", lr="fixed:3e-3", warmup="fixed:10", sizes=[(1, 16, 1), (1, 32, 1)])
    return Sweep("ladder", base, {"arm": {}}, budgets=[1e11, 1e9, 1e10], **(rules | RULES))
"""


def written(tmp_path, rules: str = "{}", schedule: str = "wsd"):
    path = tmp_path / "ladder.py"
    path.write_text(LADDER.replace("RULES", rules).replace("SCHEDULE", schedule))
    return path


def test_a_plan_shows_who_continues_whom_and_what_that_saves(tmp_path, capsys):
    path = written(tmp_path)
    shared = prefixes.plan(plan.candidates(grid.load_experiment(path), {}))
    found = [(one.row.width, one.row.budget) for one in shared.listed]
    assert found == [(w, c) for w in (16, 32) for c in (1e9, 1e10, 1e11)]
    steps = [one.config.steps for one in shared.listed]
    taken = [shared.branches.get(one.id, 0) for one in shared.listed]
    below = [0, *(0.8 * n for n in steps[:2]), 0, *(0.8 * n for n in steps[3:5])]
    assert taken == pytest.approx(below, abs=1)
    saved = sum(t * one.row.budget / n for t, n, one in zip(taken, steps, shared.listed, strict=True))  # fmt: skip
    assert main(["sweep", "plan", str(path), "--share-prefixes"]) == 0
    said = capsys.readouterr().out
    assert f"4 runs continue from another, which saves {saved / 2.22e11:.0%} of the FLOPs" in said
    assert f"(continues {shared.listed[0].id} at step {taken[1]})" in said


@pytest.mark.parametrize(
    ("rules", "schedule", "words"),
    [
        ('{"lr": falling}', "wsd", ["optim.peak_lr differs", "(rule lr = falling)"]),
        ('{"batch": "deepseek"}', "wsd", ["batch_size differs", "(rule batch = deepseek)"]),
        ('{"warmup": lambda cell: cell.steps // 9}', "wsd", ["optim.warmup_steps differs"]),
        ("{}", "cosine", ["optim.schedule = cosine has no constant phase"]),
        ('{"sizes": {1e9: [(1, 16, 1)], 1e10: [(1, 32, 1)], 1e11: [(1, 48, 1)]}}', "wsd",
         ["a shape has one budget only", "(rule sizes = given)"]),
    ],
)  # fmt: skip
def test_where_nothing_can_be_shared_one_line_says_which_rule_prevents_it(
    tmp_path, capsys, rules, schedule, words
):
    path = written(tmp_path, rules, schedule)
    assert main(["sweep", "plan", str(path), "--share-prefixes"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in ["--share-prefixes: no two", *words])


# --- workers that are killed at random


@pytest.mark.slow
def test_workers_killed_at_random_change_no_bit(markov_data, tmp_path):
    steps, widths, rng = (60, 120, 240), (16, 32), random.Random(7)
    root, told = tmp_path / "sweep", tmp_path / "workers.txt"
    ids = planned(root, markov_data, steps, widths)
    command = [sys.executable, "-m", "prime_jax", "sweep", "work", str(root)]
    kills = 0
    with told.open("a") as log:
        start = lambda: subprocess.Popen(command, env=os.environ, stdout=log, stderr=log)  # noqa: E731
        team = [start(), start()]
        while any(process.poll() is None for process in team):
            time.sleep(rng.uniform(1, 6))
            victim = rng.randrange(2)
            if kills < 12 and team[victim].poll() is None:
                team[victim].kill()
                team[victim].wait()
                team[victim], kills = start(), kills + 1
    assert [process.returncode for process in team] == [0, 0], told.read_text()[-3000:]
    runs = {run.id: run for run in state.list_runs(root)}
    cells = [(width, n) for width in widths for n in steps]
    shared = 0
    for run, (width, n) in zip(ids, cells, strict=True):
        single = tmp_path / "alone" / run
        train(config(markov_data, n, width), single, log=SILENT)
        attempts = [root / "runs" / run / str(a.k) for a in reversed(runs[run].attempts)]
        same_to_the_bit(single, *(a for a in attempts if (a / "metrics.jsonl").exists()))
        assert runs[run].result["losses"] == read_json(single / "result.json")["losses"]
        shared += runs[run].result["shared_prefix"] is not None
    assert kills
    assert shared == len(widths) * (len(steps) - 1)


@pytest.mark.slow
def test_a_process_group_branches_off_together(markov_data, tmp_path):
    """And its longer run ends as in a sweep whose runs share nothing."""
    outcomes = []
    for share in (True, False):
        root = tmp_path / f"share {share}"
        _, upper = planned(root, markov_data, STEPS[:2], share=share, mesh=MeshConfig(replica=1))
        words = ["-m", "prime_jax", "sweep", "work", str(root)]
        codes, texts = process_groups.ended(process_groups.start(words, 2, devices=4))
        assert codes == [0, 0], texts
        result = find(root, upper).result
        outcomes.append((rows_of(root / "runs" / upper / "1"), result["losses"]))
        assert result["first_step"] == (ENDS[0] if share else 0)
    assert outcomes[0] == outcomes[1]
