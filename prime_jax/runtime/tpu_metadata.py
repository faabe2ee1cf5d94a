"""The slice of a TPU host, from its environment or its metadata server. Imports no JAX.

Kubernetes sets TPU_WORKER_HOSTNAMES and TPU_WORKER_ID. A TPU VM has neither: there the attributes
`agent-worker-number`, `worker-network-endpoints` and (several slices) `tpu-env` are read. They
come after the boot, and not all at once. JAX's own detection reads the same, but neither waits for
the list of hosts nor takes IPv6 addresses.
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
HOSTS_TRIES, ENV_TRIES, LATE_SECONDS = 24, 6, 5.0  # for attributes that are not there yet
OWN_CHIPS = {"TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES"}


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
    if not OWN_CHIPS.isdisjoint(environment):
        return None  # one of several workers of this host, each with chips of its own
    if names := [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]:
        slices = environment.get("MEGASCALE_NUM_SLICES") or "1"
        if len(names) == 1 and slices == "1":
            return None  # whatever its number
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
    hosts = _hosts(server, int(number))
    env = _tpu_env(server) if "MEGASCALE_NUM_SLICES" not in environment else {}
    return _pod(hosts, number, lambda name: environment.get(name, env.get(name)), "TPU metadata")


def _hosts(server: str, number: int) -> list[str]:
    """The hosts of the slice, when they are known up to this one.

    Raises:
        UserError: they are not after two minutes.
    """
    ends: list[str] = []
    for attempt in range(HOSTS_TRIES):
        if attempt:
            time.sleep(LATE_SECONDS)
        text = _attribute(server, "worker-network-endpoints", MORE_TRIES, MORE_SECONDS)
        ends = [end for end in text.split(",") if end]
        if len(ends) > number:
            return [_host(end) for end in ends]
    raise UserError(
        f"TPU metadata: this is host {number}, but worker-network-endpoints names {len(ends)} "
        f"after {HOSTS_TRIES * LATE_SECONDS:.0f} s"
    )


def _tpu_env(server: str) -> dict[str, str]:
    """The variables of `tpu-env`; none where a machine has no such attribute, or not in time."""
    text = ""
    for attempt in range(ENV_TRIES):
        if attempt:
            time.sleep(LATE_SECONDS)
        if text := _attribute(server, "tpu-env", MORE_TRIES, MORE_SECONDS):
            break
    lines = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip(" '") for name, _, value in lines}


def _host(endpoint: str) -> str:
    """An endpoint is a host name, or name:number:address."""
    parts = endpoint.split(":", 2)  # an IPv6 address has colons of its own
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
    return Pod(_without_port(first), str(processes), str(process), source)


def _without_port(address: str) -> str:
    """The host of `host`, `host:port`, `[IPv6]:port` or a bare IPv6 address."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]


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
