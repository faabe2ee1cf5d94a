"""The device mesh: the batch is shared over `data`, parameters are replicated.

Gradient sums and token counts are reduced over the mesh, so a step computes the same numbers on
any number of devices, up to the order of additions.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prime_jax.config import MeshConfig
from prime_jax.errors import UserError

DATA = "data"
BATCH = PartitionSpec(DATA)
REPLICATED = PartitionSpec()


def make_mesh(config: MeshConfig, batch_size: int) -> Mesh:
    """A mesh over `config.data` devices, or as many of this machine's as divide the batch.

    Raises:
        UserError: more devices than there are, or a batch that they cannot share.
    """
    devices = jax.devices()
    rows = batch_size // config.accumulate
    if config.data > len(devices):
        raise UserError(f"mesh.data = {config.data}: this machine has {len(devices)} devices")
    if config.data and rows % config.data:
        raise UserError(
            f"mesh.data = {config.data}: does not divide the {rows} sequences of a micro-batch"
        )
    count = config.data or max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    return Mesh(np.array(devices[:count]), (DATA,), axis_types=(AxisType.Explicit,))


def per_device(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on each device's share of the batch; it sums over `DATA` itself."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def share_batch(mesh: Mesh, tree: Any) -> Any:
    """This process's rows (leading axis) of a global batch, placed over the mesh."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    return jax.device_put(tree, NamedSharding(mesh, REPLICATED))
