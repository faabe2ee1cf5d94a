import json

import numpy as np
import pytest
from scaling_cases import LAW, csv_rows, published, surface, write_csv

from prime_jax import cli
from prime_jax.scaling import rollout
from prime_jax.scaling.fits import fit_family, fit_runs
from prime_jax.scaling.laws import Compute, Optimum, optimum
from prime_jax.scaling.points import select
from prime_jax.scaling.readers import read_csv
from prime_jax.scaling.schema import as_dict
from prime_jax.scaling.settings import Settings

QUICK = Settings(replicates=100)


def bent(last=0.97):
    """A surface whose largest budget does better than its law."""
    part = surface()
    top = part.budget == part.budgets[-1]
    return type(part)(**{**vars(part), "loss": np.where(top, last * part.loss, part.loss)})


@pytest.mark.parametrize(("family", "error"), [("arm", 2.1), ("mdm", 2.5), ("prime", 2.8)])
def test_the_top_two_published_budgets_are_predicted_too_high(family, error):
    found = rollout.rollout(published(family), QUICK)
    step = next(step for step in found.steps if len(step.budgets) == 2)
    assert 100 * step.errors_n.mean() == pytest.approx(error, abs=0.06)
    assert [diagnostic.code for diagnostic in found.warnings] == ["held_out_bias"]
    assert rollout.model_error(found).bias > 0.01


def test_an_exact_law_predicts_exactly():
    found = rollout.rollout(surface(), QUICK)
    assert [len(step.fitted) for step in found.steps] == [3]
    assert not found.warnings
    error = rollout.model_error(found)
    assert max(error.rms, error.inside, error.per_decade) < 1e-8
    (prediction,) = found.predictions
    truth = optimum(LAW, Compute(), prediction.flops)
    assert prediction.approach3.params == pytest.approx(truth.params, rel=1e-6)
    # On one grid about the optimum parabolas are off by one factor, which a power law keeps.
    assert prediction.approach2.params == pytest.approx(prediction.measured.params, rel=1e-6)
    assert prediction.decades == pytest.approx(np.log10(3))


def test_errors_are_signed_predicted_over_measured():
    found = rollout.rollout(bent(), QUICK)
    (prediction,) = found.predictions
    np.testing.assert_allclose(prediction.errors_n, 1 / 0.97 - 1, rtol=1e-5)
    assert "high" in found.warnings[0].message
    low = rollout.rollout(bent(1.03), QUICK)
    assert rollout.model_error(low).bias < -0.02
    assert "low" in low.warnings[0].message


def test_every_budget_after_the_third_is_predicted_from_each_beginning():
    found = rollout.rollout(surface(budgets=np.geomspace(1e18, 1e20, 6)), QUICK)
    pairs = [(len(step.fitted), len(step.budgets)) for step in found.steps]
    assert pairs == [(3, 3), (4, 2), (5, 1)]
    assert sum(one.runs for one in found.by_distance) == 6 * 5
    for one in found.by_distance:
        assert any(one.from_ < p.decades <= one.to for p in found.predictions)


def test_many_budgets_are_not_all_cut_at_and_never_early():
    points = surface(budgets=np.geomspace(1e18, 1e20, 24))
    found = rollout.rollout(points, QUICK)
    assert len(found.steps) == rollout.MAX_STEPS
    for step in found.steps:
        assert np.log10(step.fitted[-1] / step.fitted[0]) >= 2 * rollout.MIN_SPAN
    assert len(found.steps[-1].budgets) == 1


def test_few_budgets_are_a_finding_and_no_error():
    points = surface(budgets=(1e18, 3e18, 1e19))
    found = rollout.rollout(points, QUICK)
    assert rollout.model_error(found) is None
    assert [f.code for f in found.warnings if not f.refusal] == ["too_few_budgets"]
    family = fit_family(points, QUICK)
    assert family.approach3
    assert not any(diagnostic.refusal for diagnostic in family.warnings)
    told = json.loads(json.dumps(as_dict(found), allow_nan=False))
    assert told["rms"] is None
    assert told["steps"] == []


def test_the_model_error_grows_with_the_distance_and_widens():
    error = rollout.model_error(rollout.rollout(published("mdm"), QUICK))
    assert error.at(0) == error.inside
    assert np.all(np.diff(error.at([0, 0.5, 1, 2])) > 0)
    # Averaged over the held-out runs it is their rms.
    found = rollout.rollout(published("mdm"), QUICK)
    decades = np.concatenate([np.full(len(p.errors_n), p.decades) for p in found.predictions])
    assert np.sqrt(np.mean(error.at(decades) ** 2)) == pytest.approx(error.rms)
    near, far = (error.widen(3.0, 2.98, 3.01, d, 0.95) for d in (0.0, 1.0))
    assert far[0] < near[0] < 2.98
    assert 3.01 < near[1] < far[1]
    narrow = error.widen(3.0, 2.98, 3.01, 1.0, 0.5)
    assert far[0] < narrow[0] < 2.98


def test_distance_is_outside_the_budgets_only():
    points = surface()
    got = rollout.distance(points, [1e17, 1e18, 1e19, 3e19, 3e21])
    np.testing.assert_allclose(got, [1, 0, 0, 0, 2], atol=1e-12)


def test_optima_of_approach_1_are_predicted_by_their_power_law():
    flops = np.geomspace(1e18, 3e19, 6)
    winners = [Optimum(c, 1e8 * (c / 1e19) ** 0.5, c / 6e8, 3 * (c / 1e19) ** -0.05) for c in flops]
    (step,) = rollout.rollout(surface(), QUICK, envelope=winners).steps
    assert [best.flops for best in step.approach1] == [c for c in flops if c > 1e19]
    for foreseen in step.approach1:
        assert foreseen.params == pytest.approx(foreseen.measured.params)
        assert foreseen.loss == pytest.approx(foreseen.measured.loss)


def test_a_fit_records_its_rollout_and_wider_bands(tmp_path):
    path = write_csv(tmp_path / "mdm.csv", csv_rows(published("mdm")))
    fitted = as_dict(fit_runs(select(read_csv(path)), QUICK))
    mdm = fitted["families"]["mdm"]
    assert mdm["rollout"]["bias"] == pytest.approx(0.018, abs=1e-3)
    assert [len(step["fitted"]) for step in mdm["rollout"]["steps"]] == [3, 4, 5, 6]
    held_out = mdm["rollout"]["steps"][-1]["budgets"][0]
    assert held_out["in_range"] is False
    assert held_out["approach3"]["loss_error"] == pytest.approx(0.029, abs=2e-3)
    for row in mdm["approach3"]["optima"]:
        low, high = row["intervals"]["loss"]
        wide = row["intervals_with_model"]["loss"]
        assert wide[0] < low < high < wide[1]
    band = mdm["approach3"]["frontier"]
    assert np.all(np.array(band["intervals_with_model"]["loss"][0]) < band["intervals"]["loss"][0])


def command(*arguments):
    run, args = cli.parsed(["scaling", *map(str, arguments)])
    return run(args)


def test_the_command_writes_every_run(tmp_path, capsys):
    path = write_csv(tmp_path / "runs.csv", csv_rows(surface(noise=0.003)))
    assert command("validate", path, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "validate.json").read_text())
    assert found["schema"] == 2
    assert found["source"]["name"] == "runs.csv"
    (row,) = found["families"]["known"]["runs"]
    assert len(row["errors"]) == len(row["params"]) == 5
    assert "known" in capsys.readouterr().out


def test_the_command_without_enough_budgets(tmp_path, capsys):
    path = write_csv(tmp_path / "runs.csv", csv_rows(surface(budgets=(1e18, 3e18, 1e19))))
    assert command("validate", path) == 3
    found = json.loads((tmp_path / "runs-fit" / "validate.json").read_text())
    assert found["families"]["known"]["steps"] == []
    assert "4 budgets" in capsys.readouterr().out
