"""Partition this machine's GPUs or TPU chips among several workers. Imports no JAX.

A JAX process takes every accelerator that it sees, so concurrent workers must see different ones.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from prime_jax.errors import UserError


def partition(
    workers: int, environment: Mapping[str, str] = os.environ, system: Path = Path("/")
) -> list[dict[str, str]]:
    """Environment variables of each worker; none on a machine without accelerators.

    Raises:
        UserError: more workers than GPUs, or a number of TPU chips that cannot be divided.
    """
    if environment.get("JAX_PLATFORMS") == "cpu":
        return [{}] * workers
    if gpus := _gpus(environment, system):
        if workers > len(gpus):
            raise UserError(
                f"{workers} workers, but {len(gpus)} GPUs: each worker needs its own (or set "
                "JAX_PLATFORMS=cpu)"
            )
        return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i::workers])} for i in range(workers)]
    if chips := _chips(system):
        if workers not in (1, chips):
            raise UserError(f"{workers} workers, but {chips} TPU chips: start 1 worker or {chips}")
        if workers > 1:
            return [_chip(i) for i in range(workers)]
    return [{}] * workers


def _gpus(environment: Mapping[str, str], system: Path) -> list[str]:
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(i) for i, _ in enumerate(system.glob("proc/driver/nvidia/gpus/*"))]


def _chips(system: Path) -> int:
    return len([*system.glob("dev/accel[0-9]*"), *system.glob("dev/vfio/[0-9]*")])


def _chip(index: int) -> dict[str, str]:
    """Variables with which libtpu uses one chip only."""
    return {
        "TPU_VISIBLE_CHIPS": str(index),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
