"""The request for one Cloud TPU queued resource, with its start-up script."""

import re
import shlex
from dataclasses import dataclass
from typing import Any

from prime_jax.errors import UserError
from prime_jax.launch.engine import Pool, template
from prime_jax.settings import Flags, setting

PORT = 8476  # of the coordinator; JAX's newer default is closed by Cloud TPU's firewall rule


@dataclass(frozen=True)
class Options(Flags):
    project: str = setting("", "Google Cloud project")
    zone: str = setting("", "its zone, e.g. europe-west4-b")
    spot: bool = setting(False, "use spot machines: cheaper, but can be preempted at any time")
    reservation: str = setting("", "use machines of this reservation", metavar="NAME")
    valid_until: str = setting(
        "", "cancel a request that waited this long, e.g. 6h or 2d", metavar="TIME"
    )
    runtime_version: str = setting(
        "", "image of the machines (default: the usual one of the slice)"
    )
    network: str = setting("", "VPC network (default: the project's)")
    subnetwork: str = setting("", "its subnetwork")
    service_account: str = setting(
        "", "identity of the machines (default: the project's)", metavar="EMAIL"
    )
    data: str = setting(
        "", "bucket folder from which machines read prepared data", metavar="gs://BUCKET/DIR"
    )
    mount: bool = setting(False, "mount the data with gcsfuse instead of copying it")
    setup: tuple[str, ...] = setting(
        (), "shell line to run before the worker", metavar="LINE", repeat=True
    )
    again: bool = setting(False, "start machines although earlier ones failed")
    watch: bool = setting(False, "keep running: check every minute and replace preempted machines")


def parent_of(options: Options) -> str:
    for name in ("project", "zone"):
        if not getattr(options, name):
            raise UserError(f"--on tpu needs --{name}")
    return f"projects/{options.project}/locations/{options.zone}"


def request(pool: Pool, options: Options, name: str, code: str) -> dict[str, Any]:
    """A queued resource, as an argument of the client.

    Raises:
        UserError: options that exclude each other, or a slice that is not available as TPU VMs.
    """
    if options.spot and options.reservation:
        raise UserError("--spot and --reservation exclude each other")
    slice_ = pool.slice_
    if slice_ is None:
        raise UserError("runs without a slice: give --slice v5e-16 here or in `sweep plan`")
    chip = slice_.chip
    if chip.platform != "tpu" or not chip.cloud:
        kind = f"{chip.kind} is" if chip.platform == "tpu" else "GPUs are"
        raise UserError(f"{slice_.name}: {kind} not available as TPU VMs; render for k8s or sky")
    family, runtime = chip.cloud
    size = slice_.name.rpartition("-")[2]
    network = {"network": options.network, "subnetwork": options.subnetwork}
    node = {
        "accelerator_type": f"{family}-{size}",
        "runtime_version": options.runtime_version or runtime,
        "network_config": {k: v for k, v in network.items() if v} | {"enable_external_ips": True},
        "service_account": {
            **({"email": options.service_account} if options.service_account else {}),
            "scope": ["https://www.googleapis.com/auth/cloud-platform"],
        },
        "labels": {"prime-sweep": pool.sweep.name},
        "metadata": {"startup-script": startup(pool, options, name, code)},
    }
    spec = {"parent": parent_of(options), "node": node}
    if slice_.slices > 1:
        spec["multislice_params"] = {"node_count": slice_.slices, "node_id_prefix": name}
    else:
        spec["node_id"] = name
    made: dict[str, Any] = {"tpu": {"node_spec": [spec]}}
    if options.spot:
        made["spot"] = {}
    if options.reservation:
        made["guaranteed"], node["scheduling_config"] = {}, {"reserved": True}
        made["reservation_name"] = f"{parent_of(options)}/reservations/{options.reservation}"
    if options.valid_until:
        seconds = {"seconds": _seconds(options.valid_until)}
        made["queueing_policy"] = {"valid_until_duration": seconds}
    return made


def startup(pool: Pool, options: Options, name: str, code: str) -> str:
    """The start-up script of one machine: its variables, then templates/tpu_startup.sh."""
    values = {
        "PRIME_ROOT": pool.sweep.root,
        "PRIME_CODE": code,
        "PRIME_NAME": name,
        "PRIME_PROJECT": options.project,
        "PRIME_ZONE": options.zone,
        "PRIME_SLICE": pool.slice_.name,
        "PRIME_DATA": "\n".join(f"{a} {b}" for a, b in pool.mounts(options.data)),
        "PRIME_MOUNT": "yes" if options.mount else "",
        "PRIME_SETUP": "\n".join(options.setup),
        "JAX_COORDINATOR_PORT": str(PORT),
    }
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in values.items())
    return f"#!/usr/bin/env bash\n{exports}{template('tpu_startup.sh')}"


def _seconds(text: str) -> int:
    match = re.fullmatch(r"(\d+)([mhd])", text)
    if not match:
        raise UserError(f"--valid-until {text}: write 90m, 6h or 2d")
    return int(match[1]) * {"m": 60, "h": 3600, "d": 86400}[match[2]]
