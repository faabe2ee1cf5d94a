"""Files that travel with the package: what the top of a checkout holds beside it.

An installed wheel has them under share/prime_jax of its environment.
"""

import sysconfig
from pathlib import Path

TOP = Path(__file__).parents[1]


def is_checkout() -> bool:
    """Whether the package is in its repository, and not installed from a wheel."""
    return (TOP / "pyproject.toml").is_file()


def place(name: str) -> Path:
    """The file or folder of that name at the top of a checkout, wherever it is here."""
    return (TOP if is_checkout() else share()) / name


def share() -> Path:
    """Where an installed wheel has them: in its environment, or in the home of its user."""
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    places = [Path(sysconfig.get_path("data", scheme), "share", "prime_jax") for scheme in schemes]
    return next((place for place in places if place.is_dir()), places[0])


def installed() -> dict[str, Path]:
    """The files of an installed wheel by their names in a checkout, from which it can be built."""
    package = {f"{Path(__file__).parent.name}/": Path(__file__).parent, "": share()}
    return {
        f"{prefix}{file.relative_to(folder)}": file
        for prefix, folder in package.items()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    }
