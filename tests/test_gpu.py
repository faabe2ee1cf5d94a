"""On an NVIDIA GPU: attention, the head and training there against the same on this machine's CPU.

Run by `make test-gpu`; skipped, with the reason, where JAX finds no GPU.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax import config as configs
from prime_jax import optim, step
from prime_jax.kernels.attention import attention, attention_reference
from prime_jax.runtime import sharding
from prime_jax.runtime.metrics import Clock, memory_high_water

pytestmark = pytest.mark.gpu

MFU = Path(__file__).parents[1] / "benchmarks" / "mfu.py"
RUN = configs.RunConfig(
    family="prime",
    batch_size=4,
    model=configs.ModelConfig(vocab_size=300, layers=2, width=128, heads=2),
    subtokens=configs.SubtokenConfig(length=9),
    data=configs.DataConfig(seq_len=64),
    optim=configs.OptimConfig(peak_lr=1e-3, warmup_steps=1),
    mesh=configs.MeshConfig(replica=1, data=1),
)


@pytest.fixture(scope="module")
def gpu():
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX finds no GPU: {str(error).splitlines()[0][:200]}")


@pytest.fixture
def cpu():
    return jax.devices("cpu")[0]


def error(got, want) -> float:
    """Norm of the difference in units of the norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def pulled(function, *arguments):
    """Values and gradients for a fixed random cotangent, on the arguments' device."""

    @jax.jit
    def both(*arguments):
        out, pull = jax.vjp(function, *arguments)
        cotangent = jax.random.normal(jax.random.key(9), out.shape).astype(out.dtype)
        return out, *pull(cotangent)

    with jax.default_matmul_precision("highest"):
        return both(*arguments)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_equals_the_reference(gpu, cpu, causal, packed):
    """The implementation that `auto` takes for bfloat16: cuDNN's, where it serves the shapes."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, 256, 4, 64), (2, 256, 2, 64), (2, 256, 2, 64)]
    qkv = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]
    ids = (
        jnp.asarray(np.repeat([[0, 1, 2]], [100, 100, 56], axis=1).repeat(2, 0)) if packed else None
    )
    there = jax.device_put(qkv, gpu)
    got = pulled(lambda *a: attention(*a, causal, ids), *there)
    here = [jax.device_put(x, cpu).astype(jnp.float32) for x in qkv]
    with jax.default_device(cpu):
        want = pulled(lambda *a: attention_reference(*a, causal, ids), *here)
    for a, b in zip(got, want, strict=True):
        assert error(a.astype(jnp.float32), b) < 1e-2


def losses(config: configs.RunConfig, device, steps: int) -> list[float]:
    """Losses of the first steps on one device, from the same random tokens everywhere."""
    config = configs.validate(config)
    program, clock = step.make_program(config, 0, [device]), Clock()
    with jax.default_device(device):
        state = program.init(clock, config.seed)
        rng = np.random.default_rng(0)
        shape = (config.batch_size, config.data.seq_len)
        out = []
        for at in range(steps):
            tokens = rng.integers(0, config.model.vocab_size, shape, np.int32)
            rows = np.arange(config.batch_size, dtype=np.int32) + at * config.batch_size
            batch = sharding.shard(program.mesh, (tokens, rows))
            numbers = np.uint32(config.seed), optim.horizon(config)
            state, metrics = program.train(clock, state, *batch, *numbers)
            out.append(float(metrics.loss))
    return out


def family(name: str, dtype: str = "float32") -> configs.RunConfig:
    length = 9 if name == "prime" else 1
    return dataclasses.replace(
        RUN,
        family=name,
        steps=8,
        model=dataclasses.replace(RUN.model, dtype=dtype),
        subtokens=configs.SubtokenConfig(length=length),
    )


@pytest.mark.parametrize("name", ["arm", "mdm", "prime"])
def test_training_equals_the_cpu(gpu, cpu, name):
    with jax.default_matmul_precision("highest"):
        got, want = (losses(family(name), device, 8) for device in (gpu, cpu))
    np.testing.assert_allclose(got, want, rtol=2e-5)
    assert got[-1] != got[0]


@pytest.mark.parametrize("name", ["arm", "mdm", "prime"])
def test_bfloat16_training_stays_near_float32(gpu, cpu, name):
    got, want = losses(family(name, "bfloat16"), gpu, 8), losses(family(name), cpu, 8)
    np.testing.assert_allclose(got, want, rtol=1e-2)


def test_memory_is_reported(gpu):
    jax.block_until_ready(jax.device_put(np.ones(1 << 20, np.float32), gpu))
    assert memory_high_water() >= 4 << 20


def test_the_mfu_benchmark_runs(gpu):
    options = ["--sizes", "tiny", "--length", "256", "--tokens", "2048", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, MFU, *options], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [name in done.stdout for name in ("arm", "mdm", "prime")] == [True] * 3
