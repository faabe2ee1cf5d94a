"""The training step: micro-batches are weighted by their tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prime_jax import optim, step
from prime_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
)
from prime_jax.corrupt import step_key
from prime_jax.objectives import training_inputs
from prime_jax.runtime import sharding
from prime_jax.runtime.metrics import Clock
from prime_jax.subtokens import Codebook

EOS, BATCH, LENGTH = 15, 8, 8
CASES = {
    "segment ids": {"data": DataConfig(seq_len=LENGTH, segment_ids=True)},
    "random length": {"objective": ObjectiveConfig(random_length=1.0)},
}


class Bigram:
    """Reads each position and its neighbour off a table: a network that compiles quickly."""

    def init(self, key, digits_BxLxS):
        return {"params": {name: jax.random.normal(key, (17, 16)) for name in ("table", "head")}}

    def apply(self, variables, digits_BxLxS, segment_ids_BxL, keys_B):
        h_BxLxD = variables["params"]["table"][digits_BxLxS[..., 0]]
        return h_BxLxD + jnp.roll(h_BxLxD, 1, axis=1), variables["params"]["head"][:16]


def run(case: str, **mesh) -> RunConfig:
    config = RunConfig(
        family="mdm",
        batch_size=BATCH,
        model=ModelConfig(vocab_size=16, layers=1, width=16, heads=1),
        subtokens=SubtokenConfig(length=1),
        data=DataConfig(seq_len=LENGTH),
        optim=OptimConfig(clip=0.0),
        mesh=MeshConfig(model=1, **mesh),
    )
    return dataclasses.replace(config, **CASES[case])


def texts() -> np.ndarray:
    """Rows with more and more document ends, so that micro-batches differ in target tokens."""
    tokens = np.random.default_rng(0).integers(0, EOS, (BATCH, LENGTH), np.int32)
    tokens[np.arange(LENGTH) < np.arange(BATCH)[:, None]] = EOS
    return tokens


def gradient(config: RunConfig) -> tuple[dict, step.Metrics]:
    """Mean gradient, which the optimizer of the test keeps as its state, and metrics of a step."""
    program = step.make_program(config, EOS, jax.devices())
    rng = np.random.default_rng(0)

    def start(x):
        values = rng.normal(size=x.shape) if x.ndim else np.zeros(())
        return jax.device_put(values.astype(x.dtype), x.sharding)

    state = jax.tree.map(start, program.abstract)
    batch = sharding.shard(program.mesh, (texts(), np.arange(BATCH, dtype=np.int32)))
    horizon = optim.horizon(config)
    state, metrics = program.train(Clock(), state, *batch, np.uint32(0), horizon)
    return jax.tree.map(np.asarray, state.opt_state.trace), metrics


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        ("segment ids", {"replica": 1, "accumulate": 4}),
        pytest.param("random length", {"replica": 2, "accumulate": 2}, marks=pytest.mark.slow),
        pytest.param("segment ids", {"replica": 2, "accumulate": 2}, marks=pytest.mark.slow),
        pytest.param("random length", {"replica": 1, "accumulate": 4}, marks=pytest.mark.slow),
    ],
)
def test_parts_of_a_batch_are_weighted_by_their_tokens(case, mesh, monkeypatch):
    """Four micro-batches, or two on each of two devices, give the gradient of the whole batch."""
    config = run(case, replica=1, data=1)
    book = Codebook.create(16, config.subtokens)

    @jax.jit
    def charged(tokens_BxL):
        inputs = training_inputs(config, book, tokens_BxL, jnp.arange(BATCH), step_key(0, 0), EOS)
        return inputs.target_BxL.reshape(4, -1).sum(1)

    tokens = charged(texts())
    assert tokens.max() > 1.5 * tokens.min()

    monkeypatch.setattr(step, "build", lambda *_: Bigram())
    monkeypatch.setattr(optim, "optimizer", lambda _: optax.trace(decay=0.0))
    whole, metrics = gradient(config)
    parts, others = gradient(run(case, data=1, **mesh))
    for name in ("table", "head"):
        assert np.abs(whole[name]).max() > 0.01
        np.testing.assert_allclose(parts[name], whole[name], atol=2e-6)
    np.testing.assert_allclose(others, metrics, rtol=2e-6)
