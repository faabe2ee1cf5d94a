"""Measurements of a run: a clock of exclusive phases, speed, profile, and the training log."""

import collections
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path as LocalPath
from typing import Any

from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.runtime import storage
from prime_jax.runtime.logfile import Log
from prime_jax.runtime.storage import Path
from prime_jax.settings import to_dict


class Clock:
    """Seconds per phase; time in a nested phase is not counted in the outer one."""

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


class Pace:
    """Speed between two rows of the log, from a clock's phases.

    Args:
        tokens: per step, over all devices.
        flops: per token, by convention; peak: FLOP/s of all devices together, or None.
    """

    def __init__(self, clock: Clock, tokens: int, flops: dict[str, float], peak: float | None):
        self.clock, self.tokens, self.flops, self.peak = clock, tokens, flops, peak
        self._mark: tuple[int, float, float] | None = None

    def row(self, step: int) -> dict[str, Any]:
        """Seconds per step, seconds of these spent waiting for input, tokens/s, MFU by convention,
        and peak device memory in bytes; empty for the first row."""
        now = (step, time.perf_counter(), self.clock.seconds["input"])
        before, self._mark = self._mark, now
        if before is None or step <= before[0]:
            return {}
        steps, seconds, waited = (b - a for a, b in zip(before, now, strict=True))
        speed = steps * self.tokens / seconds
        row = {
            "step_seconds": round(seconds / steps, 6),
            "input_seconds": round(waited / steps, 6),
            "tokens_per_second": round(speed, 1),
        }
        if self.peak:
            row |= {f"mfu_{name}": f * speed / self.peak for name, f in self.flops.items()}
        high = memory_high_water()
        return row | ({"memory_bytes": high} if high else {})


def memory_high_water() -> int:
    """Peak bytes in use on this process's first device so far; 0 if unknown."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


class Profile:
    """An xprof trace of some steps, started after compilation and the first steps.

    A context manager: the trace ends with the run, however that ends.
    """

    AFTER = 3  # steps

    def __init__(self, directory: Path, steps: int):
        self.directory, self.steps = directory, steps
        self._local = directory
        if steps and storage.is_remote(directory):
            self._local = LocalPath(tempfile.mkdtemp(prefix="prime_jax-"))
        self._left: int | None = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def step(self, done: int) -> None:
        """Call after each step of this process; `done`: number of steps so far."""
        import jax

        if not self.steps:
            return
        if done == self.AFTER:
            jax.profiler.start_trace(str(self._local))
            self._left = self.steps
        elif self._left is not None:
            self._left -= 1
            if self._left == 0:
                self.close()

    def close(self) -> None:
        import jax

        if self._left is not None:
            jax.profiler.stop_trace()
            self._left = None
            if self._local != self.directory:
                storage.upload(self._local, self.directory)


class MetricsLog:
    """metrics.jsonl always, TensorBoard and W&B if configured.

    These get the config too, with the run's id and, as `record`, where its directory is.

    An evaluation arrives there as `eval/ESTIMATOR` in nats per token, `eval/ESTIMATOR/se_mc` and
    `/se_data` where these are known, and the kind of each number by its name, once.

    On a resume the rows of metrics.jsonl beyond the restored step are first moved to the end of
    metrics.superseded.jsonl: their steps are done again, and where checkpoints were damaged, which
    may be all of them, nothing else tells of the first time.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        run: str,
        resumed_at: int,
        log: Callable[[str], None] = print,
    ):
        self._writers: list[Any] = []
        self._kinds: dict[str, str] = {}
        record = run_dir if storage.is_remote(run_dir) else os.path.abspath(run_dir)
        about = {**to_dict(config), "run": run, "record": str(record)}
        if config.log.tensorboard:
            self._writers.append(_TensorBoard(run_dir, about))
        if config.log.wandb:
            self._writers.append(_WandB(config.log.wandb, about, log))
        path, kept = run_dir / "metrics.jsonl", ""
        if storage.exists(path):
            rows = storage.read(path).decode(errors="replace").splitlines()
            kept = "".join(row + "\n" for row in rows if _step(row) <= resumed_at)
            over = "".join(row + "\n" for row in rows if _step(row) > resumed_at)
            if over:
                aside = run_dir / "metrics.superseded.jsonl"
                before = storage.read(aside) if storage.exists(aside) else b""
                storage.write(aside, before + over.encode())
        self._log = Log(path, kept)

    def write(self, row: dict[str, Any]) -> None:
        """`row` holds `step` and numbers, or a nested `eval` list in the form of result.json."""
        self._log.write(json.dumps(row) + "\n")
        losses = row.get("eval", ())
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)} | _flat(losses)
        kinds = self._kinds | {f"eval/{loss['estimator']}": loss["kind"] for loss in losses}
        for writer in self._writers:
            if kinds != self._kinds:
                writer.name_kinds(kinds)
            writer.write(numbers)
        self._kinds = kinds

    def flush(self) -> None:
        """Let others read what was written."""
        self._log.flush()

    def close(self) -> None:
        self._log.close()
        for writer in self._writers:
            writer.close()


class NoLog:
    """The log of processes that write no records."""

    def write(self, row: dict[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def evaluated(run_dir: Path, step: int) -> bool:
    """Whether the log of a run holds the evaluation at a step."""
    return any(row["step"] == step and "eval" in row for row in _rows(run_dir))


def rows_through(attempts: Iterable[Path], step: int, run: str) -> list[dict[str, Any]]:
    """The rows of a run's logs up to a step, in order, for the log of a run that continues there.

    Args:
        attempts: its directories, oldest first; what was done again counts as it was at last.
        run: its id, by which rows are marked that no other run has marked.
    """
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for directory in attempts:
        for row in _rows(directory):
            if row["step"] <= step:
                found[row["step"], "eval" in row] = {**row, "run": row.get("run", run)}
    return [found[key] for key in sorted(found)]


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    rows = storage.read(path).decode(errors="replace").splitlines() if storage.exists(path) else []
    return [json.loads(row) for row in rows if _step(row) < float("inf")]


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a half-written last line


def _flat(losses: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    found = {}
    for loss in losses:
        name = f"eval/{loss['estimator']}"
        known = {f"{name}/{error}": loss[error] for error in ("se_mc", "se_data")}
        found[name] = loss["value"]
        found |= {key: value for key, value in known.items() if value is not None}
    return found


class _TensorBoard:
    def __init__(self, run_dir: Path, about: Mapping[str, Any]):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError("log.tensorboard: install prime_jax[tensorboard]") from error
        self.writer = SummaryWriter(str(run_dir / "tensorboard"))
        self._text("config", about)

    def _text(self, name: str, value: Mapping[str, Any]) -> None:
        self.writer.add_text(name, f"    {json.dumps(value, indent=2)}".replace("\n", "\n    "))

    def name_kinds(self, kinds: Mapping[str, str]) -> None:
        self._text("kinds", kinds)

    def write(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()  # flushes its queue


class _WandB:
    """Weights & Biases; a service that fails takes no run with it: that is one line.

    Steps are a metric like others, and the axis of all: W&B's own count only rises, so it would
    drop what a resumed run does again.
    """

    def __init__(self, project: str, about: Mapping[str, Any], log: Callable[[str], None]):
        try:
            import wandb
        except ImportError as error:
            raise UserError("log.wandb: install prime_jax[wandb]") from error
        self._log = log
        named = {"project": project, "id": about["run"], "config": dict(about)}
        self.run = self._try(lambda: wandb.init(resume="allow", **named))
        with suppress(Exception):  # the axis; numbers arrive without it
            self.run.define_metric("*", step_metric="step")

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # no login, no network, a full quota, ...
            words = str(error).strip().splitlines() or [type(error).__name__]
            self._log(
                f"W&B: {words[0].rstrip('.')}; the run goes on without it (WANDB_MODE=offline keeps it)"
            )
            self.run = None
            return None

    def name_kinds(self, kinds: Mapping[str, str]) -> None:
        with suppress(Exception):  # a word beside the numbers, which arrive without it
            self.run.config.update({"kinds": kinds}, allow_val_change=True)

    def write(self, row: Mapping[str, float]) -> None:
        if self.run:
            self._try(lambda: self.run.log(dict(row)))

    def close(self) -> None:
        if self.run:
            self._try(self.run.finish)
