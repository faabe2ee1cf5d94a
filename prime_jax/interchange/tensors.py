"""Files of named tensors: safetensors, and PyTorch's zip files read without PyTorch.

A pickle can execute code. Only tensors, storages and plain containers are allowed in the pickle of
a PyTorch file; any other name raises an error before it is imported.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prime_jax.errors import UserError

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
WRAPPERS = ("model", "state_dict", "module")  # keys of the weights in checkpoints
NO_WEIGHTS = "._extra_state"  # Megatron's bookkeeping for 8-bit training


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its shape, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def float32(self) -> np.ndarray:
        return self.read().astype(np.float32)


def open_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a checkpoint that `torch.save` wrote.

    Raises:
        UserError: no such file, a damaged one, one without named tensors, or a pickle with other
            objects than tensors.
    """
    _check_file(path)
    found = _safetensors(path) if path.suffix == ".safetensors" else _named(path, _unpickle(path))
    return {name: t for name, t in found.items() if not name.endswith(NO_WEIGHTS)}


def open_integers(path: Path) -> np.ndarray:
    """The integers of a `.npy` file, or of a file to which `torch.save` wrote one tensor.

    Raises:
        UserError: no such file, a damaged one, or other content.
    """
    _check_file(path)
    try:
        values = np.load(path, allow_pickle=False) if path.suffix == ".npy" else _unpickle(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable array ({error})") from error
    values = values.read() if isinstance(values, Tensor) else values
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "iu":
        raise UserError(f"{path}: expected one row of integers")
    return values


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with safe_open(path, framework="numpy") as file:
                return file.get_tensor(name)

        return read

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    return {name: Tensor(shape, reader(name)) for name, shape in shapes.items()}


class _TensorsOnly(pickle.Unpickler):
    """Unpickles references to tensors in a zip file and the containers around them."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.path, self.folder = path, folder

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("_io", "BytesIO"): io.BytesIO,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise UserError(
            f"{self.path}: its pickle contains {module}.{name}, but only tensors are read; save "
            "the weights alone: torch.save(model.state_dict(), FILE), or as safetensors"
        )

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, count = pid

        def read() -> np.ndarray:
            with zipfile.ZipFile(self.path) as archive:
                return np.frombuffer(archive.read(f"{self.folder}data/{key}"), dtype, count)

        return read


def _tensor(storage: Callable[[], np.ndarray], offset: int, shape, stride, *_: Any) -> Tensor:
    def read() -> np.ndarray:
        flat = storage()
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if min(shape, default=1) > 0 and not 0 <= offset <= last < len(flat):
            raise UserError(f"a tensor of shape {tuple(shape)} lies outside its storage")
        steps = [step * flat.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps).copy()

    return Tensor(tuple(shape), read)


def _unpickle(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inside = [name for name in names if name.endswith("data.pkl")]
            if len(inside) != 1:
                raise UserError(f"{path}: a zip file, but not one that torch.save wrote")
            folder = inside[0].removesuffix("data.pkl")
            order = f"{folder}byteorder"
            if order in names and archive.read(order) != b"little":
                raise UserError(f"{path}: written on a big-endian machine, which is not supported")
            return _TensorsOnly(path, archive, folder).load()
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path}: neither safetensors nor a zip file of torch.save (PyTorch 1.6 or newer)"
        ) from error
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from error


def _named(path: Path, content: Any) -> dict[str, Tensor]:
    """The mapping from names to tensors inside a checkpoint."""
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = content if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no named tensors")
    return tensors
