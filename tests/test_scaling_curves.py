import json

import fake_trainer
import numpy as np
import pytest
from fake_trainer import Trainer
from scaling_cases import LAW, write_csv

from prime_jax.errors import UserError
from prime_jax.scaling import approach1, logs, readers
from prime_jax.scaling.points import select
from prime_jax.scaling.settings import Choice
from prime_jax.sweep import worker

STEPS, PER_STEP = np.arange(0, 101, 5), 1e7
SIZES = {"a": 1e8, "b": 2e8, "c": 4e8}


def loss_at(run, step):
    return float(LAW.loss(SIZES[run], max(step, 1) * PER_STEP))


def long_rows(**extra):
    return [
        {"run": run, "step": int(step), "loss": loss_at(run, step)} | extra
        for run in SIZES
        for step in STEPS
    ]


def run_rows(**extra):
    return [
        {"run": run, "family": "x", "kind": "nelbo", "params": params, "tokens": 100 * PER_STEP, "step": 100, "loss": loss_at(run, 100)} | extra
        for run, params in SIZES.items()
    ]  # fmt: skip


def wide_rows(metric="train/loss", x="Step"):
    rows = []
    for step in STEPS:
        row = {x: int(step)}
        for run in SIZES:
            value = loss_at(run, step) if run != "b" or step % 10 == 0 else ""  # logged less often
            bounds = {f"{run} - {metric}__MIN": value, f"{run} - {metric}__MAX": value}
            row |= {f"{run} - {metric}": value, f"{run} - _step": int(step)} | bounds
        rows.append(row)
    return rows


def joined(tmp_path, lines, runs=None, **names):
    """The curves of family x, by run."""
    runs = write_csv(tmp_path / "runs.csv", runs or run_rows())
    lines = write_csv(tmp_path / "curves.csv", lines)
    data, logs = readers.read_with_curves(runs, lines)
    part = approach1.join_curves(logs, data, select(data))["x"]
    return part, {curve.run: curve for curve in part.curves}


def test_a_long_table(tmp_path):
    part, found = joined(tmp_path, long_rows())
    assert set(found) == set(SIZES)
    assert (part.kind, part.missing, part.total, part.asked) == ("", 0, 3, True)
    b = found["b"]
    assert b.params == 2e8
    np.testing.assert_allclose(b.tokens_n, STEPS[1:] * PER_STEP)  # no loss has a C of 0
    np.testing.assert_allclose(b.flops_n, 6 * 2e8 * b.tokens_n)
    np.testing.assert_allclose(b.loss_n, LAW.loss(2e8, b.tokens_n))
    assert b.schedule == ""


def test_the_chart_that_wandb_exports(tmp_path):
    part, found = joined(tmp_path, wide_rows())
    assert part.kind == "train_loss"
    assert len(found["a"].loss_n) == 20
    assert len(found["b"].loss_n) == 10
    np.testing.assert_allclose(found["b"].loss_n, LAW.loss(2e8, found["b"].tokens_n))
    other, _ = joined(tmp_path, wide_rows("loss", "trainer/global_step"))
    assert other.kind == ""


def test_clocks_in_tokens_and_given_tokens_per_step(tmp_path):
    by_tokens = [
        {"run": row["run"], "tokens": row["step"] * PER_STEP, "loss": row["loss"]}
        for row in long_rows()
    ]
    _, expected = joined(tmp_path, long_rows())
    _, found = joined(tmp_path, by_tokens)
    np.testing.assert_allclose(found["c"].flops_n, expected["c"].flops_n)
    plain = [{k: v for k, v in row.items() if k != "step"} for row in run_rows()]
    given = [row | {"tokens_per_step": PER_STEP} for row in plain]
    for runs, lines in ((given, long_rows()), (plain, long_rows(tokens_per_step=PER_STEP))):
        _, found = joined(tmp_path, lines, runs)
        np.testing.assert_allclose(found["c"].flops_n, expected["c"].flops_n)
    with pytest.raises(UserError, match=r"tokens is a step of run a.*tokens_per_step"):
        joined(tmp_path, long_rows(), plain)
    with pytest.raises(UserError, match=r"run a goes to 1e\+10 tokens"):
        joined(tmp_path, long_rows(tokens_per_step=1e8), plain)


def test_learning_rates_tell_where_losses_count(tmp_path):
    def rate(step):
        return 1e-3 * min(step / 10, 1, (100 - step) / 20 + 0.1)

    wsd = [row | {"lr": rate(row["step"])} for row in long_rows()]
    _, found = joined(tmp_path, wsd)
    assert {curve.schedule for curve in found.values()} == {"constant"}
    assert (found["a"].tokens_n.min(), found["a"].tokens_n.max()) == (10 * PER_STEP, 80 * PER_STEP)
    cosine = [
        row | {"lr": 0.5 + 0.5 * np.cos(np.pi * max(row["step"] - 5, 0) / 95)}
        for row in long_rows()
    ]
    _, found = joined(tmp_path, cosine)
    assert {curve.schedule for curve in found.values()} == {"decays"}
    _, found = joined(tmp_path, long_rows(lr=3e-4))  # the peak rate, as runs.csv has it
    assert {curve.schedule for curve in found.values()} == {""}


@pytest.mark.parametrize(
    ("named", "schedule", "last"),
    [
        ({"schedule": "constant"}, "constant", 100),
        ({"schedule": "wsd", "cooldown_fraction": 0.2}, "constant", 80),
        ({"schedule": "Cosine"}, "decays", 100),
    ],
)
def test_schedules_by_name(tmp_path, named, schedule, last):
    _, found = joined(tmp_path, long_rows(), run_rows(**named))
    assert found["a"].schedule == schedule
    assert found["a"].tokens_n.max() == last * PER_STEP
    with pytest.raises(UserError, match="cooldown_fraction"):
        joined(tmp_path, long_rows(), run_rows(schedule="wsd"))


def test_single_batches_are_averaged(tmp_path):
    rng = np.random.default_rng(0)
    steps = np.arange(1, 2001)
    noisy = [
        {"run": "a", "tokens": s * 5e5, "loss": loss_at("a", s / 20) * (1 + 0.05 * e)}
        for s, e in zip(steps, rng.standard_normal(len(steps)), strict=True)
    ]
    _, found = joined(tmp_path, noisy, run_rows()[:1])
    a = found["a"]
    assert len(a.loss_n) < 160
    late = a.tokens_n > 2e8
    np.testing.assert_allclose(a.loss_n[late], LAW.loss(1e8, a.tokens_n[late]), rtol=0.02)


def test_the_last_loss_and_tokens_complete_a_table_of_runs(tmp_path):
    bare = [
        {"run": run, "family": "x", "params": params, "step": 100, "tokens_per_step": PER_STEP}
        for run, params in SIZES.items()
    ]
    runs = write_csv(tmp_path / "runs.csv", bare)
    lines = write_csv(tmp_path / "curves.csv", wide_rows())
    data, _ = readers.read_with_curves(runs, lines)
    (part,) = select(data).families.values()
    np.testing.assert_allclose(part.loss, [loss_at(run, 100) for run in SIZES])
    np.testing.assert_allclose(part.tokens, 1e9)
    assert part.measure.kind == "train_loss"


def test_one_file_of_runs_and_curves(tmp_path):
    rows = [
        row | {"family": "x", "params": SIZES[row["run"]], "tokens": row["step"] * PER_STEP}
        for row in long_rows()
    ]
    path = write_csv(tmp_path / "both.csv", rows)
    data, logs = readers.read_with_curves(path, path)
    runs = select(data)
    assert runs.families["x"].tokens.tolist() == [1e9] * 3
    assert len(approach1.join_curves(logs, data, runs)["x"].curves) == 3
    alone = write_csv(tmp_path / "wide.csv", wide_rows())
    with pytest.raises(UserError, match="a row for each run"):
        readers.read_with_curves(alone, alone)


def test_runs_without_curves_are_counted_and_those_left_out_are_not(tmp_path):
    rows = run_rows(status="done")
    rows.append(rows[0] | {"run": "d", "status": "diverged", "loss": ""})
    rows.append(rows[0] | {"run": "e"})
    # as `sweep collect` writes of a run whose spec cannot be read
    rows.append(dict.fromkeys(rows[0], "") | {"run": "f", "status": "damaged"})
    part, found = joined(tmp_path, [*long_rows(), {"run": "d", "step": 5, "loss": 9.0}], rows)
    assert set(found) == set(SIZES)
    assert (part.missing, part.total) == (1, 4)


def changed(**cells):
    rows = long_rows()
    rows[7] |= cells
    return rows


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (changed(loss="nan"), "loss must be .* row 9 has 'nan'"),
        (changed(loss=-1), "row 9 has '-1'"),
        (changed(step=-5), "step must be .* row 9 has '-5'"),
        (changed(step="five"), "row 9 has 'five'"),
        (changed(step=30), "row 8 and row 9 are the same step of run a"),
        (changed(run=""), "run is empty: row 9 has nothing"),
        (long_rows(kind="perplexity"), "nll, nelbo, train_loss"),
        ([{"run": "a", "loss": 3.0}], "no column 'tokens' or 'step'"),
        ([{"step": 1, "loss": 3.0}], "no column 'run'"),
        ([{"run": "a", "step": 1}], "no column 'loss'"),
        ([{"run": "a", "step": 1, "a/loss": 3, "b/loss": 3}], "several losses .*a/loss, b/loss"),
        ([{"run": "a", "step": 1, "loss": ""}], "'loss' is empty"),
        ([{"run": "other", "step": 1, "loss": 3.0}], "none of its 1 runs .other"),
        (wide_rows(x="Relative Time (Wall)"), "'Relative Time .Wall.'; export"),
        ([wide_rows()[0] | {"a - lr": 1e-3}], "curves of lr, train/loss; export one"),
    ],
)
def test_bad_curves_are_told_in_one_line(tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as caught:
        joined(tmp_path, lines)
    assert "\n" not in str(caught.value)


def test_runs_must_be_named(tmp_path):
    nameless = [{k: v for k, v in row.items() if k != "run"} for row in run_rows()]
    with pytest.raises(UserError, match="no column 'run'"):
        joined(tmp_path, long_rows(), nameless)
    lossless = [{k: v for k, v in row.items() if k != "loss"} for row in run_rows()]
    with pytest.raises(UserError, match=r"no column .loss..*row 4 has .c."):
        joined(tmp_path, [row for row in long_rows() if row["run"] != "c"], lossless)


class Logging(Trainer):
    """Evaluates every 20 % of the steps, if asked, and was killed once in the middle of a line."""

    every = 0.2

    def train(self, config, run_dir, **kwargs):
        result = super().train(config, run_dir, **kwargs)
        lines = []
        for step in range(1, config.steps + 1):
            near_end = (config.steps - step + 1) / (0.2 * config.steps)
            lines.append({"step": step, "loss": 9.0 / step**0.1, "lr": 1e-3 * min(1, near_end)})
            if self.every and step % max(1, int(self.every * config.steps)) == 0:
                loss = result["losses"][0] | {"value": 5.0 / step**0.1}
                lines.append({"step": step, "eval": [loss]})
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo'
        (run_dir / "metrics.jsonl").write_text(text)
        return result


def swept(root, trainer, schedule):
    fake_trainer.planned(root, families={"arm": {"optim.schedule": schedule}}, budgets=(1e9, 2e9))
    worker.work(root, trainer=trainer)
    data, logs = readers.read_with_curves(root)
    return approach1.join_curves(logs, data, select(data), asked=False)["arm"]


def test_a_sweep_has_its_own_curves(tmp_path):
    part = swept(tmp_path, Logging(), "wsd")
    assert (part.kind, part.missing, part.total, part.asked) == ("nll", 0, 4, False)
    for curve in part.curves:
        assert curve.schedule == "constant"
        assert len(curve.loss_n) == 4  # the fifth evaluation is in the cool-down
    logs = readers.load_logs(tmp_path, Choice())
    assert all(log.loss[0] < 5.01 for log in logs.runs.values())


def test_without_evaluations_the_batches_make_the_curves(tmp_path):
    trainer = Logging()
    trainer.every = 0
    part = swept(tmp_path, trainer, "wsd")
    assert part.kind == "train_loss"
    assert all(len(curve.loss_n) > 10 for curve in part.curves)


def test_a_sweep_whose_rates_decay_is_not_even_read(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "_rows", None)
    part = swept(tmp_path, Logging(), "cosine")
    assert {curve.schedule for curve in part.curves} == {"decays"}
    assert len(part.curves) == 4
