"""What the seal of a checkpoint says of the steps before it, and who may continue from it.

Runs of one trajectory (`config.trajectory_id`) are in the same state after each step that both make
before their learning rates leave the plateau: to the bit, if both make all of these steps alike, on
the same mesh, kind of device, kernels and versions. On a CPU that includes the number of cores,
among which XLA splits its sums.
"""

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import jax

Made = dict[str, Any]


@dataclass(frozen=True)
class Lineage:
    """Attributes:
    trajectory: of the run.
    constant_steps: of the run; later steps are its own.
    made: on what all of the steps were made (`made_on`); None if not all on the same, or unknown.
    donor: the run from whose checkpoint this one continued; empty if it did not.
    branch: after how many steps; 0 without a donor.
    """

    trajectory: str
    constant_steps: int
    made: Made | None
    donor: str = ""
    branch: int = 0

    @classmethod
    def of(cls, seal: Any) -> "Lineage | None":
        """Of a seal; None where it has none, as older ones."""
        try:
            known = seal["lineage"]
            return cls(**{name: known[name] for name in cls.__dataclass_fields__})
        except (KeyError, TypeError):
            return None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def passes(self, seal: dict[str, Any]) -> bool:
        """Whether a run comes through the state of another run's checkpoint, but for rounding."""
        other = Lineage.of(seal)
        if other is None or other.trajectory != self.trajectory:
            return False
        return seal["step"] <= min(self.constant_steps, other.constant_steps)

    def unlike(self, seal: dict[str, Any]) -> str:
        """In what the steps before a checkpoint were not made like those of this run; "" if alike."""
        other, mine = Lineage.of(seal), self.made
        if other is None or other.made is None or mine is None:
            return "mixture of machines"
        return ", ".join(name for name in mine if other.made.get(name) != mine[name])


def made_on(mesh: list[int], kernels: Made, versions: Made, **settings: Any) -> Made:
    """On what this process makes its steps, in JSON.

    Args:
        mesh: sizes of the axes.
        kernels: by name and blocks (`selection.record`).
        versions: of the program.
        settings: others by which numbers differ in rounding.
    """
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"{_processor()}, {_cores()} cores"
    return {
        "mesh": [*mesh, jax.process_count()],
        "device": kind,
        "kernels": kernels,
        "versions": versions | {"jax": jax.__version__, "runtime": device.client.platform_version},
        **settings,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.partition(":")[2].strip() for line in file if "model name" in line)
            return next(names, platform.machine())
    except OSError:
        return platform.machine()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
