"""Every kind of accelerator that is known, one row each, and XLA's options for it. No JAX.

What a launcher, the roofline, the compiler's target or a kernel has to know about a generation is a
column here: a new chip is one more row of `CHIPS`, for which the constructor asks.
"""

import ctypes
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
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
        gke: Google Kubernetes Engine's label of the accelerator.
        counted: units of a slice's name per device.
        per_chip: devices per chip.
        matmul_efficiency: fraction of the peak that the products of well-kept programs reach.
        summed_whole: a reduce-scatter is made as an all-reduce, and cut.
        aliases: other names of the generation.
    """

    platform: ClassVar[Literal["tpu", "cuda"]]
    kind: str
    peak: float
    memory: float
    memory_speed: float
    link_speed: float
    network_speed: float
    dimensions: int
    gke: str
    counted: int = 1
    per_chip: int = 1
    matmul_efficiency: float = 0.6
    summed_whole: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def device_kind(self) -> str:
        """All of what JAX calls one."""
        return self.kind


@dataclass(frozen=True)
class Machine:
    """The virtual machines that hold TPUs, in the words of Compute Engine and GKE.

    Attributes:
        family: a type's name before the number of chips: `ct6e-standard` of `ct6e-standard-4t`.
        image: family of Google's images, where Compute Engine itself rents the machine, else "".
        disk: type of the boot disk, where the default one does not fit.
        policy: GKE places several hosts by a workload policy, not by a topology of the node pool.
    """

    family: str
    image: str = ""
    disk: str = ""
    policy: bool = False


@dataclass(frozen=True, kw_only=True)
class Tpu(Chip):
    """A TPU. VMEM, cores and matrix units are JAX's to tell (`pltpu.get_tpu_info`).

    Attributes:
        largest: chips of the largest slice.
        cloud: accelerator type before the size, and default runtime version, where the Cloud TPU
            API rents it as virtual machines.
        compiler: options of the compiler's topology, beside its name and shape.
    """

    platform = "tpu"
    largest: int
    cloud: tuple[str, str] | None
    machine: Machine
    compiler: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """An NVIDIA GPU. The columns from `full_name` on describe it to XLA's compiler.

    Attributes:
        sky: its name in SkyPilot.
        capability: CUDA's compute capability.
        cores: streaming multiprocessors; units: float32 units of each.
        shared_core: bytes of shared memory per core; shared_block: and at most per block.
        cache: bytes of L2.
    """

    platform = "cuda"
    sky: str
    full_name: str
    capability: tuple[int, int]
    cores: int
    units: int
    shared_core: int
    shared_block: int
    cache: int
    gigahertz: float

    @property
    def device_kind(self) -> str:
        return self.full_name


# Peaks, HBM and links: Cloud TPU's page of each version ("ICI bandwidth", in bits, counts one way)
# and NVIDIA's data sheets and CUDA programming guide. `memory` of TPUs: the limit in the compiler's
# own out-of-memory message (libtpu 0.0.42). Network: the hosts' cards divided by their chips.
# Matrix products: public dense trainings (MaxText reports 65 % on v5p and 44-50 % on v6e for 8B to
# 70B parameters). `cloud`: Cloud TPU's page of each version; `machine`: docs/gce.md names the pages.
# `summed_whole`: the programs that the compiler makes (on v5e from 16 chips on).
OF_V5P_V6E = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"
OF_TPU7X = "ubuntu-accel-2404-amd64-tpu-tpu7x"
CHIPS: dict[str, Chip] = {
    "v4": Tpu(
        kind="TPU v4",
        peak=275e12,
        memory=30.75 * GIB,
        memory_speed=1.228e12,
        link_speed=300e9,
        network_speed=6.25e9,
        dimensions=3,
        gke="tpu-v4-podslice",
        counted=2,
        summed_whole=True,
        largest=4096,
        cloud=("v4", "tpu-ubuntu2204-base"),
        machine=Machine("ct4p-hightpu"),
        compiler=(("chip_config_name", "megacore"),),  # two cores are one device, as in the cloud
    ),
    "v5e": Tpu(
        kind="TPU v5 lite",
        peak=197e12,
        memory=15.75 * GIB,
        memory_speed=819e9,
        link_speed=200e9,
        network_speed=3.125e9,
        dimensions=2,
        gke="tpu-v5-lite-podslice",
        summed_whole=True,
        aliases=("v5litepod", "v5lite"),
        largest=256,
        cloud=("v5litepod", "v2-alpha-tpuv5-lite"),
        machine=Machine("ct5lp-hightpu"),
    ),
    "v5p": Tpu(
        kind="TPU v5",
        peak=459e12,
        memory=95.74 * GIB,
        memory_speed=2.765e12,
        link_speed=600e9,
        network_speed=6.25e9,
        dimensions=3,
        gke="tpu-v5p-slice",
        counted=2,
        summed_whole=True,
        largest=8192,
        cloud=("v5p", "v2-alpha-tpuv5"),
        machine=Machine("ct5p-hightpu", OF_V5P_V6E),
    ),
    "v6e": Tpu(
        kind="TPU v6 lite",
        peak=918e12,
        memory=31.25 * GIB,
        memory_speed=1.64e12,
        link_speed=400e9,
        network_speed=12.5e9,
        dimensions=2,
        gke="tpu-v6e-slice",
        matmul_efficiency=0.5,
        aliases=("trillium",),
        largest=256,
        cloud=("v6e", "v2-alpha-tpuv6e"),
        machine=Machine("ct6e-standard", OF_V5P_V6E, "hyperdisk-balanced"),
    ),
    "tpu7x": Tpu(
        kind="TPU7x",
        peak=1153e12,
        memory=94.75 * GIB,
        memory_speed=3.69e12,
        link_speed=300e9,
        network_speed=6.25e9,
        dimensions=3,
        gke="tpu7x",
        per_chip=2,
        matmul_efficiency=0.45,
        aliases=("v7x", "ironwood"),
        largest=8192,
        cloud=None,
        machine=Machine("tpu7x-standard", OF_TPU7X, "hyperdisk-balanced", policy=True),
    ),
    "a100": Gpu(
        kind="NVIDIA A100",
        peak=312e12,
        memory=85_100_068_864,
        memory_speed=2.039e12,
        link_speed=300e9,
        network_speed=25e9,
        dimensions=0,
        gke="nvidia-a100-80gb",
        sky="A100-80GB",
        full_name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        units=64,
        shared_core=167936,
        shared_block=166912,
        cache=40 * MIB,
        gigahertz=1.41,
    ),
    "h100": Gpu(
        kind="NVIDIA H100",
        peak=989e12,
        memory=84_942_979_072,
        memory_speed=3.352e12,
        link_speed=450e9,
        network_speed=50e9,
        dimensions=0,
        gke="nvidia-h100-80gb",
        sky="H100",
        full_name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        units=128,
        shared_core=233472,
        shared_block=232448,
        cache=50 * MIB,
        gigahertz=1.98,
    ),
    "h200": Gpu(
        kind="NVIDIA H200",
        peak=989e12,
        memory=150_754_820_096,
        memory_speed=4.8e12,
        link_speed=450e9,
        network_speed=50e9,
        dimensions=0,
        gke="nvidia-h200-141gb",
        sky="H200",
        full_name="NVIDIA H200",
        capability=(9, 0),
        cores=132,
        units=128,
        shared_core=233472,
        shared_block=232448,
        cache=50 * MIB,
        gigahertz=1.98,
    ),
}

ASYNC_GATHER = (
    "xla_enable_async_all_gather",
    "xla_tpu_prefer_async_allgather_to_allreduce",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
)


def generation_of(name: str) -> str:
    """The key of `CHIPS` for a name or an alias; the name itself where there is none."""
    named = {alias: key for key, chip in CHIPS.items() for alias in chip.aliases}
    return named.get(name, name)


def tpus() -> list[str]:
    """The generations of TPUs, oldest first."""
    return [name for name, chip in CHIPS.items() if chip.platform == "tpu"]


def of_device(device_kind: str) -> Chip | None:
    """The chip of a `device_kind`; None for CPUs and whatever is not in the table."""
    found = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(found, key=lambda chip: len(chip.kind)) if found else None


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device, or None where it is not known (CPUs): MFU is then not reported."""
    chip = of_device(device_kind)
    return chip and chip.peak


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
