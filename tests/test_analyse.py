"""Analyses say what they should: power laws are found, levels add up to the bound, maps are maps."""

import csv
import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax import cli, schedule
from prime_jax.analyse import attention, bits, noise, spectra, subjects
from prime_jax.config import ObjectiveConfig, SubtokenConfig
from prime_jax.errors import UserError
from prime_jax.kernels.attention import attention_reference
from prime_jax.runtime.records import read_json
from prime_jax.subtokens import Codebook


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def subject(tiny_run):
    return subjects.load([[str(tiny_run)]])[0]


def test_ranks_of_known_spectra():
    flat = spectra.summary(np.ones(40))
    assert flat["stable_rank"] == pytest.approx(40)
    assert flat["effective_rank"] == pytest.approx(40)
    one = spectra.summary(np.array([3.0] + [0.0] * 39))
    assert (one["stable_rank"], one["effective_rank"]) == pytest.approx((1, 1))
    assert one["tail_exponent"] is None


def test_tail_exponents_of_power_laws():
    rng = np.random.default_rng(0)
    covered = 0
    for exponent in (2.0, 3.0, 4.0, 5.0):
        pareto = 2.0 * rng.random(400) ** (-1 / (exponent - 1))
        found = spectra.tail(pareto, replicates=50)
        assert found.exponent == pytest.approx(exponent, rel=0.25)
        covered += found.low <= exponent <= found.high
    assert covered >= 3
    bulk = rng.random(400)  # below the tail: the threshold must leave it out
    mixed = spectra.tail(np.concatenate([bulk, 1 + pareto]), replicates=2)
    assert mixed.size < 500


def test_noise_levels_add_up_to_the_bound(subject):
    rows, about = noise.measure(subject, levels=4, examples=32, replicates=4, tick=quiet)
    assert [row["from"] for row in rows] == [0, 0.25, 0.5, 0.75]
    bound, steps = about["losses"]
    assert np.mean([row["nats"] for row in rows]) == pytest.approx(bound["value"])
    assert np.sum([row["step"] for row in rows]) == pytest.approx(steps["value"])
    assert steps["estimator"] == "finite:4"
    found = {(v["times"], v["weight"]): v["relative_variance"] for v in about["variances"]}
    assert found["bell", "nelbo"] > found["uniform", "nelbo"] > 0
    assert found["bell", "flat"] < found["uniform", "flat"]
    record = read_json(subject.run.path / "result.json")["losses"]
    trained = next(loss for loss in record if loss["estimator"] == "subtoken")
    error = np.hypot(bound["se_data"], trained["se_data"])
    assert abs(bound["value"] - trained["value"]) < 4 * error


def constant_cost(n: int, **law) -> float:
    """The relative variance where each of n hidden sub-tokens costs the same."""
    k = np.arange(1, n + 1)
    config = ObjectiveConfig(**law)
    return noise.relative_variance(config, np.ones(n), masked=k, sizes=np.full(n, n))[0]


def test_the_error_of_a_variance_is_that_over_new_examples():
    """Of examples whose costs differ, drawn again and again."""
    rng, law = np.random.default_rng(0), ObjectiveConfig()
    shape = (4, 200)  # replicates, examples
    found = []
    for _ in range(100):
        masked = rng.integers(1, 9, shape)
        nats = 8 / masked * rng.gamma(4, 1, shape[1])
        found.append(noise.relative_variance(law, nats, masked, np.full(shape, 8)))
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.25)
    one = noise.relative_variance(law, nats[:, :1], masked[:, :1], np.full((4, 1), 8))
    assert one[1] is None


def test_variances_of_training_times(monkeypatch):
    """As by hand: the loss k / (n u q) has E = 1 and E^2 = int (1 - u) / (n u q) + 1 / q du."""
    u = np.geomspace(1e-6, 1, 200_001)
    for times in ("uniform", "bell"):
        q = np.asarray(schedule.density(ObjectiveConfig(times=times), jnp.asarray(u)))
        by_hand = np.trapezoid(((1 - u) / (64 * u) + 1) / q, u) - 1
        assert constant_cost(64, times=times) == pytest.approx(by_hand, rel=2e-3)
    assert constant_cost(64) == pytest.approx(0.20, abs=0.005)
    flat = constant_cost(64, weight="flat")  # k / n itself: E = 1 / 2, E^2 = 1 / 3 + 1 / (6 n)
    assert flat == pytest.approx(4 * (1 / 3 + 1 / (6 * 64)) - 1, rel=1e-3)
    monkeypatch.setattr(schedule, "BELL", 1.0)  # without its uniform part it would be ruinous
    assert constant_cost(64, times="bell") == pytest.approx(3.15, abs=0.02)


def test_slots_add_up_to_the_bound(subject):
    rows, about = bits.measure(subject, examples=32, replicates=8, tick=quiet)
    bound = about["losses"][0]
    assert sum(row["nats"] for row in rows) == pytest.approx(bound["value"], rel=1e-6)
    record = read_json(subject.run.path / "result.json")["losses"]
    trained = next(loss for loss in record if loss["estimator"] == "subtoken")
    error = np.hypot(bound["se_data"], trained["se_data"])
    assert abs(bound["value"] - trained["value"]) < 4 * error
    for row in rows:
        assert 0 < row["error"] < 0.6
        assert row["nats"] > 0


def test_hidden_counts_are_exact(subject):
    tokens = np.zeros((3, 16), np.int32)
    keys = bits.keys_of(np.zeros(3, int), np.arange(3))
    hide = jax.jit(partial(bits.hide, subject))
    inputs, weight = hide(tokens, keys, jnp.array([0.0, 0.499, 0.999]))  # levels are in [0, 1)
    np.testing.assert_array_equal(inputs.masked_BxLxS.sum(axis=(1, 2)), [1, 32, 64])
    np.testing.assert_allclose(weight, [64, 2, 1])


def test_unigram_of_slots():
    book = Codebook.create(4, SubtokenConfig(2, shuffle=0.0))
    nats, error = bits.unigram(book, np.array([3, 1, 0, 0]))
    assert nats[0] == 0
    assert nats[1] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    np.testing.assert_allclose(error, [0, 0.25])


def test_weights_are_those_of_attention():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 6, h, 4)) for key, h in zip(keys, (4, 2, 2), strict=True))
    mask = jnp.tril(jnp.ones((6, 6), bool))[None]
    a = jax.jit(attention.weights)(q[0], k[0], mask)
    out = np.einsum("hlm,mhk->lhk", a, np.repeat(v[0], 2, axis=1))
    expected = jax.jit(partial(attention_reference, causal=True))(q, k, v)
    np.testing.assert_allclose(out, expected[0], atol=1e-5)


def test_shapes_of_known_attention():
    length = 100
    sink = jnp.zeros((1, length, length)).at[:, :, 7].set(1.0)
    value, band, entropy, cells = attention.describe(sink)
    assert (value[0], entropy[0]) == pytest.approx((1, 0))
    assert band[0] == pytest.approx(9 / length)  # queries 3 .. 11
    np.testing.assert_allclose(cells.sum(axis=2), 1, rtol=1e-5)
    near = attention.describe(jnp.eye(length)[None])
    assert (near[0][0], near[1][0]) == pytest.approx((1 / length, 1))
    even = attention.uniform(8, causal=False)
    assert even == pytest.approx({"sink": 1 / 8, "band": 52 / 64, "entropy": np.log(8)})


DRAWN = {
    "attention": (["--examples", "4", "--ratios", "0.5"], ["attention", "attention-maps-1"]),
    "bits": (["--examples", "4"], ["bits"]),
    "noise": (["--examples", "4", "--levels", "2"], ["noise"]),
    "spectra": ([], ["spectra", "spectra-by-layer"]),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "bits" else pytest.mark.slow) for n in DRAWN],
)
def test_an_analysis_writes_numbers_and_figures_of_several_runs(name, tiny_run, tmp_path):
    options, drawn = DRAWN[name]
    two = [str(tiny_run), str(tiny_run)]
    assert cli.main(["analyse", name, *two, "--out", str(tmp_path), *options]) == 0
    for figure in drawn:
        for suffix in ("svg", "png"):
            assert (tmp_path / f"{figure}.{suffix}").stat().st_size > 1000
    record = json.loads((tmp_path / f"{name}.json").read_text())
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
    assert len(rows) == len(record["rows"])
    assert len({row["run"] for row in rows}) == len(record["runs"]) == 2


@pytest.mark.slow
def test_an_analysis_replaces_its_own_files_only(tiny_run, tmp_path, monkeypatch, capsys):
    words = ["analyse", "spectra", str(tiny_run), "--out", str(tmp_path)]
    for file in ("spectra.csv", "spectra-by-layer.svg"):
        (tmp_path / file).write_text("of the user")
        with monkeypatch.context() as patch:
            patch.delattr(spectra, "measure")  # refused before the work
            assert cli.main(words) == 2
        assert f"{file} was not made by prime-jax" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [file]
        (tmp_path / file).unlink()
    (tmp_path / file).write_text("of the user")
    assert cli.main([*words, "--force"]) == 0
    assert (tmp_path / file).read_text() != "of the user"
    assert cli.main(words) == 0


def test_a_dataset_that_is_none_is_one_line(tiny_run, tmp_path, capsys):
    assert cli.main(["analyse", "noise", str(tiny_run), "--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_family_that_hides_nothing_has_no_noise(subject):
    arm = replace(subject.run, config=replace(subject.run.config, family="arm"))
    with pytest.raises(UserError, match="masks nothing"):
        subjects.diffusion_only([replace(subject, run=arm)], "analyse noise")
