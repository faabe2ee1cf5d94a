"""`prime-jax doctor`: what this machine has, what is missing, and how to get it."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prime_jax import __version__
from prime_jax.cli.console import show
from prime_jax.cli.parse import Arguments
from prime_jax.table import Cell, Table

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "tyro")
OPTIONAL = {  # package -> (what it is for, how to get it)
    "torch": ("the baseline of benchmarks/train_step.py", "pip install torch"),
    "tokenizers": ("hf: tokenizers", "pip install 'prime_jax[tokenizers]'"),
    "tiktoken": ("tiktoken: tokenizers", "pip install 'prime_jax[tokenizers]'"),
    "gcsfs": ("gs:// paths", "pip install 'prime_jax[gcp]'"),
    "google-cloud-compute": ("sweep up --on gce", "pip install 'prime_jax[gcp]'"),
    "google-cloud-tpu": ("sweep up --on tpu", "pip install 'prime_jax[gcp]'"),
    "submitit": ("sweep up --on slurm", "pip install 'prime_jax[slurm]'"),
    "s3fs": ("s3:// paths", "pip install 'prime_jax[s3]'"),
    "tensorboard": ("fit on event files", "pip install 'prime_jax[tensorboard]'"),
    "tensorboardX": ("--log.tensorboard", "pip install 'prime_jax[tensorboard]'"),
    "wandb": ("--log.wandb", "pip install 'prime_jax[wandb]'"),
}
ACCELERATORS = {  # plug-in -> extra
    "jax-cuda13-plugin": "NVIDIA GPUs: pip install 'prime_jax[cuda]'",
    "libtpu": "Cloud TPU: pip install 'prime_jax[tpu]'; without a TPU: make test-tpu-compile",
}


STACK = "jax-ai-stack"  # a package of pins alone, https://jaxstack.ai

Row = tuple[str, str | Cell, str]  # what, what was found, a note


@dataclass(frozen=True)
class Doctor(Arguments):
    """Show what this machine has, what is missing and how to get it: versions, devices, memory,
    compilers and optional packages. Exit code 1 if a device or a required package is missing."""

    EXAMPLES = ("prime-jax doctor",)


def doctor(_: Doctor) -> int:
    parts: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        ("machine", _machine),
        ("package", _packages),
        ("device", _devices),
        ("kernel", kernel_rows),
        ("package", _optional),
        ("package", stack_rows),
    ]
    rows: list[Row] = []
    for what, part in parts:
        try:
            rows += part()
        except Exception as error:  # whatever is wrong with this machine is what was asked for
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append((what, Cell("unknown", style="bad"), text))
    show(Table(("what", "found", "note"), rows, title=f"prime-jax {__version__}"))
    return 1 if any(str(found) == "missing" for _, found, _ in rows) else 0


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Iterator[Row]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield "python", platform.python_version(), sys.executable
    yield "machine", platform.machine(), f"{os.cpu_count()} cores, {memory:.0f} GiB"


def _packages() -> Iterator[Row]:
    for package in REQUIRED:
        found = version(package)
        yield package, found or Cell("missing", style="bad"), "" if found else "make install"


def _devices() -> Iterator[Row]:
    """One row per kind of device that JAX sees, with its memory limit where it is known."""
    import jax

    from prime_jax.hardware.chips import peak_flops

    kinds: dict[str, list] = {}
    try:
        found = jax.devices()
    except Exception as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        text = " ".join(str(error).split()) or "JAX has no plug-in for it"
        why = f"JAX_PLATFORMS={asked}: {text}" if asked else text
        yield "device", Cell("missing", style="bad"), f"{why}; {'; '.join(ACCELERATORS.values())}"
        return
    for device in found:
        kinds.setdefault(device.device_kind, []).append(device)
    for kind, devices in kinds.items():
        limit = (devices[0].memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB each" if limit else ""
        peak = peak_flops(kind)
        speed = f", {peak / 1e12:.0f} TFLOP/s bfloat16 peak" if peak else ", peak unknown: no MFU"
        yield "device", f"{len(devices)} x {kind}{memory}{speed}", ""


def kernel_rows() -> Iterator[Row]:
    """What `auto` means for the heavy parts on this device: by default, and where measured."""
    import jax

    from prime_jax import tuned
    from prime_jax.config import DataConfig, RunConfig
    from prime_jax.kernels import selection

    kind = jax.devices()[0].device_kind
    choices, long = tuned.load(kind), RunConfig(data=DataConfig(seq_len=selection.SHORT))
    for kernel in selection.KERNELS:
        usual = selection.default(kernel, long, kind)
        yield f"kernel {kernel}", usual.implementation, usual.why
        for name, why in choices.wrong(kernel).items():
            yield f"kernel {kernel}", f"not {name}", f"measured: {why}"
    for row in choices.rows:
        shape = " ".join(f"{name}={value}" for name, value in row.shape.items())
        blocks = f" {row.blocks}" if row.blocks else ""
        found = f"{row.implementation}{blocks}"
        yield f"kernel {row.kernel}", found, f"measured: {row.why}; at {shape}"


def _optional() -> Iterator[Row]:
    for package, how in ACCELERATORS.items():
        yield package, version(package) or "-", "" if version(package) else how
    for package, (purpose, how) in OPTIONAL.items():
        found = version(package)
        yield package, found or "-", purpose if found else f"{purpose}: {how}"
    for compiler in ("gcc", "nvcc"):
        path = shutil.which(compiler)
        yield compiler, "yes" if path else "-", path or "not needed to run prime-jax"


def stack_rows() -> Iterator[Row]:
    """The JAX AI stack where it is installed, and which of its pins are too old or new for us."""
    found = version(STACK)
    if found is None:
        return
    needed = dict(_required("prime_jax"))
    wrong = [
        f"{name}{pin} (prime_jax needs {needed[name]})"
        for name, pin in _required(STACK)
        if name in needed and not all(needed[name].contains(one.version) for one in pin)
    ]
    note = f"it pins {', '.join(wrong)}: give it an environment of its own" if wrong else ""
    yield STACK, Cell(f"{found}: conflict", style="bad") if wrong else found, note


def _required(package: str) -> list[tuple[str, "SpecifierSet"]]:
    """What a package needs without extras."""
    from packaging.requirements import Requirement

    found = map(Requirement, importlib.metadata.requires(package) or ())
    return [(r.name, r.specifier) for r in found if "extra" not in str(r.marker)]
