"""Slices of accelerators by name. Imports no JAX.

`v5e-16` is the name in Google Cloud: v4, v5p and tpu7x count cores (two per chip), v5e and
v6e count chips. `2xv6e-256` is two such slices on the data-centre network, `h100-8` eight GPUs of
one host.
"""

import math
import re
from dataclasses import dataclass

from prime_jax.errors import UserError
from prime_jax.hardware.chips import CHIPS, GIB, MIB, Chip, generation_of
from prime_jax.settings import nearest


@dataclass(frozen=True)
class Slice:
    """The accelerators of a run.

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
        """Number of chips."""
        return self.devices // self.chip.per_chip

    @property
    def hosts(self) -> int:
        """Number of machines, each with one process."""
        return self.chips // self.chips_per_host

    @property
    def chips_per_host(self) -> int:
        """All GPUs of one machine; 4 TPUs, but up to 8 (2-D) if these are the whole slice."""
        chips = self.chips // self.slices
        single_host = 8 if self.chip.dimensions in (0, 2) else 4
        return chips if chips <= single_host else 4

    @property
    def machine_type(self) -> str:
        """Of the hosts of a TPU slice, e.g. `ct6e-standard-4t`."""
        return f"{self.chip.machine.family}-{self.chips_per_host}t"

    @property
    def sides(self) -> str:
        """Topology of one slice, e.g. `4x4`."""
        return "x".join(map(str, torus(self.chips // self.slices, self.chip.dimensions)))

    @property
    def topology(self) -> str:
        """One slice as the TPU compiler names it, e.g. `v5e:4x4`."""
        return f"{self.generation}:{self.sides}"


def parse(name: str) -> Slice:
    """The slice of a canonical or cloud name.

    Raises:
        UserError: another form, an unknown chip, or an unavailable size.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name.strip().lower())
    if not match:
        raise UserError(f"slice {name!r}: expected CHIP-N or KxCHIP-N, e.g. v5e-16 or 2xv6e-256")
    slices, generation, size = int(match[1] or 1), generation_of(match[2]), int(match[3])
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
                f"slice {name!r}: at most 8 GPUs per host; write {chips // 8}x{generation}-8"
            )
    elif chips & (chips - 1) or chips == 2 or chips > chip.largest:
        limit = chip.largest * unit
        raise UserError(
            f"slice {name!r}: {generation} has sizes {unit}, {4 * unit}, {8 * unit} ... {limit}"
        )
    return Slice(canonical, generation, slices, slices * size // chip.counted)


def torus(chips: int, dimensions: int) -> tuple[int, ...]:
    """The default topology of a slice, smallest side first, except 2x2x1 for 4 chips in 3-D."""
    if dimensions == 3 and chips == 4:
        return (2, 2, 1)
    exponent = round(math.log2(chips))
    sides = [exponent // dimensions + (i < exponent % dimensions) for i in range(dimensions)]
    return tuple(2**side for side in sorted(sides))


def human_bytes(n: float) -> str:
    """E.g. `12.89 GiB`, or `16.3 MiB` below 1 GiB."""
    return f"{n / GIB:.2f} GiB" if abs(n) >= GIB else f"{n / MIB:.1f} MiB"
