"""Kubernetes: a rendered JobSet per worker, queued by Kueue, and the commands for GKE's nodes.

One JobSet per process group, so that a restart does not affect other groups. Exit codes 1 and 2 end
it; 85, a crash or a lost node restart the whole group, which continues from its checkpoint.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from prime_jax.errors import UserError
from prime_jax.launch.engine import Pool, Sweep, fill, scalar
from prime_jax.settings import Flags, setting

APPLY = "kubectl apply -f"
MAX_NAME = 28  # characters of a JobSet's name, a prefix of names of pods, services, Kueue objects
# A slice of several hosts is one node pool, used by one job at a time.
EXCLUSIVE = [
    "annotations:",
    "  alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool",
]
FUSE = ["metadata:", "  annotations:", '    gke-gcsfuse/volumes: "true"']


@dataclass(frozen=True)
class Options(Flags):
    image: str = setting("", "container image built from launch/Dockerfile")
    namespace: str = setting("default", "Kubernetes namespace")
    queue: str = setting("", "Kueue's local queue (default: none, start at once)")
    spot: bool = setting(False, "use spot machines: cheaper, but can be preempted at any time")
    service_account: str = setting("default", "Kubernetes service account that may write to ROOT")
    data: str = setting(
        "", "bucket folder from which machines read prepared data", metavar="gs://BUCKET/DIR"
    )


def render(sweep: Sweep, options: Options) -> dict[str, str]:
    """Per pool a JobSet per worker; for TPUs also the commands that make and delete its nodes.

    Raises:
        UserError: no image, a ROOT that is not in a bucket, or runs without a slice.
    """
    if not options.image:
        raise UserError("--on k8s needs --image, e.g. REGION-docker.pkg.dev/PROJECT/REPO/prime_jax")
    if not sweep.on_object_store():
        raise UserError(f"{sweep.root}: pods cannot access it; ROOT must be gs://BUCKET/DIR")
    files = {}
    for pool in sweep.busy_pools():
        if pool.slice_ is None:
            raise UserError("runs without a slice: give --slice v5e-16 here or in `sweep plan`")
        if pool.slice_.chip.platform == "tpu":
            create, delete = _nodes(pool, options)
            files[f"{pool.name}-nodes.sh"] = create
            files[f"{pool.name}-nodes-delete.sh"] = delete
        files[f"{pool.name}.yaml"] = "---\n".join(_jobsets(pool, options))
    return files


def _nodes(pool: Pool, options: Options) -> tuple[str, str]:
    """Commands that create and delete the node pools of all workers: one a slice of several hosts.

    Nothing else deletes them, and nodes are paid for while no pod is on them, too.
    """
    slice_, machine = pool.slice_, pool.slice_.chip.machine
    hosts = slice_.hosts // slice_.slices
    made, deleted = [], []
    create = (
        "gcloud container node-pools create {} --cluster=$CLUSTER --location=$REGION "
        f"--node-locations=$ZONE --machine-type={slice_.machine_type} --num-nodes={{}}"
    )
    create += " --spot" * options.spot
    if hosts == 1:
        nodes = {pool.name: pool.want * slice_.slices}
    else:
        nodes = {f"{pool.name}-{index}": hosts for index in range(pool.want * slice_.slices)}
    if hosts > 1 and machine.policy:
        policies = "gcloud compute resource-policies"
        made.append(
            f"{policies} create workload-policy {pool.name} --type=HIGH_THROUGHPUT "
            f"--accelerator-topology={slice_.sides} --region=$REGION"
        )
        deleted.append(f"{policies} delete {pool.name} --region=$REGION --quiet")
        create += f" --placement-policy={pool.name}"
    elif hosts > 1:
        create += f" --tpu-topology={slice_.sides}"
    made += [create.format(name, count) for name, count in nodes.items()]
    delete = "gcloud container node-pools delete {} --cluster=$CLUSTER --location=$REGION --quiet"
    deleted = [*map(delete.format, nodes), *deleted]  # a policy is in use until then
    return "\n".join([*made, ""]), "\n".join([*deleted, ""])


def _jobsets(pool: Pool, options: Options) -> Iterator[str]:
    slice_, tpu = pool.slice_, pool.slice_.chip.platform == "tpu"
    jobs = slice_.slices if tpu else 1
    for index in range(pool.want):
        name = f"{pool.name}-{index}"
        if len(name) > MAX_NAME:
            raise UserError(f"{name}: longer than {MAX_NAME} characters; lower --workers")
        yield fill(
            "jobset.yaml",
            name=scalar(name),
            sweep=scalar(pool.sweep.name),
            namespace=scalar(options.namespace),
            queue=[f"kueue.x-k8s.io/queue-name: {scalar(options.queue)}"] * bool(options.queue),
            exclusive=EXCLUSIVE * (tpu and slice_.hosts > jobs),
            jobs=jobs,
            hosts=slice_.hosts // jobs,
            image=scalar(options.image),
            service_account=scalar(options.service_account),
            arguments=", ".join(json.dumps(word, ensure_ascii=False) for word in pool.work()),
            selector=_selector(pool, options),
            resource="google.com/tpu" if tpu else "nvidia.com/gpu",
            chips=slice_.chips_per_host,
            metadata=FUSE * bool(pool.data),
            mounts=_mounts(pool, options),
            volumes=_volumes(pool, options),
        )


def _selector(pool: Pool, options: Options) -> list[str]:
    slice_ = pool.slice_
    if slice_.chip.platform == "tpu":
        lines = [
            f"cloud.google.com/gke-tpu-accelerator: {slice_.chip.gke}",
            f"cloud.google.com/gke-tpu-topology: {slice_.sides}",
        ]
    else:
        lines = [f"cloud.google.com/gke-accelerator: {slice_.chip.gke}"]
    return lines + ['cloud.google.com/gke-spot: "true"'] * options.spot


def _mounts(pool: Pool, options: Options) -> list[str]:
    """Each data folder, mounted from the bucket at the path in the config."""
    lines = []
    for source, path in pool.mounts(options.data):
        inside = source.removeprefix("gs://").partition("/")[2]
        lines += [
            "- name: data",
            f"  mountPath: {scalar(path)}",
            f"  subPath: {scalar(inside)}",
            "  readOnly: true",
        ]
    return ["volumeMounts:", *lines] if lines else []


def _volumes(pool: Pool, options: Options) -> list[str]:
    if not pool.data:
        return []
    bucket = options.data.removeprefix("gs://").partition("/")[0]
    return [
        "volumes:",
        "- name: data",
        "  csi:",
        "    driver: gcsfuse.csi.storage.gke.io",
        "    readOnly: true",
        "    volumeAttributes:",
        f"      bucketName: {scalar(bucket)}",
        "      mountOptions: implicit-dirs",
    ]
