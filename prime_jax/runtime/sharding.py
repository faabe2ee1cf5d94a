"""How a run is sharded over devices: the mesh axes and every PartitionSpec.

Three axes. `data` shards the batch and also every parameter and its optimizer state (fully sharded
data parallelism): a layer's weights are gathered when it runs and its gradients are scattered back.
`replica` shards the batch only, for slices with slow links between them and for small models.
`model` shards heads, feed-forward and vocabulary (tensor parallelism).

The step computes inside `shard_map`, so kernels see plain local arrays. Losses and gradients are
sums over the whole batch: results do not depend on the mesh, up to the order of additions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prime_jax.config import ModelConfig

REPLICA, DATA, MODEL = AXES = ("replica", "data", "model")
BATCH = PartitionSpec((REPLICA, DATA))
REPLICATED = PartitionSpec()

# The dimensions of each parameter that DATA and MODEL split; others are replicated.
SPLIT = {
    "embedding": (2, None),
    "qkv": (0, 1),
    "attention_out": (1, 0),
    "gate": (0, 1),
    "up": (0, 1),
    "down": (1, 0),
    "head": (1, 0),
}
# Replicated over MODEL, but each device uses them for its own heads only.
PARTIAL = ("q_norm", "k_norm")
STACKED = "layers"  # parameters below this name have a leading axis of layers


@dataclass(frozen=True)
class Shardings:
    """Every PartitionSpec of a run, and its use inside `shard_map`; static under `jit`.

    A dimension that is not divisible by the axis size is not split.

    Attributes:
        replica, data, model: sizes of the mesh axes.
    """

    replica: int = 1
    data: int = 1
    model: int = 1

    @classmethod
    def of(cls, mesh: Mesh) -> "Shardings":
        return cls(*(mesh.shape[axis] for axis in AXES))

    def axes(self, name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """The mesh axis of each dimension of a parameter (one layer's, without the stack)."""
        out: list[str | None] = [None] * len(shape)
        for dimension, axis in zip(SPLIT.get(name, (None, None)), (DATA, MODEL), strict=True):
            size = getattr(self, axis)
            if dimension is not None and size > 1 and shape[dimension] % size == 0:
                out[dimension] = axis
        return tuple(out)

    def local(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part of a parameter that one device holds."""
        axes = self.axes(name, shape)
        return tuple(
            n // getattr(self, axis) if axis else n for n, axis in zip(shape, axes, strict=True)
        )

    def gathered(self, name: str, shape: tuple[int, ...], value: jax.Array, dtype) -> jax.Array:
        """A parameter in `dtype`, gathered over DATA, still split over MODEL.

        Args:
            shape: of the whole parameter; `value` is this device's part.
        """
        axes = self.axes(name, shape)
        if DATA not in axes:
            return value.astype(dtype)
        return _gather(value, axes.index(DATA), dtype)

    def head_axis(self, model: ModelConfig) -> str | None:
        """The mesh axis that splits the head's rows, if one does."""
        shape = (model.vocab_size, model.width)
        return MODEL if not model.tied_head and MODEL in self.axes("head", shape) else None

    def specs(self, params: Any) -> Any:
        """The PartitionSpec of every parameter of a tree (arrays or their shapes)."""

        def spec(path, x):
            stacked = _names(path)[0] == STACKED
            axes = self.axes(_names(path)[-1], x.shape[1:] if stacked else x.shape)
            return PartitionSpec(*((None,) if stacked else ()), *axes)

        return jax.tree_util.tree_map_with_path(spec, params)

    def summed(self, gradients: Any, specs: Any) -> Any:
        """Gradients of one device's rows, summed over the devices that hold the same parameter."""

        def total(path, gradient, spec):
            over = [REPLICA] if DATA in spec else [REPLICA, DATA]
            if self.model > 1 and _names(path)[-1] in PARTIAL:
                over.append(MODEL)
            over = [
                axis for axis in over if getattr(self, axis) > 1
            ]  # XLA copies even for a sum of one
            return jax.lax.psum(gradient, tuple(over)) if over else gradient

        return jax.tree_util.tree_map_with_path(total, gradients, specs)


WHOLE = Shardings()  # one device


def _names(path: Any) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: jax.Array, dimension: int, dtype) -> jax.Array:
    """All-gather in the compute dtype; the gradient is reduce-scattered in float32."""
    return jax.lax.all_gather(part.astype(dtype), DATA, axis=dimension, tiled=True)


def _gather_forward(part, dimension, dtype):
    return _gather(part, dimension, dtype), None


def _gather_backward(dimension, dtype, _, gradient):
    gradient = gradient.astype(jnp.float32)
    return (jax.lax.psum_scatter(gradient, DATA, scatter_dimension=dimension, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def enter_split(x: jax.Array) -> jax.Array:
    """Identity forward, sum over MODEL backward: the input of a column-parallel matmul."""
    return x


enter_split.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, MODEL),))


@jax.custom_vjp
def leave_split(x: jax.Array) -> jax.Array:
    """Sum over MODEL forward, identity backward: the output of a row-parallel matmul."""
    return jax.lax.psum(x, MODEL)


leave_split.defvjp(lambda x: (leave_split(x), None), lambda _, g: (g,))


def per_device(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`shard_map` of `function`, which itself sums over devices."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


@lru_cache
def local_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """The rows of a global batch that this process's devices need, ascending.

    Processes that share a model-parallel group have the same rows.
    """
    held = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in held]))


def shard_local_rows(mesh: Mesh, tree: Any, batch: int) -> Any:
    """A global batch, sharded over the mesh, from this process's `local_rows` of it."""
    sharding, rows = NamedSharding(mesh, BATCH), local_rows(mesh, batch)

    def place(x):
        def part(index):
            first, last, _ = index[0].indices(batch)
            return x[np.searchsorted(rows, first) : np.searchsorted(rows, last)]

        return jax.make_array_from_callback((batch, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, tree)


def shard(mesh: Mesh, tree: Any) -> Any:
    """A global batch that every process holds whole, sharded over the mesh."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]), tree
    )
