"""Which compilation runs, of how many, and how long the rest should take."""

import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from prime_jax.cli.console import Progress
from prime_jax.compile_check import aot
from prime_jax.config import MeshConfig, RunConfig

FIRST_SECONDS = 30.0  # a guess, until one has been compiled
REMEMBERED_SECONDS = 1.0  # whatever is faster was not compiled


class Compilations(aot.Progress):
    """A progress bar, on terminals; a context manager.

    Args:
        title: shown before the first compilation.
    """

    def __init__(self, title: str, out: Console | None = None):
        self._shown = Progress(out, transient=True, left=_Left(self))
        self._text, self._total, self._done = title, 1, 0
        self._took: list[float] = []
        self._began: float | None = None
        self._shape: RunConfig | None = None

    def __enter__(self) -> "Compilations":
        self._shown.__enter__()
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.__exit__()

    def _show(self) -> None:
        self._shown.show("compilations", self._text, self._total, self._done)

    def expect(self, total: int) -> None:
        self._total = total
        self._show()

    def expect_more(self) -> None:
        self.expect(self._total + 1)

    @contextmanager
    def watch(self, config: RunConfig, text: str) -> Iterator[None]:
        """Around one compilation; of the shape of the last, it is one more than was expected."""
        m = config.model
        name = f"{config.family} {m.layers}x{m.width}: {text}"
        shape = replace(config, mesh=MeshConfig())
        if shape == self._shape:
            self.expect_more()
        self._shape = shape
        self._text = name
        self._show()
        self._began = time.monotonic()
        yield
        took, self._began = time.monotonic() - self._began, None
        if took > REMEMBERED_SECONDS:
            self._took.append(took)
        self._done += 1
        self._show()

    def left(self) -> float:
        """Seconds, if the rest takes as long as those before; a late one is three quarters done."""
        each = sum(self._took) / len(self._took) if self._took else FIRST_SECONDS
        waiting = self._total - self._done
        if self._began is None:
            return each * waiting
        running = time.monotonic() - self._began
        return each * (waiting - 1) + max(each - running, running / 3)


class _Left(ProgressColumn):
    """rich's own says nothing until two of three are done."""

    def __init__(self, compilations: Compilations):
        super().__init__()
        self._compilations = compilations

    def render(self, task: Task) -> Text:
        left = datetime.timedelta(seconds=round(self._compilations.left()))
        return Text(str(left), style="progress.remaining")
