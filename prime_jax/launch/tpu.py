"""Cloud TPU VMs as queued resources: the older interface, in maintenance; v4 and v5e exist only here."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prime_jax.errors import UserError
from prime_jax.launch import archive, cloud
from prime_jax.launch.cloud import SCOPE, CloudOptions, Machine
from prime_jax.launch.engine import Dialogue, Pool, Sweep, needs
from prime_jax.settings import setting


@dataclass(frozen=True)
class Options(CloudOptions):
    valid_until: str = setting(
        "", "cancel a request that waited this long, e.g. 6h or 2d", metavar="TIME"
    )


def render(sweep: Sweep, options: Options) -> dict[str, str]:
    """The request and the start-up script of one machine of each pool."""
    code, out = archive.address(sweep, archive.pack()), {}
    for pool in sweep.busy_pools():
        made = request(pool, options, f"{pool.name}-0000", code)
        metadata = made["tpu"]["node_spec"][0]["node"]["metadata"]
        out[f"{pool.name}-startup.sh"] = metadata["startup-script"]
        metadata["startup-script"] = f"(the text of {pool.name}-startup.sh)"
        out[f"{pool.name}-request.json"] = json.dumps(made, indent=2) + "\n"
    return out


def up(sweep: Sweep, options: Options, dialogue: Dialogue) -> int:
    """Delete dead or idle machines and create missing ones; with --watch, repeatedly."""
    return cloud.up(QueuedResources(options), sweep, options, dialogue)


def down(sweep: Sweep, options: Options, dialogue: Dialogue) -> int:
    """Delete every queued resource of this sweep with its machines; 1 if some remain."""
    return cloud.down(QueuedResources(options), sweep, options, dialogue)


def parent_of(options: Options) -> str:
    """Raises: UserError: no project or zone."""
    cloud.required(options, "tpu")
    return f"projects/{options.project}/locations/{options.zone}"


def request(pool: Pool, options: Options, name: str, code: str) -> dict[str, Any]:
    """A queued resource, as an argument of the client.

    Raises:
        UserError: options that exclude each other, or a slice that is not available as TPU VMs.
    """
    cloud.one_model(options, "spot", "reservation")
    slice_ = pool.slice_
    if slice_ is None:
        raise UserError("runs without a slice: give --slice v5e-16 here or in `sweep plan`")
    chip = slice_.chip
    if chip.platform != "tpu" or not chip.cloud:
        kind = f"{chip.kind} is" if chip.platform == "tpu" else "GPUs are"
        other = "use --on gce, or " * (chip.platform == "tpu")
        raise UserError(
            f"{slice_.name}: {kind} not available as TPU VMs; {other}render for k8s or sky"
        )
    family, runtime = chip.cloud
    size = slice_.name.rpartition("-")[2]
    network = {"network": options.network, "subnetwork": options.subnetwork}
    node = {
        "accelerator_type": f"{family}-{size}",
        "runtime_version": options.runtime_version or runtime,
        "network_config": {k: v for k, v in network.items() if v} | {"enable_external_ips": True},
        "service_account": {
            **({"email": options.service_account} if options.service_account else {}),
            "scope": [SCOPE],
        },
        "labels": {"prime-sweep": pool.sweep.name},
        "metadata": {
            "startup-script": cloud.startup(pool, options, name, code, _give_back(options, name))
        },
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
        duration = {"seconds": cloud.seconds(options.valid_until, "--valid-until")}
        made["queueing_policy"] = {"valid_until_duration": duration}
    return made


def _give_back(options: Options, name: str) -> list[str]:
    command = ["gcloud", "compute", "tpus", "queued-resources", "delete", name]
    where = ["--project", options.project, "--zone", options.zone]
    return [*command, *where, "--force", "--quiet", "--async"]


def client() -> Any:
    """The Cloud TPU client; tests replace it.

    Raises:
        UserError: its library is missing.
    """
    try:
        from google.cloud import tpu_v2
    except ImportError as error:
        raise needs("gcp", "google-cloud-tpu") from error
    return tpu_v2.TpuClient()


class QueuedResources(cloud.Cloud):
    """A project and zone of Cloud TPU."""

    title = "Cloud TPU"

    def __init__(self, options: Options):
        self.options, self.parent = options, parent_of(options)

    def connect(self) -> None:
        self.api = client()

    def note(self, pools: Sequence[Pool]) -> str:
        newer = sorted({pool.slice_.name for pool in pools if pool.slice_.chip.machine.image})
        if not newer:
            return ""
        return (
            "the Cloud TPU API is in maintenance (fixes only); "
            f"{', '.join(newer)} is also on Compute Engine: --on gce"
        )

    def check(self, pool: Pool, code: str) -> None:
        request(pool, self.options, f"{pool.name}-0000", code)

    def machines(self, sweep: Sweep) -> list[Machine]:
        found = []
        for one in self.api.list_queued_resources(parent=self.parent):
            name = one.name.rpartition("/")[2]
            if name.startswith(f"{sweep.name}-"):
                why = " ".join(one.state.failed_data.error.message.split())
                found.append(Machine(name, one.state.state.name, why))
        return sorted(found, key=lambda machine: machine.name)

    def create(self, pool: Pool, name: str, code: str) -> None:
        made = request(pool, self.options, name, code)
        self.api.create_queued_resource(
            parent=self.parent, queued_resource_id=name, queued_resource=made
        ).result(timeout=cloud.WAIT)

    def delete(self, names: Sequence[str]) -> None:
        from google.api_core.exceptions import NotFound

        begun = []
        for name in names:
            whole = {"name": f"{self.parent}/queuedResources/{name}", "force": True}
            with contextlib.suppress(NotFound):  # already deleted
                begun.append(self.api.delete_queued_resource(request=whole))
        cloud.wait(begun)
