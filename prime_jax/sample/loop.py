"""The loop of masked diffusion sampling: predict and reveal until nothing is masked.

The time is not an input of the network, so each example of a batch proceeds to its own next step at
which something is revealed: steps that reveal nothing need no network call, at any batch size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.sample import orders
from prime_jax.sample.filters import Filters
from prime_jax.sample.options import ADAPTIVE, Options
from prime_jax.sample.orders import NEVER, Plan
from prime_jax.sample.predict import Model, example_keys, hidden_states, position_keys, propose

STEPS_UNIT = 1024  # tables of per-step rates are padded to multiples: fewer compilations


class Batch(NamedTuple):
    """Inputs of the loop that do not change, for B examples.

    Attributes:
        plan: see `orders.Plan`.
        segment_ids_BxL: 0, and -1 for padding.
        example_B: uint32 numbers; with the seed they determine the keys of the examples.
    """

    plan: Plan
    segment_ids_BxL: Any
    example_B: Any

    @property
    def drawn_BxLxS(self) -> jax.Array:
        return self.plan.when_LxS < NEVER


class Settings(NamedTuple):
    """Traced settings.

    Attributes:
        rates_Px2: for remasking: at every step the probability that a masked sub-token is
            revealed, and that a revealed one is masked again; zeros after the last step.
    """

    filters: Filters
    threshold: Any
    cfg_scale: Any
    rates_Px2: Any
    steps: Any
    seed: Any


class Rule(NamedTuple):
    """Static settings of a compiled loop.

    Attributes:
        order: an adaptive order, `fixed` or `remasking`.
        guided: classifier-free guidance: the network is also called without the prompt.
        cached: whether a fixed order skips steps that reveal nothing.
    """

    order: str
    guided: bool
    cached: bool


def rule_of(options: Options) -> Rule:
    order = options.order if options.order in ADAPTIVE else "fixed"
    return Rule("remasking" if options.remasking else order, options.cfg_scale > 0, options.cached)


def settings_of(options: Options) -> Settings:
    fractions = orders.time_grid(options, options.steps)
    steps = len(fractions) - 1
    rates = np.zeros((-(-steps // STEPS_UNIT) * STEPS_UNIT, 2), np.float32)
    rates[:steps] = remasking_rates(fractions, options.remasking)
    threshold = options.threshold
    if threshold is None:
        threshold = np.inf
    elif options.order == "entropy":  # its score is the negative entropy
        threshold = -threshold
    elif options.order in ("confidence", "confidence-drawn"):  # and log p
        threshold = np.log(threshold) if threshold > 0 else -np.inf
    return Settings(
        filters=Filters(
            np.float32(options.temperature), np.int32(options.top_k), np.float32(options.top_p)
        ),
        threshold=np.float32(threshold),
        cfg_scale=np.float32(options.cfg_scale),
        rates_Px2=rates,
        steps=np.int32(steps),
        seed=np.uint32(options.seed),
    )


def remasking_rates(fractions: np.ndarray, strength: float) -> np.ndarray:
    """Per step: probability to reveal, and to mask again (ReMDM, equations of section 3).

    From masked fraction u to s, revealed sub-tokens are masked with probability sigma = strength
    min(1, s / (1 - u)); masked ones are revealed so that the fraction s is masked afterwards.
    """
    u, s = fractions[:-1], fractions[1:]
    sigma = strength * np.minimum(1, s / np.maximum(1 - u, 1e-12))
    sigma = np.where(u == 1, 0.0, sigma)  # nothing is revealed yet
    return np.stack([(u - s + sigma * (1 - u)) / u, sigma], axis=1)


class _Call(NamedTuple):
    """The inputs of all network calls."""

    model: Model
    rule: Rule
    params: Any
    batch: Batch
    settings: Settings

    def keys(self, step_B: jax.Array) -> jax.Array:
        return example_keys(self.settings.seed, self.batch.example_B, step_B)

    def predict(self, digits_BxLxS, step_B, active_BxL, score=None) -> tuple:
        """A sampled token's sub-tokens [B, L, S] and score [B, L] for each active position, and the
        dtype of what they were computed from."""
        head, settings = self.model.head, self.settings
        given_BxLxS = ~self.batch.drawn_BxLxS & (self.batch.segment_ids_BxL >= 0)[..., None]
        unprompted = jnp.where(given_BxLxS, head.codebook.base, digits_BxLxS)
        h_BxLxD, head_VxD = hidden_states(
            self.model.network(self.params),
            digits_BxLxS,
            self.batch.segment_ids_BxL,
            unprompted if self.rule.guided else None,
            settings.cfg_scale,
        )
        shape = active_BxL.shape
        key_BxL = position_keys(self.keys(step_B), shape[1])
        parts = (h_BxLxD, digits_BxLxS, key_BxL, active_BxL)
        h_NxD, *rest = (x.reshape(-1, *x.shape[2:]) for x in parts)
        row_N, score_N = propose(head, score, settings.filters, h_NxD, head_VxD, *rest)
        drawn_BxLxS = jnp.asarray(head.digits_VxS)[row_N.reshape(shape)]
        return drawn_BxLxS, score_N.reshape(shape), h_BxLxD.dtype


def _fixed(call: _Call, digits_BxLxS, count) -> jax.Array:
    hidden_BxLxS = digits_BxLxS == call.model.head.codebook.base
    step_B = jnp.full(digits_BxLxS.shape[:1], count)
    if call.rule.cached:
        step_B = orders.next_fixed(call.batch.plan, hidden_BxLxS)
    reveal_BxLxS = hidden_BxLxS & (call.batch.plan.when_LxS == step_B[:, None, None])
    drawn_BxLxS, *_ = call.predict(digits_BxLxS, step_B, reveal_BxLxS.any(axis=2))
    return jnp.where(reveal_BxLxS, drawn_BxLxS, digits_BxLxS)


def _adaptive(call: _Call, digits_BxLxS, count) -> jax.Array:
    hidden_BxLxS = digits_BxLxS == call.model.head.codebook.base
    count_B = orders.next_count(call.batch.plan, hidden_BxLxS)
    active_BxL = orders.active_block(call.batch.plan, hidden_BxLxS)
    score = orders.SCORES[call.rule.order]
    # Per example: in block diffusion the number of calls depends on the batch.
    plan = call.batch.plan
    step_B = orders.revealed(plan, hidden_BxLxS) + plan.block_L[:, 0] * plan.block_L.shape[1]
    drawn_BxLxS, score_BxL, dtype = call.predict(digits_BxLxS, step_B, active_BxL, score)
    threshold = call.settings.threshold
    chosen_BxL = orders.most_confident(active_BxL, score_BxL, count_B, threshold, dtype)
    return jnp.where(hidden_BxLxS & chosen_BxL[..., None], drawn_BxLxS, digits_BxLxS)


def _remasking(call: _Call, digits_BxLxS, count) -> jax.Array:
    base = call.model.head.codebook.base
    hidden_BxLxS = digits_BxLxS == base
    shape = digits_BxLxS.shape
    step_B = jnp.full(shape[:1], count)
    key_B = jax.vmap(lambda key: jax.random.fold_in(key, shape[1]))(call.keys(step_B))
    u_BxLxS = jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(key_B)
    show, hide = call.settings.rates_Px2[count]
    reveal_BxLxS = hidden_BxLxS & (u_BxLxS < show)
    again_BxLxS = call.batch.drawn_BxLxS & ~hidden_BxLxS & (u_BxLxS < hide)
    drawn_BxLxS, *_ = call.predict(digits_BxLxS, step_B, reveal_BxLxS.any(axis=2))
    digits_BxLxS = jnp.where(reveal_BxLxS, drawn_BxLxS, digits_BxLxS)
    return jnp.where(again_BxLxS, base, digits_BxLxS)


BODIES: dict[str, Callable[..., jax.Array]] = {"fixed": _fixed, "remasking": _remasking}


def run(
    model: Model,
    rule: Rule,
    params: Any,
    batch: Batch,
    settings: Settings,
    digits_BxLxS: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Iterations `first` to `last` (or the end) of the loop: (digits, calls so far [B]).

    Args:
        digits_BxLxS: the digit `base` means masked.
    """
    call = _Call(model, rule, params, batch, settings)
    body = partial(BODIES.get(rule.order, _adaptive), call)
    base = model.head.codebook.base

    def unfinished(state):
        digits_BxLxS, count = state
        if rule.order == "remasking":  # revealed sub-tokens may be masked again
            return count < jnp.minimum(last, settings.steps)
        return (count < last) & (digits_BxLxS == base).any()

    def step(state):
        digits_BxLxS, count = state
        return body(digits_BxLxS, count).astype(digits_BxLxS.dtype), count + 1

    digits_BxLxS, count = jax.lax.while_loop(unfinished, step, (digits_BxLxS, first))
    return digits_BxLxS, jnp.full(digits_BxLxS.shape[:1], count)
