"""Block diffusion: its bound between MDM and the chain rule, what sees what, cache, samples."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import L, all_masks, all_pairs, bayes, codebook, pair_probabilities, run_config, wrong
from test_enumeration import BOOKS, entropy, mask_weights, rows_of

from prime_jax import model
from prime_jax.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    SubtokenConfig,
    run_id,
    validate,
)
from prime_jax.corrupt import corrupt, step_key
from prime_jax.errors import UserError
from prime_jax.evaluate import estimators, likelihood
from prime_jax.kernels.subtoken_head import subtoken_log_masses
from prime_jax.objectives import cut, loss_sums, make_head, masked_inputs
from prime_jax.settings import set_path
from prime_jax.subtokens import Codebook
from prime_jax.train import train

SLOW = pytest.mark.slow


def blockwise(network, book, block: int):
    """A table network over two copies: earlier blocks clean, its own noisy, later ones unseen."""

    def doubled(digits_Bx2xLxS, *_):
        noisy, clean = digits_Bx2xLxS[:, 0], digits_Bx2xLxS[:, 1]
        hidden = []
        for start in range(0, L, block):
            unseen = jnp.full_like(noisy[:, start + block :], book.base)
            seen = [clean[:, :start], noisy[:, start : start + block], unseen]
            h_BxLxD, head_VxD = network(jnp.concatenate(seen, axis=1), None, None)
            hidden.append(h_BxLxD[:, start : start + block])
        return jnp.concatenate(hidden, axis=1), head_VxD

    return doubled


def exact_bounds(name: str, block: int, network) -> dict[str, np.ndarray]:
    """{"marginal", "joint"}: the training losses of every pair, exactly, by enumeration.

    Blocks are hidden independently, so a block's loss is a sum over its own masks: those of the
    other blocks share the weight.
    """
    length, codes = BOOKS[name]
    book, config = codebook(length, codes), run_config(length, block_length=block)
    n, masks, pairs = block * length, all_masks(length), all_pairs()
    counts = masks.reshape(len(masks), L // block, n).sum(2)
    fraction = 2.0 ** (n - L * length)
    q_MxG = np.where(counts > 0, mask_weights(config.objective, n)[counts], 0.0) * fraction
    tokens = np.repeat(pairs, len(masks), axis=0)
    inputs = masked_inputs(
        config,
        book,
        jnp.asarray(tokens),
        jnp.asarray(np.tile(masks, (len(pairs), 1, 1))),
        jnp.asarray(np.tile(np.repeat(q_MxG, block, axis=1), (len(pairs), 1))),
        eos_id=-1,
    )
    head = make_head(config, book)
    doubled = blockwise(network, book, block)
    marginal, joint = jax.jit(partial(estimators.row_nats, head, doubled))(inputs)
    total = jax.jit(partial(loss_sums, head, doubled))(inputs)
    assert float(total.marginal) == pytest.approx(float(marginal.sum()), rel=1e-12)
    per_pair = (np.asarray(x).reshape(len(pairs), -1).sum(1) for x in (marginal, joint))
    return dict(zip(("marginal", "joint"), per_pair, strict=True))


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("name", ["l1", "l4-affine"])
def test_the_bound_of_a_network_that_knows_the_source_is_its_entropy(name, block, double_precision):
    network = bayes(codebook(*BOOKS[name]))
    p = pair_probabilities()[tuple(all_pairs().T)]
    assert p @ exact_bounds(name, block, network)["marginal"] == pytest.approx(entropy(), abs=1e-12)


def single_pass_bound(name: str, network) -> np.ndarray:
    """MDM's (or Prime's) own bound of every pair, without blocks."""
    length, codes = BOOKS[name]
    book, config = codebook(length, codes), run_config(length)
    masks, pairs = all_masks(length), all_pairs()
    counts = masks.sum((1, 2))
    q = np.where(counts > 0, mask_weights(config.objective, L * length)[counts], 0.0)
    task = estimators.make_task(config, book, -1)
    tokens = jnp.asarray(np.repeat(pairs, len(masks), axis=0))
    inputs = estimators.hidden(
        task, rows_of(tokens), jnp.asarray(np.tile(masks, (len(pairs), 1, 1)))
    )
    nats_B = jax.jit(partial(estimators.row_nats, task.head, network))(inputs)[0]
    return np.asarray(nats_B).reshape(len(pairs), -1) @ q


@pytest.mark.parametrize("name", ["l1", pytest.param("l4", marks=SLOW)])
def test_one_block_is_plain_diffusion(name, double_precision):
    network = wrong(codebook(*BOOKS[name]), 0)
    got = exact_bounds(name, L, network)["marginal"]
    np.testing.assert_allclose(got, single_pass_bound(name, network), rtol=1e-12)


def table_chain_rule(name: str, network) -> np.ndarray:
    """-log p(x_1) - log p(x_2 | x_1) of every pair: a token hidden whole, those before it shown."""
    length, codes = BOOKS[name]
    book, config = codebook(length, codes), run_config(length)
    task, pairs = estimators.make_task(config, book, -1), jnp.asarray(all_pairs())
    cost, total = jax.jit(partial(estimators.row_nats, task.head, network)), 0.0
    for hidden, charged in ((0, 0), (1, 1)):
        masked = np.zeros((len(pairs), L, length), bool)
        masked[:, hidden:] = True
        later = masked.copy()
        later[:, charged] = False
        inputs = estimators.hidden(task, rows_of(pairs), jnp.asarray(masked))
        total += cost(inputs, jnp.asarray(later))[1]
    return np.asarray(total)


@pytest.mark.parametrize("name", ["l1", pytest.param("l4", marks=SLOW)])
def test_blocks_of_one_token_are_the_chain_rule(name, double_precision):
    """Its bound is exact for tokens; sub-tokens of a token still come in any order."""
    length, codes = BOOKS[name]
    book, config = codebook(length, codes), run_config(length, block_length=1)
    network = wrong(book, 0)
    exact = table_chain_rule(name, network)
    assert np.exp(-exact).sum() == pytest.approx(1, abs=1e-12)  # a distribution over all pairs
    task, pairs = estimators.make_task(config, book, -1), jnp.asarray(all_pairs())
    keys, uniform = jax.random.split(jax.random.key(0), len(pairs)), jnp.linspace(0, 0.99, 256)
    doubled = blockwise(network, book, 1)
    draw = jax.jit(partial(estimators.token, "", task, doubled))
    token = draw(rows_of(pairs), keys, uniform)["token"]
    np.testing.assert_allclose(token, exact, rtol=1e-12)
    bound = exact_bounds(name, 1, network)
    if length == 1:
        np.testing.assert_allclose(bound["marginal"], exact, rtol=1e-12)


TINY = RunConfig(
    model=ModelConfig(vocab_size=13, layers=2, width=16, heads=2),
    subtokens=SubtokenConfig(length=4),
    data=DataConfig(seq_len=8),
)


def tiny_run(block: int, length: int = 4, **model_changes) -> RunConfig:
    return dataclasses.replace(
        TINY,
        model=dataclasses.replace(TINY.model, **model_changes),
        subtokens=SubtokenConfig(length=length),
        objective=ObjectiveConfig(block_length=block),
    )


@lru_cache
def network(config: RunConfig):
    """(apply, parameters, codebook), with parameters large enough to matter."""
    book = Codebook.create(config.model.vocab_size, config.subtokens)
    net = model.build(config, book)
    digits = jnp.zeros((1, config.data.seq_len, book.length), jnp.int32)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), digits))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes)
    return jax.jit(lambda p, *a, **k: net.apply({"params": p}, *a, **k)), params, book


def random_copies(book: Codebook, batch=3, length=8) -> tuple[jax.Array, jax.Array]:
    """(noisy, clean) digits."""
    rng = np.random.default_rng(0)
    clean = book.digits[rng.integers(0, book.vocab_size, (batch, length))]
    return jnp.where(rng.random(clean.shape) < 0.5, book.base, clean), jnp.asarray(clean)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 4])
def test_one_block_of_the_network_is_the_network_without_blocks(length):
    apply, params, book = network(tiny_run(8, length))
    noisy, clean = random_copies(book)
    plain, _, _ = network(tiny_run(0, length))
    whole, _ = apply(params, jnp.stack([noisy, clean], axis=1))
    np.testing.assert_allclose(whole, plain(params, noisy)[0], atol=1e-5)


def test_what_a_position_sees():
    """Its own noisy block and the clean blocks before it, one layer or several."""
    apply, params, book = network(tiny_run(2))
    noisy, clean = random_copies(book, batch=1)
    both, block = jnp.stack([noisy, clean], axis=1), np.arange(8) // 2
    before, _ = apply(params, both)
    for copy, place in np.ndindex(2, 8):
        other = (both[0, copy, place, 0] + 1) % book.base
        after, _ = apply(params, both.at[0, copy, place, 0].set(other))
        changed = np.abs(after - before)[0].max(-1) > 1e-5
        seen = block > place // 2 if copy else block == place // 2
        np.testing.assert_array_equal(changed, seen)


@pytest.mark.parametrize(
    ("block", "groups"), [(4, 2), *(pytest.param(*x, marks=SLOW) for x in ((1, 1), (1, 2), (4, 1)))]
)
def test_cached_blocks_equal_the_doubled_sequence(block, groups):
    apply, params, book = network(tiny_run(block, kv_heads=groups))
    noisy, clean = random_copies(book)
    whole, _ = apply(params, jnp.stack([noisy, clean], axis=1))
    cache = model.Cache.empty(tiny_run(block, kv_heads=groups).model, 3, 8)
    for start in range(0, 8, block):
        here = slice(start, start + block)
        hidden, _, _ = apply(params, noisy[:, here], cache=cache)
        np.testing.assert_allclose(hidden, whole[:, here], atol=1e-5)
        _, _, cache = apply(params, clean[:, here], cache=cache)


def decoded_log_prob(config: RunConfig, token_BxL) -> np.ndarray:
    """Sum of log p(x_i | x_<i), one token after another with a cache."""
    apply, params, book = network(config)
    head, digits = make_head(config, book), jnp.asarray(book.digits)[token_BxL]
    cache = model.Cache.empty(config.model, *token_BxL.shape)
    total = np.zeros(len(token_BxL))
    for i in range(token_BxL.shape[1]):
        hidden = jnp.full_like(digits[:, i : i + 1], book.base)
        h_Bx1xD, head_VxD, _ = apply(params, hidden, cache=cache)
        row_B = jnp.asarray(book.rows)[token_BxL[:, i]]
        masked = jnp.ones((len(token_BxL), book.length), bool)
        total += np.asarray(subtoken_log_masses(head, h_Bx1xD[:, 0], head_VxD, row_B, masked)[1])
        _, _, cache = apply(params, digits[:, i : i + 1], cache=cache)
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("length", "estimator"), [(1, "subtoken"), (4, "token"), (4, "chain:l2r")])
def test_blocks_of_one_token_are_the_chain_rule_of_the_network(length, estimator):
    config = set_path(tiny_run(1, length, vocab_size=5), "data.seq_len", 3)
    apply, params, book = network(config)
    tokens = jnp.asarray(np.stack(np.meshgrid(*[np.arange(5)] * 3), -1).reshape(-1, 3))
    task, rows = estimators.make_task(config, book, -1), likelihood.grid(len(tokens), 1)
    drawn = likelihood.draw(
        task, estimator, partial(apply, params), tokens, *map(jnp.asarray, rows[:3])
    )
    np.testing.assert_allclose(-drawn[estimator], decoded_log_prob(config, tokens), atol=1e-4)
    assert float(jnp.exp(-drawn[estimator]).sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_documents_hold_for_both_copies():
    config = set_path(tiny_run(2), "data.segment_ids", True)
    apply, params, book = network(config)
    end, token = 12, jnp.asarray([[1, 2, 12, 3, 4, 5, 6, 7]])  # the second document begins at 3
    masked = jnp.zeros((1, 8, 4), bool).at[:, ::2].set(True)

    def hidden(token):
        inputs = masked_inputs(config, book, token, masked, jnp.ones((1, 8)), end)
        return np.asarray(apply(params, inputs.digits_BxLxS, inputs.segment_ids_BxL)[0][0])

    before, other, own = (hidden(t) for t in (token, token.at[0, 1].set(9), token.at[0, 3].set(9)))
    np.testing.assert_allclose(before[3:], other[3:], atol=1e-6)
    assert np.abs(before[4:] - own[4:]).max() > 1e-3


@pytest.mark.slow
def test_what_is_cut_off_is_not_seen():
    apply, params, book = network(tiny_run(2))
    masked = jnp.zeros((1, 8, 4), bool).at[:, ::2].set(True)

    def hidden(token):
        inputs = masked_inputs(tiny_run(2), book, token, masked, jnp.ones((1, 8)), -1)
        inputs = cut(inputs, jnp.asarray([5]))
        return np.asarray(apply(params, inputs.digits_BxLxS, inputs.segment_ids_BxL)[0][0, :5])

    token = jnp.asarray([[1, 2, 12, 3, 4, 5, 6, 7]])
    np.testing.assert_allclose(hidden(token), hidden(token.at[0, 5:].set(9)), atol=1e-6)
    assert np.abs(hidden(token) - hidden(token.at[0, 1].set(9))).max() > 1e-3


def test_every_block_has_a_noise_level_of_its_own():
    objective, target = ObjectiveConfig(block_length=2), jnp.ones((64, 8), bool)
    draw = jax.jit(lambda rows: corrupt(objective, step_key(0, 0), rows, 64, target, 1))
    hidden = draw(jnp.arange(64))
    t_BxG = 1 / np.asarray(hidden.weight_BxL).reshape(64, 4, 2)
    np.testing.assert_allclose(t_BxG[..., 0], t_BxG[..., 1])
    strata = np.sort(t_BxG[..., 0].reshape(-1) * 256)
    assert np.diff(strata).max() < 1.01  # one in each stratum of the whole batch
    assert t_BxG[..., 0].std(axis=1).mean() > 0.2  # and those of a sequence are spread


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mdm", "prime"])
def test_a_run_trains_and_is_evaluated(family, tiny, tmp_path):
    config = dataclasses.replace(
        tiny,
        family=family,
        subtokens=SubtokenConfig(length=1 if family == "mdm" else 4),
        objective=ObjectiveConfig(block_length=4, time_steps=100),
    )
    result = train(config, tmp_path, log=lambda _: None)
    losses = [loss for loss in result["losses"] if loss["kind"] == "nelbo"]
    assert [loss["estimator"] for loss in losses] == ["subtoken", "token"][: len(losses)]
    assert all(1.5 < loss["value"] < 3.5 for loss in losses)


@pytest.mark.parametrize(
    ("path", "value"), [("objective.block_length", 5), ("objective.block_length", -1)]
)
def test_blocks_that_do_not_fit_are_refused(path, value):
    with pytest.raises(UserError, match="block_length"):
        validate(set_path(TINY, path, value))


def test_an_autoregressive_model_has_no_blocks():
    config = dataclasses.replace(tiny_run(2, 1), family="arm")
    with pytest.raises(UserError, match="arm"):
        validate(config)


def test_older_runs_keep_their_identity():
    assert run_id(RunConfig()) == "f3d9797bdf"
    assert run_id(tiny_run(2)) != run_id(tiny_run(0))
