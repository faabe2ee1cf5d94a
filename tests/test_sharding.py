"""Meshes change where numbers are computed, not the numbers."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import mesh_runs
import numpy as np
import process_groups
import pytest
from jax.sharding import PartitionSpec
from mesh_runs import Rows, trained

from prime_jax import step
from prime_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
)
from prime_jax.errors import UserError
from prime_jax.runtime import meshes
from prime_jax.runtime.metrics import Clock
from prime_jax.runtime.sharding import AXES
from prime_jax.settings import to_dict

TINY = RunConfig(
    family="prime",
    steps=20,
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
    "fully sharded, tensor parallel": (1, 4, 2),
}


def of_family(family: str, **mesh) -> RunConfig:
    length = 3 if family == "prime" else 1
    return dataclasses.replace(
        TINY, family=family, subtokens=SubtokenConfig(length=length), mesh=MeshConfig(**mesh)
    )


@pytest.fixture(scope="module")
def alone():
    """20 steps of a family on one device."""
    return functools.cache(lambda f: trained(of_family(f, replica=1, data=1, model=1)))


def agree(one: tuple[np.ndarray, Rows], many: tuple[np.ndarray, Rows]) -> None:
    """The same numbers up to rounding, and the same corruption to the bit."""
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    assert many[1] == one[1]
    assert len(one[1]) == TINY.steps * TINY.batch_size


@pytest.mark.slow
def test_a_mesh_gives_the_same_losses(alone):
    replica, data, model = MESHES["fully sharded"]
    agree(alone("prime"), trained(of_family("prime", replica=replica, data=data, model=model)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["arm", "mdm", "prime"])
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"remat": "full"}])
def test_any_mesh_and_option_gives_the_same_losses(alone, family, name, options):
    replica, data, model = MESHES[name]
    if 8 // options.get("accumulate", 1) < replica * data:
        replica, data = (replica // 2, data) if replica > 1 else (replica, data // 2)
    many = trained(of_family(family, replica=replica, data=data, model=model, **options))
    agree(alone(family), many)


def in_two_processes(function: str, configs: list[RunConfig], folder: Path) -> list[list]:
    """What `mesh_runs.FUNCTION` gives for each config, from each of two processes."""
    (folder / "configs.json").write_text(json.dumps([to_dict(config) for config in configs]))
    words = [mesh_runs.__file__, function, str(folder / "configs.json"), str(folder / "out")]
    codes, texts = process_groups.ended(process_groups.start(words, 2, devices=8))
    assert codes == [0, 0], texts
    return [json.loads((folder / f"out.{process}").read_text()) for process in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["arm", "mdm", "prime"])
@pytest.mark.parametrize("name", ["fully sharded", "fully sharded, tensor parallel"])
def test_two_processes_of_four_devices_give_the_numbers_of_one_device(
    alone, family, name, tmp_path
):
    config = of_family(family, **dict(zip(AXES, MESHES[name], strict=True)))
    first, second = (found[0] for found in in_two_processes("trained", [config], tmp_path))
    assert not first[1].keys() & second[1].keys()  # each has half of every batch
    for numbers, _ in (first, second):
        agree(alone(family), (np.array(numbers), first[1] | second[1]))


def test_processes_and_meshes_hide_the_same_to_the_bit(tmp_path):
    """Also where a model is split between the processes, so that both hold every row."""
    objective = ObjectiveConfig(token_mask_rho=0.5, random_length=0.5)
    model = dataclasses.replace(TINY.model, heads=8, kv_heads=8)
    config = dataclasses.replace(TINY, steps=4, objective=objective, model=model)
    one, many, apart, shared = (
        dataclasses.replace(config, mesh=MeshConfig(*mesh))
        for mesh in [(1, 1, 1), (8, 1, 1), (1, 4, 2), (1, 1, 8)]
    )
    rows = mesh_runs.hidden(one)
    assert len(set(rows.values())) == len(rows) == 4 * TINY.batch_size
    assert mesh_runs.hidden(many) == rows
    first, second = in_two_processes("hidden", [apart, shared], tmp_path)
    assert not first[0].keys() & second[0].keys()
    assert first[0] | second[0] == first[1] == second[1] == rows


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
        (MeshConfig(data=3), "8 sequences do not divide evenly"),
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
    with pytest.raises(UserError, match="2 hosts would be idle"):
        meshes.make(config, [Device(i // 2) for i in range(8)])
