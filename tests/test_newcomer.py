"""What a newcomer types after the quickstart, in the order of README's table."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
ANSWERS = (0, 3)  # 3: an answer is refused, with a reason

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, codes=(0,)) -> str:
    plain = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # trained as users train
    env = plain | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode in codes, f"{' '.join(command)}: {done.returncode}\n{said}"
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where `make quickstart` has run, with the environment of the tests."""
    home = tmp_path_factory.mktemp("newcomer")
    shutil.copy(ROOT / "Makefile", home)
    said = run("make", "-o", "install", "quickstart", f"BIN={BIN}", cwd=home)
    assert "report.html" in said
    return home


def test_the_chain_from_the_quickstart_to_weights(home):
    prime = lambda *words, codes=(0,): run(  # noqa: E731
        str(BIN / "prime-jax"), *words, cwd=home, codes=codes
    )
    fitted = json.loads((home / "quickstart" / "fit" / "fit.json").read_text())
    assert set(fitted["families"]) >= {"arm", "mdm"}
    prime("scaling", "compare", "quickstart", "--baseline", "arm", codes=ANSWERS)
    prime("scaling", "validate", "quickstart", codes=ANSWERS)
    prime("scaling", "predict", "quickstart/fit", "--flops", "1e13")
    design = ("--family", "prime", "--target", "1e13", "--budget", "1e13", "--emit", "next.json")
    prime("scaling", "design", "quickstart/fit", *design, codes=ANSWERS)

    results = [json.loads(path.read_text()) for path in home.glob("quickstart/state/*.result")]
    trained = f"quickstart:{next(r['run'] for r in results if r['family'] == 'prime')}"
    text = prime("eval", trained, "--replicates", "2", "--examples", "32")
    assert "nelbo" in text
    assert "def " in prime("sample", trained, "--prompt", "def ", "--steps", "8")
    assert "def " in prime("infill", trained, "def f([[MASK*4]]):", "--steps", "4")
    prime("analyse", "spectra", trained)
    prime("export", trained, "exported")
    prime("import", "safetensors", "exported", "copy")
    again = prime("eval", "copy", "--replicates", "2", "--examples", "32")
    number = lambda said: [line for line in said.splitlines() if "nelbo" in line][-1]  # noqa: E731
    assert number(again) == number(text)
