"""The state of a sweep, derived from flat files in ROOT/state (launch.md section 1).

The one primitive is exclusive creation. Attempt k of a run belongs to whoever creates
`<id>.<k>.claim`; taking over, `kill` and `retry` all create attempt k+1, which the owner of
attempt k sees at its next beat. Nothing is ever rewritten but a beat, by its owner.
"""

import contextlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prime_jax.errors import UserError
from prime_jax.records import read_json, write_json_atomic

SCHEMA = 1
FAILURES = 3  # a run that failed so often waits for `retry`
INTERRUPTIONS = 100  # the same for preempted or lost attempts
BACKOFF = 30.0  # seconds after the first failure, doubled with each further one
NAME = re.compile(r"([0-9a-f]+)\.(?:(\d+)\.)?(spec|claim|beat|end|result)")


@dataclass(frozen=True)
class Attempt:
    k: int
    claim: dict[str, Any]
    beat: dict[str, Any] | None
    end: dict[str, Any] | None


@dataclass(frozen=True)
class Run:
    """One run as its files tell it.

    Attributes:
        state: pending, running, lost, failed, preempted, killed or done.
        certain: a running owner was seen alive, by its process or by a beat that changed.
        ended_for: seconds since this reader first saw the newest attempt's end, on its own clock.
    """

    id: str
    spec: dict[str, Any]
    attempts: tuple[Attempt, ...]
    result: dict[str, Any] | None
    state: str
    certain: bool
    ended_for: float = 0.0

    @property
    def k(self) -> int:
        """Number of the newest attempt, 0 when there is none."""
        return self.attempts[-1].k if self.attempts else 0

    @property
    def slice(self) -> str:
        """The accelerators it was planned for; empty: any."""
        return self.spec.get("slice", "")

    def fits(self, slice: str) -> bool:
        """Whether a worker on `slice` may take it; one without a slice takes anything."""
        return not slice or self.slice in ("", slice)

    @property
    def reason(self) -> str:
        end = self.attempts[-1].end if self.attempts else None
        return (end or {}).get("reason", "")

    @property
    def _since_reset(self) -> tuple[Attempt, ...]:
        resets = [a.k for a in self.attempts if a.end and a.end["state"] == "reset"]
        return tuple(a for a in self.attempts if a.k > max(resets, default=0))

    @property
    def failures(self) -> int:
        return sum(1 for a in self._since_reset if a.end and a.end["state"] == "failed")

    @property
    def interruptions(self) -> int:
        """Attempts since the last `retry` that were preempted or lost."""
        ended = [
            a for a in self._since_reset if a.k < self.k or self.state in ("lost", "preempted")
        ]
        return sum(1 for a in ended if a.end is None or a.end["state"] == "preempted")

    def opens_in(self, *, backoff: float = BACKOFF) -> float | None:
        """Seconds until a worker may take this run, or None if none will.

        Hosts need not agree on the time of day: a failure's age is what this reader has seen of
        it, so one that has just started waits the whole `backoff` (seconds, after one failure).
        """
        if self.state == "pending":
            return 0.0
        if self.state in ("lost", "preempted"):
            return 0.0 if self.interruptions < INTERRUPTIONS else None
        if self.state != "failed" or self.failures >= FAILURES:
            return None
        if not self.attempts[-1].end["retry"]:
            return None
        return max(0.0, backoff * 2 ** (self.failures - 1) - self.ended_for)


@dataclass
class Watch:
    """The memory of one reader: how long each beat has stayed the same, on its own clock."""

    timeout: float = 300.0
    clock: Callable[[], float] = time.monotonic
    _seen: dict[tuple[str, int], tuple[Any, float]] = field(default_factory=dict)
    _moved: set[tuple[str, int]] = field(default_factory=set)
    _ended: dict[tuple[str, int], float] = field(default_factory=dict)

    def ended_for(self, run: str, attempt: Attempt) -> float:
        now = self.clock()
        return now - self._ended.setdefault((run, attempt.k), now)

    def judge(self, run: str, attempt: Attempt) -> tuple[str, bool]:
        """State of an attempt that has not ended (running or lost), and whether that is certain."""
        alive = process_alive(attempt.claim)
        if alive is False:
            return "lost", True
        key, now = (run, attempt.k), self.clock()
        first, since = self._seen.setdefault(key, (attempt.beat, now))
        if first != attempt.beat:
            self._seen[key], since = (attempt.beat, now), now
            self._moved.add(key)
        if now - since > self.timeout:
            return "lost", True
        return "running", alive is True or key in self._moved


def create(path: Path, value: Any) -> bool:
    """Write JSON to `path` if nothing is there, in one step; False when something is.

    Raises:
        UserError: the place cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w") as file:
            file.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def check_root(root: Path) -> None:
    """Raises: UserError: `root` is not a sweep directory, or one of another version."""
    if not (root / "sweep.json").is_file():
        raise UserError(
            f"{root}: no sweep here; make one with: prime-jax sweep plan EXPERIMENT {root}"
        )
    header = read_json(root / "sweep.json")
    version = header.get("schema") if isinstance(header, dict) else None
    if version != SCHEMA:
        raise UserError(
            f"{root}: a sweep of version {version}; this program reads version {SCHEMA}"
        )


def list_runs(root: Path, watch: Watch | None = None) -> list[Run]:
    """Every run of a sweep, from one listing of its state directory, in order of planned FLOPs.

    Args:
        root: the sweep.
        watch: the reader's memory; without one only a dead local process counts as lost.
    """
    watch = watch or Watch()
    state = root / "state"
    found: dict[str, dict[tuple[int, str], Path]] = {}
    for name in os.listdir(state):
        if match := NAME.fullmatch(name):
            run, k, kind = match.groups()
            found.setdefault(run, {})[int(k or 0), kind] = state / name
    runs = [_run(i, files, watch) for i, files in found.items() if (0, "spec") in files]
    return sorted(runs, key=lambda run: (run.spec["flops"]["matmul"], run.id))


def open_runs(root: Path, slice: str = "", watch: Watch | None = None) -> list[Run]:
    """The runs that a worker on `slice` may take now or after a while, running ones left out.

    Args:
        root: the sweep.
        slice: canonical name of accelerators; empty: those of every slice.
        watch: as in `list_runs`.
    """
    return [run for run in list_runs(root, watch) if run.fits(slice) and run.opens_in() is not None]


def claim(root: Path, run: str, k: int, by: str = "worker") -> bool:
    """Try to become the owner of attempt k."""
    return create(
        root / "state" / f"{run}.{k}.claim", {**identity(), "by": by, "time": time.time()}
    )


def beat(root: Path, run: str, k: int, values: dict[str, Any]) -> None:
    write_json_atomic(root / "state" / f"{run}.{k}.beat", values)


def superseded(root: Path, run: str, k: int) -> bool:
    """Whether somebody has taken attempt k+1, so that the owner of k must stop."""
    return (root / "state" / f"{run}.{k + 1}.claim").exists()


def end(
    root: Path, run: str, k: int, how: str, reason: str, *, tail: str = "", retry: bool = True
) -> None:
    """Close attempt k: `failed`, `preempted`, `killed` or `reset`.

    Args:
        root: the sweep.
        run: its id.
        k: the attempt.
        how: one of the four states.
        reason: one line.
        tail: the last lines of a traceback.
        retry: False for a failure that repeats until a person acts.
    """
    value = {"state": how, "reason": reason, "traceback": tail, "retry": retry, "time": time.time()}
    create(root / "state" / f"{run}.{k}.end", value)


def publish(root: Path, run: str, result: dict[str, Any]) -> bool:
    """Make the run done, once and for all; False when it already was."""
    return create(root / "state" / f"{run}.result", result)


def kill(root: Path, run: Run) -> None:
    """Stop a run for good: its owner leaves at its next beat and nobody takes it."""
    _close_next(root, run, "killed", "by hand")


def retry(root: Path, run: Run) -> None:
    """Open a run again, with fresh retry budgets."""
    _close_next(root, run, "reset", "by hand")


def select(runs: Iterable[Run], wanted: Iterable[str]) -> list[Run]:
    """The runs with the given ids or unique beginnings of ids.

    Raises:
        UserError: no such run, or several.
    """
    runs, out = list(runs), []
    for prefix in wanted:
        matching = [run for run in runs if run.id.startswith(prefix)]
        if len(matching) != 1:
            raise UserError(f"run {prefix}: {'several match' if matching else 'no such run'}")
        out += matching
    return out


def identity() -> dict[str, Any]:
    """Who this process is: enough to tell later, on the same machine, whether it still lives."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "kernel": _kernel(), "pid": pid, "started": _started(pid)}


def process_alive(claim: dict[str, Any]) -> bool | None:
    """Whether the claim's process lives; None when that cannot be told from here."""
    kernel = _kernel()
    if kernel is None or (claim["host"], claim["kernel"]) != (socket.gethostname(), kernel):
        return None
    return claim["started"] is not None and _started(claim["pid"]) == claim["started"]


def _kernel() -> str | None:
    """Names this boot and this container's process numbers; None without Linux's /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks after boot; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _close_next(root: Path, run: Run, how: str, reason: str) -> None:
    if run.result is not None:
        raise UserError(f"run {run.id} is done; a finished run stays as it is")
    k = run.k + 1
    while not claim(root, run.id, k, by=how):
        k += 1
    end(root, run.id, k, how, reason)


def _run(name: str, files: dict[tuple[int, str], Path], watch: Watch) -> Run:
    def read(k: int, kind: str) -> Any:
        return read_json(files[k, kind]) if (k, kind) in files else None

    claims = sorted(k for k, kind in files if kind == "claim")
    attempts = tuple(
        Attempt(k, *(read(k, kind) for kind in ("claim", "beat", "end"))) for k in claims
    )
    result = read(0, "result")
    state, certain, ended_for = "pending", True, 0.0
    if result is not None:
        state = "done"
    elif attempts and attempts[-1].end:
        state = {"reset": "pending"}.get(attempts[-1].end["state"], attempts[-1].end["state"])
        ended_for = watch.ended_for(name, attempts[-1])
    elif attempts:
        state, certain = watch.judge(name, attempts[-1])
    return Run(name, read(0, "spec"), attempts, result, state, certain, ended_for)
