"""Counts against an unrolled model whose matrix products are read off its jaxpr."""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax import flops
from prime_jax.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    SubtokenConfig,
)
from prime_jax.errors import UserError
from prime_jax.evaluate import exact
from prime_jax.kernels.attention import by_blocks
from prime_jax.kernels.subtoken_head import subtoken_loss
from prime_jax.objectives import make_head
from prime_jax.subtokens import Codebook

SMALL = ModelConfig(vocab_size=21, layers=3, width=24, heads=4, kv_heads=2, ffn_multiple=4)


def run(family="prime", length=1, model=SMALL, **kwargs) -> RunConfig:
    return RunConfig(
        family=family,
        model=model,
        subtokens=SubtokenConfig(length=length),
        data=DataConfig(seq_len=10),
        **kwargs,
    )


def unrolled_parameters(config: RunConfig) -> dict:
    """Every array of the model, written out layer by layer (theory.md, "The backbone")."""
    m, length = config.model, config.subtokens.length
    hd, kv, ffn = m.width // m.heads, m.kv_heads or m.heads, m.ffn_multiple * m.width
    b = next(b for b in range(2, m.vocab_size + 2) if b**length >= m.vocab_size)
    layer = {
        "q": (m.width, m.width),
        "k": (m.width, kv * hd),
        "v": (m.width, kv * hd),
        "o": (m.width, m.width),
        "gate": (m.width, ffn),
        "up": (m.width, ffn),
        "down": (ffn, m.width),
        "norm1": (m.width,),
        "norm2": (m.width,),
    }
    if m.qk_norm:
        layer |= {"q_norm": (hd,), "k_norm": (hd,)}
    shapes = {f"{i}.{name}": shape for i in range(m.layers) for name, shape in layer.items()}
    shapes["final_norm"] = (m.width,)
    shapes["embedding"] = {
        "cat_shared": (b + 1, m.width // length),
        "cat": (length, b + 1, m.width // length),
        "sum": (length, b + 1, m.width),
    }[m.embedding]
    if not m.tied_head:
        shapes["head"] = (m.vocab_size, m.width)
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def unrolled_loss(params: dict, x: jax.Array, config: RunConfig) -> jax.Array:
    """Loss of one sequence; x [L, D] stands for the embedded tokens. Norms and RoPE cost no matmul.

    Block diffusion: x [2L, D], of which the first half is noisy and goes through the head.
    """
    m = config.model
    groups = m.kv_heads or m.heads
    for i in range(m.layers):
        p = {name.partition(".")[2]: a for name, a in params.items() if name.startswith(f"{i}.")}
        q = (x @ p["q"]).reshape(-1, m.heads, m.width // m.heads)
        k = (x @ p["k"]).reshape(-1, groups, m.width // m.heads)
        v = (x @ p["v"]).reshape(-1, groups, m.width // m.heads)
        k, v = (jnp.repeat(a, m.heads // groups, axis=1) for a in (k, v))
        scores = jax.nn.softmax(jnp.einsum("ihk,jhk->hij", q, k))
        x = x + jnp.einsum("hij,jhk->ihk", scores, v).reshape(x.shape) @ p["o"]
        x = x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
    probs = jax.nn.softmax(x[: config.data.seq_len] @ params["head"].T)
    length = config.subtokens.length
    if config.family == "prime" and length > 1:
        columns = length * flops.subtokens.base(m.vocab_size, length)
        return (probs @ jnp.ones((m.vocab_size, columns))).sum()  # the codebook is a constant
    return probs.sum()


def matmul_flops(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
            total += 2 * inner * eqn.outvars[0].aval.size
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            total += matmul_flops(sub)
    return total


@pytest.mark.parametrize("embedding", ["cat_shared", "cat", "sum"])
@pytest.mark.parametrize("length", [1, 2, 5])  # 5 does not divide the width
def test_parameter_counts_match_the_unrolled_model(embedding, length):
    for changes in ({}, {"qk_norm": False, "kv_heads": 0}, {"tied_head": length == 1}):
        config = run(
            length=length, model=dataclasses.replace(SMALL, embedding=embedding, **changes)
        )
        arrays = unrolled_parameters(config)
        counts = flops.param_counts(config)
        size = {name: int(a.size) for name, a in arrays.items()}
        assert counts["total"] == sum(size.values())
        body = sum(n for name, n in size.items() if name not in ("embedding", "head"))
        assert counts["nonembedding"] == body
        assert counts["nonembedding_plus_head"] == body + 21 * 24
        assert counts["reference"] == 12 * 24**2 * 3


@pytest.mark.parametrize(
    ("family", "length"), [("arm", 1), ("mdm", 1), ("prime", 1), ("prime", 2), ("prime", 5)]
)
def test_matmul_flops_match_the_jaxpr_of_a_training_step(family, length):
    config = run(family, length)
    params, x = unrolled_parameters(config), jnp.ones((10, SMALL.width))
    step = jax.make_jaxpr(jax.grad(unrolled_loss, argnums=(0, 1)), static_argnums=2)
    counted = matmul_flops(step(params, x, config).jaxpr)
    if family == "arm":  # the unrolled model computes the masked half of the attention too
        counted -= 3 * SMALL.layers * 2 * 10 * 10 * SMALL.width
    assert flops.flops_per_token(config, "matmul") * 10 == counted


@pytest.mark.parametrize("block", [1, 2, 10])
@pytest.mark.parametrize("length", [1, 5])
def test_block_diffusion_is_counted_at_its_doubled_length(length, block):
    plain = run(length=length)
    config = run(length=length, objective=ObjectiveConfig(block_length=block))
    params, x = unrolled_parameters(config), jnp.ones((20, SMALL.width))
    step = jax.make_jaxpr(jax.grad(unrolled_loss, argnums=(0, 1)), static_argnums=2)
    counted = matmul_flops(step(params, x, config).jaxpr)
    at = np.arange(20)
    hidden = 20 * 20 - by_blocks(at[:, None], at, 20, block).sum()  # scores that the mask hides
    counted -= 3 * SMALL.layers * 4 * hidden * SMALL.width
    assert flops.flops_per_token(config, "matmul") * 10 == counted
    reference = flops.flops_per_token(config, "reference")
    assert reference == 2 * flops.flops_per_token(plain, "reference")
    assert flops.param_counts(config) == flops.param_counts(plain)


def test_the_joint_loss_needs_no_marginals():
    marginal, joint = run(length=5), run(length=5, objective=ObjectiveConfig(loss="joint"))
    difference = flops.flops_per_token(marginal, "matmul") - flops.flops_per_token(joint, "matmul")
    assert difference == 4 * 21 * 5 * 2


@pytest.mark.parametrize(("vocab", "length"), [(16, 4), (27, 3), (64, 2)])
def test_full_codes_have_marginals_without_a_product(vocab, length):
    """The shipped head multiplies for its logits and their two gradients only; that is what counts."""
    model = dataclasses.replace(SMALL, vocab_size=vocab)
    config = run(length=length, model=model)
    joint = dataclasses.replace(config, objective=ObjectiveConfig(loss="joint"))
    for convention in flops.CONVENTIONS:
        assert flops.flops_per_token(config, convention) == flops.flops_per_token(joint, convention)
    head = make_head(config, Codebook.create(vocab, config.subtokens))
    h, rows = jnp.ones((6, model.width)), jnp.ones((vocab, model.width))
    row, masked, weight = jnp.arange(6), jnp.ones((6, length), bool), jnp.ones(6)

    def loss(h, rows):
        return subtoken_loss(head, h, rows, row, masked, weight).marginal

    counted = matmul_flops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(h, rows).jaxpr)
    assert counted == 3 * 2 * 6 * vocab * model.width


def test_the_network_alone_is_charged_for_no_columns():
    config = run(length=5)
    matmul, network = (flops.flops_per_token(config, name) for name in ("matmul", "network"))
    assert matmul - network == 4 * 21 * 5 * 2
    small = dataclasses.replace(SMALL, vocab_size=50257, layers=1, width=16, heads=1)
    tiny = run(length=2, model=small)  # most of the FLOPs would be those of the columns
    assert 1 - flops.flops_per_token(tiny, "network") / flops.flops_per_token(tiny, "matmul") > 0.8


@pytest.mark.parametrize(
    ("shape", "bidirectional", "causal"), [((6, 448, 7), 3.65, 3.27), ((36, 2816, 22), 1.50, 1.44)]
)
def test_ratios_to_the_published_convention(shape, bidirectional, causal):
    """theory.md, "FLOPs": GPT-2 vocabulary, 2048 tokens."""
    layers, width, heads = shape
    model = ModelConfig(vocab_size=50257, layers=layers, width=width, heads=heads)
    for family, expected in (("mdm", bidirectional), ("arm", causal)):
        config = RunConfig(family=family, model=model, data=DataConfig(seq_len=2048))
        ratio = flops.flops_per_token(config, "matmul") / flops.flops_per_token(config, "reference")
        assert ratio == pytest.approx(expected, abs=0.006)


def test_run_totals_and_unknown_convention():
    config = run(steps=7, batch_size=3)
    per_token = flops.flops_per_token(config, "matmul")
    assert flops.train_flops(config, "matmul") == pytest.approx(per_token * 7 * 3 * 10)
    assert flops.param_counts(config)["reference"] * 6 == flops.flops_per_token(config, "reference")
    with pytest.raises(UserError, match="matmul"):
        flops.flops_per_token(config, "matmull")


def test_an_evaluation_is_forward_passes():
    evaluation = EvalConfig(examples=10, replicates=8, estimators=("subtoken", "token", "finite:4"))

    def passes(family, length):
        config = run(family, length, eval=evaluation)
        forward = flops.flops_per_token(config, "matmul") / 3
        return flops.evaluation_flops(config, "matmul") / (forward * 10 * config.data.seq_len)

    assert passes("arm", 1) == pytest.approx(1)
    assert passes("prime", 5) == pytest.approx(8 * 3)
    assert passes("mdm", 1) == pytest.approx(8 * 2)


def test_a_chain_is_one_pass_a_unit():
    def passes(*names):
        config = run("prime", 5, eval=EvalConfig(examples=10, replicates=8, estimators=names))
        forward = flops.flops_per_token(config, "matmul") / 3
        tokens = 10 * config.data.seq_len**2
        return flops.evaluation_flops(config, "matmul") / (forward * tokens)

    assert passes("chain:l2r") == pytest.approx(1)  # exact: one replicate
    assert passes("chain:random") == pytest.approx(8)
    assert passes("chain:subtokens", "chain:confidence") == pytest.approx(5 * 8 + 1)


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("name", ["exact:subtoken", "exact:token", "bracket:16"])
def test_exact_likelihoods_are_as_many_passes_as_they_make_calls(name, block):
    evaluation = EvalConfig(examples=10, replicates=8, estimators=(name,))
    config = run("prime", 5, eval=evaluation, objective=ObjectiveConfig(block_length=block))
    tokens, length = block or config.data.seq_len, 5
    units = tokens if name == "exact:token" else tokens * length
    forward = flops.flops_per_token(config, "matmul") / 3
    passes = flops.evaluation_flops(config, "matmul") / (forward * 10 * config.data.seq_len)
    assert passes == pytest.approx(exact.requested(name).calls(units))
