"""How to fit."""

from dataclasses import dataclass

from prime_jax.scaling import approach3
from prime_jax.scaling.approach2 import Method
from prime_jax.scaling.laws import POWERS


@dataclass(frozen=True)
class Settings:
    """`level` is that of every interval."""

    replicates: int = 1000
    seed: int = 0
    level: float = 0.95
    delta: float = approach3.DELTA
    objective: approach3.Objective = "huber"
    approach2: Method = "parabola"
    law: str = POWERS  # of `laws.LAWS`


DEFAULTS = Settings()
