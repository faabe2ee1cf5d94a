"""Predictions against a known law."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scaling_cases
from scaling_cases import BUDGETS, LAW

from prime_jax import cli
from prime_jax.scaling import fits, launchable, rollout
from prime_jax.scaling.laws import Compute, optimum
from prime_jax.scaling.prediction import predict_family, predict_run
from prime_jax.scaling.settings import Settings

SETTINGS = Settings(replicates=100, seed=3)
CONVENTIONS = {"flops": "as given", "params": "as given"}
TEMPLATE = launchable.template("mdm", CONVENTIONS, None)


@pytest.fixture(scope="module")
def exact():
    return fits.fit_family(scaling_cases.surface(), SETTINGS)


@pytest.fixture(scope="module")
def noisy():
    data = scaling_cases.surface(ratios=np.geomspace(0.2, 5, 8), noise=3e-3, seed=5)
    return fits.fit_family(data, SETTINGS)


@pytest.mark.parametrize("budget", [2e18, 1e21])
def test_without_noise_a_prediction_is_the_truth(exact, budget):
    found = predict_family(exact, SETTINGS, budget, TEMPLATE)
    best = optimum(LAW, Compute(), budget)
    assert found.approach3.params.value == pytest.approx(float(best.params), rel=1e-6)
    assert found.approach3.tokens.value == pytest.approx(float(best.tokens), rel=1e-6)
    assert found.approach3.loss.value == pytest.approx(float(best.loss), rel=1e-8)
    assert found.debiased.params.value == pytest.approx(float(best.params), rel=1e-3)
    assert found.approach2.params.value == pytest.approx(float(best.params), rel=0.02)
    assert found.approach2.params.value != found.debiased.params.value
    assert found.in_range == (budget <= BUDGETS[-1])
    assert found.decades == pytest.approx(max(0, np.log10(budget / BUDGETS[-1])))
    codes = {diagnostic.code for diagnostic in found.findings}
    assert ("extrapolation" in codes) == (not found.in_range)


def test_intervals_hold_the_truth_and_widen_away_from_the_data(noisy):
    near, far = (predict_family(noisy, SETTINGS, c, TEMPLATE) for c in (1e19, 1e22))
    for found in (near, far):
        best = optimum(LAW, Compute(), found.flops)
        for part in (found.approach3, found.approach2):
            for name in ("params", "tokens"):
                estimate = getattr(part, name)
                low, high = estimate.interval
                assert low < getattr(best, name) < high
                assert low < estimate.value < high
        plain, widened = found.approach3.loss, found.approach3.loss_with_model_error
        assert widened.interval[0] < plain.interval[0] < plain.interval[1] < widened.interval[1]
        assert widened.interval[0] < best.loss < widened.interval[1]
    for part in ("approach3", "approach2"):
        spans = [np.ptp(np.log(getattr(f, part).params.interval)) for f in (near, far)]
        assert spans[1] > 2 * spans[0]


def test_rollout_error_is_that_of_validate(noisy):
    found = predict_family(noisy, SETTINGS, 1e21, TEMPLATE)
    error = rollout.model_error(rollout.rollout(noisy.points, SETTINGS))
    assert found.rollout.rms == pytest.approx(error.rms, rel=1e-6)
    few = fits.fit_family(scaling_cases.surface(budgets=BUDGETS[:3], noise=1e-3), SETTINGS)
    found = predict_family(few, SETTINGS, 1e21, TEMPLATE)
    assert found.rollout is found.approach3.loss_with_model_error is None
    assert "model_error_unknown" in {diagnostic.code for diagnostic in found.findings}


def test_repeated_data_is_flagged(exact):
    tokens = float(optimum(LAW, Compute(), 1e20).tokens)
    found = predict_family(exact, SETTINGS, 1e20, TEMPLATE, unique_tokens=tokens / 3)
    assert found.epochs == pytest.approx(3, rel=1e-6)
    assert "data_repeated" in {diagnostic.code for diagnostic in found.findings}
    plenty = predict_family(exact, SETTINGS, 1e20, TEMPLATE, unique_tokens=2 * tokens)
    assert "data_repeated" not in {diagnostic.code for diagnostic in plenty.findings}


def test_doubts_of_the_fit_travel(noisy):
    data = scaling_cases.surface(ratios=(2, 3, 4, 6), noise=1e-3, seed=2)
    family = fits.fit_family(data, SETTINGS)
    found = predict_family(family, SETTINGS, 1e19, TEMPLATE)
    said = {(one.code, one.message) for one in found.findings}
    assert {(one.code, one.message) for one in family.warnings} <= said
    assert not found.in_range  # C is, and N* is smaller than every size sampled there
    assert found.decades == 0
    (outside,) = [one for one in found.findings if "sampled near 1e19" in one.message]
    assert outside.code == "optimum_outside_range"
    assert predict_family(noisy, SETTINGS, 1e19, TEMPLATE).in_range


def test_an_optimum_that_is_no_run_is_refused(noisy):
    law = replace(noisy.approach3.params, A=1e-9, alpha=0.9)
    far = replace(noisy, approach3=replace(noisy.approach3, params=law))
    found = predict_family(far, SETTINGS, 1e19, TEMPLATE)
    assert found.approach3 is None
    assert found.approach2
    (why,) = [one for one in found.findings if one.code == "optimum_outside_range" and one.refusal]
    assert "which is no run" in why.message


def test_a_family_without_a_fit_says_why_and_leaves_the_others():
    few = fits.fit_family(scaling_cases.surface(budgets=(1e18,)), SETTINGS)
    found = predict_family(few, SETTINGS, 1e18, TEMPLATE)
    assert found.approach3 is found.approach2 is found.launch is None
    assert "only 5 runs" in next(one for one in found.findings if one.refusal).message
    assert not found.in_range


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("predict") / "fit"
    scaling_cases.write_fit(path, scaling_cases.rows_of_a_sweep(), SETTINGS)
    return path


def test_command(directory, capsys):
    words = ["scaling", "predict", str(directory), "--flops", "1e21"]
    assert cli.main([*words, "--family", "arm"]) == 0
    assert "N* (parameters), approach 3" in capsys.readouterr().out
    settings = ["--model.vocab-size", "5000", "--data.seq-len", "512"]
    options = ["--family", "prime", "--data-limit", "1e15", *settings]
    assert cli.main([*words, *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (one,) = said["predictions"]
    assert (one["family"], one["in_range"], said["level"]) == ("prime", False, 0.95)
    assert one["unique_tokens"] == 1e15
    assert (one["kind"], one["loss_unit"]) == ("nelbo", "nats / token")
    launch = one["launch"]
    assert launch["tokens"] == launch["steps"] * launch["batch_size"] * 512
    assert launch["flops"] <= 1e21
    best = one["approach3"]["params"]["value"]
    assert launch["params"] == pytest.approx(best, rel=0.15)


def test_below_the_data_of_one_family_the_others_are_predicted(exact, directory, capsys):
    found = predict_family(exact, SETTINGS, 1e17, TEMPLATE)
    assert found.approach3 is found.approach2 is found.launch is None
    (why,) = [one for one in found.findings if one.refusal]
    assert "below the data" in why.message
    assert "begin at 1e18" in why.message
    assert not found.in_range
    words = ["scaling", "predict", str(directory), "--flops", "1e17", "--data-limit", "1e9"]
    assert cli.main(words) == 3  # for no family
    assert "below the data" in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 3
    said = json.loads(capsys.readouterr().out)
    assert {row["approach3"] for row in said["predictions"]} == {None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--family": "prim"}, ["prim", "did you mean prime"]),
        ({"--model.vocab-size": "many"}, ["--model.vocab-size many"]),
        ({"--sweep": "nowhere"}, ["nowhere"]),
    ],
)
def test_bad_input_is_one_line(directory, capsys, change, words):
    flat = [word for pair in ({"--flops": "1e21"} | change).items() for word in pair]
    assert cli.main(["scaling", "predict", str(directory), *flat]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert all(word in said for word in words), said


def test_the_loss_of_any_run(exact, noisy):
    """Over-trained, within the data, and beyond it."""
    for params, tokens in ((3e7, 3e11), (1e9, 2e10), (1e11, 1e13)):
        told = predict_run(exact, SETTINGS, params, tokens)
        assert told.loss.value == pytest.approx(float(LAW.loss(params, tokens)), rel=1e-7)
        assert told.flops == pytest.approx(6 * params * tokens)
    told = predict_run(noisy, SETTINGS, 1e9, 1e12)
    low, high = told.loss.interval
    assert low < LAW.loss(1e9, 1e12) < high
    wider = told.loss_with_model_error.interval
    assert wider[0] < low < high < wider[1]
    spans = np.log10([noisy.points.flops.max(), noisy.points.tokens.max()])
    beyond = max(np.log10(6e21) - spans[0], 12 - spans[1])
    assert told.decades == pytest.approx(beyond)
    said = [one.message for one in told.findings if one.code == "extrapolation"]
    assert any(message.startswith("D = ") for message in said)
    inside = predict_run(noisy, SETTINGS, 5e8, 5e9)
    assert inside.decades == 0
    again = predict_run(noisy, SETTINGS, 5e8, 5e9, unique_tokens=1e9)
    assert again.epochs == pytest.approx(5)
    assert "data_repeated" in {one.code for one in again.findings}


def test_a_run_on_the_command_line(tmp_path, capsys):
    rows = scaling_cases.csv_rows(scaling_cases.surface(noise=2e-3))
    scaling_cases.write_fit(tmp_path / "fit", rows, SETTINGS)
    words = ["scaling", "predict", str(tmp_path / "fit")]
    assert cli.main([*words, "--params", "1e9", "--tokens", "1e12"]) == 0
    said = capsys.readouterr().out
    assert "tokens per parameter" in said
    assert cli.main([*words, "--params", "1e9", "--tokens", "1e12", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["predictions"]
    assert found["loss"]["value"] == pytest.approx(float(LAW.loss(1e9, 1e12)), rel=0.02)
    for wrong in ([], ["--params", "1e9"], ["--flops", "1e20", "--params", "1e9", "--tokens", "1"]):
        assert cli.main([*words, *wrong]) == 2
        assert "give --flops C, or --params N and --tokens D" in capsys.readouterr().err
