"""One run on several processes: detection of the group, start-up, barriers, broadcast, stopping.

Every process runs the same command. Only process 0 writes records; all of them save checkpoints
together and stop at the same step.
"""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from prime_jax.errors import UserError
from prime_jax.runtime import tpu_metadata, watchdog

PORT = 8476  # of the coordinator; JAX's newer default is closed by Cloud TPU's firewall rule
WAIT_SECONDS, HEARTBEAT_SECONDS = 1800, 60
EXPLICIT = ("PRIME_COORDINATOR", "PRIME_PROCESSES", "PRIME_PROCESS_ID")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one run.

    Attributes:
        coordinator: host:port of process 0.
        source: where this was read from, for messages.
    """

    coordinator: str
    processes: int
    process: int
    source: str


def detect(environment: Mapping[str, str]) -> ProcessGroup | None:
    """The process group that the environment describes, or None for a single process.

    Explicit variables take precedence, then JobSet (Kubernetes), Slurm and Cloud TPU pods. The last
    are detected by their metadata server, which takes up to 0.7 s where none answers; it is not
    queried where JAX_PLATFORMS excludes TPUs.

    Raises:
        UserError: variables that are incomplete or contradict each other.
    """
    given = [name for name in EXPLICIT if name in environment]
    if given:
        coordinator, count, index = _all(environment, EXPLICIT, ", ".join(given))
        return _process_group(coordinator, count, index, "PRIME_* variables")
    if "JOBSET_NAME" in environment:
        return _of_jobset(environment)
    if _whole(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
        count, index, nodes, _ = _all(environment, names, "SLURM_STEP_NUM_TASKS")
        # Two steps of one job on one node would share a port that depends on the job alone.
        step = _whole(environment, "SLURM_STEP_ID", 0, least=0)
        port = 20_000 + (_whole(environment, "SLURM_JOB_ID", 0, least=0) * 7 + step) % 20_000
        return _process_group(address(first_host(nodes), port), count, index, "Slurm")
    if pod := tpu_metadata.find(environment):
        port = environment.get("JAX_COORDINATOR_PORT", PORT)
        coordinator = address(pod.coordinator, port)
        return _process_group(coordinator, pod.processes, pod.process, pod.source)
    return None


def _of_jobset(environment: Mapping[str, str]) -> ProcessGroup | None:
    e = environment
    count, index = _all(e, ("PRIME_HOSTS", "JOB_COMPLETION_INDEX"), "JOBSET_NAME")
    job = e.get("JOB_INDEX", "0")
    if e.get("PRIME_SLICES", "1") != "1":  # one job per slice, all of them one process group
        try:
            index, job = str(int(job) * int(count) + int(index)), "0"
            count = str(int(e["PRIME_SLICES"]) * int(count))
        except ValueError as error:
            raise UserError(f"JobSet variables are not whole numbers: {error}") from error
    name = f"{e['JOBSET_NAME']}-{e.get('REPLICATED_JOB_NAME', 'workers')}-{job}-0"
    return _process_group(f"{name}.{e['JOBSET_NAME']}:{PORT}", count, index, "JobSet")


def _all(environment: Mapping[str, str], names: Sequence[str], given: str) -> list[str]:
    """The values of variables that must all be set, because `given` is."""
    missing = [name for name in names if name not in environment]
    if missing:
        raise UserError(f"{given} is set, but not {', '.join(missing)}")
    return [environment[name] for name in names]


def _whole(environment: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} = {text!r}: must be a whole number of at least {least}")
    return int(text)


def _process_group(
    coordinator: str, processes: str, process: str, source: str
) -> ProcessGroup | None:
    try:
        count, index = int(processes), int(process)
    except ValueError:
        raise UserError(
            f"{source}: {processes!r} processes, number {process!r}: not whole numbers"
        ) from None
    if not 0 <= index < count:
        raise UserError(f"{source}: process {index} of {count}; the first one is number 0")
    try:
        parts = urlsplit(f"//{coordinator}")
        complete = bool(parts.hostname and parts.port)
    except ValueError:  # e.g. an IPv6 address without brackets
        complete = False
    if not complete:
        written = f"host:{PORT}, or [IPv6 address]:{PORT}"
        raise UserError(f"{source}: coordinator {coordinator!r} has no port; write {written}")
    return ProcessGroup(coordinator, count, index, source) if count > 1 else None


def address(host: str, port: object) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    bare = ":" in host and not host.startswith("[")
    return f"[{host}]:{port}" if bare else f"{host}:{port}"


def first_host(nodes: str) -> str:
    """The first host of a Slurm list: `a[03-05,7]-x,b` gives a03-x.

    Slurm itself reads the list where it can (containers lack its commands). JAX's detection reads
    no text or brackets behind a bracket.

    Raises:
        UserError: there is no host in it.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["scontrol", "show", "hostnames", nodes]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        if names := done.stdout.split():
            return names[0]
    match = re.match(r"(?:[^,\[\]]|\[\d[^\[\]]*\])+(?=,|$)", nodes)
    if not match:
        raise UserError(f"SLURM_STEP_NODELIST = {nodes!r}: no host in it")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def start(
    log: Callable[[str], None], environment: Mapping[str, str] = os.environ
) -> ProcessGroup | None:
    """Connect to the other processes of the group, if there is one; call it before any JAX work.

    If they do not connect in time, the process logs that and exits with code 2: JAX waits in C++,
    where no exception can interrupt it, and would abort with a stack trace.

    Returns:
        The process group, None for a single process.

    Raises:
        UserError: the environment is wrong (see `detect`), or the coordinator's address cannot
            be used.
    """
    group = detect(environment)
    if group is None:
        return None
    import jax

    wait = _whole(environment, "PRIME_WAIT_SECONDS", WAIT_SECONDS)
    heartbeat = _whole(environment, "PRIME_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS)
    others = f"{group.processes} processes ({group.source}), coordinator {group.coordinator}"
    advice = "check that every host runs the same command and can reach the coordinator's port"
    log(f"process {group.process}: waiting for {others}")
    jax.config.update("jax_enable_preemption_service", True)  # `stop_requested` needs it
    if environment.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")

    def give_up() -> None:
        log(f"error: not all of {others} came within {wait} s; {advice}")
        sys.stdout.flush()
        os._exit(2)

    timer = threading.Timer(wait, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            group.coordinator,
            group.processes,
            group.process,
            initialization_timeout=2 * wait + 60,  # `give_up` comes first
            heartbeat_timeout_seconds=2 * heartbeat,  # the watchdog comes first
        )
    except Exception as error:  # the client raises several types; the message has the reason
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"cannot connect to {others} ({reason}); {advice}") from error
    finally:
        timer.cancel()
    log(f"process {group.process}: all {group.processes} are here")
    watchdog.watch(group, heartbeat, log)
    return group


def is_alone() -> bool:
    """Whether this run has one process."""
    import jax

    return jax.process_count() == 1


def is_writer() -> bool:
    """Whether this process writes records."""
    import jax

    return jax.process_index() == 0


def barrier(name: str, log: Callable[[str], None]) -> None:
    """Wait for all processes, with a log line before and after; a no-op for one."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        log(f"process {jax.process_index()}: {name}: waiting for the others")
        multihost_utils.sync_global_devices(name)
        log(f"process {jax.process_index()}: {name}: all are here")


MAX_MESSAGE = 1 << 14  # bytes that `broadcast` can carry


def broadcast(value: Any) -> Any:
    """The value of process 0, on every process; JSON of at most `MAX_MESSAGE` bytes."""
    import json

    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    message = np.zeros(MAX_MESSAGE, np.uint8)
    if jax.process_index() == 0:
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        message[: len(text)] = text
    received = np.asarray(multihost_utils.broadcast_one_to_all(message))
    return json.loads(received.tobytes().rstrip(b"\0"))


def broadcast_arrays(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays of process 0, on every process, to the bit."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return arrays
    about = broadcast({name: [x.shape, x.dtype.str] for name, x in arrays.items()})
    out = {}
    for name, (shape, dtype) in about.items():
        given = arrays.get(name, np.zeros(shape, dtype))  # as bytes: JAX has no 64 bits by default
        sent = np.frombuffer(np.ascontiguousarray(given).tobytes(), np.uint8)
        received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
        out[name] = np.frombuffer(received.tobytes(), dtype).reshape(shape).copy()
    return out


def barrier_with_timeout(name: str, seconds: float, log: Callable[[str], None]) -> bool:
    """Whether all processes arrive within `seconds`; needs no devices, unlike `barrier`."""
    import jax
    from jax._src.distributed import global_state

    if jax.process_count() == 1:
        return True
    log(f"process {jax.process_index()}: {name}: waiting {seconds:g} s for the others")
    try:
        global_state.client.wait_at_barrier(name, int(1000 * seconds))
    except Exception:  # a time-out or a lost process: the client has no type of its own
        log(f"process {jax.process_index()}: {name}: not all came")
        return False
    log(f"process {jax.process_index()}: {name}: all are here")
    return True


_calls = itertools.count(1)


def stop_requested() -> bool:
    """Whether some process of the group received SIGTERM. True on all of them at the same call, so
    every process must call this equally often."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_calls))


def _only_raises(handler: object) -> bool:
    """Whether a handler of SIGINT does nothing but raise KeyboardInterrupt."""
    return handler is signal.default_int_handler or hasattr(handler, "only_raises")


class StoppedAtOnce(KeyboardInterrupt):
    """A signal arrived while nothing would be lost."""


class PreemptionGuard:
    """Handles SIGTERM and SIGINT so that all processes stop at the same step.

    The first signal is recorded, a second one ends the process. With several processes JAX's own
    SIGTERM handler notifies the others, and `should_stop` becomes True on all of them at the same
    call; from then on another SIGTERM ends the process.

    Attributes:
        at_once: nothing would be lost now: a process that is alone does not wait until somebody
            asks, the first signal raises StoppedAtOnce where it arrives.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.at_once = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "PreemptionGuard":
        import jax

        self.alone = jax.process_count() == 1
        if threading.current_thread() is threading.main_thread():
            noted = (signal.SIGTERM, signal.SIGINT) if self.alone else (signal.SIGINT,)
            self._previous = {s: signal.getsignal(s) for s in noted}
            for s in noted:
                signal.signal(s, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore_handlers()
        if not self.alone:
            self.stop_all()
        elif callable(outer := self._previous[number]) and not _only_raises(outer):
            outer(number, frame)  # the worker's own handler: it must stop as well
        if self.alone and self.at_once:
            raise StoppedAtOnce

    def stop_all(self) -> None:
        """Make every process stop, as if this one had been preempted."""
        os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self) -> bool:
        """Whether to stop now; every process must call this equally often."""
        if self.alone:
            return self.number is not None
        reached = stop_requested()
        if reached and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's handler ignores further signals
        return reached
