"""Descriptions of NVIDIA GPUs for XLA's CUDA compiler, which then needs no GPU or driver."""

import importlib.metadata
from typing import Any, NamedTuple

from prime_jax.errors import UserError
from prime_jax.hardware.slices import Slice

PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


class Spec(NamedTuple):
    """Values from NVIDIA's data sheets and the CUDA programming guide."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    shared_core: int  # bytes of shared memory per core
    shared_block: int  # and at most per block
    bandwidth: int
    cache: int  # bytes of L2
    gigahertz: float
    memory: int
    units: int  # float32 units per core


SPECS = {
    "a100": Spec(
        name="NVIDIA A100-SXM4-80GB", capability=(8, 0), cores=108, shared_core=167936, shared_block=166912, bandwidth=2_039_000_000_000, cache=40 << 20, gigahertz=1.41,
        memory=85_100_068_864, units=64,
    ),
    "h100": Spec(
        name="NVIDIA H100 80GB HBM3", capability=(9, 0), cores=132, shared_core=233472, shared_block=232448, bandwidth=3_352_000_000_000, cache=50 << 20, gigahertz=1.98,
        memory=84_942_979_072, units=128,
    ),
    "h200": Spec(
        name="NVIDIA H200", capability=(9, 0), cores=132, shared_core=233472, shared_block=232448, bandwidth=4_800_000_000_000, cache=50 << 20, gigahertz=1.98,
        memory=150_754_820_096, units=128,
    ),
}  # fmt: skip


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
        target_config=text(SPECS[slice_.generation]),
    )
    return list(found.devices)


def text(spec: Spec) -> str:
    """XLA's GpuTargetConfigProto, as text."""
    major, minor = spec.capability
    extra = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""gpu_device_info {{
  name: "{spec.name}" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} {extra} }}
  core_count: {spec.cores} fpus_per_core: {spec.units} clock_rate_ghz: {spec.gigahertz}
  threads_per_core_limit: 2048 threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_core: {spec.shared_core} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {spec.shared_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {spec.bandwidth} l2_cache_size: {spec.cache} device_memory_size: {spec.memory}
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{spec.name}"
"""


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
