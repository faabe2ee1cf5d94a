"""One program of `prime-jax kernels check`: a kernel's forward or backward pass at given shapes.

Each Pallas module has `cases(chip, width, vocab_size) -> list[Case]`, forward and backward
separately, in bfloat16, with the block sizes for `chip` (one of `CHIPS`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

DEVICE_KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
}
CHIPS = tuple(DEVICE_KINDS)


@dataclass(frozen=True)
class Case:
    """A function to compile for one chip.

    Attributes:
        name: kernel, direction and shape, e.g. `head backward D=1024 V=51200`.
        function: takes `arguments`; must not choose its implementation by the default backend.
        arguments: `jax.ShapeDtypeStruct`s (any tree).
        options: shown in the report, e.g. {"blocks": (512, 1024)}.
        mosaic_calls: minimum number of Mosaic kernels in the compiled program.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    mosaic_calls: int = 1
