"""A sweep as people read it: one line per run, counts, and the last words of what failed."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from prime_jax.sweep.plan import PARAMS, human
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
TAIL = 8  # lines of a traceback worth showing


def status_of(run: Run) -> str:
    """The run's state, with a diverged result told apart from a good one."""
    return run.result["status"] if run.result else run.state


def counts(runs: Sequence[Run]) -> str:
    """E.g. `12 runs: 8 done, 1 running, 3 pending`."""
    by_state = Counter(map(status_of, runs))
    parts = [f"{by_state[s]} {s}" for s in STATES if by_state[s]]
    return f"{len(runs)} runs: {', '.join(parts)}"


def line(run: Run, heartbeat: dict[str, Any] | None = None) -> str:
    """One line for a run; `heartbeat` replaces the one on disk with a fresher one."""
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
    return human(run.spec["params"][PARAMS[run.spec["convention"]]])


def seconds_left(run: Run, heartbeat: dict[str, Any]) -> float | None:
    """At the speed that was measured last; None where the run does not run."""
    rate, steps = heartbeat.get("tokens_per_second"), run.spec["config"]["steps"]
    if status_of(run) != "running" or not rate:
        return None
    return run.spec["tokens"] * (1 - heartbeat.get("step", 0) / steps) / rate


def failure(run: Run) -> str:
    """The last lines of what made a run fail, indented."""
    tail = (run.attempts[-1].end or {}).get("traceback", "") if run.attempts else ""
    lines = tail.splitlines()[-TAIL:] or [run.reason]
    return "\n".join(f"    {text}" for text in lines)


def as_dicts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What `--json` prints: per run its id, state, attempts, last heartbeat, and reason if it stopped."""
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
