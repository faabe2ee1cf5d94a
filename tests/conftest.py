"""Shared set-up: eight virtual CPU devices, a small prepared dataset, tiny runs."""

import contextlib
import os
from pathlib import Path

# Tests compile far more than they compute: unoptimised code, made in one piece by the older
# emitters, takes an eighth of the time to make.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["PRIME_JAX_CACHE"] = "/nonexistent"  # what a developer has measured counts for nothing

import pytest
from hypothesis import settings

with contextlib.suppress(ImportError):  # its import resets logging: later, absl would close stderr
    import submitit  # noqa: F401

settings.register_profile("prime_jax", deadline=None)  # speed is not what tests are for
settings.load_profile("prime_jax")


def pytest_configure(config):
    """Many files make the same small programs: what one worker has compiled, all load."""
    if hasattr(config, "workerinput"):
        shared = Path(config.option.basetemp).parent / "compiled"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(shared))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="session")
def markov_data(tmp_path_factory):
    """A prepared order-one Markov source, V = 16, blocks of 16 tokens."""
    from prime_jax.data.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "markov"
    prepare("markov:V=16,order=1,seed=0,tokens=40000", "synthetic:16", out, seq_len=16, workers=1)
    return out


@pytest.fixture
def small_parts(monkeypatch):
    """Even a small corpus is prepared in several parts and shards."""
    from prime_jax.data import assemble, sources

    monkeypatch.setattr(sources, "PART_BYTES", 4000)
    monkeypatch.setattr(assemble, "SHARD_BYTES", 4000)


@pytest.fixture(scope="session")
def tiny(markov_data):
    """A Prime run of 12 steps on the Markov source, on one device."""
    from prime_jax import config as configs

    return configs.RunConfig(
        family="prime",
        steps=12,
        batch_size=8,
        model=configs.ModelConfig(vocab_size=16, layers=1, width=16, heads=1),
        subtokens=configs.SubtokenConfig(length=4),
        data=configs.DataConfig(path=str(markov_data), seq_len=16),
        optim=configs.OptimConfig(peak_lr=3e-3, warmup_steps=3),
        eval=configs.EvalConfig(examples=16, replicates=8, batch_size=64),
        log=configs.LogConfig(every=1),
        mesh=configs.MeshConfig(replica=1, data=1),
    )


@pytest.fixture(scope="session")
def quick(tiny):
    """`tiny` for tests of training: its evaluation compiles one estimator only."""
    from prime_jax.settings import set_path

    return set_path(tiny, "eval.estimators", ("subtoken",))


@pytest.fixture(scope="session")
def tiny_run(tiny, tmp_path_factory):
    """The directory of `tiny`, trained."""
    from prime_jax.train import train

    run_dir = tmp_path_factory.mktemp("tiny-run")
    train(tiny, run_dir, log=lambda _: None)
    return run_dir


@pytest.fixture
def lower_for():
    """`lower_for(chip, case)` is the program of a kernel's check case, lowered for an absent TPU.

    Catches block shapes and primitives that a TPU has not, in milliseconds and without libtpu.
    """
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh

    from prime_jax.hardware.chips import CHIPS

    def lower(chip: str, case) -> str:
        device = AbstractDevice(device_kind=CHIPS[chip].kind, num_cores=1, platform="tpu")
        mesh = AbstractMesh((1,), ("chip",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(case.function).trace(*case.arguments)
            return traced.lower(lowering_platforms=("tpu",)).as_text()

    return lower
