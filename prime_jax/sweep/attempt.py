"""One attempt at one run: its heart, its log, and what is recorded when it ends.

All processes of a gang call `run_attempt`; process 0 keeps the state, the others only train.
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
from prime_jax.sweep.screen import Screen
from prime_jax.sweep.state import Run

TRACEBACK_LINES = 30
GANG_SECONDS = 60.0  # that processes wait for each other after a failure


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
        beat: Callable[[dict[str, Any]], bool],
        say: Callable[[str], None],
    ) -> dict[str, Any]: ...


class Heart(threading.Thread):
    """Rewrites the beat of one attempt and notices when somebody else has taken the run.

    As a context manager it has stopped when the block is left: a beat never follows an end.

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

    def __enter__(self) -> "Heart":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def hear(self, values: dict[str, Any]) -> None:
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
                state.beat(self.root, self.run_id, self.k, {**self._latest, **own})
                if state.superseded(self.root, self.run_id, self.k):
                    self.fenced.set()
            self._over.wait(self.seconds)


@dataclass(frozen=True)
class Worker:
    """What stays the same from run to run.

    Attributes:
        gang: processes that train together, None for one.
        stopping: set when this worker must leave.
        late: whether its time is nearly up, given the seconds that a save takes.
    """

    root: Path
    trainer: Trainer
    screen: Screen
    gang: distributed.Gang | None
    stopping: threading.Event
    late: Callable[[float], bool]
    beat_seconds: float

    @property
    def leads(self) -> bool:
        return self.gang is None or self.gang.process == 0

    @property
    def process(self) -> int:
        return self.gang.process if self.gang else 0


class Apart(Exception):
    """The processes of a gang no longer do the same: all must start again."""


def run_attempt(worker: Worker, run: Run, k: int, earlier: Sequence[int]) -> dict[str, Any] | None:
    """Train attempt k of a run, which is ours; its result, or None once its end is recorded.

    Raises:
        Apart: after a failure not every process of the gang has come back.
        NoData: what the run trains on is not on this machine; the run stays open.
    """
    folder = worker.root / "runs" / run.id
    storage.make_folder(folder / str(k))
    log = Log(folder / str(k) / f"log.{worker.process}.txt")
    try:
        return _Attempt(worker, run, k, log).train([folder / str(j) for j in earlier])
    finally:
        with contextlib.suppress(UserError):
            log.close()


class _Attempt:
    def __init__(self, worker: Worker, run: Run, k: int, log: Log):
        self.worker, self.run, self.k, self.log = worker, run, k, log
        self.folder = worker.root / "runs" / run.id / str(k)
        mine = state.Attempt(k, {}, None, None)
        self.mine = replace(run, state="running", attempts=(*run.attempts, mine))
        before = max(((a.beat or {}).get("seconds", 0.0) for a in run.attempts), default=0.0)
        self.heart = Heart(worker.root, run.id, k, worker.beat_seconds, before)
        self.saves = 0.0

    def train(self, earlier: Sequence[Path]) -> dict[str, Any] | None:
        worker, trainer, fenced = self.worker, self.worker.trainer, self.heart.fenced
        self.say(f"attempt {self.k} of run {self.run.id} on {state.identity()['host']}")
        worker.screen.run(self.mine, {})
        try:
            with self.heart if worker.leads else contextlib.nullcontext():
                config = from_dict(RunConfig, self.run.spec["config"])
                result = trainer.train(
                    config, self.folder, earlier=earlier, beat=self.beat, say=self.say
                )
        except (trainer.Preempted, trainer.Stopped, KeyboardInterrupt) as error:
            if fenced.is_set():
                self.say("left: another attempt has begun, or the run was killed", "yellow")
                if worker.gang:  # its processes can be stopped together only once
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
            self.log.write(traceback.format_exc())
            tail = "\n".join(traceback.format_exc().splitlines()[-TRACEBACK_LINES:])
            self.ended("failed", f"{type(error).__name__}: {error}", tail)
            self.regroup()
        else:
            return self.publish(result) if worker.leads else result
        return None

    def say(self, text: str, style: str = "") -> None:
        self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self.worker.leads:
            self.worker.screen.say(f"{self.run.id} {text}", style)

    def beat(self, values: dict[str, Any]) -> bool:
        # Before the first loss, or after the last finite one: JSON has no NaN.
        odd = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
        values = values | dict.fromkeys(odd)
        self.heart.hear(values)
        self.worker.screen.run(self.mine, values)
        if self.worker.late(values.get("save_seconds", 0.0)):
            self.worker.stopping.set()
        return not (self.heart.fenced.is_set() or self.worker.stopping.is_set())

    def ended(self, how: str, reason: str, tail: str = "", *, retry: bool = True) -> None:
        self.say(f"{how}: {reason}", "red" if how == "failed" else "yellow")
        if not self.worker.leads:
            return
        if tail:
            self.worker.screen.say(tail, "red")
        where = (self.worker.root, self.run.id, self.k)
        self.surely(lambda: state.end(*where, how, reason, tail=tail, retry=retry))

    def regroup(self) -> None:
        """After a failure: go on together, or not at all."""
        name = f"after attempt {self.k} of run {self.run.id}"
        if self.worker.gang and not distributed.meet(name, GANG_SECONDS, self.say):
            raise Apart

    def publish(self, result: dict[str, Any]) -> dict[str, Any] | None:
        where = (self.worker.root, self.run.id)
        result |= {name: self.run.spec[name] for name in ("budget", "rules")}
        result |= {"attempt": self.k, "preemptions": self.run.interruptions}
        result |= {"machine_seconds": round(self.heart.taken(), 1)}
        self.surely(lambda: write_json_atomic(self.folder / "result.json", result))
        if self.surely(lambda: state.superseded(*where, self.k)):
            self.say("finished, but another attempt has begun: left to it", "yellow")
            return None
        if not self.surely(lambda: state.publish(*where, result)):
            self.say("finished, but another attempt had published its result", "yellow")
            return None
        self.log.write("done\n")
        self.worker.screen.say(status.line(replace(self.mine, result=result)))
        return result

    def surely(self, action: Callable[[], Any]) -> Any:
        return storage.insist(action, self.say)
