"""The wheel: everything of the package is in it, and it runs where it is installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from scaling_cases import csv_rows, surface, write_csv

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns("__pycache__")


def builds() -> bool:
    """Whether a setuptools is here that knows the fields of pyproject.toml."""
    try:
        return int(metadata.version("setuptools").partition(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not builds(), reason="setuptools 77 or newer, which builds the wheel, is not installed"
    ),
]


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without network, from a copy: building leaves folders in the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "prime_jax", tree / "prime_jax", ignore=LEFT_OUT)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", out, tree)
    (made,) = out.glob("*.whl")
    return made


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as packed:
        inside = {name for name in packed.namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "prime_jax").rglob("*") if path.is_file())
    ours = {str(path.relative_to(ROOT)) for path in files if path.parent.name != "__pycache__"}
    assert inside == ours


def test_an_installed_wheel_fits_a_table_of_runs(wheel, tmp_path):
    """In a fresh environment that takes only the dependencies from this one."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    # Behind the environment's own packages; an editable installation of this one is not followed.
    dependencies = Path(packages.stdout.strip()) / "dependencies.pth"
    dependencies.write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import prime_jax; print(prime_jax.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(home)

    runs = write_csv(tmp_path / "runs.csv", csv_rows(surface(noise=1e-3)))
    fit = run(home / "bin" / "prime-jax", "fit", runs, "--bootstrap", "100", cwd=tmp_path)
    assert "known" in fit.stdout
