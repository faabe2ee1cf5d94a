"""The last line of experiments/bound_demo.py is one JSON object that programs can read."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "experiments" / "bound_demo.py"
PRIME = {"nelbo", "token_nelbo", "train_loss", "se"}
EXACT = {"exact", "nelbo", "se"}
RUNS = {
    "arm": {"nll", "se"},
    "mdm": {"nelbo", "se"},
    "prime": PRIME,
    "prime_joint": PRIME,
    "mdm_blocks": EXACT,
    "prime_blocks": EXACT,
}


def check(numbers: dict) -> None:
    """The fields."""
    assert set(numbers) == {"entropy", "block_entropy", "runs"}
    assert list(numbers["runs"]) == list(RUNS)
    for name, fields in RUNS.items():
        assert set(numbers["runs"][name]) == fields
    values = [numbers["entropy"], numbers["block_entropy"]]
    values += [x for run in numbers["runs"].values() for x in run.values()]
    assert all(isinstance(x, float) and math.isfinite(x) for x in values)


def test_the_last_line_is_one_json_object(tmp_path, capsys):
    runs = {name: dict.fromkeys(sorted(fields), 1.75) for name, fields in RUNS.items()}
    runs["prime_joint"]["train_loss"] = 1.25  # below the entropy: the table says so
    numbers = {"entropy": 1.4, "block_entropy": 1.5, "runs": runs}
    check(numbers)
    runpy.run_path(str(FILE))["finish"](numbers, tmp_path)
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == numbers
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers
    assert sum("NO: no bound" in line for line in table) == 1


@pytest.mark.slow
def test_the_whole_with_few_steps(tmp_path):
    command = [
        sys.executable,
        FILE,
        "--steps",
        "20",
        "--out",
        tmp_path,
        "--data",
        tmp_path / "data",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(FILE.parents[1])},
    )
    numbers = json.loads(done.stdout.splitlines()[-1])
    check(numbers)
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers
    for run in numbers["runs"].values():  # hardly trained: far above the entropy
        for kind in {"nll", "exact", "nelbo", "token_nelbo"} & set(run):
            assert run[kind] > numbers["block_entropy"]
        assert run.get("exact", 0) <= run.get("nelbo", 1e9)
