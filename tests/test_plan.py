import dataclasses
import io
import json
from types import SimpleNamespace

import fake_trainer
import pytest
from rich.console import Console

from prime_jax import config as configs
from prime_jax import flops
from prime_jax.cli.console import show
from prime_jax.cli.sweep import plan_table
from prime_jax.config import RunConfig, run_id
from prime_jax.errors import UserError
from prime_jax.settings import from_dict, set_path
from prime_jax.sweep import grid, plan, state


def experiment(**changes) -> grid.Experiment:
    small = fake_trainer.sweep(**changes)
    return grid.Experiment(small.name, tuple(grid.rows(small)), "f" * 64, small.epochs_limit)


def dataset(tokens=10**9, vocab_size=64) -> SimpleNamespace:
    return SimpleNamespace(
        fingerprint="abc",
        vocab_size=vocab_size,
        seq_len=16,
        directory="data",
        train=SimpleNamespace(tokens=tokens),
    )


DATA = fake_trainer.BASE.data.path


def printed(listed, experiment, flops_per_second=None) -> str:
    out = Console(width=250, file=io.StringIO())
    show(plan_table(experiment, listed, flops_per_second), out)
    return out.file.getvalue()


def test_every_candidate_is_listed_as_ok_or_drop():
    tried = experiment(budgets=(1e3, 1e9), sizes=((2, 32, 2), (2, 32, 2), (2, 32, 5), 1.0))
    listed = plan.candidates(tried, {})
    assert len(listed) == len(tried.rows) == 2 * 2 * 4
    drops = [c.drop for c in listed if c.row.family == "arm"]
    assert drops[0].startswith("too few steps")
    assert "4 x 16 tokens" in drops[0]
    assert [bool(d) for d in drops[4:]] == [False, True, True, True]
    assert "duplicate" in drops[5]
    assert listed[8].id in drops[5]
    assert "model.heads" in drops[6]
    assert "no shape" in drops[7]
    text = printed(listed, tried)
    assert (text.count("DROP:"), text.count(" OK")) == (14, 3)


@pytest.mark.parametrize(
    ("times", "flagged"), [(1.0, False), (1.8, False), (3.0, True), (0.1, True)]
)
def test_a_stated_budget_that_is_not_spent_is_flagged(times, flagged):
    row = grid.rows(fake_trainer.sweep())[0]
    stated = dataclasses.replace(row, budget=times * row.budget)
    (found,) = plan.candidates(grid.Experiment("mine", (stated,), "f" * 64, 4.0), {})
    assert not found.drop
    assert (f"stated as {stated.budget:.3g}" in found.note) == flagged


def test_table_shows_n_d_c_and_hours():
    tried = experiment(families={"arm": {}}, budgets=(1e9,), sizes=((2, 32, 2),))
    listed = plan.candidates(tried, {})
    text = printed(listed, tried, flops_per_second=1e6)
    config = listed[0].config
    n = plan.flops.param_counts(config)["nonembedding_plus_head"]
    for value in (
        listed[0].id,
        plan.flops.human(n),
        plan.flops.human(config.tokens),
        "1e+09",
        str(config.steps),
        "0.28",
    ):
        assert value in text


def test_warmup_that_does_not_fit_is_dropped():
    listed = plan.candidates(experiment(warmup="fixed:100000"), {})
    assert all(c.drop.startswith("optim.warmup_steps = 100000: must be below") for c in listed)


def test_repeated_data_is_flagged_not_dropped(monkeypatch):
    monkeypatch.setattr(plan, "manifest", SimpleNamespace(check=lambda *_: None))
    tried = experiment()
    for tokens, flagged in ((10**9, False), (100, True)):
        listed = plan.candidates(tried, {DATA: dataset(tokens)})
        assert not any(c.drop for c in listed)
        assert [bool(c.note) for c in listed] == [flagged] * len(listed)
        assert listed[0].epochs == listed[0].config.tokens / tokens


def test_prime_of_one_subtoken_is_said_to_be_mdm():
    listed = plan.candidates(experiment(families={"prime": {"subtokens.length": 1}}), {})
    assert all(c.note == f"({configs.remark(c.config)})" for c in listed)
    assert "is family mdm" in listed[0].note


def test_data_in_a_bucket_is_refused_before_anything_runs():
    base = set_path(fake_trainer.BASE, "data.path", "gs://bucket/data")
    listed = plan.candidates(experiment(base=base), {})
    assert all(c.drop.startswith("data.path = gs://bucket/data: must be a local") for c in listed)
    with pytest.raises(UserError, match="read from a local folder"):
        plan.manifest.load("gs://bucket/data")


def test_estimators_that_cannot_be_computed_are_dropped():
    sixteen = set_path(fake_trainer.BASE, "eval.estimators", ("exact:subtoken",))
    listed = plan.candidates(experiment(base=sixteen, families={"arm": {}, "mdm": {}}), {})
    arm, mdm = listed[0], listed[-1]
    assert not arm.drop  # has one estimator only
    assert "16 tokens has 16 units" in mdm.drop


def test_fingerprint_is_filled_in_and_mismatch_dropped():
    tried = experiment()
    listed = plan.candidates(tried, {DATA: dataset()})
    assert {c.config.data.fingerprint for c in listed} == {"abc"}
    listed = plan.candidates(tried, {DATA: dataset(vocab_size=65)})
    assert all("vocab_size" in c.drop for c in listed)


def test_planning_needs_the_prepared_data_only_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no quickstart has prepared its data
    tried = experiment()
    assert plan.load_datasets(tried, required=False) == {}
    with pytest.raises(UserError, match="prepare"):
        plan.load_datasets(tried, required=True)


def test_written_specs_are_complete(tmp_path):
    ids = fake_trainer.planned(tmp_path / "runs")
    assert len(ids) == 8
    for run in state.list_runs(tmp_path / "runs"):
        spec = run.spec
        config = from_dict(RunConfig, spec["config"])
        assert run_id(config) == spec["id"] == run.id
        assert spec["tokens"] == config.tokens
        assert set(spec["flops"]) == set(flops.CONVENTIONS)
        assert set(spec["params"]) == {
            "total",
            "nonembedding",
            "nonembedding_plus_head",
            "reference",
        }
        assert spec["rules"]["lr"] == "fixed:1e-3"
    header = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    assert header["schema"] == state.SCHEMA
    assert header["plans"] == [{"experiment": "tiny", "sha256": "0" * 64}]


def files(root) -> dict:
    return {
        path: (path.stat().st_mtime_ns, path.read_text())
        for path in root.rglob("*")
        if path.is_file()
    }


def test_planning_again_changes_nothing_and_can_add(tmp_path):
    root = tmp_path / "runs"
    first = set(fake_trainer.planned(root))
    before = files(root)
    assert plan.write(root, experiment(), plan.candidates(experiment(), {})) == 0
    assert {p: v for p, v in files(root).items() if p.name != "sweep.json"} == {
        p: v for p, v in before.items() if p.name != "sweep.json"
    }
    fake_trainer.planned(root)
    second = set(fake_trainer.planned(root, budgets=(2e9, 4e9)))
    assert {run.id for run in state.list_runs(root)} == first | second
    assert len(first & second) == 4


def test_foreign_directories_are_refused(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a sweep"):
        fake_trainer.planned(other)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "sweep.json").write_text('{"schema": 99}')
    with pytest.raises(UserError, match="version 99"):
        fake_trainer.planned(old)


def test_an_unwritable_root_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        fake_trainer.planned(tmp_path / "file" / "runs")


def test_a_plan_without_any_run_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="too few steps"):
        fake_trainer.planned(tmp_path / "runs", budgets=(1.0,))
    assert not (tmp_path / "runs").exists()


def test_extending_by_json_rows(tmp_path):
    """What a later design step emits joins the sweep that is there."""
    root = tmp_path / "runs"
    ids = fake_trainer.planned(root)
    rows = [dataclasses.asdict(row) | {"seed": 5} for row in grid.rows(fake_trainer.sweep())[:2]]
    path = tmp_path / "next.json"
    path.write_text(json.dumps(rows))
    more = grid.load_experiment(path)
    assert plan.write(root, more, plan.candidates(more, {})) == 2
    assert len(state.list_runs(root)) == len(ids) + 2


def test_a_part_of_the_data_is_checked_and_counted():
    listed = plan.candidates(experiment(epochs=(4,)), {DATA: dataset()})
    assert [round(c.epochs, 1) for c in listed] == [4.0] * len(listed)
    assert not any(c.note for c in listed)
    listed = plan.candidates(experiment(epochs=(1,)), {DATA: dataset(tokens=64)})
    assert all("but data has 64 tokens to train on" in c.drop for c in listed)
