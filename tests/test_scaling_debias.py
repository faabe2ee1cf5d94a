from dataclasses import replace

import numpy as np
import pytest
from scaling_cases import BUDGETS, LAW, ORACLE, published, surface

from prime_jax.scaling import approach2, approach3
from prime_jax.scaling.fits import fit_family
from prime_jax.scaling.intervals import known_percentiles
from prime_jax.scaling.laws import Compute, PowerLaw, exponent, optimum
from prime_jax.scaling.points import SEED
from prime_jax.scaling.settings import Settings

STEEP = PowerLaw(E=1.8, A=400.0, B=2000.0, alpha=0.34, beta=0.28)  # the case of the literature
TRUE = np.log(optimum(STEEP, Compute(), np.array(BUDGETS)).params)


def repeated(law, replicates=50):
    return PowerLaw(*(np.full(replicates, value) for value in vars(law).values()))


def fitted_law(points):
    return approach3.fit(approach3.problem(points.params, points.tokens, points.loss)).law


def corrected(points, law, compute=None, **options):
    compute = compute or Compute()
    isoflop = approach2.fit(points, compute, **options)
    draws = approach2.redraw(isoflop, 50, 0)
    return isoflop, approach2.take_shift_off(isoflop, draws, law, repeated(law), compute, 0)


@pytest.mark.parametrize(("reach", "percent"), [(2, 0.33), (4, 1.3), (8, 3.0), (16, 5.4)])
def test_the_shift_of_a_parabola_and_its_removal(reach, percent):
    isoflop, better = corrected(surface(STEEP, ratios=np.geomspace(1 / reach, reach, 13)), STEEP)
    raw = np.log([curve.optimum.params for curve in isoflop.inside]) - TRUE
    np.testing.assert_allclose(100 * np.expm1(raw), percent, rtol=0.05)
    np.testing.assert_allclose(better.shift_K, raw, atol=1e-9)
    left = np.log([best.params for best in better.optima]) - TRUE
    assert np.abs(left).max() < 0.1 * np.abs(raw).max()
    assert np.abs(left).max() < 1e-9


@pytest.mark.parametrize(
    "ratios",
    [np.geomspace(1 / 8, 8, 9) * 2, np.geomspace(1 / 8, 8, 9) / 2, (0.1, 0.2, 0.9, 3, 4, 9)],
    ids=["high", "low", "uneven"],
)
@pytest.mark.parametrize("fitted", [True, False], ids=["fitted exponents", "rough exponents"])
def test_grids_that_are_not_centred(ratios, fitted):
    points = surface(STEEP, ratios=ratios)
    law = fitted_law(points) if fitted else replace(STEEP, alpha=0.35, beta=0.29)  # fmt: skip
    isoflop, better = corrected(points, law)
    raw = np.log([curve.optimum.params for curve in isoflop.inside]) - TRUE
    left = np.log([best.params for best in better.optima]) - TRUE
    assert np.abs(left).max() < (1e-6 if fitted else 0.35) * np.abs(raw).max()
    assert better.a == pytest.approx(float(exponent(STEEP, Compute())), abs=1e-6)


def test_a_shift_that_changes_with_the_budget_biases_the_exponent():
    parts = [
        surface(STEEP, [budget], np.geomspace(1 / reach, reach, 9))
        for budget, reach in zip(BUDGETS, (16, 8, 4, 2), strict=True)
    ]
    names = ("flops", "params", "tokens", "loss", "loss_se", "budget")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    isoflop, better = corrected(replace(parts[0], **joined), STEEP)
    true = float(exponent(STEEP, Compute()))
    assert abs(isoflop.a - true) > 0.01
    assert better.a == pytest.approx(true, abs=1e-9)


def test_flops_that_are_not_6nd_and_weights():
    compute = Compute(11.0, 0.92)
    points = surface(STEEP, ratios=np.geomspace(1 / 8, 8, 9), compute=compute)
    weight = np.random.default_rng(0).uniform(0.2, 2, len(points.loss))
    isoflop, better = corrected(points, STEEP, compute, weight_n=weight)
    true = optimum(STEEP, compute, np.array(BUDGETS)).params
    np.testing.assert_allclose([best.params for best in better.optima], true, rtol=1e-9)
    even = approach2.fit(points, compute)
    assert isoflop.a != even.a


def test_weights_favour_the_runs_that_are_known_best():
    points = surface(LAW, ratios=(0.25, 0.5, 1, 2, 4, 4))
    wrong = np.arange(len(points.loss)) % 6 == 5
    points = replace(points, loss=np.where(wrong, points.loss * 1.05, points.loss))
    weight = np.where(wrong, 1e-9, 1.0)
    found = approach2.fit(points, Compute(), weight_n=weight).a
    assert found == pytest.approx(approach2.fit(surface(LAW), Compute()).a, abs=1e-6)
    assert approach2.fit(points, Compute()).curves[0].optimum.params < found * 1e12


def test_equal_exponents_have_no_shift_on_centred_grids():
    even = PowerLaw(E=1.8, A=400.0, B=400.0, alpha=0.35, beta=0.35)
    _, better = corrected(surface(even, ratios=np.geomspace(1 / 16, 16, 9)), even)
    np.testing.assert_allclose(better.shift_K, 0, atol=1e-9)


def test_a_vertex_that_no_law_explains_gives_nothing():
    isoflop = approach2.fit(surface(STEEP, ratios=np.geomspace(1 / 4, 64, 9)), Compute())
    curve = isoflop.curves[0]
    assert np.isnan(approach2.unshifted(curve, curve.minimum + 50, STEEP, Compute()))
    steep = replace(STEEP, alpha=5.0, beta=5.0)
    assert approach2.take_shift_off(isoflop, None, steep, repeated(steep), Compute(), 0) is None


def test_three_points_have_a_value_without_an_error():
    _, better = corrected(surface(STEEP, ratios=(0.5, 1, 2)), STEEP)
    assert better.a == pytest.approx(float(exponent(STEEP, Compute())), abs=1e-9)
    assert better.a_R is None


def test_a_censored_budget_is_a_bound_that_binds_only_if_it_contradicts():
    x, y = np.log([1e18, 1e19, 1e20, 1e21]), np.array([[0.0, 1.0, 2.0, 3.0]])
    sd = np.full(4, 0.1)
    slope = 1 / np.log(10)
    above = np.array([0, 0, 0, 1])

    def fitted(bound, side):
        return approach2.censored_slope(x, np.where(side == 0, y, bound), sd, side).item()

    assert approach2.censored_slope(x, y, sd, np.zeros(4, int)).item() == pytest.approx(slope)
    assert fitted(1.0, above) == pytest.approx(slope, abs=1e-9)
    assert fitted(4.0, above) > slope * 1.1
    assert fitted(4.0, -above) == pytest.approx(slope, abs=1e-9)
    assert fitted(1.0, -above) < slope * 0.9
    exact = approach2.censored_slope(x, np.repeat(np.where(above, 4.0, y), 3, 0), sd, above)
    np.testing.assert_allclose(exact, fitted(4.0, above), rtol=1e-12)


def test_the_published_valleys_barely_shift_and_their_edges_are_used():
    points = published("arm")
    family = fit_family(points, Settings(100))
    assert family.approach2.a == pytest.approx(
        ORACLE["families"]["arm"]["expected"]["approach2_a"], abs=5e-4
    )
    assert np.abs(family.approach2.debiased.shift_K).max() < 0.01
    assert family.approach2.debiased.a == pytest.approx(family.approach2.a, abs=0.01)
    cut = (points.budget == points.budgets[-1]) & (points.params > 1.2e9)
    names = ("flops", "params", "tokens", "loss", "loss_se", "budget")
    kept = replace(points, **{name: getattr(points, name)[~cut] for name in names})
    fewer = fit_family(kept, Settings(100))
    censored = fewer.approach2.curves[-1]
    assert censored.censored == "above"
    assert len(fewer.approach2.debiased.optima) == 6
    assert fewer.approach2.debiased.a == pytest.approx(family.approach2.debiased.a, abs=0.03)


def test_akima_follows_the_points_and_has_no_shift():
    ratios = np.geomspace(1 / 8, 8, 13)
    isoflop = approach2.fit(surface(STEEP, ratios=ratios), Compute(), "akima")
    found = np.log([curve.optimum.params for curve in isoflop.inside])
    np.testing.assert_allclose(found, TRUE, atol=0.003)
    curve = isoflop.curves[0]
    np.testing.assert_allclose(curve.loss(curve.params_n), curve.loss_n, rtol=1e-12)
    assert curve.optimum.loss == pytest.approx(curve.loss(curve.optimum.params), abs=1e-6)
    few = approach2.fit(surface(STEEP, ratios=(0.5, 1, 2, 4)), Compute(), "akima")
    assert few.curves == ()
    assert "too_few_points" in {diagnostic.code for diagnostic in few.warnings}
    edge = approach2.fit(surface(STEEP, ratios=(2, 3, 4, 5, 6)), Compute(), "akima")
    assert {curve.censored for curve in edge.curves} == {"below"}


def test_akima_has_the_noise_of_the_runs_and_not_the_misfit_of_a_parabola():
    """Wide sizes, which a parabola misfits by far more than the stated error."""
    points = surface(STEEP, ratios=np.geomspace(1 / 16, 16, 9), noise=1e-3)
    widths = []
    for error in (1e-4, 1e-3):
        known = replace(points, loss_se=error * points.loss, lr=None)
        isoflop = approach2.fit(known, Compute(), "akima")
        sd = np.hypot(error, SEED) * known.loss[known.budget == known.budgets[0]]
        np.testing.assert_allclose(isoflop.curves[0].sd_n, sd)
        low, high = known_percentiles(approach2.redraw(isoflop, 400, 0).a)
        assert low < float(exponent(STEEP, Compute())) < high
        widths.append(high - low)
    misfit = np.sqrt(isoflop.curves[0].squares / 6) / isoflop.curves[0].loss_n.mean()
    assert misfit > 3e-3
    assert widths[0] < widths[1]


@pytest.mark.parametrize(
    ("alpha", "beta", "says"),
    [(0.1, 1.0, "by a factor of 5"), (0.2, 0.8, "out of the sampled sizes at 1e18, 3e18")],
)
def test_what_no_parabola_could_miss_is_not_taken_off(alpha, beta, says):
    ratios = np.geomspace(1 / 1.1, 8, 9)
    points = surface(STEEP, ratios=ratios)
    isoflop, better = corrected(points, replace(STEEP, alpha=alpha, beta=beta))
    assert says in approach2.implausible(isoflop, better).message
    isoflop, better = corrected(surface(STEEP, ratios=ratios), STEEP)
    assert approach2.implausible(isoflop, better) is None


def test_a_fit_leaves_out_what_is_implausible_and_says_so(monkeypatch):
    monkeypatch.setattr(approach2, "MAX_SHIFT", 1.0)
    family = fit_family(surface(STEEP, noise=1e-3), Settings(100))
    assert family.approach2.debiased is None
    assert "debias_implausible" in {warning.code for warning in family.warnings}


def test_akima_takes_sizes_next_to_each_other_for_one():
    points = surface(STEEP, ratios=(0.2, 0.5, 1.0, 1.001, 2, 5), noise=0.01, seed=1)
    for curve in approach2.fit(points, Compute(), "akima").curves:
        fine = curve.loss(np.geomspace(curve.low, curve.high, 400))
        assert fine.min() > curve.loss_n.min() - 0.1
    near = surface(STEEP, ratios=(1, 1.001, 1.002, 1.003, 1.004))
    assert approach2.fit(near, Compute(), "akima").curves == ()


def test_akima_is_not_debiased():
    points = surface(STEEP, ratios=np.geomspace(1 / 8, 8, 9), noise=1e-3)
    family = fit_family(points, Settings(100, approach2="akima"))
    assert family.approach2.debiased is None
    assert "debias_implausible" not in {warning.code for warning in family.warnings}


def test_akima_takes_the_mean_of_repeats_and_has_intervals():
    points = surface(LAW, ratios=(0.1, 0.3, 1, 1, 3, 10), noise=0.002)
    isoflop = approach2.fit(points, Compute(), "akima")
    draws = approach2.redraw(isoflop, 400, 0)
    low, high = known_percentiles(draws.a)
    assert low < float(exponent(LAW, Compute())) < high
    np.testing.assert_array_equal(draws.a, approach2.redraw(isoflop, 400, 0).a)


def test_a_valley_without_a_minimum_is_none():
    x = np.geomspace(1e8, 1e9, 5)
    made = approach2.fit_curve(1e19, x, 3 - 0.01 * np.log(x / 3e8) ** 2, np.ones(5), Compute())
    assert made is None
