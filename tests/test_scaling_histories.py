"""What runs logged by step: rows of a table by its end, curves by its losses."""

import json

import pytest
from scaling_cases import csv_rows, surface, write_csv

from prime_jax.errors import UserError
from prime_jax.scaling import readers
from prime_jax.scaling.approach1 import join_curves
from prime_jax.scaling.histories import Histories, History, Metric
from prime_jax.scaling.points import select
from prime_jax.scaling.settings import Choice

PATTERN = Choice(name_pattern="{family}_{FLOPs}_{N}_{D}")
ROWS = csv_rows(surface())


def name(row):
    return f"arm_{row['flops']}_{row['params']}_{row['tokens']}"


def lines(**extra):
    """A line for each step of each run: losses of batches, and every second time an evaluation."""
    for row in ROWS:
        for step in range(5):
            loss = row["loss"] + 0.1 * (4 - step)
            found = {"run": name(row), "_step": 10 * step, "train/loss": loss + 1} | extra
            yield found | (
                {"eval/loss": loss, "lr": 1e-3} if step % 2 == 0 else {"eval/loss": None}
            )


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_step_that_comes_again_puts_away_what_came_after():
    metric = Metric()
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5), (4, 4.0)):
        metric.add(step, value)
    assert (metric.steps, metric.values) == ([1, 2, 4], [1.0, 2.5, 4.0])


def check(table, logs):
    points = select(table).families["arm"]
    expected = sorted((row["params"], row["loss"]) for row in ROWS)
    assert sorted(zip(points.params.tolist(), points.loss.tolist(), strict=True)) == expected
    assert points.lr.tolist() == [1e-3] * len(ROWS)
    first = logs.runs[name(ROWS[0])]
    assert (first.clock, first.lr) == ([0, 20, 40], [1e-3] * 3)
    assert first.loss == pytest.approx([ROWS[0]["loss"] + gap for gap in (0.4, 0.2, 0)])


def test_the_history_that_wandb_gives(tmp_path):
    table, logs = readers.read_with_curves(
        write_lines(tmp_path / "h.jsonl", lines()), None, PATTERN
    )
    assert table.read_as["loss"] == "eval/loss"
    assert {row["step"] for row in table.rows} == {40}
    check(table, logs)


def test_a_directory_with_a_file_for_each_run(tmp_path):
    for row in ROWS:
        mine = [line for line in lines() if line["run"] == name(row)]
        nameless = [{k: v for k, v in line.items() if k != "run"} for line in mine]
        write_lines(tmp_path / f"{name(row)}.jsonl", nameless)
    said = []
    table, logs = readers.read_with_curves(tmp_path, None, PATTERN, said.append)
    assert said[-1].endswith("(20 of 20)")
    check(table, logs)
    assert table.sha256 != readers.read(tmp_path / f"{name(ROWS[0])}.jsonl").sha256


def test_runs_as_wandb_exports_them_with_their_histories(tmp_path):
    rows = [
        {"Name": name(row), "State": "finished", "n_params": row["params"], "tokens": row["tokens"]}
        for row in ROWS
    ]
    rows.append(rows[0] | {"Name": "x", "State": "crashed"})
    runs = write_csv(tmp_path / "wandb.csv", rows)
    curves = write_lines(tmp_path / "h.jsonl", lines())
    table, logs = readers.read_with_curves(runs, curves, Choice(family="arm"))
    found = select(table)
    curves = {curve.run: curve for curve in join_curves(logs, table, found)["arm"].curves}
    tokens = ROWS[0]["tokens"]
    assert curves[name(ROWS[0])].tokens_n == pytest.approx([tokens / 2, tokens])
    assert found.families["arm"].loss.tolist() == [row["loss"] for row in ROWS]
    assert [run.run for run in found.excluded] == ["x"]
    assert found.columns.read_as == {"run": "Name", "params": "n_params"}


def test_nested_records_and_lines_of_runs_are_a_table(tmp_path):
    rows = [
        {"name": f"r{k}", "config": {"n_params": 1e8}, "summary": {"val": {"loss": 3}}}
        for k in (1, 2)
    ]
    table = readers.read(write_lines(tmp_path / "runs.jsonl", rows))
    assert table.rows[1] == {"name": "r2", "config.n_params": 1e8, "summary.val.loss": 3}


def histories(**losses):
    runs = {
        name: History({"loss": Metric([0, 1], [4.0, loss])}, {"params": 1e8, "family": "a"})
        for name, loss in losses.items()
    }
    return Histories(runs, "logs", "0" * 64)


def test_a_run_whose_loss_was_lost_has_diverged():
    table, logs = histories(x=3.0, y=float("nan")).interpret(Choice())
    assert [row.get("status") for row in table.rows] == [None, "diverged"]
    assert logs.runs["y"].loss == [4.0]


def test_a_batch_loss_beside_an_evaluation_is_asked_about():
    both = histories(x=3.0)
    both.runs["x"].add("eval/loss", 1, 3.5)
    with pytest.raises(UserError, match=r"`loss` or `eval/loss`.*--columns loss=eval/loss"):
        both.interpret(Choice())
    for loss, value in (("loss", 3.0), ("eval/loss", 3.5)):
        table, _ = both.interpret(Choice(columns=f"loss={loss}"))
        assert table.rows[0]["loss"] == value


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"run": "a", "_step": "one", "loss": 3}] * 2, "_step must be a number.*row 1 has 'one'"),
        ([{"run": "a", "_step": 1}, 3], "not a list of objects"),
        ([{"run": "a", "_step": k, "acc": 3} for k in (1, 2)], "no columns 'family', 'loss'.*--name-pattern"),
    ],
)  # fmt: skip
def test_bad_lines_are_told_in_one_line(tmp_path, rows, message):
    path = write_lines(tmp_path / "h.jsonl", rows)
    with pytest.raises(UserError, match=message) as caught:
        select(readers.read_with_curves(path)[0])
    assert "\n" not in str(caught.value)


def test_a_directory_without_any_of_it(tmp_path):
    with pytest.raises(UserError, match="no sweep here"):
        readers.read(tmp_path)
    (tmp_path / "h.jsonl").write_text('{"loss": 3}\n{"loss": ')
    with pytest.raises(UserError, match="line 2: not JSON"):
        readers.read(tmp_path)
    (tmp_path / "h.jsonl").write_text('{"loss": 3}\n{"loss": 2}\n')
    with pytest.raises(UserError, match="no steps in it"):
        readers.read(tmp_path)
