"""Verdicts of the compiler as people read them."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prime_jax import aot, costs, flops
from prime_jax.aot import Verdict
from prime_jax.config import RunConfig
from prime_jax.costs import Prices
from prime_jax.slices import GIB, Slice


def table(verdicts: Sequence[Verdict]) -> Table:
    """One line per shape that was compiled."""
    out = Table(title=f"compiled for {verdicts[0].where.name}", box=None, padding=(0, 1, 0, 0))
    for name in ("family", "shape", "batch", "mesh", "settings"):
        out.add_column(name)
    for name in ("state", "temp", "GiB/chip", "limit", "s/step", "comm.", "compile"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("verdict")
    for v in verdicts:
        m, memory, predicted = v.config.model, v.record["memory"], v.prediction
        gib = lambda name: f"{memory[name] / GIB:.2f}" if name in memory else "-"  # noqa: B023, E731
        out.add_row(
            v.config.family,
            f"{m.layers}x{m.width}x{m.heads}",
            str(v.config.batch_size),
            "x".join(map(str, v.mesh[:3])),
            f"remat {v.config.mesh.remat}, accumulate {v.config.mesh.accumulate}",
            gib("arguments"),
            gib("temporaries"),
            f"{v.total / GIB:.2f}",
            f"{v.limit / GIB:.2f}",
            f"{predicted.step_seconds:.3g}",
            f"{predicted.communication:.0%}",
            f"{v.record['compile_seconds']:.0f} s",
            "[green]OK[/]" if v.fits else "[red]OOM[/]",
        )
    return out


def details(verdict: Verdict) -> list[str]:
    """Largest temporary and messages of a program that was made, or what would make one fit."""
    m, lines = verdict.config.model, []
    name = f"{verdict.config.family} {m.layers}x{m.width}x{m.heads}"
    record = verdict.record
    if largest := record.get("largest"):
        size = largest["bytes"] / GIB
        lines.append(
            f"{name}: largest temporary {size:.2f} GiB {largest['shape']} from {largest['source']}"
        )
    if messages := record.get("messages"):
        listed = ", ".join(
            f"{x['count']} {x['kind']} {x['bytes'] / GIB:.2f} GiB"
            f" ({x['background'] / max(x['bytes'], 1):.0%} while it computes)"
            for x in messages
        )
        lines.append(f"{name}: each chip sends per step: {listed}")
    if verdict.mesh.why:
        lines.append(f"{name}: {verdict.mesh}")
    if not verdict.fits:
        over = (verdict.total - verdict.limit) / GIB
        lines.append(f"{name}: {over:.2f} GiB too much; " + "; or ".join(aot.fixes(verdict)))
    return lines


def bill(runs: Sequence[RunConfig], where: Slice, prices: Prices | None) -> str:
    """Predicted hours of some runs one after the other on a slice, and their price."""
    from prime_jax import meshes

    hours = 0.0
    for config in runs:
        mesh = meshes.choose(config, where.devices, where.slices)
        step = costs.predict(config, mesh, where.chip, where.slices).step_seconds
        hours += config.steps * step / 3600
    total = sum(flops.train_flops(config, "matmul") for config in runs)
    mfu = total / max(hours * 3600 * where.devices * where.chip.peak, 1e-9)
    text = (
        f"{len(runs)} runs, predicted {hours:,.1f} h of {where.name} "
        f"({hours * where.chips:,.0f} chip-hours, MFU {mfu:.2f}; evaluation not included)"
    )
    if prices is None:
        return text
    cost = prices.of(where, hours)
    if cost is None:
        return f"{text}; no price for {where.generation} in the list of {prices.date}"
    return f"{text}, {cost:,.0f} {prices.currency} at the prices of {prices.date}"


def show(verdicts: Sequence[Verdict], console: Console) -> None:
    console.print(table(verdicts))
    for verdict in verdicts:
        for line in details(verdict):
            console.print(escape(line), soft_wrap=True)
