"""The law of repeated data."""

from dataclasses import replace

import numpy as np
import pytest
from scaling_cases import LAW, csv_rows, points, shared, write_csv
from scipy.optimize import minimize_scalar

from prime_jax import scaling
from prime_jax.cli import main
from prime_jax.errors import UserError
from prime_jax.scaling import approach3, fits, intervals
from prime_jax.scaling.approach3 import SILENT
from prime_jax.scaling.laws import Compute
from prime_jax.scaling.repeated import RepeatedForm, RepeatedLaw, growth
from prime_jax.scaling.settings import REPEATED, Settings

TRUTH = RepeatedLaw(**vars(LAW), R_D=15.0, R_N=5.0)
# The appendix of arXiv 2305.16264: logs of A, B and E, and one exponent for both.
PUBLISHED = RepeatedLaw(
    E=np.exp(0.6254804), A=np.exp(6.255414), B=np.exp(7.3049974), alpha=0.3526596,
    beta=0.3526596, R_D=15.387756, R_N=5.309743,
)  # fmt: skip
SETTINGS = Settings(replicates=100, law=REPEATED)
BUDGETS = (1e18, 3e18, 1e19, 3e19, 1e20)


def surface(law=TRUTH, noise=0.0, seed=0, epochs=(1, 4, 16, 64), ratios=(0.25, 0.5, 1, 2, 4)):
    """IsoFLOP runs, each with several numbers of epochs over what it sees."""
    rows = np.array(np.meshgrid(BUDGETS, ratios, epochs, indexing="ij")).reshape(3, -1)
    flops, ratio, passes = rows
    params = law.optimum(Compute(), flops).params * ratio
    tokens = Compute().tokens(flops, params)
    loss = law.loss(params, tokens, tokens / passes)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    return replace(points("known", flops, params, loss), unique=tokens / passes)


def problem(part, **how):
    return approach3.problem(
        part.params, part.tokens, part.loss, law=REPEATED, unique=part.available, **how
    )


def datablations():
    column = {
        n: v.astype(float) for n, v in shared("datablations_fit182.csv").items() if n != "name"
    }
    return approach3.problem(
        column["params"], column["tokens"], column["loss"], law=REPEATED,
        unique=column["unique_tokens"],
    )  # fmt: skip


def test_the_published_objective():
    p = datablations()
    at = p.form.theta(PUBLISHED)
    assert vars(p.form.law(at)) == pytest.approx(vars(PUBLISHED))
    assert p.value(at) == pytest.approx(0.015825935258, rel=1e-9)
    # It hardly changes where R_D does, once R_N is refitted: R_D is not identified.
    for r_d, objective in ((15, 0.015827), (80.8, 0.015808), (221.7, 0.015823)):

        def held(log_r_n, r_d=r_d):
            law = replace(PUBLISHED, R_D=r_d, R_N=np.exp(log_r_n))
            return p.value(p.form.theta(law))

        best = min(minimize_scalar(held, bounds=ends, options={"xatol": 1e-9}, method="bounded").fun
                   for ends in ((-2, 1), (0, 2), (1, 4)))  # fmt: skip
        assert best == pytest.approx(objective, abs=1.5e-6)


def test_our_fit_of_these_runs_is_a_minimum_below_it():
    p = datablations()
    found = approach3.fit(p)
    assert found.certificate.converged
    assert found.objective < 0.0157
    _, high = intervals.profiles(p, found, [p.form.quantities(Compute())["R_D"]])[0]
    assert high is None or high > 30


def test_reference():
    """The law as it is written, for one run."""
    params, tokens, unique = 3e9, 4e10, 5e9
    ratio = TRUTH.alpha * TRUTH.A / (TRUTH.beta * TRUTH.B)
    enough = min((ratio * unique**TRUTH.beta) ** (1 / TRUTH.alpha), params)
    size = enough + enough * 5 * (1 - np.exp(-(params / enough - 1) / 5))
    data = unique + unique * 15 * (1 - np.exp(-(tokens / unique - 1) / 15))
    expected = TRUTH.E + TRUTH.A / size**TRUTH.alpha + TRUTH.B / data**TRUTH.beta
    assert enough < params
    assert TRUTH.loss(params, tokens, unique) == pytest.approx(expected, rel=1e-13)
    assert TRUTH.loss(1e7, 1e10) == pytest.approx(LAW.loss(1e7, 1e10), rel=1e-13)


def test_derivatives_of_growth():
    v, r, h = np.array([0.01, 0.5, 3.0]), np.log([0.3, 5.0, 200.0]), 1e-5
    here = growth(v, r)
    by_v = [growth(v + s, r) for s in (h, -h)]
    by_r = [growth(v, r + s) for s in (h, -h)]
    for (up, down), first, second, mixed in (
        (by_v, here.v, here.vv, here.vr),
        (by_r, here.r, here.rr, here.vr),
    ):
        np.testing.assert_allclose((up.value - down.value) / (2 * h), first, rtol=1e-7, atol=1e-10)
        own, other = ("v", "r") if first is here.v else ("r", "v")
        slopes = (getattr(up, own) - getattr(down, own)) / (2 * h)
        np.testing.assert_allclose(slopes, second, rtol=1e-6, atol=1e-9)
        slopes = (getattr(up, other) - getattr(down, other)) / (2 * h)
        np.testing.assert_allclose(slopes, mixed, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_derivatives_are_those_of_differences(seed):
    rng = np.random.default_rng(seed)
    part = surface()
    form = RepeatedForm.on(part.params, part.tokens, part.available)
    theta = form.theta(TRUTH) + 0.2 * rng.standard_normal(7)
    weight = rng.uniform(0.5, 2, len(part.loss))

    def value(theta):
        return np.sum(weight * form.predict(theta[None])[0] ** 2 / 2)

    def gradient(theta):
        log_loss, parts = form.predict(theta[None])
        return form.derivatives(parts, weight * log_loss, weight[None])[0][0]

    step = 1e-5 * np.eye(7)
    slopes = [(value(theta + h) - value(theta - h)) / 2e-5 for h in step]
    np.testing.assert_allclose(gradient(theta), slopes, rtol=1e-6, atol=1e-6)
    bends = [(gradient(theta + h) - gradient(theta - h)) / 2e-5 for h in step]
    log_loss, parts = form.predict(theta[None])
    hessian = form.derivatives(parts, weight * log_loss, weight[None])[1][0]
    np.testing.assert_allclose(hessian, bends, rtol=2e-4, atol=2e-4)


def test_without_noise_the_law_comes_back():
    p = problem(surface())
    found = approach3.fit(p)
    assert vars(found.law) == pytest.approx(vars(TRUTH), rel=1e-5)
    assert found.certificate.converged
    assert np.abs(p.residual(found.theta_K)).max() < 1e6 * SILENT


@pytest.mark.parametrize("unique", [1e9, 2e10])
def test_the_best_split_of_a_budget_is_the_least_loss_along_it(unique):
    best = TRUTH.optimum(Compute(), 1e21, unique)

    def loss(log_params):
        return float(
            TRUTH.loss(np.exp(log_params), Compute().tokens(1e21, np.exp(log_params)), unique)
        )

    grid = np.linspace(np.log(1e8), np.log(1e12), 2001)
    start = grid[np.argmin([loss(x) for x in grid])]
    found = minimize_scalar(loss, bounds=(start - 0.01, start + 0.01), method="bounded")
    assert best.loss == pytest.approx(found.fun, rel=1e-9)
    assert best.params * best.tokens == pytest.approx(1e21 / 6)
    fresh = TRUTH.optimum(Compute(), 1e21)
    assert best.loss > fresh.loss
    assert fresh.params == pytest.approx(LAW.optimum(Compute(), 1e21).params)
    assert best.tokens / unique > 1


def test_draws_at_once_are_those_one_by_one():
    draws = RepeatedLaw(*(np.array([value, 1.1 * value]) for value in vars(TRUTH).values()))
    together = fits.optimum(draws, Compute(), 1e20, 1e9)
    for k in range(2):
        law = RepeatedLaw(*(value[k] for value in vars(draws).values()))
        assert together.params[k] == pytest.approx(law.optimum(Compute(), 1e20, 1e9).params)


def columns(**families):
    rows = [
        row | {"unique_tokens": u}
        for name, part in families.items()
        for row, u in zip(csv_rows(replace(part, family=name)), part.unique.tolist(), strict=True)
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.slow
def test_a_fit_by_it_has_all_that_a_fit_has(tmp_path, capsys):
    longer, few = replace(TRUTH, R_D=60.0), {"noise": 2e-3, "ratios": (0.25, 1, 4)}
    data = columns(arm=surface(**few), mdm=surface(longer, seed=1, **few))
    found = scaling.fit(data, law=REPEATED, replicates=100)
    three = found.families["arm"].approach3
    assert three.certificate.converged
    for name, truth in vars(TRUTH).items():
        low, high = three.profile[name]
        assert low < truth < high, name
    assert "data_repeated" not in {one.code for one in found.families["arm"].warnings}
    assert len(found.families["arm"].rollout.steps) == 2
    assert found.families["arm"].approach2.a == pytest.approx(three.a, abs=0.05)
    (pair,) = found.repetition
    assert (pair.family, pair.other, pair.significant) == ("mdm", "arm", True)
    assert pair.interval[0] < 4 < pair.interval[1]
    alone = scaling.frontier(data, law=REPEATED).families["arm"].free.params
    assert alone == found.families["arm"].frontier.free.params
    run = scaling.predict(found, params=1e9, tokens=2e10, unique_tokens=2e7, family="arm")["arm"]
    assert run.decades == pytest.approx(np.log10(1000 / 64))
    assert any("D / unique tokens = 1000" in one.message for one in run.findings)
    found.save(tmp_path / "fit")
    assert "profits longest" in (tmp_path / "fit" / "report.html").read_text()

    told = scaling.predict(found, 1e20, family="arm", unique_tokens=1e9)["arm"]
    best = TRUTH.optimum(Compute(), 1e20, 1e9)
    low, high = told.approach3.params.interval
    assert low < best.params < high
    assert told.epochs == pytest.approx(told.approach3.tokens.value / 1e9)
    codes = {one.code for one in told.findings}
    assert "data_repeated" not in codes
    assert "of_fresh_data" in codes
    assert told.approach2 is None
    words = ["scaling", "predict", str(tmp_path / "fit"), "--flops", "1e20", "--data-limit", "1e9"]
    assert main([*words, "--family", "arm"]) == 0
    assert "D* / unique tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="R_D of families stands in the output of fit"):
        scaling.compare(found, "arm")
    with pytest.raises(UserError, match="knows only the law"):
        scaling.design(found, "arm", target=1e21, budget=1e20)


@pytest.mark.slow
def test_an_end_that_the_search_sets_is_open():
    """A family that loses nothing by repetition: its R_D ends at the bound of the search."""
    endless = surface(replace(TRUTH, R_D=1e7), noise=2e-3, seed=1, epochs=(1, 4, 16))
    families = {
        name: fits.fit_family(part, SETTINGS)
        for name, part in (("arm", surface(noise=2e-3)), ("mdm", endless))
    }
    (pair,) = fits._repetitions(families, 0.95)
    assert (pair.family, pair.interval[1], pair.significant) == ("mdm", None, True)
    assert pair.interval[0] > 1
    (back,) = fits._repetitions(dict(reversed(families.items())), 0.95)
    assert (back.family, back.interval[0], back.significant) == ("arm", None, True)


def test_runs_that_all_repeat_their_data_leave_approach_2_out():
    found = fits.fit_family(surface(noise=2e-3, epochs=(4, 16)), SETTINGS)
    assert found.approach2.a is None
    assert found.approach3.law.R_D > 0
    assert found.frontier.free.params is None


def test_without_repeated_runs_it_is_refused(tmp_path, capsys):
    once = surface(epochs=(1,))
    path = write_csv(tmp_path / "once.csv", csv_rows(once))
    assert main(["fit", str(path), "--law", "repeated", "--bootstrap", "100"]) == 3
    said = capsys.readouterr().out
    assert "no run saw its data more than once; R_D needs 3" in " ".join(said.split())


def covered(repeats):
    """How often the profile interval of R_D holds the truth; fits start there, to save time."""
    count = 0
    for seed in range(repeats):
        p = problem(surface(noise=0.004, seed=seed))
        ends, _ = approach3.solve(p, p.form.theta(TRUTH)[None], p.weight_n[None])
        found = approach3.Fit(p.form.law(ends[0]), ends[0], p.value(ends[0]), None)
        low, high = intervals.profiles(p, found, [p.form.quantities(Compute())["R_D"]])[0]
        count += (low is None or low <= TRUTH.R_D) and (high is None or high >= TRUTH.R_D)
    return count / repeats


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say():
    assert 0.93 <= covered(400) <= 0.97
