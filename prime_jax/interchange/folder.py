"""The exported folder: `model.safetensors`, `config.json` and the tokenizer; readable as RUN.

In memory, the head (and the embedding where l = 1) is in the order of codes; in the folder it is in
the order of token ids, see `layouts`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prime_jax.config import KernelConfig, ModelConfig, RunConfig
from prime_jax.data.tokenizers import Tokenizer
from prime_jax.errors import UserError
from prime_jax.interchange.layouts import OURS, Shape, body, body_tensors, check, finite
from prime_jax.interchange.tensors import open_weights
from prime_jax.runtime.records import read_json, write_json_atomic
from prime_jax.settings import from_dict, to_dict
from prime_jax.subtokens import Codebook, base

SCHEMA = 1
WEIGHTS, CONFIG, CODES = "model.safetensors", "config.json", "codes"


@dataclass(frozen=True, eq=False)
class Weights:
    """A model outside of JAX.

    Attributes:
        tensors: `layers.0.qkv`, ...: float32 [out, in], rows by token id (`layouts`).
        step: training step of the weights; 0 if unknown.
        assumed: what was neither read nor given when the weights were imported.
    """

    config: RunConfig
    codebook: Codebook
    tensors: dict[str, np.ndarray]
    step: int
    eos_id: int
    assumed: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits that identify the numbers."""
        return hash_of(self.tensors)


def hash_of(tensors: Mapping[str, np.ndarray]) -> str:
    """Twelve hex digits that identify named float32 arrays."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape} ".encode())
        digest.update(np.ascontiguousarray(tensors[name], "<f4"))
    return digest.hexdigest()[:12]


def imported(weights: Weights) -> Weights:
    """`weights` of another origin: their hash is part of what the run is."""
    return replace(weights, config=replace(weights.config, initial_weights=weights.hash))


def is_exported(directory: Path) -> bool:
    return (directory / WEIGHTS).is_file()


def embedding_shape(m: ModelConfig, slots: int) -> Shape:
    size = m.width if m.embedding == "sum" else m.width // slots
    return 1 if m.embedding == "cat_shared" else slots, base(m.vocab_size, slots) + 1, size


def shapes(config: RunConfig) -> dict[str, Shape]:
    """Every tensor of `model.safetensors` and its shape."""
    m = config.model
    out = {name: shape for name, (shape, _) in body(OURS, m).items()}
    out[OURS.embedding] = embedding_shape(m, config.subtokens.length)
    out[CODES] = (m.vocab_size,)
    return out if m.tied_head else out | {OURS.head: (m.vocab_size, m.width)}


def from_params(params: Any, book: Codebook) -> dict[str, np.ndarray]:
    """Our tensors [out, in] by token id, from the parameters of a run."""
    tree = jax.device_get(params)
    out = {"embedding": tree["embedding"], "final_norm": tree["final_norm"]}
    if book.length == 1:
        out["embedding"] = out["embedding"][:, [*book.codes, book.base]]
    if "head" in tree:
        out["head"] = tree["head"][book.rows]
    for name, stack in tree["layers"].items():
        out |= {f"layers.{i}.{name}": x.T for i, x in enumerate(stack)}
    return out


def to_params(tensors: dict[str, np.ndarray], config: RunConfig, book: Codebook) -> Any:
    """Inverse of `from_params`: NumPy arrays, layers stacked."""
    tree = {"embedding": tensors["embedding"], "final_norm": tensors["final_norm"]}
    if book.length == 1:
        tree["embedding"] = tree["embedding"][:, np.argsort([*book.codes, book.base])]
    if not config.model.tied_head:
        tree["head"] = tensors["head"][book.tokens]
    names = [name.partition("layers.0.")[2] for name in tensors if name.startswith("layers.0.")]
    layers = range(config.model.layers)
    return tree | {
        "layers": {
            name: np.stack([tensors[f"layers.{i}.{name}"].T for i in layers]) for name in names
        }
    }


def place(tree: Any, abstract: Any) -> Any:
    """Put NumPy arrays on the devices, with the shardings of `abstract`."""

    def put(x: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        x = np.ascontiguousarray(x, like.dtype)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: x[index])

    return jax.tree.map(put, tree, abstract)


def write(weights: Weights, out: Path, tokenizer: Tokenizer | None) -> None:
    """Write the folder; `config.json` last.

    Raises:
        UserError: `out` is not empty, or cannot be written.
    """
    write_tensors(weights, out)
    if tokenizer is not None:
        tokenizer.save(out)
    write_json_atomic(out / CONFIG, about(weights, tokenizer))


def write_tensors(weights: Weights, out: Path) -> None:
    """Make the folder, with `model.safetensors` in it.

    Raises:
        UserError: `out` is not empty, or cannot be written.
    """
    from safetensors.numpy import save_file

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; give a new folder")
    tensors = {f"{name}.weight": np.ascontiguousarray(x) for name, x in weights.tensors.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        codes = {CODES: weights.codebook.codes.astype(np.int64)}
        (out / WEIGHTS).touch()
        mode = (out / WEIGHTS).stat().st_mode  # the library writes for its user alone
        save_file(tensors | codes, out / WEIGHTS, metadata={"format": "pt"})  # PyTorch's, [out, in]
        (out / WEIGHTS).chmod(mode)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error


def about(weights: Weights, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The content of `config.json`."""
    c, book = weights.config, weights.codebook
    return {
        "model_type": "prime_jax",
        "schema": SCHEMA,
        "family": c.family,
        "vocab_size": book.vocab_size,
        "length": book.length,
        "base": book.base,
        "mask_id": book.base,  # the digit that means "masked"; for ARM: BOS
        "permutation_hash": book.hash,
        "tokenizer_hash": tokenizer.hash if tokenizer else None,
        "eos_id": weights.eos_id,
        "step": weights.step,
        "weights_hash": weights.hash,
        "assumed": list(weights.assumed),
        "run": to_dict(replace(c, kernels=KernelConfig())),  # chosen by whoever reads it
    }


def read_config(directory: Path) -> RunConfig:
    """The run that an exported folder came from.

    Raises:
        UserError: no `config.json`, a damaged one, or another schema.
    """
    return from_dict(RunConfig, _read_about(directory)["run"], str(directory / CONFIG))


def _read_about(directory: Path) -> dict[str, Any]:
    about = read_json(directory / CONFIG)
    wanted = ("run", "step", "eos_id", "permutation_hash")
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        raise UserError(
            f"{directory / CONFIG}: not the config of a folder exported by this version"
        )
    if missing := [key for key in wanted if key not in about]:
        raise UserError(f"{directory / CONFIG}: lacks {', '.join(missing)}")
    return about


def read(directory: Path) -> Weights:
    """Read an exported folder.

    Raises:
        UserError: a damaged file, unknown or missing tensors, wrong shapes, altered codes or
            weights, numbers that are not finite.
    """
    weights, expected = _read(directory)
    if weights.hash != expected:
        raise UserError(
            f"{directory}: its weights ({weights.hash}) differ from those of config.json "
            f"({expected}); `prime-jax import safetensors {directory} NEW` makes a run of its own "
            "of them"
        )
    return weights


def read_again(directory: Path) -> Weights:
    """Read an exported folder; weights that were altered since are another run's.

    Raises:
        UserError: as `read`, but for altered weights.
    """
    weights, expected = _read(directory)
    return weights if weights.hash == expected else imported(weights)


def _read(directory: Path) -> tuple[Weights, str]:
    """What an exported folder holds, and the hash that its weights had."""
    about, config, file = _read_about(directory), read_config(directory), directory / WEIGHTS
    tensors = open_weights(file)
    check(str(file), tensors, shapes(config))
    codes = tensors[CODES].read().astype(np.int64)
    slots = config.subtokens.length
    book = Codebook(slots, base(config.model.vocab_size, slots), codes)
    if book.hash != about["permutation_hash"]:
        raise UserError(
            f"{file}: its codes ({book.hash}) differ from those of config.json "
            f"({about['permutation_hash']})"
        )
    ours = body_tensors(OURS, str(file), config.model, tensors)
    for name in (OURS.embedding, OURS.head):
        if name in tensors:
            values = finite(str(file), name, tensors[name].float32())
            ours[name.removesuffix(".weight")] = values
    assumed = tuple(about.get("assumed", ()))
    weights = Weights(
        config=config,
        codebook=book,
        tensors=ours,
        step=about["step"],
        eos_id=about["eos_id"],
        assumed=assumed,
    )
    return weights, about.get("weights_hash", weights.hash)  # of folders before there was one
