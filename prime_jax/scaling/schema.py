"""Result objects are the schema: a dataclass is written to JSON field by field, and read in docs.

A field made by `key` says what it holds; that text is the documentation of the JSON. Fields made by
`hidden` (draws, data, what a later question needs) stay in memory.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def key(text: str, **default: Any) -> Any:
    """A field that is written, and what it holds."""
    return dataclasses.field(metadata={"doc": text}, **default)


def hidden(**default: Any) -> Any:
    """A field that is not written."""
    return dataclasses.field(metadata={"hidden": True}, repr=False, compare=False, **default)


def as_dict(value: Any) -> Any:
    """Plain JSON: arrays as lists, numbers that are none as null. `from_` is the key "from"."""
    if dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if not f.metadata.get("hidden")]
        return {f.name.rstrip("_"): as_dict(getattr(value, f.name)) for f in fields}
    if isinstance(value, Mapping):
        return {name: as_dict(part) for name, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return [as_dict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fields_of(cls: type, place: str = "") -> Iterator[tuple[str, str]]:
    """Every field that says what it holds, with its place: ("families.F.approach3.a", text)."""
    types_of = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata.get("hidden"):
            continue
        name = f"{place}{field.name.rstrip('_')}"
        if "doc" in field.metadata:
            yield name, field.metadata["doc"]
        for inner, step in _inner(types_of[field.name]):
            yield from fields_of(inner, f"{name}{step}.")


def _inner(kind: Any) -> Iterator[tuple[type, str]]:
    """The dataclasses of a type, and how they are reached: "" or a key "F" or an index "[]"."""
    if dataclasses.is_dataclass(kind):
        yield kind, ""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        for part in parts:
            yield from _inner(part)
    elif origin is dict:
        yield from ((inner, f".F{step}") for inner, step in _inner(parts[1]))
    elif origin in (tuple, list):
        yield from ((inner, f"[]{step}") for inner, step in _inner(parts[0]))


def table_of(cls: type) -> str:
    """The fields as a table of a Markdown page."""
    rows = [f"| `{place}` | {text} |" for place, text in fields_of(cls)]
    return "\n".join(["| field | what |", "|---|---|", *rows])
