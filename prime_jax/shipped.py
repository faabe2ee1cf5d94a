"""Files that travel with the package: `experiments/` and `launch/` of a checkout.

An installed wheel has them under share/prime_jax of its environment.
"""

import sysconfig
from pathlib import Path


def folder(name: str) -> Path:
    """The folder of that name."""
    beside = Path(__file__).parents[1] / name
    if beside.is_dir():
        return beside
    return Path(sysconfig.get_path("data"), "share", "prime_jax", name)
