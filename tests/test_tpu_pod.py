"""The hosts of a Cloud TPU pod, from a metadata server here, and from none."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prime_jax.errors import UserError
from prime_jax.runtime import distributed, tpu_metadata


@contextlib.contextmanager
def metadata(
    attributes: dict[str, str], busy: int = 0, late: dict[str, int] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """A metadata server: its address, and the attributes that were asked for.

    Args:
        busy: how often it says first that it is in maintenance.
        late: how often an attribute is asked for before it is there.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            asked.append(name)
            here = asked.count(name) > (late or {}).get(name, 0)
            known = here and name in attributes and self.headers["Metadata-Flavor"] == "Google"
            text = attributes[name].encode() if known else b"<html>not found</html>"
            self.send_response(503 if len(asked) <= busy else 200 if known else 404)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def host(number: int, hosts: int = 2, network: str = "10.0.0.{}", **more: str) -> dict[str, str]:
    """What the metadata of a TPU VM has."""
    ends = [f"unknown:{k}:{network.format(k)}" for k in range(hosts)]
    lines = {"ACCELERATOR_TYPE": "v5litepod-8", "WORKER_ID": str(number), **more}
    return {
        "agent-worker-number": str(number),
        "worker-network-endpoints": ",".join(ends),
        "tpu-env": "\n".join(f"{key}: '{value}'" for key, value in lines.items()),
    }


SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "10.9.9.9:8080",
}


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine may be slow to answer itself."""
    monkeypatch.setattr(tpu_metadata, "SECONDS", 10.0)
    monkeypatch.setattr(tpu_metadata, "MORE_SECONDS", 10.0)
    monkeypatch.setattr(tpu_metadata.time, "sleep", lambda _: None)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (host(1), ("10.0.0.0:8476", 2, 1)),
        ({**host(1), "worker-network-endpoints": "vm-0,vm-1,vm-2"}, ("vm-0:8476", 3, 1)),
        (host(1, network="fd00::{}"), ("[fd00::0]:8476", 2, 1)),
        ({k: v for k, v in host(1).items() if k != "tpu-env"}, ("10.0.0.0:8476", 2, 1)),
        (host(0, hosts=1), None),
        (host(1, hosts=2, **SLICES), ("10.9.9.9:8476", 4, 3)),
        (host(0, hosts=1, **SLICES), ("10.9.9.9:8476", 2, 1)),
        ({}, None),  # a machine of the same cloud without TPUs
    ],
)
@pytest.mark.parametrize("variable", ["GCE_METADATA_HOST", "GCE_METADATA_IP"])
def test_a_pod_is_read_from_the_metadata_server(attributes, expected, variable):
    with metadata(attributes) as (server, _):
        group = distributed.detect({variable: server})
    assert (group and (group.coordinator, group.processes, group.process)) == expected


def test_a_server_in_maintenance_is_asked_again():
    with metadata(host(1), busy=1) as (server, asked):
        assert distributed.detect({"GCE_METADATA_HOST": server}).processes == 2
    assert asked[:2] == ["agent-worker-number"] * 2


@pytest.mark.parametrize("name", ["worker-network-endpoints", "tpu-env"])
def test_attributes_that_come_late_are_waited_for(name):
    with metadata(host(1, **SLICES), late={name: 3}) as (server, asked):
        group = distributed.detect({"GCE_METADATA_HOST": server})
    assert (group.coordinator, group.processes, group.process) == ("10.9.9.9:8476", 4, 3)
    assert asked.count(name) == 4


def test_an_ipv6_coordinator_of_several_slices():
    for given in ("[fd00::9]:8080", "fd00::9"):
        slices = {**SLICES, "MEGASCALE_COORDINATOR_ADDRESS": given}
        with metadata(host(1, **slices)) as (server, _):
            group = distributed.detect({"GCE_METADATA_HOST": server})
        assert group.coordinator == "[fd00::9]:8476"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"agent-worker-number": "1"},
            "this is host 1, but worker-network-endpoints names 0 after",
        ),
        ({**host(1), "worker-network-endpoints": "a,a:b"}, "'a:b' has no host"),
        (host(5), "this is host 5, but worker-network-endpoints names 2 after"),
        (host(1, MEGASCALE_NUM_SLICES="2"), "slice None of '2'"),
        (host(1, MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="0"), "COORDINATOR_ADDRESS"),
    ],
)
def test_a_pod_that_is_half_described_is_refused(attributes, message):
    with metadata(attributes) as (server, _), pytest.raises(UserError, match=message):
        distributed.detect({"GCE_METADATA_HOST": server})


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_PLATFORMS": "cpu"},
        {"JAX_PLATFORMS": "cuda,cpu"},
        {"TPU_SKIP_MDS_QUERY": "1"},
        {"TPU_VISIBLE_CHIPS": "0"},  # one of several workers of a host
        {"TPU_VISIBLE_CHIPS": "0", "TPU_WORKER_HOSTNAMES": "a,b"},
        {"TPU_VISIBLE_DEVICES": "0", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"},
        # One host whose variables look like those of a pod.
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "3", "MEGASCALE_NUM_SLICES": "1"},
    ],
)
def test_nobody_is_asked_where_the_answer_is_known(environment):
    with metadata(host(1)) as (server, asked):
        assert distributed.detect(environment | {"GCE_METADATA_HOST": server}) is None
    assert not asked


def test_where_nobody_answers_a_process_is_alone_in_a_fraction_of_a_second(monkeypatch):
    monkeypatch.undo()
    with socket.socket() as silent:  # connections are made, and no more
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        began = time.monotonic()
        server = f"127.0.0.1:{silent.getsockname()[1]}"
        assert distributed.detect({"GCE_METADATA_HOST": server}) is None
        assert time.monotonic() - began < 1
    began = time.monotonic()
    assert distributed.detect({"GCE_METADATA_HOST": server}) is None
    assert time.monotonic() - began < 1


def test_two_hosts_of_a_pod_meet():
    """Only the metadata differ, as on Cloud TPU."""
    code = "from prime_jax.runtime import distributed, tpu_metadata; tpu_metadata.SECONDS = 10.0; distributed.start(print)"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    cluster = re.compile("PRIME_|JOBSET_|SLURM_|TPU_|MEGASCALE_|JAX_PLATFORMS")
    environment = {k: v for k, v in os.environ.items() if not cluster.match(k)}
    environment |= {"JAX_COORDINATOR_PORT": port, "PRIME_WAIT_SECONDS": "120"}
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(metadata(host(number, network="127.0.0.1")))[0]
            for number in range(2)
        ]
        group = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment | {"GCE_METADATA_HOST": server},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for server in servers
        ]
        texts = [process.communicate(timeout=200)[0] for process in group]
    assert [process.returncode for process in group] == [0, 0], texts
    for number, text in enumerate(texts):
        assert f"process {number}: waiting for 2 processes (TPU metadata)" in text
        assert f"process {number}: all 2 are here" in text
