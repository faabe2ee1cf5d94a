"""Ends this process, with a log line, when another process of its group dies.

Without it the other processes hang in a collective until JAX's heartbeat time-out aborts them in
C++. So every process writes a heartbeat into the coordinator's key-value store and reads those of
the others; JAX's own time-out is set longer. Only when the coordinator itself dies is JAX faster:
a handler of its SIGABRT then logs the reason.
"""

import atexit
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HEARTBEATS = "prime_jax/beat/"  # + process number; the value is `host count`, or LEFT
LEFT = "left"
LOST = 75  # exit code, "try again" in sysexits.h: a worker's 1 means that its runs have ended
ADVICE = (
    "a run needs all its processes, so this one stops too; run the same command on every host "
    "to continue from the last saved step"
)
_watched: list["Watch"] = []  # at most one


class Watch:
    """A thread that ends this process when another one of the process group is lost.

    Args:
        client: JAX's client of the coordinator.
        seconds: without a new heartbeat, after which a process counts as lost.
    """

    def __init__(
        self,
        client: Any,
        process: int,
        processes: int,
        seconds: float,
        log: Callable[[str], None],
    ):
        self.client, self.process, self.processes = client, process, processes
        self.seconds, self.log = seconds, log
        self._leaving = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self._coordinator_lost())

    def start(self) -> None:
        atexit.register(self._leave)  # runs before JAX's own exit handler
        self._thread.start()
        if hasattr(signal, "SIGABRT") and os.name == "posix":
            # A Python handler would run in the main thread, which is blocked in C++.
            ctypes.CDLL(None).signal(int(signal.SIGABRT), self._abort)

    def _leave(self) -> None:
        """Stop the thread: JAX's client must not be in use when the interpreter exits."""
        self._leaving.set()
        self._thread.join()

    def _run(self) -> None:
        count, host = 0, socket.gethostname()
        seen = {p: ("", time.monotonic()) for p in range(self.processes) if p != self.process}
        try:
            while not self._leaving.wait(min(self.seconds / 10, 5)):
                count += 1
                self._publish(f"{host} {count}")
                found = dict(self.client.key_value_dir_get(HEARTBEATS))
                for process, (before, since) in seen.items():
                    value = found.get(f"{HEARTBEATS}{process}", "")
                    if value != before:
                        seen[process] = (value, time.monotonic())
                    elif time.monotonic() - since > self.seconds:
                        self._end(_describe(process, value, self.seconds))
            self._publish(LEFT)
        except Exception:  # several types, all of them a lost connection
            self._coordinator_lost()

    def _publish(self, value: str) -> None:
        self.client.key_value_set(f"{HEARTBEATS}{self.process}", value, allow_overwrite=True)

    def _coordinator_lost(self) -> None:
        self._end("process 0, the coordinator, cannot be reached")

    def _end(self, what: str) -> None:
        """Log the reason and exit, unless this process is ending anyway."""
        if self._leaving.is_set():
            return
        with self._ending:  # never released: a second thread waits here until the exit
            self.log(f"process {self.process}: {what}; {ADVICE}")
            sys.stdout.flush()
            os._exit(LOST)  # not sys.exit: other threads may be blocked for ever


def _describe(process: int, value: str, seconds: float) -> str:
    if value == LEFT:
        return f"process {process} has ended before the others; see its own output for the reason"
    host = f" on {value.split()[0]}" if value else ""
    return f"process {process}{host} has not answered for {seconds:g} s"


def watch(group: Any, seconds: float, log: Callable[[str], None]) -> None:
    """Start to watch the other processes; JAX must be connected to the coordinator."""
    from jax._src import distributed  # not public; orbax uses it as well

    client = distributed.global_state.client
    _watched[:] = [Watch(client, group.process, group.processes, seconds, log)]
    _watched[0].start()


@contextmanager
def explaining() -> Iterator[None]:
    """When a collective fails because a process is lost, give the watchdog time to report that."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if _watched and _is_connection_error(str(error)):
            time.sleep(2 * _watched[0].seconds)
        raise


def _is_connection_error(text: str) -> bool:
    signs = ("Gloo", "UNAVAILABLE", "Connection", "NCCL", "heartbeat", "DEADLINE_EXCEEDED")
    return any(sign in text for sign in signs)
