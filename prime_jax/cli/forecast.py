"""Verdicts of the compiler as people read them."""

from collections.abc import Sequence
from typing import Any

from prime_jax import flops
from prime_jax.cli.console import say, show
from prime_jax.compile_check import aot
from prime_jax.compile_check.aot import Verdict
from prime_jax.config import RunConfig
from prime_jax.hardware import roofline
from prime_jax.hardware.prices import Prices
from prime_jax.hardware.slices import Slice, human_bytes
from prime_jax.table import Cell, Table

HEAD = (
    "family",
    "shape",
    "batch",
    "mesh",
    "remat",
    "state",
    "temp",
    "total",
    "s/step",
    "comm.",
    "",
)


def table(verdicts: Sequence[Verdict]) -> Table:
    """One line per shape that was compiled; fits 80 columns."""
    limit = human_bytes(verdicts[0].limit)
    rows = []
    for v in verdicts:
        m, predicted = v.config.model, v.prediction
        memory = {"arguments": roofline.memory(v.config, v.mesh)[0]} | v.record["memory"]
        parts = v.config.mesh.accumulate
        rows.append(
            [
                v.config.family,
                f"{m.layers}x{m.width}x{m.heads}",
                f"{v.config.batch_size}/{parts}" if parts > 1 else str(v.config.batch_size),
                "x".join(map(str, v.mesh[:3])),
                v.config.mesh.remat,
                *(_short(size) for size in (memory["arguments"], v.temporaries, v.total)),
                f"{predicted.step_seconds:.3g}",
                f"{predicted.communication:.0%}",
                Cell("OK", style="good") if v.fits else Cell("OOM", style="bad"),
            ]
        )
    title = f"compiled for {verdicts[0].slice_.name}: memory a chip, of {limit}"
    return Table(HEAD, rows, title=title)


def _short(size: float) -> str:
    """`12.89G`, `16.3M`: in units of 1024."""
    return human_bytes(size).replace(" ", "").removesuffix("iB")


def details(verdict: Verdict) -> list[str]:
    """Largest temporary and collectives of a program, and of an oversized one what would make it fit."""
    m = verdict.config.model
    record, found = verdict.record, []
    if record.get("as_written"):
        found.append("the compiler made no program; as written, before it joins operations:")
    if largest := record.get("largest"):
        size = human_bytes(largest["bytes"])
        found.append(f"largest temporary {size} {largest['shape']} from {largest['source']}")
    if collectives := record.get("collectives"):
        listed = ", ".join(
            _collective(collective, "as_written" in record) for collective in collectives
        )
        found.append(f"each chip sends per step: {listed}")
    if verdict.mesh.why:
        found.append(str(verdict.mesh))
    if not verdict.fits:
        over = human_bytes(verdict.total - verdict.limit)
        found.append(f"{over} too much; " + "; or ".join(aot.fixes(verdict)))
    found.append(f"compiled in {record['compile_seconds']:.0f} s")
    return [f"{verdict.config.family} {m.layers}x{m.width}x{m.heads}: {line}" for line in found]


def _collective(collective: dict[str, Any], as_written: bool) -> str:
    text = f"{collective['count']} {collective['kind']} {human_bytes(collective['bytes'])}"
    if as_written:
        return text
    return (
        f"{text} ({collective['background'] / max(collective['bytes'], 1):.0%} while it computes)"
    )


def cost_estimate(runs: Sequence[RunConfig], slice_: Slice, prices: Prices | None) -> str:
    """Predicted hours of some runs one after the other on a slice, and their price."""
    from prime_jax.runtime import meshes

    hours = 0.0
    for config in runs:
        mesh = meshes.choose(config, slice_.devices, slice_.slices)
        step = roofline.predict(config, mesh, slice_.chip, slice_.slices).step_seconds
        hours += config.steps * step / 3600
    total = sum(flops.train_flops(config, "matmul") for config in runs)
    mfu = total / max(hours * 3600 * slice_.devices * slice_.chip.peak, 1e-9)
    text = (
        f"{len(runs)} runs, predicted {hours:,.1f} h of {slice_.name} "
        f"({hours * slice_.chips:,.0f} chip-hours, MFU {mfu:.2f}; evaluation not included)"
    )
    if prices is None:
        return text
    cost = prices.of(slice_, hours)
    if cost is None:
        return f"{text}; no price for {slice_.generation} in the list of {prices.date}"
    return f"{text}, {cost:,.0f} {prices.currency} at the prices of {prices.date}"


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    show(table(verdicts))
    for verdict in verdicts:
        for line in details(verdict):
            say(line)
