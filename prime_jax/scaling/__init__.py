"""Scaling laws: fitted, with intervals, compared, and asked about other budgets.

    from prime_jax import scaling

    fit = scaling.fit("runs.csv")
    fit.families["arm"].approach3.optimum(1e21)

These functions are those of `library`; docs/scaling-python.md shows them at work.
"""

from prime_jax.scaling.library import compare, design, fit, load, predict, validate

__all__ = ["compare", "design", "fit", "load", "predict", "validate"]
