"""The sampler: canvases, batches, devices.

A canvas is one example: digits, some of them masked. Canvases are padded to a few lengths and
grouped by them, so that an example has the same shapes and random numbers in any batch.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.hardware import chips
from prime_jax.kernels.subtoken_head_base import Head
from prime_jax.objectives import Network
from prime_jax.runtime import sharding
from prime_jax.sample import autoregressive, block_diffusion, loop
from prime_jax.sample.filters import Filters
from prime_jax.sample.options import Options, validate
from prime_jax.sample.orders import NEVER, Plan, idle_fraction, plan
from prime_jax.sample.predict import Model
from prime_jax.subtokens import Codebook

LENGTH_UNIT = 32  # canvases are padded to multiples, up to the context
PLAN_STREAM = 0x5A  # separates a plan's random numbers from other uses of (seed, example)
Watch = Callable[[np.ndarray, int], None]  # digits [B, L, S] and the number of calls so far


class TrainedRun(Protocol):
    """The interface of `trained.Trained` that a sampler needs."""

    config: RunConfig
    params: Any

    @property
    def codebook(self) -> Codebook: ...

    @property
    def network(self) -> Callable[[Any], Network]: ...


class Samples(NamedTuple):
    """Samples and their cost.

    Attributes:
        tokens: int [n] of each example.
        calls: network calls of each batch.
        idle: fraction of each example's steps that reveal nothing (and are skipped).
    """

    tokens: list[np.ndarray]
    calls: list[int]
    idle: list[float]


class Sampler:
    """Samples from a model; compiles once per shape (batch size, padded length).

    Args:
        devices: over which a batch is sharded (each holds all parameters); all by default.
    """

    def __init__(self, run: TrainedRun, devices: Sequence[Any] | None = None):
        chips.keep_heap()
        self.config, self.codebook = run.config, run.codebook
        self.devices = list(devices or jax.devices())
        self.model = Model(run.network, Head(run.codebook))
        self.compiled: dict[Any, Any] = {}
        self._params = run.params
        self._placed: dict[int, Any] = {}  # by number of devices

    @property
    def context(self) -> int:
        return self.config.data.seq_len

    def canvas(self, prompt: Sequence[int], gen_length: int = 0) -> np.ndarray:
        """Digits int32 [L, S] of a prompt and `gen_length` masked tokens (0: up to the context).

        Raises:
            UserError: they do not fit the context, or a token outside the vocabulary.
        """
        book = self.codebook
        given = book.encode(np.array(prompt, np.int64)).reshape(-1, book.length)
        total = len(given) + gen_length if gen_length else self.context
        if total > self.context or len(given) >= total:
            wanted = f"{gen_length} more" if gen_length else "at least one more"
            raise UserError(
                f"a prompt of {len(given)} tokens and {wanted} do not fit the model's context of "
                f"{self.context} tokens"
            )
        hidden = np.full((total - len(given), book.length), book.base, np.int32)
        return np.concatenate([given, hidden])

    def sample(
        self,
        canvases: Sequence[np.ndarray],
        options: Options,
        watch: Watch | None = None,
        first: int = 0,
    ) -> Samples:
        """Fill every canvas; the result depends on the seed and its number, not on the others.

        Args:
            canvases: digits int32 [L_i, S]; the digit `base` means masked.
            first: number of the first example.
            watch: called after every network call of a batch; not for autoregressive models.
        Raises:
            UserError: options that cannot be combined, a canvas longer than the context, or visible
                sub-tokens that no token has.
        """
        validate(options, self.config.family)
        options = block_diffusion.options_of(self.config, options)
        for canvas in canvases:
            self._check(canvas)
        lengths = [len(canvas) for canvas in canvases]
        canvases = [block_diffusion.whole_blocks(self.config, c, self._base) for c in canvases]
        fill = self._continue if self.config.family == "arm" else self._fill
        done: list[np.ndarray] = [np.empty(0)] * len(canvases)
        calls, idle = [], [0.0] * len(canvases)
        for length, members in self._groups(canvases).items():
            size = min(options.batch_size, 1 << (len(members) - 1).bit_length())
            for start in range(0, len(members), size):
                indices = members[start : start + size]
                numbers = [first + i for i in indices]
                rows, count, fractions = fill(
                    [canvases[i] for i in indices], numbers, length, size, options, watch
                )
                calls.append(count)
                for i, tokens, fraction in zip(indices, rows, fractions, strict=True):
                    canvas = canvases[i][: lengths[i]]
                    done[i] = self._cut(tokens[: lengths[i]], canvas, options.stop)
                    idle[i] = fraction
        return Samples(done, calls, idle)

    def _cut(self, tokens: np.ndarray, canvas: np.ndarray, stop: int) -> np.ndarray:
        """Cut after the first sampled stop token."""
        drawn = (canvas == self._base).any(axis=1)
        ends = np.flatnonzero(drawn & (tokens == stop))
        return tokens[: ends[0] + 1] if len(ends) and stop >= 0 else tokens

    @property
    def _base(self) -> int:
        return self.codebook.base

    @property
    def _block(self) -> int:
        return self.config.objective.block_length

    def _check(self, canvas: np.ndarray) -> None:
        if len(canvas) > self.context:
            raise UserError(
                f"a text of {len(canvas)} tokens is longer than the model's context of "
                f"{self.context} tokens"
            )
        masked = canvas == self._base
        for position in np.flatnonzero(masked.any(axis=1) & ~masked.all(axis=1)):
            shown = ~masked[position]
            if not (self.codebook.digits[:, shown] == canvas[position, shown]).all(axis=1).any():
                raise UserError(f"token {position}: no token has the given sub-tokens")

    def _groups(self, canvases: Sequence[np.ndarray]) -> dict[int, list[int]]:
        """Indices of the canvases by padded length."""
        groups: dict[int, list[int]] = {}
        unit = math.lcm(LENGTH_UNIT, self._block or 1)
        for i, canvas in enumerate(canvases):
            length = min(-(-len(canvas) // unit) * unit, self.context)
            groups.setdefault(length, []).append(i)
        return groups

    # --- masked diffusion

    def _fill(self, canvases, numbers, length: int, size: int, options: Options, watch) -> tuple:
        slots = self.codebook.length
        digits = np.zeros((size, length, slots), np.int32)
        when = np.full((size, length, slots), NEVER, np.int32)
        block, steps = np.zeros((size, length), np.int32), np.zeros(size, np.int32)
        idle = []
        segment = np.full((size, length), -1, np.int32)
        for row, (canvas, number) in enumerate(zip(canvases, numbers, strict=True)):
            rng = np.random.default_rng([options.seed, number, PLAN_STREAM])
            own = plan(options, canvas == self._base, rng, fixed_blocks=self._block > 0)
            n = len(canvas)
            digits[row, :n], segment[row, :n] = canvas, 0
            when[row, :n], block[row, :n], steps[row] = own
            idle.append(idle_fraction(own))
        batch = loop.Batch(Plan(when, block, steps), segment, _filled_up(numbers, size))
        rule, settings = loop.rule_of(options), loop.settings_of(options)
        mesh, params = self._place(size)
        batch, digits = sharding.shard(mesh, (batch, digits))
        run = self._loop(rule, mesh)
        first, last = 0, 1 if watch else int(NEVER)
        while True:
            digits, count = run(params, batch, settings, digits, np.int32(first), np.int32(last))
            calls = int(np.max(count))
            if watch is None or calls == first:
                break
            first, last = calls, calls + 1
            watch(np.asarray(digits)[: len(canvases)], calls)
        tokens = self.codebook.decode(np.asarray(digits)[: len(canvases)])
        full = [tokens[row, : len(canvas)] for row, canvas in enumerate(canvases)]
        return full, calls, idle

    def _loop(self, rule: loop.Rule, mesh: Mesh) -> Any:
        run = partial(loop.run, self.model, rule)
        if self._block:
            run = partial(block_diffusion.run, self.model, self.config, rule)

        whole = sharding.REPLICATED
        specs = (whole, sharding.BATCH, whole, sharding.BATCH, whole, whole)
        return self._jit((rule, mesh), mesh, run, specs, (sharding.BATCH,) * 2)

    # --- autoregression

    def _continue(self, canvases, numbers, length, size, options: Options, watch) -> tuple:
        book = self.codebook
        token = np.zeros((size, length), np.int32)
        start, stop = np.zeros(size, np.int32), np.zeros(size, np.int32)
        for row, canvas in enumerate(canvases):
            hidden = (canvas == self._base).any(axis=1)
            start[row], stop[row] = np.argmax(hidden) if hidden.any() else len(canvas), len(canvas)
            if not hidden[start[row] :].all():
                raise UserError(
                    "an autoregressive model can only continue a text; infilling needs a model of "
                    "family mdm or prime"
                )
            token[row, : start[row]] = book.decode(canvas[: start[row]])
        mesh, params = self._place(size)
        prompts = autoregressive.Prompts(token, start, stop, _filled_up(numbers, size))
        filters = Filters(
            np.float32(options.temperature), np.int32(options.top_k), np.float32(options.top_p)
        )
        settings = autoregressive.Settings(filters, np.uint32(options.seed), np.int32(options.stop))
        run = self._decode(mesh)
        token, count = run(params, sharding.shard(mesh, prompts), settings)
        token = np.asarray(token)
        full = [token[row, : len(canvas)] for row, canvas in enumerate(canvases)]
        return full, int(np.max(count)), [0.0] * len(full)

    def _decode(self, mesh: Mesh) -> Any:
        decode = partial(autoregressive.decode, self.model)

        def per_device(params, prompts, settings):
            return decode(params, self.config.model, prompts, settings)

        specs = (sharding.REPLICATED, sharding.BATCH, sharding.REPLICATED)
        return self._jit(("decode", mesh), mesh, per_device, specs, (sharding.BATCH,) * 2)

    # --- devices

    def _place(self, size: int) -> tuple[Mesh, Any]:
        """A mesh of as many devices as divide a batch of that size, and replicated parameters."""
        count = max(n for n in range(1, len(self.devices) + 1) if size % n == 0)
        if count not in self._placed:
            grid = np.array(self.devices[:count]).reshape(1, count, 1)
            mesh = Mesh(grid, sharding.AXES, axis_types=(AxisType.Explicit,) * 3)
            place = NamedSharding(mesh, sharding.REPLICATED)
            self._placed[count] = mesh, jax.device_put(self._params, place)
        return self._placed[count]

    def _jit(self, key: Any, mesh: Mesh, function: Callable, in_specs, out_specs) -> Any:
        if key not in self.compiled:
            mapped = sharding.per_device(function, mesh, in_specs, out_specs)
            options = chips.compiler_options(self.devices[0].platform)
            self.compiled[key] = jax.jit(mapped, compiler_options=options)
        return self.compiled[key]


def _filled_up(numbers: Sequence[int], size: int) -> np.ndarray:
    return np.array([*numbers, *[0] * (size - len(numbers))], np.uint32)


@lru_cache(maxsize=2)
def sampler(run: TrainedRun) -> Sampler:
    """The sampler of a run, cached with its compiled functions."""
    return Sampler(run)


def generate(
    run: TrainedRun, prompts: Sequence[Sequence[int]], options: Options
) -> list[list[int]]:
    """Generate a continuation of each prompt (token ids, without the prompt).

    Prompts may be empty and differ in length. `options.stop` ends a text and is included in it.

    Raises:
        UserError: a prompt that is too long, or options that cannot be combined.
    """
    made = sampler(run)
    canvases = [made.canvas(prompt, options.gen_length) for prompt in prompts]
    samples = made.sample(canvases, options).tokens
    return [tokens[len(p) :].tolist() for p, tokens in zip(prompts, samples, strict=True)]
