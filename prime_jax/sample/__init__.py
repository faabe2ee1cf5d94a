"""Sampling from a trained model: orders, filters, one loop; a KV cache for ARM."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import `Options`, `Sampler` and `generate` lazily, so that the command line starts fast."""
    if name not in ("Options", "Sampler", "generate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prime_jax.sample import sampler

    return getattr(sampler, name)
