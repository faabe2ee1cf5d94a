import json
from dataclasses import replace

import numpy as np
import pytest
from scaling_cases import LAW, csv_rows, points, published, surface, write_fit

from prime_jax.errors import UserError
from prime_jax.scaling import record
from prime_jax.scaling.fits import fit_family, fit_runs
from prime_jax.scaling.laws import Compute, PowerLaw, exponent, optimum
from prime_jax.scaling.points import select
from prime_jax.scaling.schema import as_dict
from prime_jax.scaling.settings import Choice, Settings
from prime_jax.scaling.table import Table

QUICK = Settings(replicates=100)


def codes(family):
    return {diagnostic.code for diagnostic in family.warnings}


def refusals(diagnostics):
    return [diagnostic.code for diagnostic in diagnostics if diagnostic.refusal]


def select_rows(rows, **choice):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    names = [f"row {k}" for k in range(2, len(rows) + 2)]
    return select(Table(rows, names, columns, "runs.csv", "0" * 64), Choice(**choice))


def fit_rows(rows, **choice):
    return fit_runs(select_rows(rows, **choice), QUICK)


def three_kinds():
    return [row for family in ("arm", "mdm", "prime") for row in csv_rows(published(family))]


@pytest.fixture(scope="module")
def three():
    return fit_rows(three_kinds())


def test_a_surface_is_recovered_in_flops_that_are_not_6nd():
    compute = Compute(11.0, 0.92)
    family = fit_family(surface(compute=compute), QUICK)
    assert (family.compute.k, family.compute.q) == pytest.approx((11.0, 0.92), rel=1e-9)
    assert vars(family.approach3.law) == pytest.approx(vars(LAW), rel=1e-7)
    assert family.approach2.a == pytest.approx(exponent(LAW, compute), abs=0.01)
    assert codes(family) == set()


def part_of(points, keep):
    names = ("flops", "params", "tokens", "loss", "loss_se", "budget")
    return replace(points, **{name: getattr(points, name)[keep] for name in names})


def one_budget():
    part = surface(ratios=(0.3, 0.5, 0.7, 1, 1.5, 2, 3))
    return part_of(part, part.budget == part.budget[0])


def one_size():
    flops = np.geomspace(1e18, 1e20, 8)
    params = np.full(8, 1e8)
    return points("one", flops, params, LAW.loss(params, flops / 6e8))


@pytest.mark.parametrize(
    ("part", "code"),
    [
        (one_budget(), "too_few_budgets"),
        (one_size(), "too_few_points"),
        (part_of(surface(), np.arange(20) < 5), "too_few_points"),
    ],
    ids=["one budget", "one size", "five runs"],
)
def test_too_little_data_is_refused(part, code):
    family = fit_family(part, QUICK)
    assert family.approach3.params is None
    assert code in refusals(family.warnings)


def test_nothing_fitted_is_bad_input():
    part = surface()
    two = part_of(part, np.arange(20) < 2)
    with pytest.raises(UserError, match="2 runs"):
        fit_rows(csv_rows(two))


def test_few_runs_and_bounds_are_warned_about():
    few = fit_family(surface(ratios=(0.5, 1, 2), noise=0.001), QUICK)
    assert "too_few_points" in codes(few)
    assert not refusals(few.warnings)
    flat = surface(PowerLaw(E=1.8, A=1e-20, B=2000.0, alpha=0.34, beta=0.38))
    grid = np.tile([1e6, 3e6, 1e7, 3e7, 1e8], 4)
    tokens = flat.flops / (6 * grid)
    flat = replace(flat, params=grid, tokens=tokens, loss=1.8 + 2000 * tokens**-0.38)
    assert "bound_hit" in codes(fit_family(flat, QUICK))


def test_e_above_the_lowest_loss_is_warned_about():
    part = surface()
    odd = np.where(np.arange(20) == 12, 0.6, 1.0)
    assert "e_above_lowest_loss" in codes(fit_family(replace(part, loss=part.loss * odd), QUICK))


def test_a_delta_below_the_noise_is_warned_about():
    part = surface(noise=0.004)
    assert "delta_too_small" in codes(fit_family(part, replace(QUICK, delta=1e-5)))
    assert "delta_too_small" not in codes(fit_family(part, QUICK))


def test_what_the_runs_do_not_identify_is_warned_about():
    # At budgets this small E is a few percent of the losses, within their noise.
    law = PowerLaw(E=0.05, A=40.0, B=60.0, alpha=0.2, beta=0.2)
    family = fit_family(surface(law, budgets=(1e14, 3e14, 1e15), noise=0.02, seed=3), QUICK)
    assert "not_identified" in codes(family)
    assert family.approach3.profile["E"][0] is None
    assert "not_identified" not in codes(fit_family(published("mdm"), QUICK))


def test_runs_without_gaps_between_their_budgets_can_be_fitted():
    rng = np.random.default_rng(0)
    params, tokens = np.exp(rng.uniform(np.log([1e7, 1e9]), np.log([1e9, 1e11]), (300, 2))).T
    part = points("random", 6 * params * tokens, params, LAW.loss(params, tokens))
    part = replace(part, budget=np.full(300, 1e19))
    family = fit_family(part, QUICK)
    assert vars(family.approach3.law) == pytest.approx(vars(LAW), rel=1e-6)


def test_precise_runs_count_more():
    part = surface(ratios=(0.25, 0.5, 1, 2, 4) * 2)
    off = np.tile(np.repeat([0.0, 0.02], 5), 4) * np.random.default_rng(0).standard_normal(40)
    part = replace(part, loss=part.loss * np.exp(off))
    se = np.tile(np.repeat([1e-4, 0.02], 5), 4) * part.loss
    even, uneven = fit_family(part, QUICK), fit_family(replace(part, loss_se=se), QUICK)
    np.testing.assert_array_equal(even.approach3.problem.weight_n, 1.0)
    errors = [abs(f.approach3.law.alpha - LAW.alpha) for f in (even, uneven)]
    assert errors[1] < 0.5 * errors[0]


def test_checkpoints_of_runs_are_resampled_together():
    rows = [
        row | {"run": f"r{k // 2}", "step": k % 2}
        for k, row in enumerate(csv_rows(surface(noise=0.004)))
    ]
    apart = [row | {"run": f"r{k}"} for k, row in enumerate(rows)]
    together, alone = (select_rows(r).families["known"] for r in (rows, apart))
    assert np.bincount(together.run).tolist() == [2] * 10
    assert alone.run is None
    assert "checkpoints_of_one_run" in {f.code for f in together.diagnostics}
    wide, narrow = (fit_family(part, QUICK).approach3 for part in (together, alone))
    assert vars(wide.fit.law) == vars(narrow.fit.law)
    assert np.std(wide.replicates.alpha) != np.std(narrow.replicates.alpha)
    (low, high), (lower, higher) = wide.profile["a"], narrow.profile["a"]
    assert high - low > 1.4 * (higher - lower)


def test_runs_of_one_trajectory_are_resampled_together_also_from_what_is_stored(tmp_path):
    part = csv_rows(surface(noise=0.004))
    rows = [row | {"run": f"r{k}", "trajectory": f"t{k % 5}"} for k, row in enumerate(part)]
    ladders = select_rows(rows).families["known"]
    assert np.bincount(ladders.run).tolist() == [4] * 5
    assert {"runs_of_one_trajectory"} == {f.code for f in ladders.diagnostics if "run" in f.code}
    checkpoints = [row | {"run": row["trajectory"], "trajectory": "", "step": k} for k, row in enumerate(rows)]  # fmt: skip
    found = fit_family(ladders, QUICK).approach3
    as_checkpoints = fit_family(select_rows(checkpoints).families["known"], QUICK).approach3
    np.testing.assert_array_equal(found.replicates.alpha, as_checkpoints.replicates.alpha)
    assert found.profile == as_checkpoints.profile
    write_fit(tmp_path / "fit", rows, QUICK)
    again = record.load(tmp_path / "fit").families["known"].approach3
    np.testing.assert_array_equal(again.replicates.alpha, found.replicates.alpha)
    unknown = [row | {"trajectory": ""} for row in rows]
    assert select_rows(unknown).families["known"].run is None


def test_another_objective_is_used_and_recorded():
    runs = select_rows(csv_rows(published("mdm")))
    fit = fit_runs(runs, replace(QUICK, objective="ls"))
    found = as_dict(fit)
    assert found["method"]["delta"] is None
    assert found["method"]["settings"]["objective"] == "ls"
    residual = np.log(
        fit.families["mdm"].approach3.law.loss(published("mdm").params, published("mdm").tokens)
        / published("mdm").loss
    )
    cost = (residual**2 / 2).sum()
    assert found["families"]["mdm"]["approach3"]["objective"] == pytest.approx(cost, rel=1e-9)


def test_an_optimum_outside_the_sizes_is_warned_about():
    family = fit_family(surface(ratios=(2, 3, 4, 6, 8)), QUICK)
    assert {"extrapolation", "optimum_outside_range", "too_few_budgets"} <= codes(family)
    best = optimum(family.approach3.law, family.compute, 1e19).params
    assert best == pytest.approx(optimum(LAW, Compute(), 1e19).params, rel=1e-5)


def test_flops_that_do_not_follow_n_are_warned_about():
    part = surface()
    off = np.where(np.arange(20) % 2, 1.2, 1.0)
    assert "flops_not_a_power_law" in codes(
        fit_family(replace(part, tokens=part.tokens * off), QUICK)
    )


def test_families_of_another_kind_get_their_own_group(three):
    assert three.comparable == (("arm", "mdm"), ("prime",))
    assert [diagnostic.code for diagnostic in three.warnings] == ["mixed_kinds"]
    assert not three.refused
    assert fit_rows(three_kinds(), allow_mixed_kinds=True).comparable == (("arm", "mdm", "prime"),)


def test_a_refused_family_does_not_stop_the_others():
    mixed = [
        row | {"family": "mixed", "kind": ("nelbo", "train_loss")[k % 2]}
        for k, row in enumerate(csv_rows(surface()))
    ]
    fit = fit_rows(csv_rows(published("arm")) + mixed)
    assert fit.refused
    assert fit.families["arm"].approach3
    assert fit.families["mixed"].approach3.params is None
    assert fit.families["mixed"].approach2.a is None
    assert "mixed_kinds" in refusals(fit.families["mixed"].warnings)


def test_a_family_without_a_finished_run_is_refused_by_name():
    rows = [row | {"status": "done"} for row in csv_rows(surface())]
    lost = [
        row | {"status": "failed", "reason": "killed", "family": "lost", "loss": ""} for row in rows
    ]
    fit = fit_rows(rows + lost)
    assert fit.refused
    assert any("lost" in diagnostic.message for diagnostic in fit.warnings if diagnostic.refusal)


def test_small_budgets_are_called_an_illustration():
    assert "small_scale" in {
        f.code for f in fit_rows(csv_rows(surface(budgets=(1e13, 3e13, 1e14)))).warnings
    }
    assert "small_scale" not in {f.code for f in fit_rows(csv_rows(surface())).warnings}


def test_the_record_is_json_with_the_promised_places(three):
    found = json.loads(json.dumps(as_dict(three), allow_nan=False))
    assert found["schema"] == 2
    arm = found["families"]["arm"]
    law = arm["approach3"]
    assert law["params"] == pytest.approx(vars(three.families["arm"].approach3.law))
    assert law["a"] == pytest.approx(0.524, abs=5e-4)
    assert law["objective"] == pytest.approx(3.28809e-4, rel=1e-6)
    assert law["certificate"]["converged"] is True
    for name in ("E", "A", "B", "alpha", "beta", "a"):
        for ends in (law["intervals"][name], law["profile"][name]):
            assert ends[0] < law["params"].get(name, law["a"]) < ends[1]
    assert len(law["optima"]) == len(arm["approach2"]["optima"]) == 7
    for row in law["optima"]:
        for ends in (row["intervals"]["params"], row["profile"]["params"]):
            assert ends[0] < row["params"] < ends[1]
        assert row["flops"] == pytest.approx(6 * row["params"] * row["tokens"])
    assert arm["approach2"]["a"] == pytest.approx(0.535, abs=5e-4)
    assert set(arm["approach2"]["optima"][0]) >= {"flops", "params", "tokens", "loss"}
    frontier = law["frontier"]
    assert len(frontier["flops"]) == len(frontier["loss"]) == len(frontier["intervals"]["loss"][0])
    errors = arm["error_budget"]
    assert errors["seed"] == {"relative_sd": 0.0014, "basis": "assumed", "runs": 0}
    assert errors["tuning"] is None
    assert errors["evaluation"] is None
    assert errors["weights"] == [1, 1]
    assert 0.001 < errors["scatter"] < 0.01
    assert found["comparable"] == [["arm", "mdm"], ["prime"]]
    assert found["families"]["prime"]["kind"] == "train_loss"
    assert {"code", "message", "hint", "refusal"} == set(found["warnings"][0])


def test_a_censored_optimum_is_marked_and_has_no_interval():
    found = as_dict(fit_rows(csv_rows(surface(ratios=(2, 3, 4, 6, 8)))))
    two = found["families"]["known"]["approach2"]
    assert two["a"] is None
    assert {row["censored"] for row in two["optima"]} == {"below"}
    assert all(row["interval"] is None for row in two["optima"])


def test_the_same_seed_gives_the_same_record_and_another_does_not():
    runs = select_rows(csv_rows(published("arm")))
    first, again, other = (as_dict(fit_runs(runs, Settings(100, seed))) for seed in (0, 0, 1))
    assert first == again
    assert (
        first["families"]["arm"]["approach3"]["params"]
        == other["families"]["arm"]["approach3"]["params"]
    )
    assert first["families"] != other["families"]
