"""Makes what test_net.py compares with, by running the code as it is now.

    python tests/net/make.py numbers    numbers.json and renders/, through pytest and its settings
    python tests/net/make.py table      runs.csv, the table of the fit
    python tests/net/make.py sweep      sweep/, the sweep that later versions must read

A change that is meant to leave the numbers alone needs none of them. `table` and `sweep` change
what the numbers are of; `numbers` comes after them.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parents[1])]


def numbers() -> None:
    (HERE / "numbers.json").unlink(missing_ok=True)
    shutil.rmtree(HERE / "renders", ignore_errors=True)
    words = ["-m", "slow or not slow", "-p", "no:cacheprovider", str(HERE.parent / "test_net.py")]
    command = [sys.executable, "-m", "pytest", *words]
    subprocess.run(command, env=os.environ | {"PRIME_NET_WRITE": "1"}, check=True)


def table() -> None:
    import cases
    import scaling_cases

    cases.write(cases.TABLE, scaling_cases.rows_of_a_sweep())


def sweep() -> None:
    import conftest  # noqa: F401  the settings of XLA, before it is imported

    from prime_jax import cli

    with tempfile.TemporaryDirectory() as folder:
        data, root = Path(folder) / "data", Path(folder) / "sweep"
        source = "markov:V=16,order=1,seed=0,tokens=40000"  # as `markov_data` of conftest.py
        words = ["--tokenizer", "synthetic:16", "--seq-len", "16", "--workers", "1"]
        assert cli.main(["data", "prepare", source, *words, "--out", str(data)]) == 0
        shutil.copytree(data, f"{data}-gone")
        _plan(root, data, opened=False)
        shutil.rmtree(f"{data}-gone")
        assert cli.main(["sweep", "run", str(root)]) == 1, "one run has no data"
        shutil.copytree(data, f"{data}-gone")
        _plan(root, data, opened=True)
        _store(root, data)


def _plan(root: Path, data: Path, *, opened: bool) -> None:
    import cases

    from prime_jax import cli

    rows = cases.rows(str(data)) + ([cases.OPEN] if opened else [])
    path = root.with_name("more.json" if opened else "first.json")
    path.write_text(json.dumps([cases.row(one, str(data)) for one in rows]))
    assert cli.main(["sweep", "plan", str(path), str(root)]) == 0


def _store(root: Path, data: Path) -> None:
    """Without weights, and without names of this machine."""
    import cases

    shutil.rmtree(root / "cache", ignore_errors=True)
    for path in (root / "runs").glob("*/*/checkpoints"):
        shutil.rmtree(path)
    for path in (root / "runs").rglob("eval.npz"):
        path.unlink()
    for path in (p for p in root.rglob("*") if p.is_file() and p.suffix != ".npy"):
        text = path.read_text().replace(str(data), cases.DATA)
        text = text.replace(socket.gethostname(), "somewhere").replace(str(root), "<root>")
        if path.suffix == ".claim":
            own = {"kernel": "some boot", "pid": 1, "started": 1}
            text = json.dumps(json.loads(text) | own, indent=2) + "\n"
        path.write_text(text)
    shutil.rmtree(cases.SWEEP, ignore_errors=True)
    shutil.copytree(root, cases.SWEEP)


if __name__ == "__main__":
    known = {"numbers": numbers, "table": table, "sweep": sweep}
    if len(sys.argv) != 2 or sys.argv[1] not in known:
        sys.exit(__doc__)
    known[sys.argv[1]]()
