"""Left-to-right decoding of an autoregressive model, with a KV cache."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prime_jax.config import ModelConfig
from prime_jax.model import Cache
from prime_jax.sample.filters import Filters
from prime_jax.sample.predict import Model, example_keys, propose

READ = 32  # prompt tokens per call


class Prompts(NamedTuple):
    """B texts to continue; arrays.

    Attributes:
        token_BxL: the prompts, then arbitrary values.
        start_B: tokens of each prompt; may be 0.
        stop_B: maximum length of each text, at most L.
        example_B: uint32 numbers; with the seed they determine the keys of the examples.
    """

    token_BxL: Any
    start_B: Any
    stop_B: Any
    example_B: Any


class Settings(NamedTuple):
    """Traced; `end` is the token that ends a text, -1 for none."""

    filters: Filters
    seed: Any
    end: Any


def read_prompts(model: Model, params: Any, config: ModelConfig, prompts: Prompts) -> Cache:
    """A cache of BOS and each prompt without its last token, which is read in the first step."""
    batch, length = prompts.token_BxL.shape
    capacity = -(-length // READ) * READ
    network, book = model.network(params), model.head.codebook
    digit_BxL = jnp.asarray(book.digits)[prompts.token_BxL, 0]
    input_BxM = jnp.pad(digit_BxL, ((0, 0), (1, READ)), constant_values=book.base)[:, :capacity]

    def read(state):
        start, cache = state
        part_BxR = jax.lax.dynamic_slice_in_dim(input_BxM, start, READ, axis=1)
        return start + READ, network(part_BxR[..., None], cache=cache)[2]

    begin = jnp.int32(0), Cache.empty(config, batch, capacity)
    _, cache = jax.lax.while_loop(lambda s: s[0] < prompts.start_B.max(), read, begin)
    # Positions beyond a prompt are overwritten before they are used.
    return cache._replace(length_B=prompts.start_B)


def decode(
    model: Model, params: Any, config: ModelConfig, prompts: Prompts, settings: Settings
) -> tuple[jax.Array, jax.Array]:
    """The texts [B, L], generated up to `stop` or the end token, and network calls [B]."""
    book, network = model.head.codebook, model.network(params)
    cache = read_prompts(model, params, config, prompts)
    batch, length = prompts.token_BxL.shape
    row_B = jnp.arange(batch)

    def unfinished(state):
        _, _, open_B, _ = state
        return open_B.any()

    def write(state):
        token_BxL, cache, open_B, count = state
        at_B = jnp.minimum(cache.length_B, length - 1)
        digit_B = jnp.asarray(book.digits)[token_BxL[row_B, at_B - 1], 0]
        last_B = jnp.where(at_B > 0, digit_B, book.base)
        h_Bx1xD, head_VxD, cache = network(last_B[:, None, None], cache=cache)
        draw_B = jnp.full(batch, count)
        row_N, _ = propose(
            model.head,
            score=None,
            filters=settings.filters,
            h_NxD=h_Bx1xD[:, 0],
            head_VxD=head_VxD,
            digits_NxS=last_B[:, None],
            key_N=example_keys(settings.seed, prompts.example_B, draw_B),
            active_N=open_B,
        )
        new_B = jnp.where(open_B, jnp.asarray(book.tokens)[row_N], token_BxL[row_B, at_B])
        token_BxL = token_BxL.at[row_B, at_B].set(new_B)
        open_B &= (cache.length_B < prompts.stop_B) & (new_B != settings.end)
        return token_BxL, cache, open_B, count + 1

    start = prompts.token_BxL, cache, prompts.start_B < prompts.stop_B, jnp.int32(0)
    token_BxL, _, _, count = jax.lax.while_loop(unfinished, write, start)
    return token_BxL, jnp.full(batch, count)
