"""What a run measures of itself: a clock of exclusive phases, and the training log."""

import collections
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prime_jax.config import LogConfig
from prime_jax.errors import UserError


class Clock:
    """Seconds per phase; a phase inside another one is not counted in the outer one."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._inside = [0.0]

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[phase] += elapsed - self._inside.pop()
            self._inside[-1] += elapsed

    def total(self) -> float:
        return time.perf_counter() - self.started


class MetricsLog:
    """metrics.jsonl always, TensorBoard and W&B when asked.

    On a resume the rows of metrics.jsonl beyond the restored step are dropped first.
    """

    def __init__(self, config: LogConfig, run_dir: Path, run: str, resumed_at: int):
        self._writers = []
        if config.tensorboard:
            self._writers.append(_TensorBoard(run_dir))
        if config.wandb:
            self._writers.append(_WandB(config.wandb, run))
        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            rows = [
                line for line in self.path.read_text().splitlines() if _step(line) <= resumed_at
            ]
            self.path.write_text("".join(line + "\n" for line in rows))
        self._stream = self.path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """`row` holds `step` and numbers, or a nested `eval` list in the form of result.json."""
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        for writer in self._writers:
            writer.write(numbers)

    def close(self) -> None:
        self._stream.close()
        for writer in self._writers:
            writer.close()


class NoLog:
    """What the processes beside the writer have for a log."""

    def write(self, row: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a half-written last line


class _TensorBoard:
    def __init__(self, run_dir: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError("log.tensorboard: install prime_jax[tensorboard]") from error
        self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()  # rows still in its queue are written now


class _WandB:
    def __init__(self, project: str, run: str):
        try:
            import wandb
        except ImportError as error:
            raise UserError("log.wandb: install prime_jax[wandb]") from error
        self.run = wandb.init(project=project, id=run, resume="allow")

    def write(self, row: dict[str, float]) -> None:
        self.run.log(row, step=row["step"])

    def close(self) -> None:
        self.run.finish()
