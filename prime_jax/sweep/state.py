"""The state of a sweep, derived from flat files in ROOT/state, a folder or a bucket.

The only primitive is exclusive creation. Attempt k of a run belongs to the process that creates
`<id>.<k>.claim`; taking over, `kill` and `retry` all create attempt k+1, which the owner of
attempt k detects at its next heartbeat. Only heartbeats are rewritten, by their owner.
"""

import functools
import os
import re
import shlex
import socket
import sys
import time
import uuid
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prime_jax.errors import UserError
from prime_jax.runtime import storage
from prime_jax.runtime.records import as_json, parse_json, read_json, write_json_atomic
from prime_jax.runtime.storage import Path

SCHEMA = 1
FAILURES = 3  # a run that failed this often is not retried until `retry`
INTERRUPTIONS = 100  # the same for preempted or lost attempts
BACKOFF = 30.0  # seconds after the first failure, doubled with each further one
GONE = ("preempted", "lost", "stalled")  # another worker may continue these immediately
NUMBER, LOSS = (int, float), {"estimator": str, "kind": str, "value": (int, float)}
FORMS = {  # what readers rely on
    "spec": {"config": {"seed": int, "steps": int, "model": dict, "optim": dict, "data": dict}}
    | {"family": str, "flops": {"matmul": NUMBER}, "params": dict}
    | {"budget": NUMBER, "tokens": int, "convention": str},
    "result": {"status": str, "losses": [LOSS], "seconds": dict},
    "end": {"state": str, "reason": str, "retry": bool},
    "claim": {"host": str, "pid": int},
    "beat": {},
}
DAMAGED: dict[str, dict[str, Any]] = {
    "result": {"status": "damaged", "losses": [], "hashes": {}, "seconds": {"total": 0.0}}
    | {"steps": "", "epochs": "", "machine_seconds": 0.0},
    "end": {"state": "failed", "retry": True, "traceback": ""},
    "claim": {"host": "", "kernel": "", "pid": 0, "started": None},
    "beat": {},
}
NAME = re.compile(r"([0-9a-f]+)\.(?:(\d+)\.)?(spec|claim|beat|end|result)")


@dataclass(frozen=True)
class Attempt:
    """Attempt k; `claim` and `heartbeat` are empty (None) if they were not read: see `_wanted`."""

    k: int
    claim: dict[str, Any]
    heartbeat: dict[str, Any] | None
    end: dict[str, Any] | None


@dataclass(frozen=True)
class Run:
    """One run, as read from its files.

    Attributes:
        state: pending, running, stalled, lost, failed, preempted, killed or done.
        certain: the owner of a running attempt is known to be alive, by its process or by a
            heartbeat that changed.
        ended_for: seconds since this reader first saw the newest attempt's end, by its own clock.
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
        """The slice it was planned for; empty: any."""
        return self.spec.get("slice", "")

    @property
    def branch_point(self) -> int:
        """The step at which others may continue from it (prefixes.py); 0: it does not share, as
        those that an older version planned."""
        return self.spec.get("branch_point", 0)

    def fits(self, slice: str) -> bool:
        """Whether a worker on `slice` may take it; a worker without a slice takes any run."""
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
        """Attempts since the last `retry` that were preempted, lost or stalled."""
        ended = [a for a in self._since_reset if a.k < self.k or self.state in GONE]
        return sum(1 for a in ended if a.end is None or a.end["state"] == "preempted")

    def opens_in(self, *, backoff: float = BACKOFF) -> float | None:
        """Seconds until a worker may take this run, or None if none will.

        Clocks of hosts may differ: the age of a failure is measured from when this reader first
        saw it, so a reader that has just started waits the whole `backoff` (seconds, after one
        failure).
        """
        if self.state == "pending":
            return 0.0
        if self.state in GONE:
            return 0.0 if self.interruptions < INTERRUPTIONS else None
        if self.state != "failed" or self.failures >= FAILURES:
            return None
        if not self.attempts[-1].end["retry"]:
            return None
        return max(0.0, backoff * 2 ** (self.failures - 1) - self.ended_for)


def _warn(text: str) -> None:
    print(f"prime-jax: {text}", file=sys.stderr)


@dataclass
class Watch:
    """State of one reader: how long each heartbeat has been unchanged, by its own clock.

    Attributes:
        timeout: seconds after which an unchanged heartbeat means that the owner is lost.
        stall: seconds without a training step after which a live owner counts as stalled.
        log: told once about each run that is left out.
        cache: contents of the files that never change, by name.
        left_out: runs whose spec cannot be read, with the reason.
    """

    timeout: float = 300.0
    stall: float = 1800.0
    clock: Callable[[], float] = time.monotonic
    log: Callable[[str], None] = _warn
    cache: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    _seen: dict[tuple[str, int], tuple[Any, float]] = field(default_factory=dict)
    _moved: set[tuple[str, int]] = field(default_factory=set)
    _ended: dict[tuple[str, int], float] = field(default_factory=dict)

    def leave_out(self, runs: Mapping[str, str]) -> None:
        """Note the runs of one listing that cannot be understood, and why."""
        self.left_out = dict(runs)
        for why in self.left_out.values():
            if why not in self._told:
                self._told.add(why)
                self.log(why)

    def ended_for(self, run: str, attempt: Attempt) -> float:
        now = self.clock()
        return now - self._ended.setdefault((run, attempt.k), now)

    def judge(self, run: str, attempt: Attempt) -> tuple[str, bool]:
        """State of an attempt that has not ended, and whether that is certain."""
        alive = process_alive(attempt.claim)
        if alive is False:
            return "lost", True
        key, now = (run, attempt.k), self.clock()
        first, since = self._seen.setdefault(key, (attempt.heartbeat, now))
        if first != attempt.heartbeat:
            self._seen[key], since = (attempt.heartbeat, now), now
            self._moved.add(key)
        if now - since > self.timeout:
            return "lost", True
        if (attempt.heartbeat or {}).get("quiet", 0.0) > self.stall:
            return "stalled", True
        return "running", alive is True or key in self._moved


def create(path: Path, value: Any) -> bool:
    """Write JSON to `path` if nothing is there, in one step; False when something is.

    Raises:
        UserError: it cannot be written.
    """
    return storage.create(path, as_json(value))


def check_root(root: Path) -> None:
    """Raises: UserError: `root` is not a sweep directory, or one of another version."""
    if not storage.is_remote(root) and root.is_file():
        raise UserError(f"{root}: is a file; a sweep is a folder")
    if not storage.exists(root / "sweep.json"):
        raise UserError(
            f"{root}: no sweep here; make one with: prime-jax sweep plan EXPERIMENT "
            f"{shlex.quote(str(root))}"
        )
    header = read_json(root / "sweep.json")
    version = header.get("schema") if isinstance(header, dict) else None
    if version != SCHEMA:
        raise UserError(
            f"{root}: this sweep has version {version}; this program reads version {SCHEMA}"
        )


def list_runs(root: Path, watch: Watch | None = None) -> list[Run]:
    """Every run of a sweep, from one listing of its state directory, in order of planned FLOPs.

    A run whose spec is damaged, or of another version, is left out (`Watch.left_out`).

    Args:
        root: the sweep.
        watch: the reader's state; without it only a dead local process counts as lost.
    """
    watch = watch or Watch()
    folder = root / "state"
    found: dict[str, dict[tuple[int, str], str]] = {}
    for name in storage.names(folder):
        if match := NAME.fullmatch(name):
            run, k, kind = match.groups()
            found.setdefault(run, {})[int(k or 0), kind] = name
    found = {run: files for run, files in found.items() if (0, "spec") in files}
    wanted = [name for files in found.values() for name in _wanted(files, watch.cache)]
    values, left_out = {}, {}
    for name, data in zip(wanted, storage.read_all(folder, wanted), strict=True):
        run, kind = name.partition(".")[0], name.rpartition(".")[2]
        try:
            value = _understood(folder / name, kind, data)
        except UserError as error:
            left_out[run] = str(error)
        else:
            (values if kind == "beat" else watch.cache)[name] = value
    watch.leave_out(left_out)
    known = {run: files for run, files in found.items() if run not in left_out}
    runs = [_run(i, files, ChainMap(values, watch.cache), watch) for i, files in known.items()]
    return sorted(runs, key=lambda run: (run.spec["flops"]["matmul"], run.id))


def _understood(file: Path, kind: str, data: bytes) -> Any:
    """The content of a file; of a damaged one, or of another version, what lets the rest go on.

    Raises:
        UserError: nothing is known of a run whose spec is damaged.
    """
    try:
        value = parse_json(data, file)
        if kind in FORMS and not _has_form(value, FORMS[kind]):
            raise UserError(f"{file} was written by another version")
    except UserError as error:
        if kind == "spec":
            again = "remove it and plan the experiment again, which writes it anew"
            raise UserError(f"{error}; its run is left out: {again}") from None
        return DAMAGED[kind] | ({"reason": f"{error}"} if kind in ("result", "end") else {})
    return value


def _has_form(value: Any, form: Any) -> bool:
    """Whether a value has the keys of `form`, of their types; a list, parts of that form."""
    if isinstance(form, dict):
        here = isinstance(value, dict) and form.keys() <= value.keys()
        return here and all(_has_form(value[name], inner) for name, inner in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(_has_form(part, form[0]) for part in value)
    return isinstance(value, form)


def read_run(root: Path, run: str) -> Run:
    """A run with its spec only, for the processes that do not read the state."""
    return Run(
        id=run,
        spec=read_json(root / "state" / f"{run}.spec"),
        attempts=(),
        result=None,
        state="running",
        certain=True,
    )


def _wanted(files: dict[tuple[int, str], str], cache: dict[str, Any]) -> list[str]:
    """The files of one run that must be read: no heartbeats once there is a result, and only the
    newest attempt's claim, whose owner may be alive."""
    done, last = (0, "result") in files, max((k for k, _ in files), default=0)
    return [
        name
        for (k, kind), name in files.items()
        if name not in cache
        and not (kind == "beat" and done)
        and not (kind == "claim" and (done or k < last))
    ]


def open_runs(root: Path, slice: str = "", watch: Watch | None = None) -> list[Run]:
    """The runs that a worker on `slice` may take now or later, without running ones.

    Args:
        root: the sweep.
        slice: canonical name; empty: runs of every slice.
        watch: as in `list_runs`.
    """
    return [run for run in list_runs(root, watch) if run.fits(slice) and run.opens_in() is not None]


def claim(
    root: Path,
    run: str,
    k: int,
    by: str = "worker",
    log: Callable[[str], None] = lambda _: None,
) -> bool:
    """Try to become the owner of attempt k; retries write the same claim."""
    mine = {**identity(), "by": by, "time": time.time(), "claim": uuid.uuid4().hex}
    return storage.retry(lambda: create(root / "state" / f"{run}.{k}.claim", mine), log)


def heartbeat(root: Path, run: str, k: int, values: dict[str, Any]) -> None:
    write_json_atomic(root / "state" / f"{run}.{k}.beat", values)


def superseded(root: Path, run: str, k: int) -> bool:
    """Whether attempt k+1 was claimed, so that the owner of k must stop."""
    return storage.exists(root / "state" / f"{run}.{k + 1}.claim")


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
        retry: False for a failure that a retry would repeat.
    """
    value = {"state": how, "reason": reason, "traceback": tail, "retry": retry, "time": time.time()}
    create(root / "state" / f"{run}.{k}.end", value)


def publish(root: Path, run: str, result: dict[str, Any]) -> bool:
    """Mark the run as done; False if it already was."""
    return create(root / "state" / f"{run}.result", result)


def kill(root: Path, run: Run) -> None:
    """Stop a run permanently: its owner stops at its next heartbeat, and no worker takes it."""
    _close_next(root, run, "killed", "by hand")


def retry(root: Path, run: Run) -> None:
    """Reopen a run and reset its counts of failures and interruptions."""
    _close_next(root, run, "reset", "by hand")


def retry_failed(root: Path, runs: Iterable[Run]) -> list[Run]:
    """Reopen every failed one of the runs; returns those."""
    failed = [run for run in runs if run.state == "failed"]
    for run in failed:
        retry(root, run)
    return failed


def select(root: Path, runs: Iterable[Run], wanted: Iterable[str]) -> list[Run]:
    """The runs of a sweep with the given ids or unique prefixes of ids.

    Raises:
        UserError: no such run, or several.
    """
    runs, out = list(runs), []
    for prefix in wanted:
        matching = [run for run in runs if run.id.startswith(prefix)]
        if len(matching) != 1:
            several = f"several match: {', '.join(run.id for run in matching)}"
            none = f"no such run; prime-jax sweep status {shlex.quote(str(root))} lists them"
            raise UserError(f"run {prefix}: {several if matching else none}")
        out += matching
    return out


def identity() -> dict[str, Any]:
    """Identity of this process, with which `process_alive` can check it on the same machine."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "kernel": _kernel(), "pid": pid, "started": _started(pid)}


def process_alive(claim: dict[str, Any]) -> bool | None:
    """Whether the claim's process is alive; None if it runs on another machine."""
    kernel = _kernel()
    if kernel is None or (claim["host"], claim["kernel"]) != (socket.gethostname(), kernel):
        return None
    return claim["started"] is not None and _started(claim["pid"]) == claim["started"]


@functools.cache
def _kernel() -> str | None:
    """Identifies this boot and PID namespace; None without Linux's /proc."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks after boot; None if it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _close_next(root: Path, run: Run, how: str, reason: str) -> None:
    if run.result is not None:
        raise UserError(f"run {run.id} is done; a finished run cannot be changed")
    k = run.k + 1
    while not claim(root, run.id, k, by=how):
        k += 1
    end(root, run.id, k, how, reason)


def _run(
    name: str, files: dict[tuple[int, str], str], values: Mapping[str, Any], watch: Watch
) -> Run:
    def value(k: int, kind: str) -> Any:
        return values.get(files.get((k, kind), ""))

    claims = sorted(k for k, kind in files if kind == "claim")
    attempts = tuple(
        Attempt(k, value(k, "claim") or {}, value(k, "beat"), value(k, "end")) for k in claims
    )
    result = value(0, "result")
    state, certain, ended_for = "pending", True, 0.0
    if result is not None:
        state = "done"
    elif attempts and attempts[-1].end:
        state = {"reset": "pending"}.get(attempts[-1].end["state"], attempts[-1].end["state"])
        ended_for = watch.ended_for(name, attempts[-1])
    elif attempts:
        state, certain = watch.judge(name, attempts[-1])
    return Run(
        id=name,
        spec=value(0, "spec"),
        attempts=attempts,
        result=result,
        state=state,
        certain=certain,
        ended_for=ended_for,
    )
