"""The acceptance run: whole on a loopback cloud with CPUs for chips, and what it refuses."""

import argparse
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import fake_store
import fake_trainer
import launching
import pytest
from tpu_hosts import Vm

from prime_jax.errors import UserError
from prime_jax.hardware import slices
from prime_jax.launch import engine, gce
from prime_jax.sweep import state

pytest.importorskip("google.cloud.compute_v1", reason="pip install 'prime_jax[gcp]'")
import fake_gce
from google.api_core import exceptions

FILE = engine.REPO / "benchmarks" / "tpu_acceptance.py"
SLICE = slices.parse("v5p-16")  # two hosts with four chips, each one device
# As `gcloud`, with the bucket and Compute Engine of this machine.
GCLOUD = """#!{python} -SE
import json, os, sys, urllib.parse, urllib.request
words, root = sys.argv[1:], os.environ["STORAGE_EMULATOR_HOST"]
def ask(address, data=None, method=None):
    with urllib.request.urlopen(urllib.request.Request(address, data, method=method)) as answer:
        return answer.read()
def place(url):
    bucket, _, name = url.removeprefix("gs://").partition("/")
    return bucket, urllib.parse.quote(name, safe="")
def read(bucket, name):
    return ask(root + "/storage/v1/b/" + bucket + "/o/" + name + "?alt=media")
if words[:2] == ["storage", "cp"]:
    source, target = words[2:4]
    if target.startswith("gs://"):
        data = sys.stdin.buffer.read() if source == "-" else open(source, "rb").read()
        bucket, name = place(target)
        ask(root + "/upload/storage/v1/b/" + bucket + "/o?uploadType=media&name=" + name, data)
    else:
        open(target, "wb").write(read(*place(source)))
elif words[:2] == ["storage", "rsync"]:
    bucket, prefix = place(words[3] + "/")
    listed = json.loads(ask(root + "/storage/v1/b/" + bucket + "/o?prefix=" + prefix))
    for item in listed["items"]:
        file = os.path.join(words[4], item["name"].removeprefix(urllib.parse.unquote(prefix)))
        os.makedirs(os.path.dirname(file), exist_ok=True)
        open(file, "wb").write(read(bucket, urllib.parse.quote(item["name"], safe="")))
else:
    assert words[:4] == ["compute", "instance-groups", "managed", "delete"], words
    path = "/compute/v1/projects/p/zones/" + words[8] + "/instanceGroupManagers/" + words[4]
    ask(os.environ["FAKE_GCE"] + path, method="DELETE")
"""
PROGRAM = """#!/usr/bin/env bash
cd "$HERE/home/code"
exec {python} {words} "$@"
"""
ROW = {
    "family": "prime",
    "budget": 1e7,
    "seed": 0,
    "layers": 1,
    "width": 16,
    "heads": 1,
    "steps": 8,
    "batch_size": 8,
    "peak_lr": 1e-3,
    "overrides": {
        "model.vocab_size": 16,
        "data.seq_len": 16,
        "subtokens.length": 4,
        "optim.warmup_steps": 2,
        "eval.examples": 8,
        "eval.replicates": 1,
        "eval.batch_size": 8,
        "eval.estimators": ["subtoken"],
    },
}


@pytest.fixture(scope="module")
def acceptance():
    spec = importlib.util.spec_from_file_location("tpu_acceptance", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def words(tmp_path, markov_data):
    """The command line but for the root."""
    experiment = tmp_path / "rows.json"
    experiment.write_text(json.dumps([ROW, ROW | {"seed": 1}]))
    where = ["--slice", SLICE.name, "--project", "p", "--zone", fake_gce.ZONE]
    what = ["--experiment", str(experiment), "--data", str(markov_data), "--scale", "rehearsal"]
    return [*where, *what, "--hours", "0.5", "--poll", "0.2", "-o", str(tmp_path / "found.json")]


class Hosts:
    """The hosts of the groups of a loopback Compute Engine, as processes of this machine."""

    def __init__(self, service, environment: dict[str, str], path: Path):
        self.service, self.environment, self.path = service, environment, path
        self.booted: dict[str, list[tuple[Vm, subprocess.Popen]]] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._follow)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        for host, process in self.all:
            process.kill()
            process.wait()
            host.halt()

    @property
    def all(self) -> list[tuple[Vm, subprocess.Popen]]:
        return [one for group in self.booted.values() for one in group]

    def _follow(self) -> None:
        stopped: set[str] = set()
        while not self.over.wait(0.1):
            self.service.tick()
            there = dict(self.service.hosts)
            for name, hosts in there.items():
                if name not in self.booted and all(h.get("instanceStatus") for h in hosts):
                    self.booted[name] = self._boot(name, len(hosts))
            for name in self.booted.keys() - there.keys() - stopped:
                stopped.add(name)
                for _, process in self.booted[name]:
                    process.send_signal(signal.SIGTERM)  # a machine is shut down

    def _boot(self, name: str, count: int) -> list[tuple[Vm, subprocess.Popen]]:
        template = self.service._template(self.service._group(name))["properties"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (item,) = template["metadata"]["items"]
        hosts = []
        for index in range(count):
            host = Vm(self.path / f"{name}-{index}")
            tools = {
                "gcloud": GCLOUD.format(python=sys.executable),
                "worker": PROGRAM.format(python=sys.executable, words="-m prime_jax"),
                "venv-python": PROGRAM.format(python=sys.executable, words=""),
            }
            host.buckets.mkdir()
            for tool, text in tools.items():
                (host.path / "tools" / tool).write_text(text)
                (host.path / "tools" / tool).chmod(0o755)
            script = item["value"].replace("PORT=8476", f"PORT={port}")
            (host.path / "startup.sh").write_text(script)
            more = {"index": index, "hosts": count, "network": "127.0.0.1"}
            hosts.append((host, host.boot("", **more, **self.environment)))
        return hosts


@pytest.mark.slow
def test_the_whole_run_against_a_loopback_cloud(acceptance, words, monkeypatch, tmp_path, capsys):
    """All but the chips, the image and the tools is real; hosts are taken away in the middle."""
    service = fake_gce.FakeGce()
    monkeypatch.setenv(acceptance.APPROVAL, SLICE.name)
    with fake_store.bucket("gs") as bucket, fake_gce.serve(service) as clients:
        monkeypatch.setattr(gce, "client", lambda: clients)
        flags = re.sub(
            "(device_count)=8", rf"\1={SLICE.devices // SLICE.hosts}", os.environ["XLA_FLAGS"]
        )
        environment = {
            **bucket.environment,
            "FAKE_GCE": clients.group.transport._host,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": "",
            "HOME": str(tmp_path),
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "XLA_FLAGS": flags,
            "PRIME_SHIP_SECONDS": "20",
        }
        with Hosts(service, environment, tmp_path / "hosts") as hosts:
            code = acceptance.main([*words, "--root", bucket.url])
            logs = [(h.path / "home/startup.log") for h, _ in hosts.all]
            told = "\n".join(log.read_text() for log in logs if log.exists())[-20_000:]
    printed = capsys.readouterr()
    assert code == 0, f"{printed.out}\n{printed.err}\n{told}"
    assert service.everything() == []
    assert len(hosts.booted) == 2, "one slice, and the one in place of it"
    found = json.loads((tmp_path / "found.json").read_text())
    assert [check["name"] for check in found["checks"] if not check["passed"]] == []
    assert (found["slice"], found["hosts"], found["rehearsal"]) == ("v5p-16", 2, True)
    assert found["devices"] == ["8 x cpu"]
    assert found["sweep"] == {"runs": 2, "done": 2}
    (row,) = found["mfu"]
    assert (row["device"], row["mfu"]["matmul"]) == ("8 x cpu", None)
    resume = found["resume"]
    assert 0 < resume["at_step"] < resume["steps"] == resume["compared"] == 60
    assert resume["attempts"] == 2
    assert resume["different"] == []
    assert "jax" in found["versions"]
    assert list(found["kernels"]) == ["cpu.json"]


def test_nothing_is_spent_without_approval(acceptance, words, monkeypatch, capsys):
    monkeypatch.delenv(acceptance.APPROVAL, raising=False)
    monkeypatch.setattr(gce, "client", lambda: pytest.fail("the cloud was asked"))
    assert acceptance.main([*words, "--root", "gs://bucket/new"]) == 2
    printed = capsys.readouterr()
    assert "at most 0.5 hours of one v5p-16 (2 hosts, 8 chips)" in printed.out
    assert "at most 16.80 USD on demand by prices.toml" in printed.out
    assert printed.err.splitlines() == [
        "prime-jax: nothing was started: PRIME_TPU_APPROVE=v5p-16 approves the cost above"
    ]
    monkeypatch.setenv(acceptance.APPROVAL, "v5p-32")  # the approval of another slice
    assert acceptance.main([*words, "--root", "gs://bucket/new"]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--slice", "v9-1"], "no such chip"),
        (["--data", "nowhere"], "nowhere: no data"),
        (["--on", "tpu", "--flex-start", "6h"], "an option of --on gce"),
        (["--prices", "nowhere"], "cannot read nowhere"),
        (["-o", "nowhere/found.json"], "nowhere/found.json: there is no such folder"),
        (["--hours", "nan"], "--hours: above 0, at most 168"),
        (["--poll", "-1"], "--poll: above 0"),
        (["--slice", "v5p-8"], "v5p-8: must be TPUs on at least two hosts"),
        (["--slice", "2xh100-8"], "2xh100-8: must be TPUs"),
        (["--zone", ""], "--on gce needs --zone"),
        (["--slice", "v5e-16"], "v5e-16: Compute Engine offers v5p, v6e and tpu7x"),
        (["--spot", "--flex-start", "6h"], "--spot and --flex-start exclude each other"),
    ],
)
def test_bad_input_is_one_line(acceptance, words, more, message, capsys):
    assert acceptance.main([*words, "--root", "gs://bucket/new", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


class Refuses:
    """An engine whose first calls of `down` fail; `left` is what is there at last."""

    __name__ = "prime_jax.launch.gce"

    def __init__(self, *first: object, left: int = 0):
        self.answers, self.left = list(first), left

    def down(self, *_) -> int:
        answer = self.answers.pop(0) if self.answers else self.left
        if isinstance(answer, BaseException):
            raise answer
        return answer


def test_deletion_is_tried_until_nothing_is_left(acceptance, monkeypatch, capsys):
    monkeypatch.setattr(acceptance, "PAUSE", 0)
    sweep, options = engine.Sweep("gs://b/new", None), gce.Options(project="p", zone="a-b-c")
    slow = Refuses(UserError("Compute Engine: the resource is not ready"), 1)
    assert acceptance._end(slow, sweep, options, None) == ""
    assert capsys.readouterr().out == "nothing is left\n"
    assert acceptance._end(Refuses(left=1), sweep, options, None) == "some resources"
    with pytest.raises(KeyboardInterrupt):
        acceptance._end(Refuses(KeyboardInterrupt()), sweep, options, None)
    for line in capsys.readouterr().out.splitlines():
        assert line.startswith("NOT ALL IS DELETED (")
        assert line.endswith("prime-jax sweep down gs://b/new --on gce --project p --zone a-b-c")


class Hiccups:
    """An engine that fails once; then all runs end by themselves, or none does."""

    def __init__(self, sweep: engine.Sweep, ends: bool):
        self.sweep, self.ends, self.calls = sweep, ends, 0

    def up(self, *_) -> None:
        self.calls += 1
        if self.calls == 1:
            raise UserError("Compute Engine: try later") from exceptions.ServiceUnavailable("")
        if self.ends:
            launching.finish(self.sweep, 0)


@pytest.mark.parametrize("ends", [True, False])
def test_a_hiccup_is_waited_for_until_the_time_is_over(acceptance, tmp_path, ends):
    fake_trainer.planned(tmp_path / "sweep")
    sweep = engine.Sweep("gs://b/new", tmp_path / "sweep", 1, SLICE)
    pair = tuple(run.id for run in state.list_runs(sweep.source)[:2])
    how = {"hours": 1 if ends else 1 / 3600, "poll": 0.01}
    args = argparse.Namespace(prices=engine.REPO / "docs/prices.toml", **how)
    module = Hiccups(sweep, ends)
    if ends:
        assert acceptance._watch(module, sweep, None, pair, args) == ""
        assert module.calls == 2
    else:
        with pytest.raises(UserError, match="not finished within"):
            acceptance._watch(module, sweep, None, pair, args)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_ends_like_ctrl_c(acceptance, number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), acceptance._signals_are_ctrl_c():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_an_old_file_is_not_replaced(acceptance, words, tmp_path, capsys):
    (tmp_path / "found.json").write_text("kept")
    assert acceptance.main([*words, "--root", "gs://bucket/new"]) == 2
    assert "found.json exists" in capsys.readouterr().err
    assert (tmp_path / "found.json").read_text() == "kept"


def records_of(
    root: Path, name: str, attempts: list[dict[int, float]], first_step: int
) -> state.Run:
    """A finished run with these losses by attempt and step."""
    for k, losses in enumerate(attempts, 1):
        folder = root / "runs" / name / str(k)
        folder.mkdir(parents=True)
        rows = [json.dumps({"step": step, "loss": loss}) for step, loss in losses.items()]
        (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    made = tuple(state.Attempt(k, {}, None, None) for k in range(1, len(attempts) + 1))
    result = {"steps": 4, "first_step": first_step}
    return state.Run(name, {}, made, result, "done", True)


@pytest.mark.parametrize(("last", "different"), [(0.4, []), (0.4000001, [4])])
def test_a_resume_that_is_not_exact_is_seen(acceptance, tmp_path, last, different):
    whole = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    cut = [{1: 0.1, 2: 0.2, 3: 9.0}, {3: 0.3, 4: last}]  # step 3 was done again
    runs = {
        "a": records_of(tmp_path, "a", cut, first_step=2),
        "b": records_of(tmp_path, "b", [whole], first_step=0),
    }
    found = acceptance._resumed(tmp_path, runs, ("a", "b"), "a")
    assert (found["different"], found["at_step"], found["attempts"]) == (different, 2, 2)
    assert acceptance._resumed(tmp_path, runs, ("a", "b"), "") == {}
