"""Workers and their sweep on the terminal: bars, and a table that renews itself."""

import functools
import time
from collections.abc import Sequence
from typing import Any

from prime_jax.cli.console import Progress, console, picture, say
from prime_jax.hardware.prices import Prices
from prime_jax.runtime import storage
from prime_jax.sweep import status
from prime_jax.sweep.state import Run
from prime_jax.sweep.status import WorkerProgress


class WorkerBars(WorkerProgress):
    """A bar for the sweep and one for the run that is being trained."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self.log = progress.log  # type: ignore[method-assign]

    def sweep(self, runs: Sequence[Run]) -> None:
        done = sum(run.state == "done" for run in runs)
        self._progress.show("sweep", status.summary(runs), len(runs), done)

    def run(self, run: Run, heartbeat: dict[str, Any]) -> None:
        steps = run.spec["config"]["steps"]
        self._progress.show("run", status.line(run, heartbeat), steps, heartbeat.get("step", 0))


def watch(root: storage.Path, prices: Prices | None) -> None:
    """Show the sweep until no run is open or running."""
    reported, out = set(), console()
    log = functools.partial(say, out=out)
    with picture(out) as renew:
        for runs in status.follow(root, log):
            for run in runs:
                if run.state == "failed" and (run.id, run.k) not in reported:
                    reported.add((run.id, run.k))
                    log(f"{status.line(run)}\n{status.failure(run)}", style="red")
            now = f"{time.strftime('%H:%M:%S')}  {status.summary(runs, prices)}"
            renew(status.table(runs), now)
