"""The estimators of a network, compiled for its mesh."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from prime_jax.config import RunConfig
from prime_jax.evaluate import estimators, likelihood
from prime_jax.evaluate.estimators import Values
from prime_jax.runtime import sharding
from prime_jax.runtime.metrics import Clock
from prime_jax.step import Compiled, Parts, Program

Draw = Callable[[Clock, str, Any, np.ndarray, likelihood.Row], Values]


@lru_cache(maxsize=32)
def of_program(program: Program) -> Draw:
    """The compiled estimators of a run, shared by all runs of the same program."""
    return make(program.parts)


def make(p: Parts, guidance: float = 0.0) -> Draw:
    """(clock, estimator, params, tokens, row) -> {label: nats [B]} (`likelihood.draw`)."""

    def function(config: RunConfig, name: str) -> Any:
        parts = p._replace(config=config)
        network = parts.network()
        task = estimators.make_task(config, p.codebook, p.eos_id, parts.head_axis(), guidance)

        def device(params, tokens_BxL, row: likelihood.Row):
            apply = lambda *args: network.apply({"params": params}, *args)  # noqa: E731
            nats = likelihood.draw(task, name, apply, tokens_BxL, *row)
            over = (sharding.REPLICA, sharding.DATA)
            return jax.tree.map(lambda x: jax.lax.all_gather(x, over, tiled=True), nats)

        specs = (p.specs, sharding.BATCH, sharding.BATCH)
        return jax.jit(sharding.per_device(device, p.mesh, specs, sharding.REPLICATED))

    @lru_cache
    def compiled(name: str) -> Compiled:
        return Compiled(f"estimator {name}", p.config, p.mesh, partial(function, name=name))

    def draw(clock: Clock, name: str, params, tokens_BxL: np.ndarray, row: likelihood.Row):
        return compiled(name)(clock, params, *sharding.shard(p.mesh, (tokens_BxL, row)))

    return draw
