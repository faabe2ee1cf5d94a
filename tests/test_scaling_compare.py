import json
from dataclasses import replace

import numpy as np
import pytest
from scaling_cases import LAW, csv_rows, points, published, surface, write_csv
from scipy.stats import kstest

from prime_jax import cli
from prime_jax.errors import UserError
from prime_jax.scaling import approach3, comparison, joint, multiplier
from prime_jax.scaling.laws import Compute, PowerLaw, optimum
from prime_jax.scaling.points import select
from prime_jax.scaling.schema import as_dict
from prime_jax.scaling.settings import Choice, Settings
from prime_jax.scaling.table import Table

QUICK = Settings(replicates=100)
# Published points (arXiv 2603.16077): C of mdm -> m, 95 % interval. In range from 6e19 on.
PUBLISHED = {6e19: (16.2, 14.9, 17.3), 1e20: (18.5, 16.8, 20.0), 3e20: (25.6, 22.2, 29.0)}


def named(part, family, **changes):
    return replace(part, family=family, **changes)


def runs_of(*parts, **choice):
    rows = [row for part in parts for row in csv_rows(part)]
    names = [f"row {k}" for k in range(2, len(rows) + 2)]
    return select(Table(rows, names, list(rows[0]), "runs.csv", "0" * 64), Choice(**choice))


def against(base, part, settings=QUICK, **choice):
    found = comparison.compare(runs_of(base, part, **choice), base.family, (), settings)
    return found.families[part.family]


@pytest.fixture(scope="module")
def mdm():
    return against(published("arm"), published("mdm"), Settings(replicates=500))


def test_published_multipliers(mdm):
    m = mdm.multiplier.at_family.arrays
    for k, flops in enumerate(m.flops):
        if flops not in PUBLISHED:
            assert not m.in_range[k]  # the baseline would need less than its smallest budget
            continue
        value, low, high = PUBLISHED[flops]
        assert m.in_range[k]
        assert m.median[k] == pytest.approx(value, rel=0.015)
        assert m.interval_2xK[:, k] == pytest.approx([low, high], rel=0.03)
    outside = mdm.multiplier.at_baseline.arrays
    assert not outside.in_range[-1]
    assert outside.interval_2xK[0, -1] < 120
    assert outside.interval_2xK[1, -1] > 1000
    assert {"multiplier_extrapolated", "exponents_do_not_differ"} <= {
        diagnostic.code for diagnostic in mdm.warnings
    }


def test_published_families_differ_in_e_and_not_in_exponents(mdm):
    exponents, e = mdm.tests.values()
    assert exponents.p > 0.2
    assert e.p < 0.03
    assert not mdm.exponents.approach3.significant
    assert {row.probability for row in mdm.lower} == {0}
    assert {row.interpolated for row in mdm.lower} <= {0, None}


def test_frontier_flops_is_the_inverse_of_the_optimum():
    compute = Compute(11.0, 0.92)
    flops = np.array([1e15, 1e20, 1e26])
    loss = optimum(LAW, compute, flops).loss
    np.testing.assert_allclose(multiplier.frontier_flops(LAW, compute, loss), flops, rtol=1e-8)
    np.testing.assert_array_equal(
        multiplier.frontier_flops(LAW, compute, [LAW.E, LAW.E - 0.1]), np.inf
    )


def test_a_constant_multiplier_is_found_by_both_ways():
    # Both terms larger by one factor c: the same frontier at c ** (1 / gamma) times the compute.
    c, gamma = 1.2, LAW.alpha * LAW.beta / (LAW.alpha + LAW.beta)
    worse = surface(replace(LAW, A=c * LAW.A, B=c * LAW.B), budgets=(3e18, 1e19, 3e19, 1e20))
    found = against(named(surface(), "base"), worse)
    for m in (found.multiplier.at_family.arrays, found.multiplier.at_baseline.arrays):
        np.testing.assert_allclose(m.value, c ** (1 / gamma), rtol=1e-6)
        known = np.isfinite(m.interpolated)
        assert known.any()
        np.testing.assert_allclose(m.interpolated[known], c ** (1 / gamma), rtol=0.05)
    equal = found.multiplier.at_family.arrays.flops / c ** (1 / gamma)
    np.testing.assert_array_equal(
        found.multiplier.at_family.arrays.in_range, (equal >= 1e18) & (equal <= 3e19)
    )


def side_of(part, law):
    one = PowerLaw(*(np.atleast_2d(value) for value in vars(law).values()))
    low, high = part.budgets[[0, -1]]
    return multiplier.Side(law, one, Compute(), np.array([]), np.array([]), None, low, high)


def test_a_loss_below_e_is_never_reached():
    high = replace(LAW, E=2.6)
    base = named(surface(budgets=(1e19, 1e20, 1e21, 1e22)), "base")
    found = comparison.compare(runs_of(base, surface(high)), "base", (), QUICK)
    m = found.families["known"].multiplier.at_baseline.arrays
    never = optimum(LAW, Compute(), m.flops).loss < high.E
    assert never.any()
    assert not never.all()
    np.testing.assert_array_equal(np.isinf(m.value), never)
    np.testing.assert_array_equal(m.never, never)
    assert not m.in_range[never].any()
    rows = as_dict(found)["families"]["known"]["multiplier"]["at_baseline"]["budgets"]
    assert [row["value"] is None for row in rows] == never.tolist()
    assert rows[-1]["interval"] == [None, None]
    # The other way about it is the baseline that never reaches the loss.
    family, other = (side_of(part, law) for part, law in ((base, LAW), (surface(high), high)))
    turned = multiplier.at_family(family, other, m.flops, 0.95)
    np.testing.assert_array_equal(turned.value == 0, never)


def test_a_family_against_its_twin():
    part = surface(noise=0.004)
    found = against(named(part, "twin"), part)
    np.testing.assert_allclose(found.multiplier.at_family.arrays.value, 1)
    np.testing.assert_allclose(
        found.multiplier.at_family.arrays.interval_2xK, 1
    )  # drawn together: no spread
    assert found.exponents.approach3.difference == 0
    assert not found.exponents.approach3.significant
    assert {row.probability for row in found.lower} == {0}
    assert all(test.p == 1 for test in found.tests.values())


def test_exponents_that_differ_are_told_apart():
    steep = replace(LAW, alpha=0.5, A=4000.0)
    budgets = (1e18, 1e19, 1e20, 1e21)
    pair = against(named(surface(budgets=budgets, noise=0.001), "base"), surface(steep, budgets=budgets, noise=0.001, seed=1))  # fmt: skip
    truth = LAW.beta / (steep.alpha + LAW.beta) - LAW.beta / (LAW.alpha + LAW.beta)
    for difference in vars(pair.exponents).values():
        assert difference.significant
    assert pair.exponents.approach3.difference == pytest.approx(truth, abs=0.01)
    assert pair.tests["exponents"].p == pytest.approx(1 / 101)  # none of 100 simulations
    assert "exponents_do_not_differ" not in {diagnostic.code for diagnostic in pair.warnings}


def test_cells_are_shared_by_size_and_budget():
    flops = np.array([1e18, 1e18, 1e18, 3e18])
    a = points("a", flops, np.array([1e7, 1e7, 2e7, 4e7]), np.ones(4))
    b = points("b", 1.02 * flops[1:], np.array([1.03e7, 3e7, 3.9e7]), np.ones(3))
    (of_a, of_b), budget = comparison.grid_cells([a, b])
    assert len(set(of_a.tolist())) == 4  # a repeat is a cell of its own
    assert of_b[0] == of_a[0]
    assert of_b[1] not in of_a
    assert of_b[2] == of_a[3]
    assert len(budget) == 5
    assert len(set(budget[of_a].tolist())) == 2


def test_families_are_drawn_together_and_budgets_keep_their_weight():
    a = surface(ratios=(0.25, 0.5, 1, 2, 4))
    keep = np.arange(20) % 5 != 3
    names = ("flops", "params", "tokens", "loss", "loss_se", "budget")
    b = replace(a, **{name: getattr(a, name)[keep] for name in names})
    of_a, of_b = comparison.grid_weights([a, b], 200, seed=3)
    for part, drawn in ((a, of_a), (b, of_b)):
        for budget in part.budgets:
            mine = part.budget == budget
            np.testing.assert_allclose(drawn[:, mine].sum(axis=1), mine.sum())
    np.testing.assert_array_equal(of_b == 0, of_a[:, keep] == 0)
    same = comparison.grid_weights([a, a], 50, seed=3)
    np.testing.assert_array_equal(*same)


def problems_of(*parts):
    found = [approach3.problem(part.params, part.tokens, part.loss) for part in parts]
    return found, [approach3.fit(problem) for problem in found]


def test_shared_laws_share_and_have_the_derivatives_of_their_sum():
    problems, fits = problems_of(surface(noise=0.01), surface(replace(LAW, E=2.3), noise=0.01, seed=1))  # fmt: skip
    cells = [np.arange(20), np.arange(20, 40)]
    for names in (joint.EXPONENTS, joint.IRREDUCIBLE):
        found = joint.likelihood_ratio(problems, fits, names, cells, 20, 0)
        for name in names:
            first, second = (getattr(law, name) for law in found.laws)
            assert first == pytest.approx(second, rel=1e-9)
        assert found.gradient < approach3.STATIONARY
        assert found.statistic >= 0
    both = joint.tied([replace(problem, delta=10.0) for problem in problems], joint.EXPONENTS)
    theta = both.join([fit.theta_K[None] + 0.05 for fit in fits])
    weight = np.array([[1.0], [3.0]])
    _, gradient, hessian = both.derivatives(theta, weight)
    for k in range(theta.shape[1]):
        step = 1e-5 * np.eye(theta.shape[1])[k]
        up, down = (both.derivatives(theta + s, weight) for s in (step, -step))
        np.testing.assert_allclose(gradient[0, k], (up[0] - down[0])[0] / 2e-5, rtol=1e-6)
        np.testing.assert_allclose(
            hessian[0, k], (up[1] - down[1])[0] / 2e-5, rtol=1e-5, atol=1e-8 * np.abs(hessian).max()
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "second"),
    [
        (joint.EXPONENTS, replace(LAW, E=2.2, A=500.0)),
        (joint.IRREDUCIBLE, replace(LAW, alpha=0.4)),
    ],
    ids=["exponents", "E"],
)
def test_p_is_uniform_where_the_parameters_are_shared(names, second):
    budgets, ratios = (1e18, 3e18, 1e19, 3e19, 1e20), (0.25, 0.4, 0.6, 1, 1.6, 2.5, 4)
    ps = []
    for seed in range(80):
        parts = [
            surface(law, budgets, ratios, noise=0.005, seed=2 * seed + k)
            for k, law in enumerate((LAW, second))
        ]
        problems, fits = problems_of(*parts)
        cells = [np.arange(35), np.arange(35, 70)]
        ps.append(joint.likelihood_ratio(problems, fits, names, cells, 99, seed).p)
    assert kstest(ps, "uniform").pvalue > 0.01
    assert np.mean(np.array(ps) <= 0.05) <= 0.13


def test_different_kinds_of_number_are_refused_unless_asked_for():
    arm, prime = published("arm"), published("prime")
    found = comparison.compare(runs_of(arm, prime), "arm", ("prime",), QUICK)
    assert found.refused
    assert found.families["prime"].multiplier is None
    assert [diagnostic.code for diagnostic in found.families["prime"].warnings] == ["mixed_kinds"]
    told = as_dict(found)["families"]["prime"]
    assert {name for name, part in told.items() if part} == {"kind", "mixed", "warnings"}


def test_other_evaluation_sets_are_refused_too():
    rows = [
        row | {"family": name, "tokenizer": name}
        for name in ("a", "b")
        for row in csv_rows(surface(noise=0.003))
    ]
    runs = select(Table(rows, [f"row {k}" for k in range(len(rows))], list(rows[0]), "x", ""))
    found = comparison.compare(runs, "a", ("b",), QUICK)
    assert [diagnostic.code for diagnostic in found.families["b"].warnings] == ["mixed_evaluations"]


def test_a_family_without_a_law_is_refused_and_the_others_are_not():
    few = named(surface(budgets=(1e18, 3e18)), "few")
    base = named(surface(noise=0.002), "base")
    other = surface(noise=0.002, seed=1)
    found = comparison.compare(runs_of(base, few, other), "base", ("few", "known"), QUICK)
    assert found.refused
    assert found.families["few"].multiplier is None
    assert found.families["few"].warnings[0].refusal
    assert found.families["known"].multiplier


@pytest.mark.parametrize(
    ("baseline", "others", "says"),
    [("nwon", (), "known"), ("known", ("known",), "another"), ("known", (), "another")],
)
def test_families_that_are_not_there(baseline, others, says):
    with pytest.raises(UserError, match=says):
        comparison.compare(runs_of(surface()), baseline, others, QUICK)


def command(*arguments):
    run, args = cli.parsed(["scaling", *map(str, arguments)])
    return run(args)


def test_the_command(tmp_path, capsys):
    base, other = named(surface(noise=0.002), "base"), surface(replace(LAW, E=2.0), noise=0.002, seed=1)  # fmt: skip
    mixed = [row | {"kind": "train_loss"} for row in csv_rows(other)]
    path = write_csv(tmp_path / "runs.csv", csv_rows(base) + mixed)
    flags = ("--baseline", "base", "--bootstrap", 100, "--seed", 2)
    assert command("compare", path, *flags) == 3
    assert "refused" in capsys.readouterr().out
    assert command("compare", path, *flags, "--allow-mixed-kinds") == 0
    printed = capsys.readouterr().out
    assert "mixed kinds" in printed
    assert "extrapolated" in printed
    found = json.loads((tmp_path / "runs-fit" / "compare.json").read_text())
    assert found["schema"] == 2
    assert found["baseline"] == {"family": "base", "kind": "nelbo"}
    assert found["method"]["bootstrap"] == 100
    assert found["allow_mixed_kinds"] is True
    known = found["families"]["known"]
    assert "training loss" in known["mixed"]
    assert known["kind"] == "train_loss"
    assert known["warnings"][0]["code"] == "mixed_kinds"
    for side in ("at_family", "at_baseline"):
        curve = known["multiplier"][side]["curve"]
        lengths = {len(curve[name]) for name in ("flops", "value", "median", "in_range")}
        assert lengths == {len(end) for end in curve["interval"]} == {comparison.CURVE}
    assert set(known["tests"]) == {"exponents", "E"}
    law = known["tests"]["exponents"]["params"]
    assert law["baseline"]["alpha"] == pytest.approx(law["family"]["alpha"])
