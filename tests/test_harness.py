"""The lm-eval adapter: requests in, numbers out, without network; and its eight local tasks."""

import dataclasses
import json
import os
import re
import shutil
import tomllib
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import jax

from prime_jax import cli, lm_eval
from prime_jax.cli import harness as command
from prime_jax.cli import runs
from prime_jax.cli.evaluate import tasks_table
from prime_jax.config import DataConfig, ModelConfig, RunConfig, SubtokenConfig
from prime_jax.data import manifest
from prime_jax.data.prepare import prepare
from prime_jax.errors import UserError
from prime_jax.evaluate import report, tasks, texts, trained
from prime_jax.evaluate.harness import PrimeJax, Settings
from prime_jax.evaluate.score import Scorer
from prime_jax.runtime.metrics import Clock
from prime_jax.step import program

LETTERS = ["A", "B"]
RECORDS = {
    "sciq": {
        "question": "What is wet?",
        "correct_answer": "water",
        "support": " Rain is wet.",
        **{f"distractor{i}": word for i, word in enumerate(("fire", "sand", "dust"), 1)},
    },
    "social_iqa": {
        "context": "Al fell.",
        "question": "Why?",
        **{f"answer{x}": word for x, word in zip("ABC", ("ice", "joy", "tea"), strict=True)},
        "label": "1",
    },
    "mc_taco": {"sentence": "He ran.", "question": "How long?", "answer": "a minute", "label": 1},
    "truthfulqa_mc1": {
        "question": "Is it so?",
        "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
    },
    "boolq": {"passage": "Ice is cold.", "question": "is ice cold", "label": 1},
    "anli_r1": {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
    "anli_r2": {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2},
    "anli_r3": {"premise": "It rains.", "hypothesis": "It is late.", "label": 1},
    "arc_easy": {
        "question": "What flies?",
        "answerKey": "B",
        "choices": {"text": ["rock", "bird"], "label": LETTERS},
    },
    "openbookqa": {
        "question_stem": "The sun is",
        "answerKey": "A",
        "choices": {"text": ["hot", "cold"], "label": LETTERS},
    },
}
RIGHT = {  # the place of the right answer among the choices
    "sciq": 3,
    "social_iqa": 0,
    "mc_taco": 1,
    "truthfulqa_mc1": 0,
    "boolq": 1,
    "anli_r1": 0,
    "anli_r2": 2,
    "anli_r3": 1,
    "arc_easy": 1,
    "openbookqa": 0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained model of bytes, 64 long."""
    directory = tmp_path_factory.mktemp("bytes")
    (directory / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 300)
    prepare(f"stream:{directory}/text.txt", "bytes", directory / "data", seq_len=64, workers=1)
    config = RunConfig(
        family="prime",
        model=ModelConfig(vocab_size=257, layers=1, width=16, heads=1, init_std=0.3),
        subtokens=SubtokenConfig(length=3),
        data=DataConfig(path=str(directory / "data"), seq_len=64),
    )
    data = manifest.load(config.data.path)
    made = program(config, data.eos_id)
    return trained.Trained(directory, config, made, made.init(Clock(), 0).params, 1000, data)


@pytest.fixture(scope="module")
def scorer(run):
    return Scorer(run, devices=1, batch_size=8)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    for name, record in RECORDS.items():
        (directory / f"{name}.jsonl").write_text(2 * (json.dumps(record) + "\n"))
    return directory


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def requests(*arguments, task="t"):
    """What the harness hands over; documents with one request each."""
    return [
        types.SimpleNamespace(args=args, task_name=task, doc_id=i)
        for i, args in enumerate(arguments)
    ]


def choices(*arguments):
    """Requests of one multiple-choice document."""
    return [types.SimpleNamespace(args=args, task_name="c", doc_id=0) for args in arguments]


def test_a_request_is_the_chain_rule_of_its_continuation(run, scorer):
    model = PrimeJax(scorer=scorer, nll_type="chain_rule")
    (got, _), _ = model.loglikelihood(choices(("Rain is", " wet"), ("Rain is", " dry")))
    tokens, network, book = (
        model.encode("Rain is wet"),
        run.network(jax.device_get(run.params)),
        run.codebook,
    )
    at = np.arange(7, 11)
    visible = np.arange(11) < at[:, None]
    digits = np.where(visible[..., None], book.digits[tokens], book.base)
    h, head = network(digits, None, None)
    log_p = jax.nn.log_softmax(h[np.arange(4), at] @ head.T)[:, book.rows]
    want = float(log_p[np.arange(4), np.array(tokens)[at]].sum())
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_a_request_does_not_depend_on_the_others(scorer):
    model = PrimeJax(scorer=scorer, mc_num=4)
    some = [("Ice", " is cold"), ("", "Fire"), ("x" * 90, " y"), ("a ", "b"), ("c", "d" * 100)]
    together = model.loglikelihood(choices(*some))
    assert model.contexts_cut == 2  # and nothing of a continuation is lost
    for request, value in zip(some, together, strict=True):
        (alone,) = model.loglikelihood(choices(request, request))[:1]
        assert alone[0] == pytest.approx(value[0], rel=1e-5)
        assert np.isfinite(alone[0])


def test_spaces_belong_to_the_continuation(scorer):
    model = PrimeJax(scorer=scorer)
    assert model.pair("a ", "b") == ([97], [32, 98])
    assert model.pair("", "ab") == ([], [97, 98])


def test_greedy_is_asked_where_a_document_has_one_request(run, scorer):
    """Decode by hand, most confident first, then ask for exactly that text and for another."""
    model = PrimeJax(scorer=scorer, nll_type="chain:l2r")
    book, network = run.codebook, run.network(jax.device_get(run.params))
    tokens, hidden = [*model.encode("Ice"), 0, 0, 0], {3, 4, 5}
    while hidden:
        digits = book.digits[tokens].copy()
        digits[list(hidden)] = book.base
        h, head = network(digits[None], None, None)
        p = np.asarray(jax.nn.softmax(h[0] @ head.T))[:, book.rows]
        at = max(hidden, key=lambda i: p[i].max())
        tokens[at] = int(p[at].argmax())
        hidden.remove(at)
    windows = tokens[3:], [(t + 1) % 257 for t in tokens[3:]]
    model.pair = lambda context, continuation: (tokens[:3], list(windows[int(continuation)]))
    assert [g for _, g in model.loglikelihood(requests(("", "0"), ("", "1")))] == [True, False]


@pytest.mark.slow
def test_rolling_gives_the_bits_per_byte_of_eval(run, scorer, tmp_path):
    (tmp_path / "a.txt").write_text("A text that is longer than one window of the model. " * 4)
    for name, cut in (("subtoken", {}), ("chain:l2r", {"stride": 24, "context": 40})):
        (found,) = texts.load(f"text:{tmp_path}/a.txt", run, texts.Cutting(**cut))
        loss = report.evaluate(scorer, found, [name], 2)[0]
        stored = report.described(loss, found.n_bytes)
        model = PrimeJax(scorer=scorer, nll_type=name, replicates=2, **cut)
        (nats,) = model.loglikelihood_rolling(requests(((tmp_path / "a.txt").read_text(),)))
        assert -nats / np.log(2) / found.n_bytes == pytest.approx(stored["bits_per_byte"])


def test_generation_is_cut_at_the_first_stop(scorer, monkeypatch):
    model = PrimeJax(scorer=scorer, gen_length=8)
    asked = []

    def fake(prompts, length, temperature):
        asked.append((prompts, length, temperature))
        return [model.encode("one\ntwo. three") for _ in prompts]

    monkeypatch.setattr(model, "_generate", fake)
    got = model.generate_until(
        requests(
            ("Q", {"until": ["\n"]}),
            ("Q", {"until": [". ", "\n\n"], "max_gen_toks": 4}),
            ("x" * 99, {"until": []}),
        )
    )
    assert got == ["one", "one\ntwo", "one\ntwo. three"]
    assert sorted(length for _, length, _ in asked) == [4, 8]
    assert max(len(p) for prompts, length, _ in asked for p in prompts) == 56
    with pytest.raises(UserError, match="gen_length = 64"):
        PrimeJax(scorer=scorer, gen_length=64).generate_until(requests(("Q", {})))


@pytest.mark.slow
def test_generation_is_the_samplers(run, scorer):
    """Deterministic, at temperature 0, whatever else is asked for."""
    model = PrimeJax(scorer=scorer, gen_length=8, block_length=4)
    some = requests(("Ice", {"until": []}), ("", {"until": []}), ("x" * 99, {"until": []}))
    together = model.generate_until(some)
    assert [model.generate_until([request])[0] for request in some] == together
    assert all(len(text) >= 1 for text in together)


@pytest.mark.parametrize("name", RECORDS)
def test_local_tasks_ask_what_the_harness_asks(name, records):
    from lm_eval.tasks import TaskManager

    (task,) = (
        TaskManager(include_defaults=False).load([tasks.offline(name, records)])["tasks"].values()
    )
    doc = next(iter(task.test_docs()))
    text, options, right = task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)
    assert len(options) > 1
    right = options.index(right) if isinstance(right, str) and right in options else int(right)
    assert right == RIGHT[name]
    assert text


def test_tasks_run_offline_with_one_preset(scorer, records):
    tasks._prepare(offline=True)
    call = tasks.Call("sciq,anli", records, limit=1)
    told = []
    record = tasks.evaluate(scorer, call, Settings(mc_num=2), lambda *a: told.append(a))
    assert set(record["results"]) == {"sciq", "anli_r1", "anli_r2", "anli_r3"}
    for values in record["results"].values():
        assert values["acc"][0] in (0.0, 1.0)
    assert sum(done for *_, done in told) == told[0][1] == 2 * (4 + 3 * 3)
    json.dumps(record, allow_nan=False)
    assert len(tasks_table([record, record]).rows) == 2
    changed = records / "sciq.jsonl"
    before = changed.read_bytes()
    changed.write_bytes(before + b"\n")
    assert tasks._data_hash(call) != record["data_hash"]
    changed.write_bytes(before)
    assert tasks._data_hash(call) == record["data_hash"]
    notes = tasks_table([record | {"contexts_cut": 1234}]).notes
    assert notes[0].startswith("documents: ")
    assert "1,234 requests did not fit" in notes[1]


def test_the_sensitivity_table_changes_one_setting_at_a_time(run):
    made = tasks.variations(Settings(), run, {"multiple_choice"})
    differ = [
        [f.name for f in dataclasses.fields(s) if getattr(s, f.name) != f.default] for s in made
    ]
    assert differ[0] == []
    assert all(len(names) == 1 for names in differ[1:])
    assert {names[0] for names in differ[1:]} == {"nll_type", "mc_num", "cfg"}
    assert {"steps", "block_length"} <= {
        f.name
        for s in tasks.variations(Settings(), run, {"generate_until"})
        for f in dataclasses.fields(s)
        if getattr(s, f.name) != f.default
    }


def test_mean_accuracy_counts_the_rounds_of_anli_once():
    results = {f"anli_r{i}": {"acc": [0.3, None]} for i in (1, 2, 3)} | {
        "sciq": {"acc": [0.9, 0.1]}
    }
    assert tasks.mean_accuracy(results) == pytest.approx(0.6)


GOOD = {"question": "q", "support": "s", "choices": {"text": ["a", "b"]}}


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([], "no record"),
        ([GOOD, {"question": "q", "support": "s"}], "line 2: no field choices"),
        ([GOOD, GOOD | {"question": None}], "line 2: question is null; it must be text"),
        ([GOOD, GOOD | {"question": 5}], "line 2: question is a number; it must be text"),
        ([GOOD | {"question": ""}], "line 1: question is empty"),
        ([GOOD, GOOD | {"choices": {"text": ["a", ""]}}], "line 2: choices.text is empty"),
        ([GOOD, ["a"]], "line 2: no JSON object"),
        ([GOOD, GOOD | {"support": ""}], None),
    ],
)
def test_a_bad_record_is_named(records, says, tmp_path):
    file = tmp_path / "sciq.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    if says is None:
        return tasks.check_records(file)
    with pytest.raises(UserError, match=re.escape(says)):
        tasks.check_records(file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "siq", "--task-data", "{records}"], "did you mean sciq"),
        (["--tasks", "sciq", "--task-data", "{empty}"], "sciq.jsonl does not exist"),
        (["--tasks", "sciq", "--task-data", "nowhere"], "no such directory"),
        (["--tasks", "sciq", "--task-data", "{records}", "--model-args", "mcnum=3"], "mc_num"),
        (["--tasks", "sciq", "--task-data", "{records}", "--model-args", "mc_num=x"], "an integer"),
        (["--tasks", "sciq", "--task-data", "{records}", "--model-args", "mc_num=0"], "at least 1"),
        (["--tasks", "sciq", "--task-data", "{records}", "--model-args", "nll_type=q"], "unknown"),
    ],
)
def test_bad_input_is_one_line(tiny_run, records, tmp_path, words, said, capsys):
    words = [w.format(records=records, empty=tmp_path) for w in words]
    assert cli.main(["eval", str(tiny_run), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.fixture
def own_task(records, tmp_path, monkeypatch):
    """The folder of a task `own`; the harness makes no index of its thousands."""
    import lm_eval.tasks

    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\noutput_type: loglikelihood\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {records / 'boolq.jsonl'}}}}}\n"
        "doc_to_text: '{{question}}?'\ndoc_to_target: ' yes'\n"
        "metric_list: [{metric: acc}]\n"
    )
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda **kw: manager(**kw | {"include_defaults": False})
    )
    return tmp_path


@pytest.mark.slow
def test_include_path_adds_tasks(scorer, records, own_task, tmp_path):
    call = tasks.Call("own,boolq", records, tmp_path, limit=1)
    assert tasks.output_types(call) == {"loglikelihood", "multiple_choice"}
    record = tasks.evaluate(scorer, call, Settings(mc_num=2), lambda *a: None)
    assert record["results"]["own"]["acc"][0] == 0.0
    with pytest.raises(UserError, match="no such task; did you mean own"):
        tasks.load(dataclasses.replace(call, names="owm"))


# --- the harness's own command


def their_command(monkeypatch, *words):
    """The exit code of `python -m prime_jax.lm_eval WORDS`, in this process."""
    monkeypatch.setattr("sys.argv", ["lm-eval", *map(str, words)])
    return lm_eval.main()


@pytest.fixture
def unregistered(monkeypatch):
    """The harness's registry as its own process finds it: nobody has imported our adapter."""
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    known = {name: what for name, what in model_registry.items() if name != "prime_jax"}
    monkeypatch.setattr(model_registry, "_objs", known)
    return model_registry


@pytest.mark.slow
def test_their_command_gives_our_number(
    run, scorer, own_task, unregistered, tmp_path, monkeypatch, capsys
):
    """Their main, their arguments, their report: the log-likelihood is the adapter's."""
    monkeypatch.setattr(runs, "load", lambda name: {"RUN": run}[name])
    out = tmp_path / "out"
    words = ["run", "--model", "prime_jax", "--model_args", "run=RUN,nll_type=chain_rule"]
    words += ["--tasks", "own", "--include_path", own_task, "--limit", 1, "--batch_size", "auto"]
    assert their_command(monkeypatch, *words, "--log_samples", "--output_path", out) == 0
    assert "|own" in capsys.readouterr().out
    (samples,) = out.rglob("samples_own*.jsonl")
    ((found, greedy),) = json.loads(samples.read_text().splitlines()[0])["filtered_resps"]
    ours = PrimeJax(scorer=scorer, nll_type="chain_rule")
    ((want, _),) = ours.loglikelihood(requests(("is ice cold?", " yes")))
    assert float(found) == pytest.approx(want, rel=1e-5)
    assert greedy in ("False", False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("run=nowhere", "nowhere"),
        ("mc_num=4", "run=RUN"),
        ("run=RUN,mcnum=4", "did you mean mc_num"),
        ("run=RUN,mc_num=x", "an integer"),
        ("run=RUN,nll_type=q", "unknown"),
    ],
)
def test_wrong_model_args_of_their_command_are_one_line(
    given, said, own_task, unregistered, monkeypatch, capsys
):
    words = ["--model", "prime_jax", "--tasks", "own", "--include_path", own_task]
    assert their_command(monkeypatch, "run", *words, "--model_args", given) == 2
    ours = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prime-jax:")]
    assert len(ours) == 1
    assert said in ours[0]


def test_the_entry_point_is_the_model(unregistered):
    """As declared, and as a harness that discovers plugins would register and load it."""
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    (item,) = declared["project"]["entry-points"]["lm_eval.models"].items()
    point = metadata.EntryPoint(*item, "lm_eval.models")
    assert point.load() is command.PrimeJax
    unregistered.register(point.name, target=point)
    assert unregistered.get("prime_jax") is command.PrimeJax


def test_their_command_takes_a_run_of_a_sweep(tmp_path, monkeypatch):
    root = shutil.copytree(Path(__file__).parent / "net" / "sweep", tmp_path / "sweep")
    monkeypatch.setattr(trained, "load", lambda *directories, log: directories)
    model = object.__new__(command.PrimeJax)
    assert model.load(f"{root}:3340") == (root / "runs" / "3340f338bd" / "1",)


def test_the_installed_package_has_the_entry_point():
    found = metadata.entry_points(group="lm_eval.models", name="prime_jax")
    if not any(point.value == lm_eval.MODEL for point in found):
        pytest.skip("prime_jax was installed before it had the entry point; make install renews it")
    (point,) = found
    assert point.load() is command.PrimeJax


@pytest.mark.slow
def test_rolling_gives_the_bits_per_byte_of_eval_on_wikitext(run):
    """The whole test text, where it is on this machine."""
    place = Path(os.environ.get("PRIME_TEXT_DIR", Path(__file__).parents[2] / "shared/data/text"))
    file = place / "wikitext2_test.txt"
    if not file.exists():
        pytest.skip(f"no {file}; PRIME_TEXT_DIR names the directory of wikitext2_test.txt")
    wide = Scorer(run, batch_size=512)
    (found,) = texts.load(f"text:{file}", run, texts.Cutting())
    assert found.n_bytes == len(file.read_bytes())
    loss = report.evaluate(wide, found, ["subtoken"], 2)[0]
    assert loss.n_tokens == found.n_bytes
    model = PrimeJax(scorer=wide, replicates=2)
    (nats,) = model.loglikelihood_rolling(requests((file.read_text(),)))
    bits = report.described(loss, found.n_bytes)["bits_per_byte"]
    assert -nats / np.log(2) / found.n_bytes == pytest.approx(bits, rel=1e-6)
