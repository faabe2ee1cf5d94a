"""Ctrl-C at random moments of every command: one line, a known exit code, no crash."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scaling_cases import csv_rows, surface, write_csv

from prime_jax import cli

# As in a terminal: what a shell starts in the background ignores Ctrl-C.
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from prime_jax.cli import main
print('ready', flush=True)
raise SystemExit(main())
"""
TRIES, LATEST = 8, 12.0  # of each command; seconds
CODES = {0, 3, 85, 130}
SOURCE = "markov:V=16,order=1,tokens=3000000"
COMMANDS = {
    "sample": ["sample", "{run}", "--num", "64", "--batch-size", "1"],
    "infill": ["infill", "{run}", "1 2 [[MASK*8]] 3", "--num", "64", "--batch-size", "1"],
    "eval": ["eval", "{run}", "--replicates", "512", "--out", "e.json"],
    "train": ["train", "{experiment}", "--out", "again", "--steps", "100000"],
    "fit": ["fit", "runs.csv"],
    "compare": ["scaling", "compare", "runs.csv", "--baseline", "known"],
    "prepare": ["data", "prepare", SOURCE, "--tokenizer", "synthetic:16", "--out", "data"],
    "spectra": ["analyse", "spectra", "{run}", "--out", "analysis"],
    "doctor": ["doctor"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_at_any_moment(name, tiny_run, tmp_path):
    rng = random.Random(name)
    rows = csv_rows(surface(noise=0.003))
    write_csv(tmp_path / "runs.csv", rows + [row | {"family": "other"} for row in rows])
    experiment = tmp_path / "experiment.py"
    experiment.write_text(
        "from prime_jax.config import RunConfig\nfrom prime_jax.settings import from_dict\n"
        "import json\ndef config():\n"
        f"    return from_dict(RunConfig, json.load(open({str(tiny_run / 'config.json')!r})))\n"
    )
    words = [word.format(run=tiny_run, experiment=experiment) for word in COMMANDS[name]]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    for _ in range(TRIES):
        moment = LATEST * rng.random() ** 2
        process = subprocess.Popen(
            [sys.executable, "-c", START, *words],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(moment + 0.05)
        process.send_signal(signal.SIGINT)
        try:
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode in CODES, (moment, process.returncode, said)
        assert "Traceback" not in said, (moment, said)
        assert "unforeseen" not in said, (moment, said)
