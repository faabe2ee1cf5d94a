"""Drawing text from a trained model: orders, filters, one loop; a KV cache for ARM."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`Options`, `Sampler` and `generate`, imported when asked for: the command line is quick."""
    if name not in ("Options", "Sampler", "generate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prime_jax.sample import sampler

    return getattr(sampler, name)
