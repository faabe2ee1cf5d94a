"""Settings: dataclass fields that say what they are for and which values they take.

The one declaration behind Python experiments, JSON rows, flags and their help. A class that
derives from `Checked` refuses wrong values where they are written.
"""

import dataclasses
import difflib
import functools
import math
import operator
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, TypeVar

from prime_jax.errors import UserError

T = TypeVar("T")

REQUIRED: Any = dataclasses.MISSING  # the default of a setting that has none
SINGULAR = {int: "an integer", float: "a number", str: "text", bool: "True or False"}
PLURAL = {int: "integers", float: "numbers", str: "texts"}


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    **metadata: Any,
) -> Any:
    """A field with its default, its text and the range of its numbers (of each, where it has many).

    Args:
        default: a value, a function that makes one, or REQUIRED.
        metadata: `takes`, in words what the value must be, where the type does not say it;
            `infinite=True` allows infinity; `prime_jax.cli.parse` and `config` know more.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    made: dict[str, Any] = {"metadata": {"help": help, "limits": limits, **metadata}}
    return dataclasses.field(
        **made, **({"default_factory": default} if callable(default) else {"default": default})
    )


class Checked:
    """Base of frozen dataclasses that check their types and ranges when they are made.

    `class ModelConfig(Checked, path="model")` calls its settings `model.NAME` in errors.
    """

    _path = ""

    def __init_subclass__(cls, path: str | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        if path is not None:
            cls._path = path

    @classmethod
    def called(cls, name: str) -> str:
        """What errors call a setting."""
        return f"{cls._path}.{name}" if cls._path else name

    def __post_init__(self) -> None:
        check(self)


class Flags(Checked):
    """Settings that people know as flags of a command: `--top-k` is what errors call `top_k`."""

    @classmethod
    def called(cls, name: str) -> str:
        return f"--{name.replace('_', '-')}"


@functools.cache
def hints(cls: type) -> Mapping[str, Any]:
    """The types of a dataclass's settings by name."""
    found = typing.get_type_hints(cls)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def check(instance: Any, path: str = "") -> None:
    """Hold every setting against its type and range; `1` for a float becomes `1.0`, lists tuples.

    Args:
        path: goes before the names of settings in errors; by default what `Checked` says.

    Raises:
        UserError: the first setting that is wrong, its value and what would be right.
    """
    for field in dataclasses.fields(instance):
        value = check_value(type(instance), field, getattr(instance, field.name), path)
        object.__setattr__(instance, field.name, value)


def check_value(cls: type, field: dataclasses.Field, value: Any, path: str = "") -> Any:
    """One setting of `cls` as `check` holds it, in the form of its type."""
    named = cls.called(field.name) if issubclass(cls, Checked) else field.name
    name = f"{path}.{field.name}" if path else named
    value = _conform(hints(cls)[field.name], value, name, field)
    _check_range(field, value, name)
    return value


HOLDS: dict[str, Callable[[float, float], bool]] = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def _check_range(field: dataclasses.Field, value: Any, name: str) -> None:
    limits, infinite = field.metadata.get("limits", {}), field.metadata.get("infinite", False)
    for number in _numbers(value):
        finite = not math.isnan(number) and (infinite or abs(number) != math.inf)
        if not (finite and all(HOLDS[test](number, limit) for test, limit in limits.items())):
            right = [] if finite else ["finite" if limits else "a finite number"]
            right += [range_of(field)] if limits else []
            raise UserError(f"{_told(name, number)}: must be {' and '.join(right)}")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping):
        yield from _numbers([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)


def range_of(field: dataclasses.Field | None) -> str:
    """The range of a setting's numbers in words, empty for none."""
    limits = dict(field.metadata.get("limits", {})) if field else {}
    if {"at_least", "at_most"} <= limits.keys():
        return f"between {limits['at_least']} and {limits['at_most']}"
    return " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items())


def _told(name: str, value: Any) -> str:
    """A setting and its value: as on a command line where it is a flag, else as in Python."""
    return f"{name} {value}" if name.startswith("-") else f"{name} = {value}"


def _conform(hint: Any, value: Any, name: str, field: dataclasses.Field | None = None) -> Any:
    """`value` as a setting of type `hint` holds it.

    Raises:
        UserError: it is of another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    within = lambda hint, part: _conform(hint, part, name)  # noqa: E731
    try:
        if hint is Any:
            return value
        if dataclasses.is_dataclass(hint):
            if isinstance(value, hint):
                return value
            if isinstance(value, Mapping):
                return _build(hint, value, name)
        elif origin is Literal:
            if any(value == arg and type(value) is type(arg) for arg in args):
                return value
        elif origin in (typing.Union, types.UnionType):
            return _first(args, value, name)
        elif origin is tuple:
            if isinstance(value, (list, tuple)):
                if args[-1] is Ellipsis:
                    return tuple(within(args[0], part) for part in value)
                return tuple(within(a, part) for a, part in zip(args, value, strict=True))
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            if isinstance(value, Mapping):
                return {within(args[0], k): within(args[1], v) for k, v in value.items()}
        elif origin is Sequence:
            once = isinstance(value, (str, Mapping, Iterator))
            if isinstance(value, Iterable) and not once:
                return tuple(within(args[0], part) for part in value)
        elif origin is Callable or hint is Callable:
            if callable(value):
                return value
        elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif hint is int and isinstance(value, bool):
            pass
        elif isinstance(hint, type) and isinstance(value, hint):
            return value
    except (ValueError, OverflowError, _WrongPart):
        pass
    if field is None:
        raise _WrongPart(_wrong(name, value, hint, None))
    raise UserError(_wrong(name, value, hint, field))


class _WrongPart(UserError):
    """A part of a value is of another type: the message should show the whole."""


def _first(options: Iterable[Any], value: Any, name: str) -> Any:
    for option in options:
        try:
            return _conform(option, value, name)
        except _WrongPart:
            continue
    raise _WrongPart(name)


def _wrong(name: str, value: Any, hint: Any, field: dataclasses.Field | None) -> str:
    shown = value if name.startswith("-") else reprlib.repr(value)
    return f"{_told(name, shown)}: must be {_allowed(hint, field)}"


def _allowed(hint: Any, field: dataclasses.Field | None) -> str:
    """What a setting takes, in words."""
    if field and "takes" in field.metadata:
        return field.metadata["takes"]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    limits = range_of(field)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (typing.Union, types.UnionType):
        words = [_allowed(arg, field) for arg in args if arg is not type(None)]
        return " or ".join(words)
    if origin in (tuple, Sequence):
        inner = typing.get_origin(args[0])
        if inner is Literal:
            return f"any of {', '.join(map(str, typing.get_args(args[0])))}"
        words = PLURAL.get(args[0], f"any number of {args[0]}")
        return f"{words}, each {limits}" if limits else words
    if dataclasses.is_dataclass(hint):
        return f"a {hint.__name__}, or an object with its fields"
    if isinstance(hint, type) and issubclass(hint, PurePath):
        return "a path"
    words = SINGULAR.get(hint, getattr(hint, "__name__", str(hint)))
    return f"{words}, {limits}" if limits else words


def allowed(cls: type, path: str) -> str:
    """What a dotted setting of `cls` takes, in words, with its range."""
    owner, field = find(cls, path)
    return _allowed(hints(owner)[field.name], field)


def find(cls: type, path: str) -> tuple[type, dataclasses.Field]:
    """The class that declares a dotted setting of `cls`, and its field.

    Raises:
        UserError: there is none; says the nearest.
    """
    *outer, last = path.split(".")
    for place, name in enumerate(outer):
        inner = hints(cls).get(name)
        if inner is not None and not dataclasses.is_dataclass(inner):
            here = ".".join(outer[: place + 1])
            raise UserError(f"{path}: {here} is one value, without settings inside")
        if inner is None:
            raise UserError(f"{path}: no such setting{nearest(name, hints(cls))}")
        cls = inner
    for field in dataclasses.fields(cls):
        if field.name == last:
            return cls, field
    raise UserError(f"{path}: no such setting{nearest(last, hints(cls))}")


def read(hint: Any, words: Sequence[str]) -> Any:
    """A value of type `hint` from the words of a command line.

    Raises:
        ValueError: they are none.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return tuple(read(args[0], [word]) for word in words)
    (word,) = words
    if origin in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        return None if word == "None" else read(inner, words)
    if origin is Literal:
        return {str(arg): arg for arg in args}.get(word, word)
    if hint is bool:
        known = {"true": True, "false": False}
        if word.lower() not in known:
            raise ValueError(word)
        return known[word.lower()]
    return hint(word)


def to_dict(
    instance: Any, keep: Callable[[dataclasses.Field, Any], bool] = lambda field, value: True
) -> dict[str, Any]:
    """Nested plain dict of a dataclass, of those settings that are to be kept."""
    out = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if keep(field, value):
            if dataclasses.is_dataclass(value):
                value = to_dict(value, keep)
            out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Strict inverse of `to_dict`; missing keys take their defaults.

    A class may list settings that are gone, with the one value that is left of them, in
    RETIRED: at that value they are passed over.

    Args:
        where: what is read, for errors.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    try:
        return _build(cls, values, "")
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


def _build(cls: type[T], values: Any, path: str) -> T:
    if not isinstance(values, Mapping):
        name = f"{path} = {reprlib.repr(values)}: " if path else ""
        raise UserError(f"{name}expected an object with the fields of {cls.__name__}")
    known: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    retired = getattr(cls, "RETIRED", {})
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if key in fields:
            known[key] = _conform(hints(cls)[key], value, name, fields[key])
        elif key not in retired:
            raise UserError(f"{name}: no such setting{nearest(str(key), fields)}")
        elif value != retired[key]:
            left = retired[key]
            raise UserError(f"{name} = {value!r}: a retired setting; only {left!r} is left of it")
    if missing := [name for name, field in fields.items() if required(field) and name not in known]:
        raise UserError(f"missing {', '.join(f'{path}.{n}' if path else n for n in missing)}")
    return cls(**known)


def required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def default(field: dataclasses.Field) -> Any:
    """The default of a field that has one."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def set_path(instance: T, path: str, value: Any) -> T:
    """`instance` with one dotted setting replaced: `set_path(run, "model.width", 256)`."""
    owner, field = find(type(instance), path)
    value = _conform(hints(owner)[field.name], value, path, field)
    head, _, rest = path.partition(".")
    new = set_path(getattr(instance, head), rest, value) if rest else value
    return dataclasses.replace(instance, **{head: new})  # type: ignore[type-var]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.width": 128, ...} of a nested dict."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        out |= inner if inner is not None else {prefix + key: value}
    return out


def nearest(key: str, valid: Iterable[str]) -> str:
    """A hint to append to "no such ...": the closest valid name, or all of them."""
    valid = list(valid)
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid are {', '.join(valid)}"
