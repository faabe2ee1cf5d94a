"""What is rendered for Kubernetes, SkyPilot and Slurm, and the tools that read it."""

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import fake_trainer
import pytest
import yaml

from prime_jax import shipped
from prime_jax.errors import UserError
from prime_jax.hardware import slices
from prime_jax.launch import engine, k8s, sky, slurm
from prime_jax.runtime import distributed
from prime_jax.sweep import state

K8S = k8s.Options(image="registry/prime_jax", queue="tpus", data="gs://bucket/data", spot=True)
SKY = sky.Options(spot=True, data="gs://bucket/data")
SLICES = ["v5e-4", "v5e-16", "v5p-128", "v6e-256", "tpu7x-128", "h100-8", "2xh100-8", "2xv6e-256"]


@pytest.fixture
def sweep(tmp_path):
    fake_trainer.planned(tmp_path / "sweep", base=_with_data("/data/c4"))
    where = slices.parse("v5e-16")
    return engine.Sweep("gs://bucket/sweep", tmp_path / "sweep", 3, where)


def _with_data(path):
    base = fake_trainer.BASE
    return replace(base, data=replace(base.data, path=path))


def jobsets(sweep, options=K8S) -> list[dict]:
    (text,) = (text for name, text in k8s.render(sweep, options).items() if name.endswith(".yaml"))
    return list(yaml.safe_load_all(text))


def on(sweep, name: str):
    return replace(sweep, only=slices.parse(name))


def test_a_jobset_per_worker(sweep):
    found = jobsets(sweep)
    names = [one["metadata"]["name"] for one in found]
    assert names == [f"{sweep.name}-v5e-16-{i}" for i in range(3)]
    one = found[0]
    assert one["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tpus"
    (replicated,) = one["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (1, 4, 4)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"] == ["sweep", "work", "gs://bucket/sweep", "--slice", "v5e-16"]
    (mount,) = container["volumeMounts"]
    assert (mount["mountPath"], mount["subPath"]) == ("/data/c4", "data/c4")
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bucket"


@pytest.mark.parametrize(
    ("name", "pools", "words"),
    [
        ("v5e-8", 1, "--machine-type=ct5lp-hightpu-8t --num-nodes=3 --spot"),
        ("v5e-16", 3, "--machine-type=ct5lp-hightpu-4t --num-nodes=4 --spot --tpu-topology=4x4"),
        ("2xv6e-256", 6, "--machine-type=ct6e-standard-4t --num-nodes=64 --spot --tpu-topology=16x16"),
        ("tpu7x-8", 1, "--machine-type=tpu7x-standard-4t --num-nodes=3 --spot"),
        ("tpu7x-128", 3, "--machine-type=tpu7x-standard-4t --num-nodes=16 --spot --placement-policy={}"),
    ],
)  # fmt: skip
def test_the_commands_for_nodes(sweep, name, pools, words):
    files = k8s.render(on(sweep, name), K8S)
    text = files[f"{sweep.name}-{name}-nodes.sh"]
    *policy, first = text.splitlines()[: 1 - pools or None]
    assert first.endswith(words.format(f"{sweep.name}-{name}"))
    created = re.findall("node-pools create (\\S+)", text)
    assert len(set(created)) == pools
    assert all(len(one) <= 40 for one in created)
    delete = files[f"{sweep.name}-{name}-nodes-delete.sh"]
    assert re.findall("node-pools delete (\\S+)", delete) == created
    assert re.findall("policies delete (\\S+)", delete) == [f"{sweep.name}-{name}"] * len(policy)
    if name != "tpu7x-128":
        assert policy == []
        return
    assert "--tpu-topology" not in text, "TPU7x takes a workload policy in its place"
    assert policy == [
        f"gcloud compute resource-policies create workload-policy {sweep.name}-{name} "
        "--type=HIGH_THROUGHPUT --accelerator-topology=4x4x4 --region=$REGION"
    ]


def test_gpus_have_nodes_of_their_own(sweep):
    assert list(k8s.render(on(sweep, "h100-8"), K8S)) == [f"{sweep.name}-h100-8.yaml"]


def test_which_exit_codes_restart_a_gang(sweep):
    spec = jobsets(sweep)[0]["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (ends,) = job["podFailurePolicy"]["rules"]
    assert ends["onExitCodes"]["values"] == [1, 2], "not 85, nor the codes of crashes"
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0
    assert spec["failurePolicy"]["maxRestarts"] >= 100
    assert job["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("name", "hosts", "each"),
    [
        ("v5e-1", 1, 1),
        ("v5e-8", 1, 8),
        ("v5e-16", 4, 4),
        ("v4-8", 1, 4),
        ("v5p-128", 16, 4),
        ("tpu7x-8", 1, 4),
        ("2xv6e-256", 128, 4),
        ("h100-4", 1, 4),
        ("4xh100-8", 4, 8),
    ],
)
def test_hosts_of_a_slice(name, hosts, each):
    where = slices.parse(name)
    assert (where.hosts, where.chips_per_host) == (hosts, each)


@pytest.mark.parametrize("name", SLICES)
def test_names_are_short_and_hosts_are_counted(sweep, name):
    where = slices.parse(name)
    for one in jobsets(on(sweep, name)):
        assert len(one["metadata"]["name"]) <= 28
        (replicated,) = one["spec"]["replicatedJobs"]
        job = replicated["template"]["spec"]
        assert replicated["replicas"] * job["completions"] == where.hosts
        ((_, chips),) = job["template"]["spec"]["containers"][0]["resources"]["limits"].items()
        assert chips * where.hosts == where.chips


@pytest.mark.parametrize("name", SLICES)
def test_a_worker_finds_its_gang_in_what_the_jobset_sets(sweep, name):
    one = jobsets(on(sweep, name))[0]
    (replicated,) = one["spec"]["replicatedJobs"]
    job, process_groups = replicated["template"]["spec"], set()
    given = job["template"]["spec"]["containers"][0]["env"]
    fields = {
        "JOBSET_NAME": one["metadata"]["name"],
        "REPLICATED_JOB_NAME": replicated["name"],
    }
    for index in range(replicated["replicas"]):
        for completion in range(job["completions"]):
            values = fields | {"JOB_INDEX": str(index), "JOB_COMPLETION_INDEX": str(completion)}
            names = {e["name"]: e.get("value", values.get(e["name"])) for e in given}
            process_groups.add(distributed.detect(names | values))
    hosts = slices.parse(name).hosts
    if hosts == 1:
        assert process_groups == {None}
    else:
        assert {group.coordinator for group in process_groups} == {
            f"{one['metadata']['name']}-workers-0-0.{one['metadata']['name']}:8476"
        }
        assert {group.process for group in process_groups} == set(range(hosts))
        assert {group.processes for group in process_groups} == {hosts}


def test_jobsets_against_the_published_schema(sweep):
    path = os.environ.get("PRIME_JOBSET_SCHEMA")
    if not path:
        pytest.skip("PRIME_JOBSET_SCHEMA names no file (BUILD.md)")
    jsonschema = pytest.importorskip("jsonschema")
    published = yaml.safe_load(Path(path).read_text())
    if "spec" in published:  # the CustomResourceDefinition
        (version,) = [v for v in published["spec"]["versions"] if v["name"] == "v1alpha2"]
        published = version["schema"]["openAPIV3Schema"]
    for name in SLICES:
        for options in (K8S, k8s.Options(image="i", data="gs://b/d")):
            for one in jobsets(on(sweep, name), options):
                jsonschema.validate(one, published)


@pytest.mark.parametrize(
    ("name", "accelerators", "nodes"),
    [
        ("v5e-16", "tpu-v5litepod-16", 1),
        ("v5p-128", "tpu-v5p-128", 1),
        ("h100-8", "H100:8", 1),
        ("2xh100-8", "H100:8", 2),
    ],
)
def test_a_sky_task(sweep, name, accelerators, nodes):
    (text,) = sky.render(on(sweep, name), SKY).values()
    task = yaml.safe_load(text)
    assert task["resources"]["accelerators"] == accelerators
    assert task["num_nodes"] == nodes
    assert ("accelerator_args" in task["resources"]) == accelerators.startswith("tpu")
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 85]
    assert task["file_mounts"] == {"/data/c4": "gs://bucket/data/c4"}


def test_a_sky_task_needs_a_checkout(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "TOP", tmp_path)
    with pytest.raises(UserError, match="render in a checkout, or use --on tpu or --on k8s"):
        sky.render(sweep, SKY)


def test_what_a_sky_task_runs_finds_its_gang(sweep, tmp_path):
    (text,) = sky.render(sweep, SKY).values()
    program = tmp_path / "prime-venv" / "bin" / "prime-jax"
    program.parent.mkdir(parents=True)
    program.write_text(
        '#!/bin/sh\necho "$PRIME_COORDINATOR $PRIME_PROCESS_ID/$PRIME_PROCESSES $*"\n'
    )
    program.chmod(0o755)
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(
        ["bash", "-c", yaml.safe_load(text)["run"]],
        env=given | {"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [
        *("10.0.0.1:8476", "1/2"),
        *("sweep", "work", "gs://bucket/sweep", "--slice", "v5e-16"),
    ]


def test_sky_reads_its_task(sweep, tmp_path):
    skypilot = pytest.importorskip("sky", reason="pip install skypilot")
    for name in ("v5e-16", "v5p-128", "h100-8", "2xh100-8"):
        (text,) = sky.render(on(sweep, name), SKY).values()
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.replace("workdir: .", f"workdir: {tmp_path}"))
        (resources,) = skypilot.Task.from_yaml(str(path)).resources
        assert resources.use_spot


def test_a_slurm_array_has_spare_tasks(sweep):
    pytest.importorskip("submitit", reason="pip install 'prime_jax[slurm]'")
    options = slurm.Options(
        partition="gpu", time=60, setup=("module load cuda",), sbatch=("nice=5",)
    )
    (text,) = slurm.render(on(sweep, "2xh100-8"), options).values()
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
    expected = {"array": "0-29%3", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8"}
    expected |= {
        "partition": "gpu",
        "time": "60",
        "nice": "5",
        "job-name": f"{sweep.name}-2xh100-8",
    }
    assert expected.items() <= flags.items()
    assert flags["signal"].startswith("TERM@"), "a worker does not know submitit's USR2"
    lines = text.splitlines()
    assert "module load cuda" in lines
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7" in lines
    (command,) = [line for line in lines if line.startswith("srun")]
    assert command.endswith("sweep work gs://bucket/sweep --slice 2xh100-8 --time-limit 60")


def test_runs_for_any_machine_need_no_gpus_on_slurm(sweep):
    pytest.importorskip("submitit", reason="pip install 'prime_jax[slurm]'")
    (text,) = slurm.render(replace(sweep, only=None), slurm.Options()).values()
    assert "gpus" not in text
    assert "--slice" not in text


def test_finished_pools_are_not_rendered(sweep):
    for run in state.open_runs(sweep.source):
        state.publish(sweep.source, run.id, {"status": "done", "losses": []})
    assert k8s.render(sweep, K8S) == {}


def test_what_cannot_be_rendered(sweep):
    for render, options in ((k8s.render, K8S), (sky.render, SKY)):
        with pytest.raises(UserError, match="ROOT must be"):
            render(replace(sweep, root="/home/me"), options)
        with pytest.raises(UserError, match="--slice"):
            render(replace(sweep, only=None), options)
        with pytest.raises(UserError, match="--data"):
            render(sweep, replace(options, data=""))
    with pytest.raises(UserError, match="--image"):
        k8s.render(sweep, k8s.Options())
    with pytest.raises(UserError, match="k8s"):
        sky.render(on(sweep, "tpu7x-128"), SKY)
    with pytest.raises(UserError, match="TPUs"):
        slurm.render(sweep, slurm.Options())


def test_a_sites_own_words_are_no_jobs(sweep, monkeypatch, tmp_path):
    name = f"{sweep.name}-any"
    said = f"Cluster maintenance on Sunday | bring tea\n7|{name}|RUNNING\n8|else|PENDING\n\n"
    (tmp_path / "squeue").write_text(f"#!/bin/sh\nprintf '%s' '{said}'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert slurm._queue(sweep) == [("7", name, "RUNNING")]


@pytest.mark.parametrize(
    "text", ["on", "123", "a: b", "x #y", "a b", "{x}", "&a", "*", "'", '"', "é", "~", "$HOME", "-"]
)
def test_words_of_users_stay_the_same_words(text, sweep, tmp_path):
    assert yaml.safe_load(f"a: {engine.scalar(text)}") == {"a": text}
    assert yaml.safe_load(f"{engine.scalar(text)}: a") == {text: "a"}
    options = replace(K8S, queue=text, namespace=text, service_account=text, image=text)
    one = jobsets(sweep, options)[0]
    assert one["metadata"]["namespace"] == text
    assert one["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == text
    pod = one["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert (pod["serviceAccountName"], pod["containers"][0]["image"]) == (text, text)
    path = f"/data/{text}"
    fake_trainer.planned(tmp_path / "odd", base=_with_data(path))
    odd = engine.Sweep("gs://bucket/odd", tmp_path / "odd", 1, slices.parse("v5e-16"))
    mounted = jobsets(odd)[0]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert mounted["containers"][0]["volumeMounts"][0]["mountPath"] == path
    assert path in yaml.safe_load(next(iter(sky.render(odd, SKY).values())))["file_mounts"]


def test_slurm_flags_without_a_value_and_lines_of_shell(sweep, tmp_path):
    flags = ("requeue", "mail-type=END", "--exclusive")
    options = slurm.Options(sbatch=flags, setup=("export A=$HOME",))
    here = replace(sweep, root=str(tmp_path / "a sweep"), only=slices.parse("h100-8"))
    (text,) = slurm.render(here, options).values()
    assert "\n#SBATCH --requeue\n" in text
    assert "\n#SBATCH --mail-type=END\n" in text
    assert "\n#SBATCH --exclusive\n" in text
    assert "\nexport A=$HOME\n" in text
    assert "'" + str(tmp_path / "a sweep") + "'" in text
    with pytest.raises(UserError, match="pattern"):
        slurm.render(replace(here, root=str(tmp_path / "50%j")), options)
