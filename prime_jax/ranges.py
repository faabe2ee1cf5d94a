"""The range of every number in a `RunConfig`: what is outside would fail late, oddly or not at all."""

from collections.abc import Callable, Iterator
from typing import Any

from prime_jax.errors import UserError

Fits = Callable[[float], bool]

# What is allowed, in words; whether a number is; and the dotted settings that it holds for. A
# setting with several numbers gives each of them.
RANGES: tuple[tuple[str, Fits, tuple[str, ...]], ...] = (
    (
        "at least 1",
        lambda x: x >= 1,
        (
            "steps",
            "batch_size",
            "model.vocab_size",
            "model.layers",
            "model.width",
            "model.heads",
            "model.ffn_multiple",
            "data.seq_len",
            "eval.replicates",
            "eval.batch_size",
            "mesh.accumulate",
            "kernels.head_blocks",
            "kernels.attention_blocks",
            "checkpoint.keep",
            "log.every",
        ),
    ),
    (
        "at least 0",
        lambda x: x >= 0,
        (
            "model.kv_heads",
            "subtokens.seed",
            "objective.block_length",
            "objective.time_steps",
            "optim.warmup_steps",
            "optim.weight_decay",
            "optim.clip",
            "eval.examples",
            "eval.every",
            "mesh.replica",
            "mesh.data",
            "mesh.model",
            "checkpoint.every",
            "checkpoint.minutes",
            "checkpoint.keep_every",
            "checkpoint.grace_seconds",
            "log.profile",
        ),
    ),
    (
        "above 0",
        lambda x: x > 0,
        (
            "model.rope_base",
            "model.norm_eps",
            "model.init_std",
            "objective.power",
            "objective.sigma_min",
            "objective.sigma_max",
            "optim.peak_lr",
            "optim.eps",
        ),
    ),
    ("above 0 and below 1", lambda x: 0 < x < 1, ("objective.time_eps",)),
    (
        "at least 0 and below 1",
        lambda x: 0 <= x < 1,
        ("model.dropout", "optim.b1", "optim.b2", "optim.ema"),
    ),
    (
        "between 0 and 1",
        lambda x: 0 <= x <= 1,
        (
            "subtokens.shuffle",
            "objective.token_mask_rho",
            "objective.random_length",
            "optim.final_lr_fraction",
            "optim.cooldown_fraction",
        ),
    ),
    ("between 1 and 32", lambda x: 1 <= x <= 32, ("subtokens.length",)),
    ("between 0 and 2**32 - 1", lambda x: 0 <= x < 2**32, ("seed",)),  # JAX's keys take 32 bits
)


def check(config: Any) -> None:
    """Raises: UserError: the first number out of its range, with what is allowed."""
    for right, fits, names in RANGES:
        for name in names:
            for value in _numbers(config, name):
                if not (fits(value) and abs(value) < float("inf")):
                    raise UserError(f"{name} = {value}: must be {right}")


def _numbers(config: Any, name: str) -> Iterator[float]:
    for part in name.split("."):
        config = getattr(config, part)
    yield from config if isinstance(config, tuple) else (config,)
