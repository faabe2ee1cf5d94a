"""Scaling laws: fitted, with intervals, compared, and asked about other budgets.

    from prime_jax import scaling

    fit = scaling.fit("runs.csv")
    fit.families["arm"].approach3.optimum(1e21)

These functions are those of `library`; docs/scaling-python.md shows them at work. It is imported
with the first of them: `scaling.settings` alone is light, for the command line.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prime_jax.scaling.library import (
        compare,
        design,
        downstream,
        fit,
        frontier,
        load,
        predict,
        rates,
        validate,
    )

__all__ = [
    "compare",
    "design",
    "downstream",
    "fit",
    "frontier",
    "load",
    "predict",
    "rates",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prime_jax.scaling import library

    return getattr(library, name)
