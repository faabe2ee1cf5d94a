"""Scoring windows of tokens with a finished run: padded, batched, sharded, resumable.

A window is a contiguous part of a text: the tokens from `start` on are scored, those before are
context. Windows are padded to a few lengths, with padding masked; the result of a window depends on
itself, its replicate and its keys, not on its batch, so the work can be interrupted and resumed.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from prime_jax.config import MeshConfig
from prime_jax.errors import UserError
from prime_jax.evaluate import draws, exact, likelihood
from prime_jax.evaluate.likelihood import Row
from prime_jax.evaluate.partial import Batch, Partial
from prime_jax.evaluate.trained import Trained
from prime_jax.runtime import meshes
from prime_jax.runtime.metrics import Clock
from prime_jax.runtime.sharding import Shardings
from prime_jax.step import Parts

SHORTEST = 32  # the shortest length that windows are padded to


class Windows(NamedTuple):
    """Parts of texts.

    Attributes:
        tokens: int32 arrays, each no longer than the model's length.
        start: int32 [W], where scoring starts in each.
    """

    tokens: list[np.ndarray]
    start: np.ndarray

    @property
    def hash(self) -> str:
        """Twelve hex digits of the tokens and of the scored ranges."""
        digest = hashlib.sha256(self.start.astype("<i4").tobytes())
        for tokens in self.tokens:
            digest.update(len(tokens).to_bytes(4, "little") + tokens.astype("<i4").tobytes())
        return digest.hexdigest()[:12]


def cut(length: int, size: int, stride: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(begin, start, stop) of the windows of a text: each token is scored in exactly one.

    A window scores `stride` tokens (the last one the rest) after at most `context` context tokens.

    Args:
        length: of the text; size: of the model.
    Raises:
        UserError: a window would be longer than the model.
    """
    if stride < 1 or context < 0 or stride + context > size:
        raise UserError(
            f"stride {stride} + context {context}: a window must score at least one token and "
            f"hold at most {size}, the length that the run was trained at"
        )
    for start in range(0, length, stride):
        yield max(0, start - context), start, min(start + stride, length)


def padded_to(length: int, longest: int, block: int = 1) -> int:
    """The length that a window is padded to: the model's, halved while whole blocks still fit."""
    while longest % (2 * block) == 0 and longest // 2 >= max(length, SHORTEST):
        longest //= 2
    return longest


class Scorer:
    """Draws of any estimator for windows of tokens, over some devices.

    Args:
        devices: number of devices; 0: all.
        batch_size: windows of full length per call, more of shorter ones; 0: that of the run's
            config. Rounded up to the devices.
        guidance: scale of classifier-free guidance by the context (diffusion runs only).
    """

    def __init__(
        self, run: Trained, *, devices: int = 0, batch_size: int = 0, guidance: float = 0.0
    ):
        if guidance and run.config.family == "arm":
            raise UserError(
                f"{run.path}: guidance (cfg) needs a diffusion run, this run is of family arm"
            )
        available = jax.devices()
        if not 0 <= devices <= len(available):
            raise UserError(f"--devices {devices}: this machine has {len(available)}")
        count = devices or len(available)
        self.run, self.guidance, self.clock = run, guidance, Clock()
        config = dataclasses.replace(run.config, batch_size=count, mesh=MeshConfig(model=1))
        self.mesh, _ = meshes.make(config, available[:count])
        self.config = config
        self.batch_size = -(-(batch_size or config.eval.batch_size) // count) * count
        self.shardings = Shardings.of(self.mesh)
        self.specs = self.shardings.specs(run.params)
        place = lambda x, spec: jax.device_put(x, NamedSharding(self.mesh, spec))  # noqa: E731
        self.params = jax.tree.map(place, run.params, self.specs)
        self._draws: dict[tuple[int, bool, int], Any] = {}

    @property
    def length(self) -> int:
        """Maximum tokens of a window."""
        return self.config.data.seq_len

    def _batch(self, length: int, rows: int) -> int:
        """Windows of a padded length per call: at most a full batch of tokens, and at most twice as
        many as there are."""
        devices, limit = self.mesh.size, self.batch_size * (self.length // length)
        return min(limit, devices * (1 << (-(-rows // devices) - 1).bit_length()))

    def _draw(self, length: int, whole: bool, batch: int) -> Any:
        """The compiled estimators for `batch` windows of this padded length.

        Args:
            whole: all positions are scored and there is no padding.
        """
        if (length, whole, batch) not in self._draws:
            data = dataclasses.replace(self.config.data, seq_len=length)
            parts = Parts(
                config=dataclasses.replace(self.config, data=data),
                codebook=self.run.codebook,
                mesh=self.mesh,
                shardings=self.shardings,
                specs=self.specs,
                eos_id=self.run.eos_id,
            )
            self._draws[length, whole, batch] = draws.make(parts, self.guidance)
        return self._draws[length, whole, batch]

    def draws(
        self,
        name: str,
        windows: Windows,
        rows: Row,
        window: np.ndarray,
        partial: Partial | None = None,
        tick: Callable[[float], None] = lambda rows: None,
        log: Callable[[str], None] = lambda line: None,
    ) -> dict[str, np.ndarray]:
        """One draw for every row: {label: nats float64 [rows]}.

        Args:
            rows: keys and noise levels; `window` [rows]: the window that each one scores.
            partial: stores draws until all are done.
            tick: called with the number of newly done rows, of which one may be done in parts.
            log: receives a line that says what a long evaluation will take.
        """
        partial = partial or Partial(None, {}, len(window))
        lengths = np.array([len(tokens) for tokens in windows.tokens], np.int32)
        block = self.config.objective.block_length or 1
        sizes = np.array([padded_to(n, self.length, block) for n in lengths])
        wholes = (windows.start == 0) & (lengths == sizes)
        todo = partial.remaining()
        tick(len(window) - len(todo))
        work = []  # (padded length, size of the batch, rows)
        for size, whole in sorted(set(zip(sizes.tolist(), wholes.tolist(), strict=True))):
            group = ((sizes == size) & (wholes == whole))[window]
            batch = self._batch(size, int(group.sum()))
            work += [(size, batch, index) for index in likelihood.spans(todo[group[todo]], batch)]
        cost = exact.Cost(name, len(work), log)

        def batches() -> Iterator[Batch]:
            for size, batch, index in work:
                parts = _Parts(len(index), cost, tick)
                full = np.resize(index, batch)  # the last batch is padded by repetition
                values = self._run(name, windows, rows.take(full), window[full], size, parts)
                yield index, values, parts.finish

        partial.fill(batches(), exact.ahead(name))
        return partial.nats

    def _run(
        self,
        name: str,
        windows: Windows,
        row: Row,
        window: np.ndarray,
        size: int,
        watch: exact.Watch,
    ) -> Any:
        tokens = np.zeros((len(window), size), np.int32)
        for i, w in enumerate(window):
            tokens[i, : len(windows.tokens[w])] = windows.tokens[w]
        start = windows.start[window].astype(np.int32)
        stop = np.array([len(windows.tokens[w]) for w in window], np.int32)
        whole = not start.any() and bool((stop == size).all())
        if not whole:
            count = np.full(len(window), (stop - start).max(), np.int32)
            row = row._replace(start=start, stop=stop, max_targets=count)
        draw = self._draw(size, whole, len(window))
        return draw(self.clock, name, self.params, tokens, row, watch)


class _Parts:
    """Tells of a batch in parts, while the network calls of its draws are made."""

    def __init__(self, rows: int, cost: exact.Cost, tick: Callable[[float], None]):
        self.rows, self.cost, self.tick, self.reported = rows, cost, tick, 0.0

    def __call__(self, done: int, calls: int) -> None:
        self.cost(done, calls)
        part = self.rows * (1024 * (done - 1) // calls) / 1024  # such parts add up exactly
        self.tick(part - self.reported)
        self.reported = part

    def finish(self) -> None:
        self.tick(self.rows - self.reported)


def replicated(windows: int, replicates: int) -> tuple[Row, np.ndarray]:
    """Rows of an evaluation set, stratified as in training, and the window of each."""
    rows = likelihood.grid(windows, replicates)
    return rows, rows.example
