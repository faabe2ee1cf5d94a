"""The same runs under every count of N and C that they record: exponents, and D*/N*.

Counting the head, the embeddings or attention in N or in C moves the exponent a by as much as
families differ (theory.md, "FLOPs"). Where D*/N* is nearly the same at all budgets, that ratio is
a rule that one can carry to a larger budget; which count gives such a rule is a fact of the runs.
"""

import contextlib
import math
import typing
from dataclasses import replace

import numpy as np

from prime_jax.errors import UserError
from prime_jax.scaling import approach2
from prime_jax.scaling.approach3 import law_of
from prime_jax.scaling.fits import too_few, weighted_fit
from prime_jax.scaling.intervals import Ends, profiles
from prime_jax.scaling.laws import exponent, fit_compute, optimum
from prime_jax.scaling.points import Points, select
from prime_jax.scaling.readers import Progress, quiet
from prime_jax.scaling.results import Counted
from prime_jax.scaling.settings import Choice, Settings
from prime_jax.scaling.table import Table, number, status


def every(
    table: Table, choice: Choice, settings: Settings, progress: Progress = quiet
) -> dict[str, tuple[Counted, ...]]:
    """All counts by family; none where the table has but one.

    A count in which the runs cannot be read (FLOPs far from 6 N D) is left out.
    """
    flops, params = (_recorded(table, name) for name in ("flops", "params"))
    out: dict[str, list[Counted]] = {}
    if len(flops) * len(params) < 2:
        return {}
    for c in flops:
        for n in params:
            progress(f"counting N {n}, FLOPs {c}")
            with contextlib.suppress(UserError):
                runs = select(table, replace(choice, flops=c, params=n))
                for name, points in runs.families.items():
                    out.setdefault(name, []).append(_counted(c, n, points, settings))
    return {name: tuple(found) for name, found in out.items()}


def _recorded(table: Table, quantity: str) -> list[str]:
    """The conventions of a quantity that every finished run has a number in."""
    hint = next(a for a in typing.get_args(typing.get_type_hints(Choice)[quantity]) if a)
    done = [row for row in table.rows if status(row) in ("", "done")]
    columns = {name: f"{quantity}_{name}" for name in typing.get_args(hint)}
    return [
        name
        for name, column in columns.items()
        if column in table.columns and all(math.isfinite(number(row, column)) for row in done)
    ]


def _counted(flops: str, params: str, points: Points, settings: Settings) -> Counted:
    compute = fit_compute(points.flops, points.params, points.tokens)
    law = law_of(settings.law)[1]
    two = approach2.fit(points.of_isoflop(law), compute, settings.approach2)
    refused = any(warning.refusal for warning in points.diagnostics) or too_few(
        points, settings.law
    )
    if refused:
        return Counted(
            flops, params, a=None, profile=None, approach2=two.a, ratio=None, growth=None
        )
    p, fitted, _ = weighted_fit(points, settings)
    ends: Ends = profiles(p, fitted, [p.form.quantities(compute)["a"]], settings.level, points.run)[
        0
    ]
    best = optimum(fitted.law, compute, points.levels[[0, -1]])
    ratio = best.tokens / best.params
    growth = float(np.log(ratio[1] / ratio[0]) / np.log(best.flops[1] / best.flops[0]))
    return Counted(
        flops=flops,
        params=params,
        a=float(exponent(fitted.law, compute)),
        profile=ends,
        approach2=two.a,
        ratio=(float(ratio[0]), float(ratio[1])),
        growth=growth,
    )
