"""One attempt at one run: its heartbeat, its log, and what is recorded when it ends.

All processes of a group call `run_attempt`; process 0 writes the state, the others only train.
"""

import contextlib
import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from prime_jax.config import RunConfig, from_dict
from prime_jax.errors import NoData, UserError
from prime_jax.runtime import distributed, storage
from prime_jax.runtime.logfile import Log
from prime_jax.runtime.records import write_json_atomic
from prime_jax.runtime.storage import Path
from prime_jax.sweep import state, status
from prime_jax.sweep.state import Run
from prime_jax.sweep.worker_progress import WorkerProgress

TRACEBACK_LINES = 30
GROUP_SECONDS = 60.0  # for which processes wait for each other after a failure


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
    """

    root: Path
    trainer: Trainer
    progress: WorkerProgress
    group: distributed.ProcessGroup | None
    stopping: threading.Event
    out_of_time: Callable[[float], bool]
    heartbeat_seconds: float

    @property
    def is_leader(self) -> bool:
        return self.group is None or self.group.process == 0

    @property
    def process(self) -> int:
        return self.group.process if self.group else 0


class GroupOutOfSync(Exception):
    """The processes of a group no longer run the same attempt: all must be restarted."""


def run_attempt(worker: Worker, run: Run, k: int, earlier: Sequence[int]) -> dict[str, Any] | None:
    """Train attempt k of a run, which this worker has claimed.

    Returns:
        The result, or None if the attempt ended without one; its end is then recorded.

    Raises:
        GroupOutOfSync: after a failure not every process of the group arrived in time.
        NoData: the data of the run is not on this machine; the run stays open.
    """
    folder = worker.root / "runs" / run.id
    storage.make_folder(folder / str(k))
    log_file = Log(folder / str(k) / f"log.{worker.process}.txt")
    try:
        return _Attempt(worker, run, k, log_file).train([folder / str(j) for j in earlier])
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

    def train(self, earlier: Sequence[Path]) -> dict[str, Any] | None:
        worker, trainer, fenced = self.worker, self.worker.trainer, self.heartbeat.fenced
        self.log(f"attempt {self.k} of run {self.run.id} on {state.identity()['host']}")
        worker.progress.run(self.mine, {})
        try:
            with self.heartbeat if worker.is_leader else contextlib.nullcontext():
                config = from_dict(RunConfig, self.run.spec["config"])
                result = trainer.train(
                    config, self.folder, earlier=earlier, heartbeat=self.on_heartbeat, log=self.log
                )
        except (trainer.Preempted, trainer.Stopped, KeyboardInterrupt) as error:
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
