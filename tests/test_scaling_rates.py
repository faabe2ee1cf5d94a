"""The best learning rate as a law, and whether a rule drifts."""

import json
from dataclasses import replace

import fake_trainer
import numpy as np
import pytest
from scaling_cases import LAW, csv_rows, points, shared, write_csv

from prime_jax import scaling
from prime_jax.cli import main
from prime_jax.errors import UserError
from prime_jax.scaling import fits, rate_laws
from prime_jax.scaling.laws import Compute
from prime_jax.scaling.rate_laws import RateCell, RateForm, RateLaw
from prime_jax.scaling.settings import Settings
from prime_jax.sweep import grid, rules

TRUTH = RateLaw(k=2.0, n=-0.6, d=0.25, b=0.4)
BUDGETS = (1e18, 3e18, 1e19, 3e19, 1e20)
FACTORS = (0.25, 0.5, 1, 2, 4)
CURVATURE = 0.03


def surface(noise=0.0, seed=0, factors=FACTORS, shift=1.1, law=TRUTH, batches=(256, 512)):
    """Cells at rates about 1 / `shift` of the best one; `batches` alternate from cell to cell."""
    rng, rows = np.random.default_rng(seed), []
    sizes = [(c, r) for c in BUDGETS for r in (0.5, 1, 2)]
    for k, (flops, ratio) in enumerate(sizes):
        params = LAW.optimum(Compute(), flops).params * ratio
        tokens, batch = Compute().tokens(flops, params), batches[k % len(batches)]
        best = law.rate(params, tokens, batch)
        for factor in factors:
            off = np.log(factor / shift)
            loss = LAW.loss(params, tokens) + CURVATURE * off**2
            loss *= np.exp(noise * rng.standard_normal())
            rows.append((flops, params, loss, best * factor / shift, batch))
    flops, params, loss, lr, batch = np.array(rows).T
    return replace(points("known", flops, params, loss), lr=lr, batch=batch)


def test_without_noise_the_law_comes_back():
    found = rate_laws.fit(surface())
    assert vars(found.params) == pytest.approx(vars(TRUTH), rel=1e-6)
    assert found.certificate.converged
    assert found.certificate.agreeing == 1
    assert found.error < 1e-6
    assert {cell.censored for cell in found.cells} == {None}
    assert [cell.curvature for cell in found.cells] == pytest.approx([CURVATURE] * 15)
    assert found.at(1e9, 2e10, 512) == pytest.approx([TRUTH.rate(1e9, 2e10, 512)] * 2)


def test_of_one_batch_size_the_law_has_n_and_d():
    found = rate_laws.fit(surface(batches=(256,)))
    assert found.params.b == 0
    assert set(found.profile) == {"k", "n", "d"}
    assert found.params.n == pytest.approx(TRUTH.n)


def test_it_is_weighted_least_squares():
    found = rate_laws.fit(surface(noise=1e-3, seed=3))
    p = found.problem
    root = np.sqrt(p.weight_n)
    expected = np.linalg.lstsq(root[:, None] * p.form.features_nxK, root * p.log_loss_n, rcond=None)
    np.testing.assert_allclose(found.fit.theta_K, expected[0], rtol=1e-9)
    form = p.form
    assert isinstance(form, RateForm)
    np.testing.assert_allclose(form.theta(form.law(found.fit.theta_K)), found.fit.theta_K)


def test_the_error_of_a_best_rate_is_that_of_many_draws():
    best = [
        [cell.best for cell in rate_laws.cells_of(surface(noise=1e-3, seed=s))] for s in range(30)
    ]
    told = [cell.sd for cell in rate_laws.fit(surface(noise=1e-3)).cells]
    seen = np.log(best).std(axis=0)
    assert np.median(told / seen) == pytest.approx(1, abs=0.3)


def covered(repeats):
    """How often the profile intervals of n, and of the rate of a larger run, hold the truth."""
    counts, there = np.zeros(2), (3e9, 6e10, 512)
    for seed in range(repeats):
        found = rate_laws.fit(surface(noise=1e-3, seed=seed))
        pairs = (found.profile["n"], TRUTH.n), (found.at(*there), TRUTH.rate(*there))
        counts += [low <= truth <= high for (low, high), truth in pairs]
    return counts / repeats


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say():
    for fraction in covered(400):
        assert 0.93 <= fraction <= 0.97


def test_rates_at_an_edge_are_left_out_or_refused():
    part = surface()
    first = part.params == part.params[0]
    cut = part.only(~(first & (part.lr > np.sort(part.lr[first])[2])))  # its best rate is above
    found = rate_laws.fit(cut)
    edge = [cell for cell in found.cells if cell.censored]
    assert [cell.censored for cell in edge] == ["above"]
    assert edge[0].best == pytest.approx(edge[0].rates[1])
    assert "rate_at_edge" in {one.code for one in found.warnings}
    assert found.params.n == pytest.approx(TRUTH.n, rel=1e-4)

    beyond = rate_laws.fit(surface(factors=(0.1, 0.15, 0.2)))
    assert beyond.params is None
    assert "0 cells have their best rate within those sampled" in beyond.warnings[0].message
    none = rate_laws.fit(surface(factors=(1, 2)))
    assert none.warnings[0].code == "too_few_rates"
    assert not none.cells


def test_one_budget_does_not_tell_n_from_d():
    part = surface(batches=(256,))
    rows = part.only(part.budget == BUDGETS[2])
    more = [replace(rows, params=rows.params * f, tokens=rows.tokens / f) for f in (1, 1.3)]
    joined = {
        name: np.concatenate([getattr(one, name) for one in more])
        for name in ("flops", "params", "tokens", "loss", "loss_se", "budget", "lr", "batch")
    }
    found = rate_laws.fit(replace(rows, **joined))
    assert "go together" in found.warnings[0].message


def with_rule(part, exponent):
    """As if the plan's rule followed another exponent of N than the best rates do."""
    rule = TRUTH.rate(part.params, part.tokens, part.batch) * (part.params / 1e8) ** exponent
    return replace(part, rule_lr=rule)


def test_a_rule_that_drifts_is_said():
    part = surface()
    corners = np.isin(part.params, [part.params.min(), part.params.max()])
    steady = fits.fit_family(with_rule(part, 0.0), Settings(replicates=100))
    assert "rate_drifts" not in {one.code for one in steady.warnings}
    (found,) = rate_laws.drift_findings(rate_laws.cells_of(with_rule(part.only(corners), 0.3)))
    assert found.code == "rate_drifts"
    assert "times the rule's at 1e18 FLOPs" in found.message
    drifts = fits.fit_family(with_rule(part, 0.3), Settings(replicates=100))
    assert "rate_drifts" in {one.code for one in drifts.warnings}


def corner(best, censored=None, sd=0.05, params=1e8):
    return RateCell(
        flops=1e18, params=params, tokens=1e9, batch=None, rates=[0.5, 2.0], runs=3, best=best,
        curvature=0.03, censored=censored, sd=None if censored else sd, rule=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "drifts"),
    [
        ((corner(1.0), corner(1.6)), True),
        ((corner(1.0, sd=0.2), corner(1.6, sd=0.2)), False),  # 1.7 standard errors
        ((corner(1.0), corner(2.0, "above")), True),
        ((corner(1.0, "above"), corner(2.0)), False),  # the first may be 2 as well
        ((corner(0.5, "below"), corner(1.0, "below")), False),
        ((corner(0.5, "below"), corner(2.0, "above")), True),
        ((corner(1.0, sd=0.2), corner(2.0, "above")), False),
    ],
)
def test_a_drift_is_more_than_errors_and_bounds_allow(cells, drifts):
    assert bool(rate_laws.drift_findings(cells)) == drifts
    assert not rate_laws.drift_findings([replace(cell, rule=None) for cell in cells])


def test_an_assumed_noise_is_said():
    rows = csv_rows(surface(batches=(256,), factors=(0.5, 1, 2)))
    for row, lr in zip(rows, surface(batches=(256,), factors=(0.5, 1, 2)).lr.tolist(), strict=True):
        row["lr"] = lr
    found = scaling.rates({name: [row[name] for row in rows] for name in rows[0]})
    codes = {one.code for one in found.families["known"].warnings}
    assert "no_seed_repeats" in codes


def test_the_rule_is_read_from_the_names_of_rules():
    rows = csv_rows(surface(batches=(256,)))
    part = surface(batches=(256,))
    for row, lr, factor in zip(rows, part.lr.tolist(), np.tile(FACTORS, 15).tolist(), strict=True):
        name = "step-law" if factor == 1 else f"step-law*{factor:g}"
        row |= {"lr": lr, "rules": f"shape=given;lr={name};warmup=capped"}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    found = scaling.rates(columns).families["known"]
    for cell in found.cells:
        assert cell.rule == pytest.approx(cell.best / 1.1)


def test_a_drift_check_adds_the_corners_at_other_rates():
    rows = grid.rows(fake_trainer.sweep(sizes=((1, 32, 2), (2, 32, 2), (3, 32, 2))))
    more = grid.drift_check(rows)
    added = [row for row in more if row not in rows]
    assert len(added) == len({row.family for row in rows}) * 2 * 2 * 2
    assert {row.layers for row in added} == {1, 3}
    for row in added:
        (like,) = [
            r
            for r in rows
            if (r.family, r.budget, r.layers) == (row.family, row.budget, row.layers)
        ]
        factor = float(row.rules["lr"].rpartition("*")[2])
        assert row.peak_lr == pytest.approx(like.peak_lr * factor)
    factors = grid.rows(fake_trainer.sweep(lr_factors=(0.5, 1, 2)))
    assert len(factors) == 3 * len(grid.rows(fake_trainer.sweep()))
    assert grid.drift_check(factors) == factors  # which has those rates already


def test_a_fitted_law_is_a_rule(tmp_path, capsys):
    part = surface(noise=1e-3)
    rows = [
        row | {"lr": lr, "batch_size": batch, "params_nonembedding": row["params"]}
        for row, lr, batch in zip(
            csv_rows(part), part.lr.tolist(), part.batch.tolist(), strict=True
        )
    ]
    path = write_csv(tmp_path / "rates.csv", rows)
    words = [
        "scaling",
        "rates",
        str(path),
        "--params",
        "nonembedding",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0
    assert "best rate" in capsys.readouterr().out
    file = tmp_path / "out" / "rates.json"
    law = json.loads(file.read_text())["families"]["known"]["params"]
    cell = rules.Cell(
        family="arm", budget=1e19, shape=(2, 64, 2), params=10**8, tokens=1e9, seq_len=128,
        warmup_steps=0, steps=100, batch_size=256, label="known", counts={"nonembedding": 10**8},
    )  # fmt: skip
    name, rule = rules.resolve("lr", f"fitted:{file}")
    assert name == f"fitted:{file}"
    assert rule(cell) == pytest.approx(RateLaw(**law).rate(1e8, 1e9, 256))
    with pytest.raises(UserError, match="no family 'mdm'; it has known"):
        rule(replace(cell, label="mdm"))
    with pytest.raises(UserError, match="its N is counted nonembedding"):
        rule(replace(cell, counts={"total": 1}))
    with pytest.raises(UserError, match="no such file"):
        rules.resolve("lr", f"fitted:{tmp_path / 'none.json'}")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="no law of rates in it"):
        rules.resolve("lr", f"fitted:{tmp_path / 'other.json'}")


def test_published_runs_say_what_they_can():
    """104 runs of one rate a cell: nothing to fit, in one line."""
    column = shared("gadre_runs.csv")
    data = {
        "family": column["dataset"], "loss": column["loss_c4_val"].astype(float),
        "params": column["N"].astype(float), "tokens": column["D"].astype(float),
        "lr": column["lr"].astype(float), "batch_size": column["global_bs"].astype(float),
    }  # fmt: skip
    found = scaling.rates(data)
    assert found.refused
    assert {one.warnings[0].code for one in found.families.values()} == {"too_few_rates"}
