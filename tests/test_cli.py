"""The command line as a person meets it: light start, one-line errors, exit codes."""

import argparse
import json
import re
import subprocess
import sys

import pytest

from prime_jax import cli
from prime_jax.cli.train import override
from prime_jax.config import DataConfig, EvalConfig, ModelConfig, RunConfig
from prime_jax.errors import UserError
from prime_jax.settings import to_dict

HEAVY = ("jax", "numpy", "scipy", "tyro", "rich", "matplotlib", "grain", "sentencepiece")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from prime_jax import cli; cli.parser().format_help();"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def commands_below(parser, words=()):
    """(words, parser) of every command and group of commands."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from commands_below(inner, (*words, name))


COMMANDS = dict(commands_below(cli.parser()))


def test_all_commands_are_found():
    some = {("data", "entropy"), ("sweep", "status"), ("scaling", "design"), ("analyse", "bits")}
    assert some | {(), ("export",), ("import",), ("eval",)} <= set(COMMANDS)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_and_option_has_a_text(words):
    parser = COMMANDS[words]
    assert parser.description
    for action in parser._actions:
        if isinstance(action, (argparse._SubParsersAction, argparse._HelpAction)):
            continue
        name = action.option_strings or action.dest
        assert action.help, name
        if action.option_strings and action.required:
            assert "(required)" in action.help, name
        if action.default not in (None, False, 0, "", [], argparse.SUPPRESS):
            assert re.search(r"default|\(.+\)", action.help), f"{name} does not say its default"


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_explains_itself(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("prime-jax 0.")


def test_overrides_are_typed():
    config = override(
        RunConfig(), ["--model.width", "256", "--optim.peak-lr", "3e-4", "--seed", "3"]
    )
    assert (config.model.width, config.optim.peak_lr, config.seed) == (256, 3e-4, 3)
    assert override(RunConfig(), ["--objective.carry-over", "False"]).objective.carry_over is False
    assert override(RunConfig(), ["--family", "arm"]).family == "arm"
    assert override(RunConfig(), ["--eval.estimators", "token"]).eval.estimators == ("token",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.widht", "256"], "did you mean --model.width"),
        (["--optim.lr", "1"], "no such setting"),
        (["--model.width", "wide"], "--model.width wide: not a valid value"),
        (["--family", "gpt"], "--family gpt: not a valid value (one of arm, mdm, prime; now"),
        (["--kernels.head-blocks", "x"], "not a valid value (any number of int; now"),
        (["--model.qk-norm", "maybe"], "not a valid value (True or False; now True)"),
        (["--seed", "0", "--steps", "1.5"], "--steps 1.5: not a valid value"),
    ],
)
def test_bad_overrides_name_the_setting(arguments, message):
    with pytest.raises(UserError) as error:
        override(RunConfig(), arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def experiment(tmp_path, markov_data):
    """A file with a tiny run on the Markov data."""
    config = RunConfig(
        steps=3,
        family="mdm",
        batch_size=8,
        model=ModelConfig(vocab_size=16, layers=1, width=16, heads=1),
        data=DataConfig(path=str(markov_data), seq_len=16),
        eval=EvalConfig(examples=8, batch_size=64),
    )
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(to_dict(config)))
    path = tmp_path / "experiment.py"
    path.write_text(
        "import json, pathlib\n"
        "from prime_jax.config import RunConfig, from_dict\n"
        "def config():\n"
        f"    return from_dict(RunConfig, json.loads(pathlib.Path({str(saved)!r}).read_text()))\n"
    )
    return path


def test_train_prints_kinds_and_errors(experiment, tmp_path, capsys):
    assert cli.main(["train", str(experiment), "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "nelbo" in out
    assert "result.json" in out
    assert (tmp_path / "run" / "result.json").exists()


def bad_command(arguments, capsys) -> str:
    """Run a command that must fail; returns its one line."""
    assert cli.main([str(a) for a in arguments]) == 2
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    (line,) = streams.err.strip().splitlines()
    return line


def test_bad_input_is_one_line_and_exit_code_2(experiment, tmp_path, capsys):
    train = ["train", experiment, "--out", tmp_path / "bad"]
    assert "did you mean" in bad_command([*train, "--model.widht", "8"], capsys)
    assert "no such experiment" in bad_command(["train", tmp_path / "none.py"], capsys)
    assert "vocab_size" in bad_command([*train, "--model.vocab-size", "17"], capsys)
    assert "seq_len" in bad_command([*train, "--data.seq-len", "8"], capsys)
    assert "heads" in bad_command([*train, "--model.heads", "3"], capsys)
    assert "subtokens.length" in bad_command([*train, "--subtokens.length", "4"], capsys)
    assert "log.every = 0: must be at least 1" in bad_command([*train, "--log.every", "0"], capsys)
    assert "seed = -1: must be between 0" in bad_command([*train, "--seed", "-1"], capsys)
    assert "estimator 'tokn'" in bad_command([*train, "--eval.estimators", "tokn"], capsys)
    assert "alpha runs from" in bad_command(
        [*train, "--objective.schedule", "geometric", "--objective.sigma-min", "0.01"], capsys
    )
    assert "manifest" in bad_command([*train, "--data.path", tmp_path / "nothing"], capsys)
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    assert "cannot make" in bad_command(["train", experiment, "--out", blocked / "run"], capsys)
    assert "function config()" in bad_command(["train", _empty(tmp_path)], capsys)


@pytest.mark.parametrize("workers", ["0", "-2"])
def test_a_sweep_needs_a_worker(tmp_path, capsys, workers):
    line = bad_command(["sweep", "run", tmp_path, "--workers", workers], capsys)
    assert f"--workers {workers}: must be at least 1" in line


@pytest.mark.parametrize(
    "words", [["plan", "x.py", "--flops-per-second"], ["work", ".", "--time-limit"]]
)
def test_speeds_and_times_are_above_0(capsys, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", *words, "0"])
    assert stop.value.code == 2
    assert "a number above 0" in capsys.readouterr().err


def _empty(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("")
    return path


def test_doctor_reports_what_is_there(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "jax" in out
    assert "device" in out
    assert all(f"kernel {name}" in out for name in ("attention", "embedding", "head"))
