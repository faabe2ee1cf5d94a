"""Sampling options, and which of them can be combined."""

from dataclasses import dataclass
from typing import Any

from prime_jax.config import nearest
from prime_jax.errors import UserError

# Orders that do not depend on predictions; orders that reveal the most confident tokens first.
FIXED = ("ancestral", "random", "first-hitting", "left-to-right")
ADAPTIVE = ("confidence", "margin", "entropy")
GRIDS = ("uniform", "cosine")


@dataclass(frozen=True)
class Options:
    """Sampling options.

    Attributes:
        gen_length: tokens to generate; 0 fills the context.
        steps: reveal steps, over all blocks; steps that reveal nothing are skipped.
        order: order of revealing (`orders`).
        grid: fraction of masked sub-tokens over the steps: `uniform` or `cosine`.
        time_grid: these fractions, from 1 down to 0, instead of steps and grid (`grids`).
        block_length: generate in blocks of this many tokens, left to right; 0 for one block.
        threshold: instead of steps, reveal all tokens whose confidence or margin is at least this
            (entropy in nats: at most this), and at least one; None to reveal by steps.
        temperature: 0 takes the most likely token.
        top_k: sample among this many most likely tokens; 0 for all.
        top_p: sample among the most likely tokens that together have this mass (nucleus).
        cfg_scale: scale of classifier-free guidance by the prompt; 0 for none.
        remasking: fraction of the largest possible rate at which revealed sub-tokens are masked
            again (ReMDM, arXiv 2503.00307, "rescale").
        cached: skip steps that reveal nothing; the samples are the same.
        stop: token that ends a text; -1 for none.
        seed: with the example's number it determines the sample.
        batch_size: examples per batch; does not change the samples.
    """

    gen_length: int = 0
    steps: int = 64
    order: str = "ancestral"
    grid: str = "uniform"
    time_grid: tuple[float, ...] = ()
    block_length: int = 0
    threshold: float | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cfg_scale: float = 0.0
    remasking: float = 0.0
    cached: bool = True
    stop: int = -1
    seed: int = 0
    batch_size: int = 32


# Options without a meaning for an autoregressive model.
DIFFUSION_ONLY = (
    *("steps", "order", "grid", "time_grid", "block_length", "threshold"),
    *("cfg_scale", "remasking", "cached"),
)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def validate(options: Options, family: str) -> Options:
    """Return `options` if they are valid together for a model of that family.

    Raises:
        UserError: with the option, its value and what is expected.
    """
    o = options
    ranges = {
        "gen_length": (o.gen_length >= 0, "0 or more"),
        "steps": (o.steps >= 1, "1 or more"),
        "block_length": (o.block_length >= 0, "0 or more"),
        "temperature": (o.temperature >= 0, "0 or more"),
        "top_k": (o.top_k >= 0, "0 or more"),
        "top_p": (0 < o.top_p <= 1, "above 0 and at most 1"),
        "cfg_scale": (o.cfg_scale >= 0, "0 or more"),
        "remasking": (0 <= o.remasking <= 1, "between 0 and 1"),
        "batch_size": (o.batch_size >= 1, "1 or more"),
    }
    for name, (ok, right) in ranges.items():
        _require(ok, name, getattr(o, name), f"must be {right}")
    if family == "arm":
        for name in DIFFUSION_ONLY:
            changed = getattr(o, name) != getattr(Options, name)
            _require(
                not changed,
                name,
                getattr(o, name),
                "an autoregressive model generates left to right",
            )
        return o
    for name, valid in (("order", FIXED + ADAPTIVE), ("grid", GRIDS)):
        value = getattr(o, name)
        _require(value in valid, name, value, f"no such {name}{nearest(value, valid)}")
    if o.threshold is not None:
        _require(
            o.order in ADAPTIVE, "threshold", o.threshold, f"needs --order {', '.join(ADAPTIVE)}"
        )
    if o.remasking:
        _require(o.order == "ancestral", "remasking", o.remasking, "needs --order ancestral")
        _require(
            not o.block_length, "remasking", o.remasking, "cannot be combined with --block-length"
        )
    if o.time_grid:
        falls = all(a > b for a, b in zip(o.time_grid, o.time_grid[1:], strict=False))
        ends = o.time_grid[0] == 1 and o.time_grid[-1] == 0
        _require(falls and ends, "time_grid", o.time_grid, "must fall from 1 to 0")
        _require(
            not o.block_length,
            "block_length",
            o.block_length,
            "cannot be combined with a time grid",
        )
    return o


def _require(ok: bool, name: str, value: Any, right: str) -> None:
    if not ok:
        raise UserError(f"{flag(name)} {value}: {right}")
