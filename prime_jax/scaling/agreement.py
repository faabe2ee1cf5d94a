"""Do the three approaches agree on the exponent a of N*(C) ~ C**a?"""

import itertools
import math

from prime_jax.scaling.diagnostics import Diagnostic, warn

Estimate = tuple[float, list[float] | None]  # a, and its interval if it has one


def diagnostics(estimates: dict[str, Estimate]) -> list[Diagnostic]:
    """A warning for approaches that differ by more than their intervals allow.

    The sides of two intervals that face each other add in quadrature, as for independent errors.
    The errors share their data and so are closer than that: a difference that stands out is real.
    """
    out = []
    for (one, (a, ends)), (other, (b, b_ends)) in itertools.combinations(estimates.items(), 2):
        if ends is None or b_ends is None:
            continue
        facing = (ends[1] - a, b - b_ends[0]) if a < b else (a - ends[0], b_ends[1] - b)
        if abs(a - b) > math.hypot(*facing):
            out.append(
                warn(
                    "approaches_disagree",
                    f"{one} gives a = {a:.3f} ({ends[0]:.3f} to {ends[1]:.3f}), {other} a = {b:.3f} ({b_ends[0]:.3f} to {b_ends[1]:.3f})",
                )
            )
    return out
