"""What people see of a sweep that runs."""

import json

import fake_trainer
import pytest

from prime_jax.cli import main
from prime_jax.hardware.prices import Prices
from prime_jax.sweep import grid, plan, state, status

PRICES = Prices("2026-11-01", "USD", {"v5e": 2.0})


@pytest.fixture
def root(tmp_path):
    """Four runs for v5e-16: one done, one half-way, one failed, one pending."""
    small = fake_trainer.sweep(families={"arm": {}})
    experiment = grid.Experiment(small.name, tuple(grid.rows(small)), "0" * 64)
    plan.write(tmp_path, experiment, plan.candidates(experiment, {}), "v5e-16")
    done, half, failed, _ = state.list_runs(tmp_path)
    for run in (done, half, failed):
        state.claim(tmp_path, run.id, 1)
    steps, tokens = half.spec["config"]["steps"], half.spec["tokens"]
    heartbeat = {"step": steps // 2, "loss": 3.125, "mfu": 0.41, "tokens_per_second": tokens / 7200}
    state.heartbeat(tmp_path, half.id, 1, heartbeat | {"seconds": 3600.0})
    state.end(tmp_path, failed.id, 1, "failed", "boom", tail="Traceback\nValueError: boom")
    result = {"status": "done", "losses": [], "machine_seconds": 1800.0, "seconds": {"total": 9.0}}
    state.publish(tmp_path, done.id, result)
    return tmp_path


def test_totals_count_work_time_and_money(root):
    runs = state.list_runs(root)
    _, half, _, _ = runs
    flops = [run.spec["flops"]["matmul"] for run in runs]
    part = (half.spec["config"]["steps"] // 2) / half.spec["config"]["steps"]
    now = status.totals(runs, PRICES)
    assert now.fraction == pytest.approx((flops[0] + part * flops[1]) / sum(flops))
    assert now.speed == pytest.approx(flops[1] / 7200)
    rest = (1 - part) * flops[1] + flops[2] + flops[3]
    assert now.seconds == pytest.approx(rest / now.speed)
    assert now.cost == pytest.approx(2.0 * 16 * (0.5 + 1.0))
    assert status.totals(runs).cost is None
    text = status.summary(runs, PRICES)
    for part in ("1 done", "1 running", "48.00 USD", "2026-11-01", "ETA"):
        assert part in text


def test_the_table_shows_what_runs_and_what_is_in_trouble(root):
    runs = state.list_runs(root)
    text = str(status.table(runs))
    done, half, failed, pending = (run.id for run in runs)
    assert half in text
    assert failed in text
    assert done not in text
    assert pending not in text
    for part in ("v5e-16", "3.125", "0.41", "1h0"):
        assert part in text


def test_watching_ends_with_the_sweep_and_shows_failures_at_once(root, capsys):
    for run in state.list_runs(root):
        if run.state in ("running", "pending"):
            state.kill(root, run)
    run = next(run for run in state.list_runs(root) if run.state == "failed")
    for k in (2, 3):
        state.claim(root, run.id, k)
        state.end(root, run.id, k, "failed", "boom", tail="Traceback\nValueError: boom")
    assert main(["sweep", "status", str(root), "--watch"]) == 0
    assert "ValueError: boom" in capsys.readouterr().out


def test_status_as_json_and_with_prices(root, tmp_path, capsys):
    prices = tmp_path / "prices.toml"
    prices.write_text('date = "2026-11-01"\ncurrency = "USD"\n[per_chip_hour]\nv5e = 2.0\n')
    assert main(["sweep", "status", str(root), "--prices", str(prices)]) == 0
    text = capsys.readouterr().out
    assert "48.00 USD" in text
    assert "ValueError: boom" in text
    assert main(["sweep", "status", str(root), "--json"]) == 0
    states = {entry["status"] for entry in json.loads(capsys.readouterr().out)}
    assert states == {"done", "running", "failed", "pending"}


def test_a_report_is_asked_for_as_live(root, monkeypatch, capsys):
    from prime_jax.cli import fit as commands

    asked = []
    monkeypatch.setattr(commands, "_fit", lambda args, note: asked.append(note) or 0)
    assert main(["sweep", "report", str(root)]) == 2
    assert "1 of 4 runs" in capsys.readouterr().err
    assert main(["sweep", "report", str(root), "--live"]) == 0
    assert asked == ["live: 1 of 4 runs"]


@pytest.mark.slow
def test_a_live_report_says_of_how_many_runs(tmp_path):
    from prime_jax.sweep import worker

    ids = fake_trainer.planned(
        tmp_path,
        families={"arm": {}},
        budgets=(1e9, 2e9, 4e9),
        sizes=[(n, 32, 2) for n in (2, 3, 4)],
    )

    def act(config, call, heartbeat):
        if call == len(ids):
            raise fake_trainer.Trainer.Preempted

    trainer = fake_trainer.Trainer(act)
    trainer_result = fake_trainer.result

    def graded(config):
        out = trainer_result(config)
        out["losses"][0]["value"] = 2.0 + 1e3 / config.tokens**0.5 + 0.1 / config.model.layers
        return out

    fake_trainer.result = graded
    try:
        worker.work(tmp_path, trainer=trainer)
    finally:
        fake_trainer.result = trainer_result
    out = tmp_path / "live"
    code = main(
        ["sweep", "report", str(tmp_path), "--live", "--out", str(out), "--bootstrap", "100"]
    )
    assert code in (0, 3)
    assert f"live: {len(ids) - 1} of {len(ids)} runs" in (out / "report.html").read_text()
