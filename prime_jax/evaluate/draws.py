"""The estimators of a network, compiled for its mesh."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from prime_jax.config import RunConfig
from prime_jax.evaluate import estimators, exact, likelihood
from prime_jax.evaluate.estimators import Values
from prime_jax.runtime import sharding
from prime_jax.runtime.metrics import Clock
from prime_jax.step import Compiled, Parts, Program

Draw = Callable[..., Values]


@lru_cache(maxsize=32)
def of_program(program: Program) -> Draw:
    """The compiled estimators of a run, shared by all runs of the same program."""
    return make(program.parts)


def make(p: Parts, guidance: float = 0.0) -> Draw:
    """(clock, estimator, params, tokens, row, watch) -> {label: nats [B]}.

    One call of `likelihood.draw`, or the many of `exact`, after each of which `watch` is called.
    """

    def function(config: RunConfig, name: str) -> Any:
        """Of a batch: the nats of an estimator; log P of hidden units for `exact:LEVEL`."""
        parts = p._replace(config=config)
        network = parts.network()
        task = estimators.make_task(config, p.codebook, p.eos_id, parts.head_axis(), guidance)

        def device(params, tokens_BxL, row: likelihood.Row, hidden_BxGxN):
            apply = lambda *args: network.apply({"params": params}, *args)  # noqa: E731
            if hidden_BxGxN is None:
                out = likelihood.draw(task, name, apply, tokens_BxL, *row)
            else:
                scored = likelihood.scored(task, apply, tokens_BxL, *row[3:])
                out = exact.log_probs(name.partition(":")[2], task, *scored, hidden_BxGxN)
            over = (sharding.REPLICA, sharding.DATA)
            return jax.tree.map(lambda x: jax.lax.all_gather(x, over, tiled=True), out)

        specs = (p.specs, *[sharding.BATCH] * 3)
        return jax.jit(sharding.per_device(device, p.mesh, specs, sharding.REPLICATED))

    @lru_cache
    def compiled(name: str) -> Compiled:
        return Compiled(f"estimator {name}", p.config, p.mesh, partial(function, name=name))

    def draw(
        clock: Clock,
        name: str,
        params: Any,
        tokens_BxL: np.ndarray,
        row: likelihood.Row,
        watch: exact.Watch = lambda done, calls: None,
    ) -> Values:
        given = sharding.shard(p.mesh, (tokens_BxL, row))
        asked = exact.requested(name)
        if asked is None:
            return compiled(name)(clock, params, *given, None)

        def ask(hidden_BxGxN: np.ndarray) -> jax.Array:
            hidden = sharding.shard(p.mesh, hidden_BxGxN)
            return compiled(f"exact:{asked.level}")(clock, params, *given, hidden)

        blocks = tokens_BxL.shape[1] // (p.config.objective.block_length or tokens_BxL.shape[1])
        units = asked.units(p.config)
        return exact.evaluate(name, ask, row.example, blocks, units, watch)

    return draw
