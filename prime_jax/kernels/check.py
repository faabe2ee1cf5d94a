"""Compile kernels for absent TPUs with libtpu, and read its static schedule.

libtpu contains the whole TPU compiler: layouts, VMEM limits and register allocation are checked as
for a real chip. It can also write the final program, one VLIW bundle (about one cycle) per line.
Numerical results need the interpreter or a chip, timings need a chip.
"""

import importlib.util
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from prime_jax.errors import UserError
from prime_jax.hardware.chips import CHIPS
from prime_jax.kernels import attention_mosaic, embedding_mosaic, subtoken_head_mosaic
from prime_jax.kernels.common import Case
from prime_jax.kernels.selection import cause

CASES: dict[str, Callable[[str, int, int], list[Case]]] = {
    "embedding": embedding_mosaic.cases,
    "attention": attention_mosaic.cases,
    "head": subtoken_head_mosaic.cases,
}
MOSAIC_CALL = re.compile(r'%(\S+) = .*custom_call_target="tpu_custom_call"')
FILLS = ("VLOAD:FILL", "VSTORE:SPILL")


class Schedule(NamedTuple):
    """One kernel's final program; slots are those of its block with the most matrix products."""

    kernel: str
    bundles: int  # of the whole kernel
    hot_bundles: int
    matmuls: int
    shuffles: int  # lane shuffles, transposes and reductions over lanes (XLU)
    spills: int  # registers written to memory and read back


class Report(NamedTuple):
    """Result of compiling one case; `error` is empty on success."""

    case: Case
    chip: str
    seconds: float
    temporary_bytes: int = 0
    peak_bytes: int = 0
    schedules: tuple[Schedule, ...] = ()
    error: str = ""


def require_libtpu() -> None:
    """Raises UserError, with instructions, if libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, the TPU compiler, is not installed: `make test-tpu-compile` creates an "
            "environment .venv-tpu with it (or run pip install 'prime_jax[tpu-compile]' in a "
            "separate environment: with libtpu every import of JAX looks for a TPU)"
        )


def set_environment(dump: Path | None = None) -> None:
    """Variables that libtpu reads when it is loaded: no metadata server, no lock, dump folder."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # silences a warning
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    if dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_html=false"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


@cache
def mesh(chip: str) -> jax.sharding.Mesh:
    """A mesh of one absent chip (of one core, if it has two devices)."""
    from jax.experimental import topologies

    sides = "x".join("1" * CHIPS[chip].dimensions)  # by default at least one host of four
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:{sides}", chips_per_host_bounds=(1, 1, 1)
    )
    return jax.sharding.Mesh(np.array(topology.devices[:1]), ("chip",))


def compile_case(case: Case, chip: str) -> jax.stages.Compiled:
    """The compiled program of `case` for one `chip`; raises errors of the compiler."""
    target = mesh(chip)
    everywhere = jax.sharding.NamedSharding(target, jax.P())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), case.arguments
    )
    with jax.sharding.use_abstract_mesh(target.abstract_mesh):  # kernels read the chip from it
        return jax.jit(case.function).trace(*arguments).lower().compile()


def check(case: Case, chip: str, dump: Path | None = None) -> Report:
    """Compile one case; with `dump`, the folder given to `set_environment`, read its schedule."""
    start = time.perf_counter()
    try:
        compiled = compile_case(case, chip)
    except Exception as error:  # any compiler error is the result
        return Report(case, chip, time.perf_counter() - start, error=cause(error))
    seconds = time.perf_counter() - start
    kernels = MOSAIC_CALL.findall(compiled.as_text())
    memory = compiled.memory_analysis()
    wrong = f"{len(kernels)} Mosaic calls in the program, expected {case.mosaic_calls}"
    return Report(
        case=case,
        chip=chip,
        seconds=seconds,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        schedules=tuple(read_schedules(dump, kernels)) if dump else (),
        error=wrong if len(kernels) < case.mosaic_calls else "",
    )


def check_all(
    kernels: list[str], chips: list[str], widths: list[int], vocab_size: int, schedule: bool
) -> Iterator[Report]:
    """Yield a report for every case. Raises UserError without libtpu."""
    require_libtpu()
    dump = Path(tempfile.mkdtemp(prefix="prime-jax-")) if schedule else None
    try:
        set_environment(dump)
        for chip in chips:
            for width in widths:
                for name in kernels:
                    for case in CASES[name](chip, width, vocab_size):
                        yield check(case, chip, dump)
                        _empty(dump)  # a large kernel writes hundreds of megabytes
    finally:
        if dump:
            shutil.rmtree(dump, ignore_errors=True)


def _empty(folder: Path | None) -> None:
    for file in folder.iterdir() if folder else ():
        file.unlink()


def read_schedules(dump: Path, kernels: list[str]) -> Iterator[Schedule]:
    """The schedules of the named kernels, which must have been compiled into an empty `dump`."""
    utilization = "final_hlo-static-per-bundle-utilization"
    for kernel in kernels:
        (bundles,) = dump.glob(f"[0-9]*-{kernel}-[0-9][0-9]-final_bundles.txt")
        (slots,) = dump.glob(f"[0-9]*-{kernel}-[0-9][0-9]-{utilization}.txt")
        yield parse_schedule(kernel, bundles.read_text(), slots.read_text())


def parse_schedule(kernel: str, bundles: str, utilization: str) -> Schedule:
    """The schedule from two texts: one line per bundle, and one line of used slots per bundle."""
    lines = re.findall(r"^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})? *:[ >]*\{(.*)$", bundles, re.MULTILINE)
    names, *rows = utilization.partition("CAPACTIY:\n")[2].splitlines()
    names = [name.strip() for name in names.split(",")]
    rows = [list(map(int, row.split())) for row in rows if re.fullmatch(r"[\d ]+", row)][1:]
    count = min(len(lines), len(rows))
    # Blocks start at a label (loop or region) and after a branch.
    starts = {0, count} | {i for i in range(count) if lines[i][0]}
    starts |= {i + 1 for i in range(count) if "sbr.rel" in lines[i][1]}

    def slots(block: tuple[int, int], *wanted: str) -> int:
        columns = [names.index(name) for name in wanted]
        return sum(row[c] for row in rows[slice(*block)] for c in columns)

    hot = max(pairwise(sorted(starts)), key=lambda block: slots(block, "MXU"))
    return Schedule(
        kernel=kernel,
        bundles=count,
        hot_bundles=hot[1] - hot[0],
        matmuls=slots(hot, "MXU"),
        shuffles=slots(hot, "XLU"),
        spills=slots(hot, *FILLS),
    )
