"""Slices of accelerators by name, and what their chips can do. No JAX.

`v5e-16` is the name that Google's Cloud uses: v4, v5p and tpu7x count cores (two per chip), v5e and
v6e count chips. `2xv6e-256` is two such slices on the data-centre network, `h100-8` eight GPUs of
one host.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from prime_jax.errors import UserError
from prime_jax.settings import nearest


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts it: a chip, but on TPU7x one of its two cores.

    Attributes:
        kind: `device_kind` of JAX, from its beginning.
        peak: dense bfloat16 FLOP/s.
        memory: bytes of HBM that a program may use.
        memory_speed: bytes/s of HBM.
        link_speed: bytes/s out of a device inside its slice, all links together, one way.
        network_speed: bytes/s per device between slices or hosts of GPUs, one way.
        dimensions: of the torus; 0 for a switch.
        counted: units of the name per device.
        per_chip: devices per chip.
    """

    kind: str
    platform: Literal["tpu", "cuda"]
    peak: float
    memory: float
    memory_speed: float
    link_speed: float
    network_speed: float
    dimensions: int
    counted: int = 1
    per_chip: int = 1


MIB, GIB = 2**20, 2**30
# Peaks, HBM and links: Cloud TPU's page of each version ("ICI bandwidth", in bits, counts one way)
# and NVIDIA's data sheets. `memory` of TPUs: the limit in the compiler's own out-of-memory
# message (libtpu 0.0.42). Network: the hosts' cards divided by their chips.
CHIPS = {
    "v4": Chip(
        kind="TPU v4",
        platform="tpu",
        peak=275e12,
        memory=30.75 * GIB,
        memory_speed=1.228e12,
        link_speed=300e9,
        network_speed=6.25e9,
        dimensions=3,
        counted=2,
    ),
    "v5e": Chip(
        kind="TPU v5 lite",
        platform="tpu",
        peak=197e12,
        memory=15.75 * GIB,
        memory_speed=819e9,
        link_speed=200e9,
        network_speed=3.125e9,
        dimensions=2,
    ),
    "v5p": Chip(
        kind="TPU v5",
        platform="tpu",
        peak=459e12,
        memory=95.74 * GIB,
        memory_speed=2.765e12,
        link_speed=600e9,
        network_speed=6.25e9,
        dimensions=3,
        counted=2,
    ),
    "v6e": Chip(
        kind="TPU v6 lite",
        platform="tpu",
        peak=918e12,
        memory=31.25 * GIB,
        memory_speed=1.64e12,
        link_speed=400e9,
        network_speed=12.5e9,
        dimensions=2,
    ),
    "tpu7x": Chip(
        kind="TPU7x",
        platform="tpu",
        peak=1153e12,
        memory=94.75 * GIB,
        memory_speed=3.69e12,
        link_speed=300e9,
        network_speed=6.25e9,
        dimensions=3,
        per_chip=2,
    ),
    "a100": Chip(
        kind="NVIDIA A100",
        platform="cuda",
        peak=312e12,
        memory=79.1 * GIB,
        memory_speed=2.04e12,
        link_speed=300e9,
        network_speed=25e9,
        dimensions=0,
    ),
    "h100": Chip(
        kind="NVIDIA H100",
        platform="cuda",
        peak=989e12,
        memory=79.1 * GIB,
        memory_speed=3.35e12,
        link_speed=450e9,
        network_speed=50e9,
        dimensions=0,
    ),
    "h200": Chip(
        kind="NVIDIA H200",
        platform="cuda",
        peak=989e12,
        memory=140.4 * GIB,
        memory_speed=4.8e12,
        link_speed=450e9,
        network_speed=50e9,
        dimensions=0,
    ),
}
ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "trillium": "v6e",
    "v7x": "tpu7x",
    "ironwood": "tpu7x",
}
LARGEST = {"v4": 4096, "v5e": 256, "v5p": 8192, "v6e": 256, "tpu7x": 8192}  # chips of a slice


@dataclass(frozen=True)
class Slice:
    """What a run is given.

    Attributes:
        name: canonical, e.g. `2xv6e-256`.
        generation: key of `CHIPS`.
        slices: groups joined by the data-centre network.
        devices: in all slices, as JAX counts them.
    """

    name: str
    generation: str
    slices: int
    devices: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """What is rented."""
        return self.devices // self.chip.per_chip

    @property
    def hosts(self) -> int:
        """Machines, each with a process of its own."""
        return self.chips // self.chips_per_host

    @property
    def chips_per_host(self) -> int:
        """All GPUs of one machine; 4 TPUs, but up to 8 of the flat kinds where they are all."""
        chips = self.chips // self.slices
        alone = 8 if self.chip.dimensions in (0, 2) else 4
        return chips if chips <= alone else 4

    @property
    def sides(self) -> str:
        """Of one slice, e.g. `4x4`."""
        return "x".join(map(str, torus(self.chips // self.slices, self.chip.dimensions)))

    @property
    def topology(self) -> str:
        """One slice as the TPU compiler names it, e.g. `v5e:4x4`."""
        return f"{self.generation}:{self.sides}"


def parse(name: str) -> Slice:
    """The slice of a canonical or cloud name.

    Raises:
        UserError: another form, an unknown chip, or a size that is not rented.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name.strip().lower())
    if not match:
        raise UserError(f"slice {name!r}: expected CHIP-N or KxCHIP-N, e.g. v5e-16 or 2xv6e-256")
    slices, generation, size = int(match[1] or 1), match[2], int(match[3])
    generation = ALIASES.get(generation, generation)
    if generation not in CHIPS:
        raise UserError(f"slice {name!r}: no such chip{nearest(generation, CHIPS)}")
    chip = CHIPS[generation]
    unit = chip.counted * chip.per_chip  # of the name, per chip
    chips = size // unit
    if slices < 1 or size < 1 or size % unit:
        counts = "cores, two per chip" if unit == 2 else "chips"
        raise UserError(f"slice {name!r}: {generation} counts {counts}")
    canonical = f"{slices}x" * (slices > 1) + f"{generation}-{size}"
    if chip.platform == "cuda":
        if chips > 8:
            raise UserError(
                f"slice {name!r}: at most 8 GPUs a host; write {chips // 8}x{generation}-8"
            )
    elif chips & (chips - 1) or chips == 2 or chips > LARGEST[generation]:
        limit = LARGEST[generation] * unit
        raise UserError(
            f"slice {name!r}: {generation} has sizes {unit}, {4 * unit}, {8 * unit} ... {limit}"
        )
    return Slice(canonical, generation, slices, slices * size // chip.counted)


def torus(chips: int, dimensions: int) -> tuple[int, ...]:
    """The usual sides of a slice, smallest first, except that 4 chips of a cube lie flat."""
    if dimensions == 3 and chips == 4:
        return (2, 2, 1)
    exponent = round(math.log2(chips))
    sides = [exponent // dimensions + (i < exponent % dimensions) for i in range(dimensions)]
    return tuple(2**side for side in sorted(sides))


def of_device(kind: str) -> Chip | None:
    """The chip of a `device_kind`; None for CPUs and whatever is not in the table."""
    found = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    return max(found, key=lambda chip: len(chip.kind)) if found else None


def human_bytes(n: float) -> str:
    """`12.89 GiB`, below one `16.3 MiB`."""
    return f"{n / GIB:.2f} GiB" if abs(n) >= GIB else f"{n / MIB:.1f} MiB"
