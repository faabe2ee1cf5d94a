"""SkyPilot: a rendered task per pool; `sky jobs launch` of it is one worker, on any cloud it knows."""

import shlex
from dataclasses import dataclass

from prime_jax.errors import UserError
from prime_jax.launch.engine import Pool, Sweep, fill
from prime_jax.launch.tpu_request import CLOUD
from prime_jax.settings import Flags, setting

APPLY = "sky jobs launch"
GPUS = {"a100": "A100-80GB", "h100": "H100", "h200": "H200"}


@dataclass(frozen=True)
class Options(Flags):
    spot: bool = setting(False, "rent what may be taken away at any time, for less")
    data: str = setting("", "where the machines get prepared data from", metavar="gs://BUCKET/DIR")


def render(sweep: Sweep, options: Options) -> dict[str, str]:
    """One task per pool.

    Raises:
        UserError: a ROOT that the machines cannot reach, or runs without a slice.
    """
    if not sweep.on_object_store():
        raise UserError(
            f"{sweep.root}: machines elsewhere cannot see it; ROOT must be gs://BUCKET/DIR"
        )
    return {f"{pool.name}.yaml": _task(pool, options) for pool in sweep.busy_pools()}


def _task(pool: Pool, options: Options) -> str:
    slice_ = pool.slice_
    if slice_ is None:
        raise UserError("runs without a slice: name it here (--slice v5e-16) or in `sweep plan`")
    if slice_.chip.platform == "cuda":
        kind, nodes, extra = (
            f"{GPUS[slice_.generation]}:{slice_.chips_per_host}",
            slice_.hosts,
            "cuda",
        )
        arguments = []
    elif slice_.generation in CLOUD and slice_.slices == 1:
        # All hosts of a slice are one node to SkyPilot; it starts the command on each.
        family, runtime = CLOUD[slice_.generation]
        kind, nodes, extra = f"tpu-{family}-{slice_.name.rpartition('-')[2]}", 1, "tpu"
        arguments = ["accelerator_args:", f"  runtime_version: {runtime}"]
    else:
        raise UserError(f"{slice_.name}: not for SkyPilot; render for k8s")
    mounts = [f"  {path}: {source}" for source, path in pool.mounts(options.data)]
    return fill(
        "sky.yaml",
        name=pool.name,
        nodes=nodes,
        accelerators=kind,
        arguments=arguments,
        spot=str(options.spot).lower(),
        files=["file_mounts:", *mounts] if mounts else [],
        extra=extra,
        command=shlex.join(pool.work()),
    )
