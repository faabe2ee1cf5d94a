"""AdamW with weight decay on matrices only, learning-rate schedules, transfer between shapes.

Steps, warm-up and peak are arguments of the compiled step, not constants: cells of one shape that
differ in budget or learning rate share one executable.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prime_jax.config import RunConfig


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


class Multipliers(NamedTuple):
    """By what `optim.transfer` multiplies the settings of a tensor."""

    std: float  # of its initial values, as model.py draws them
    rate: float  # learning rate; decay is divided by it
    eps: float  # of Adam


def transfer(config: RunConfig) -> dict[str, Multipliers]:
    """The multipliers of every tensor of the network; all are 1 without transfer.

    CompleteP (arXiv 2505.01618, table 1 at alpha = 1) also multiplies each residual branch by
    1 / depth and the logits by 1 / width. Here these are part of the last matrix of the branch and
    of the head: a matrix times c learns the same as before with its standard deviation and rate
    times c, decay and eps over c (theory.md, "Transfer of learning rates").

    Decay needs no column: in every row it is the run's over `rate`, so one step takes the same
    fraction of every matrix, and `optimizer` applies `rate` before decay is added.
    """
    o, m = config.optim, config.model
    width, depth = 1.0, 1.0
    if o.transfer != "none":
        width, depth = m.width / o.base.width, m.layers / o.base.layers
    outside = Multipliers(std=1, rate=1, eps=1 / width)
    gain = Multipliers(std=1, rate=1, eps=1 / (width * depth))
    inward = Multipliers(std=width**-0.5, rate=1 / width, eps=1 / (width * depth))
    # 1 / depth, and without the 1 / sqrt(depth) that these begin with (a 1 / sqrt(2 layers)).
    residual = Multipliers(std=(width * depth) ** -0.5, rate=1 / (width * depth), eps=1 / width)
    return {
        "embedding": outside,
        "attention_norm": gain,
        "qkv": inward,
        "q_norm": gain,
        "k_norm": gain,
        "attention_out": residual,
        "ffn_norm": gain,
        "gate": inward,
        "up": inward,
        "down": residual,
        "final_norm": outside,
        "head": Multipliers(std=1 / width, rate=1 / width, eps=1),
    }


def initial(params: Any, config: RunConfig) -> Any:
    """Initial parameters as a run has them, from those that the network draws."""
    return _times(params, {name: by.std for name, by in transfer(config).items()})


def optimizer(config: RunConfig) -> optax.GradientTransformation:
    """Clipping and AdamW at unit learning rate; `apply` scales the update."""
    o, by = config.optim, transfer(config)
    steps = [
        optax.clip_by_global_norm(o.clip) if o.clip else optax.identity(),
        # A gradient over c under eps is as good as the gradient under c eps.
        *_multiplied({name: 1 / by[name].eps for name in by}),
        optax.scale_by_adam(o.b1, o.b2, o.eps),
        *_multiplied({name: by[name].rate for name in by}),
        optax.add_decayed_weights(o.weight_decay, mask=decays),
    ]
    return optax.chain(*steps)


def _multiplied(by: Mapping[str, float]) -> list[optax.GradientTransformation]:
    """A step that multiplies tensors by their factors; none if all are 1, so that a checkpoint
    without transfer looks as it always did."""
    return [optax.stateless(lambda updates, _: _times(updates, by))] if _any(by) else []


def _times(tree: Any, by: Mapping[str, float]) -> Any:
    """The tensors of a tree times the factors of their names, untouched where that is 1."""

    def one(path, x):
        factor = by[path[-1].key]
        return x if factor == 1 else factor * x

    return jax.tree_util.tree_map_with_path(one, tree) if _any(by) else tree


def _any(by: Mapping[str, float]) -> bool:
    return any(factor != 1 for factor in by.values())


def apply(params: Any, updates: Any, lr: jax.Array) -> Any:
    return jax.tree.map(lambda p, u: p - lr * u, params, updates)


def averaged(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """Exponential moving average, with a warm-up so that initial values do not dominate early."""
    d = jnp.minimum(decay, (step + 1) / (step + 10))
    return jax.tree.map(lambda a, p: d * a + (1 - d) * p, ema, params)
