"""A DIR of `prime-jax fit` read back: the same runs, the same numbers to the bit."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import scaling_cases

from prime_jax import cli
from prime_jax.cli import fit as commands
from prime_jax.errors import UserError
from prime_jax.scaling import fit, record, saved, table
from prime_jax.scaling.columns import Choice
from prime_jax.scaling.settings import Settings

SETTINGS = Settings(replicates=100, seed=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A DIR, and the fit that wrote it: of N in a named count."""
    path = tmp_path_factory.mktemp("saved") / "fit"
    rows = scaling_cases.rows_of_a_sweep()
    return path, scaling_cases.write_fit(path, rows, SETTINGS, Choice(params="total"))


def test_a_refit_gives_the_same_numbers_to_the_bit(written):
    path, fitted = written
    back = saved.read(path)
    assert back.settings == SETTINGS
    assert back.runs.excluded == fitted.runs.excluded
    assert (back.runs.source, back.runs.sha256) == (fitted.runs.source, fitted.runs.sha256)
    again = record.as_dict(fit.fit_runs(back.runs, back.settings))
    kept = json.loads((path / "fit.json").read_text())
    assert json.loads(json.dumps(again))["families"] == kept["families"]
    assert again["conventions"] == kept["conventions"] == {"flops": "matmul", "params": "total"}
    assert again["warnings"] == kept["warnings"]
    for name, points in fitted.runs.families.items():
        for field in dataclasses.fields(points):
            mine, theirs = getattr(points, field.name), getattr(back.points(name), field.name)
            np.testing.assert_equal(mine, theirs)


def test_the_command_leaves_all_that_a_refit_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "_draw", lambda *_: [])
    rows = [row for row in scaling_cases.rows_of_a_sweep() if row["family"] == "arm"]
    path = scaling_cases.write_csv(tmp_path / "runs.csv", rows)
    words = ["fit", str(path), "--out", str(tmp_path / "fit"), "--bootstrap", "150", "--seed", "4"]
    assert cli.main([*words, "--objective", "ls"]) == 0
    back = saved.read(tmp_path / "fit")
    assert back.settings == Settings(replicates=150, seed=4, objective="ls")
    law = back.refit("arm").parametric.fit.law
    assert dataclasses.asdict(law) == back.result["families"]["arm"]["approach3"]["params"]


def test_points_are_plain_columns(written):
    rows = table.read_csv(written[0] / "points.csv").rows
    assert len(rows) == 40
    for row in rows:
        ratio = float(row["flops"]) / (float(row["params"]) * float(row["tokens"]))
        assert ratio == pytest.approx(6 / 1.1)
        assert bool(row["loss"]) == (row["status"] == "done")
        assert row["run"].startswith(row["family"])
    back = saved.read(written[0])
    assert back.seeds == {0, 1, 2}
    assert back.unique_tokens == {"arm": 1e10, "prime": 1e10}


def test_a_directory_that_is_no_fit(written, tmp_path):
    def refused(part):
        with pytest.raises(UserError, match=part):
            saved.read(tmp_path / "fit")

    refused("no fit.json")
    shutil.copytree(written[0], tmp_path / "fit")
    points = tmp_path / "fit" / "points.csv"
    text = points.read_text()
    points.write_text(text.replace("prime3", "prime4"))
    refused("changed")
    points.unlink()
    refused("cannot read")
    points.write_text(text)
    path = tmp_path / "fit" / "fit.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"schema": 99}))
    refused("version")
    path.write_text(json.dumps(result | {"method": {}}))
    refused("fit again")
    older = result["method"]["settings"] | {"objective": "lad"}
    path.write_text(json.dumps(result | {"method": result["method"] | {"settings": older}}))
    refused("settings: objective = 'lad': must be one of huber, ls")
    path.write_text("[]")
    refused("version")
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match="did you mean prime"):
        saved.read(tmp_path / "fit").points("prim")
