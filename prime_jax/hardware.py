"""Peak arithmetic of accelerators, for model FLOPs utilisation (MFU)."""

# Dense bfloat16 FLOP/s per device as JAX names it (TPU v4 onwards: one device is one chip, TPU7x:
# one of its two cores). Vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device, or None where it is not known (CPUs): MFU is then not reported."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None
