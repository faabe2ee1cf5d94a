"""Shared set-up: eight virtual CPU devices, strict rank promotion, no leaking 64-bit mode."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
