"""The tables of docs/scaling-out.md: large runs, compiled for absent slices.

    python benchmarks/scaling_out.py [--only 7b] [--cache runs/scaling-out] > table.md

Every line compiles a whole training step for absent TPUs (needs libtpu: pip install
'prime_jax[tpu-compile]'): one to ten minutes each. Answers are cached, so the table can be made in
pieces.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from prime_jax import flops
from prime_jax.compile_check import aot
from prime_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, SubtokenConfig
from prime_jax.errors import UserError
from prime_jax.experiment import call
from prime_jax.hardware import slices
from prime_jax.hardware.chips import GIB
from prime_jax.sweep import grid
from prime_jax.sweep.grid import Sweep

GRID = Path(__file__).parents[1] / "experiments" / "c4_grid.py"
PRIME = RunConfig(
    family="prime",
    batch_size=512,
    model=ModelConfig(vocab_size=50257, dtype="bfloat16"),
    subtokens=SubtokenConfig(length=16, scope="codes"),
    data=DataConfig(seq_len=2048),
)
SEVEN = ModelConfig(vocab_size=50257, layers=32, width=4096, heads=32, dtype="bfloat16")
SEVENTY = replace(SEVEN, layers=80, width=8192, heads=64, kv_heads=8)
SLICES = ("v5p-128", "v5p-512", "2xv6e-256")


@dataclass(frozen=True)
class Case:
    label: str
    config: RunConfig
    slice: str


def cases() -> list[Case]:
    out = []
    for family in ("arm", "mdm", "prime"):
        rows = grid.rows(call(GRID, "sweep", Sweep))
        runs = [grid.to_config(row) for row in rows if row.family == family]
        run = max(runs, key=lambda c: flops.param_counts(c)["total"])
        fitted = replace(run, mesh=MeshConfig(accumulate=8, remat="full"))
        out += [
            Case(f"grid {family}, as written", run, "v5e-16"),
            Case(f"grid {family}", fitted, "v5e-16"),
        ]
    for name in SLICES:
        out.append(Case("7B", replace(PRIME, model=SEVEN, mesh=MeshConfig(remat="full")), name))
        accumulate = 2 if name == "v5p-128" else 1
        mesh = MeshConfig(remat="full", accumulate=accumulate)
        out.append(Case("70B", replace(PRIME, model=SEVENTY, mesh=mesh), name))
    return out


def line(case: Case, verdict: aot.Verdict) -> str:
    p, m, memory = verdict.prediction, case.config.model, verdict.record["memory"]
    billions = flops.param_counts(case.config)["total"] / 1e9
    gib = lambda name: f"{memory[name] / GIB:.2f}" if name in memory else "-"  # noqa: E731
    overlapped = verdict.record.get("collectives", ())
    sent, beside = (sum(m[key] for m in overlapped) for key in ("bytes", "background"))
    fraction = "" if verdict.record.get("as_written") else f" ({beside / max(sent, 1):.0%})"
    mesh = f"{'x'.join(map(str, verdict.mesh[:3]))}, {case.config.mesh.remat}, {case.config.mesh.accumulate}"
    cells = [
        case.label,
        f"{m.layers}x{m.width}x{m.heads}",
        f"{billions:.2f}",
        case.slice,
        mesh,
        gib("arguments"),
        gib("temporaries"),
        f"{verdict.total / GIB:.1f} of {verdict.limit / GIB:.2f}",
        "OK" if verdict.fits else "**OOM**",
        f"{p.step_seconds:.2f}",
        p.bound,
        f"{p.communication:.0%}",
        f"{sent / GIB:.1f}{fraction}" if sent else "-",
        breaks_first(verdict),
        f"{verdict.record['compile_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def breaks_first(verdict: aot.Verdict) -> str:
    """What gives way when tokens per chip grow (memory) or chips at the same batch (links)."""
    if not verdict.fits:
        return "memory"
    p, memory = verdict.prediction, verdict.record["memory"]
    room = (verdict.limit - verdict.total) / memory["temporaries"] + 1
    chips = p.matmul / (p.overlapped + p.not_overlapped)
    if chips < 1:
        return "links do already"
    if room < chips:
        return f"memory, at {room:.1f}x tokens a chip"
    return f"links, at {chips:.1f}x chips"


HEAD = (
    "model", "shape", "N (1e9)", "slice", "mesh, remat, parts", "state", "temp", "GiB/chip", "verdict",
    "s/step", "bound", "comm.", "GiB sent (beside computing)", "breaks first", "compile s",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="lines whose label and slice contain this")
    parser.add_argument("--cache", type=Path, default=Path("runs/scaling-out"))
    args = parser.parse_args()
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for case in cases():
        slice_ = slices.parse(case.slice)
        if args.only.lower() not in f"{case.label} {case.slice}".lower():
            continue
        print(f"{case.label} on {case.slice} ...", file=sys.stderr, flush=True)
        try:
            verdict = aot.check(case.config, slice_, args.cache)
        except UserError as error:
            print(f"{case.label} on {case.slice}: {error}", file=sys.stderr)
            continue
        print(line(case, verdict), flush=True)
        for text in aot.fixes(verdict) if not verdict.fits else ():
            print(f"{case.label} on {case.slice}: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
