"""What people import: the same numbers from a path, a data frame and a dict, in one line if bad."""

import subprocess
import sys

import numpy as np
import pytest
from scaling_cases import LAW, csv_rows, published, surface, write_csv

from prime_jax import scaling
from prime_jax.errors import UserError
from prime_jax.scaling.laws import Compute, optimum

ROWS = csv_rows(published("arm")) + csv_rows(published("mdm"))
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
QUICK = {"replicates": 100}


class Frame:
    """As much of a pandas data frame as is needed: columns of numpy arrays by name."""

    def __init__(self, columns):
        self.columns = {name: np.array(cells) for name, cells in columns.items()}

    def keys(self):
        return list(self.columns)

    def __getitem__(self, name):
        return self.columns[name]


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    path = write_csv(tmp_path_factory.mktemp("library") / "runs.csv", ROWS)
    return scaling.fit(str(path), **QUICK)


@pytest.mark.parametrize("source", [COLUMNS, Frame(COLUMNS)], ids=["dict", "data frame"])
def test_the_same_numbers_from_columns(source, fit):
    mine, theirs = (f.to_dict()["families"] for f in (scaling.fit(source, **QUICK), fit))
    assert mine == theirs


def test_cells_of_a_frame_that_hold_nothing(fit):
    empty = [None, float("nan"), np.float64("nan")]
    columns = COLUMNS | {"loss_se": (empty * len(ROWS))[: len(ROWS)]}
    assert scaling.fit(columns, **QUICK).to_dict()["families"] == fit.to_dict()["families"]


def test_an_optimum_at_any_budget(fit):
    three = fit.families["arm"].approach3
    stored = three.optima[-1]
    assert three.optimum(3e20).params == pytest.approx(stored.params, rel=1e-12)
    assert three.optimum(3e20).intervals["loss"] == pytest.approx(stored.intervals["loss"])
    exact = scaling.fit({k: [r[k] for r in csv_rows(surface())] for k in ROWS[0]}, **QUICK)
    best = exact.families["known"].approach3.optimum(1e22)
    assert best.params == pytest.approx(float(optimum(LAW, Compute(), 1e22).params), rel=1e-5)
    assert best.profile is None


def test_questions_to_a_fit_are_those_of_the_commands(fit, tmp_path):
    found = scaling.compare(fit, baseline="arm")
    assert found.families["mdm"].multiplier.at_family.budgets[-1].value > 10
    assert "spent by" in found.summary()
    assert scaling.predict(fit, 1e21, "mdm")["mdm"].approach3.params.value > 1e8
    assert "arm: held-out loss" in scaling.validate(fit).summary()
    fit.save(tmp_path / "fit")
    back = scaling.load(tmp_path / "fit")
    assert back.to_dict()["families"] == fit.to_dict()["families"]
    assert len(fit.plot("frontier").axes) == 1
    assert "a, approach 3" in fit.summary()


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda fit: scaling.fit("nowhere.csv"), "nowhere.csv"),
        (lambda fit: scaling.fit(7), "int is no table of runs"),
        (lambda fit: scaling.fit({"family": ["a"], "loss": [1.0, 2.0]}), "differ in length"),
        (lambda fit: scaling.fit({"family": []}), "no runs"),
        (lambda fit: scaling.fit(COLUMNS, replicates=5), "at least 100"),
        (lambda fit: scaling.fit(COLUMNS, objective="lad"), "objective"),
        (lambda fit: scaling.fit(COLUMNS, replicate=100), "replicate"),
        (lambda fit: scaling.fit(COLUMNS, level=95), "level = 95.0: must be above 0 and below 1"),
        (lambda fit: fit.plot("isoflops"), "did you mean isoflop"),
        (lambda fit: fit.save("x", formats=["gif"]), "gif"),
        (lambda fit: scaling.compare(fit, baseline="amr"), "did you mean arm"),
        (lambda fit: scaling.compare(fit, baseline="arm", seed=3), "seed"),
        (lambda fit: scaling.predict(fit, 1e21, "mdn"), "did you mean mdm"),
        (lambda fit: fit.families["arm"].approach3.optimum(-1), "above 0"),
    ],
)
def test_bad_input_is_one_line(ask, says, fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        ask(fit)
    assert "\n" not in str(caught.value)


def test_a_law_that_was_refused_says_why():
    few = {name: cells[:5] + cells[65:] for name, cells in COLUMNS.items()}
    found = scaling.fit(few, **QUICK)
    with pytest.raises(UserError, match="only 5 runs"):
        found.families["arm"].approach3.optimum(1e21)


def test_the_library_loads_neither_jax_nor_matplotlib_nor_the_readers_of_others():
    heavy = ("jax", "matplotlib", "pandas", "tensorboard", "wandb")
    code = f"import sys, prime_jax.scaling as s, prime_jax.cli.fit; s.fit; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
