"""Notices when a process of the gang dies, and ends this one with a line that says so.

JAX ends the others too, but by a C++ abort with a stack trace, or leaves them in a collective that
nobody answers. So every process writes a beat into the coordinator's key-value store and reads the
others'; JAX's own time-out is set longer and is the second line of defence.
"""

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

BEATS = "prime_jax/beat/"  # + process number; the value is `host count`, or LEFT
NEVER = "prime_jax/never"  # a key that nobody writes: waiting for it ends when the coordinator does
LEFT = "left"
ADVICE = (
    "a run needs all its processes, so this one stops too; the same command on every host "
    "continues at the last saved step"
)
_watched: list["Watch"] = []  # at most one


class Watch:
    """Two threads that end the process when another one of the gang does.

    Args:
        client: JAX's client of the coordinator.
        seconds: without a new beat, after which a process counts as lost.
    """

    def __init__(
        self,
        client: Any,
        process: int,
        processes: int,
        seconds: float,
        say: Callable[[str], None],
    ):
        self.client, self.process, self.processes = client, process, processes
        self.seconds, self.say = seconds, say
        self.leaving = threading.Event()

    def start(self) -> None:
        atexit.register(self.leaving.set)
        for target in (self._beat, self._wait_for_coordinator):
            threading.Thread(target=target, daemon=True).start()

    def _beat(self) -> None:
        count, host = 0, socket.gethostname()
        seen = {p: ("", time.monotonic()) for p in range(self.processes) if p != self.process}
        while True:
            count += 1
            mine = LEFT if self.leaving.is_set() else f"{host} {count}"
            try:
                self.client.key_value_set(f"{BEATS}{self.process}", mine, allow_overwrite=True)
                found = dict(self.client.key_value_dir_get(BEATS))
            except Exception as error:  # several types, all of them a connection that is no more
                return self._coordinator_lost(error)
            for process, (before, since) in seen.items():
                value = found.get(f"{BEATS}{process}", "")
                if value != before:
                    seen[process] = (value, time.monotonic())
                elif time.monotonic() - since > self.seconds:
                    return self.end(_describe(process, value, self.seconds))
            time.sleep(min(self.seconds / 10, 5))

    def _wait_for_coordinator(self) -> None:
        while True:
            try:
                self.client.blocking_key_value_get(NEVER, 60_000)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    return self._coordinator_lost(error)

    def _coordinator_lost(self, error: Exception) -> None:
        reason = str(error).splitlines()[0][:80]
        self.end(f"process 0, which coordinates the others, cannot be reached ({reason})")

    def end(self, what: str) -> None:
        """Say what happened and end, unless this process is leaving anyway."""
        if self.leaving.is_set():
            return
        self.leaving.set()
        self.say(f"process {self.process}: {what}; {ADVICE}")
        sys.stdout.flush()
        os._exit(1)  # other threads may wait for the lost one for ever


def _describe(process: int, value: str, seconds: float) -> str:
    if value == LEFT:
        return f"process {process} has ended before the others; its own output says why"
    host = f" on {value.split()[0]}" if value else ""
    return f"process {process}{host} has not answered for {seconds:g} s"


def watch(gang: Any, seconds: float, say: Callable[[str], None]) -> None:
    """Begin to watch the other processes; JAX is connected to the coordinator."""
    from jax._src import distributed  # the client is not public, and orbax uses it just so

    client = distributed.global_state.client
    _watched[:] = [Watch(client, gang.process, gang.processes, seconds, say)]
    _watched[0].start()


@contextmanager
def blamed() -> Iterator[None]:
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
