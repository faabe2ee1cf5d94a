"""compare.json: what a comparison found, for other programs.

{"schema": 2, "source": {"name", "sha256"}, "metric", "conventions": {"flops", "params"},
 "method": {"objective", "delta", "bootstrap", "seed", "level"}, "versions": {...},
 "allow_mixed_kinds", "baseline": {"family", "kind"},
 "families": {NAME: {
   "kind", "mixed": what differs between the two kinds of number, or null,
   "multiplier": {
     "at_family": C is what the family spends and m = C / other_flops,
     "at_baseline": C is what the baseline spends and m = other_flops / C: each
       {"budgets": [{"flops": C, "other_flops": what the other one needs for the same loss | null,
          "value": m | null, "median", "interval": [low, high], "never", "in_range",
          "interpolated": {"value", "interval"} | null}],
        "curve": {"flops", "value", "median", "in_range": [...], "interval": [[low], [high]]}}},
   "lower": [{"flops", "probability", "interpolated" | null, "in_range"}],
   "exponents": {"approach3": {"difference", "interval", "significant"}, "approach2": alike | null},
   "tests": {"exponents" and "E": {"shared": [names], "p", "statistic", "simulations", "gradient",
     "params": {"baseline": {"E", "A", "B", "alpha", "beta"}, "family": {...}}}},
   "warnings": [{"code", "message", "hint", "refusal"}]}}}

m is how many times the compute of the baseline the family needs for one loss. A `value` or an end
of an interval that is null is beyond all numbers: in `at_family` the baseline never reaches that
loss (m is 0), in `at_baseline` the family never does (m is infinite), because its E is not below
it; `never` is the fraction of replicates of which that is true. `value` and `interval` come from the
laws (approach 3), `interpolated` from the frontier through the minima of approach 2. `in_range`
is true where both frontiers are used within their data; anything else is an extrapolation.
A comparison that was refused has only "kind", "mixed" and "warnings". `lower` is the probability
that the family's best loss is below the baseline's.
"""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prime_jax.scaling.compare import Comparison, Contrast, Difference, Multiplier, Pair
from prime_jax.scaling.joint import SharedFit
from prime_jax.scaling.record import origin

SCHEMA = 2


def as_dict(found: Comparison) -> dict[str, Any]:
    base = found.runs.families[found.baseline]
    return {
        "schema": SCHEMA,
        **origin(found.runs, found.settings),
        "allow_mixed_kinds": found.runs.choice.allow_mixed_kinds,
        "baseline": {"family": found.baseline, "kind": base.measure.kind},
        "families": {name: _pair(pair) for name, pair in found.pairs.items()},
    }


def _pair(pair: Pair) -> dict[str, Any]:
    head = {"kind": pair.points.measure.kind, "mixed": pair.mixed or None}
    warnings = {"warnings": [diagnostic.as_dict() for diagnostic in pair.diagnostics]}
    return head | (_contrast(pair.contrast) if pair.contrast else {}) | warnings


def _contrast(found: Contrast) -> dict[str, Any]:
    three, two = found.exponents
    lower = zip(found.lower_flops, *found.lower, found.lower_in_range, strict=True)
    return {
        "multiplier": {
            "at_family": {
                "budgets": _budgets(found.at_family),
                "curve": _curve(found.family_curve),
            },
            "at_baseline": {
                "budgets": _budgets(found.at_baseline),
                "curve": _curve(found.baseline_curve),
            },
        },
        "lower": [
            {
                "flops": float(c),
                "probability": float(p),
                "interpolated": _number(q),
                "in_range": bool(inside),
            }
            for c, p, q, inside in lower
        ],
        "exponents": {"approach3": _difference(three), "approach2": two and _difference(two)},
        "tests": {
            name: _test(test) for name, test in zip(("exponents", "E"), found.tests, strict=True)
        },
    }


def _budgets(m: Multiplier) -> list[dict[str, Any]]:
    return [
        {
            "flops": float(m.flops[k]),
            "other_flops": _number(m.equal[k]),
            "value": _multiple(m.value[k]),
            "median": _multiple(m.median[k]),
            "interval": [_multiple(end) for end in m.interval_2xK[:, k]],
            "never": float(m.never[k]),
            "in_range": bool(m.in_range[k]),
            "interpolated": {"value": float(m.interpolated[k]), "interval": ends}
            if np.isfinite(m.interpolated[k])
            else None,
        }
        for k, ends in enumerate(m.interpolated_interval)
    ]


def _curve(m: Multiplier) -> dict[str, Any]:
    return {
        "flops": m.flops.tolist(),
        "value": [_multiple(v) for v in m.value],
        "median": [_multiple(v) for v in m.median],
        "interval": [[_multiple(v) for v in ends] for ends in m.interval_2xK],
        "in_range": m.in_range.tolist(),
    }


def _difference(found: Difference) -> dict[str, Any]:
    return {
        "difference": found.value,
        "interval": found.interval,
        "significant": found.significant,
    }


def _test(found: SharedFit) -> dict[str, Any]:
    sides = zip(("baseline", "family"), found.laws, strict=True)
    return {
        "shared": list(found.names),
        "p": found.p,
        "statistic": found.statistic,
        "simulations": found.replicates,
        "gradient": found.gradient,
        "params": {
            side: {name: float(value) for name, value in dataclasses.asdict(law).items()}
            for side, law in sides
        },
    }


def _multiple(value: float) -> float | None:
    """None where a loss is never reached."""
    return None if value == 0 else _number(value)


def _number(value: float | NDArray[np.float64]) -> float | None:
    return float(value) if np.isfinite(value) else None
