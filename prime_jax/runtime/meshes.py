"""The device mesh of a run: as configured, or chosen by devices, batch size and parameters."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.flops import param_counts
from prime_jax.runtime.sharding import AXES

# Value, gradient and two moments in float32: below this many parameters they all take less than
# 1 GiB per device, and sharding them would only add collectives.
SMALL = 64_000_000


class Choice(NamedTuple):
    """Sizes of the mesh axes and the reason for them."""

    replica: int
    data: int
    model: int
    why: str

    @property
    def devices(self) -> int:
        return self.replica * self.data * self.model

    def __str__(self) -> str:
        return f"mesh {self.replica} replica x {self.data} data x {self.model} model: {self.why}"


def choose(config: RunConfig, devices: int, slices: int = 1) -> Choice:
    """Sizes for `devices` devices in `slices` slices.

    Sizes that the config gives (not 0) are used. Otherwise: tensor parallelism only if the batch
    has fewer sequences than there are devices, replicas across slices, and parameters sharded
    within a slice unless they are few. Devices that cannot be used stay idle; `why` reports them.

    Raises:
        UserError: the configured sizes do not fit the devices, the batch or the model.
    """
    m, rows = config.mesh, config.batch_size // config.mesh.accumulate
    model, why = m.model, []
    if not model:
        model = 1
        while rows * model < devices and _divides_model(config, 2 * model):
            model *= 2
        if model > 1:
            why.append(f"{rows} sequences for {devices} devices")
    if not _divides_model(config, model):
        raise UserError(
            f"mesh.model = {model}: must divide the model's heads, kv_heads and feed-forward width"
        )
    groups = devices // model
    given = (m.replica or 1) * (m.data or 1)
    if given > groups or rows % given:
        limit = (
            f"there are {groups}" if given > groups else f"{rows} sequences do not divide evenly"
        )
        raise UserError(
            f"mesh.replica x mesh.data = {given} groups of {model} devices, but {limit}"
        )
    if m.replica and m.data:
        return Choice(m.replica, m.data, model, "as configured")
    if m.replica or m.data:
        other = max(n for n in range(1, groups // given + 1) if rows % (n * given) == 0)
        replica, data = (m.replica, other) if m.replica else (1, m.data)
        return Choice(replica, data, model, "as configured")
    used = max(n for n in range(1, groups + 1) if rows % n == 0)
    params = param_counts(config)["total"]
    if used == 1:
        replica, data = 1, 1
        if model == 1:
            why.append("one device")
        elif m.model:
            why.append("as configured")
    elif params <= SMALL:
        replica, data = used, 1
        why.append("few parameters: every device holds all of them")
    elif slices > 1 and used % slices == 0:
        replica, data = slices, used // slices
        why.append(f"parameters sharded within each of {slices} slices")
    else:
        replica, data = 1, used
        why.append("parameters sharded over all devices")
    if used * model < devices:
        why.append(f"{devices - used * model} of {devices} devices idle: {rows} sequences per step")
    return Choice(replica, data, model, "; ".join(why))


def make(config: RunConfig, devices: Sequence | int) -> tuple[Mesh | AbstractMesh, Choice]:
    """The mesh of a run over some of `devices`: real ones, those of a topology, or their number."""
    if isinstance(devices, int):
        choice = choose(config, devices)
        return AbstractMesh(choice[:3], AXES, axis_types=(AxisType.Explicit,) * 3), choice
    choice = choose(config, len(devices), count_slices(devices))
    used = devices[: choice.devices]
    idle = {d.process_index for d in devices} - {d.process_index for d in used}
    if idle:
        raise UserError(
            f"{choice}; {len(idle)} hosts would be idle: use fewer hosts, a larger batch, or "
            "mesh.model"
        )
    return Mesh(_grid(used, choice), AXES, axis_types=(AxisType.Explicit,) * 3), choice


def _grid(devices: Sequence, choice: Choice) -> np.ndarray:
    """Devices in the shape of the mesh; on TPUs neighbours on an axis are neighbours on the torus,
    and only `replica` or `data` spans slices."""
    shape, slices = choice[:3], count_slices(devices)
    if devices[0].platform != "tpu" or choice.replica * choice.data % slices:
        return np.array(devices).reshape(shape)
    across = (slices, 1, 1) if choice.replica % slices == 0 else (1, slices, 1)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inside = tuple(n // s for n, s in zip(shape, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )


def count_slices(devices: Sequence) -> int:
    """Number of slices: groups of devices with fast links."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def _divides_model(config: RunConfig, size: int) -> bool:
    m = config.model
    parts = (m.heads, m.kv_heads or m.heads, m.ffn)
    return all(part % size == 0 for part in parts)
