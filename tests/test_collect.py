import csv
import dataclasses
import io
import json

import fake_trainer
import pytest
from fake_trainer import Trainer

from prime_jax import cli
from prime_jax.config import run_id
from prime_jax.errors import UserError
from prime_jax.sweep import collect, grid, state
from prime_jax.sweep.worker import work


class Several(Trainer):
    """A good ARM run has one number, a Prime run three, of which the first is no likelihood."""

    def train(self, config, run_dir, **kwargs):
        result = super().train(config, run_dir, **kwargs)
        if config.family == "prime":
            bound = result["losses"][0]
            joint = bound | {"kind": "train_loss", "estimator": "joint", "value": 1.0}
            token = bound | {"estimator": "token", "value": 3.6}
            result["losses"] = [joint, token, bound]
        return result


def test_runs_csv_has_a_row_for_every_run_whatever_became_of_it(tmp_path):
    labels = {"arm": {}, "fine": {"family": "prime", "subtokens.length": 6}}
    ids = fake_trainer.planned(tmp_path, families=labels, budgets=(1e9,))
    failing, diverging = state.list_runs(tmp_path)[0].id, state.list_runs(tmp_path)[1].id

    class Mixed(Several):
        def train(self, config, run_dir, **kwargs):
            if run_id(config) == failing:
                raise UserError("the data is gone")
            result = super().train(config, run_dir, **kwargs)
            lost = {"status": "diverged", "losses": [], "reason": "not finite", "steps": 3}
            return result | (lost if run_id(config) == diverging else {})

    work(tmp_path, trainer=Mixed())
    pending = set(fake_trainer.planned(tmp_path, families=labels, budgets=(2e9,)))
    rows = {row["run"]: row for row in collect.rows(tmp_path)}
    assert set(rows) == set(ids) | pending
    assert {rows[run]["status"] for run in pending} == {"pending"}
    assert (rows[failing]["status"], rows[failing]["reason"]) == ("failed", "the data is gone")
    assert (rows[diverging]["status"], rows[diverging]["reason"]) == ("diverged", "not finite")
    assert rows[diverging]["step"] == 3
    for run in {failing, diverging} | pending:
        assert rows[run]["loss"] == rows[run]["kind"] == ""
        assert rows[run]["flops"] > 0
        assert rows[run]["params"] > 0
    done = [row for row in rows.values() if row["status"] == "done"]
    assert {row["loss"] for row in done} == {3.5}
    assert {row["loss_se"] for row in done} == {0.01}
    assert {row["loss_se_data"] for row in done} == {0.02}


def test_defaults_and_alternatives(tmp_path):
    fake_trainer.planned(tmp_path, budgets=(1e9,))
    work(tmp_path, trainer=Several())
    rows = collect.rows(tmp_path)
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert list(rows[0])[:21] == [
        "run",
        "family",
        "seed",
        "status",
        "kind",
        "loss",
        "loss_se",
        "flops",
        "params",
        "tokens",
        "budget",
        "epochs",
        "step",
        "lr",
        "batch_size",
        "layers",
        "width",
        "heads",
        "given",
        "reason",
        "rules",
    ]
    for row in rows:
        assert row["flops"] == row["flops_matmul"] != row["flops_reference"]
        assert row["params"] == row["params_nonembedding_plus_head"] > row["params_nonembedding"]
        assert (row["lr"], row["batch_size"], row["width"], row["step"]) == (
            1e-3,
            4,
            32,
            row["tokens"] // 64,
        )
        assert "lr=fixed:1e-3" in row["rules"]
        assert (row["data"], row["tokenizer"], row["eval_set"]) == ("d", "t", "e")
    prime = next(row for row in rows if row["family"] == "prime")
    assert (prime["kind"], prime["loss"], prime["loss_joint"], prime["kind_joint"]) == (
        "nelbo",
        3.5,
        1.0,
        "train_loss",
    )
    assert (prime["loss_subtoken"], prime["loss_token"], prime["loss_ar"]) == (3.5, 3.6, "")
    arm = next(row for row in rows if row["family"] == "arm")
    assert (arm["kind"], arm["loss_ar"], arm["se_ar"], arm["loss_joint"]) == ("nll", 3.5, 0.01, "")


def test_written_csv_reads_back(tmp_path):
    fake_trainer.planned(tmp_path / "sweep", budgets=(1e9,))
    work(tmp_path / "sweep", trainer=Several())
    assert collect.write(tmp_path / "sweep", tmp_path / "runs.csv") == 4
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [{k: str(v) for k, v in row.items()} for row in collect.rows(tmp_path / "sweep")]
    assert rows == expected


def test_runs_of_one_trajectory_are_named(tmp_path):
    wsd = {"optim.schedule": "wsd"}
    labels = {"arm": wsd, "cosine": {"family": "arm"}}
    fake_trainer.planned(tmp_path, families=labels, warmup="fixed:5")
    rows = collect.rows(tmp_path)
    assert {row["trajectory"] for row in rows if row["family"] == "cosine"} == {""}
    found = {(row["layers"], row["trajectory"]) for row in rows if row["family"] == "arm"}
    assert len(found) == len({layers for layers, _ in found}) == 2  # whatever the budget


def test_bad_places_are_told(tmp_path):
    with pytest.raises(UserError, match="no sweep here"):
        collect.rows(tmp_path)
    fake_trainer.planned(tmp_path / "sweep")
    with pytest.raises(UserError, match="cannot write"):
        collect.write(tmp_path / "sweep", tmp_path / "absent" / "runs.csv")


def command(*words) -> int:
    return cli.main(["sweep", *map(str, words)])


def test_commands_on_a_sweep(tmp_path, capsys):
    ids = fake_trainer.planned(tmp_path / "sweep")
    sweep = tmp_path / "sweep"
    command("kill", sweep, ids[0], ids[1])
    command("retry", sweep, ids[1][:8])
    assert command("status", sweep, "--json") == 0
    out = capsys.readouterr().out
    described = {d["run"]: d["status"] for d in json.loads(out[out.index("[") :])}
    assert (described[ids[0]], described[ids[1]], len(described)) == ("killed", "pending", 8)
    assert command("status", sweep) == 0
    assert "8 runs: 7 pending, 1 killed" in capsys.readouterr().out
    assert command("collect", sweep, "-o", tmp_path / "runs.csv") == 0
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 9


def test_the_plan_command_prints_without_data_and_refuses_to_write(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no quickstart has prepared its data
    rows = [dataclasses.asdict(row) for row in grid.rows(fake_trainer.sweep())]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert command("plan", path, "--flops-per-second", "1e9") == 0
    out = capsys.readouterr().out
    assert "8 OK, 0 DROP" in out
    assert "not prepared" in out
    assert command("plan", path, tmp_path / "sweep") == 2
    assert "prepare" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"status": "done"}', "NaN", "[" * 9999])
@pytest.mark.parametrize("kind", ["result", "end", "claim", "beat"])
def test_a_damaged_record_is_named_and_the_rest_goes_on(kind, text, tmp_path, capsys):
    bad, *_ = fake_trainer.planned(tmp_path)
    state.claim(tmp_path, bad, 1)
    name = f"{bad}.result" if kind == "result" else f"{bad}.1.{kind}"
    (tmp_path / "state" / name).write_text(text)
    assert cli.main(["sweep", "status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("8 runs: ")
    assert cli.main(["sweep", "collect", str(tmp_path), "-o", str(tmp_path / "runs.csv")]) == 0
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert len(rows) == 8
    if kind == "result":
        assert rows[bad]["status"] == "damaged"
        assert str(tmp_path / "state" / name) in rows[bad]["reason"]


@pytest.mark.parametrize("text", ['{"conf', "{}", '{"config": {"seed": "0"}}', "[" * 9999])
def test_a_damaged_spec_is_named_and_the_other_runs_go_on(text, tmp_path, capsys):
    bad, *rest = fake_trainer.planned(tmp_path)
    spec = tmp_path / "state" / f"{bad}.spec"
    spec.write_text(text)

    def told(*words):
        assert cli.main(["sweep", words[0], str(tmp_path), *words[1:]]) == 0
        out, err = capsys.readouterr()
        (line,) = (line for line in err.splitlines() if str(spec) in line)
        assert "remove it and plan the experiment again" in line
        return out

    assert told("status").startswith("7 runs: ")
    assert {run["run"] for run in json.loads(told("status", "--json"))} == set(rest)
    told("kill", rest[0])
    told("retry", rest[0])
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(told("collect", "-o", "-")))}
    assert rows.keys() == {bad, *rest}
    assert rows[bad]["status"] == "damaged"
    assert str(spec) in rows[bad]["reason"]
    spec.unlink()
    assert fake_trainer.planned(tmp_path)[0] == bad
    assert cli.main(["sweep", "status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("8 runs: ")
