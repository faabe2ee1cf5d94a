"""Training steps on any mesh: their numbers, and what each row of the batches hides.

`python mesh_runs.py FUNCTION CONFIGS OUT` calls `hidden` or `trained` as one process of a process group.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from prime_jax import objectives, optim, step
from prime_jax.config import RunConfig
from prime_jax.corrupt import step_key
from prime_jax.runtime import distributed, meshes, sharding
from prime_jax.runtime.metrics import Clock
from prime_jax.settings import from_dict
from prime_jax.subtokens import Codebook

Rows = dict[str, str]  # by step key and row: the bytes of what the network sees and is charged for


def noted(rows: Rows) -> Callable[..., objectives.Inputs]:
    """`objectives.training_inputs`, which also fills `rows` with those that this process holds."""

    def note(key, row_B, *values):
        for i, row in enumerate(row_B):
            text = b"".join(np.asarray(value)[i].tobytes() for value in values).hex()
            name = f"{np.asarray(key)} {row}"
            assert rows.setdefault(name, text) == text  # devices that split a model share rows

    training_inputs = objectives.training_inputs

    def inputs(config, *, book, token_BxL, row_B, key, eos_id):
        made = training_inputs(
            config, book=book, token_BxL=token_BxL, row_B=row_B, key=key, eos_id=eos_id
        )
        seen = (made.digits_BxLxS, made.masked_BxLxS, made.weight_BxL)
        jax.debug.callback(note, jax.random.key_data(key), row_B, *seen)
        return made

    return inputs


def batches(config: RunConfig):
    """(tokens, rows) of each step."""
    rng, row_B = np.random.default_rng(0), np.arange(config.batch_size, dtype=np.int32)
    for _ in range(config.steps):
        shape = (config.batch_size, config.data.seq_len)
        yield rng.integers(0, config.model.vocab_size, shape, np.int32), row_B


def hidden(config: RunConfig) -> Rows:
    """What the rows hide: the first thing that a step does, without the rest."""
    rows: Rows = {}
    inputs, book = noted(rows), Codebook.create(config.model.vocab_size, config.subtokens)
    mesh, _ = meshes.make(config, jax.devices())

    def device(tokens_BxL, row_B, step):
        key = step_key(config.seed, step)
        inputs(config, book=book, token_BxL=tokens_BxL, row_B=row_B, key=key, eos_id=0)
        return ()

    specs = (sharding.BATCH, sharding.BATCH, sharding.REPLICATED)
    draw = jax.jit(sharding.per_device(device, mesh, specs, ()))
    for i, batch in enumerate(batches(config)):
        draw(*sharding.shard(mesh, batch), np.int32(i))
    jax.effects_barrier()
    return rows


def trained(config: RunConfig) -> tuple[np.ndarray, Rows]:
    """Losses and gradient norms of every step, [steps, 2], and `hidden` as the steps had it."""
    rows: Rows = {}
    with mock.patch.object(step, "training_inputs", noted(rows)):
        program, clock = step.make_program(config, 0, jax.devices()), Clock()
        state = program.init(clock, 0)
        out = []
        for batch in batches(config):
            placed = sharding.shard(program.mesh, batch)
            state, metrics = program.train(
                clock, state, *placed, np.uint32(0), optim.horizon(config)
            )
            out.append((float(metrics.loss), float(metrics.grad_norm)))
    jax.effects_barrier()
    return np.array(out), rows


if __name__ == "__main__":
    distributed.start(print)
    function = {"hidden": hidden, "trained": trained}[sys.argv[1]]
    configs = [from_dict(RunConfig, values) for values in json.loads(Path(sys.argv[2]).read_text())]
    found = [function(config) for config in configs]
    path = Path(f"{sys.argv[3]}.{jax.process_index()}")
    path.write_text(json.dumps(found, default=np.ndarray.tolist))
