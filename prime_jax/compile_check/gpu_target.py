"""Descriptions of NVIDIA GPUs for XLA's CUDA compiler, which then needs no GPU or driver."""

import importlib.metadata
from typing import Any

from prime_jax.errors import UserError
from prime_jax.hardware.chips import Gpu
from prime_jax.hardware.slices import Slice

PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


def devices(slice_: Slice) -> list[Any]:
    """The GPUs of a slice.

    Raises:
        UserError: no CUDA compiler on this machine.
    """
    from jax.experimental import topologies

    if not any(_installed(plugin) for plugin in PLUGINS):
        raise UserError(
            "no CUDA compiler on this machine; install it with: pip install 'prime_jax[cuda]'"
        )
    each = slice_.devices // slice_.slices
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"{slice_.slices}x1x{each}",
        target_config=text(slice_.chip),
    )
    return list(found.devices)


def text(chip: Gpu) -> str:
    """XLA's GpuTargetConfigProto, as text."""
    major, minor = chip.capability
    extra = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""gpu_device_info {{
  name: "{chip.full_name}" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} {extra} }}
  core_count: {chip.cores} fpus_per_core: {chip.units} clock_rate_ghz: {chip.gigahertz}
  threads_per_core_limit: 2048 threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_core: {chip.shared_core} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {chip.shared_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {round(chip.memory_speed)} l2_cache_size: {chip.cache} device_memory_size: {round(chip.memory)}
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.full_name}"
"""


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
