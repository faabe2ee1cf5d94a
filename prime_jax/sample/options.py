"""Sampling options, and which of them can be combined."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from prime_jax.errors import UserError
from prime_jax.settings import Flags, setting

# Orders that do not look at the model's predictions, and those that reveal the most confident tokens first.
Fixed = Literal["ancestral", "random", "first-hitting", "left-to-right"]
Adaptive = Literal["confidence", "margin", "entropy", "confidence-drawn"]
Grid = Literal["uniform", "cosine"]
ADAPTIVE: tuple[str, ...] = get_args(Adaptive)
INNER = {"flag": False}  # for callers, not for the command line


@dataclass(frozen=True)
class Options(Flags):
    """How to sample."""

    gen_length: int = setting(
        0, "tokens to generate; 0: up to the model's length", at_least=0, **INNER
    )
    steps: int = setting(
        64, "reveal steps over all blocks; steps that reveal nothing are skipped", at_least=1
    )
    order: Literal[Fixed, Adaptive] = setting(
        "ancestral", "order in which sub-tokens are revealed, see below"
    )
    grid: Grid = setting("uniform", "fraction of hidden sub-tokens over the steps", **INNER)
    time_grid: tuple[float, ...] = setting(
        (), "those fractions, from 1 down to 0, in place of steps and grid (`grids`)", **INNER
    )
    block_length: int = setting(
        0, "generate blocks of this many tokens, left to right; 0: one block", at_least=0
    )
    threshold: float | None = setting(
        None,
        "in place of --steps: at each call reveal all tokens whose confidence or margin is at least "
        "this (entropy in nats: at most this), and at least one",
    )
    temperature: float = setting(
        1.0, "temperature of the draws; 0 takes the likeliest token", at_least=0
    )
    top_k: int = setting(0, "draw only among the N likeliest tokens; 0: all", at_least=0)
    top_p: float = setting(
        1.0,
        "draw only among the likeliest tokens with this total probability (nucleus)",
        above=0,
        at_most=1,
    )
    cfg_scale: float = setting(
        0.0, "scale of classifier-free guidance by the prompt; 0: none", at_least=0
    )
    remasking: float = setting(
        0.0,
        "hide revealed sub-tokens again, at this fraction of the largest possible rate (ReMDM, "
        'arXiv 2503.00307, "rescale")',
        at_least=0,
        at_most=1,
        metavar="RATE",
    )
    cached: bool = setting(
        True, "skip steps that reveal nothing; the samples are the same", **INNER
    )
    stop: int = setting(-1, "token at which a text ends; -1: none", **INNER)
    seed: int = setting(
        0,
        "seed; it determines a sample together with the sample's number",
        at_least=0,
        at_most=2**32 - 1,
    )
    batch_size: int = setting(32, "samples at a time; does not change samples", at_least=1)


# Options without a meaning for an autoregressive model.
DIFFUSION_ONLY = (
    *("steps", "order", "grid", "time_grid", "block_length", "threshold"),
    *("cfg_scale", "remasking", "cached"),
)


def validate(options: Options, family: str) -> Options:
    """Return `options` if they are valid together for a model of that family.

    Raises:
        UserError: with the option, its value and what is expected.
    """
    o = options
    if family == "arm":
        for name in DIFFUSION_ONLY:
            if getattr(o, name) != getattr(Options, name):
                raise _wrong(
                    name, getattr(o, name), "an autoregressive model generates left to right"
                )
        return o
    if o.threshold is not None and o.order not in ADAPTIVE:
        raise _wrong("threshold", o.threshold, f"needs --order {', '.join(ADAPTIVE)}")
    if o.remasking and o.order != "ancestral":
        raise _wrong("remasking", o.remasking, "needs --order ancestral")
    if o.remasking and o.block_length:
        raise _wrong("remasking", o.remasking, "cannot be combined with --block-length")
    if o.time_grid:
        falls = all(a > b for a, b in zip(o.time_grid, o.time_grid[1:], strict=False))
        if not (falls and o.time_grid[0] == 1 and o.time_grid[-1] == 0):
            raise _wrong("time_grid", o.time_grid, "must fall from 1 to 0")
        if o.block_length:
            raise _wrong("block_length", o.block_length, "cannot be combined with a time grid")
    return o


def _wrong(name: str, value: Any, right: str) -> UserError:
    return UserError(f"{Options.called(name)} {value}: {right}")
