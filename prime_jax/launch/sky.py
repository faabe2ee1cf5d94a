"""SkyPilot: a rendered task per pool; each `sky jobs launch` of it starts one worker."""

import shlex
from dataclasses import dataclass

from prime_jax import shipped
from prime_jax.errors import UserError
from prime_jax.launch.engine import Pool, Sweep, fill, scalar
from prime_jax.settings import Flags, setting

APPLY = "sky jobs launch"


@dataclass(frozen=True)
class Options(Flags):
    spot: bool = setting(False, "use spot machines: cheaper, but can be preempted at any time")
    data: str = setting(
        "", "bucket folder from which machines read prepared data", metavar="gs://BUCKET/DIR"
    )


def render(sweep: Sweep, options: Options) -> dict[str, str]:
    """One task per pool.

    Raises:
        UserError: a ROOT that is not in a bucket, runs without a slice, or no checkout.
    """
    if not shipped.is_checkout():
        raise UserError(
            "--on sky: its tasks install the checkout that they are launched from, and this is an "
            "installed package; render in a checkout, or use --on tpu or --on k8s"
        )
    if not sweep.on_object_store():
        raise UserError(
            f"{sweep.root}: cloud machines cannot access it; ROOT must be gs://BUCKET/DIR"
        )
    return {f"{pool.name}.yaml": _task(pool, options) for pool in sweep.busy_pools()}


def _task(pool: Pool, options: Options) -> str:
    slice_ = pool.slice_
    if slice_ is None:
        raise UserError("runs without a slice: give --slice v5e-16 here or in `sweep plan`")
    if slice_.chip.platform == "cuda":
        kind, nodes, extra = (
            f"{slice_.chip.sky}:{slice_.chips_per_host}",
            slice_.hosts,
            "cuda",
        )
        arguments = []
    elif slice_.chip.cloud and slice_.slices == 1:
        # For SkyPilot all hosts of a slice are one node; it starts the command on each host.
        family, runtime = slice_.chip.cloud
        kind, nodes, extra = f"tpu-{family}-{slice_.name.rpartition('-')[2]}", 1, "tpu"
        arguments = ["accelerator_args:", f"  runtime_version: {runtime}"]
    else:
        raise UserError(f"{slice_.name}: not supported by SkyPilot; render for k8s")
    mounts = [f"  {scalar(path)}: {scalar(source)}" for source, path in pool.mounts(options.data)]
    return fill(
        "sky.yaml",
        name=scalar(pool.name),
        nodes=nodes,
        accelerators=kind,
        arguments=arguments,
        spot=str(options.spot).lower(),
        files=["file_mounts:", *mounts] if mounts else [],
        extra=extra,
        command=shlex.join(pool.work()),
    )
