"""The training log: exclusive phases, rows that survive a resume, and the optional writers."""

import json
import sys
import types

import pytest

from prime_jax.config import LogConfig
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
    log = MetricsLog(LogConfig(), tmp_path, "run", resumed_at=0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # cut off by a kill
    log = MetricsLog(LogConfig(), tmp_path, "run", resumed_at=2)
    log.write({"step": 3, "loss": 2.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]


class Recorder:
    """Stands in for a SummaryWriter and for a W&B run."""

    def __init__(self, *args, **named):
        self.opened, self.rows, self.closed = (args, named), [], False

    def add_scalar(self, name, value, step):
        self.rows.append((step, {name: value}))

    def log(self, row, step):
        self.rows.append((step, row))

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


def test_writers_get_every_number_and_are_closed(tmp_path, made):
    log = MetricsLog(LogConfig(tensorboard=True, wandb="project"), tmp_path, "run7", 0)
    log.write({"step": 5, "loss": 1.5, "eval": [{"value": 2.0}], "grad_norm": None})
    log.close()
    assert made["tensorboard"].rows == [(5, {"step": 5}), (5, {"loss": 1.5})]
    assert made["wandb"].rows == [(5, {"step": 5, "loss": 1.5})]
    assert made["wandb"].opened == ((), {"project": "project", "id": "run7", "resume": "allow"})
    assert made["tensorboard"].closed
    assert made["wandb"].closed


@pytest.mark.parametrize(
    ("module", "config"),
    [("tensorboardX", LogConfig(tensorboard=True)), ("wandb", LogConfig(wandb="p"))],
)
def test_a_missing_writer_says_how_to_get_it(tmp_path, monkeypatch, module, config):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"install prime_jax\["):
        MetricsLog(config, tmp_path, "run", 0)
