"""Random command lines made from the declarations: no trace, no hang, known exit codes.

Each command gets its lines in one process of its own, in an empty folder.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import typing
from collections import Counter
from pathlib import Path

import fake_trainer
import pytest
from scaling_cases import csv_rows, surface, write_csv

from prime_jax import cli, settings
from prime_jax.cli import parse
from prime_jax.data.prepare import prepare

LINES, MEASURING = 60, 4  # of a command; of one that measures or compiles for minutes
CODES = {0, 1, 2, 3, 85, 130}
ODD = (
    "",
    " ",
    "x",
    "-1",
    "0",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "99999999999999999999",
    "é",
    "a" * 5000,
)
ODD += (
    "--",
    "-",
    "=",
    "True",
    "None",
    "[]",
    "/",
    "..",
    "nowhere/at/all",
    "\x1b[0m",
    "%s",
    "[red]x[/]",
)
# What lies in the folder, and a few names that mean something.
NAMES = ("one.py", "bad.py", "rows.json", "data", "sweep", "out", "empty", "slurm", "k8s", "v5e-16")
SOURCES = (
    "markov:V=16,order=1,tokens=2000",
    "text:/nowhere/*",
    "stream:one.py",
    "synthetic:16",
    "bytes",
)
FITTING = {
    **{"root": "sweep", "dir": "data", "experiment": "one.py", "source": SOURCES[0]},
    **{
        "tokenizer": "synthetic:16",
        "run": "run",
        "runs": "runs.csv",
        "file": "exported",
        "on": "k8s",
    },
    **{
        "layout": "safetensors",
        "slice": "v5e-16",
        "out": "out",
        "image": "i",
        "valid_fraction": "0.1",
    },
    **{"test_fraction": "0.1", "prices": "prices.toml", "data": "data", "ids": "1", "check": "all"},
    **{
        "fit": "runs-fit",
        "baseline": "known",
        "family": "known",
        "target": "1e20",
        "budget": "1e19",
    },
    **{"replicates": "100", "formats": "svg"},
}
QUICK = ("export", "import", "analyse spectra")  # commands that get a finished run
ONE = """
from prime_jax.config import DataConfig, ModelConfig, RunConfig
from prime_jax.sweep.grid import Sweep
def config():
    return RunConfig(model=ModelConfig(vocab_size=16, width=16, heads=1), data=DataConfig("gone"))
def sweep():
    return Sweep("mine", config(), {"arm": {}}, [1e9], [(2, 32, 2)], batch="fixed:4", lr="fixed:1e-3")
"""
RUN = """
import io, json, signal, sys
from prime_jax import cli
def late(*_):
    raise TimeoutError("hang")
signal.signal(signal.SIGALRM, late)
out = []
for words in json.load(open(sys.argv[1])):
    sys.stdout, sys.stderr, sys.stdin = io.StringIO(), io.StringIO(), io.StringIO()
    signal.alarm(300)
    code = cli.main(words)
    signal.alarm(0)
    out.append((code, sys.stderr.getvalue()))
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
json.dump(out, open(sys.argv[2], "w"))
"""


def word_for(hint: typing.Any, rng: random.Random) -> str:
    """A value that a setting takes, most of the time."""
    if rng.random() < 0.1:
        return rng.choice(ODD)
    if typing.get_origin(hint) is tuple or type(None) in typing.get_args(hint):
        return word_for(typing.get_args(hint)[0], rng)
    if typing.get_origin(hint) is typing.Literal:
        return rng.choice(typing.get_args(hint))
    if hint in (int, float):
        return str(rng.choice((1, 2, 7)) if hint is int else rng.choice((0.5, 1e-3, 2.0, 1e20)))
    return rng.choice((*NAMES, *SOURCES) if hint is str else NAMES)


def line_for(name: str, rng: random.Random) -> list[str]:
    """A line of a command (but --watch, which stays), sometimes with a missing, surplus, misspelt or odd word."""
    cls = parse.arguments_of(cli.function(name))
    words = []
    for owner, field in parse._flat(cls):
        hint = settings.hints(owner)[field.name]
        if field.name == "watch" or rng.random() > (0.97 if settings.required(field) else 0.15):
            continue
        if not parse._positional(field):
            flag = parse._flag(field)
            words.append(flag if rng.random() < 0.98 else flag[:-1])
            if hint is bool:
                continue
        count = 1 if rng.random() < 0.97 else rng.choice((0, 2))
        fits = rng.random() < 0.85 and field.name in FITTING
        words += [FITTING[field.name] if fits else word_for(hint, rng) for _ in range(count)]
    if cls.SETTINGS and rng.random() < 0.5:
        path = rng.choice(list(settings.flatten(settings.to_dict(cls.SETTINGS()))))
        owner, field = settings.find(cls.SETTINGS, path)
        words += [f"--{path}", word_for(settings.hints(owner)[field.name], rng)]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_random_lines_end_well(name, tmp_path, request):
    rng = random.Random(name)
    lines = [
        [*name.split(), *line_for(name, rng)]
        for _ in range(MEASURING if name == "kernels tune" else LINES)
    ]
    asked, found = tmp_path / "lines.json", tmp_path / "found.json"
    asked.write_text(json.dumps(lines))
    work = tmp_path / "work"
    (work / "empty").mkdir(parents=True)
    (work / "one.py").write_text(ONE)
    (work / "bad.py").write_text("def config(:")
    (work / "rows.json").write_text('[{"family": "arm"}]')
    fake_trainer.planned(work / "sweep")  # its runs wait for data that is not there
    prepare(SOURCES[0], "synthetic:16", work / "data", seq_len=16, workers=1)
    shutil.copy(Path(cli.__file__).parents[2] / "docs" / "prices.toml", work)
    rows = csv_rows(surface(noise=0.003))
    write_csv(work / "runs.csv", rows + [row | {"family": "other"} for row in rows])
    if name in ("scaling predict", "scaling design"):
        assert cli.main(["fit", str(work / "runs.csv"), "--bootstrap", "100"]) == 0
    if name in QUICK:
        run = request.getfixturevalue("tiny_run")
        shutil.copytree(run, work / "run")
        assert cli.main(["export", str(run), str(work / "exported")]) == 0
    words = [sys.executable, "-c", RUN, str(asked), str(found)]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    environment["PRIME_JAX_CACHE"] = str(tmp_path / "cache")  # of measured kernels
    environment["NO_GCE_CHECK"] = "true"  # nobody asks for a cloud
    done = subprocess.run(words, cwd=work, env=environment, capture_output=True, timeout=3600)
    assert done.returncode == 0, done.stderr.decode()
    for line, (code, told) in zip(lines, json.loads(found.read_text()), strict=True):
        assert code in CODES, line
        assert "Traceback" not in told, line
        assert "unforeseen" not in told, (line, told)
        assert code != 2 or len(told.strip().splitlines()) <= 2, (line, told)
        assert code != 2 or re.search(r"prime-jax: .*[^\W\d]{2}", told), (line, told)  # has words
    print(name, Counter(code for code, _ in json.loads(found.read_text())))
