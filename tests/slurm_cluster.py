"""A real Slurm on this machine's loopback, from Debian's packages, without installing them.

Nodes are called 127.0.0.1, 127.0.0.2 ...: names that resolve everywhere. Jobs of the partition
`urgent` cancel those of `main`, which get SIGTERM and a minute. GPUs are character devices that
nobody opens.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = [
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "munge",
    "libmunge2",
    "libhwloc15",
    "liblua5.1-0",
]
LIBRARIES = "usr/lib/x86_64-linux-gnu"
CONTROL_PORT, NODE_PORT = 27817, 27818


class Unavailable(Exception):
    """No Slurm can be had here, and why."""


def unpack(folder: Path) -> Path:
    """The packages' files, under `folder`.

    Raises:
        Unavailable: not Debian on x86-64, not root, or its archive is out of reach.
    """
    root, packages = folder / "root", folder / "packages"
    if (root / "usr/sbin/slurmctld").exists():
        return root
    if not shutil.which("apt-get") or os.uname().machine != "x86_64" or os.getuid():
        raise Unavailable("needs Debian or Ubuntu on x86-64, and root")
    packages.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "download", "-q", *PACKAGES]
    done = subprocess.run(command, cwd=packages, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no reason given"]
        raise Unavailable(f"apt-get download: {words[-1]} (apt-get update?)")
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    for name in ("slurmctld", "slurmd", "slurmstepd"):
        # The daemons look at the name they are called by.
        (root / "usr/sbin" / name).symlink_to(f"{name}-wlm")
    return root


def configure(folder: Path, root: Path, nodes: int, gpus: int) -> None:
    for name in ("etc", "state", "spool", "log", "run"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    for gpu in range(gpus):
        if not (folder / f"gpu{gpu}").exists():
            subprocess.run(["mknod", folder / f"gpu{gpu}", "c", "1", "3"], check=True)
    (folder / "etc/gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus - 1}]\n")
    settings = {
        "ClusterName": "loopback",
        "SlurmctldHost": "localhost(127.0.0.1)",
        "SlurmctldPort": CONTROL_PORT,
        "AuthType": "auth/none",
        "CredType": "cred/none",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/run/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/run/slurmd.%n.pid",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
        "PluginDir": root / LIBRARIES / "slurm-wlm",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "sched_interval=1,bf_interval=1,sched_min_interval=0",
        "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",
        "ReturnToService": 2,
        "SlurmdParameters": "config_overrides",
        "KillWait": 60,
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "CANCEL",  # the harsher half of sites: nothing is requeued
        "JobRequeue": 0,
        "GresTypes": "gpu",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    for index in range(nodes):
        lines.append(
            f"NodeName=127.0.0.{index + 1} NodeHostname=localhost NodeAddr=127.0.0.1 "
            f"Port={NODE_PORT + index} CPUs=8 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN"
        )
    lines += [
        "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP",
        "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP",
    ]
    (folder / "etc/slurm.conf").write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def cluster(folder: Path, *, nodes: int, gpus: int) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands speak to the cluster.

    Raises:
        Unavailable: see `unpack`; or its daemons do not come up.
    """
    root = unpack(folder)
    configure(folder, root, nodes, gpus)
    libraries = root / LIBRARIES
    environment = {
        **os.environ,
        "SLURM_CONF": str(folder / "etc/slurm.conf"),
        "PATH": f"{root}/usr/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{libraries}/slurm-wlm:{libraries}",
    }
    daemons = [[f"{root}/usr/sbin/slurmctld", "-D", "-i"]]
    for index in range(nodes):
        (folder / f"spool/127.0.0.{index + 1}").mkdir(exist_ok=True)
        stepd = f"{root}/usr/sbin/slurmstepd"
        name = f"127.0.0.{index + 1}"
        daemons.append([f"{root}/usr/sbin/slurmd", "-D", "-N", name, "-d", stepd])
    with (folder / "log/boot.log").open("w") as log:
        started = [
            subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            for command in daemons
        ]
    try:
        deadline = time.monotonic() + 30
        while _idle(environment) < nodes:
            if time.monotonic() > deadline:
                raise Unavailable(f"Slurm did not come up; see {folder}/log")
            time.sleep(0.2)
        yield environment
    finally:
        subprocess.run(["scancel", "--me", "--signal=KILL"], env=environment, capture_output=True)
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(timeout=30)


def _idle(environment: dict[str, str]) -> int:
    command = ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return len(set(done.stdout.split()))
