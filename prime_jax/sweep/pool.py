"""Several workers on this machine: started, supervised, and restarted when one dies."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prime_jax.errors import UserError
from prime_jax.runtime import storage
from prime_jax.sweep import accelerators, state, status
from prime_jax.sweep.state import Run
from prime_jax.sweep.status import SILENT, WorkerProgress
from prime_jax.sweep.worker import DONE, FAILED, PREEMPTED, signals, step_fraction

POLL = 0.5
POLL_REMOTE = 10.0  # seconds between listings of a bucket
RESTARTS = 3  # of one worker
COMMAND = (sys.executable, "-c", "from prime_jax.cli import main; raise SystemExit(main())")


@dataclass
class Member:
    """One worker process; its output goes to a log file of the sweep."""

    command: Sequence[str]
    cores: set[int]
    log: Path
    environment: dict[str, str]
    restarts: int = 0
    stopped: bool = False

    def start(self) -> "Member":
        with self.log.open("a") as out:
            # Its own session: Ctrl-C reaches it only through this process.
            self.process = subprocess.Popen(
                self.command,
                env=os.environ | self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, self.cores)
        return self


def supervise(
    root: storage.Path,
    workers: int,
    *,
    command: Sequence[str] = (),
    progress: WorkerProgress = SILENT,
) -> int:
    """Run the sweep `root` with several processes, each on its own cores.

    Args:
        root: the sweep directory.
        workers: number of processes.
        command: of one worker; `prime-jax sweep work ROOT` if empty.
        progress: told how the sweep stands.

    Returns:
        As `worker.work`: 0, 1 or 85.

    Raises:
        UserError: `root` is not a sweep of this version, or cannot be written to.
    """
    state.check_root(root)
    began, watch = time.monotonic(), state.Watch(log=progress.log)
    command = command or (*COMMAND, "sweep", "work", str(root))
    reported = {_event(run) for run in state.list_runs(root, watch)}
    results, next_listing = [], 0.0
    with signals() as stopping:
        team = _start(root, workers, command)
        try:
            while _any_alive(team, stopping.is_set(), progress):
                if time.monotonic() >= next_listing:
                    with contextlib.suppress(storage.Unreachable):
                        results += _report_changes(root, watch, progress, reported)
                    next_listing = time.monotonic() + (
                        POLL_REMOTE if storage.is_remote(root) else 0.0
                    )
                if stopping.is_set():
                    _stop(team)
                time.sleep(POLL)
        except KeyboardInterrupt:  # a second signal: do not wait for workers to save
            for member in team:
                member.process.kill()
            return PREEMPTED
        finally:
            _stop(team)
        results += _report_changes(root, watch, progress, reported)
        if not stopping.is_set():  # what was interrupted is told in the workers' own logs
            life = (time.monotonic() - began) * workers
            progress.log(step_fraction([run.result["seconds"] for run in results], life))
        return _exit_code(root, watch, team, progress=progress, stopped=stopping.is_set())


def _start(root: storage.Path, workers: int, command: Sequence[str]) -> list[Member]:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    devices = accelerators.partition(workers)
    remote = storage.is_remote(root)  # logs of attempts are in the bucket, other output is local
    logs = Path(tempfile.mkdtemp(prefix="prime_jax-")) if remote else root / "logs"
    try:
        logs.mkdir(exist_ok=True)
        return [
            Member(
                command, set(cores[i::workers] or cores), logs / f"worker-{i}.log", devices[i]
            ).start()
            for i in range(workers)
        ]
    except OSError as error:
        raise UserError(f"cannot start workers of {root}: {error.strerror}") from error


def _any_alive(team: Sequence[Member], stopping: bool, progress: WorkerProgress) -> bool:
    """Restart workers that were killed; whether any worker runs."""
    codes = [member.process.poll() for member in team]
    for member, code in zip(team, codes, strict=True):
        if code is not None and code < 0 and member.restarts < RESTARTS and not stopping:
            progress.log(f"a worker was killed (signal {-code}); restarted")
            member.restarts += 1
            member.start()
    return any(member.process.poll() is None for member in team) or None in codes


def _stop(team: Sequence[Member]) -> None:
    """Send every worker SIGTERM, once: it saves and ends."""
    for member in team:
        if not member.stopped and member.process.poll() is None:
            member.process.terminate()
        member.stopped = True


def _event(run: Run) -> tuple[str, int, str]:
    return run.id, run.k, run.state


def _report_changes(
    root: storage.Path, watch: state.Watch, progress: WorkerProgress, reported: set
) -> list[Run]:
    """Show the state of the sweep; the runs that ended since the last call."""
    runs = state.list_runs(root, watch)
    progress.sweep(runs)
    fresh = [run for run in runs if _event(run) not in reported]
    reported.update(map(_event, fresh))
    ended = [run for run in fresh if run.state not in ("pending", "running")]
    for run in ended:
        progress.log(status.line(run), "red" if run.state == "failed" else "")
        if run.state == "failed":
            progress.log(status.failure(run), "red")
    return [run for run in ended if run.result]


def _exit_code(
    root: storage.Path,
    watch: state.Watch,
    team: Sequence[Member],
    *,
    progress: WorkerProgress,
    stopped: bool,
) -> int:
    if stopped:
        return PREEMPTED
    runs = state.list_runs(root, watch)
    left = [run for run in runs if run.opens_in() is not None]
    if left:
        progress.log(f"{len(left)} runs are still open, but every worker has ended", "red")
        for member in team:
            tail = member.log.read_text(errors="replace").splitlines()[-status.TAIL :]
            progress.log("\n".join([f"{member.log}:", *tail]), "red")
    failed = watch.left_out or any(run.state == "failed" for run in runs)
    return FAILED if left or failed else DONE
