"""One program of `prime-jax kernels check`: a kernel's forward or backward pass at given shapes.

Each Pallas module lists its own: `cases(chip, width, vocab_size) -> list[Case]`, forward and
backward apart, in bfloat16, at the block sizes that it would take on `chip` (a TPU of `hardware.chips.CHIPS`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A function to compile for one chip, on its own.

    Attributes:
        name: kernel, direction and shape, e.g. `head backward D=1024 V=51200`.
        function: takes `arguments`; must not choose its implementation by the default backend.
        arguments: `jax.ShapeDtypeStruct`s (any tree).
        options: what the report says about the choice, e.g. {"blocks": (512, 1024)}.
        mosaic_calls: Mosaic kernels that the compiled program must hold, at least.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    mosaic_calls: int = 1
