"""Random command lines made from the declarations: no trace, no hang, known exit codes.

Each command gets its lines in one process of its own, in an empty folder.
"""

import json
import random
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from prime_jax import cli, settings
from prime_jax.cli import parse

LINES = 40
CODES = {0, 1, 2, 3, 85, 130}
DECLARED = [name for name, (place, _) in cli.COMMANDS.items() if ":" in place]
ODD = ("", " ", "x", "-1", "0", "1", "3", "1e400", "nan", "inf", "-inf", "99999999999999999999")
ODD += (
    "é",
    "a" * 5000,
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
)
SOURCES = ("markov:V=16,order=1,tokens=2000", "text:/nowhere/*", "pysource:x", "A*0.5+B*0.5")
RUN = """
import io, json, signal, sys
from prime_jax import cli
def late(*_):
    raise TimeoutError("hang")
signal.signal(signal.SIGALRM, late)
out = []
for words in json.load(open(sys.argv[1])):
    sys.stdout, sys.stderr, sys.stdin = io.StringIO(), io.StringIO(), io.StringIO()
    signal.alarm(60)
    code = cli.main(words)
    signal.alarm(0)
    out.append((code, sys.stderr.getvalue()))
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
json.dump(out, open(sys.argv[2], "w"))
"""


def word_for(hint: typing.Any, rng: random.Random) -> str:
    """A value that a setting may take, or an odd one."""
    if rng.random() < 0.5:
        return rng.choice(ODD)
    choices = typing.get_args(hint)
    if choices and typing.get_origin(hint) is not tuple:
        return str(rng.choice(choices))
    return str(rng.choice([1, 2, 7, 0.5, 1e-3, "text", *SOURCES]))


def line_for(name: str, rng: random.Random) -> list[str]:
    """A line of a command: some of its positionals and flags, sometimes misspelt."""
    cls = parse.arguments_of(cli.function(name))
    words = []
    for owner, field in parse._flat(cls):
        hint = settings.hints(owner)[field.name]
        needed = settings.required(field)
        if rng.random() > (0.9 if needed else 0.25):
            continue
        if not parse._positional(field):
            flag = parse._flag(field)
            words.append(flag if rng.random() < 0.95 else flag[:-1])
            if hint is bool:
                continue
        words += [word_for(hint, rng) for _ in range(rng.choice((0, 1, 1, 1, 1, 2)))]
    if cls.SETTINGS and rng.random() < 0.5:
        path = rng.choice(list(settings.flatten(settings.to_dict(cls.SETTINGS()))))
        words += [f"--{path}", rng.choice(ODD)]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("name", DECLARED)
def test_random_lines_end_well(name, tmp_path):
    rng = random.Random(name)
    lines = [[*name.split(), *line_for(name, rng)] for _ in range(LINES)]
    asked, found = tmp_path / "lines.json", tmp_path / "found.json"
    asked.write_text(json.dumps(lines))
    work = tmp_path / "work"
    work.mkdir()
    words = [sys.executable, "-c", RUN, str(asked), str(found)]
    environment = {**__import__("os").environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(words, cwd=work, env=environment, capture_output=True, timeout=1200)
    assert done.returncode == 0, done.stderr.decode()
    for line, (code, told) in zip(lines, json.loads(found.read_text()), strict=True):
        assert code in CODES, line
        assert "Traceback" not in told, line
        assert "unforeseen" not in told, (line, told)
        assert code != 2 or len(told.strip().splitlines()) <= 2, (line, told)
