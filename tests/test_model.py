"""The network: counts, causality, packing, dropout, rematerialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax import flops, model
from prime_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, SubtokenConfig
from prime_jax.subtokens import Codebook

TINY = RunConfig(
    model=ModelConfig(vocab_size=37, layers=2, width=24, heads=2),
    subtokens=SubtokenConfig(length=6),
    data=DataConfig(seq_len=8),
)


def with_model(config: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def network(config: RunConfig, seed: int = 0):
    """(apply, parameters, codebook) with every parameter random, norms included."""
    book = Codebook.create(config.model.vocab_size, config.subtokens)
    net = model.build(config, book)
    digits = jnp.zeros((1, config.data.seq_len, book.length), jnp.int32)
    params = net.init(jax.random.key(seed), digits)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [0.3 * jax.random.normal(k, x.shape) + x for k, x in zip(keys, leaves, strict=True)]
    return jax.jit(lambda p, *a: net.apply({"params": p}, *a)), tree.unflatten(noise), book


def random_digits(book: Codebook, shape, seed=0) -> jax.Array:
    return jnp.asarray(
        np.random.default_rng(seed).integers(0, book.base + 1, (*shape, book.length))
    )


@pytest.mark.slow
def test_packed_documents_do_not_see_each_other():
    apply, params, book = network(TINY)
    digits = random_digits(book, (1, 8))
    segments = jnp.asarray([[0, 0, 0, 0, 0, 1, 1, 1]])
    hidden, _ = apply(params, digits, segments)
    changed, _ = apply(params, digits.at[0, 6].set(0), segments)
    np.testing.assert_allclose(hidden[0, :5], changed[0, :5], atol=1e-6)
    assert np.abs(hidden[0, 5] - changed[0, 5]).max() > 1e-3


def test_only_arm_is_causal():
    for family in ("arm", "mdm"):
        config = dataclasses.replace(TINY, family=family, subtokens=SubtokenConfig(length=1))
        apply, params, book = network(config)
        digits = random_digits(book, (1, 8))
        before, _ = apply(params, digits)
        after, _ = apply(params, digits.at[0, 5].set(3))
        unchanged = np.abs(before[0, :5] - after[0, :5]).max() < 1e-6
        assert unchanged == (family == "arm")


@pytest.mark.parametrize(
    ("family", "length", "changes"),
    [
        ("arm", 1, {}),
        ("mdm", 1, {"tied_head": True}),
        ("prime", 6, {"kv_heads": 1, "qk_norm": False}),
        ("prime", 2, {"embedding": "cat", "ffn_multiple": 3}),
        ("prime", 5, {"embedding": "sum"}),
    ],
)
def test_counts_are_exact(family, length, changes):
    config = with_model(
        dataclasses.replace(TINY, family=family, subtokens=SubtokenConfig(length=length)), **changes
    )
    _, params, _ = network(config)
    counts = flops.param_counts(config)
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in params.items()}
    assert sum(sizes.values()) == counts["total"]
    assert sum(sizes.values()) - sizes["embedding"] - sizes.get("head", 0) == counts["nonembedding"]
    assert counts["nonembedding_plus_head"] == counts["nonembedding"] + 37 * 24
    assert counts["reference"] == 12 * 24**2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_nothing(remat):
    digits = random_digits(Codebook.create(37, TINY.subtokens), (2, 8))

    def gradient(config):
        apply, params, _ = network(config)
        return jax.grad(lambda p: (apply(p, digits)[0] ** 2).sum())(params)

    plain = gradient(TINY)
    again = gradient(dataclasses.replace(TINY, mesh=MeshConfig(remat=remat)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain, again)


@pytest.mark.slow
def test_dropout_is_keyed_per_sequence():
    apply, params, book = network(with_model(TINY, dropout=0.5))
    digits = random_digits(book, (4, 8))
    keys = jax.random.split(jax.random.key(7), 4)
    whole, _ = apply(params, digits, None, keys)
    half, _ = apply(params, digits[2:], None, keys[2:])
    off, _ = apply(params, digits, None, None)
    np.testing.assert_allclose(whole[2:], half, atol=1e-5)
    assert np.abs(whole - off).max() > 1e-2
    assert np.abs(whole[0] - apply(params, digits[:1], None, keys[1:2])[0][0]).max() > 1e-2


def test_bfloat16_keeps_parameters_in_float32():
    apply, params, book = network(with_model(TINY, dtype="bfloat16"))
    hidden, head = apply(params, random_digits(book, (1, 8)))
    assert hidden.dtype == head.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact, _ = network(TINY)[0](params, random_digits(book, (1, 8)))
    assert np.abs(np.asarray(hidden, np.float32) - exact).max() < 0.2
