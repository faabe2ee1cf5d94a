"""Several processes on one machine: who they are, that they agree, and how they end."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import process_groups
import pytest
from process_groups import ended

from prime_jax.config import CheckpointConfig, MeshConfig, RunConfig
from prime_jax.errors import UserError
from prime_jax.experiment import load_config
from prime_jax.runtime import checkpoint, distributed, watchdog
from prime_jax.settings import to_dict
from prime_jax.train import train

ROOT = Path(__file__).parent.parent
SLURM = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NODELIST": "node[03-04,7],other",
    "SLURM_JOB_ID": "11",
    "SLURM_STEP_ID": "0",
}
WORKER = """
import json, sys
from pathlib import Path
from prime_jax.runtime import distributed
from prime_jax.config import RunConfig
from prime_jax.settings import from_dict
from prime_jax.errors import UserError
log = lambda line: print(line, flush=True)
try:
    distributed.start(log)
    import jax
    from prime_jax import train
    train.HEARTBEAT_SECONDS = 0.0
    config = from_dict(RunConfig, json.loads(Path(sys.argv[1]).read_text()))
    slow = float(sys.argv[3])
    def heartbeat(now):
        import time
        time.sleep(slow)
        return True
    train.train(config, Path(sys.argv[2]), heartbeat=heartbeat, log=log)
    log("done")
except train.Preempted as stop:
    log(f"preempted: {stop}")
    sys.exit(85)
except UserError as error:
    log(f"error: {error}")
    sys.exit(2)
"""


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[03-04,7],other", "node03"),
        ("rack[0-1]_blade[0-1]", "rack0_blade0"),
        ("gpu[001-002]-ib0,x", "gpu001-ib0"),
        ("r[1-2]s[03,5]t,x", "r1s03t"),
        ("alone", "alone"),
    ],
)
def test_the_first_host_of_a_list(nodes, first, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Slurm that reads it
    assert distributed.first_host(nodes) == first


def test_slurm_itself_reads_its_list_where_it_can(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool = tmp_path / "scontrol"
    tool.write_text(
        '#!/bin/sh\ntest "$1 $2 $3" = "show hostnames n[1-2]" && echo first && echo second'
    )
    tool.chmod(0o755)
    assert distributed.first_host("n[1-2]") == "first"
    assert distributed.first_host("m[1-2]") == "m1", "it knows better than a Slurm that fails"


@pytest.mark.parametrize("nodes", ["", ",a", "a[", "[x]"])
def test_no_host_in_a_list(nodes):
    with pytest.raises(UserError, match="no host in it"):
        distributed.first_host(nodes)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"JAX_PLATFORMS": "cpu"}, None),
        (
            {"PRIME_COORDINATOR": "a:1", "PRIME_PROCESSES": "2", "PRIME_PROCESS_ID": "1"},
            ("a:1", 2, 1),
        ),
        ({"PRIME_COORDINATOR": "a:1", "PRIME_PROCESSES": "1", "PRIME_PROCESS_ID": "0"}, None),
        (
            {"PRIME_COORDINATOR": "[::1]:8", "PRIME_PROCESSES": "2", "PRIME_PROCESS_ID": "1"},
            ("[::1]:8", 2, 1),
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "fd00::1,fd00::2", "TPU_WORKER_ID": "1"},
            ("[fd00::1]:8476", 2, 1),
        ),
        (SLURM, ("node03:20077", 4, 2)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "JAX_PLATFORMS": "cpu"}, None),
        (
            {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2,", "TPU_WORKER_ID": "1"},
            ("10.0.0.1:8476", 2, 1),
        ),
        (
            {"JOBSET_NAME": "js", "PRIME_HOSTS": "8", "JOB_COMPLETION_INDEX": "3"},
            ("js-workers-0-0.js:8476", 8, 3),
        ),
    ],
)
def test_the_gang_is_read_from_the_environment(environment, expected):
    group = distributed.detect(environment)
    assert (group and (group.coordinator, group.processes, group.process)) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PRIME_COORDINATOR": "a:1"}, "not PRIME_PROCESSES, PRIME_PROCESS_ID"),
        (
            {"PRIME_COORDINATOR": "a:1", "PRIME_PROCESSES": "2", "PRIME_PROCESS_ID": "2"},
            "first one is number 0",
        ),
        (
            {"PRIME_COORDINATOR": "a", "PRIME_PROCESSES": "2", "PRIME_PROCESS_ID": "0"},
            "has no port",
        ),
        (
            {"PRIME_COORDINATOR": "a:b", "PRIME_PROCESSES": "2", "PRIME_PROCESS_ID": "0"},
            "has no port",
        ),
        (
            {"PRIME_COORDINATOR": "fd00::1", "PRIME_PROCESSES": "2", "PRIME_PROCESS_ID": "0"},
            r"write host:8476, or \[IPv6 address\]:8476",
        ),
        ({"JOBSET_NAME": "js"}, "not PRIME_HOSTS"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "not TPU_WORKER_ID"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "x"}, "not whole numbers"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS = 'two': must be a whole number"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "not SLURM_PROCID, SLURM_STEP_NODELIST, SLURM_JOB_ID"),
        ({**SLURM, "SLURM_JOB_ID": ""}, "SLURM_JOB_ID = ''"),
    ],
)
def test_a_half_described_gang_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        distributed.detect(environment)


@pytest.mark.parametrize("name", ["PRIME_WAIT_SECONDS", "PRIME_HEARTBEAT_SECONDS"])
@pytest.mark.parametrize("value", ["x", "0", "-1", "1.5"])
def test_a_bad_time_is_refused_before_anybody_waits(name, value):
    group = {"PRIME_COORDINATOR": "a:1", "PRIME_PROCESSES": "2", "PRIME_PROCESS_ID": "1"}
    with pytest.raises(UserError, match=f"{name} = '{value}': must be a whole number"):
        distributed.start(print, group | {name: value})


def test_the_command_that_the_manual_shows_for_several_hosts_has_a_run():
    text = (ROOT / "BUILD.md").read_text()
    (name,) = re.findall(r"^prime-jax train (\S+) --out /shared/run$", text, re.MULTILINE)
    load_config(name)


@pytest.fixture(scope="module")
def config(quick) -> RunConfig:
    return dataclasses.replace(
        quick,
        steps=20,
        mesh=MeshConfig(replica=1),
        checkpoint=CheckpointConfig(every=5, keep=10),
    )


def start(config: RunConfig, out: Path, processes: int, slow: float = 0.0) -> list:
    """The processes of a process group with eight devices between them."""
    path = out.with_suffix(".config.json")
    path.write_text(json.dumps(to_dict(config)))
    words = ["-c", WORKER, str(path), str(out), str(slow)]
    return process_groups.start(words, processes, devices=8, PRIME_HEARTBEAT_SECONDS="10")


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run in one process with eight devices."""
    out = tmp_path_factory.mktemp("one") / "run"
    train(config, out, log=lambda _: None)
    return out


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(config, whole, tmp_path):
    out = tmp_path / "run"
    codes, texts = ended(start(config, out, 2))
    assert codes == [0, 0], texts
    assert any("waiting for 2 processes" in text for text in texts)
    np.testing.assert_allclose(losses(out), losses(whole), rtol=1e-5)
    one, two = (json.loads((path / "result.json").read_text()) for path in (whole, out))
    assert two["run"] == one["run"]
    values = [[loss["value"] for loss in result["losses"]] for result in (one, two)]
    np.testing.assert_allclose(*values, rtol=1e-5)


@pytest.mark.slow
def test_a_model_may_be_split_between_processes(config, whole, tmp_path):
    """All eight devices share the rows of each sequence: both processes load the whole batch."""
    model = dataclasses.replace(config.model, width=64, heads=8)
    split = dataclasses.replace(config, steps=6, model=model)
    apart, one = (
        dataclasses.replace(split, mesh=mesh)
        for mesh in (MeshConfig(replica=1, data=1, model=8), MeshConfig(1, 1, 1))
    )
    codes, texts = ended(start(apart, tmp_path / "two", 2))
    assert codes == [0, 0], texts
    train(one, tmp_path / "one", log=lambda _: None)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len(losses(out)) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 2])
def test_a_signal_to_one_stops_both_at_one_step(config, whole, tmp_path, then):
    long = dataclasses.replace(config, checkpoint=CheckpointConfig(keep=10))
    out = tmp_path / "run"
    group = start(long, out, 2, slow=0.3)
    wait_for_step(out, 4)
    group[1].send_signal(signal.SIGTERM)
    codes, texts = ended(group)
    assert codes == [85, 85], texts
    for process, text in enumerate(texts):
        assert f"process {process}: run directory: waiting for the others" in text
    saved = checkpoint.steps(out / "checkpoints")
    assert len(saved) == 1
    assert all(f"saved step {saved[0]}" in text for text in texts)
    codes, texts = ended(start(long, out, then))
    assert codes == [0] * then, texts
    assert f"continues at step {saved[0]}" in texts[0]
    np.testing.assert_allclose(losses(out), losses(whole), rtol=1e-5)


def test_a_process_that_waits_in_vain_says_what_to_check():
    environment = {**os.environ, "PRIME_COORDINATOR": "127.0.0.1:9", "PRIME_PROCESSES": "2"}
    environment |= {"PRIME_PROCESS_ID": "1", "PRIME_WAIT_SECONDS": "1"}
    command = "from prime_jax.runtime import distributed; distributed.start(print)"
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "waiting for 2 processes" in done.stdout
    assert "came within 1 s; check that every host" in done.stdout
    assert "stack trace" not in done.stderr


def test_every_wait_for_the_others_is_told():
    code = """
        from prime_jax.runtime import distributed
        distributed.start(print)
        distributed.barrier("the door", print)
        distributed.barrier_with_timeout("the table", 100, print)
        if distributed.is_writer():
            distributed.barrier_with_timeout("the garden", 0.2, print)
    """
    codes, texts = ended(process_groups.start(["-c", textwrap.dedent(code)], 2, devices=2))
    assert codes == [0, 0], texts
    told = [
        [line for line in text.splitlines() if re.search("the (door|table|garden)", line)]
        for text in texts
    ]
    both = [
        [
            f"process {process}: the door: waiting for the others",
            f"process {process}: the door: all are here",
            f"process {process}: the table: waiting 100 s for the others",
            f"process {process}: the table: all are here",
        ]
        for process in range(2)
    ]
    both[0] += [
        "process 0: the garden: waiting 0.2 s for the others",
        "process 0: the garden: not all came",
    ]
    assert told == both


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_group_stops_together_whatever_the_address_and_jaxs_settings(host):
    """JAX's preemption service is off in its environment, as some images set it."""
    if host == "[::1]" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    code = """
        import os, signal
        from prime_jax.runtime import distributed
        os.environ["PRIME_COORDINATOR"] = os.environ["HOST"] + ":" + os.environ[
            "PRIME_COORDINATOR"
        ].partition(":")[2]
        distributed.start(print)
        with distributed.PreemptionGuard() as guard:
            print("stops:", guard.should_stop())
            distributed.barrier("the first look", print)
            if distributed.is_writer():
                guard.stop_all()
            while not guard.should_stop():
                pass
            print("stops: True")
    """
    more = {"HOST": host, "JAX_ENABLE_PREEMPTION_SERVICE": "0"}
    codes, texts = ended(process_groups.start(["-c", textwrap.dedent(code)], 2, devices=2, **more))
    assert codes == [0, 0], texts
    for text in texts:
        assert re.findall("stops: (.*)", text) == ["False", "True"]


def test_a_second_sigterm_ends_a_process_of_a_gang_at_once():
    """Also while it saves, which is when JAX's handler would swallow it."""
    code = """
        import os, signal, jax
        from prime_jax.runtime import distributed
        jax.distributed.initialize("127.0.0.1:" + os.environ["PORT"], 1, 0)
        jax.process_count = lambda: 2
        with distributed.PreemptionGuard() as guard:
            os.kill(os.getpid(), signal.SIGTERM)
            while not guard.should_stop():
                pass
            print("saving", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here")
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PORT": port},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "saving\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_lost_process_ends_the_other_with_a_line_that_says_so(config, tmp_path, dies):
    out = tmp_path / "run"
    group = start(config, out, 2, slow=0.3)
    wait_for_step(out, 3)
    group[dies].send_signal(signal.SIGKILL)
    began = time.monotonic()
    text = group[1 - dies].communicate(timeout=120)[0]
    assert group[1 - dies].returncode == watchdog.LOST, text
    assert time.monotonic() - began < 30  # the heartbeat is 10 s
    (line,) = [
        line for line in text.splitlines() if line.startswith(f"process {1 - dies}: process")
    ]
    assert f"process {dies}" in line
    assert "run the same command on every host" in line
    assert dies == 0 or "stack trace" not in text  # JAX itself sees the end of its coordinator
    group[dies].communicate()


@pytest.mark.parametrize(
    ("host", "whole"),
    [("a", "a:1"), ("fd00::1", "[fd00::1]:1"), ("[fd00::1]", "[fd00::1]:1")],
)
def test_addresses(host, whole):
    assert distributed.address(host, 1) == whole
