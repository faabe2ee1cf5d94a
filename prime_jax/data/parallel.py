"""Run independent tasks in worker processes that end with their parent and import no JAX."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from prime_jax.errors import UserError

Task, Result = TypeVar("Task"), TypeVar("Result")


def run(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Results in the order of completion; tasks are taken from the iterable as workers become free.

    Raises:
        UserError: from a task, or because a worker died.
    """
    tasks = iter(tasks)
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    running: set[Future[Result]] = set()
    try:
        while True:
            free = 2 * workers - len(running)
            running |= {pool.submit(function, task) for task in islice(tasks, free)}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died (out of memory?); run the same command again to continue, "
            "with fewer --workers"
        ) from error
    finally:
        stop = list(pool._processes.values()) if running else []
        pool.shutdown(wait=not stop, cancel_futures=True)
        for process in stop:
            process.terminate()


def _follow_parent() -> None:
    """Ignore Ctrl-C, which the parent handles, and exit when the parent has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
