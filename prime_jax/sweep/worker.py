"""The worker: claims the largest open run, trains it, publishes its result, until nothing is open.

Every engine starts this same loop; `pool.py` starts several of it here. A worker that dies loses
at most the steps since its checkpoint: another sees its process gone, or its heartbeat stand still,
and takes attempt k+1 from there. In a process group of several processes process 0 decides, and tells the
others before every step of the loop what to do.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from rich.console import Console

from prime_jax.config import RunConfig
from prime_jax.errors import NoData, UserError
from prime_jax.runtime import distributed, storage
from prime_jax.runtime.storage import Path
from prime_jax.settings import from_dict
from prime_jax.sweep import state
from prime_jax.sweep.attempt import Apart, Trainer, Worker, run_attempt
from prime_jax.sweep.state import Run
from prime_jax.sweep.worker_progress import WorkerProgress

DONE, FAILED, PREEMPTED = 0, 1, 85  # exit codes, the same on every engine
POLL, POLL_REMOTE = 1.0, 15.0  # seconds between looks while only other workers' runs are left
LEAVE, START = 60.0, 180.0  # seconds before a time limit: to leave, and to begin another run
TRACED = ("seed", "steps", "optim", "checkpoint", "log")  # settings that need no new compilation


def work(
    root: Path,
    *,
    slice: str = "",
    minutes: float | None = None,
    trainer: Trainer | None = None,
    console: Console | None = None,
    heartbeat_seconds: float = 30.0,
    timeout: float = 300.0,
    backoff: float = state.BACKOFF,
) -> int:
    """Run what is open in the sweep `root`, one run after the other.

    Args:
        root: the sweep.
        slice: canonical name of this machine; runs planned for another one are left alone.
        minutes: when this machine is taken away, counted from now.
        trainer: `prime_jax.train` unless a test brings its own.
        console: where progress goes.
        heartbeat_seconds: between two heartbeats.
        timeout: an attempt whose heartbeat stands still for so long (seconds) is lost.
        backoff: seconds before a failed run is tried again.

    Returns:
        0 if nothing is left to do, 1 if runs have failed, 85 if interrupted (and saved).

    Raises:
        NoData: the data of every run that is left is not on this machine; they stay open.
        UserError: `root` is no sweep of this version, has nothing for this slice, or cannot be
            written to; or not all processes of the process group came.
    """
    limit, console = Limit(minutes), console or Console()
    state.check_root(root)
    group = distributed.start(lambda text: console.print(text, highlight=False, soft_wrap=True))
    leads = group is None or group.process == 0
    with signals(group) as stopping, WorkerProgress.open(console) as progress:
        trainer = trainer or _jax_trainer(root)
        worker = Worker(
            root=root,
            trainer=trainer,
            progress=progress,
            group=group,
            stopping=stopping,
            late=limit.late,
            heartbeat_seconds=heartbeat_seconds,
        )
        watch = state.Watch(timeout)
        leader = Leader(worker, slice, limit, watch, backoff)
        with contextlib.suppress(Apart):
            while True:
                order = leader.order() if leads else None
                if group:
                    order = distributed.broadcast(order)
                    if distributed.notified():
                        stopping.set()
                        order = {"leave": PREEMPTED}
                if "leave" in order:
                    break
                if "run" not in order:
                    stopping.wait(POLL_REMOTE if storage.is_remote(root) else POLL)
                    continue
                run = leader.chosen if leads else state.read_run(root, order["run"])
                leader.note(run_attempt(worker, run, order["k"], order["earlier"]))
            if leads:
                leader.log_step_fraction()
            return order["leave"]
    return PREEMPTED  # the process group has come apart


@dataclass
class Limit:
    """The time that a machine is ours, and what must fit into the rest of it."""

    minutes: float | None
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds."""
        if self.minutes is None:
            return float("inf")
        return 60 * self.minutes - (time.monotonic() - self.began)

    def late(self, save_seconds: float) -> bool:
        """Whether to save and leave now; a short limit keeps a smaller reserve."""
        return self.left() < max(self._at_most(LEAVE), 2 * save_seconds)

    def allows(self, first_step_seconds: float) -> bool:
        """Whether a run begun now could still be saved, as far as the last one tells."""
        reserve = self._at_most(LEAVE) + max(self._at_most(START), 2 * first_step_seconds)
        return self.left() > reserve

    def _at_most(self, seconds: float) -> float:
        return min(seconds, 6 * self.minutes) if self.minutes else 0.0  # a tenth


@dataclass
class Leader:
    """What process 0 decides with."""

    worker: Worker
    slice: str
    limit: Limit
    watch: state.Watch
    backoff: float
    chosen: Run | None = None
    began: float = field(default_factory=time.monotonic)
    results: list[dict[str, Any]] = field(default_factory=list)
    last: str = ""  # what the last compilation fits

    def order(self) -> dict[str, Any]:
        """What every process does next: run an attempt, wait ({}), or leave with a code."""
        root, stopping = self.worker.root, self.worker.stopping
        runs = storage.retry(lambda: state.list_runs(root, self.watch), self.worker.progress.log)
        planned = {run.slice for run in runs}
        runs = [run for run in runs if run.fits(self.slice)]
        if planned and not runs:
            names = ", ".join(sorted(planned))
            raise UserError(f"{root}: no run is planned for {self.slice}; there are: {names}")
        self.worker.progress.sweep(runs)
        if stopping.is_set():
            return {"leave": PREEMPTED}
        ready = [run for run in runs if run.opens_in(backoff=self.backoff) == 0.0]
        first = max((r["seconds"].get("first_step") or 0.0 for r in self.results), default=0.0)
        if ready and not self.limit.allows(first):
            self.worker.progress.log("time is nearly up: no other run is begun", "yellow")
            return {"leave": PREEMPTED}
        ready = with_data(ready, getattr(self.worker.trainer, "look", None))
        for run in sorted(ready, key=self._rank, reverse=True):
            k = run.k + 1
            if state.claim(root, run.id, k, log=self.worker.progress.log):
                self.chosen, self.last = run, _compiled_shape(run)
                return {"run": run.id, "k": k, "earlier": [a.k for a in reversed(run.attempts)]}
        if ready or worth_waiting(runs, self.backoff):
            return {}
        return {"leave": FAILED if any(run.state == "failed" for run in runs) else DONE}

    def _rank(self, run: Run) -> tuple[bool, float]:
        """The largest, but first those that the last compilation fits."""
        fits = bool(self.last) and _compiled_shape(run) == self.last
        return fits, run.spec["flops"]["matmul"]

    def note(self, result: dict[str, Any] | None) -> None:
        self.results += [result] if result else []

    def log_step_fraction(self) -> None:
        self.worker.progress.log(step_fraction(self.results, time.monotonic() - self.began))


def step_fraction(results: Sequence[dict[str, Any]], life: float) -> str:
    """How much of `life` seconds went into training steps, compilation left out."""
    train, compile_ = (sum(r["seconds"][what] for r in results) for what in ("train", "compile"))
    rest = max(life - compile_, 1e-9)
    return f"training steps: {train / rest:.0%} of {rest:.0f} s (without {compile_:.0f} s of compilation)"


def worth_waiting(runs: Sequence[Run], backoff: float) -> bool:
    """Whether a run may open soon: one that backs off, or whose owner may be dead."""
    return any(
        run.opens_in(backoff=backoff) is not None or (run.state == "running" and not run.certain)
        for run in runs
    )


def with_data(runs: list[Run], look: Callable[[RunConfig], object] | None) -> list[Run]:
    """Those of the runs whose data is on this machine.

    Args:
        look: of a trainer that reads data; raises NoData where a run's is not here.
    Raises:
        NoData: there are runs, and none has its data here.
    """
    if look is None:
        return runs
    missing: dict[tuple[str, str], NoData] = {}
    known, able = set(), []
    for run in runs:
        config = from_dict(RunConfig, run.spec["config"], run.id)
        which = (config.data.path, config.data.fingerprint)
        try:
            if which not in known:
                known.add(which)
                look(config)
        except NoData as error:
            missing[which] = error
        able += [run] if which not in missing else []
    if missing and not able:
        left = "1 run stays open" if len(runs) == 1 else f"{len(runs)} runs stay open"
        raise NoData(f"{next(iter(missing.values()))}; {left}")
    return able


def _compiled_shape(run: Run) -> str:
    config = {k: v for k, v in run.spec["config"].items() if k not in TRACED}
    return json.dumps(config, sort_keys=True)


def _jax_trainer(root: Path) -> Trainer:
    import jax

    from prime_jax import train

    cache = root / "cache" / "xla"
    cache = cache if storage.is_remote(root) else cache.absolute()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    return train


@contextlib.contextmanager
def signals(group: distributed.ProcessGroup | None = None) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; another one, a second or more later, acts at once.

    (The first may come twice, from a launcher and from the machine.) In a process group SIGTERM is JAX's own, which tells the other processes; SIGINT becomes one.
    """
    stopping, first = threading.Event(), float("inf")

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if now - first >= 1.0:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        first = min(first, now)
        stopping.set()

    def pass_on(number: int, _: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = (
        {signal.SIGINT: pass_on} if group else {signal.SIGINT: handle, signal.SIGTERM: handle}
    )
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
