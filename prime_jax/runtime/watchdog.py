"""Notices when a process of the process group dies, and ends this one with a line that says so.

By itself JAX leaves the others in a collective that nobody answers, and aborts them in C++ after its
heartbeat. So every process writes a heartbeat into the coordinator's key-value store and reads the
others'; JAX's own time-out is set longer. Only when the coordinator itself dies JAX is quicker: its
abort is then given a last line.
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
ADVICE = (
    "a run needs all its processes, so this one stops too; the same command on every host "
    "continues at the last saved step"
)
_watched: list["Watch"] = []  # at most one


class Watch:
    """A thread that ends the process when another one of the process group does.

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
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self._coordinator_lost())

    def start(self) -> None:
        atexit.register(self._leave)  # which runs before JAX's own farewell
        self._thread.start()
        if hasattr(signal, "SIGABRT") and os.name == "posix":
            # Python's own handlers would run in the main thread, which never gets there.
            ctypes.CDLL(None).signal(int(signal.SIGABRT), self._abort)

    def _leave(self) -> None:
        """Stop watching; a thread inside JAX's client would not survive the interpreter's end."""
        self._leaving.set()
        self._thread.join()

    def _beat(self) -> None:
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
        except Exception:  # several types, all of them a connection that is no more
            self._coordinator_lost()

    def _publish(self, value: str) -> None:
        self.client.key_value_set(f"{HEARTBEATS}{self.process}", value, allow_overwrite=True)

    def _coordinator_lost(self) -> None:
        self._end("process 0, which coordinates the others, cannot be reached")

    def _end(self, what: str) -> None:
        """Say what happened and end, unless this process is leaving anyway."""
        if self._leaving.is_set():
            return
        with self._ending:  # kept: who comes second waits for the end
            self.log(f"process {self.process}: {what}; {ADVICE}")
            sys.stdout.flush()
            os._exit(1)  # other threads may wait for the lost one for ever


def _describe(process: int, value: str, seconds: float) -> str:
    if value == LEFT:
        return f"process {process} has ended before the others; its own output says why"
    host = f" on {value.split()[0]}" if value else ""
    return f"process {process}{host} has not answered for {seconds:g} s"


def watch(group: Any, seconds: float, log: Callable[[str], None]) -> None:
    """Begin to watch the other processes; JAX is connected to the coordinator."""
    from jax._src import distributed  # the client is not public, and orbax uses it just so

    client = distributed.global_state.client
    _watched[:] = [Watch(client, group.process, group.processes, seconds, log)]
    _watched[0].start()


@contextmanager
def explaining() -> Iterator[None]:
    """A collective that fails because its other end is gone leaves the last word to the watch."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if _watched and _is_connection(str(error)):
            time.sleep(2 * _watched[0].seconds)
        raise


def _is_connection(text: str) -> bool:
    signs = ("Gloo", "UNAVAILABLE", "Connection", "NCCL", "heartbeat", "DEADLINE_EXCEEDED")
    return any(sign in text for sign in signs)
