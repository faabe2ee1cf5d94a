"""A sweep as people read it: a line per run, totals, a table; what workers say on the way."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prime_jax import flops
from prime_jax.hardware import slices
from prime_jax.hardware.prices import Prices
from prime_jax.runtime import storage
from prime_jax.runtime.storage import Path
from prime_jax.sweep import state
from prime_jax.sweep.plan import PARAMS
from prime_jax.sweep.state import Run
from prime_jax.table import Cell, Table

STATES = (
    "done",
    "diverged",
    "damaged",
    "running",
    "silent",
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
SILENCE = 300.0  # seconds without a heartbeat, by this machine's clock
TROUBLE = ("failed", "damaged", "silent", "lost", "stalled", "killed")


def status_of(run: Run) -> str:
    """The run's state; `diverged` or `done` for a run with a result.

    `silent` is one that nobody has closed and whose last heartbeat is old: its machine may be gone.
    """
    if run.result:
        return run.result["status"]
    return "silent" if silence(run) > SILENCE else run.state


def silence(run: Run) -> float:
    """Seconds since the last heartbeat of a run that should have one, as far as clocks agree."""
    if run.state != "running" or run.certain:
        return 0.0
    last = _heartbeat(run).get("time") or run.attempts[-1].claim.get("time")
    return time.time() - last if last else 0.0


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
    words += [f"(no heartbeat for {duration(silence(run))})"] if state == "silent" else []
    steps, step = spec["config"]["steps"], heartbeat.get("step", 0)
    if state == "damaged":
        words.append(f"({run.result['reason']}; remove it, and the run is open again)")
    elif run.result:
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
        words.append(f"({run.interruptions} interrupted)")
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
        if status_of(run) == "running" and rate:
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
    shown = [run for run in reversed(runs) if run.state == "running"]
    shown += [run for run in reversed(runs) if run.state in TROUBLE]
    notes = [f"and {len(shown) - ROWS} more"] if len(shown) > ROWS else []
    head = ("id", "C", "N", "family", "slice", "state", "done", "step", "loss", "MFU", "ETA")
    return Table((*head, "attempt"), [_cells(run) for run in shown[:ROWS]], notes)


def follow(root: Path, log: Callable[[str], None]) -> Iterator[list[Run]]:
    """The runs of a sweep, again and again until none is open or running.

    Args:
        log: told about a store that cannot be reached.
    """
    history = state.Watch(log=log)
    while True:
        runs = storage.retry(lambda: state.list_runs(root, history), log)
        yield runs
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
    return [
        run.id,
        f"{run.spec['budget']:.3g}",
        size(run),
        run.spec["family"],
        run.slice,
        Cell(status_of(run), style="bad" if run.state in TROUBLE else "good"),
        f"{progress(run):.0%}",
        f"{heartbeat.get('step', 0)}/{steps}",
        "" if loss is None else f"{loss:.3f}",
        f"{mfu:.2f}" if mfu else "",
        "" if rest is None else duration(rest),
        str(run.k),
    ]


class WorkerProgress:
    """What workers say on the way; this one says nothing."""

    def sweep(self, runs: Sequence[Run]) -> None:
        """How all runs stand."""

    def run(self, run: Run, heartbeat: dict[str, Any]) -> None:
        """How the run stands that is being trained."""

    def log(self, text: str, style: str = "") -> None:
        """A line, or several."""


SILENT = WorkerProgress()
