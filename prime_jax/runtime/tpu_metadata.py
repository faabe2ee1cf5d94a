"""The pod of a Cloud TPU host, from its environment or its metadata server. Imports no JAX.

Kubernetes sets TPU_WORKER_HOSTNAMES and TPU_WORKER_ID. A TPU VM has neither: there the attributes
`agent-worker-number`, `worker-network-endpoints` and (several slices) `tpu-env` are read.
"""

import contextlib
import http.client
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from prime_jax.errors import UserError

# An address, not a name: resolving the name may take long where there is no such server.
ADDRESS = "169.254.169.254"
ATTRIBUTES = "/computeMetadata/v1/instance/attributes/"
TRIES, SECONDS = 2, 0.3  # to detect a server; most machines have none
MORE_TRIES, MORE_SECONDS = 6, 5.0  # once a server has answered: it may be in maintenance


class Pod(NamedTuple):
    """The hosts that train together, as text; the caller validates the numbers.

    Attributes:
        coordinator: name or address of the first host, without a port.
        source: where this was read from, for messages.
    """

    coordinator: str
    processes: str
    process: str
    source: str


def find(environment: Mapping[str, str]) -> Pod | None:
    """The pod of this host (it may have one host); None where there is none.

    Raises:
        UserError: variables or attributes that are incomplete or unreadable.
    """
    if "TPU_VISIBLE_CHIPS" in environment:
        return None  # one of several workers of this host, each with chips of its own
    if names := [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]:
        if "TPU_WORKER_ID" not in environment:
            raise UserError("TPU_WORKER_HOSTNAMES is set, but not TPU_WORKER_ID")
        number = environment["TPU_WORKER_ID"]
        return _pod(names, number, environment.get, "TPU pod")
    platforms = environment.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms.split(",")) or "TPU_SKIP_MDS_QUERY" in environment:
        return None
    server = environment.get("GCE_METADATA_HOST") or environment.get("GCE_METADATA_IP") or ADDRESS
    number = _attribute(server, "agent-worker-number", TRIES, SECONDS)
    if not number.isdigit():
        return None  # no server, another cloud's, or that of a machine without TPUs
    limits = (MORE_TRIES, MORE_SECONDS)
    ends = _attribute(server, "worker-network-endpoints", *limits).split(",")
    hosts = [_host(end) for end in ends]
    lines = _attribute(server, "tpu-env", *limits).splitlines()
    env = {name.strip(): value.strip(" '") for name, _, value in (x.partition(":") for x in lines)}
    return _pod(hosts, number, lambda name: environment.get(name, env.get(name)), "TPU metadata")


def _host(endpoint: str) -> str:
    """An endpoint is a host name, or name:number:address."""
    parts = endpoint.split(":")
    if len(parts) not in (1, 3) or not parts[-1]:
        raise UserError(f"TPU metadata: worker-network-endpoints: {endpoint!r} has no host")
    return parts[-1]


def _pod(hosts: list[str], number: str, get: Callable[[str], str | None], source: str) -> Pod:
    """One slice of these hosts, or all slices of a multislice job."""
    slices = get("MEGASCALE_NUM_SLICES") or "1"
    if slices == "1":
        return Pod(hosts[0], str(len(hosts)), number, source)
    first, own = get("MEGASCALE_COORDINATOR_ADDRESS"), get("MEGASCALE_SLICE_ID")
    try:
        process, processes = int(own or "") * len(hosts) + int(number), int(slices) * len(hosts)
    except ValueError:
        raise UserError(
            f"{source}: slice {own!r} of {slices!r}, host {number!r}: not whole numbers"
        ) from None
    if not first:
        raise UserError(f"{source}: {slices} slices, but no MEGASCALE_COORDINATOR_ADDRESS")
    return Pod(first.split(":")[0], str(processes), str(process), source)


def _attribute(server: str, name: str, tries: int, seconds: float) -> str:
    """An attribute of this machine; "" if it has none, or if no server answers in time."""
    for _ in range(tries):
        try:
            # Not urllib, which would use a proxy.
            with contextlib.closing(http.client.HTTPConnection(server, timeout=seconds)) as link:
                link.request("GET", ATTRIBUTES + name, headers={"Metadata-Flavor": "Google"})
                answer = link.getresponse()
                text = answer.read().decode().strip()
        except (OSError, http.client.HTTPException, ValueError):
            pass
        else:
            if answer.status < 500:
                return text if answer.status == 200 else ""
        time.sleep(seconds / 10)
    return ""
