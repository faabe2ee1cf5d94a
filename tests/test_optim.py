"""Learning rates, decay, AdamW and averages against numbers written out by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax import optim, step
from prime_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
    constant_steps,
    trajectory_id,
)
from prime_jax.settings import set_path

RUN = RunConfig(
    batch_size=8,
    model=ModelConfig(vocab_size=16, layers=2, width=16, heads=1),
    subtokens=SubtokenConfig(length=2),
    data=DataConfig(seq_len=8),
    mesh=MeshConfig(replica=1, data=1, model=1),
)


def run(steps: int, **changes) -> RunConfig:
    return dataclasses.replace(RUN, steps=steps, optim=OptimConfig(**changes))


def compiled(schedule: str):
    """(all learning rates of a run, how often they were compiled)."""
    traces = []

    @jax.jit
    def rate(h: optim.Horizon, at):
        traces.append(at)
        return optim.learning_rate(schedule, h, at)

    def rates(config: RunConfig) -> list[float]:
        h = optim.horizon(config)
        return [float(rate(h, jnp.int32(at))) for at in range(config.steps)]

    return rates, traces


def cosine(done: float) -> float:
    """Peak 2, final rate a quarter of it."""
    return 0.5 + 1.5 * (1 + math.cos(math.pi * done)) / 2


def test_cosine_rates_and_one_function_for_two_horizons():
    rates, traces = compiled("cosine")
    common = {"peak_lr": 2.0, "final_lr_fraction": 0.25}
    short = rates(run(10, warmup_steps=4, **common))
    assert short == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, *(cosine(k / 6) for k in range(1, 7))], rel=1e-6
    )
    assert short[6] == pytest.approx(1.25)  # half way down
    assert short[-1] == pytest.approx(0.5)
    long = rates(run(25, warmup_steps=5, **common))
    assert long == pytest.approx(
        [0.4, 0.8, 1.2, 1.6, 2.0, *(cosine(k / 20) for k in range(1, 21))], rel=1e-6
    )
    at_once = rates(run(4, warmup_steps=0, **common))
    assert at_once == pytest.approx([cosine(k / 4) for k in range(1, 5)], rel=1e-6)
    assert len(traces) == 1


def test_wsd_rates_and_one_function_for_two_horizons():
    rates, traces = compiled("wsd")
    common = {"schedule": "wsd", "peak_lr": 2.0, "final_lr_fraction": 0.25}
    short = rates(run(10, warmup_steps=2, cooldown_fraction=0.3, **common))
    assert short == pytest.approx([1.0, *[2.0] * 6, 1.5, 1.0, 0.5], rel=1e-6)
    long = rates(run(20, warmup_steps=4, cooldown_fraction=0.5, **common))
    fall = [2 - 1.5 * k / 10 for k in range(1, 11)]
    assert long == pytest.approx([0.5, 1.0, 1.5, *[2.0] * 7, *fall], rel=1e-6)
    sharp = rates(run(5, warmup_steps=0, cooldown_fraction=0.0, **common))
    assert sharp == pytest.approx([2.0, 2.0, 2.0, 2.0, 0.5])
    assert len(traces) == 1


def test_the_constant_steps_of_a_run_are_those_before_its_rate_leaves_the_peak():
    h = lambda config: optim.horizon(config)  # noqa: E731
    rate = jax.jit(lambda h, at: optim.learning_rate("wsd", h, at))
    for steps in (1, 2, 7, 10, 99, 1000, 12_345):
        for cooldown in (0.0, 0.1, 0.2, 0.3, 1 / 3, 0.7, 1.0):
            config = run(steps, schedule="wsd", warmup_steps=0, cooldown_fraction=cooldown)
            rates = np.asarray(rate(h(config), jnp.arange(steps)))
            below = rates < np.float32(config.optim.peak_lr)
            assert constant_steps(config) == (below.argmax() if below.any() else steps - 1)
    assert constant_steps(run(100, schedule="cosine")) == 0


def test_a_trajectory_is_a_run_without_its_end():
    config = run(100, schedule="wsd", cooldown_fraction=0.2)
    same = {"steps": 200, "eval.examples": 3, "optim.cooldown_fraction": 0.5}
    same |= {"optim.final_lr_fraction": 0.0, "mesh.accumulate": 2, "data.path": "elsewhere"}
    for name, value in same.items():
        assert trajectory_id(set_path(config, name, value)) == trajectory_id(config)
    other = {"seed": 1, "batch_size": 16, "optim.peak_lr": 1e-2, "optim.warmup_steps": 7}
    other |= {"optim.ema": 0.9, "model.width": 32, "data.fingerprint": "f", "initial_weights": "w"}
    for name, value in other.items():
        assert trajectory_id(set_path(config, name, value)) != trajectory_id(config)


def test_runs_that_differ_in_horizon_share_a_program():
    one = run(10, warmup_steps=2, peak_lr=1e-3)
    other = run(99, warmup_steps=7, peak_lr=3e-3, final_lr_fraction=0.0, cooldown_fraction=0.5)
    assert step.program(one, 0) is step.program(other, 0)
    assert step.program(one, 0) is not step.program(run(10, weight_decay=0.2), 0)


@pytest.fixture(scope="module", params=["prime", "arm"])
def params(request):
    """Values in the shapes of a transformer's parameters; ARM's with a tied head and a table."""
    config = dataclasses.replace(RUN, family=request.param)
    if request.param == "arm":
        config = set_path(set_path(config, "subtokens.length", 1), "model.tied_head", True)
    shapes, rng = step.program(config, 0).abstract.params, np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


def is_vector(path, x) -> bool:
    """Whether a layer's parameter is a vector; those of the layers are stacked."""
    return x.ndim - ("layers" in jax.tree_util.keystr(path)) == 1


def test_a_step_without_gradient_shrinks_matrices_and_leaves_vectors(params):
    config, lr = OptimConfig(weight_decay=0.25), 0.5
    tx = optim.optimizer(RunConfig(optim=config))

    @jax.jit
    def still(params):
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zero, tx.init(params), params)
        return optim.apply(params, updates, jnp.float32(lr))

    after = still(params)
    before = jax.tree_util.tree_leaves_with_path(params)
    vectors = 0
    for (path, old), new in zip(before, jax.tree.leaves(after), strict=True):
        keep = 1.0 if is_vector(path, old) else 1 - lr * config.weight_decay  # 0.875: no rounding
        np.testing.assert_array_equal(new, keep * old, err_msg=jax.tree_util.keystr(path))
        vectors += is_vector(path, old)
    assert vectors == 5  # norms: of attention, feed-forward, q, k, and the last


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_steps_are_those_of_adamw_written_out(clip):
    """Five steps in float64: clipping first, then both moments, then decay of the matrix."""
    config = OptimConfig(weight_decay=0.1, clip=clip, b1=0.8, b2=0.9, eps=1e-3)
    rng, tx = np.random.default_rng(0), optim.optimizer(RunConfig(optim=config))
    with jax.enable_x64(True):
        want = {"table": rng.normal(size=(3, 4)), "norm": rng.normal(size=4)}
        got = jax.tree.map(jnp.asarray, want)
        state = tx.init(got)
        m = v = {"table": 0.0, "norm": 0.0}
        for at in range(1, 6):
            lr = 0.1 / at
            gradient = {k: rng.normal(0, at**2 / 4, x.shape) for k, x in want.items()}
            updates, state = tx.update(jax.tree.map(jnp.asarray, gradient), state, got)
            got = optim.apply(got, updates, jnp.float64(lr))
            norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
            scale = min(1, clip / norm) if clip else 1
            for k, g in gradient.items():
                m = m | {k: 0.8 * m[k] + 0.2 * scale * g}
                v = v | {k: 0.9 * v[k] + 0.1 * (scale * g) ** 2}
                first, second = m[k] / (1 - 0.8**at), v[k] / (1 - 0.9**at)
                decay = 0.1 * want[k] * (k == "table")
                want = want | {k: want[k] - lr * (first / (np.sqrt(second) + 1e-3) + decay)}
            for k, x in want.items():
                np.testing.assert_allclose(got[k], x, rtol=1e-12)


def test_averages_are_those_of_a_loop():
    """Decay min(0.9, (k + 1) / (k + 10)): 0.1 at first, 0.9 from step 80 on."""
    values = np.random.default_rng(0).normal(size=(100, 3))
    ema, want, decays = {"x": jnp.zeros(3)}, np.zeros(3), []
    for k, x in enumerate(values):
        ema = optim.averaged(ema, {"x": jnp.float32(x)}, 0.9, jnp.int32(k))
        decays.append(min(0.9, (k + 1) / (k + 10)))
        want = decays[-1] * want + (1 - decays[-1]) * x
        np.testing.assert_allclose(ema["x"], want, atol=1e-6)
    assert decays[0] == 0.1
    assert decays[79] < 0.9 == decays[80] == decays[-1]
