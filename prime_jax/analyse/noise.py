"""Contributions of noise levels to the bound.

Two decompositions over the fraction of masked sub-tokens, both in nats per token:

* the integrand of the sub-token NELBO at each noise level: its mean over the levels is the bound
  (divided by l it is the mean cost of one masked sub-token at that level);
* the cost of each step of the ancestral sampler on the uniform grid with that many steps and
  within-token joint reveals: their sum is the bound `finite:T`. Where a step costs more than the
  integrand over its interval, smaller steps reduce the loss.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from prime_jax.analyse.subjects import Subject
from prime_jax.evaluate import draws as compiled
from prime_jax.evaluate import likelihood
from prime_jax.runtime.metrics import Clock
from prime_jax.runtime.records import Loss, as_dict
from prime_jax.schedule import stratum

BOUND, STEPS = "subtoken", "finite"


def measure(
    subject: Subject, levels: int, examples: int, replicates: int, tick: Callable[[], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each noise level, and the two bounds."""
    blocks = subject.blocks(examples)
    about = (subject.target_counts(blocks.tokens), blocks.doc, subject.given)
    density = draws(
        subject,
        estimator=BOUND,
        token_ExL=blocks.tokens,
        levels=levels,
        replicates=replicates,
        tick=tick,
    )
    steps = draws(
        subject,
        estimator=f"{STEPS}:{levels}",
        token_ExL=blocks.tokens,
        levels=levels,
        replicates=replicates,
        tick=tick,
    )
    rows = []
    for level in range(levels):
        cost = likelihood.summarise(BOUND, density[level], *about)
        step = likelihood.summarise(f"{STEPS}:{levels}", steps[level] / levels, *about)
        rows.append(
            {"run": subject.name, "from": level / levels, "to": (level + 1) / levels}
            | _columns("nats", cost)
            | _columns("step", step)
            | {"nats_per_subtoken": cost.value / subject.run.codebook.length}
        )
    totals = {
        name: likelihood.summarise(name, parts.mean(axis=0), *about)
        for name, parts in ((BOUND, density), (f"{STEPS}:{levels}", steps))
    }
    return rows, {
        "run": subject.name,
        "eval_set": blocks.hash,
        "examples": len(blocks.tokens),
        "losses": [as_dict(loss) for loss in totals.values()],
    }


def _columns(name: str, loss: Loss) -> dict[str, float | None]:
    return {name: loss.value, f"{name}_se_mc": loss.se_mc, f"{name}_se_data": loss.se_data}


def draws(
    subject: Subject,
    estimator: str,
    token_ExL: np.ndarray,
    levels: int,
    replicates: int,
    tick: Callable[[], None],
) -> np.ndarray:
    """Nats float64 [levels, R, E]: draws of an estimator, stratified within each noise level."""
    run, examples = subject.run, len(token_ExL)
    count = levels * replicates
    replicate = np.repeat(np.arange(count, dtype=np.int32), examples)  # different masks per level
    example = np.tile(np.arange(examples, dtype=np.int32), count)
    inside = [
        (stratum(np.arange(examples) + 7919 * r, examples) + 0.5) / examples for r in range(count)
    ]
    level = np.repeat(np.arange(levels), replicates)[:, None]
    uniform = ((level + np.array(inside)) / levels).reshape(-1).astype(np.float32)
    devices = run.program.mesh_choice.replica * run.program.mesh_choice.data
    size = likelihood.batch_size(run.config, devices)  # the size that is compiled
    draw, pending = compiled.of_program(run.program), []
    for row in likelihood.batches(likelihood.Row(replicate, example, uniform), size):
        found = draw(Clock(), estimator, run.params, token_ExL[row.example], row)
        pending.append(found[estimator])
        tick()
    flat = np.concatenate([np.asarray(x, np.float64) for x in pending])[: len(example)]
    return flat.reshape(levels, replicates, examples)


def batches(subject: Subject, levels: int, examples: int, replicates: int) -> int:
    """Approximate number of network calls of `measure`."""
    size = subject.run.config.eval.batch_size
    return 2 * -(-levels * replicates * examples // size)
