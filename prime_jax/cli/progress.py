"""A progress bar for one run, on a terminal; plain lines elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunProgress:
    """Shows what `train` tells through `heartbeat` and `log`; a context manager."""

    def __init__(self) -> None:
        console = Console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def log(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False)

    def heartbeat(self, now: dict[str, Any]) -> bool:
        mfu = "" if now["mfu"] is None else f" MFU {now['mfu']:.2f}"
        text = (
            f"{now['phase']} loss {now['loss']:.4f} {now['tokens_per_second']:,.0f} tokens/s{mfu}"
        )
        self._bar.update(self._task, description=text, completed=now["step"], total=now["steps"])
        return True
