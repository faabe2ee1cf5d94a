"""The worker: claims the largest open run, trains it, publishes its result, until nothing is open.

Every engine starts this same loop; `pool.py` starts several of it here. A worker that dies loses
at most the steps since its checkpoint: another sees its process gone, or its beat stand still,
and takes attempt k+1 from there.
"""

import contextlib
import json
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from prime_jax.config import RunConfig, from_dict
from prime_jax.errors import UserError
from prime_jax.records import write_json_atomic
from prime_jax.sweep import state, status
from prime_jax.sweep.state import Run

DONE, FAILED, PREEMPTED = 0, 1, 85  # exit codes, the same on every engine
TRACEBACK_LINES = 30
POLL = 1.0  # seconds between looks while only other workers' runs are left
TRACED = ("seed", "steps", "optim", "checkpoint", "log")  # settings that need no new compilation


class Trainer(Protocol):
    """What a worker needs of `prime_jax.train`, which is one."""

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
    """

    def __init__(self, root: Path, run: str, k: int, seconds: float):
        super().__init__(daemon=True)
        self.root, self.run_id, self.k, self.seconds = root, run, k, seconds
        self.latest: dict[str, Any] = {}
        self.fenced = threading.Event()
        self._over = threading.Event()

    def __enter__(self) -> "Heart":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            with contextlib.suppress(OSError, UserError):  # a store hiccup never stops training
                state.beat(self.root, self.run_id, self.k, {**self.latest, "count": count})
                if state.superseded(self.root, self.run_id, self.k):
                    self.fenced.set()
            self._over.wait(self.seconds)


@dataclass
class Screen:
    """One bar over the sweep, one line for the current run, and what happened printed above."""

    progress: Progress
    overall: TaskID
    current: TaskID

    @classmethod
    @contextlib.contextmanager
    def open(cls, console: Console) -> Iterator["Screen"]:
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            yield cls(progress, progress.add_task(""), progress.add_task("", visible=False))

    def sweep(self, runs: Sequence[Run]) -> None:
        done = sum(run.state == "done" for run in runs)
        self.progress.update(
            self.overall, description=status.counts(runs), total=len(runs), completed=done
        )

    def run(self, run: Run, beat: dict[str, Any]) -> None:
        text, total = escape(status.line(run, beat)), run.spec["config"]["steps"]
        self.progress.update(
            self.current, description=text, total=total, completed=beat.get("step", 0), visible=True
        )

    def say(self, text: str, style: str = "") -> None:
        self.progress.console.print(escape(text), style=style, highlight=False, soft_wrap=True)


def work(
    root: Path,
    *,
    slice: str = "",
    minutes: float | None = None,
    trainer: Trainer | None = None,
    console: Console | None = None,
    beat_seconds: float = 30.0,
    timeout: float = 300.0,
    backoff: float = state.BACKOFF,
) -> int:
    """Run what is open in the sweep `root`, one run after the other.

    Args:
        root: the sweep directory.
        slice: canonical name of this machine; runs planned for another one are left alone.
        minutes: when this machine is taken away, counted from now.
        trainer: `prime_jax.train` unless a test brings its own.
        console: where progress goes.
        beat_seconds: between two beats.
        timeout: an attempt whose beat stands still for so long (seconds) is lost.
        backoff: seconds before a failed run is tried again.

    Returns:
        0 if nothing is left to do, 1 if runs have failed, 85 if interrupted (and saved).

    Raises:
        UserError: `root` is no sweep of this version, or cannot be written to.
    """
    began, watch, last, results = time.monotonic(), state.Watch(timeout), "", []
    state.check_root(root)
    with signals() as stopping, Screen.open(console or Console()) as screen:
        trainer = trainer or _jax_trainer(root)
        while True:
            runs = [run for run in state.list_runs(root, watch) if run.fits(slice)]
            screen.sweep(runs)
            run = _choose(runs, last, backoff)
            if stopping.is_set() or (run is None and not _worth_waiting(runs, backoff)):
                break
            if run is None:
                stopping.wait(POLL)
            elif state.claim(root, run.id, run.k + 1):
                last = _compiled_shape(run)
                result = _attempt(root, run, trainer, beat_seconds, stopping, screen)
                results += [result] if result else []
        screen.say(share(results, time.monotonic() - began))
    if stopping.is_set():
        return PREEMPTED
    return FAILED if any(run.state == "failed" for run in runs) else DONE


def share(results: Sequence[dict[str, Any]], life: float) -> str:
    """How much of `life` seconds went into training steps, compilation left out."""
    train, compile_ = (sum(r["seconds"][what] for r in results) for what in ("train", "compile"))
    rest = max(life - compile_, 1e-9)
    return f"training steps: {train / rest:.0%} of {rest:.0f} s (without {compile_:.0f} s of compilation)"


def _attempt(
    root: Path,
    run: Run,
    trainer: Trainer,
    beat_seconds: float,
    stopping: threading.Event,
    screen: Screen,
) -> dict[str, Any] | None:
    """Train attempt k+1 of a run, which is ours; its result, or None once its end is recorded."""
    k, folder = run.k + 1, root / "runs" / run.id
    heart = Heart(root, run.id, k, beat_seconds)
    mine = replace(run, state="running", attempts=(*run.attempts, state.Attempt(k, {}, None, None)))

    def beat(values: dict[str, Any]) -> bool:
        # Before the first loss, or after the last finite one: JSON has no NaN.
        odd = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
        values = values | dict.fromkeys(odd)
        heart.latest = values
        screen.run(mine, values)
        return not (heart.fenced.is_set() or stopping.is_set())

    def ended(how: str, reason: str, tail: str = "", *, retry: bool = True) -> None:
        state.end(root, run.id, k, how, reason, tail=tail, retry=retry)
        screen.say(f"{how} {run.id} attempt {k}: {reason}", "red" if how == "failed" else "yellow")
        if tail:
            screen.say(tail, "red")

    try:
        with heart:
            config = from_dict(RunConfig, run.spec["config"])
            (folder / str(k)).mkdir(parents=True, exist_ok=True)
            earlier = [
                folder / str(a.k) for a in reversed(run.attempts) if (folder / str(a.k)).is_dir()
            ]
            screen.run(mine, {})
            result = trainer.train(
                config, folder / str(k), earlier=earlier, beat=beat, say=screen.say
            )
    except (trainer.Preempted, trainer.Stopped, KeyboardInterrupt) as error:
        if heart.fenced.is_set():
            screen.say(
                f"left {run.id} attempt {k}: another attempt has begun, or it was killed", "yellow"
            )
            return None
        stopping.set()
        ended(
            "preempted",
            "interrupted" if isinstance(error, KeyboardInterrupt) else "interrupted, saved",
        )
    except UserError as error:  # the same again until a person acts
        ended("failed", str(error), retry=False)
    except Exception as error:
        tail = "\n".join(traceback.format_exc().splitlines()[-TRACEBACK_LINES:])
        ended("failed", f"{type(error).__name__}: {error}", tail)
    else:
        extra = {"budget": run.spec["budget"], "rules": run.spec["rules"]}
        result |= extra | {"attempt": k, "preemptions": run.interruptions}
        write_json_atomic(folder / str(k) / "result.json", result)
        state.publish(root, run.id, result)
        screen.say(status.line(replace(mine, result=result)))
        return result
    return None


def _choose(runs: Sequence[Run], last: str, backoff: float) -> Run | None:
    """The largest open run, preferably one that the last compilation fits."""
    ready = [run for run in runs if run.opens_in(backoff=backoff) == 0.0]
    return max(
        ready,
        key=lambda run: (_compiled_shape(run) == last, run.spec["flops"]["matmul"]),
        default=None,
    )


def _worth_waiting(runs: Sequence[Run], backoff: float) -> bool:
    """Whether a run may open soon: one that backs off, or whose owner may be dead."""
    return any(
        run.opens_in(backoff=backoff) is not None or (run.state == "running" and not run.certain)
        for run in runs
    )


def _compiled_shape(run: Run) -> str:
    config = {k: v for k, v in run.spec["config"].items() if k not in TRACED}
    return json.dumps(config, sort_keys=True)


def _jax_trainer(root: Path) -> Trainer:
    import jax

    from prime_jax import train

    jax.config.update("jax_compilation_cache_dir", str((root / "cache" / "xla").absolute()))
    return train


@contextlib.contextmanager
def signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT interrupts at once."""
    stopping = threading.Event()

    def handle(number: int, _: FrameType | None) -> None:
        if stopping.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
