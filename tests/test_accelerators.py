import pytest

from prime_jax.errors import UserError
from prime_jax.sweep import accelerators


def machine(path, *files):
    for name in files:
        (path / name).mkdir(parents=True)
    return path


def visible(workers, environment, system):
    found = accelerators.partition(workers, environment, system)
    return [share.get("CUDA_VISIBLE_DEVICES", share.get("TPU_VISIBLE_CHIPS")) for share in found]


def test_gpus_are_shared_out(tmp_path):
    box = machine(tmp_path, *(f"proc/driver/nvidia/gpus/{i}" for i in range(4)))
    assert visible(4, {}, box) == ["0", "1", "2", "3"]
    assert visible(2, {}, box) == ["0,2", "1,3"]
    assert visible(2, {"CUDA_VISIBLE_DEVICES": "5,7"}, box) == ["5", "7"]
    assert visible(8, {"JAX_PLATFORMS": "cpu"}, box) == [None] * 8
    with pytest.raises(UserError, match="5 workers, but 4 GPUs"):
        accelerators.partition(5, {}, box)


def test_tpu_chips_are_shared_out(tmp_path):
    box = machine(tmp_path, *(f"dev/vfio/{i}" for i in range(4)), "dev/vfio/vfio")
    assert visible(4, {}, box) == ["0", "1", "2", "3"]
    assert visible(1, {}, box) == [None]
    with pytest.raises(UserError, match="4 TPU chips"):
        accelerators.partition(2, {}, box)


def test_a_machine_without_any(tmp_path):
    assert visible(3, {}, tmp_path) == [None] * 3
