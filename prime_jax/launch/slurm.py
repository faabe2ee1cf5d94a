"""Slurm: an array of identical workers per pool, submitted by submitit.

There are more array tasks than workers, so that a preempted or timed-out one has a successor even
if the site does not requeue jobs; tasks that find no open run end immediately. The accounting
database is not queried.
"""

import contextlib
import io
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_jax.errors import UserError
from prime_jax.launch.engine import Dialogue, Pool, Sweep, needs
from prime_jax.settings import Flags, setting

GRACE = 120  # seconds between SIGTERM and the time limit


@dataclass(frozen=True)
class Options(Flags):
    partition: str = setting("", "partition to submit to (default: the cluster's)")
    account: str = setting("", "account to charge")
    qos: str = setting("", "quality of service")
    constraint: str = setting("", "features that nodes must have")
    time: int = setting(
        1440, "limit of one job; workers save before it ends", at_least=1, metavar="MINUTES"
    )
    cpus: int = setting(0, "cores per process (default: the cluster's)", at_least=0, metavar="N")
    mem: float = setting(0.0, "memory per node (default: the cluster's)", at_least=0, metavar="GB")
    tasks: int = setting(
        0,
        "array tasks, first and spare ones together (default: 10 per worker)",
        at_least=0,
        metavar="N",
    )
    setup: tuple[str, ...] = setting(
        (), "shell line to run before the worker", metavar="LINE", repeat=True
    )
    sbatch: tuple[str, ...] = setting(
        (), "further option of sbatch", metavar="NAME[=VALUE]", repeat=True
    )


def render(sweep: Sweep, options: Options) -> dict[str, str]:
    """The batch script of each pool; `up` submits it with `sbatch FILE`."""
    return {
        f"{pool.name}.sbatch": _executor(pool, options)._make_submission_file_text(
            shlex.join(_command(pool, options)), ""
        )
        for pool in sweep.busy_pools()
    }


def up(sweep: Sweep, options: Options, dialogue: Dialogue) -> int:
    """Submit an array for each pool that has none.

    Raises:
        UserError: no Slurm on this machine, or an error of Slurm.
    """
    if not shutil.which("sbatch"):
        raise UserError("no Slurm on this machine: sbatch was not found; run this on a login node")
    there = {name for _, name, _ in _queue(sweep)}
    pools = sweep.busy_pools()
    new = [pool for pool in pools if pool.name not in there]
    for pool in pools:
        if pool.name in there:
            dialogue.log(f"{pool.name}: already in the queue; to change it, run `down` first")
    if not pools:
        dialogue.log("every run has ended")
    lines = [
        f"{pool.name}: {pool.runs} runs, array of {_tasks(pool, options)} tasks, at most "
        f"{pool.want} at a time, {pool.hosts} nodes each; {dialogue.cost(pool.slice_, pool.want)}"
        for pool in new
    ]
    if not new or not dialogue.confirm(lines, "submit?"):
        return 0
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    for pool in new:
        executor = _executor(pool, options)
        try:
            executor.folder.mkdir(parents=True, exist_ok=True)
            # Not a pickled function: the command is the same as on every other engine.
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints Slurm's message again
                job = executor._submit_command(shlex.join(_command(pool, options)))
        except OSError as error:
            raise UserError(f"cannot write {executor.folder}: {error.strerror}") from error
        except FailedSubmissionError as error:  # its last two lines are for programmers
            words = " ".join(str(error).split("\n")[:-2])
            raise UserError(f"Slurm: {words}; squeue says whether the job was submitted") from error
        except FailedJobError as error:
            words = [line for line in str(error).splitlines() if line.strip()]
            raise UserError(f"Slurm: {words[-1] if words else error}") from error
        dialogue.log(f"{pool.name}: job {job.job_id}; logs in {executor.folder}")
    return 0


def down(sweep: Sweep, options: Options, dialogue: Dialogue) -> int:
    """Cancel this sweep's jobs; running workers receive SIGTERM, save and end."""
    jobs = _queue(sweep)
    if not jobs:
        dialogue.log("no jobs of this sweep")
        return 0
    lines = [f"{number} {name} {state}" for number, name, state in jobs]
    if dialogue.confirm(lines, "cancel?"):
        numbers = sorted({number for number, _, _ in jobs})
        _slurm("scancel", *numbers)
        dialogue.log(f"cancelled {', '.join(numbers)}")
    return 0


def _tasks(pool: Pool, options: Options) -> int:
    return options.tasks or 10 * pool.want


def _command(pool: Pool, options: Options) -> list[str]:
    return [sys.executable, "-m", "prime_jax", *pool.work(), "--time-limit", str(options.time)]


def _executor(pool: Pool, options: Options) -> Any:
    """submitit's executor with this pool's parameters."""
    try:
        from submitit.slurm.slurm import SlurmExecutor
    except ImportError as error:
        raise needs("slurm", "submitit") from error

    class Executor(SlurmExecutor):
        """Works without a cluster, for `render`."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    given_flags = (pair.removeprefix("--").partition("=") for pair in options.sbatch)
    extra = {name: value if equals else True for name, equals, value in given_flags}
    executor = Executor(_logs(pool))
    chip = pool.slice_.chip if pool.slice_ else None
    if chip and chip.platform != "cuda":
        raise UserError(f"slurm: pool {pool.name} needs TPUs; use --on tpu or --on k8s")
    setup = list(options.setup)
    if chip:
        gpus = pool.slice_.chips_per_host
        # One process per node uses all its GPUs; by default JAX uses one per Slurm process.
        setup.append(f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))}")
    given = {
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "cpus_per_task": options.cpus,
        "mem": f"{options.mem:g}G" if options.mem else None,
        "gpus_per_node": pool.slice_.chips_per_host if chip else None,
    }
    executor.update_parameters(
        job_name=pool.name,
        nodes=pool.hosts,
        ntasks_per_node=1,
        time=options.time,
        array_parallelism=pool.want,
        stderr_to_stdout=True,
        wckey=None,
        setup=setup,
        # After one process of a group has ended, the others have GRACE seconds to save.
        srun_args=[f"--wait={GRACE}"],
        additional_parameters={"signal": f"TERM@{GRACE}", **extra},
        **{name: value for name, value in given.items() if value},
    )
    executor.parameters["map_count"] = _tasks(pool, options)
    return executor


def _logs(pool: Pool) -> Path:
    """A folder shared by all nodes: in the sweep, else in the user's home."""
    if pool.sweep.on_object_store():
        return Path.home() / ".cache" / "prime_jax" / pool.sweep.name
    folder = Path(pool.sweep.root) / "logs" / "slurm"
    if "%" in str(folder):
        raise UserError(
            f"{folder}: Slurm reads % in the name of a log as a pattern; move the sweep"
        )
    return folder


def _queue(sweep: Sweep) -> list[tuple[str, str, str]]:
    """(number, name, state) of this user's arrays of the sweep that are queued or running.

    Lines of another form are a site's own words to its users.
    """
    rows = [line.split("|") for line in _slurm("squeue", "--me", "-h", "-o", "%F|%j|%T")]
    found = {
        tuple(r)
        for r in rows
        if len(r) == 3 and r[0].isdigit() and r[1].startswith(f"{sweep.name}-")
    }
    return sorted(found)


def _slurm(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"no Slurm on this machine: {command[0]} was not found") from error
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"Slurm: {command[0]}: {words[-1]}")
    return done.stdout.split("\n")[:-1]
