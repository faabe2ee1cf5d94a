"""Analysis of HLO text: collectives between devices, large arrays.

Loop bodies count once per iteration: a scan over layers has its collectives once per layer. The
text is that of a compiled program or, if compilation fails, of the lowered program.
"""

import math
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
VIEWS = ("parameter", "get-tuple-element", "tuple", "while", "bitcast", "conditional", "call")
# In a lowered program: operations whose results fusion does not remove.
NOT_FUSED = ("dot", "convolution", "custom-call", "scatter", "dynamic-update-slice", "all-gather")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(:[^}]*)?\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """Collectives of one kind in a step.

    Attributes:
        count: number of executions, including loops.
        bytes: sent per device in all of them, with the bandwidth-optimal algorithm.
        background: bytes of these that are overlapped with computation.
    """

    kind: str
    count: int
    bytes: float
    background: float


class Array(NamedTuple):
    bytes: float
    shape: str
    source: str  # the operation that made it


class _Instruction(NamedTuple):
    name: str
    shapes: str  # of the result
    opcode: str
    rest: str


def collectives(text: str) -> list[Collective]:
    """Collectives by kind, in descending order of bytes."""
    computations = _computations(text)
    count, chains = dict.fromkeys(KINDS, 0), set()
    total, background = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for name, times in _executions(computations, _entry(text)).items():
        for i in computations[name]:
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            # An asynchronous collective appears in every operation that it overlaps.
            chain = re.search(r'chain_id="(\d+)"', i.rest)
            if chain and (kind, chain[1]) in chains:
                continue
            if chain:
                chains.add((kind, chain[1]))
            count[kind] += times
            sent = times * _sent(kind, i)
            total[kind] += sent
            background[kind] += sent if chain or kind != i.opcode else 0
    found = [Collective(k, count[k], total[k], background[k]) for k in KINDS if count[k]]
    return sorted(found, key=lambda collective: -collective.bytes)


def largest(text: str, opcodes: Collection[str] = ()) -> Array | None:
    """The largest array that an operation outside of fusions writes to memory.

    Args:
        opcodes: restrict to these operations; all by default.
    """
    computations, best = _computations(text), None
    fused = {i_called for body in computations.values() for i in body for i_called in _fused(i)}
    for name, body in computations.items():
        for i in body if name not in fused else ():
            if i.opcode in VIEWS or (opcodes and i.opcode not in opcodes):
                continue
            for dtype, dims, order, layout in _ARRAY.findall(i.shapes):
                size = _size(dtype, dims, order, layout)
                if "S(" not in layout and (best is None or size > best.bytes):
                    source = re.search(r'op_name="([^"]*)"', i.rest)
                    best = Array(size, f"{dtype}[{dims}]", source[1] if source else i.name)
    return best


def _fused(i: _Instruction) -> list[str]:
    return _CALLED.findall(i.rest) if i.opcode not in ("while", "call") else []


def _computations(text: str) -> dict[str, list[_Instruction]]:
    out: dict[str, list[_Instruction]] = {}
    body: list[_Instruction] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            body = out.setdefault(header[1], [])
        elif (found := _INSTRUCTION.match(line)) and (opcode := _OPCODE.search(found[2])):
            shapes, rest = found[2][: opcode.start(1)], found[2][opcode.start(1) :]
            body.append(_Instruction(found[1], shapes, opcode[1], rest))
    return out


def _entry(text: str) -> str:
    return re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)[1]


def _executions(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, int]:
    """Number of executions of every computation in one call of the program."""
    out: dict[str, int] = {}
    waiting = [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        out[name] = out.get(name, 0) + times
        for i in computations.get(name, ()):
            n = times * _trips(computations, i) if i.opcode == "while" else times
            called = _CALLED.findall(i.rest)
            for branches in _BRANCHES.findall(i.rest):
                called += [branch.strip(" %") for branch in branches.split(",")]
            waiting += [(c, n) for c in called if c in computations]
    return out


def _trips(computations: dict[str, list[_Instruction]], loop: _Instruction) -> int:
    """Trip count of a loop: annotated by the compiler, or the constant in its condition."""
    if known := re.search(r'known_trip_count\D*"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = computations.get(condition[1], ()) if condition else ()
    limits = [re.match(r"constant\((\d+)\)", i.rest) for i in body if i.opcode == "constant"]
    return max((int(limit[1]) for limit in limits if limit), default=1)


def _sent(kind: str, i: _Instruction) -> float:
    n = _group(i.rest)
    size = sum(_size(dtype, dims) for dtype, dims, *_ in _ARRAY.findall(i.shapes))
    if i.opcode == "all-gather-start":  # its result includes the operands
        size *= n / (n + 1)
    elif i.opcode == "collective-permute-start":
        size /= 2
    if kind == "reduce-scatter":
        return size * (n - 1)
    if kind == "collective-permute":
        return size
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group(rest: str) -> int:
    """Devices of a replica group, written `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['a'=2] {'a'}`."""
    if over := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", over[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", over[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return listed[1].count(",") + 1 if listed else 1


def _size(dtype: str, dims: str, order: str = "", layout: str = "") -> float:
    """Bytes of an array; with a layout, padded to its tiles."""
    sides = [int(d) for d in dims.split(",") if d]
    tile = re.search(r"T\(([\d,]+)\)", layout)
    if tile and order and len(sides) > 1:
        minor_first = [int(d) for d in order.split(",")]
        for d, unit in _zip_tiles(minor_first, tile[1]):
            sides[d] = math.ceil(sides[d] / unit) * unit
    return BYTES.get(dtype, 0) * math.prod(sides)


def _zip_tiles(minor_first: list[int], tile: str) -> Iterator[tuple[int, int]]:
    yield from zip(minor_first, reversed([int(unit) for unit in tile.split(",")]), strict=False)
