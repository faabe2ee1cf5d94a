"""Files of tensors: what `torch.save` wrote is read without PyTorch, and no pickle gets to run."""

import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from prime_jax.errors import UserError
from prime_jax.interchange.tensors import open_integers, open_weights

ORACLES = Path(__file__).parent / "oracles"


def test_a_pytorch_checkpoint_is_read():
    # torch 2.13: torch.save({"model": OrderedDict(a=w, transposed=w.T, part=w[1:, 1:3],
    #   half=(w / 8).to(bfloat16), step=tensor(7)), "iter_num": 3, "lr": 0.1}), w = arange(12) [3, 4]
    found = open_weights(ORACLES / "torch_weights.pth")
    w = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {"a": w, "transposed": w.T, "part": w[1:, 1:3], "half": w / 8, "step": np.float32(7)}
    assert {n: t.shape for n, t in found.items()} == {n: x.shape for n, x in expected.items()}
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name].float32(), x)
    assert found["half"].read().dtype == ml_dtypes.bfloat16


def test_permutations_are_read(tmp_path):
    np.testing.assert_array_equal(
        open_integers(ORACLES / "torch_permutation.pt"), np.arange(9, -1, -1)
    )
    np.save(tmp_path / "p.npy", np.arange(4))
    np.testing.assert_array_equal(open_integers(tmp_path / "p.npy"), np.arange(4))
    for name, bad in {"f": np.ones(3), "m": np.ones((2, 2), int)}.items():
        np.save(tmp_path / f"{name}.npy", bad)
        with pytest.raises(UserError, match="integers"):
            open_integers(tmp_path / f"{name}.npy")
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="not a readable array"):
        open_integers(tmp_path / "o.npy")


def test_bfloat16_safetensors_become_float32(tmp_path):
    save_file({"a": np.ones(3, ml_dtypes.bfloat16)}, tmp_path / "w.safetensors")
    read = open_weights(tmp_path / "w.safetensors")["a"]
    assert (read.shape, read.float32().dtype) == ((3,), np.float32)


class Touches:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def torch_file(path, content, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


def test_a_pickle_with_a_program_is_refused_before_it_runs(tmp_path):
    trace = tmp_path / "trace"
    file = torch_file(tmp_path / "w.pth", pickle.dumps({"model": {"a": Touches(trace)}}))
    with pytest.raises(UserError, match=r"contains \w+\.mkdir, but only tensors are read"):
        open_weights(file)
    assert not trace.exists()


def test_other_files_are_refused_in_one_line(tmp_path):
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickle.dumps({"a": 1}))
    cases = {
        "no such file": tmp_path / "nowhere.pth",
        "neither safetensors nor a zip": bare,
        "damaged": torch_file(tmp_path / "cut.pth", pickle.dumps({"a": [1, 2]})[:-3]),
        "no named tensors": torch_file(tmp_path / "none.pth", pickle.dumps({"a": 1})),
        "big-endian": torch_file(tmp_path / "big.pth", pickle.dumps({}), byteorder=b"big"),
    }
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "x")
    cases["not one that torch.save wrote"] = tmp_path / "other.zip"
    for message, file in cases.items():
        with pytest.raises(UserError, match=message) as error:
            open_weights(file)
        assert "\n" not in str(error.value)
