"""Compute Engine: each worker is a managed instance group of TPU hosts, made from a template.

Several hosts are one slice by a workload policy with its topology, and are created all at once
(bulk mode). Flex-start waits for capacity: one host by a resize request, several by bulk mode,
which does not take resize requests. A group, its template and its policy have one name, and one
mark in their description, with the zone: templates belong to all zones of a project. Groups repair
nothing (`up` does, so that all hosts of a slice are replaced together). docs/gce.md names the pages
of Google Cloud behind each choice.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from prime_jax.errors import UserError
from prime_jax.launch import archive, cloud
from prime_jax.launch.cloud import SCOPE, CloudOptions, Machine
from prime_jax.launch.engine import Dialogue, Pool, Sweep, needs
from prime_jax.settings import setting

IMAGES = "projects/ubuntu-os-accelerator-images/global/images/family"
DISK_GB = 100
SHORTEST, LONGEST = 600, 7 * 86400  # seconds of flex-start
ALIVE = ("RUNNING", "PROVISIONING", "STAGING", "REPAIRING")  # REPAIRING: Google restarts the host
LEAVING = ("STOPPING", "SUSPENDING")
KINDS = ("policy", "template", "group", "request")  # in the order of their creation


@dataclass(frozen=True)
class Options(CloudOptions):
    flex_start: str = setting(
        "",
        "wait until there is capacity and use it this long (flex-start), 10m to 7d, e.g. 12h",
        metavar="TIME",
    )


def render(sweep: Sweep, options: Options) -> dict[str, str]:
    """What would be created for one worker of each pool, as REST bodies, and its start-up script."""
    code, out = archive.address(sweep, archive.pack()), {}
    for pool in sweep.busy_pools():
        made = resources(pool, options, f"{pool.name}-0000", code)
        (script,) = made["template"]["properties"]["metadata"]["items"]
        out[f"{pool.name}-startup.sh"] = script["value"]
        script["value"] = f"(the text of {pool.name}-startup.sh)"
        out[f"{pool.name}-resources.json"] = json.dumps(made, indent=2) + "\n"
    return out


def up(sweep: Sweep, options: Options, dialogue: Dialogue) -> int:
    """Delete dead or idle groups and create missing ones; with --watch, repeatedly."""
    return cloud.up(InstanceGroups(options), sweep, options, dialogue)


def down(sweep: Sweep, options: Options, dialogue: Dialogue) -> int:
    """Delete every group, template and policy of this sweep; 1 if some remain."""
    return cloud.down(InstanceGroups(options), sweep, options, dialogue)


def resources(pool: Pool, options: Options, name: str, code: str) -> dict[str, dict[str, Any]]:
    """The REST bodies for one worker, by kind: policy (several hosts), template, group, request.

    Raises:
        UserError: no project or zone, options that exclude each other, or a slice that Compute
            Engine does not offer.
    """
    _place(options)
    cloud.one_model(options, "spot", "reservation", "flex_start")
    duration = _duration(options)
    slice_ = _offered(pool)
    hosts, parent = slice_.hosts, f"projects/{options.project}"
    group: dict[str, Any] = {
        "name": name,
        "description": mark(pool.sweep, options),
        "baseInstanceName": name,
        "instanceTemplate": f"{parent}/global/instanceTemplates/{name}",
        "targetSize": 0 if duration and hosts == 1 else hosts,
        "instanceLifecyclePolicy": {"defaultActionOnFailure": "DO_NOTHING"},
    }
    made = {"template": _template(pool, options, name, code, duration), "group": group}
    if hosts > 1:
        made["policy"] = {
            "name": name,
            "description": mark(pool.sweep, options),
            "workloadPolicy": {"type": "HIGH_THROUGHPUT", "acceleratorTopology": slice_.sides},
        }
        policy = f"{parent}/regions/{region(options)}/resourcePolicies/{name}"
        group["targetSizePolicy"] = {"mode": "BULK"}
        group["resourcePolicies"] = {"workloadPolicy": policy}
    elif duration:
        seconds = {"seconds": str(duration)}
        made["request"] = {"name": name, "resizeBy": hosts, "requestedRunDuration": seconds}
    return {kind: made[kind] for kind in KINDS if kind in made}


def mark(sweep: Sweep, options: Options) -> str:
    """The description by which a sweep's resources of a zone are known: only instances have labels."""
    return f"prime-sweep {sweep.name} {options.zone}"


def region(options: Options) -> str:
    return options.zone.rpartition("-")[0]


def _place(options: Options) -> None:
    """Raises: UserError: no project, no zone, or one that is none."""
    cloud.required(options, "gce")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+){2,}", options.zone):
        raise UserError(f"--zone {options.zone}: write a zone, e.g. us-central1-c")


def _offered(pool: Pool) -> Any:
    """The pool's slice.

    Raises:
        UserError: none, or one that Compute Engine does not offer.
    """
    slice_ = pool.slice_
    if slice_ is None:
        raise UserError("runs without a slice: give --slice v6e-16 here or in `sweep plan`")
    if slice_.chip.platform != "tpu":
        raise UserError(f"{slice_.name}: --on gce starts TPUs only; render for k8s or sky")
    if not slice_.chip.machine.image:
        raise UserError(
            f"{slice_.name}: Compute Engine offers v5p, v6e and tpu7x, no {slice_.generation}; "
            "use --on tpu"
        )
    if slice_.slices > 1:
        other = "--on tpu, or " * bool(slice_.chip.cloud)
        raise UserError(f"{slice_.name}: several slices need {other}render for k8s")
    return slice_


def _duration(options: Options) -> int:
    """Seconds of flex-start; 0 for another model. Raises: UserError: too short or too long."""
    if not options.flex_start:
        return 0
    duration = cloud.seconds(options.flex_start, "--flex-start")
    if not SHORTEST <= duration <= LONGEST:
        raise UserError(f"--flex-start {options.flex_start}: must be from 10m to 7d")
    return duration


def _template(pool: Pool, options: Options, name: str, code: str, duration: int) -> dict[str, Any]:
    slice_, machine = pool.slice_, pool.slice_.chip.machine
    image = options.runtime_version or machine.image
    disk = {
        "sourceImage": image if "/" in image else f"{IMAGES}/{image}",
        "diskSizeGb": str(DISK_GB),
        **({"diskType": machine.disk} if machine.disk else {}),
    }
    network = {
        key: value if "/" in value else f"{where}/{value}"
        for key, value, where in (
            ("network", options.network, "global/networks"),
            ("subnetwork", options.subnetwork, f"regions/{region(options)}/subnetworks"),
        )
        if value
    }
    script = cloud.startup(pool, options, name, code, _give_back(options, name))
    properties: dict[str, Any] = {
        "machineType": slice_.machine_type,
        "labels": {"prime-sweep": pool.sweep.name},
        "disks": [{"boot": True, "autoDelete": True, "initializeParams": disk}],
        "networkInterfaces": [
            (network or {"network": "global/networks/default"})
            | {"accessConfigs": [{"type": "ONE_TO_ONE_NAT", "name": "External NAT"}]}
        ],
        "serviceAccounts": [{"email": options.service_account or "default", "scopes": [SCOPE]}],
        "scheduling": {"onHostMaintenance": "TERMINATE", **_model(options, duration)},
        "metadata": {"items": [{"key": "startup-script", "value": script}]},
    }
    if options.reservation:
        properties["reservationAffinity"] = {
            "consumeReservationType": "SPECIFIC_RESERVATION",
            "key": "compute.googleapis.com/reservation-name",
            "values": [options.reservation],
        }
    elif duration:
        properties["reservationAffinity"] = {"consumeReservationType": "NO_RESERVATION"}
    return {"name": name, "description": mark(pool.sweep, options), "properties": properties}


def _model(options: Options, duration: int) -> dict[str, Any]:
    """How the hosts are rented."""
    if duration:
        return {
            "provisioningModel": "FLEX_START",
            "instanceTerminationAction": "DELETE",
            "maxRunDuration": {"seconds": str(duration)},
        }
    if options.spot:
        return {
            "provisioningModel": "SPOT",
            "instanceTerminationAction": "STOP",
            "automaticRestart": False,
        }
    if options.reservation:
        return {"provisioningModel": "RESERVATION_BOUND", "instanceTerminationAction": "DELETE"}
    return {"provisioningModel": "STANDARD"}


def _give_back(options: Options, name: str) -> list[str]:
    command = ["gcloud", "compute", "instance-groups", "managed", "delete", name]
    return [*command, "--project", options.project, "--zone", options.zone, "--quiet"]


def client() -> Any:
    """The clients of Compute Engine that are needed here; tests replace it.

    Raises:
        UserError: their library is missing.
    """
    try:
        from google.cloud import compute_v1
    except ImportError as error:
        raise needs("gcp", "google-cloud-compute") from error
    return clients(compute_v1)


def clients(compute_v1: Any, **how: Any) -> Any:
    """Args: how: arguments of each client, e.g. its credentials and endpoint."""
    return SimpleNamespace(
        policy=compute_v1.ResourcePoliciesClient(**how),
        template=compute_v1.InstanceTemplatesClient(**how),
        group=compute_v1.InstanceGroupManagersClient(**how),
        request=compute_v1.InstanceGroupManagerResizeRequestsClient(**how),
        machine=compute_v1.MachineTypesClient(**how),
    )


class InstanceGroups(cloud.Cloud):
    """A project and zone of Compute Engine."""

    title = "Compute Engine"

    def __init__(self, options: Options):
        _place(options)
        self.options = options
        self.zone = {"project": options.project, "zone": options.zone}
        self.where = {
            "policy": {"project": options.project, "region": region(options)},
            "template": {"project": options.project},
            "group": self.zone,
        }

    def connect(self) -> None:
        self.api = client()

    def note(self, pools: Sequence[Pool]) -> str:
        return ""

    def check(self, pool: Pool, code: str) -> None:
        resources(pool, self.options, f"{pool.name}-0000", code)

    def machines(self, sweep: Sweep) -> list[Machine]:
        names = {kind: set(self._named(kind, sweep)) for kind in self.where}
        states = {name: self._state(name) for name in names["group"]}
        return [
            Machine(name, *states.get(name, ("INCOMPLETE", "no instance group")))
            for name in sorted(set().union(*names.values()))
        ]

    def create(self, pool: Pool, name: str, code: str) -> None:
        from google.cloud import compute_v1

        self._offers(pool)
        types = {
            "policy": ("resource_policy_resource", compute_v1.ResourcePolicy),
            "template": ("instance_template_resource", compute_v1.InstanceTemplate),
            "group": ("instance_group_manager_resource", compute_v1.InstanceGroupManager),
            "request": (
                "instance_group_manager_resize_request_resource",
                compute_v1.InstanceGroupManagerResizeRequest,
            ),
        }
        of_group = {**self.zone, "instance_group_manager": name}
        for kind, body in resources(pool, self.options, name, code).items():
            argument, message = types[kind]
            resource = {argument: message.from_json(json.dumps(body))}
            where = self.where.get(kind, of_group)
            getattr(self.api, kind).insert(**where, **resource).result(timeout=cloud.WAIT)

    def delete(self, names: Sequence[str]) -> None:
        from google.api_core.exceptions import NotFound

        arguments = {"policy": "resource_policy", "template": "instance_template"}
        for kind in ("group", "template", "policy"):  # a group holds what it was made from
            argument, begun = arguments.get(kind, "instance_group_manager"), []
            for name in names:
                with contextlib.suppress(NotFound):
                    one = {**self.where[kind], argument: name}
                    begun.append(getattr(self.api, kind).delete(**one))
            cloud.wait(begun)

    def _named(self, kind: str, sweep: Sweep) -> Iterable[str]:
        """This sweep's resources of a kind; a name alone could be somebody else's."""
        ours = mark(sweep, self.options)
        for one in getattr(self.api, kind).list(**self.where[kind]):
            if one.name.startswith(f"{sweep.name}-") and one.description == ours:
                yield one.name

    def _offers(self, pool: Pool) -> None:
        """Raises: UserError: the zone has no such machines."""
        from google.api_core.exceptions import NotFound

        kind = pool.slice_.machine_type
        try:
            self.api.machine.get(**self.zone, machine_type=kind)
        except NotFound as error:
            raise UserError(
                f"{pool.slice_.name}: Compute Engine has no {kind} in {self.options.zone}; zones "
                f"with it: gcloud compute machine-types list --filter=name={kind}"
            ) from error

    def _state(self, name: str) -> tuple[str, str]:
        """State of a group, and the cloud's reason."""
        from google.api_core.exceptions import NotFound

        one = {**self.zone, "instance_group_manager": name}
        try:
            group = self.api.group.get(**one)
            requests = list(self.api.request.list(**one))  # before the hosts that one brings
            hosts = list(self.api.group.list_managed_instances(**one))
        except NotFound:
            return "DELETING", ""
        return state(group, hosts, requests)


def state(group: Any, hosts: Sequence[Any], requests: Sequence[Any]) -> tuple[str, str]:
    """(state, reason) of a group: of its hosts as the cloud lists them, and its resize requests."""
    if hosts and all(host.current_action == "DELETING" for host in hosts):
        return "DELETING", ""
    settled = [host for host in hosts if host.current_action == "NONE"]
    if any(host.instance_status in LEAVING for host in settled):
        return "SUSPENDING", ""  # its worker saves; to delete it now would be too early
    lost = [host for host in settled if host.instance_status not in ALIVE]
    if lost or 0 < len(settled) == len(hosts) < group.target_size:
        names = (f"{h.instance.rpartition('/')[2]} {h.instance_status}".rstrip() for h in lost)
        return "PREEMPTED", ", ".join(names) or f"{len(hosts)} of {group.target_size} hosts"
    if not hosts and requests:
        last = requests[-1]
        if last.state in ("FAILED", "CANCELLED"):
            return "FAILED", _reasons([last.status.error])
        if last.state == "SUCCEEDED":
            return "ENDED", "its run duration is over"
    elif not hosts and not group.target_size:
        return "ENDED", "no hosts, and none requested"
    if hosts and len(settled) == len(hosts):
        return "ACTIVE", ""
    bulk = group.status.bulk_instance_operation.last_progress_check.error
    return "WAITING", _reasons([bulk, *(host.last_attempt.errors for host in hosts)])


def _reasons(errors: Iterable[Any]) -> str:
    """The cloud's words, each once."""
    every = itertools.chain.from_iterable(error.errors for error in errors)
    return "; ".join(dict.fromkeys(" ".join(f"{e.code}: {e.message}".split()) for e in every))
