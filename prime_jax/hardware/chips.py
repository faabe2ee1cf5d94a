"""Properties of device kinds: peak FLOP/s for MFU, compiler options, and heap settings of CPUs."""

import ctypes
import sys

# Dense bfloat16 FLOP/s per device as JAX names it (TPU v4 onwards: one device is one chip, TPU7x:
# one of its two cores). Vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}

ASYNC_GATHER = (
    "xla_enable_async_all_gather",
    "xla_tpu_prefer_async_allgather_to_allreduce",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
)


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device, or None if unknown (CPUs): MFU is then not reported."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def compiler_options(device_kind: str) -> dict[str, int]:
    """XLA options for a kind of device.

    On a CPU most time is in library matmuls: higher levels of LLVM save about 2 % of a step and
    take 50 % more compilation time. A TPU overlaps all-gathers with computation only with these
    options; without them the compiler even replaces the all-gathers on a three-dimensional torus by
    all-reduces of zeros, with twice the bytes.
    """
    if device_kind == "cpu":
        return {"xla_backend_optimization_level": 1}
    return dict.fromkeys(ASYNC_GATHER, True) if device_kind.startswith("TPU") else {}


def keep_heap() -> None:
    """Let glibc keep freed buffers: by default every step returns them to the kernel, and page
    faults take a third of a small step on a CPU. Does nothing on other systems."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # malloc.h
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(arena_max, 1)
