"""launch/: shellcheck, and the start-up script run as a Cloud TPU VM would, with stand-ins for tools."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fake_trainer
import pytest

from prime_jax import shipped
from prime_jax.hardware import slices
from prime_jax.launch import archive, engine, tpu_request
from prime_jax.sweep import state

LAUNCH = engine.REPO / "launch"
ROOT = "gs://bucket/sweep"

GCLOUD = """#!/usr/bin/env bash
# gs:// is a folder; what else is asked of the cloud is written down.
set -eu
here() { echo "$BUCKETS/${1#gs://}"; }
echo "$*" >>"$BUCKETS/calls"
case "$1 $2" in
"storage cp")
  from=$3 to=$4
  [[ $from == gs://* ]] && from=$(here "$from")
  [[ $to == gs://* ]] && to=$(here "$to")
  mkdir -p "$(dirname "$to")"
  if [[ $from == - ]]; then cat >"$to"; else cp "$from" "$to"; fi ;;
"storage rsync") cp -r "$(here "$4")/." "$5" ;;
"compute tpus") exit "${REFUSE_DELETE:-0}" ;;
esac
"""
PYTHON3 = """#!/usr/bin/env bash
# `pip install --target DIR uv` brings the stand-in for uv.
set -eu
mkdir -p "$HERE/home/uv/bin"
cp "$HERE/tools/uv-stand-in" "$HERE/home/uv/bin/uv"
exit "${INSTALL_FAILS:-0}"
"""
UV = """#!/usr/bin/env bash
set -eu
echo "uv $*" >>"$BUCKETS/calls"
if [[ $1 == venv ]]; then mkdir -p "$4/bin"; cp "$HERE/tools/worker" "$4/bin/prime-jax"; fi
[[ $1 != pip ]] || test -f constraints.txt
"""
FUSE = """#!/usr/bin/env bash
echo "gcsfuse $*" >>"$BUCKETS/calls"
"""
WORKER = """#!/usr/bin/env bash
# Leaves with the next of $CODES; `wait` waits for SIGTERM and leaves with 85.
echo "worker $* at ${PRIME_COORDINATOR:-alone} ${PRIME_PROCESS_ID:-0}/${PRIME_PROCESSES:-1}" >>"$BUCKETS/calls"
test ! -e "$PRIME_LOCK" || echo "stale lock" >>"$BUCKETS/calls"
echo locked >"$PRIME_LOCK"
n=$(cat "$HERE/count" 2>/dev/null || echo 0)
echo $((n + 1)) >"$HERE/count"
codes=($CODES)
if [[ ${codes[n]} == wait ]]; then
  trap 'exit 85' TERM
  touch "$HERE/waiting"
  while :; do sleep 0.05; done
fi
exit "${codes[n]}"
"""


def metadata(index: int, hosts: int, tpu_env: str, network: str) -> ThreadingHTTPServer:
    """The attributes of host `index`, served as the metadata server does."""
    attributes = {
        "agent-worker-number": str(index),
        "worker-network-endpoints": ",".join(
            f"unknown:{k}:{network.format(k)}" for k in range(hosts)
        ),
        "tpu-env": f"ACCELERATOR_TYPE: 'v5litepod-{4 * hosts}'\n{tpu_env}",
    }

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            value = attributes.get(self.path.rpartition("/attributes/")[2], "").encode()
            known = value and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(value)))
            self.end_headers()
            self.wfile.write(value)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Vm:
    """One host in a sandbox: its disk, the bucket, and stand-ins first on PATH."""

    def __init__(self, path: Path, buckets: Path | None = None):
        self.path, self.buckets = path, buckets or path / "buckets"
        tools = path / "tools"
        tools.mkdir(parents=True)
        stand_ins = {"gcloud": GCLOUD, "python3": PYTHON3, "uv-stand-in": UV, "worker": WORKER}
        stand_ins["gcsfuse"] = FUSE
        for name, text in stand_ins.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)

    def install(self, pool: engine.Pool, code: str) -> None:
        """Write the start-up script."""
        setup = (f"touch {self.path}/was-set-up",)
        options = tpu_request.Options(project="p", zone="z", data="gs://bucket/data", setup=setup)
        self.script = tpu_request.startup(pool, options, "prime-x-v5e-16-abcd", code)
        (self.path / "startup.sh").write_text(self.script)

    def boot(
        self, codes: str, *, index=0, hosts=1, tpu_env="", network="10.0.0.{}", **environment: str
    ):
        self.server = metadata(index, hosts, tpu_env, network)
        values = {
            "PATH": f"{self.path}/tools:{os.environ['PATH']}",
            "HERE": str(self.path),
            "BUCKETS": str(self.buckets),
            "CODES": codes,
            "PRIME_HOME": str(self.path / "home"),
            "PRIME_LOCK": str(self.path / "libtpu_lockfile"),
            "PRIME_PAUSE_SECONDS": "0",
            "PRIME_SHIP_SECONDS": "0.2",
            "GCE_METADATA_HOST": f"127.0.0.1:{self.server.server_port}",
        }
        return subprocess.Popen(["bash", self.path / "startup.sh"], env=values | environment)

    def run(self, codes: str, **how) -> int:
        """Boot, and wait for the end."""
        process = self.boot(codes, **how)
        try:
            return process.wait(timeout=60)
        finally:
            process.kill()
            self.halt()

    def halt(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def calls(self) -> list[str]:
        return (self.buckets / "calls").read_text().splitlines()

    def deletions(self) -> list[str]:
        return [call for call in self.calls if call.startswith("compute tpus queued-resources del")]

    def marks(self) -> dict[str, str]:
        folder = self.buckets / "bucket/sweep/launch"
        return {path.name: path.read_text().strip() for path in folder.glob("prime-*")}

    def log(self, host: object = 0) -> str:
        folder = self.buckets / "bucket/sweep/logs/prime-x-v5e-16-abcd"
        return (folder / f"host-{host}.log").read_text()


@pytest.fixture
def vm(tmp_path):
    """A host whose worker, code and data are stand-ins, too."""
    made = Vm(tmp_path)
    (made.buckets / "bucket/data/c4").mkdir(parents=True)
    (made.buckets / "bucket/data/c4/manifest.json").write_text("{}")
    (made.buckets / "bucket/sweep/launch").mkdir(parents=True)
    code = "bucket/sweep/launch/code.tar.gz"
    with tarfile.open(made.buckets / code, "w:gz") as tar:
        tar.add(engine.REPO / "constraints.txt", "constraints.txt")
    data = (str(tmp_path / "disk/c4"),)
    pool = engine.Pool(engine.Sweep(ROOT, None, 1), slices.parse("v5e-16"), 1, data)
    made.install(pool, f"gs://{code}")
    return made


def test_scripts_pass_shellcheck(vm):
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or "shellcheck"
    scripts = [*shipped.place("launch").glob("*.sh"), vm.path / "startup.sh"]
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_machine_installs_itself_works_and_gives_itself_back(vm):
    assert vm.run("0") == 0
    assert [call for call in vm.calls if call.startswith("worker")] == [
        f"worker sweep work {ROOT} --slice v5e-16 at alone 0/1"
    ]
    assert any(call.startswith("uv venv --python 3.12") for call in vm.calls)
    assert any("-c constraints.txt -e .[tpu,gcp]" in call for call in vm.calls)
    assert (vm.path / "disk/c4/manifest.json").exists(), "data where the runs look for it"
    assert (vm.path / "was-set-up").exists()
    assert vm.marks() == {"prime-x-v5e-16-abcd.idle": "exit code 0"}
    (deletion,) = vm.deletions()
    assert deletion.split()[4:] == (
        ["prime-x-v5e-16-abcd", "--project", "p", "--zone", "z", "--force", "--quiet", "--async"]
    )
    assert "installing" in vm.log()


def test_data_can_be_mounted_instead(vm):
    script = vm.script.replace("export PRIME_MOUNT=''", "")
    (vm.path / "startup.sh").write_text(script)
    assert vm.run("0", PRIME_MOUNT="yes") == 0
    (mount,) = [call for call in vm.calls if call.startswith("gcsfuse")]
    assert mount.endswith(f"--only-dir data/c4 bucket {vm.path}/disk/c4")
    assert "-o ro" in mount


def test_the_second_boot_installs_nothing(vm):
    vm.run("1 1")
    before = len(vm.calls)
    assert vm.run("1 1") == 0
    assert not any(call.startswith("uv") for call in vm.calls[before:])


def test_a_machine_that_may_not_delete_itself_says_that_it_is_idle(vm):
    assert vm.run("0", REFUSE_DELETE="1") == 0
    assert "prime-x-v5e-16-abcd.idle" in vm.marks()
    assert "may not delete itself" in vm.log()


def test_after_a_peer_was_preempted_the_worker_starts_again_without_its_stale_lock(vm):
    assert vm.run("85 139 85 0") == 0
    assert sum(call.startswith("worker") for call in vm.calls) == 4
    assert "stale lock" not in vm.calls


@pytest.mark.parametrize(("codes", "times"), [("2", 1), ("139 " * 9, 5)])
def test_a_worker_that_cannot_work_is_reported_and_not_paid_for(vm, codes, times):
    assert vm.run(codes) == int(codes.split()[0])
    assert sum(call.startswith("worker") for call in vm.calls) == times
    (mark,) = vm.marks().values()
    assert f"the worker failed (exit code {codes.split()[0]})" in mark
    assert len(vm.deletions()) == 1


def test_a_failed_installation_is_reported(vm):
    assert vm.run("0", INSTALL_FAILS="1") == 1
    assert "installing failed" in vm.marks()["prime-x-v5e-16-abcd.failed"]
    assert len(vm.deletions()) == 1
    assert "installing failed" in vm.log()


def test_preemption_reaches_the_worker(vm):
    process = vm.boot("wait")
    while not (vm.path / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 85
    vm.halt()
    assert vm.marks() == {}
    assert vm.deletions() == [], "its quota is given back by whoever replaces it"
    assert "exit code 85" in vm.log()


def test_hosts_of_a_slice_find_each_other(vm):
    assert vm.run("0", index=3, hosts=4) == 0
    assert any("at 10.0.0.0:8476 3/4" in call for call in vm.calls)
    assert vm.marks() == {}, "the first host speaks for all"
    assert vm.log(3)


def test_hosts_of_several_slices_find_each_other(vm):
    megascale = {"NUM_SLICES": "2", "SLICE_ID": "1", "COORDINATOR_ADDRESS": "10.9.9.9:8080"}
    env = "".join(f"MEGASCALE_{key}: '{value}'\n" for key, value in megascale.items())
    assert vm.run("0", index=2, hosts=4, tpu_env=env) == 0
    assert any("at 10.9.9.9:8476 6/8" in call for call in vm.calls)


def test_the_script_fits_into_an_instances_metadata(vm):
    assert len(vm.script.encode()) < 256_000


def test_the_image_copies_files_that_exist_and_installs_extras_that_exist():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    allowed = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    for name in copied:
        assert (engine.REPO / name).exists()
        assert f"!{name}" in allowed
    project = tomllib.loads((engine.REPO / "pyproject.toml").read_text())["project"]
    assert {"tpu", "cuda", "gcp"} <= set(project["optional-dependencies"])
    assert f"ENTRYPOINT {json.dumps(['prime-jax'])}" in lines


REAL = """#!/usr/bin/env bash
cd "$HERE/home/code"
exec {python} -m prime_jax "$@"
"""


@pytest.mark.slow
def test_two_hosts_install_the_archive_and_train_as_one(markov_data, tmp_path):
    """All but the tools is real: code from the archive, data from the bucket, a process group of two."""
    root, where = tmp_path / "sweep", slices.parse("v5e-16")
    data = tmp_path / "disk" / "markov"
    shutil.copytree(markov_data, data)
    fake_trainer.planned_on(root, data, where.name)
    shutil.move(data, tmp_path / "buckets/bucket/data/markov")
    sweep = engine.sweep_at(root, 1, where)
    code = archive.publish(sweep, archive.pack())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = []
    for index in range(2):
        host = Vm(tmp_path / f"host{index}", tmp_path / "buckets")
        (host.path / "tools/worker").write_text(REAL.format(python=sys.executable))
        host.install(sweep.pools()[0], code)
        text = host.script.replace("PORT=8476", f"PORT={port}")
        (host.path / "startup.sh").write_text(text)
        hosts.append(host)
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    machines = [
        host.boot("", index=index, hosts=2, network="127.0.0.1", **environment)
        for index, host in enumerate(hosts)
    ]
    try:
        codes = [machine.wait(timeout=300) for machine in machines]
    finally:
        for host, machine in zip(hosts, machines, strict=True):
            machine.kill()
            host.halt()
    logs = [(host.path / "home/startup.log").read_text() for host in hosts]
    assert codes == [0, 0], logs
    (run,) = state.list_runs(root)
    assert (run.state, run.k) == ("done", 1), logs
    assert all("all 2 are here" in log for log in logs)
    assert (root / "launch" / "prime-x-v5e-16-abcd.idle").exists()
    assert "all 2 are here" in (root / "logs/prime-x-v5e-16-abcd/host-1.log").read_text()
