"""One attempt at one run: its heartbeat, its log, and what is recorded when it ends.

All processes of a process group call `run_attempt`; process 0 keeps the state, the others only train.
"""

import contextlib
import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from prime_jax.config import RunConfig
from prime_jax.errors import NoData, UserError
from prime_jax.runtime import distributed, storage
from prime_jax.runtime.logfile import Log
from prime_jax.runtime.records import write_json_atomic
from prime_jax.runtime.storage import Path
from prime_jax.settings import from_dict
from prime_jax.sweep import state, status
from prime_jax.sweep.state import Run
from prime_jax.sweep.worker_progress import WorkerProgress

TRACEBACK_LINES = 30
GROUP_SECONDS = 60.0  # that processes wait for each other after a failure


class Trainer(Protocol):
    """What a worker needs of `prime_jax.train`, which is one.

    One that reads data also has `look(config)`, which raises NoData where that is not here.
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
    """Rewrites the heartbeat of one attempt and notices when somebody else has taken the run.

    As a context manager it has stopped when the block is left; a heartbeat never follows an end.

    Attributes:
        before: machine seconds that earlier attempts took.
        fenced: somebody else has taken the run.
    """

    def __init__(self, root: Path, run: str, k: int, seconds: float, before: float = 0.0):
        super().__init__(daemon=True)
        self.root, self.run_id, self.k, self.seconds = root, run, k, seconds
        self.before, self._began = before, time.monotonic()
        self._latest: dict[str, Any] = {}
        self._heard = self._began
        self.fenced = threading.Event()
        self._over = threading.Event()

    def __enter__(self) -> "Heartbeat":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def update(self, values: dict[str, Any]) -> None:
        """What the training has to tell."""
        self._latest, self._heard = values, time.monotonic()

    def taken(self) -> float:
        """Machine seconds of this attempt and of those before."""
        return self.before + time.monotonic() - self._began

    def run(self) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            with contextlib.suppress(UserError):  # a store hiccup never stops training
                quiet = round(time.monotonic() - self._heard, 1)
                own = {"count": count, "quiet": quiet, "seconds": round(self.taken(), 1)}
                state.heartbeat(self.root, self.run_id, self.k, {**self._latest, **own})
                if state.superseded(self.root, self.run_id, self.k):
                    self.fenced.set()
            self._over.wait(self.seconds)


@dataclass(frozen=True)
class Worker:
    """What stays the same from run to run.

    Attributes:
        group: processes that train together, None for one.
        stopping: set when this worker must leave.
        late: whether its time is nearly up, given the seconds that a save takes.
    """

    root: Path
    trainer: Trainer
    progress: WorkerProgress
    group: distributed.ProcessGroup | None
    stopping: threading.Event
    late: Callable[[float], bool]
    heartbeat_seconds: float

    @property
    def leads(self) -> bool:
        return self.group is None or self.group.process == 0

    @property
    def process(self) -> int:
        return self.group.process if self.group else 0


class Apart(Exception):
    """The processes of a process group no longer do the same: all must start again."""


def run_attempt(worker: Worker, run: Run, k: int, earlier: Sequence[int]) -> dict[str, Any] | None:
    """Train attempt k of a run, which is ours; its result, or None once its end is recorded.

    Raises:
        Apart: after a failure not every process of the process group has come back.
        NoData: what the run trains on is not on this machine; the run stays open.
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
            with self.heartbeat if worker.leads else contextlib.nullcontext():
                config = from_dict(RunConfig, self.run.spec["config"])
                result = trainer.train(
                    config, self.folder, earlier=earlier, heartbeat=self.on_heartbeat, log=self.log
                )
        except (trainer.Preempted, trainer.Stopped, KeyboardInterrupt) as error:
            if fenced.is_set():
                self.log("left: another attempt has begun, or the run was killed", "yellow")
                if worker.group:  # its processes can be stopped together only once
                    worker.stopping.set()
                return None
            worker.stopping.set()
            by_hand = isinstance(error, KeyboardInterrupt)
            self.ended(
                "preempted", "interrupted" if by_hand else str(error) or "interrupted, saved"
            )
        except storage.Unreachable as error:
            self.ended("preempted", str(error))
            self.regroup()
        except NoData as error:  # the same for every run here, and the run's fault for none
            self.ended("preempted", str(error))
            self.regroup()
            raise
        except UserError as error:  # the same again until a person acts
            self.ended("failed", str(error), retry=False)
            self.regroup()
        except Exception as error:
            self.log_file.write(traceback.format_exc())
            tail = "\n".join(traceback.format_exc().splitlines()[-TRACEBACK_LINES:])
            self.ended("failed", f"{type(error).__name__}: {error}", tail)
            self.regroup()
        else:
            return self.publish(result) if worker.leads else result
        return None

    def log(self, text: str, style: str = "") -> None:
        self.log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self.worker.leads:
            self.worker.progress.log(f"{self.run.id} {text}", style)

    def on_heartbeat(self, values: dict[str, Any]) -> bool:
        # Before the first loss, or after the last finite one: JSON has no NaN.
        odd = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
        values = values | dict.fromkeys(odd)
        self.heartbeat.update(values)
        self.worker.progress.run(self.mine, values)
        if self.worker.late(values.get("save_seconds", 0.0)):
            self.worker.stopping.set()
        return not (self.heartbeat.fenced.is_set() or self.worker.stopping.is_set())

    def ended(self, how: str, reason: str, tail: str = "", *, retry: bool = True) -> None:
        self.log(f"{how}: {reason}", "red" if how == "failed" else "yellow")
        if not self.worker.leads:
            return
        if tail:
            self.worker.progress.log(tail, "red")
        where = (self.worker.root, self.run.id, self.k)
        self.retry(lambda: state.end(*where, how, reason, tail=tail, retry=retry))

    def regroup(self) -> None:
        """After a failure: go on together, or not at all."""
        name = f"after attempt {self.k} of run {self.run.id}"
        if self.worker.group and not distributed.meet(name, GROUP_SECONDS, self.log):
            raise Apart

    def publish(self, result: dict[str, Any]) -> dict[str, Any] | None:
        where = (self.worker.root, self.run.id)
        result |= {name: self.run.spec[name] for name in ("budget", "rules")}
        result |= {"attempt": self.k, "preemptions": self.run.interruptions}
        result |= {"machine_seconds": round(self.heartbeat.taken(), 1)}
        self.retry(lambda: write_json_atomic(self.folder / "result.json", result))
        if self.retry(lambda: state.superseded(*where, self.k)):
            self.log("finished, but another attempt has begun: left to it", "yellow")
            return None
        if not self.retry(lambda: state.publish(*where, result)):
            self.log("finished, but another attempt had published its result", "yellow")
            return None
        self.log_file.write("done\n")
        self.worker.progress.log(status.line(replace(self.mine, result=result)))
        return result

    def retry(self, action: Callable[[], Any]) -> Any:
        return storage.retry(action, self.log)
