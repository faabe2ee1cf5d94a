from dataclasses import replace

import numpy as np
import pytest
from scaling_cases import LAW, csv_rows, surface

from prime_jax.scaling import approach1, fits
from prime_jax.scaling.approach1 import Curve, Curves
from prime_jax.scaling.fits import fit_family, fit_runs
from prime_jax.scaling.intervals import known_percentiles
from prime_jax.scaling.laws import Compute, exponent
from prime_jax.scaling.points import select
from prime_jax.scaling.schema import as_dict
from prime_jax.scaling.settings import Settings
from prime_jax.scaling.table import Table

TRUE = float(exponent(LAW, Compute()))
SIZES = np.geomspace(1e7, 3e9, 20)


def curve(params, end=1e21, noise=0.0, seed=0, schedule="constant"):
    flops = np.geomspace(end / 1e4, end, 150)
    tokens = flops / (6 * params)
    loss = LAW.loss(params, tokens) * np.exp(noise * np.random.default_rng(seed).standard_normal())
    return Curve(f"{params:.3g}", params, tokens, flops, loss, schedule)


def curves(sizes=SIZES, kind="nelbo", **extra):
    made = tuple(curve(n, seed=k, **extra) for k, n in enumerate(sizes))
    return Curves(made, kind, total=len(made))


def codes(envelope):
    return {diagnostic.code for diagnostic in envelope.warnings}


def test_the_exponents_of_a_known_law():
    envelope = approach1.fit(curves(), 200, 0)
    assert envelope.line.a == pytest.approx(TRUE, abs=0.003)
    assert envelope.line.a + envelope.line.b == pytest.approx(1)
    assert envelope.warnings == ()
    low, high = known_percentiles(envelope.a_R)
    assert low < TRUE < high < low + 0.2
    for best in envelope.optima:
        assert best.flops == pytest.approx(6 * best.params * best.tokens)
        assert best.loss == pytest.approx(LAW.loss(best.params, best.tokens), rel=1e-4)
        predicted = np.exp(envelope.line.log_params) * best.flops**envelope.line.a
        assert best.params == pytest.approx(predicted, rel=0.3)
    assert (np.diff(envelope.envelope.loss) < 0).all()


def test_noise_of_runs_is_covered_and_draws_are_repeatable():
    covered = 0
    for first in range(0, 400, 20):
        made = tuple(curve(n, noise=0.0015, seed=first + k) for k, n in enumerate(SIZES))
        envelope = approach1.fit(Curves(made, "nelbo"), 100, 0)
        low, high = known_percentiles(envelope.a_R)
        covered += low <= TRUE <= high
    assert covered >= 17
    np.testing.assert_array_equal(envelope.a_R, approach1.fit(Curves(made, "nelbo"), 100, 0).a_R)


def test_curves_of_one_trajectory_are_drawn_together():
    """Twice the same runs, as the first steps of a longer one are, say no more than once."""
    made = [curve(n, noise=0.0015, seed=k) for k, n in enumerate(SIZES)]
    twice = [replace(c, run=f"{c.run} {k}", trajectory=c.run) for c in made for k in range(2)]
    apart = [replace(c, trajectory=c.run) for c in twice]
    one, both, other = (approach1.fit(Curves(tuple(c), ""), 100, 0).a_R for c in (made, twice, apart))  # fmt: skip
    np.testing.assert_allclose(both, one, rtol=1e-9)
    assert np.nanstd(other) < 0.9 * np.nanstd(one)


def test_winners_without_competitors_on_both_sides_do_not_count():
    envelope = approach1.fit(curves(SIZES[:9]), 100, 0)  # the best sizes of most budgets are larger
    assert "winner_at_edge" in codes(envelope)
    assert max(best.params for best in envelope.optima) < SIZES[8]
    assert envelope.line.a == pytest.approx(TRUE, abs=0.03)
    stopped = [curve(n, end=1e21 if n < 2e8 else 1e18) for n in SIZES]
    best = approach1.fit(Curves(tuple(stopped), ""), 100, 0)
    assert best.envelope.flops.max() < 3e18  # beyond, the larger sizes did not lose: they had ended


def test_losses_on_the_way_down_are_refused():
    envelope = approach1.fit(curves(schedule="decays"), 100, 0)
    assert envelope.line is None
    assert [f.code for f in envelope.warnings if f.refusal] == ["schedule_decays"]
    mixed = (*curves().curves, curve(5e8, schedule="decays"))
    envelope = approach1.fit(Curves(mixed, "nelbo"), 100, 0)
    assert envelope.line.a == pytest.approx(TRUE, abs=0.003)
    assert codes(envelope) == {"schedule_decays"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"schedule": ""}, "schedule_unknown"),
        ({"kind": "train_loss"}, "curves_of_training_loss"),
    ],
)
def test_what_the_curves_do_not_say_is_warned_about(changes, code):
    assert codes(approach1.fit(curves(**changes), 100, 0)) == {code}


def test_too_few_sizes_are_refused():
    for sizes in (SIZES[:2], np.geomspace(1e7, 3e9, 4)):
        envelope = approach1.fit(curves(sizes), 100, 0)
        assert envelope.line is None
        assert [f.code for f in envelope.warnings if f.refusal] == ["too_few_winners"]
    few = approach1.fit(curves(np.geomspace(1e7, 3e9, 7)), 100, 0)
    assert few.line is not None
    assert "interval_unbounded" in codes(few)


def test_missing_curves_are_counted():
    part = Curves(curves().curves, "nelbo", missing=3, total=23)
    assert codes(approach1.fit(part, 100, 0)) == {"curves_missing"}


@pytest.fixture(scope="module")
def fitted():
    """A fit without training curves."""
    rows = csv_rows(surface(noise=1e-3))
    names = [f"row {k}" for k in range(2, len(rows) + 2)]
    runs = select(Table(rows, names, list(rows[0]), "runs.csv", "0" * 64))
    return fit_runs(runs, Settings(100))


def with_curves(fitted, lines):
    family = fit_family(fitted.data.families["known"], fitted.settings, lines)
    return replace(fitted, families={"known": family})


def test_a_refusal_counts_only_if_somebody_asked(fitted):
    assert not fitted.refused
    part = as_dict(fitted)["families"]["known"]["approach1"]
    assert part["a"] is None
    assert [item["code"] for item in part["warnings"]] == ["no_curves"]
    for asked in (True, False):
        lines = Curves(curves(schedule="decays").curves, "", asked=asked)
        refused = with_curves(fitted, lines)
        assert refused.refused is asked
        part = as_dict(refused)["families"]["known"]
        assert [item["code"] for item in part["approach1"]["warnings"]] == ["schedule_decays"]
        assert ("schedule_decays" in {item["code"] for item in part["warnings"]}) is asked


def test_the_record_has_the_three_approaches(fitted):
    part = as_dict(with_curves(fitted, curves()))["families"]["known"]
    one = part["approach1"]
    assert one["a"] == pytest.approx(TRUE, abs=0.003)
    assert one["kind"] == "nelbo"
    assert one["intervals"]["a"][0] < one["a"] < one["intervals"]["a"][1]
    assert set(one["optima"][0]) == {"flops", "params", "tokens", "loss"}
    assert len(one["envelope"]["flops"]) == len(one["envelope"]["loss"]) > 20
    two = part["approach2"]
    assert two["method"] == "parabola"
    low, high = two["debiased"]["intervals"]["a"]
    assert low < two["debiased"]["a"] < high
    assert {row["flops"] for row in two["debiased"]["optima"]} == set(part["budgets"])


def test_approaches_that_disagree_are_flagged():
    def apart(b, half):
        return fits.disagreements(
            {"approach 2": (0.5, [0.45, 0.55]), "approach 3": (b, [b - half, b + half])}
        )

    assert [diagnostic.code for diagnostic in apart(0.6, 0.05)] == ["approaches_disagree"]
    assert [diagnostic.code for diagnostic in apart(0.4, 0.05)] == ["approaches_disagree"]
    assert apart(0.55, 0.05) == []
    for alone, apart_ in ((0.1, True), (0.41, False)):
        found = fits.disagreements({"approach 1": (alone, None), "approach 3": (0.5, [0.4, 0.6])})
        assert bool(found) == apart_
    (both,) = fits.disagreements({"approach 2": (0.829, None), "approach 3": (0.452, None)})
    assert both.message.count("(no interval)") == 2


def test_curves_of_another_law_disagree_with_the_runs():
    other = tuple(replace(c, params=c.params**0.5 * 1e4) for c in curves().curves)
    family = fit_family(surface(noise=1e-3), Settings(100), Curves(other, "nelbo"))
    assert [f.code for f in family.warnings if f.code == "approaches_disagree"] == [
        "approaches_disagree"
    ] * 2
    assert "approaches_disagree" in {f.code for f in family.warnings}
