"""The command line as a person meets it: light start, one-line errors, exit codes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prime_jax import cli, settings
from prime_jax.cli import launch, parse, reference
from prime_jax.cli.parse import override
from prime_jax.config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from prime_jax.errors import UserError
from prime_jax.settings import to_dict

ROOT = Path(__file__).parents[1]
ENGINES = ", ".join(launch.ENGINES)
HEAVY = ("jax", "etils", "orbax", "flax", "matplotlib", "grain", "lm_eval")


def class_of(name: str) -> type[parse.Arguments]:
    return parse.arguments_of(cli.function(name))


def imported_by(*words: str) -> list[str]:
    """What a command line loads that takes long."""
    code = (
        f"import sys; from prime_jax import cli; cli.main({list(words)!r});"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stderr.replace("'", '"'))


def test_help_imports_nothing_heavy():
    assert imported_by("--help") == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    assert cli.main([*name.split(), "--help"]) == 0
    page = capsys.readouterr().out
    assert "examples:" in page
    assert page.startswith(f"usage: prime-jax {name}")
    assert "MISSING" not in page
    assert max(map(len, page.splitlines())) <= 110
    cls = class_of(name)
    for flag, owner, field in parse.flags(cls):
        assert field.metadata["help"], flag
        assert flag in page
        number = settings.hints(owner)[field.name] in (int, float)
        assert not number or field.metadata["limits"], f"{flag} has no range"


@pytest.mark.slow
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(name):
    assert imported_by(*name.split(), "--help") == []


@pytest.mark.parametrize("group", cli.GROUPS)
def test_groups_list_their_commands(group, capsys):
    assert cli.main([group, "--help"]) == 0
    assert f"  {group} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dta"], "no such command dta; did you mean prime-jax data?"),
        (["data", "inspct"], "no such command data inspct; did you mean prime-jax data inspect?"),
        (["xyzzy"], "no such command xyzzy; prime-jax --help lists them"),
        (["data", "inspect"], "DIR is missing: made by"),
        (["data", "inspect", "a", "b"], "b: not expected here"),
        (["data", "inspect", "a", "--jsn"], "no such option --jsn; did you mean --json?"),
        (
            ["data", "prepare", "s", "--out", "o"],
            "--tokenizer SPEC is missing: how text becomes token ids",
        ),
        (["data", "entropy", "d", "--seed"], "--seed needs a value: an integer, at least 0"),
        (["data", "entropy", "d", "--seed", "x"], "--seed x: must be an integer, at least 0"),
        (["data", "entropy", "d", "--seed", "-1"], "--seed -1: must be at least 0"),
        (["data", "entropy", "d", "-l", "2", "x"], "-l x: must be integers, each between 1 and"),
        (["data", "entropy", "d", "-l", "33"], "--length 33: must be between 1 and 32"),
        (["data", "inspect", "\udcff"], "argument 3 is not UTF-8"),
        (["train", "x.py", "--see", "3"], "no such option --see"),
        (["fit", "x", "--bootstrap", "3"], "--bootstrap 3: must be an integer, at least 100"),
        (["fit", "x", "--boot", "300"], "no such option --boot; did you mean --bootstrap?"),
        (["fit", "x", "--SEEED", "3"], "no such option --SEEED; did you mean --seed?"),
        (["train", "x.py", "--lr", "1"], "no such option --lr; did you mean --optim.peak-lr?"),
        (["sample", "r", "--hepl"], "no such option --hepl (prime-jax sample --help)"),
        (["import", "bogus", "a", "b"], "LAYOUT bogus: must be one of lit_gpt, megatron, safe"),
        (["sweep", "kill", "root"], "ID [ID ...] is missing: ids of runs, or their beginnings"),
        (["train", ""], "EXPERIMENT is empty: must be a path"),
        (["sweep", "run", ""], "ROOT is empty: must be text"),
        (["fit", "x", "--out="], "--out is empty: must be a path"),
        (["sample", "r", "--prompt", ""], "--prompt is empty: must be text"),
        (
            ["sample", "r", "--prompt", "--x"],
            "--prompt needs a value: text; one that begins with a",
        ),
        (["train", "x.py", "--check=yes"], "--check takes no value"),
        (["sweep", "up", "r", "--on"], f"--on needs a value: one of {ENGINES}"),
        (
            ["sweep", "up", "r", "--on", "local"],
            f"--on local: must be one of {ENGINES}; here: ",
        ),
    ],
)
def test_a_wrong_word_is_one_line(words, says, capsys):
    assert bad_command(words, capsys).startswith(f"prime-jax: {says}")


def test_words_become_arguments():
    words = ["text:*", "--tokenizer=bytes", "--seq-len", "64", "--out", "d"]
    made = parse.parse(class_of("data prepare"), words, "p")
    assert (made.request.source, made.request.seq_len, made.out) == ("text:*", 64, Path("d"))
    made = parse.parse(class_of("data entropy"), ["-l", "1", "2", "--json", "--", "-d"], "p")
    assert (made.length, made.json, made.dir) == ((1, 2), True, Path("-d"))
    words = ["--model.width", "256", "x.py", "--kernels.head-blocks", "1", "2", "--out", "d"]
    made = parse.parse(class_of("train"), words, "p")
    assert (made.experiment, made.out) == (Path("x.py"), Path("d"))
    assert made.overrides == ("--model.width", "256", "--kernels.head-blocks", "1", "2")
    made = parse.parse(class_of("fit"), ["runs.csv", "--formats", "svg, png"], "p")
    assert made.suffixes == ["svg", "png"]


def test_version(capsys):
    assert cli.main(["--version"]) == 0
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
        (["--model.width", "wide"], "--model.width wide: must be an integer, at least 1; now 128"),
        (["--model.width"], "--model.width needs a value: an integer, at least 1; now 128"),
        (["--model.width", "-3"], "--model.width -3: must be an integer, at least 1; now 128"),
        (["--optim.peak-lr", "nan"], "--optim.peak-lr nan: must be a number, above 0; now"),
        (["--family", "gpt"], "--family gpt: must be one of arm, mdm, prime; now"),
        (["--kernels.head-blocks", "x"], "must be integers, each at least 1; now []"),
        (["--model.qk-norm", "maybe"], "must be True or False; now True"),
        (["--seed", "0", "--steps", "1.5"], "--steps 1.5: must be an integer"),
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
        optim=OptimConfig(warmup_steps=1),
        eval=EvalConfig(examples=8, batch_size=64),
        mesh=MeshConfig(replica=1, data=1),
    )
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(to_dict(config)))
    path = tmp_path / "experiment.py"
    path.write_text(
        "import json, pathlib\n"
        "from prime_jax.config import RunConfig\n"
        "from prime_jax.settings import from_dict\n"
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
    assert "--log.every 0: must be an integer, at least 1; now" in bad_command(
        [*train, "--log.every", "0"], capsys
    )
    assert "--seed -1: must be an integer, between 0" in bad_command(
        [*train, "--seed", "-1"], capsys
    )
    assert "optim.warmup_steps = 3: must be below steps 3" in bad_command(
        [*train, "--optim.warmup-steps", "3"], capsys
    )
    assert "leaves no step between warm-up (1 steps) and cool-down" in bad_command(
        [*train, "--optim.schedule", "wsd", "--optim.cooldown-fraction", "0.9"], capsys
    )
    assert "estimator 'tokn'" in bad_command([*train, "--eval.estimators", "tokn"], capsys)
    assert "alpha runs from" in bad_command(
        [*train, "--objective.schedule", "geometric", "--objective.sigma-min", "0.01"], capsys
    )
    assert "manifest" in bad_command([*train, "--data.path", tmp_path / "nothing"], capsys)
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    assert "cannot make" in bad_command(["train", experiment, "--out", blocked / "run"], capsys)
    assert "function config()" in bad_command(["train", _empty(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "."], "is a folder; an experiment is a Python file (.py)"),
        (["train", "runs.csv"], "an experiment is a Python file (.py)"),
        (["sweep", "plan", "runs.csv"], "an experiment is a Python file (.py) or a list of rows"),
        (["sweep", "run", "runs.csv"], "is a file; a sweep is a folder"),
        (["import", "megatron", ".", "o", "--tokenizer", "bytes"], "is a folder, not a file"),
        (["scaling", "predict", "runs.csv", "--flops", "1e20"], "is a file; give the folder"),
        (["fit", "runs.csv", "--formats", "svg, gif"], "--formats svg, gif: must be some of"),
    ],
)
def test_a_path_of_the_wrong_kind_is_told(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs.csv").write_text("family,loss\n")
    assert says in bad_command(words, capsys)


@pytest.mark.parametrize("workers", ["0", "-2"])
def test_a_sweep_needs_a_worker(tmp_path, capsys, workers):
    line = bad_command(["sweep", "run", tmp_path, "--workers", workers], capsys)
    assert f"--workers {workers}: must be at least 1" in line


@pytest.mark.parametrize(
    "words", [["plan", "x.py", "--flops-per-second"], ["work", ".", "--time-limit"]]
)
def test_speeds_and_times_are_above_0(capsys, words):
    assert "above 0" in bad_command(["sweep", *words, "0"], capsys)


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


@pytest.mark.parametrize(("pin", "conflict"), [("0.8.0", True), ("99.0", False)])
def test_doctor_names_a_conflict_with_the_jax_ai_stack(tmp_path, monkeypatch, pin, conflict):
    from prime_jax.cli import doctor

    assert list(doctor.stack_rows()) == []
    info = tmp_path / "jax_ai_stack-2025.1.1.dist-info"
    info.mkdir()
    needs = ("chex==0.1.91", f"jax=={pin}", 'tensorflow==2.20.0; extra == "tfds"')
    lines = ["Metadata-Version: 2.1", "Name: jax-ai-stack", "Version: 2025.1.1"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {n}" for n in needs)]))
    monkeypatch.syspath_prepend(tmp_path)
    ((_, found, note),) = doctor.stack_rows()
    assert str(found) == ("2025.1.1: conflict" if conflict else "2025.1.1")
    assert note.startswith("it pins jax==0.8.0 (prime_jax needs >=") == conflict
    assert "chex" not in note


def test_doctor_says_which_device_is_missing(monkeypatch, capsys):
    import jax

    def none():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "JAX_PLATFORMS=cuda: JAX has no plug-in for it" in out
    assert "prime_jax[cuda]" in out


DOCS = [ROOT / "README.md", ROOT / "Makefile", *sorted(ROOT.glob("docs/*.md"))]
DOCS += sorted(ROOT.glob("experiments/*.py"))


def documented_lines() -> list[tuple[str, str]]:
    """(file, line) of everything that looks like a whole command of ours."""
    found = []
    for file in DOCS:
        text = file.read_text().partition(reference.BEGIN)[0].replace("\\\n", " ")
        whole = re.findall(r"^\s*(?:\$ |\$\(BIN\)/)?prime-jax +([a-z].*)$", text, re.MULTILINE)
        inline = re.findall(r"`prime-jax ([a-z][^`]*)`", text)
        inline = [re.sub(r" ?\[(?!\[)[^\]\[]*\](?!\])", "", line) for line in inline]
        found += [(file.name, line) for line in [*whole, *inline]]
    return [(name, line) for name, line in found if not re.search(r"\.\.\.|\bCOMMAND\b", line)]


def words_of(line: str) -> list[str]:
    words = shlex.split(re.split(r" (?:&&|\|\|) ", line)[0], comments=True)
    return [re.sub(r"\$\{?\(?\w+\)?\}?", "x", word) for word in words]


def test_every_documented_line_is_understood():
    lines = documented_lines()
    assert len(lines) > 60
    wrong = []
    for file, line in lines:
        words = words_of(line)
        if " ".join(words) in {*cli.COMMANDS, *cli.GROUPS}:
            continue  # its name alone
        try:
            cli.parsed(words)
        except UserError as error:
            if not re.search(
                r"is missing|are required", str(error)
            ):  # a line of prose is cut short
                wrong.append(f"{file}: {line}: {error}")
    assert wrong == []


def test_the_reference_is_that_of_the_declarations(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    page = reference.PAGE.read_text()
    assert reference.renewed(page) == page, "run: make docs"


def test_the_nearest_of_a_mistyped_option_may_be_a_setting(capsys):
    assert cli.main(["train", "preset:quickstart", "--stepz", "3"]) == 2
    assert "no such option --stepz; did you mean --steps?" in capsys.readouterr().err
