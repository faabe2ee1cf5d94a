"""The worker: claims the largest open run, trains it, publishes its result, until nothing is open.

Every engine starts this loop; `pool.py` starts several on one machine. A worker that dies loses at
most the steps since its last checkpoint: another one detects that its process is gone, or that its
heartbeat has stopped, and continues as attempt k+1. In a process group, process 0 decides and
broadcasts, before every iteration of the loop, what all processes do; all of them train, and
process 0 keeps the state.
"""

import contextlib
import functools
import json
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Protocol

from prime_jax.config import RunConfig
from prime_jax.errors import NoData, UserError
from prime_jax.runtime import distributed, storage
from prime_jax.runtime.logfile import Log
from prime_jax.runtime.records import write_json_atomic
from prime_jax.runtime.storage import Path
from prime_jax.settings import from_dict
from prime_jax.sweep import state, status
from prime_jax.sweep.prefixes import Ladders
from prime_jax.sweep.state import Run
from prime_jax.sweep.status import SILENT, WorkerProgress

DONE, FAILED, PREEMPTED = 0, 1, 85  # exit codes, the same on every engine
POLL, POLL_REMOTE = 1.0, 15.0  # seconds between listings while no run can be taken
LEAVE, START = 60.0, 180.0  # seconds reserved before a time limit: to stop; to start a run
TRACED = ("seed", "steps", "optim", "checkpoint", "log")  # changes need no new compilation
TRACEBACK_LINES = 30
GROUP_SECONDS = 60.0  # that processes wait for each other after a failure


class Trainer(Protocol):
    """The interface of `prime_jax.train` that a worker needs.

    A trainer that reads data also has `check_data(config)`, which raises NoData if it is missing.
    """

    Preempted: type[Exception]
    Stopped: type[Exception]

    def train(
        self,
        config: RunConfig,
        run_dir: Path,
        *,
        earlier: Sequence[Path],
        donors: Sequence[Sequence[Path]],
        pinned: int,
        heartbeat: Callable[[dict[str, Any]], bool],
        log: Callable[[str], None],
    ) -> dict[str, Any]: ...


class Heartbeat(threading.Thread):
    """Writes the heartbeat of one attempt and checks whether another attempt has superseded it.

    As a context manager it has stopped when the block ends: no heartbeat follows an end.

    Attributes:
        before: machine seconds that earlier attempts used.
        fenced: another attempt has superseded this one.
    """

    def __init__(self, root: Path, run: str, k: int, seconds: float, before: float = 0.0):
        super().__init__(daemon=True)
        self.root, self.run_id, self.k, self.seconds = root, run, k, seconds
        self.before, self._began = before, time.monotonic()
        self._latest: dict[str, Any] = {}
        self._updated = self._began
        self.fenced = threading.Event()
        self._over = threading.Event()

    def __enter__(self) -> "Heartbeat":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def update(self, values: dict[str, Any]) -> None:
        """Record the latest values from the training."""
        self._latest, self._updated = values, time.monotonic()

    def machine_seconds(self) -> float:
        """Machine seconds of this attempt and the earlier ones."""
        return self.before + time.monotonic() - self._began

    def run(self) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            with contextlib.suppress(UserError):  # a store hiccup never stops training
                quiet = round(time.monotonic() - self._updated, 1)
                own = {"count": count, "quiet": quiet, "seconds": round(self.machine_seconds(), 1)}
                own["time"] = round(time.time(), 1)
                state.heartbeat(self.root, self.run_id, self.k, {**self._latest, **own})
                if state.superseded(self.root, self.run_id, self.k):
                    self.fenced.set()
            self._over.wait(self.seconds)


@dataclass(frozen=True)
class Worker:
    """Settings that are the same for all runs of a worker.

    Attributes:
        group: processes that train together, None for one.
        stopping: set when this worker must stop.
        out_of_time: whether to save and stop now, given the seconds that a save takes.
        spent: seconds of every attempt by phase, also of those that were interrupted.
    """

    root: Path
    trainer: Trainer
    progress: WorkerProgress
    group: distributed.ProcessGroup | None
    stopping: threading.Event
    out_of_time: Callable[[float], bool]
    heartbeat_seconds: float
    spent: list[Mapping[str, float]] = field(default_factory=list)

    @property
    def is_leader(self) -> bool:
        return self.group is None or self.group.process == 0

    @property
    def process(self) -> int:
        return self.group.process if self.group else 0


class GroupOutOfSync(Exception):
    """The processes of a group no longer run the same attempt: all must be restarted."""


def run_attempt(worker: Worker, run: Run, order: Mapping[str, Any]) -> dict[str, Any] | None:
    """Train an attempt at a run, which this worker has claimed.

    Args:
        order: of `Leader.order`.

    Returns:
        The result, or None if the attempt ended without one; its end is then recorded.

    Raises:
        GroupOutOfSync: after a failure not every process of the group arrived in time.
        NoData: the data of the run is not on this machine; the run stays open.
    """
    runs, k = worker.root / "runs", order["k"]
    storage.make_folder(runs / run.id / str(k))
    log_file = Log(runs / run.id / str(k) / f"log.{worker.process}.txt")
    try:
        return _Attempt(worker, run, k, log_file).train(
            earlier=[runs / run.id / str(j) for j in order["earlier"]],
            donors=[[runs / other / str(j) for j in ks] for other, ks in order["donors"]],
            pinned=order["pinned"],
        )
    finally:
        with contextlib.suppress(UserError):
            log_file.close()


class _Attempt:
    def __init__(self, worker: Worker, run: Run, k: int, log_file: Log):
        self.worker, self.run, self.k, self.log_file = worker, run, k, log_file
        self.folder = worker.root / "runs" / run.id / str(k)
        mine = state.Attempt(k, {}, None, None)
        self.mine = replace(run, state="running", attempts=(*run.attempts, mine))
        before = max(((a.heartbeat or {}).get("seconds", 0.0) for a in run.attempts), default=0.0)
        self.heartbeat = Heartbeat(worker.root, run.id, k, worker.heartbeat_seconds, before)
        self.saves = 0.0

    def train(self, **others: Any) -> dict[str, Any] | None:
        """Args: others: what the trainer is told of other attempts and runs."""
        worker, trainer, fenced = self.worker, self.worker.trainer, self.heartbeat.fenced
        self.log(f"attempt {self.k} of run {self.run.id} on {state.identity()['host']}")
        worker.progress.run(self.mine, {})
        try:
            with self.heartbeat if worker.is_leader else contextlib.nullcontext():
                config = from_dict(RunConfig, self.run.spec["config"])
                told = {"heartbeat": self.on_heartbeat, "log": self.log}
                result = trainer.train(config, self.folder, **others, **told)
        except (trainer.Preempted, trainer.Stopped, KeyboardInterrupt) as error:
            worker.spent.append(getattr(error, "seconds", {}))
            if fenced.is_set():
                self.log("stopped: another attempt has started, or the run was killed", "yellow")
                if worker.group:  # JAX can stop its processes together only once
                    worker.stopping.set()
                return None
            worker.stopping.set()
            by_hand = isinstance(error, KeyboardInterrupt)
            self.ended(
                "preempted", "interrupted" if by_hand else str(error) or "interrupted, saved"
            )
        except storage.Unreachable as error:
            self.ended("preempted", str(error))
            self.resynchronise()
        except NoData as error:  # a fault of this machine, not of the run
            self.ended("preempted", str(error))
            self.resynchronise()
            raise
        except UserError as error:  # a retry would fail in the same way
            self.ended("failed", str(error), retry=False)
            self.resynchronise()
        except Exception as error:
            self.log_file.write(traceback.format_exc())
            tail = "\n".join(traceback.format_exc().splitlines()[-TRACEBACK_LINES:])
            self.ended("failed", f"{type(error).__name__}: {error}", tail)
            self.resynchronise()
        else:
            worker.spent.append(result["seconds"])
            return self.publish(result) if worker.is_leader else result
        return None

    def log(self, text: str, style: str = "") -> None:
        self.log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self.worker.is_leader:
            self.worker.progress.log(f"{self.run.id} {text}", style)

    def on_heartbeat(self, values: dict[str, Any]) -> bool:
        # Before the first loss, or after the last finite one: JSON has no NaN.
        odd = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
        values = values | dict.fromkeys(odd)
        self.heartbeat.update(values)
        self.worker.progress.run(self.mine, values)
        if self.worker.out_of_time(values.get("save_seconds", 0.0)):
            self.worker.stopping.set()
        return not (self.heartbeat.fenced.is_set() or self.worker.stopping.is_set())

    def ended(self, how: str, reason: str, tail: str = "", *, retry: bool = True) -> None:
        self.log(f"{how}: {reason}", "red" if how == "failed" else "yellow")
        if not self.worker.is_leader:
            return
        if tail:
            self.worker.progress.log(tail, "red")
        attempt = (self.worker.root, self.run.id, self.k)
        self.retry(lambda: state.end(*attempt, how, reason, tail=tail, retry=retry))

    def resynchronise(self) -> None:
        """After a failure, wait until all processes of the group are here."""
        name = f"after attempt {self.k} of run {self.run.id}"
        if self.worker.group and not distributed.barrier_with_timeout(
            name, GROUP_SECONDS, self.log
        ):
            raise GroupOutOfSync

    def publish(self, result: dict[str, Any]) -> dict[str, Any] | None:
        run = (self.worker.root, self.run.id)
        result |= {name: self.run.spec[name] for name in ("budget", "rules")}
        result |= {"attempt": self.k, "preemptions": self.run.interruptions}
        result |= {"machine_seconds": round(self.heartbeat.machine_seconds(), 1)}
        self.retry(lambda: write_json_atomic(self.folder / "result.json", result))
        if self.retry(lambda: state.superseded(*run, self.k)):
            self.log("finished, but another attempt has started: result not published", "yellow")
            return None
        if not self.retry(lambda: state.publish(*run, result)):
            self.log("finished, but another attempt had published its result", "yellow")
            return None
        self.log_file.write("done\n")
        self.worker.progress.log(status.line(replace(self.mine, result=result)))
        return result

    def retry(self, action: Callable[[], Any]) -> Any:
        return storage.retry(action, self.log)


def work(
    root: Path,
    *,
    slice: str = "",
    minutes: float | None = None,
    tune: bool = False,
    trainer: Trainer | None = None,
    progress: WorkerProgress = SILENT,
    heartbeat_seconds: float = 30.0,
    timeout: float = 300.0,
    backoff: float = state.BACKOFF,
) -> int:
    """Run the open runs of the sweep `root`, one after the other.

    Args:
        root: the sweep.
        slice: canonical name of this machine's slice; runs planned for another one are ignored.
        minutes: time limit of this machine, from now.
        tune: measure the kernels first if the sweep has no table for this kind of chip.
        trainer: `prime_jax.train` by default; tests replace it.
        progress: told what the worker does.
        heartbeat_seconds: between two heartbeats.
        timeout: seconds after which an attempt with an unchanged heartbeat is lost.
        backoff: seconds before a failed run is retried.

    Returns:
        0 if nothing is left to do, 1 if runs have failed, 85 if interrupted (and saved).

    Raises:
        NoData: no remaining run has its data on this machine; they stay open.
        UserError: `root` is not a sweep of this version, has no run for this slice, or cannot be
            written to; or not all processes of the group connected.
    """
    limit = Limit(minutes)
    state.check_root(root)
    group = distributed.start(progress.log)
    is_leader = group is None or group.process == 0
    with signals(group) as stopping:
        trainer = trainer or JaxTrainer(root)
        if is_leader and isinstance(trainer, JaxTrainer):
            trainer.choose(root, slice if tune else None, progress.log)
        worker = Worker(
            root=root,
            trainer=trainer,
            progress=progress,
            group=group,
            stopping=stopping,
            out_of_time=limit.out_of_time,
            heartbeat_seconds=heartbeat_seconds,
        )
        watch = state.Watch(timeout, log=progress.log)
        leader = Leader(worker, slice, limit, watch, backoff)
        with contextlib.suppress(GroupOutOfSync):
            while True:
                order = leader.order() if is_leader else None
                if group:
                    order = distributed.broadcast(order)
                    if distributed.stop_requested():
                        stopping.set()
                        order = {"leave": PREEMPTED}
                if "leave" in order:
                    break
                if "run" not in order:
                    stopping.wait(POLL_REMOTE if storage.is_remote(root) else POLL)
                    continue
                run = leader.chosen if is_leader else state.read_run(root, order["run"])
                leader.note(run_attempt(worker, run, order))
            if is_leader:
                leader.log_step_fraction()
            return order["leave"]
    return PREEMPTED  # the process group is out of sync


@dataclass
class Limit:
    """The time limit of a machine, and what fits into the remaining time."""

    minutes: float | None
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Remaining seconds."""
        if self.minutes is None:
            return float("inf")
        return 60 * self.minutes - (time.monotonic() - self.began)

    def out_of_time(self, save_seconds: float) -> bool:
        """Whether to save and stop now; the reserve is at most a tenth of the limit."""
        return self.left() < max(self._at_most(LEAVE), 2 * save_seconds)

    def allows(self, first_step_seconds: float) -> bool:
        """Whether a run started now could still be saved, judging by earlier runs."""
        reserve = self._at_most(LEAVE) + max(self._at_most(START), 2 * first_step_seconds)
        return self.left() > reserve

    def _at_most(self, seconds: float) -> float:
        return min(seconds, 6 * self.minutes) if self.minutes else 0.0  # a tenth of the limit


@dataclass
class Leader:
    """The decisions of process 0."""

    worker: Worker
    slice: str
    limit: Limit
    watch: state.Watch
    backoff: float
    chosen: Run | None = None
    began: float = field(default_factory=time.monotonic)
    results: list[dict[str, Any]] = field(default_factory=list)
    last: str = ""  # compiled shape of the last run
    waiting: set[str] = field(default_factory=set)  # runs that are known to wait

    def order(self) -> dict[str, Any]:
        """What every process does next: run an attempt, wait ({}), or end with an exit code."""
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
            self.worker.progress.log("the time limit is near: no other run is started", "yellow")
            return {"leave": PREEMPTED}
        ready = with_data(ready, getattr(self.worker.trainer, "check_data", None))
        ladders = Ladders(root, runs)
        for run in sorted(self._due(ready, ladders), key=self._rank, reverse=True):
            k = run.k + 1
            if state.claim(root, run.id, k, log=self.worker.progress.log):
                self.chosen, self.last = run, _compiled_shape(run)
                earlier = [a.k for a in reversed(run.attempts)]
                shared = {"donors": ladders.donors(run), "pinned": ladders.pinned(run)}
                return {"run": run.id, "k": k, "earlier": earlier, **shared}
        if ready or worth_waiting(runs, self.backoff):
            return {}
        failed = self.watch.left_out or any(run.state == "failed" for run in runs)
        return {"leave": FAILED if failed else DONE}

    def _rank(self, run: Run) -> tuple[bool, float]:
        """Largest run first, but runs with the compiled shape of the last one before all others."""
        fits = bool(self.last) and _compiled_shape(run) == self.last
        return fits, run.spec["flops"]["matmul"]

    def _due(self, ready: Sequence[Run], ladders: Ladders) -> list[Run]:
        """Those that need not wait for a run of their ladder; if all wait, says so once."""
        ids, log = {run.id for run in ready}, self.worker.progress.log
        look = lambda: [ladders.waits_for(run, ids, self.backoff) for run in ready]  # noqa: E731
        lower = storage.retry(look, log)
        due = [run for run, first in zip(ready, lower, strict=True) if first is None]
        for run, first in zip(ready, lower, strict=True) if not due else ():
            if run.id not in self.waiting:
                self.waiting.add(run.id)
                log(f"{run.id} waits for step {first.branch_point} of run {first.id}")
        return due

    def note(self, result: dict[str, Any] | None) -> None:
        if result is None:
            return
        self.results.append(result)
        if self.chosen and self.chosen.branch_point:
            with contextlib.suppress(UserError):  # checkpoints that stay cost space only
                runs = state.list_runs(self.worker.root, self.watch)
                Ladders(self.worker.root, runs).release(self.chosen)

    def log_step_fraction(self) -> None:
        self.worker.progress.log(step_fraction(self.worker.spent, time.monotonic() - self.began))


def step_fraction(spent: Sequence[Mapping[str, float]], life: float) -> str:
    """The fraction of `life` seconds spent in training steps, without compilation.

    Args:
        spent: seconds of attempts by phase.
    """
    train, compile_ = (sum(s.get(what, 0.0) for s in spent) for what in ("train", "compile"))
    rest = max(life - compile_, 1e-9)
    without = f"(without {compile_:.0f} s of compilation)"
    return f"training steps: {train / rest:.0%} of {rest:.0f} s {without}"


def worth_waiting(runs: Sequence[Run], backoff: float) -> bool:
    """Whether a run may open soon: it is in backoff, or its owner may be dead."""
    return any(
        run.opens_in(backoff=backoff) is not None or (run.state == "running" and not run.certain)
        for run in runs
    )


def with_data(runs: list[Run], check_data: Callable[[RunConfig], object] | None) -> list[Run]:
    """Those of the runs whose data is on this machine.

    Args:
        check_data: raises NoData if the data of a run is not here; None: no run needs data.
    Raises:
        NoData: there are runs, and none has its data here.
    """
    if check_data is None:
        return runs
    missing: dict[tuple[str, ...], NoData] = {}
    known, able = set(), []
    for run in runs:
        config = from_dict(RunConfig, run.spec["config"], run.id)
        coded = (config.subtokens.codes_file, config.subtokens.codes)
        which = (config.data.path, config.data.fingerprint, *coded)
        try:
            if which not in known:
                known.add(which)
                check_data(config)
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


class JaxTrainer:
    """`prime_jax.train`, with the kernels that were measured for a sweep on this kind of chip."""

    def __init__(self, root: Path):
        import jax

        from prime_jax import train

        cache = root / "cache" / "xla"
        cache = cache if storage.is_remote(root) else cache.absolute()
        jax.config.update("jax_compilation_cache_dir", str(cache))
        self.Preempted, self.Stopped = train.Preempted, train.Stopped
        self.check_data, self.train = train.check_data, train.train

    def choose(self, root: Path, tune_for: str | None, log: Callable[[str], None]) -> None:
        """Read the table, or first make it.

        Args:
            tune_for: the slice whose open runs give the shapes; None makes no table.
        """
        import jax

        from prime_jax import tuned
        from prime_jax.kernels import tune

        kind = jax.local_devices()[0].device_kind
        if tune_for is not None and not storage.exists(tuned.file_of(kind, root)):
            runs = state.open_runs(root, tune_for)
            configs = [from_dict(RunConfig, run.spec["config"], run.id) for run in runs]
            made = tune.tune(configs, progress=log)
            log(f"kernels measured: {tuned.save(made, root, replace=False)}")
        self.train = functools.partial(self.train, choices=tuned.load(kind, root))


@contextlib.contextmanager
def signals(group: distributed.ProcessGroup | None = None) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; another signal, 1 s or more later, ends the process.

    (A launcher and the machine may both send the first one.) In a process group JAX handles
    SIGTERM and notifies the other processes; SIGINT is converted to SIGTERM.
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
