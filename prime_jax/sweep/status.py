"""A sweep as people read it: a line per run, totals, a table that renews itself, a worker's bars."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prime_jax import flops
from prime_jax.hardware import slices
from prime_jax.hardware.prices import Prices
from prime_jax.runtime import storage
from prime_jax.runtime.storage import Path
from prime_jax.sweep import state
from prime_jax.sweep.plan import PARAMS
from prime_jax.sweep.state import Run

STATES = (
    "done",
    "diverged",
    "running",
    "pending",
    "preempted",
    "lost",
    "stalled",
    "failed",
    "killed",
)
TAIL = 8  # lines of a traceback that are shown
ROWS = 30  # runs shown: running ones first, then those in TROUBLE
POLL, POLL_REMOTE = 2.0, 15.0  # seconds between two refreshes
TROUBLE = ("failed", "lost", "stalled", "killed")


def status_of(run: Run) -> str:
    """The run's state; `diverged` or `done` for a run with a result."""
    return run.result["status"] if run.result else run.state


def counts(runs: Sequence[Run]) -> str:
    """E.g. `12 runs: 8 done, 1 running, 3 pending`."""
    by_state = Counter(map(status_of, runs))
    parts = [f"{by_state[s]} {s}" for s in STATES if by_state[s]]
    return f"{len(runs)} runs: {', '.join(parts)}"


def line(run: Run, heartbeat: dict[str, Any] | None = None) -> str:
    """One line for a run; `heartbeat` replaces the one on disk."""
    spec, state = run.spec, status_of(run)
    attempt = run.attempts[-1] if run.attempts else None
    heartbeat = heartbeat or (attempt.heartbeat if attempt else None) or {}
    words = [run.id, f"{spec['budget']:.3g}", f"N={size(run)}"]
    words += [spec["family"], f"seed {spec['config']['seed']}"]
    words += [run.slice] if run.slice else []
    words.append(state)
    steps, step = spec["config"]["steps"], heartbeat.get("step", 0)
    if run.result:
        words += [f"{loss['estimator']} {loss['value']:.4f}" for loss in run.result["losses"]]
    elif step:
        words.append(f"{step / steps:.0%} step {step}/{steps}")
        words += [heartbeat["phase"]] if heartbeat.get("phase", "train") != "train" else []
        words += [f"loss {heartbeat['loss']:.3f}"] if heartbeat.get("loss") is not None else []
        words += [f"MFU {heartbeat['mfu']:.2f}"] if heartbeat.get("mfu") else []
    rest = seconds_left(run, heartbeat)
    words += [] if rest is None else [f"ETA {duration(rest)}"]
    if run.k > 1:
        words.append(f"attempt {run.k}")
    if run.interruptions:
        words.append(f"({run.interruptions} preempted)")
    return " ".join(words)


def size(run: Run) -> str:
    """N in the convention of the plan, e.g. 151M."""
    return flops.human(run.spec["params"][PARAMS[run.spec["convention"]]])


def seconds_left(run: Run, heartbeat: dict[str, Any]) -> float | None:
    """Remaining time at the last measured speed; None if the run is not running."""
    rate, steps = heartbeat.get("tokens_per_second"), run.spec["config"]["steps"]
    if status_of(run) != "running" or not rate:
        return None
    return run.spec["tokens"] * (1 - heartbeat.get("step", 0) / steps) / rate


def failure(run: Run) -> str:
    """The last lines of a failed run's traceback, indented."""
    tail = (run.attempts[-1].end or {}).get("traceback", "") if run.attempts else ""
    lines = tail.splitlines()[-TAIL:] or [run.reason]
    return "\n".join(f"    {text}" for text in lines)


def as_dicts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The output of `--json`: per run its id, state, attempts, last heartbeat and reason."""
    return [
        {
            "run": run.id,
            "family": run.spec["family"],
            "seed": run.spec["config"]["seed"],
            "budget": run.spec["budget"],
            "slice": run.slice,
            "status": status_of(run),
            "attempts": run.k,
            "failures": run.failures,
            "interruptions": run.interruptions,
            "opens_in": run.opens_in(),
            "steps": run.spec["config"]["steps"],
            "heartbeat": run.attempts[-1].heartbeat if run.attempts else None,
            "host": run.attempts[-1].claim.get("host") if run.attempts else None,
            "reason": run.reason,
        }
        for run in runs
    ]


def duration(seconds: float) -> str:
    """6720 -> 1h52."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}" if minutes >= 60 else f"{minutes}m{rest:02}"


@dataclass(frozen=True)
class Totals:
    """Progress of a whole sweep.

    Attributes:
        fraction: of all planned FLOPs, done so far.
        speed: FLOP/s of all running runs together.
        seconds: remaining at that speed; None while nothing runs.
        cost: so far; None without prices or without slices.
    """

    fraction: float
    speed: float
    seconds: float | None
    cost: float | None


def totals(runs: Sequence[Run], prices: Prices | None = None) -> Totals:
    planned = sum(run.spec["flops"]["matmul"] for run in runs)
    done = sum(run.spec["flops"]["matmul"] * progress(run) for run in runs)
    speed = 0.0
    for run in runs:
        rate = _heartbeat(run).get("tokens_per_second")
        if run.state == "running" and rate:
            speed += rate * run.spec["flops"]["matmul"] / run.spec["tokens"]
    left = [run for run in runs if run.state != "done" and not _given_up(run)]
    rest = sum(run.spec["flops"]["matmul"] * (1 - progress(run)) for run in left)
    seconds = rest / speed if speed else None
    fraction = done / planned if planned else 0.0
    return Totals(fraction, speed, seconds, cost(runs, prices) if prices else None)


def cost(runs: Sequence[Run], prices: Prices) -> float | None:
    """Cost of the machine time of all attempts, by the price list; None where it has no price."""
    known = [
        prices.of(slices.parse(run.slice), machine_seconds(run) / 3600)
        for run in runs
        if run.slice and machine_seconds(run)
    ]
    return sum(known) if known and None not in known else None


def machine_seconds(run: Run) -> float:
    """Machine time of all attempts, as measured by their workers."""
    if run.result:
        return run.result.get("machine_seconds", run.result["seconds"]["total"])
    return max(((a.heartbeat or {}).get("seconds", 0.0) for a in run.attempts), default=0.0)


def progress(run: Run) -> float:
    """Fraction of the steps that are done."""
    if run.result:
        return 1.0
    return _heartbeat(run).get("step", 0) / run.spec["config"]["steps"]


def summary(runs: Sequence[Run], prices: Prices | None = None) -> str:
    """One line: counts, fraction of the work, time left, cost so far."""
    now = totals(runs, prices)
    words = [counts(runs), f"{now.fraction:.0%} of the FLOPs"]
    if now.seconds is not None:
        words.append(f"ETA {duration(now.seconds)} at {now.speed:.3g} FLOP/s")
    if now.cost is not None:
        words.append(f"cost so far {now.cost:,.2f} {prices.currency} (prices of {prices.date})")
    return ", ".join(words)


def table(runs: Sequence[Run]) -> Table:
    """Running runs, then those in TROUBLE; largest first."""
    out = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("run", "C", "N", "family", "slice", "state", "", "step", "loss", "MFU", "ETA"):
        right = name in ("C", "N", "step", "loss", "MFU", "ETA")
        out.add_column(name, justify="right" if right else "left", no_wrap=True)
    out.add_column("attempt", justify="right")
    shown = [run for run in reversed(runs) if run.state == "running"]
    shown += [run for run in reversed(runs) if run.state in TROUBLE]
    for run in shown[:ROWS]:
        out.add_row(*_cells(run))
    if len(shown) > ROWS:
        out.add_row(f"and {len(shown) - ROWS} more")
    return out


def watch(root: Path, console: Console, prices: Prices | None = None) -> None:
    """Show the sweep until no run is open or running; Ctrl-C ends only the display."""
    history, reported = state.Watch(), set()
    with Live(console=console, auto_refresh=False, transient=False) as screen:
        while True:
            runs = storage.retry(lambda: state.list_runs(root, history), console.print)
            for run in runs:
                if run.state == "failed" and (run.id, run.k) not in reported:
                    reported.add((run.id, run.k))
                    console.print(Text(f"{line(run)}\n{failure(run)}", "red"))
            now = Text(f"{time.strftime('%H:%M:%S')}  {summary(runs, prices)}")
            screen.update(Group(table(runs), now), refresh=True)
            if not any(run.state == "running" or run.opens_in() is not None for run in runs):
                return
            time.sleep(POLL_REMOTE if storage.is_remote(root) else POLL)


def _given_up(run: Run) -> bool:
    return run.state != "running" and run.opens_in() is None


def _heartbeat(run: Run) -> dict:
    return (run.attempts[-1].heartbeat if run.attempts else None) or {}


def _cells(run: Run) -> list:
    heartbeat, steps = _heartbeat(run), run.spec["config"]["steps"]
    loss, mfu, rest = (
        heartbeat.get("loss"),
        heartbeat.get("mfu"),
        seconds_left(run, heartbeat),
    )
    colour = "red" if run.state in TROUBLE else "green"
    return [
        run.id,
        f"{run.spec['budget']:.3g}",
        size(run),
        escape(run.spec["family"]),
        run.slice,
        Text(status_of(run), colour),
        ProgressBar(total=1.0, completed=progress(run), width=20),
        f"{heartbeat.get('step', 0)}/{steps}",
        "" if loss is None else f"{loss:.3f}",
        f"{mfu:.2f}" if mfu else "",
        "" if rest is None else duration(rest),
        str(run.k),
    ]


@dataclass
class WorkerProgress:
    progress: Progress
    overall: TaskID
    current: TaskID

    @classmethod
    @contextlib.contextmanager
    def open(cls, console: Console) -> Iterator["WorkerProgress"]:
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            yield cls(progress, progress.add_task(""), progress.add_task("", visible=False))

    def sweep(self, runs: Sequence[Run]) -> None:
        done = sum(run.state == "done" for run in runs)
        self.progress.update(
            self.overall, description=counts(runs), total=len(runs), completed=done
        )

    def run(self, run: Run, heartbeat: dict[str, Any]) -> None:
        text, total = escape(line(run, heartbeat)), run.spec["config"]["steps"]
        self.progress.update(
            self.current,
            description=text,
            total=total,
            completed=heartbeat.get("step", 0),
            visible=True,
        )

    def log(self, text: str, style: str = "") -> None:
        self.progress.console.print(escape(text), style=style, highlight=False, soft_wrap=True)
