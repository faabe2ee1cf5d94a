"""RUN, wherever a command takes one: a run directory, an exported folder, or ROOT:ID of a sweep."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from prime_jax.errors import UserError
from prime_jax.runtime import storage

if TYPE_CHECKING:
    from prime_jax.evaluate.trained import Trained
    from prime_jax.interchange.folder import Weights

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

    state.check_root(storage.path(root))
    (found,) = state.select(state.list_runs(storage.path(root)), [name])
    if not found.attempts:
        raise UserError(f"{run}: has not been started yet; prime-jax sweep run {root}")
    runs = storage.path(root) / "runs" / found.id
    return [runs / str(attempt.k) for attempt in reversed(found.attempts)]


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
