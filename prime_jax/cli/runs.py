"""RUN, wherever a command takes one: a run directory, an exported folder, or ROOT:ID of a sweep."""

import shlex
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from prime_jax.cli.console import console, say
from prime_jax.errors import UserError
from prime_jax.runtime import storage

if TYPE_CHECKING:
    from prime_jax.evaluate.trained import Trained
    from prime_jax.interchange.folder import Weights
    from prime_jax.sweep.state import Run

T = TypeVar("T")

SILENT, PATIENCE = 3.0, 60.0  # seconds: until it is said what is waited for; until it is given up
RUN = "run directory, ROOT:ID or exported folder"


def attempts(run: str) -> list[storage.Path]:
    """The directories that RUN names, newest first.

    Raises:
        UserError: ROOT is no sweep, or none or several of its runs begin with ID.
    """
    directory = storage.path(run)
    root, _, name = run.rpartition(":")
    if not root or "/" in name or storage.exists(directory):
        return [directory]
    from prime_jax.sweep import state

    place, listed = sweep(root)
    (found,) = state.select(place, listed, [name])
    if not found.attempts:
        raise UserError(f"{run}: has not been started yet; prime-jax sweep run {shlex.quote(root)}")
    runs = place / "runs" / found.id
    return [runs / str(attempt.k) for attempt in reversed(found.attempts)]


def sweep(root: str) -> "tuple[storage.Path, list[Run]]":
    """The place of a sweep and its runs; what one waits for is said.

    Raises:
        UserError: ROOT is no sweep, or its bucket cannot be reached.
    """
    from prime_jax.sweep import state

    def read() -> "tuple[storage.Path, list[Run]]":
        place = storage.path(root)
        state.check_root(place)
        return place, state.list_runs(place)

    return answered(root, read) if "://" in root else read()


def answered(
    name: str, action: Callable[[], T], patience: float = PATIENCE, silent: float = SILENT
) -> T:
    """What `action` returns or raises; it asks a store that may not answer.

    Raises:
        Unreachable: it has not answered after `patience` seconds.
    """
    out: list[Any] = []

    def act() -> None:
        try:
            out.append((action(), None))
        except BaseException as error:
            out.append((None, error))

    asking = threading.Thread(target=act, daemon=True)
    asking.start()
    asking.join(silent)
    if not out:
        say(f"waiting for {name}, at most {patience:.0f} s", console(stderr=True))
        asking.join(patience - silent)
    if not out:
        raise storage.Unreachable(f"{name}: no answer for {patience:.0f} s; is the network there?")
    found, error = out[0]
    if error:
        raise error
    return found


def load(run: str, log: Callable[[str], None] = print) -> "Trained":
    """The finished run that RUN names (`trained.load`)."""
    from prime_jax.evaluate import trained

    return trained.load(*attempts(run), log=log)


def weights(run: str, log: Callable[[str], None] = print) -> "Weights":
    """The weights of the finished run that RUN names, in this process's memory.

    Raises:
        UserError: as `load`; or several processes, of which none holds all weights of a run.
    """
    import jax

    from prime_jax.evaluate import trained
    from prime_jax.interchange import folder

    directory, *_ = attempts(run)
    if folder.is_exported(directory):
        return folder.read(directory)
    if jax.process_count() > 1:
        raise UserError(f"{run}: several processes start from an exported folder: prime-jax export")
    return trained.weights(load(run, log))
