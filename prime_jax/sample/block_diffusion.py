"""Sampling with block diffusion: one block after another, with a KV cache of finished blocks.

A block is sampled by the same `loop` as in masked diffusion, with a network that attends to the
cached keys and values of the blocks before it; a finished block is read once more, clean, into the
cache. So a network call computes one block only (BD3-LM, arXiv 2503.09573, section 3).
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.model import Cache
from prime_jax.sample import loop
from prime_jax.sample.options import Options
from prime_jax.sample.predict import Model


def options_of(config: RunConfig, options: Options) -> Options:
    """The options with the block length of a run that was trained with block diffusion.

    Raises:
        UserError: options that cannot be combined with it.
    """
    block = config.objective.block_length
    if not block:
        return options
    if options.block_length not in (0, block):
        raise UserError(
            f"--block-length {options.block_length}: this run was trained with blocks of {block}"
        )
    for name in ("cfg_scale", "remasking"):
        if getattr(options, name):
            raise UserError(
                f"--{name.replace('_', '-')}: not supported for a run trained in blocks"
            )
    # Steps are counted per example, which requires that idle steps are skipped.
    return dataclasses.replace(options, block_length=block, cached=True)


def whole_blocks(config: RunConfig, canvas: np.ndarray, hidden: int) -> np.ndarray:
    """A canvas [L, S] padded with masked tokens to whole blocks; their samples are cut off."""
    missing = -len(canvas) % (config.objective.block_length or 1)
    return np.pad(canvas, ((0, missing), (0, 0)), constant_values=hidden)


def run(
    model: Model,
    config: RunConfig,
    rule: loop.Rule,
    params: Any,
    batch: loop.Batch,
    settings: loop.Settings,
    digits_BxLxS: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`loop.run`, block by block; reading a finished block into the cache is not counted."""
    block, read = config.objective.block_length, model.network(params)
    batch_size, length, _ = digits_BxLxS.shape

    def write(index, state):
        digits_BxLxS, cache, count = state

        def here(x):
            return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=1)

        def network(params):
            return lambda digits, segment_ids, keys: read(digits, cache=cache)[:2]

        plan = batch.plan._replace(
            when_LxS=here(batch.plan.when_LxS), block_L=here(batch.plan.block_L)
        )
        part = batch._replace(plan=plan, segment_ids_BxL=here(batch.segment_ids_BxL))
        done_BxNxS, count_B = loop.run(
            model._replace(network=network),
            rule=rule,
            params=params,
            batch=part,
            settings=settings,
            digits_BxLxS=here(digits_BxLxS),
            first=count,
            last=last,
        )
        cache = read(done_BxNxS, cache=cache)[2]
        update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * block, axis=1)
        return update(digits_BxLxS, done_BxNxS), cache, count_B[0]

    start = digits_BxLxS, Cache.empty(config.model, batch_size, length), first
    digits_BxLxS, _, count = jax.lax.fori_loop(0, length // block, write, start)
    return digits_BxLxS, jnp.full(batch_size, count)
