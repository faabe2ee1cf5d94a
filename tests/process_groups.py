"""Processes that meet each other, as an engine would start them."""

import os
import socket
import subprocess
import sys

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def start(words: list[str], processes: int, devices: int, **more: str) -> list[subprocess.Popen]:
    """`python -u WORDS` as often as `processes`, with `devices` virtual CPUs between them.

    Args:
        more: variables of the environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes} {FLAGS}",
        "PRIME_COORDINATOR": f"127.0.0.1:{port}",
        "PRIME_PROCESSES": str(processes),
        "PRIME_WAIT_SECONDS": "120",
        **more,
    }
    return [
        subprocess.Popen(
            [sys.executable, "-u", *words],
            env={**environment, "PRIME_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]


def ended(group: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Exit codes and what each process said, when all have ended."""
    texts = [process.communicate(timeout=300)[0] for process in group]
    return [process.returncode for process in group], texts
