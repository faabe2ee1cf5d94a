"""Meshes change where numbers are computed, not the numbers."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from prime_jax import meshes, optim, sharding, step
from prime_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
)
from prime_jax.errors import UserError
from prime_jax.metrics import Clock

STEPS = 20
TINY = RunConfig(
    family="prime",
    steps=STEPS,
    batch_size=8,
    model=ModelConfig(vocab_size=64, layers=2, width=32, heads=4, kv_heads=2),
    subtokens=SubtokenConfig(length=3),
    data=DataConfig(seq_len=16),
    optim=OptimConfig(peak_lr=3e-3, warmup_steps=2),
)
MESHES = {
    "data parallel": (8, 1, 1),
    "fully sharded": (1, 8, 1),
    "replicas": (2, 4, 1),
    "tensor parallel": (2, 2, 2),
}


def of_family(family: str, **mesh) -> RunConfig:
    length = 3 if family == "prime" else 1
    return dataclasses.replace(
        TINY, family=family, subtokens=SubtokenConfig(length=length), mesh=MeshConfig(**mesh)
    )


def trained(config: RunConfig) -> np.ndarray:
    """Losses and gradient norms of every step, [steps, 2]."""
    program, clock = step.program(config, eos_id=0), Clock()
    state = program.init(clock, 0)
    rng, rows = np.random.default_rng(0), np.arange(8, dtype=np.int32)
    out = []
    for _ in range(STEPS):
        tokens = rng.integers(0, 64, (8, 16), np.int32)
        batch = sharding.spread(program.mesh, (tokens, rows))
        state, metrics = program.train(clock, state, *batch, np.uint32(0), optim.horizon(config))
        out.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(out)


@pytest.fixture(scope="module")
def alone():
    return {f: trained(of_family(f, replica=1, data=1, model=1)) for f in ("arm", "mdm", "prime")}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("arm", "tensor parallel"),
        ("mdm", "tensor parallel"),
        ("prime", "tensor parallel"),
        ("prime", "fully sharded"),
        pytest.param("arm", "fully sharded", marks=pytest.mark.slow),
        pytest.param("mdm", "fully sharded", marks=pytest.mark.slow),
    ],
)
def test_any_mesh_gives_the_same_losses(alone, family, name):
    replica, data, model = MESHES[name]
    many = trained(of_family(family, replica=replica, data=data, model=model))
    np.testing.assert_allclose(many, alone[family], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["arm", "mdm", "prime"])
@pytest.mark.parametrize("name", ["data parallel", "replicas"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"remat": "full"}])
def test_any_mesh_and_option_gives_the_same_losses(alone, family, name, options):
    replica, data, model = MESHES[name]
    if 8 // options.get("accumulate", 1) < replica * data:
        replica = replica // 2
    many = trained(of_family(family, replica=replica, data=data, model=model, **options))
    np.testing.assert_allclose(many, alone[family], rtol=1e-5)


def test_the_optimizer_state_is_sharded_like_the_parameters():
    program = step.program(of_family("prime", replica=1, data=4, model=2), eos_id=0)
    state = program.init(Clock(), 0)
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    shown = {}
    for path, value in jax.tree_util.tree_leaves_with_path(state.params):
        shown[jax.tree_util.keystr(path)] = value.sharding.spec
    for moment in (adam.mu, adam.nu):
        found = {
            jax.tree_util.keystr(path): value.sharding.spec
            for path, value in jax.tree_util.tree_leaves_with_path(moment)
        }
        assert found == shown
    print(*(f"{name}: {spec}" for name, spec in shown.items()), sep="\n")
    assert shown["['layers']['gate']"] == PartitionSpec(None, "data", "model")
    assert shown["['layers']['attention_norm']"] == PartitionSpec(None, None)
    held = [x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(adam.mu)]
    assert min(held) == 1 / 8


@pytest.mark.parametrize(
    ("devices", "slices", "batch", "width", "expected"),
    [
        (1, 1, 8, 32, (1, 1, 1)),
        (8, 1, 8, 32, (8, 1, 1)),  # few parameters: nothing to share
        (8, 1, 8, 2048, (1, 8, 1)),
        (16, 2, 16, 2048, (2, 8, 1)),
        (16, 1, 8, 2048, (1, 8, 2)),  # fewer sequences than devices
        (6, 1, 8, 2048, (1, 4, 1)),  # two devices stay idle
    ],
)
def test_the_mesh_that_is_chosen(devices, slices, batch, width, expected):
    model = ModelConfig(vocab_size=4096, layers=2, width=width, heads=4, kv_heads=2)
    config = dataclasses.replace(TINY, batch_size=batch, model=model)
    choice = meshes.choose(config, devices, slices)
    assert choice[:3] == expected
    assert ("idle" in choice.why) == (choice.devices < devices)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=16), "there are 8"),
        (MeshConfig(data=3), "cannot share 8 sequences"),
        (MeshConfig(model=4), "mesh.model = 4"),  # two key-value heads
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        meshes.choose(dataclasses.replace(TINY, mesh=mesh), 8)


def test_hosts_without_work_are_refused():
    """A process outside the mesh could not take part in the step."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        process_index: int
        platform: str = "cpu"

    config = dataclasses.replace(TINY, mesh=MeshConfig(replica=1, data=2, model=2))
    with pytest.raises(UserError, match="2 hosts would have nothing to do"):
        meshes.make(config, [Device(i // 2) for i in range(8)])
