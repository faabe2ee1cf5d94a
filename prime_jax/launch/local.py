"""This machine: one worker in this process, or several with disjoint shares of it."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prime_jax.launch.engine import Desk, Sweep


@dataclass(frozen=True)
class Options:
    """Nothing beyond --workers and --slice."""


def render(sweep: Sweep, options: Options) -> dict[str, str]:
    """The command that each worker is."""
    return {
        f"{pool.name}.txt": f"prime-jax {' '.join(pool.work())}\n" for pool in sweep.busy_pools()
    }


def up(sweep: Sweep, options: Options, desk: Desk) -> int:
    """Work until nothing is open; as `sweep run`, and `sweep down` ends it from elsewhere."""
    slice = sweep.only.name if sweep.only else ""
    with _registered(sweep):
        if sweep.workers == 1:
            from prime_jax.sweep import worker

            return worker.work(sweep.source, slice=slice, console=desk.console)
        from prime_jax.sweep import pool

        chosen = ["--slice", slice] if slice else []
        command = [*pool.COMMAND, "sweep", "work", sweep.root, *chosen]
        return pool.supervise(sweep.source, sweep.workers, command=command, console=desk.console)


def down(sweep: Sweep, options: Options, desk: Desk) -> int:
    """Ask what `up` started on this machine to save and leave, and wait for it."""
    from prime_jax.runtime.records import read_json
    from prime_jax.sweep import state

    here = []
    for path in sorted(_folder(sweep).glob("local-*.json")):
        who = read_json(path)
        alive = state.process_alive(who)
        if alive:
            here.append(who)
        elif alive is None:
            desk.say(f"process {who['pid']} on {who['host']}: stop it there")
        else:
            path.unlink(missing_ok=True)  # killed, so it could not do that itself
    if not here:
        desk.say("nothing of this sweep runs on this machine")
        return 0
    if desk.agree([f"process {who['pid']}" for who in here], "stop?"):
        for who in here:
            os.kill(who["pid"], signal.SIGTERM)
        while any(state.process_alive(who) for who in here):
            time.sleep(0.2)
        desk.say("stopped; the same `up` continues")
    return 0


@contextmanager
def _registered(sweep: Sweep) -> Iterator[None]:
    """A note for `down` of who is at work here, while it is."""
    from prime_jax.runtime.records import write_json_atomic
    from prime_jax.sweep import state

    state.check_root(sweep.source)
    folder = _folder(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"local-{os.uname().nodename}-{os.getpid()}.json"
    write_json_atomic(note, state.identity())
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _folder(sweep: Sweep) -> Path:
    """Notes about this machine's processes stay on it."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return home / "prime_jax" / sweep.name
