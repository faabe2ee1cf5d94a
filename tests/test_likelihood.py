"""Whole runs on sources whose entropy is known: no valid number may fall below it."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
)
from prime_jax.data import markov
from prime_jax.data.prepare import prepare
from prime_jax.errors import UserError
from prime_jax.evaluate import estimators, likelihood
from prime_jax.settings import set_path
from prime_jax.subtokens import Codebook
from prime_jax.train import train

FAMILIES = {"arm": 1, "mdm": 1, "prime": 4}


def run_on(data, family: str, **changes) -> RunConfig:
    config = RunConfig(
        family=family,
        steps=150,
        batch_size=32,
        model=ModelConfig(vocab_size=16, layers=1, width=16, heads=1),
        subtokens=SubtokenConfig(length=FAMILIES[family]),
        data=DataConfig(path=str(data), seq_len=16),
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=10),
        eval=EvalConfig(examples=0, batch_size=512),
    )
    return dataclasses.replace(config, **changes)


def valid(result) -> list[dict]:
    return [loss for loss in result["losses"] if loss["kind"] in ("nll", "nelbo")]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """i.i.d. tokens in documents of random length, each closed by an EOS."""
    spec = "V=15,order=0,seed=0,tokens=120000,doc_mean=10,concentration=5"
    out = tmp_path_factory.mktemp("data") / "documents"
    prepare(f"markov:{spec}", "synthetic:15+eos", out, seq_len=16, workers=1)
    return out, markov.parse(spec)


@pytest.mark.slow  # by enumeration: test_the_law_of_the_stream_costs_its_entropy_...
@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_falls_below_the_entropy_of_the_stream(documents, family, tmp_path):
    """Document ends are part of the stream: nothing tells a network where they are."""
    data, source = documents
    entropy = source.block_entropy(16) / 16
    for loss in valid(train(run_on(data, family), tmp_path, log=lambda _: None)):
        error = np.hypot(loss["se_mc"], loss["se_data"])
        assert loss["value"] > entropy - 4 * error
        assert loss["value"] < entropy + 0.2  # and it has been learnt
        assert error < 0.03


@pytest.mark.slow  # without training: test_ignorance_costs_log_v_for_every_text
@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_source_gives_log_v(family, tmp_path):
    spec = "V=16,order=0,seed=0,tokens=60000,concentration=1e9"
    data = tmp_path / "data"
    prepare(f"markov:{spec}", "synthetic:16", data, seq_len=16, workers=1)
    config = run_on(data, family, steps=60, optim=OptimConfig(peak_lr=3e-3, warmup_steps=10))
    for loss in valid(train(config, tmp_path / "run", log=lambda _: None)):
        assert loss["value"] == pytest.approx(np.log(16), abs=0.03)


def evaluated(family: str, network, tokens: np.ndarray, vocab: int, replicates: int) -> np.ndarray:
    """Nats [R, E] of sequences under a network that is a function of the digits, as shipped."""
    config = set_path(run_on("nowhere", family), "model.vocab_size", vocab)
    book = Codebook.create(vocab, config.subtokens)

    def untrained(digits_BxLxS, *_):
        return network(digits_BxLxS[..., 0]), jnp.eye(vocab)[book.tokens]

    task, rows = estimators.make_task(config, book, -1), likelihood.grid(len(tokens), replicates)
    name = "ar" if family == "arm" else "subtoken"
    numbers = (jnp.asarray(x) for x in (rows.replicate, rows.example, rows.uniform))
    values = likelihood.draw(task, name, untrained, jnp.asarray(tokens)[rows.example], *numbers)
    return np.asarray(values[name], float).reshape(replicates, len(tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_ignorance_costs_log_v_for_every_text(family):
    """Without training: every draw of every family, not only their mean."""
    tokens = np.random.default_rng(0).integers(0, 16, (32, 16))
    nats = evaluated(family, lambda digits: jnp.zeros((*digits.shape, 16)), tokens, 16, 4)
    np.testing.assert_allclose(nats, 16 * np.log(16), rtol=1e-6)


def from_windows(family: str, window_XxL: np.ndarray, p_X: np.ndarray):
    """The network that knows how probable every window is: the chance of each token given what
    its family may read. ARM reads BOS and the tokens before, MDM all that is not hidden."""
    window_XxL, mask = jnp.asarray(window_XxL), 1 + window_XxL.max()

    def network(digits_BxL):
        if family == "arm":
            same_BxXxL = window_XxL[:, :-1] == digits_BxL[:, None, 1:]
            first = ((0, 0), (0, 0), (1, 0))
            fits_BxXxL = jnp.cumprod(jnp.pad(same_BxXxL, first, constant_values=True), axis=2)
        else:
            fits_BxXxL = (window_XxL == digits_BxL[:, None]) | (digits_BxL[:, None] == mask)
            fits_BxXxL = fits_BxXxL.all(axis=2, keepdims=True)
        p_BxXxL = fits_BxXxL * jnp.asarray(p_X)[:, None]
        return jnp.log(jnp.einsum("bxl,xlv->blv", p_BxXxL, jnp.eye(mask)[window_XxL]) + 1e-30)

    return network


@pytest.mark.slow
@pytest.mark.parametrize("family", ["arm", "mdm"])
def test_the_law_of_the_stream_costs_its_entropy_and_another_law_more(family):
    """i.i.d. tokens in documents of random length: all windows of three, each with its chance."""
    source = markov.parse("V=3,order=0,seed=0,doc_mean=2.5")
    tokens = np.array(list(itertools.product(range(4), repeat=3)))
    p_X, entropy = np.exp(source.log_prob(tokens)), source.block_entropy(3)
    other_X = (p_X + 1e-6) * np.exp(np.random.default_rng(0).normal(0, 0.5, len(tokens)))

    def cost(known_X: np.ndarray) -> tuple[float, float]:
        nats_R = evaluated(family, from_windows(family, tokens, known_X), tokens, 4, 256) @ p_X
        return nats_R.mean(), nats_R.std(ddof=1) / len(nats_R) ** 0.5

    value, error = cost(p_X)
    assert value == pytest.approx(entropy, abs=5 * error + 1e-5)
    assert error < 0.01
    value, error = cost(other_X)
    assert value > entropy + 5 * error


@pytest.mark.slow
def test_results_do_not_depend_on_the_evaluation_batch(documents, tmp_path):
    data, _ = documents
    config = run_on(data, "prime", steps=11, eval=EvalConfig(examples=24, batch_size=7))
    a = train(config, tmp_path / "7", log=lambda _: None)["losses"]
    b = train(set_path(config, "eval.batch_size", 64), tmp_path / "64", log=lambda _: None)[
        "losses"
    ]
    for x, y in zip(a, b, strict=True):
        assert x["value"] == pytest.approx(y["value"], rel=1e-5)


def test_standard_errors_are_honest():
    """Over many evaluations se_mc equals the spread of the value; se_data that of fresh data."""
    rng = np.random.default_rng(0)
    n, values, errors, data_errors = np.full(50, 4), [], [], []
    for _ in range(400):
        example = rng.normal(0, 1.0, 25).repeat(2)  # documents of two blocks each
        draws = example + rng.normal(0, 3.0, (8, 50))
        loss = likelihood.summarise("subtoken", draws, n, np.arange(50) // 2, "")
        values.append(loss.value)
        errors.append(loss.se_mc)
        data_errors.append(loss.se_data)
    mc, data = 3.0 / 20 / 4, 1.0 / 5 / 4  # sd / sqrt(n) / tokens of a block
    assert np.mean(errors) == pytest.approx(mc, rel=0.1)
    assert np.mean(data_errors) == pytest.approx(np.hypot(mc, data), rel=0.1)
    assert np.std(values) == pytest.approx(np.hypot(mc, data), rel=0.1)


@pytest.mark.parametrize(
    ("name", "replicates", "docs", "mc", "data"),
    [
        ("subtoken", 8, [0] * 10, True, True),  # one document: its windows are the clusters
        ("subtoken", 1, range(10), None, True),
        ("chain:l2r", 1, [0, 0, 0, 1, 1, 1, 2, 2, 3, 4], 0.0, True),
        ("finite:4", 1, [0], None, None),
        ("ar", 1, [7], 0.0, None),
    ],
)
def test_a_standard_error_that_cannot_be_known_is_unknown(name, replicates, docs, mc, data):
    docs = np.array(docs)
    nats = np.random.default_rng(0).normal(size=(replicates, len(docs)))
    loss = likelihood.summarise(name, nats, np.full(len(docs), 4), docs, "")
    assert (loss.se_mc > 0 if mc is True else loss.se_mc == mc) or loss.se_mc is mc is None
    if data is None:
        assert loss.se_data is None
    else:  # by window, as there are fewer than twenty documents
        mean_E = nats.mean(0) / 4
        assert loss.se_data == pytest.approx(mean_E.std(ddof=1) / len(docs) ** 0.5)
    assert likelihood.clusters(docs)[1] == "windows"
    assert likelihood.clusters(np.arange(40) // 2)[1] == "texts"


@pytest.mark.parametrize("examples", [1, 2, 5, 64])
def test_noise_levels_are_stratified_in_every_replicate(examples):
    rows = likelihood.grid(examples, 8)
    for levels in rows.uniform.reshape(8, examples):
        assert sorted((levels * examples).astype(int) % examples) == list(range(examples))


@pytest.mark.parametrize("name", ["joint", "finite:4", "exact:subtoken", "subtoken", "token"])
def test_a_number_that_is_not_what_its_name_says_has_a_note(name):
    """Without carry-over the sampler, the training loss and the sum over texts are others."""
    config = run_on("nowhere", "prime")
    assert likelihood.note(config, name) == ""
    free = set_path(config, "objective.carry_over", False)
    assert bool(likelihood.note(free, name)) == (name not in ("subtoken", "token"))
    assert (
        likelihood.note(set_path(run_on("nowhere", "mdm"), "objective.carry_over", False), name)
        == ""
    )
    given = set_path(free, "data.segment_ids", True)
    assert ("lengths of documents" in likelihood.note(given, name)) == (name == "exact:subtoken")


def test_unknown_estimators_are_refused():
    config = run_on("nowhere", "prime", eval=EvalConfig(estimators=("subtokens",)))
    with pytest.raises(UserError, match="finite:T"):
        likelihood.estimators_of(config)
