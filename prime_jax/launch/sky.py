"""SkyPilot: a rendered task per pool; `sky jobs launch` of it is one worker, on any cloud it knows."""

import shlex
from dataclasses import dataclass
from string import Template

from prime_jax.errors import UserError
from prime_jax.launch.engine import Pool, Sweep, option, template

APPLY = "sky jobs launch"
TPUS = {"v4": "tpu-v4", "v5e": "tpu-v5litepod", "v5p": "tpu-v5p", "v6e": "tpu-v6e"}
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
    return {f"{pool.name}.yaml": _task(pool, options) for pool in sweep.pools() if pool.runs}


def _task(pool: Pool, options: Options) -> str:
    where = pool.where
    if where is None:
        raise UserError("runs without a slice: name it here (--slice v5e-16) or in `sweep plan`")
    if where.chip.platform == "cuda":
        kind, nodes, extra = f"{GPUS[where.generation]}:{where.chips_per_host}", where.hosts, "cuda"
    elif where.generation in TPUS and where.slices == 1:
        # All hosts of a slice are one node to SkyPilot; it starts the command on each.
        kind, nodes, extra = f"{TPUS[where.generation]}-{where.name.rpartition('-')[2]}", 1, "tpu"
    else:
        raise UserError(f"{where.name}: not for SkyPilot; render for k8s")
    copies = [f"  {path}: {source}" for source, path in pool.copies(options.data)]
    return Template(template("sky.yaml")).substitute(
        name=pool.name,
        nodes=nodes,
        accelerators=kind,
        spot=str(options.spot).lower(),
        files="\n".join(["file_mounts:", *copies] if copies else ["file_mounts: {}"]),
        extra=extra,
        command=shlex.join(pool.work()),
    )
