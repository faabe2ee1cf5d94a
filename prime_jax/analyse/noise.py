"""Contributions of noise levels to the bound.

Two decompositions over the fraction of masked sub-tokens, both in nats per token:

* the integrand of the sub-token NELBO at each noise level: its mean over the levels is the bound
  (divided by l it is the mean cost of one masked sub-token at that level);
* the cost of each step of the ancestral sampler on the uniform grid with that many steps and
  within-token joint reveals: their sum is the bound `finite:T`. Where a step costs more than the
  integrand over its interval, smaller steps reduce the loss.

And the relative variance of the training loss of one sequence (variance over the square of the mean,
over texts, times and masks) under each law of training times and each weight. The estimates of
the integrand hide exactly k of n sub-tokens; training hides each with probability u. So the moments
are sums over k of those at k, times the integral of the law of k given u: no rare draw is missed.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import stats

from prime_jax import schedule
from prime_jax.analyse.subjects import Subject
from prime_jax.config import ObjectiveConfig
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
        "variances": _variances(subject, density, about[0] * subject.run.codebook.length),
    }


def _variances(
    subject: Subject, nats_NxRxE: np.ndarray, hidden_E: np.ndarray
) -> list[dict[str, Any]]:
    """A row for each law of times and weight; none for block diffusion, where blocks have times of
    their own and the draws only their sum."""
    o = subject.run.config.objective
    levels, replicates, examples = nats_NxRxE.shape
    if o.block_length:
        return []
    uniform = uniforms(levels, replicates, examples).reshape(nats_NxRxE.shape)
    sizes = np.broadcast_to(hidden_E, nats_NxRxE.shape)
    masked = 1 + np.minimum(np.floor(uniform * sizes), sizes - 1)
    rows = []
    for times in ("uniform", "bell"):
        for weight in ("nelbo", "flat"):
            law = ObjectiveConfig(
                times=times, weight=weight, time_eps=o.time_eps, times_sd=o.times_sd
            )
            value, se = relative_variance(law, nats_NxRxE, masked, sizes)
            rows.append(
                {
                    "times": times,
                    "weight": weight,
                    "relative_variance": value,
                    "relative_variance_se": se,
                }
            )
    return rows


def relative_variance(
    law: ObjectiveConfig, nats: np.ndarray, masked: np.ndarray, sizes: np.ndarray
) -> tuple[float | None, float | None]:
    """Var / mean^2 of the training loss of a sequence under a law of times, linear schedule; its
    standard error over the examples (linearised).

    Args:
        law: `times`, `times_sd`, `weight` and `time_eps` count.
        nats: draws of the bound [.., E]: n / k times the cost of k hidden of n, with k uniform on
            1 .. n; the last axis is the examples.
        masked, sizes: k and n of each draw.
    Returns:
        (None, None) where no draw has a cost; no error for one example.
    """
    u = np.geomspace(law.time_eps, 1, 4001)
    q = np.asarray(schedule.density(law, jnp.asarray(u)), np.float64)
    weight = np.ones_like(u) if law.weight == "flat" else 1 / (u * q)
    pairs, at = np.unique(np.stack([masked, sizes]).reshape(2, -1), axis=1, return_inverse=True)
    first, second = np.zeros(pairs.shape[1]), np.zeros(pairs.shape[1])
    for i, (k, n) in enumerate(pairs.T):
        drawn = stats.binom.pmf(k, n, u) * q * u  # d log u
        first[i], second[i] = (
            n * np.trapezoid(drawn * weight**power, np.log(u)) for power in (1, 2)
        )
    at, cost = at.reshape(nats.shape), nats * masked / np.maximum(sizes, 1)
    one_E, two_E = (
        x.reshape(-1, nats.shape[-1]).mean(0) for x in (first[at] * cost, second[at] * cost**2)
    )
    mean, square = one_E.mean(), two_E.mean()
    if not mean:
        return None, None
    slope_E = (two_E - square) / mean**2 - 2 * square * (one_E - mean) / mean**3
    se = slope_E.std(ddof=1) / len(slope_E) ** 0.5 if len(slope_E) > 1 else None
    return float(square / mean**2 - 1), None if se is None else float(se)


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
    uniform = uniforms(levels, replicates, examples)
    devices = run.program.mesh_choice.replica * run.program.mesh_choice.data
    size = likelihood.batch_size(run.config, devices)  # the size that is compiled
    draw, pending = compiled.of_program(run.program), []
    for row in likelihood.batches(likelihood.Row(replicate, example, uniform), size):
        found = draw(Clock(), estimator, run.params, token_ExL[row.example], row)
        pending.append(found[estimator])
        tick()
    flat = np.concatenate([np.asarray(x, np.float64) for x in pending])[: len(example)]
    return flat.reshape(levels, replicates, examples)


def uniforms(levels: int, replicates: int, examples: int) -> np.ndarray:
    """Float32 [levels * R * E] in [0, 1): stratified over the examples within each level."""
    inside = [
        (stratum(np.arange(examples) + 7919 * r, examples) + 0.5) / examples
        for r in range(levels * replicates)
    ]
    level = np.repeat(np.arange(levels), replicates)[:, None]
    return ((level + np.array(inside)) / levels).reshape(-1).astype(np.float32)


def batches(subject: Subject, levels: int, examples: int, replicates: int) -> int:
    """Approximate number of network calls of `measure`."""
    size = subject.run.config.eval.batch_size
    return 2 * -(-levels * replicates * examples // size)
