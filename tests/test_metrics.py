"""The training log: exclusive phases, rows that survive a resume, and the optional writers."""

import json
import sys
import types
from pathlib import Path

import pytest

from prime_jax.config import LogConfig, RunConfig
from prime_jax.errors import UserError
from prime_jax.runtime.metrics import Clock, MetricsLog, Pace


def test_a_phase_inside_another_is_not_counted_twice(monkeypatch):
    times = iter([0.0, 1.0, 2.0, 5.0, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    with clock.measure("train"), clock.measure("compile"):
        pass
    assert clock.seconds == {"compile": 3.0, "train": 5.0}


def test_the_pace_between_two_rows(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    pace = Pace(clock, tokens=100, flops={"matmul": 5.0, "reference": 6.0}, peak=1000.0)
    assert pace.row(1) == {}
    now[0], clock.seconds["input"] = 8.0, 2.0
    row = pace.row(5)  # four steps in eight seconds
    assert (row["step_seconds"], row["input_seconds"], row["tokens_per_second"]) == (2.0, 0.5, 50.0)
    assert (row["mfu_matmul"], row["mfu_reference"]) == (0.25, 0.3)


def test_rows_beyond_the_restored_step_are_dropped(tmp_path):
    log = MetricsLog(RunConfig(), tmp_path, "run", resumed_at=0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # cut off by a kill
    log = MetricsLog(RunConfig(), tmp_path, "run", resumed_at=2)
    log.write({"step": 3, "loss": 2.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]


class Recorder:
    """Stands in for a SummaryWriter and for a W&B run and its config."""

    def __init__(self, *args, **named):
        self.opened, self.rows, self.closed = (args, named), [], False
        self.texts, self.metrics, self.config = {}, {}, self

    def add_scalar(self, name, value, step):
        self.rows.append((step, {name: value}))

    def add_text(self, name, text):
        self.texts[name] = json.loads(text)

    def define_metric(self, name, step_metric):
        self.metrics[name] = step_metric

    def update(self, value, allow_val_change):
        assert allow_val_change
        self.texts |= value

    def log(self, row):
        self.rows.append(row)

    def close(self):
        self.closed = True

    finish = close


@pytest.fixture
def made(monkeypatch):
    """Recorders by library, in place of both libraries."""
    found = {}

    def factory(name):
        def make(*args, **named):
            found[name] = Recorder(*args, **named)
            return found[name]

        return make

    board = types.SimpleNamespace(SummaryWriter=factory("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=factory("wandb")))
    return found


def test_writers_get_every_number_and_the_config_and_are_closed(tmp_path, monkeypatch, made):
    config = RunConfig(log=LogConfig(tensorboard=True, wandb="project"), batch_size=3)
    monkeypatch.chdir(tmp_path)
    log = MetricsLog(config, Path("."), "run7", 0)
    loss = {"estimator": "token", "kind": "nelbo", "value": 2.0, "se_mc": 0.1, "se_data": None}
    log.write({"step": 5, "loss": 1.5, "grad_norm": None})
    log.write({"step": 5, "eval": [loss]})
    log.close()
    board, wandb = made["tensorboard"], made["wandb"]
    numbers = {"eval/token": 2.0, "eval/token/se_mc": 0.1}
    assert wandb.rows == [{"step": 5, "loss": 1.5}, {"step": 5, **numbers}]
    assert board.rows == [(5, {k: v}) for row in wandb.rows for k, v in row.items()]
    about = wandb.opened[1].pop("config")
    assert about["record"] == str(tmp_path)
    assert about["batch_size"] == 3
    assert wandb.opened == ((), {"project": "project", "id": "run7", "resume": "allow"})
    assert wandb.metrics == {"*": "step"}
    assert board.texts == {"config": about, "kinds": {"eval/token": "nelbo"}}
    assert wandb.texts == {"kinds": {"eval/token": "nelbo"}}
    assert board.closed
    assert wandb.closed


def test_event_files_read_back_as_they_were_written(tmp_path):
    """The steps that a resumed run does again come in place of those of the first time."""
    reason = "tensorboard or tensorboardX is not installed: pip install 'prime_jax[tensorboard]'"
    pytest.importorskip("tensorboard.compat.proto.event_pb2", reason=reason)
    pytest.importorskip("tensorboardX", reason=reason)
    from prime_jax.scaling import readers

    for resumed, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        log = MetricsLog(RunConfig(log=LogConfig(tensorboard=True)), tmp_path, "run", resumed)
        for step in steps:
            log.write({"step": step, "loss": 5.0 + resumed - step})
        log.close()
        (file,) = (tmp_path / "tensorboard").glob("*.tfevents.*.*")
        file.rename(file.with_name(f"events.out.tfevents.{resumed}"))  # named by the second
    found = readers.read(tmp_path).runs["tensorboard"].metrics["loss"]
    assert (found.steps, found.values) == ([1, 2, 3, 4], [4.0, 4.0, 3.0, 2.0])


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_service_that_fails_takes_no_run_with_it(tmp_path, monkeypatch, where):
    def fail(*_, **__):
        raise OSError("api_key not configured\nmore")

    monkeypatch.setattr(Recorder, "log", fail)
    init = fail if where == "init" else Recorder
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    told = []
    log = MetricsLog(RunConfig(log=LogConfig(wandb="p")), tmp_path, "run", 0, told.append)
    log.write({"step": 1, "loss": 1.0})
    log.close()
    (line,) = told
    assert line.startswith("W&B: api_key not configured; the run goes on")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0


def test_a_service_without_axes_and_words_gets_the_numbers(tmp_path, monkeypatch):
    rows = []
    plain = types.SimpleNamespace(log=rows.append, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: plain))
    log = MetricsLog(RunConfig(log=LogConfig(wandb="p")), tmp_path, "run", 0)
    loss = {"estimator": "subtoken", "kind": "nelbo", "value": 2.0, "se_mc": None, "se_data": None}
    log.write({"step": 5, "eval": [loss]})
    log.close()
    assert rows == [{"step": 5, "eval/subtoken": 2.0}]


@pytest.mark.parametrize(
    ("module", "config"),
    [("tensorboardX", LogConfig(tensorboard=True)), ("wandb", LogConfig(wandb="p"))],
)
def test_a_missing_writer_says_how_to_get_it(tmp_path, monkeypatch, module, config):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"install prime_jax\["):
        MetricsLog(RunConfig(log=config), tmp_path, "run", 0)
