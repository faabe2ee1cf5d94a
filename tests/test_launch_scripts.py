"""launch/: shellcheck, and the start-up script run as a Cloud TPU VM would, with stand-ins for tools."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path

import fake_trainer
import pytest
from tpu_hosts import REAL, Vm

from prime_jax import shipped
from prime_jax.hardware import slices
from prime_jax.launch import archive, engine
from prime_jax.runtime import watchdog
from prime_jax.sweep import state

LAUNCH = engine.REPO / "launch"
ROOT = "gs://bucket/sweep"


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
    pool = engine.Pool(engine.Sweep(ROOT, None, 1), slices.parse("v5e-8"), 1, data)
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
        f"worker sweep work {ROOT} --slice v5e-8 at alone 0/1"
    ]
    assert any(call.startswith("uv venv --python 3.12") for call in vm.calls)
    assert any("-c constraints.txt -e .[tpu,gcp]" in call for call in vm.calls)
    assert (vm.path / "disk/c4/manifest.json").exists(), "data where the runs look for it"
    assert (vm.path / "was-set-up").exists()
    assert vm.marks() == {"prime-x-abcd.idle": "exit code 0"}
    (deletion,) = vm.deletions()
    assert deletion.split()[4:] == (
        ["prime-x-abcd", "--project", "p", "--zone", "a-b-c", "--force", "--quiet", "--async"]
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
    assert "prime-x-abcd.idle" in vm.marks()
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


@pytest.mark.parametrize("code", [85, watchdog.LOST])
def test_a_slice_whose_hosts_do_not_meet_again_is_given_back_and_no_failure(vm, code):
    vm.install_on("v6e-16")
    assert vm.run(f"{code} 2", index=1, hosts=4) == 2
    assert vm.marks() == {}, "the next `up` makes a slice without --again"
    assert len(vm.deletions()) == 1


def test_a_failed_installation_is_reported(vm):
    assert vm.run("0", INSTALL_FAILS="1") == 1
    assert "installing failed" in vm.marks()["prime-x-abcd.failed"]
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


@pytest.mark.parametrize("where", ["v5e-16", "v6e-16"])
def test_hosts_of_a_slice_find_each_other(vm, where):
    vm.install_on(where)
    assert vm.run("0", index=3, hosts=4) == 0
    assert any("at 10.0.0.0:8476 3/4" in call for call in vm.calls)
    assert vm.marks() == {}, "the first host speaks for all"
    assert vm.log(3)


def test_a_host_of_compute_engine_deletes_its_group(vm):
    vm.install_on("v6e-8")
    assert vm.run("0") == 0
    (deletion,) = vm.deletions()
    assert deletion == (
        "compute instance-groups managed delete prime-x-abcd --project p --zone a-b-c --quiet"
    )


def test_hosts_on_ipv6_find_each_other(vm):
    vm.install_on("v6e-16")
    assert vm.run("0", index=1, hosts=4, network="2001:db8::{}") == 0
    assert any("at [2001:db8::0]:8476 1/4" in call for call in vm.calls)


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("10.9.9.9:8080", "10.9.9.9"),
        ("[fd00::9]:8080", "[fd00::9]"),
        ("[fd00::9]", "[fd00::9]"),
        ("fd00::9", "[fd00::9]"),
        ("head", "head"),
    ],
)
def test_hosts_of_several_slices_find_each_other(vm, address, host):
    vm.install_on("2xv5e-16")
    megascale = {"NUM_SLICES": "2", "SLICE_ID": "1", "COORDINATOR_ADDRESS": address}
    env = "".join(f"MEGASCALE_{key}: '{value}'\n" for key, value in megascale.items())
    assert vm.run("0", index=2, hosts=4, tpu_env=env, late={"tpu-env": 2}) == 0
    assert any(f"at {host}:8476 6/8" in call for call in vm.calls)


def test_a_single_host_asks_for_no_metadata(vm):
    assert vm.run("0", GCE_METADATA_HOST="127.0.0.1:1") == 0


def test_attributes_that_come_late_are_waited_for(vm):
    vm.install_on("v6e-16")
    late = {"worker-network-endpoints": 3, "agent-worker-number": 2}
    assert vm.run("0", index=1, hosts=4, late=late) == 0
    assert any("at 10.0.0.0:8476 1/4" in call for call in vm.calls)


@pytest.mark.parametrize("hosts", [0, 3])
def test_a_slice_whose_hosts_never_all_come_is_reported(vm, hosts):
    vm.install_on("v6e-16")
    assert vm.run("0", index=1, hosts=hosts, PRIME_METADATA_TRIES="3") == 1
    (mark,) = vm.marks().values()
    assert "finding the hosts of the slice in the metadata failed" in mark
    assert len(vm.deletions()) == 1


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4-16", "tpu7x-16"])  # by Cloud TPU, by Compute Engine
def test_two_hosts_install_the_archive_and_train_as_one(name, markov_data, tmp_path):
    """All but the tools is real: code from the archive, data from the bucket, a process group of two."""
    root, where = tmp_path / "sweep", slices.parse(name)
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
    assert (root / "launch" / "prime-x-abcd.idle").exists()
    assert "all 2 are here" in (root / "logs/prime-x-abcd/host-1.log").read_text()
