"""A DIR of `prime-jax fit` read back: the same runs, the same numbers to the bit."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import scaling_cases

from prime_jax import cli
from prime_jax.errors import UserError
from prime_jax.scaling import library, readers, record
from prime_jax.scaling.schema import as_dict
from prime_jax.scaling.settings import Choice, Settings

SETTINGS = Settings(replicates=100, seed=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A DIR, and the fit that wrote it: of N in a named count."""
    path = tmp_path_factory.mktemp("saved") / "fit"
    rows = scaling_cases.rows_of_a_sweep()
    return path, scaling_cases.write_fit(path, rows, SETTINGS, Choice(params="total"))


def test_a_refit_gives_the_same_numbers_to_the_bit(written):
    path, fitted = written
    back = record.load(path)
    assert back.settings == SETTINGS
    assert back.data.excluded == fitted.data.excluded
    kept = json.loads((path / "fit.json").read_text())
    assert json.loads(json.dumps(as_dict(back))) == kept
    assert kept["conventions"] == {"flops": "matmul", "params": "total"}
    for name, points in fitted.data.families.items():
        for field in dataclasses.fields(points):
            mine, theirs = getattr(points, field.name), getattr(back.data.points(name), field.name)
            np.testing.assert_equal(mine, theirs)


def test_the_command_leaves_all_that_a_refit_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(library.Fit, "draw", lambda *_: [])
    rows = [row for row in scaling_cases.rows_of_a_sweep() if row["family"] == "arm"]
    path = scaling_cases.write_csv(tmp_path / "runs.csv", rows)
    words = ["fit", str(path), "--out", str(tmp_path / "fit"), "--bootstrap", "150", "--seed", "4"]
    assert cli.main([*words, "--objective", "ls"]) == 0
    back = record.load(tmp_path / "fit")
    assert back.settings == Settings(replicates=150, seed=4, objective="ls")
    kept = json.loads((tmp_path / "fit" / "fit.json").read_text())
    law = kept["families"]["arm"]["approach3"]["params"]
    assert as_dict(back.families["arm"].approach3.params) == law


def test_points_are_plain_columns(written):
    data = readers.read_csv(written[0] / "points.csv")
    assert len(data.rows) == 40
    for row in data.rows:
        ratio = float(row["flops"]) / (float(row["params"]) * float(row["tokens"]))
        assert ratio == pytest.approx(6 / 1.1)
        assert bool(row["loss"]) == (row["status"] == "done")
        assert row["run"].startswith(row["family"])
    assert record.seeds(data) == {0, 1, 2}
    assert record.unique_tokens(data) == {"arm": 1e10, "prime": 1e10}


def test_a_directory_that_is_no_fit(written, tmp_path):
    def refused(part):
        with pytest.raises(UserError, match=part):
            record.load(tmp_path / "fit")

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
        record.load(tmp_path / "fit", ["prim"])
