"""The adapter to EleutherAI's lm-evaluation-harness (0.4.13, without torch): `prime_jax`.

`prime-jax eval RUN --tasks ...` makes the model and calls the harness; the harness's own command
makes that of `cli/harness.py`. Requests are scored in batches across tasks and documents. The result
of a request depends only on its own tokens and the settings.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from lm_eval.api.model import LM

from prime_jax.errors import UserError
from prime_jax.evaluate import likelihood, trained
from prime_jax.evaluate.likelihood import Row
from prime_jax.evaluate.score import Scorer, Windows, cut, replicated
from prime_jax.settings import Checked, allowed, from_dict, hints, nearest, read, setting

Tick = Callable[[str, int, int], None]
NAMES = {"mc": "subtoken", "chain_rule": "chain:l2r"}  # names of other adapters


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """One preset for all tasks, under the names that users of diffusion models know."""

    nll_type: str = setting(
        "subtoken",
        "estimator of a continuation's likelihood; `mc` is subtoken, `chain_rule` is chain:l2r; "
        "an autoregressive run always uses ar",
    )
    mc_num: int = setting(
        128,
        "draws per request, stratified over noise levels (exact estimators need one)",
        at_least=1,
    )
    cfg: float = setting(0.0, "scale of classifier-free guidance by the context", at_least=0)
    gen_length: int = setting(
        0, "tokens to generate; 0: half of the model's length, at most 256", at_least=0
    )
    steps: int = setting(0, "network calls of a generation; 0: one per token", at_least=0)
    block_length: int = setting(
        32, "tokens per block of a generation, blocks left to right", at_least=1
    )
    replicates: int = setting(
        8, "replicates of rolling likelihoods, as of `prime-jax eval`", at_least=1
    )
    stride: int = setting(0, "stride of rolling likelihoods", at_least=0)
    context: int = setting(0, "context of rolling likelihoods", at_least=0)

    @property
    def estimator(self) -> str:
        name = NAMES.get(self.nll_type, self.nll_type)
        likelihood.estimator(name)
        return name

    @classmethod
    def parse(cls, text: str) -> "Settings":
        """Settings from `name=value,...`.

        Raises:
            UserError: an unknown name or a value of the wrong type.
        """
        values = {}
        for item in filter(None, text.split(",")):
            name, _, value = item.partition("=")
            try:
                values[name] = read(hints(cls)[name], [value])
            except KeyError:
                hint = nearest(name, hints(cls))
                raise UserError(f"--model-args {name}: no such setting{hint}") from None
            except ValueError:
                right = allowed(cls, name)
                raise UserError(f"--model-args {item}: {name} must be {right}") from None
        made = cls(**values)
        likelihood.estimator(made.estimator)
        return made


class PrimeJax(LM):
    """A finished run as a model of the harness.

    Args:
        run: a run directory or an exported folder, if no scorer is given.
        scorer: an already loaded run; must have the guidance of the settings.
        batch_size: as of `Scorer`; `auto`: that of the run's config.
        max_batch_size, device: the harness hands them over; JAX knows its devices.
        settings: fields of `Settings`.

    Raises:
        UserError: no run, or one that cannot be loaded; a setting that is unknown or wrong.
    """

    def __init__(
        self,
        run: str = "",
        scorer: Scorer | None = None,
        tick: Tick = lambda what, total, done: None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ):
        super().__init__()
        self.settings = from_dict(Settings, settings, "--model_args")
        estimator = self.settings.estimator
        if scorer is None:
            if not run:
                raise UserError("--model_args: names no run; give run=RUN, a folder")
            size = 0 if batch_size == "auto" else int(batch_size or 0)
            scorer = Scorer(self.load(run), batch_size=size, guidance=self.settings.cfg)
        self.scorer, self.run, self.tick = scorer, scorer.run, tick
        self.contexts_cut = 0  # requests whose context did not fit
        arm = self.run.config.family == "arm"
        self.estimator = "ar" if arm else estimator

    def load(self, run: str) -> trained.Trained:
        """The run in a directory."""
        return trained.load(run)

    @property
    def tokenizer_name(self) -> str:
        return self.run.tokenizer.hash

    def encode(self, text: str) -> list[int]:
        return self.run.tokenizer.encode(text).tolist()

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; spaces between them belong to the continuation."""
        stripped = context.rstrip(" ")
        continuation = context[len(stripped) :] + continuation
        before, whole = self.encode(stripped), self.encode(stripped + continuation)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, self.encode(continuation)  # a token would span the boundary

    # --- likelihood of continuations

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        pairs = [self.pair(*request.args) for request in requests]
        windows, owner = self._windows(pairs)
        nats = self._scored(windows, self.estimator, "loglikelihood")
        total = np.zeros(len(requests))
        np.add.at(total, owner, nats)
        greedy = np.zeros(len(requests), bool)
        alone = _single_requests(requests)
        if alone.any():  # multiple-choice requests need no decoding
            mine = np.flatnonzero(alone[owner])
            some = Windows([windows.tokens[i] for i in mine], windows.start[mine])
            right = self._scored(some, "greedy", "greedy decoding")
            greedy = alone & (np.bincount(owner[mine], right < 1, len(requests)) == 0)
        out = [(-float(n), bool(g)) for n, g in zip(total, greedy, strict=True)]
        for request, value in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, value)
        return out

    def _windows(self, pairs: list[tuple[list[int], list[int]]]) -> tuple[Windows, np.ndarray]:
        """Windows of all requests, with as much context as fits, and the request of each window."""
        size = self.scorer.length
        tokens, starts, owner = [], [], []
        for i, (before, after) in enumerate(pairs):
            whole, fits = before + after, len(before) + len(after) <= size
            self.contexts_cut += not fits
            stride = len(after) if len(after) <= size else size // 2
            for start in range(len(before), len(whole), max(stride, 1)):
                stop = min(start + stride, len(whole))
                begin = max(0, stop - size)
                tokens.append(np.array(whole[begin:stop], np.int32))
                starts.append(start - begin)
                owner.append(i)
        return Windows(tokens, np.array(starts, np.int32)), np.array(owner, np.int64)

    def _scored(self, windows: Windows, name: str, what: str) -> np.ndarray:
        """Mean draw of each window, nats [W]; keys and strata depend on its tokens only."""
        count = len(windows.tokens)
        if not count:
            return np.zeros(0)
        draws = 1 if name == "greedy" else likelihood.passes(name, self.settings.mc_num)
        key_W = np.array(
            [
                zlib.crc32(t.astype("<i4").tobytes(), int(s)) & 0x7FFFFFFF
                for t, s in zip(windows.tokens, windows.start, strict=True)
            ],
            np.int64,
        )
        window = np.repeat(np.arange(count), draws)
        replicate = np.tile(np.arange(draws, dtype=np.int32), count)
        offset = key_W[window] % 9973 / 9973
        uniform = ((replicate + offset) / draws % 1.0).astype(np.float32)
        rows = Row(replicate, key_W[window].astype(np.int32), uniform)
        total = len(window)
        values = self.scorer.draws(
            name, windows, rows, window, tick=lambda done: self.tick(what, total, done)
        )
        return values[name].reshape(count, draws).mean(axis=1)

    # --- likelihood of whole texts

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Each text separately, with the windows and draws of `prime-jax eval --data text:...`."""
        s, size = self.settings, self.scorer.length
        stride = s.stride or size - s.context
        tokens, starts, owner = [], [], []
        for i, request in enumerate(requests):
            ids = self.encode(request.args[0])
            for begin, start, stop in cut(len(ids), size, stride, s.context):
                tokens.append(np.array(ids[begin:stop], np.int32))
                starts.append(start - begin)
                owner.append(i)
        total = np.zeros(len(requests))
        if tokens:
            draws = likelihood.passes(self.estimator, s.replicates)
            rows, window = replicated(len(tokens), draws)
            windows = Windows(tokens, np.array(starts, np.int32))
            values = self.scorer.draws(
                self.estimator,
                windows,
                rows,
                window,
                tick=lambda done: self.tick("rolling likelihood", len(window), done),
            )
            np.add.at(total, owner, values[self.estimator].reshape(draws, -1).mean(axis=0))
        out = (-total).tolist()
        for request, value in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return out

    # --- generation

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Text after each context, cut before the first stop sequence."""
        texts: list[str] = [""] * len(requests)
        groups: dict[tuple[int, float], list[int]] = {}
        for i, request in enumerate(requests):
            kwargs = request.args[1]
            length = min(self.gen_length, int(kwargs.get("max_gen_toks") or self.gen_length))
            temperature = (
                float(kwargs.get("temperature") or 0.0) if kwargs.get("do_sample") else 0.0
            )
            groups.setdefault((length, temperature), []).append(i)
        for (length, temperature), members in groups.items():
            prompts = [self._prompt(requests[i].args[0], length) for i in members]
            for i, tokens in zip(
                members, self._generate(prompts, length, temperature), strict=True
            ):
                texts[i] = self._cut(tokens, requests[i].args[1].get("until") or [])
            self.tick("generate", len(requests), len(members))
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    @property
    def gen_length(self) -> int:
        size = self.scorer.length
        if self.settings.gen_length >= size:
            raise UserError(
                f"gen_length = {self.settings.gen_length}: the model's length is {size}, and a "
                "prompt must fit before it"
            )
        return self.settings.gen_length or min(256, size // 2)

    def _prompt(self, context: str, length: int) -> list[int]:
        tokens, room = self.encode(context), self.scorer.length - length
        self.contexts_cut += len(tokens) > room
        return tokens[-room:]

    def _generate(
        self, prompts: list[list[int]], length: int, temperature: float
    ) -> list[list[int]]:
        from prime_jax.sample import Options, generate

        options = Options(
            gen_length=length,
            temperature=temperature,
            stop=self.run.eos_id,
            batch_size=self.scorer.batch_size,
        )
        if self.run.config.family != "arm":
            own = self.run.config.objective.block_length  # block diffusion: the trained blocks
            options = dataclasses.replace(
                options,
                steps=self.settings.steps or length,
                order="confidence",
                block_length=0 if own else min(self.settings.block_length, length),
                cfg_scale=self.settings.cfg,
            )
        return generate(self.run, prompts, options)

    def _cut(self, tokens: list[int], until: list[str] | str) -> str:
        text = self.run.tokenizer.decode(tokens)  # EOS decodes to nothing
        stops = [until] if isinstance(until, str) else until
        found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
        return text[: min(found)] if found else text


def _single_requests(requests: list[Any]) -> np.ndarray:
    """Requests that are the only one of their document: they need greedy decoding."""
    seen: dict[Any, int] = {}
    for request in requests:
        key = (request.task_name, request.doc_id)
        seen[key] = seen.get(key, 0) + 1
    return np.array([seen[request.task_name, request.doc_id] == 1 for request in requests])
