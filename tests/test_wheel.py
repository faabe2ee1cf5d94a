"""The wheel: everything of the package is in it, and it runs where it is installed."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from scaling_cases import csv_rows, surface, write_csv

ROOT = Path(__file__).parents[1]
SHIPPED = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "docs/prices.toml")
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


def run(*command, codes=(0,), **kwargs) -> subprocess.CompletedProcess:
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "XLA_FLAGS")
    env = {k: v for k, v in os.environ.items() if k not in ours}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, **kwargs)
    assert done.returncode in codes, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without network, from a copy: building leaves folders in the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("prime_jax", "experiments", "launch"):
        shutil.copytree(ROOT / name, tree / name, ignore=LEFT_OUT)
    for name in SHIPPED:
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return build(tree, out)


def build(tree: Path, out: Path) -> Path:
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", out, tree)
    (made,) = out.glob("*.whl")
    return made


def names_in(wheel: Path) -> set[str]:
    """Of its files, as a checkout calls them."""
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
    return {name.partition("/data/share/prime_jax/")[2] or name for name in names}


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    folders = [ROOT / name for name in ("prime_jax", "launch")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += (ROOT / "experiments").glob("*.py")
    ours = {str(path.relative_to(ROOT)) for path in files if path.parent.name != "__pycache__"}
    assert names_in(wheel) == ours | set(SHIPPED)


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory) -> Path:
    """`prime-jax` of a fresh environment that takes only the dependencies from this one."""
    home = tmp_path_factory.mktemp("home") / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    # Behind the environment's own packages; an editable installation of this one is not followed.
    dependencies = Path(packages.stdout.strip()) / "dependencies.pth"
    dependencies.write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import prime_jax; print(prime_jax.__file__)", cwd=home)
    assert Path(where.stdout.strip()).is_relative_to(home)
    return home / "bin" / "prime-jax"


def test_an_installed_wheel_fits_a_table_of_runs(command, tmp_path):
    runs = write_csv(tmp_path / "runs.csv", csv_rows(surface(noise=1e-3)))
    fit = run(command, "fit", runs, "--bootstrap", "100", cwd=tmp_path)
    assert "known" in fit.stdout


def test_the_chain_of_the_starter_from_an_empty_folder(command, tmp_path):
    """What its README says, line by line; and what engines and `preset:` need besides."""
    python = command.with_name("python")
    prime = lambda *words, codes=(0,): run(command, *words, cwd=tmp_path, codes=codes)  # noqa: E731
    assert "preset:c4_grid" in prime("init", ".").stdout
    lines = (tmp_path / "README.md").read_text().splitlines()
    typed = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("    prime")]
    for words in typed:
        prime(*words, codes=(0, 3) if words[0] in ("fit", "scaling") else (0,))
    assert len(list(tmp_path.glob("runs/state/*.result"))) == 18
    fitted = json.loads((tmp_path / "runs" / "fit" / "fit.json").read_text())
    assert set(fitted["families"]) == {"mdm", "prime"}

    assert "195" in prime("sweep", "plan", "preset:c4_grid").stdout
    for name in ("jobset.yaml", "sky.yaml", "tpu_startup.sh"):
        run(python, "-c", f"from prime_jax.launch import engine; engine.template('{name}')")


def test_machines_install_what_is_installed_here(command, wheel, tmp_path):
    """The archive that `sweep up --on tpu` publishes is a tree that the same wheel is built from."""
    pack = "from prime_jax.launch import archive; import sys; "
    pack += "open(sys.argv[1], 'wb').write(archive.pack().data)"
    run(command.with_name("python"), "-c", pack, tmp_path / "code.tar.gz", cwd=tmp_path)
    with tarfile.open(tmp_path / "code.tar.gz") as tar:
        tar.extractall(tmp_path / "tree", filter="data")
    assert names_in(build(tmp_path / "tree", tmp_path / "dist")) == names_in(wheel)
