"""A sweep while it runs: totals, a table that renews itself, failures as they happen."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prime_jax.hardware import slices
from prime_jax.hardware.prices import Prices
from prime_jax.runtime import storage
from prime_jax.runtime.storage import Path
from prime_jax.sweep import state, status
from prime_jax.sweep.state import Run

ROWS = 30  # runs shown at once: those that run, then those in trouble
LOOK, LOOK_REMOTE = 2.0, 15.0  # seconds between two looks
TROUBLE = ("failed", "lost", "stalled", "killed")


@dataclass(frozen=True)
class Totals:
    """What a whole sweep has done and has before it.

    Attributes:
        fraction: of all planned FLOPs, done.
        speed: FLOP/s of all running runs together.
        seconds: until the end at that speed; None while nothing runs.
        cost: spent so far; None without prices or without slices.
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
    """Of the machine time that all attempts took, by the price list; None where it says nothing."""
    known = [
        prices.of(slices.parse(run.slice), machine_seconds(run) / 3600)
        for run in runs
        if run.slice and machine_seconds(run)
    ]
    return sum(known) if known and None not in known else None


def machine_seconds(run: Run) -> float:
    """Of all attempts, as their owners' clocks told."""
    if run.result:
        return run.result.get("machine_seconds", run.result["seconds"]["total"])
    return max(((a.heartbeat or {}).get("seconds", 0.0) for a in run.attempts), default=0.0)


def progress(run: Run) -> float:
    """Fraction of the steps that are made."""
    if run.result:
        return 1.0
    return _heartbeat(run).get("step", 0) / run.spec["config"]["steps"]


def summary(runs: Sequence[Run], prices: Prices | None = None) -> str:
    """One line: counts, fraction of the work, time left, cost so far."""
    now = totals(runs, prices)
    words = [status.counts(runs), f"{now.fraction:.0%} of the FLOPs"]
    if now.seconds is not None:
        words.append(f"ETA {status.duration(now.seconds)} at {now.speed:.3g} FLOP/s")
    if now.cost is not None:
        words.append(f"cost so far {now.cost:,.2f} {prices.currency} (prices of {prices.date})")
    return ", ".join(words)


def table(runs: Sequence[Run]) -> Table:
    """Runs at work and in trouble, largest first."""
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
    """Show the sweep until nothing is open and nothing runs; Ctrl-C stops looking, nothing else."""
    memory, told = state.Watch(), set()
    with Live(console=console, auto_refresh=False, transient=False) as screen:
        while True:
            runs = storage.retry(lambda: state.list_runs(root, memory), console.print)
            for run in runs:
                if run.state == "failed" and (run.id, run.k) not in told:
                    told.add((run.id, run.k))
                    console.print(Text(f"{status.line(run)}\n{status.failure(run)}", "red"))
            line = Text(f"{time.strftime('%H:%M:%S')}  {summary(runs, prices)}")
            screen.update(Group(table(runs), line), refresh=True)
            if not any(run.state == "running" or run.opens_in() is not None for run in runs):
                return
            time.sleep(LOOK_REMOTE if storage.is_remote(root) else LOOK)


def _given_up(run: Run) -> bool:
    return run.state != "running" and run.opens_in() is None


def _heartbeat(run: Run) -> dict:
    return (run.attempts[-1].heartbeat if run.attempts else None) or {}


def _cells(run: Run) -> list:
    heartbeat, steps = _heartbeat(run), run.spec["config"]["steps"]
    loss, mfu, rest = (
        heartbeat.get("loss"),
        heartbeat.get("mfu"),
        status.seconds_left(run, heartbeat),
    )
    colour = "red" if run.state in TROUBLE else "green"
    return [
        run.id,
        f"{run.spec['budget']:.3g}",
        status.size(run),
        escape(run.spec["family"]),
        run.slice,
        Text(status.status_of(run), colour),
        ProgressBar(total=1.0, completed=progress(run), width=20),
        f"{heartbeat.get('step', 0)}/{steps}",
        "" if loss is None else f"{loss:.3f}",
        f"{mfu:.2f}" if mfu else "",
        "" if rest is None else status.duration(rest),
        str(run.k),
    ]
