from dataclasses import replace

import numpy as np
import pytest
from scaling_cases import BUDGETS, LAW, ORACLE, published, surface

from prime_jax.scaling import approach2
from prime_jax.scaling.intervals import known_percentiles
from prime_jax.scaling.laws import Compute, PowerLaw, exponent, optimum

EVEN = PowerLaw(E=1.8, A=400.0, B=400.0, alpha=0.35, beta=0.35)  # curves symmetric in log N


def codes(isoflop):
    return {diagnostic.code for diagnostic in isoflop.warnings}


@pytest.mark.parametrize("family", tuple(ORACLE["families"]))
def test_published_exponents(family):
    isoflop = approach2.fit(published(family), Compute())
    assert isoflop.a == pytest.approx(
        ORACLE["families"][family]["expected"]["approach2_a"], abs=5e-4
    )
    assert not isoflop.warnings
    assert len(isoflop.inside) == 7


def test_vertices_of_symmetric_valleys_are_the_optima():
    isoflop = approach2.fit(surface(EVEN), Compute())
    true = optimum(EVEN, Compute(), np.array(BUDGETS))
    found = [curve.optimum for curve in isoflop.inside]
    np.testing.assert_allclose([o.params for o in found], true.params, rtol=1e-6)
    np.testing.assert_allclose([o.tokens for o in found], true.tokens, rtol=1e-6)
    assert isoflop.a == pytest.approx(exponent(EVEN, Compute()), abs=1e-9)


@pytest.mark.parametrize(
    ("ratios", "side"), [((2, 3, 4, 8), "below"), ((0.1, 0.2, 0.4, 0.6), "above")]
)
def test_an_optimum_outside_the_sizes_is_a_bound(ratios, side):
    part = surface(ratios=ratios)
    isoflop = approach2.fit(part, Compute())
    assert {curve.censored for curve in isoflop.curves} == {side}
    assert isoflop.inside == ()
    assert isoflop.a is None
    assert codes(isoflop) == {"optimum_outside_range", "too_few_budgets"}
    for curve in isoflop.curves:
        mine = part.budget == curve.flops
        params = part.params[mine]
        assert curve.optimum.params == (params.min() if side == "below" else params.max())
        assert curve.optimum.loss == part.loss[mine].min()


def test_one_censored_budget_is_left_out_of_the_exponent():
    low, rest = surface(EVEN, BUDGETS[:1], ratios=(1.6, 2, 3, 4)), surface(EVEN, BUDGETS[1:])
    fields = ("flops", "params", "tokens", "loss", "loss_se", "budget")
    joined = {name: np.concatenate([getattr(low, name), getattr(rest, name)]) for name in fields}
    isoflop = approach2.fit(replace(rest, **joined), Compute())
    assert [curve.censored for curve in isoflop.curves] == ["below", None, None, None]
    assert isoflop.a == pytest.approx(exponent(EVEN, Compute()), abs=1e-9)


def test_a_maximum_gives_nothing():
    part = surface()
    isoflop = approach2.fit(replace(part, loss=10 - part.loss), Compute())
    assert isoflop.curves == ()
    assert "negative_curvature" in codes(isoflop)


def test_two_sizes_give_nothing_however_often_repeated():
    part = surface(ratios=(0.5, 2, 2, 2))
    isoflop = approach2.fit(part, Compute())
    assert isoflop.curves == ()
    assert {"too_few_points", "too_few_budgets"} <= codes(isoflop)


def test_two_budgets_have_optima_but_no_exponent():
    isoflop = approach2.fit(surface(budgets=BUDGETS[:2]), Compute())
    assert len(isoflop.inside) == 2
    assert isoflop.a is None
    assert [f.code for f in isoflop.warnings if f.refusal] == ["too_few_budgets"]


def test_runs_of_different_flops_are_no_budget():
    part = surface()
    flops = part.flops * (part.params / part.params.mean()) ** 0.2
    isoflop = approach2.fit(replace(part, flops=flops), Compute())
    assert isoflop.curves == ()
    assert "budget_ambiguous" in codes(isoflop)


def test_draws_are_repeatable_and_cover_the_truth():
    covered = 0
    for seed in range(40):
        isoflop = approach2.fit(surface(EVEN, noise=0.003, seed=seed), Compute())
        draws = approach2.redraw(isoflop, 400, seed=seed)
        low, high = known_percentiles(draws.a)
        covered += low <= exponent(EVEN, Compute()) <= high
    np.testing.assert_array_equal(draws.a, approach2.redraw(isoflop, 400, seed=39).a)
    assert covered >= 34


def test_no_interval_without_degrees_of_freedom_or_with_flat_valleys():
    assert approach2.redraw(approach2.fit(surface(ratios=(0.5, 1, 2)), Compute()), 200, 0) is None
    noisy = surface(EVEN, ratios=(0.8, 0.9, 1.1, 1.2), noise=0.003, seed=2)
    isoflop = approach2.fit(noisy, Compute())
    draws = approach2.redraw(isoflop, 400, 0)
    assert all(known_percentiles(column) is None for column in draws.params.T)
    known = replace(isoflop, a=0.5)
    for missing in (draws, None):
        assert [f.code for f in approach2.why_no_interval(known, missing, 0.95)] == [
            "interval_unbounded"
        ]
    assert approach2.why_no_interval(replace(isoflop, a=None), draws, 0.95) == ()


def test_the_shift_on_asymmetric_valleys_is_small():
    a = approach2.fit(surface(), Compute()).a
    assert a == pytest.approx(exponent(LAW, Compute()), abs=0.01)


def test_sizes_far_from_the_optimum_are_warned_about():
    centred = approach2.fit(surface(EVEN), Compute())
    assert not codes(centred)
    high = approach2.fit(surface(EVEN, ratios=(0.8, 1, 2, 4, 8)), Compute())
    assert codes(high) == {"off_centre_grid"}


def test_sizes_that_drift_past_the_optimum_are_warned_about():
    steps = np.geomspace(0.5, 2, len(BUDGETS))
    parts = [
        surface(EVEN, [budget], np.geomspace(1 / 8, 8, 9) * step)
        for budget, step in zip(BUDGETS, steps, strict=True)
    ]
    fields = ("flops", "params", "tokens", "loss", "loss_se", "budget")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in fields}
    assert codes(approach2.fit(replace(parts[0], **joined), Compute())) == {"drifting_grid"}
