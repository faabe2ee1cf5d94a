"""Type checks for the fields of a `Sweep`, which a dataclass does not make."""

import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from prime_jax import experiment, flops
from prime_jax.config import RunConfig
from prime_jax.errors import UserError

T = TypeVar("T")  # Sweep, which imports this file


def _number(value: Any) -> bool:
    return _positive(value) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _each(fits: Callable[[Any], bool], values: Any) -> bool:
    once = isinstance(values, (str, Mapping, Iterator))
    return isinstance(values, Iterable) and not once and all(map(fits, values))


def _map(key: Callable[[Any], bool], value: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, Mapping) and all(key(k) and value(v) for k, v in values.items())


def _size(value: Any) -> bool:
    return _number(value) or (_each(_whole, value) and len(tuple(value)) == 3)


def _overrides(value: Any) -> bool:
    return _map(lambda key: isinstance(key, str), lambda _: True, value)


def _rule(value: Any) -> bool:
    return isinstance(value, str) or callable(value)


_RULE = ("the name of a rule, fixed:VALUE or a function", _rule)
_SIZES = "shapes (layers, width, heads) or numbers of parameters; or these by budget; or a function"
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # field -> (what it must be, check)
    "name": ("text", lambda value: isinstance(value, str)),
    "base": ("a RunConfig", lambda value: isinstance(value, RunConfig)),
    "families": (
        'label -> overrides, e.g. {"arm": {}, "mdm": {"optim.peak_lr": 1e-3}}',
        lambda value: _map(lambda key: isinstance(key, str), _overrides, value),
    ),
    "budgets": ("numbers of FLOPs above 0", lambda value: _each(_number, value)),
    "sizes": (
        _SIZES,
        lambda value: (
            callable(value)
            or _each(_size, value)
            or _map(_number, lambda sizes: _each(_size, sizes), value)
        ),
    ),
    "flops": (f"one of {', '.join(flops.CONVENTIONS)}", lambda value: value in flops.CONVENTIONS),
    "seeds": ("whole numbers", lambda value: _each(_whole, value)),
    "extra_seeds": (
        "budget -> whole numbers, e.g. {1e18: (1, 2)}",
        lambda value: _map(_number, lambda seeds: _each(_whole, seeds), value),
    ),
    "shape": _RULE,
    "batch": _RULE,
    "lr": _RULE,
    "warmup": _RULE,
    "epochs_limit": ("a number above 0", _positive),  # infinity: no run is flagged
}


def strict(sweep: T, where: str) -> T:
    """Check the types of the fields of `sweep`; its rows are checked later.

    Raises:
        UserError: with the first wrong field, its value and what is expected.
    """
    for name, (right, fits) in FIELDS.items():
        value = getattr(sweep, name)
        if not fits(value):
            raise UserError(f"{where}.{name} = {reprlib.repr(value)}: must be {right}")
    return replace(sweep, base=experiment.typed(sweep.base, f"{where}.base"))
