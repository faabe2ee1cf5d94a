"""SkyPilot: a rendered task per pool; `sky jobs launch` of it is one worker, on any cloud it knows."""

import shlex
from dataclasses import dataclass

from prime_jax.errors import UserError
from prime_jax.launch.engine import Pool, Sweep, fill, option
from prime_jax.launch.tpu_request import CLOUD

APPLY = "sky jobs launch"
GPUS = {"a100": "A100-80GB", "h100": "H100", "h200": "H200"}


@dataclass(frozen=True)
class Options:
    spot: bool = option(False, "rent what may be taken away at any time, for less")
    data: str = option("", "where the machines get prepared data from", metavar="gs://BUCKET/DIR")


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
    where = pool.where
    if where is None:
        raise UserError("runs without a slice: name it here (--slice v5e-16) or in `sweep plan`")
    if where.chip.platform == "cuda":
        kind, nodes, extra = f"{GPUS[where.generation]}:{where.chips_per_host}", where.hosts, "cuda"
        arguments = []
    elif where.generation in CLOUD and where.slices == 1:
        # All hosts of a slice are one node to SkyPilot; it starts the command on each.
        family, runtime = CLOUD[where.generation]
        kind, nodes, extra = f"tpu-{family}-{where.name.rpartition('-')[2]}", 1, "tpu"
        arguments = ["accelerator_args:", f"  runtime_version: {runtime}"]
    else:
        raise UserError(f"{where.name}: not for SkyPilot; render for k8s")
    copies = [f"  {path}: {source}" for source, path in pool.copies(options.data)]
    return fill(
        "sky.yaml",
        name=pool.name,
        nodes=nodes,
        accelerators=kind,
        arguments=arguments,
        spot=str(options.spot).lower(),
        files=["file_mounts:", *copies] if copies else [],
        extra=extra,
        command=shlex.join(pool.work()),
    )
