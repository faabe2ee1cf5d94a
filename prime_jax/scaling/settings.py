"""How to fit."""

from dataclasses import dataclass

from prime_jax.scaling import approach3
from prime_jax.scaling.approach2 import Method


@dataclass(frozen=True)
class Settings:
    """`level` is that of every interval."""

    replicates: int = 1000
    seed: int = 0
    level: float = 0.95
    delta: float = approach3.DELTA
    objective: approach3.Objective = "huber"
    approach2: Method = "parabola"


DEFAULTS = Settings()
