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

    def why_not(self, seal: dict[str, Any]) -> str | None:
        """What keeps a run that would make its steps on `made` from continuing at another run's
        seal: on what else those were made, or "" for other states; None if nothing does."""
        other = Lineage.of(seal)
        if other is None or other.trajectory != self.trajectory:
            return ""
        if seal["step"] > min(self.constant_steps, other.constant_steps):
            return ""
        if other.made is None:
            return "mixture of machines"
        names = [name for name, value in (self.made or {}).items() if other.made.get(name) != value]
        return ", ".join(names) or None


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
        "versions": versions | {"jax": jax.__version__},
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
