"""AdamW with weight decay on matrices only, and learning-rate schedules with traced settings.

Steps, warm-up and peak are arguments of the compiled step, not constants: cells of one shape that
differ in budget or learning rate share one executable.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prime_jax.config import OptimConfig, RunConfig


class Horizon(NamedTuple):
    """The numbers of a run that its compiled step reads at run time, all scalars."""

    steps: jax.Array
    warmup: jax.Array
    peak_lr: jax.Array
    final_fraction: jax.Array
    cooldown: jax.Array


def horizon(config: RunConfig) -> Horizon:
    o = config.optim
    return Horizon(
        steps=jnp.float32(config.steps),
        warmup=jnp.float32(o.warmup_steps),
        peak_lr=jnp.float32(o.peak_lr),
        final_fraction=jnp.float32(o.final_lr_fraction),
        cooldown=jnp.float32(o.cooldown_fraction),
    )


def learning_rate(schedule: str, h: Horizon, step: jax.Array) -> jax.Array:
    """Learning rate of step 0, 1, ...: linear warm-up, then cosine to the end or WSD.

    The first step has lr = peak / warmup, and the last one the final rate.
    """
    rise = jnp.minimum(1.0, (step + 1) / jnp.maximum(h.warmup, 1))
    if schedule == "cosine":
        done = jnp.clip((step + 1 - h.warmup) / jnp.maximum(h.steps - h.warmup, 1), 0, 1)
        fall = h.final_fraction + (1 - h.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    else:  # wsd: constant, then linear to the final rate
        length = jnp.maximum(h.cooldown * h.steps, 1)
        done = jnp.clip((step + 1 - (h.steps - length)) / length, 0, 1)
        fall = 1 - (1 - h.final_fraction) * done
    return h.peak_lr * rise * fall


def decays(params: Any) -> Any:
    """True for matrices and tables; norms (stacked over layers or not) are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in str(path[-1]), params)


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping and AdamW at unit learning rate; `apply` scales the update."""
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def apply(params: Any, updates: Any, lr: jax.Array) -> Any:
    return jax.tree.map(lambda p, u: p - lr * u, params, updates)


def averaged(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """Exponential moving average, with a warm-up so that initial values do not dominate early."""
    d = jnp.minimum(decay, (step + 1) / (step + 10))
    return jax.tree.map(lambda a, p: d * a + (1 - d) * p, ema, params)
