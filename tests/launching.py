"""What the tests of the engines of Google Cloud have in common."""

from collections.abc import Callable
from typing import Any

from prime_jax.hardware.prices import Prices
from prime_jax.launch import engine
from prime_jax.sweep import state


def finish(sweep: engine.Sweep, leave: int) -> None:
    """Finish all but so many runs."""
    for run in state.open_runs(sweep.source)[leave:]:
        state.publish(sweep.source, run.id, {"status": "done", "losses": []})


def dialogue(yes: bool = True) -> tuple[engine.Dialogue, list[str]]:
    """One that agrees or declines, and the lines that it was given."""
    lines: list[str] = []
    prices = Prices("2026-01-01", "USD", {"v5e": 1.5, "v6e": 2.5, "tpu7x": 12.0})
    return engine.Dialogue(lines.append, lambda question: False, yes, prices), lines


def printed(command: Callable[..., int], sweep: engine.Sweep, options: Any) -> str:
    """What an engine's `up` or `down` said on its way to exit code 0."""
    here, lines = dialogue()
    assert command(sweep, options, here) == 0
    return "\n".join(lines)
