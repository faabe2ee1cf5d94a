"""Measured choices of kernels: made, kept, and held on to by runs that have begun."""

import dataclasses
import json

import jax
import pytest

from prime_jax import cli, tuned
from prime_jax.config import DataConfig, ModelConfig, RunConfig, SubtokenConfig
from prime_jax.errors import UserError
from prime_jax.kernels import selection, tune
from prime_jax.kernels.selection import Choices, Measured, Row
from prime_jax.runtime.records import read_json
from prime_jax.train import train

TINY = RunConfig(
    family="prime",
    batch_size=4,
    model=ModelConfig(vocab_size=16, layers=1, width=16, heads=2, kv_heads=1),
    subtokens=SubtokenConfig(length=4),
    data=DataConfig(seq_len=32, segment_ids=True),
)
SIDES = {("cpu", "attention"): (("scan", ()), ("pallas", ())), ("cpu", "head"): (("xla", (64,)),)}


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(tune, "TURN_SECONDS", 0.0)


@pytest.mark.slow
def test_every_kernel_is_compared_and_timed():
    """The interpreted kernels among them: right, and far too slow to be chosen."""
    told = []
    choices = tune.tune([TINY, TINY], rounds=1, progress=told.append, candidates=SIDES)
    assert [row.kernel for row in choices.rows] == list(selection.KERNELS)
    for row in choices.rows:
        assert all(m.milliseconds > 0 and m.error < 1e-4 for m in row.measured)
    attention = choices.rows[1]
    assert {m.implementation for m in attention.measured} == {"scan", "xla", "pallas"}
    assert attention.implementation != "pallas"
    assert any("off by" in text for text in told)


def test_wrong_numbers_and_failures_are_recorded_and_never_chosen(monkeypatch):
    real = tune.attention

    def crooked(q, k, v, *, implementation, **rest):
        if implementation == "xla":
            return real(q, k, v, implementation="xla", **rest)
        if implementation == "scan":
            return 1.01 * real(q, k, v, implementation="scan", **rest)
        raise RuntimeError("Mosaic failed to compile TPU kernel: no layout")

    monkeypatch.setattr(tune, "attention", crooked)
    problem = tune.attention_problem(TINY, 64)
    sides = [("scan", ()), ("xla", ()), ("pallas", ())]
    measured = tune.measure(problem, sides, "float32", rounds=1)
    problems = {m.implementation: m.problem for m in measured}
    assert problems["xla"] == ""
    assert problems["scan"].startswith("off by 0.0")
    assert "no layout" in problems["pallas"]
    shape = selection.shape_of("attention", TINY)
    row = tune.chosen("attention", shape, "scan", measured)
    assert row.implementation == "xla"
    assert "no right numbers of scan" in row.why
    choices = Choices("cpu", "", (row,))
    other = dataclasses.replace(TINY, data=DataConfig(seq_len=128))
    assert choices.choose("attention", other, "cpu")[:2] == ("xla", ())
    assert choices.wrong("attention").keys() == {"scan"}


@pytest.mark.parametrize(("times", "best"), [((1.0, 0.99), "scan"), ((1.0, 0.5), "xla")])
def test_only_a_clear_win_changes_the_default(times, best):
    measured = [Measured(n, (), t, 0.0) for n, t in zip(("scan", "xla"), times, strict=True)]
    assert tune.chosen("attention", {}, "scan", measured).implementation == best


@pytest.mark.slow
def test_sides_that_are_one_program_are_timed_once():
    problem = tune.head_problem(TINY, 32)
    measured = tune.measure(problem, [("xla", ()), ("xla", (64,)), ("xla", (8,))], "float32", 1)
    assert [m.blocks for m in measured] == [(), (8,)]  # 32 rows are one chunk of 64


def forced(config: RunConfig, implementation: str) -> Choices:
    """A table that prefers one implementation of attention, for a run on this machine."""
    row = Row("attention", selection.shape_of("attention", config), implementation, (), "measured")
    return Choices(jax.devices()[0].device_kind, "", (row,))


@pytest.mark.slow
def test_a_run_keeps_the_kernels_that_it_began_with(quick, tmp_path):
    """Told to stop and continued under another table, by the same attempt and by another."""
    silent = {"log": lambda _: None}
    optim = dataclasses.replace(quick.optim, warmup_steps=1)
    config = dataclasses.replace(quick, steps=3, optim=optim)
    stop = {"heartbeat": lambda now: False}
    from prime_jax import train as module

    before, module.HEARTBEAT_SECONDS = module.HEARTBEAT_SECONDS, 0.0
    try:
        with pytest.raises(module.Stopped):
            train(config, tmp_path / "1", choices=forced(config, "xla"), **stop, **silent)
    finally:
        module.HEARTBEAT_SECONDS = before
    began = read_json(tmp_path / "1" / "kernels.json")
    assert began["attention"] == {"implementation": "xla", "blocks": []}
    later = {"choices": forced(config, "scan"), **silent}
    result = train(config, tmp_path / "2", earlier=[tmp_path / "1"], **later)
    assert result["kernels"] == began == read_json(tmp_path / "2" / "kernels.json")
    assert read_json(tmp_path / "2" / "config.json")["kernels"]["attention"] == "auto"
    fresh = train(config, tmp_path / "3", **later)
    assert fresh["kernels"]["attention"]["implementation"] == "scan"


def test_tables_of_a_sweep_go_before_those_of_a_user(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.CACHE, str(tmp_path / "cache"))
    mine, sweeps = forced(TINY, "xla"), forced(TINY, "scan")
    kind, root = mine.device_kind, tmp_path / "sweep"
    assert tuned.load(kind, root) == selection.NOTHING
    assert tuned.save(mine) == tmp_path / "cache" / "kernels" / "cpu.json"
    assert tuned.load(kind, root) == tuned.load(kind) == mine
    assert tuned.save(sweeps, root).parent == root / "kernels"
    tuned.save(mine, root, replace=False)
    assert tuned.load(kind, root) == sweeps
    (root / "kernels" / "cpu.json").write_text("{")
    with pytest.raises(UserError, match=r"cpu\.json"):
        tuned.load(kind, root)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(tuned.CACHE, str(tmp_path))
    monkeypatch.setattr(tune, "CANDIDATES", {})
    monkeypatch.setattr("prime_jax.cli.kernels._runs", lambda *_: [TINY])
    assert cli.main(["kernels", "tune", "--rounds", "1"]) == 0
    assert "3 choices in" in capsys.readouterr().out
    value = json.loads((tmp_path / "kernels" / "cpu.json").read_text())
    assert {row["kernel"] for row in value["rows"]} == set(selection.KERNELS)
    from prime_jax.cli import doctor

    rows = doctor.kernel_rows()
    assert sum("measured" in why and "at width" in why for _, _, why in rows) == 2
