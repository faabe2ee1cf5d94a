"""`prime-jax doctor`: what this machine has, what is missing, and how to get it."""

import importlib.metadata
import os
import platform
import shutil
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prime_jax import __version__

REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "tyro")
OPTIONAL = {  # package -> (what it is for, how to get it)
    "torch": ("the peer of benchmarks/train_step.py", "pip install torch"),
    "tokenizers": ("hf: tokenizers", "pip install 'prime_jax[tokenizers]'"),
    "tiktoken": ("tiktoken: tokenizers", "pip install 'prime_jax[tokenizers]'"),
    "gcsfs": ("gs:// paths", "pip install 'prime_jax[gcp]'"),
    "google-cloud-tpu": ("sweep up --on tpu", "pip install 'prime_jax[gcp]'"),
    "submitit": ("sweep up --on slurm", "pip install 'prime_jax[slurm]'"),
    "s3fs": ("s3:// paths", "pip install 'prime_jax[s3]'"),
    "tensorboardX": ("--log.tensorboard", "pip install 'prime_jax[tensorboard]'"),
    "wandb": ("--log.wandb", "pip install 'prime_jax[wandb]'"),
}
ACCELERATORS = {  # plug-in -> extra
    "jax-cuda13-plugin": "NVIDIA GPUs: pip install 'prime_jax[cuda]'",
    "libtpu": "Cloud TPU: pip install 'prime_jax[tpu]'; without a TPU: make test-tpu-compile",
}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def device_lines() -> list[str]:
    """One line per kind of device that JAX sees, with its memory limit where it is known."""
    import jax

    from prime_jax.hardware.chips import peak_flops

    kinds: dict[str, list] = {}
    for device in jax.devices():
        kinds.setdefault(device.device_kind, []).append(device)
    lines = []
    for kind, devices in kinds.items():
        limit = (devices[0].memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB each" if limit else ""
        peak = peak_flops(kind)
        speed = f", {peak / 1e12:.0f} TFLOP/s bfloat16 peak" if peak else ", peak unknown: no MFU"
        lines.append(f"{len(devices)} x {kind}{memory}{speed}")
    return lines


def kernel_rows() -> list[tuple[str, str, str]]:
    """What `auto` means for the heavy parts on this device: by default, and where measured."""
    import jax

    from prime_jax import tuned
    from prime_jax.config import DataConfig, RunConfig
    from prime_jax.kernels import selection

    kind = jax.devices()[0].device_kind
    choices, long = tuned.load(kind), RunConfig(data=DataConfig(seq_len=selection.SHORT))
    out = []
    for kernel in selection.KERNELS:
        usual = selection.default(kernel, long, kind)
        out.append((f"kernel {kernel}", usual.implementation, usual.why))
        off = choices.wrong(kernel).items()
        out += [(f"kernel {kernel}", f"not {name}", f"measured: {why}") for name, why in off]
    for row in choices.rows:
        shape = " ".join(f"{name}={value}" for name, value in row.shape.items())
        blocks = f" {row.blocks}" if row.blocks else ""
        found = f"{row.implementation}{blocks}"
        out.append((f"kernel {row.kernel}", found, f"measured: {row.why}; at {shape}"))
    return out


def run() -> int:
    """Print the report; 1 if a required package is missing."""
    console = Console()
    table = Table("what", "found", "note", title=f"prime-jax {__version__}")
    table.add_row("python", platform.python_version(), sys.executable)
    table.add_row("machine", platform.machine(), f"{os.cpu_count()} cores, {memory_gib():.0f} GiB")
    missing = 0
    for package in REQUIRED:
        found = version(package)
        missing += found is None
        table.add_row(package, found or "[red]missing[/]", "" if found else "make install")
    for line in device_lines():
        table.add_row("device", line, "")
    for row in kernel_rows():
        table.add_row(*map(escape, row))
    for package, how in ACCELERATORS.items():
        table.add_row(package, version(package) or "-", "" if version(package) else escape(how))
    for package, (purpose, how) in OPTIONAL.items():
        found = version(package)
        table.add_row(package, found or "-", purpose if found else escape(f"{purpose}: {how}"))
    for compiler in ("gcc", "nvcc"):
        path = shutil.which(compiler)
        table.add_row(compiler, "yes" if path else "-", path or "not needed to run prime-jax")
    console.print(table)
    return 1 if missing else 0
