"""`prime-jax eval` on a finished run: windows, texts, records, resumption, refusals."""

import gzip
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from prime_jax import cli
from prime_jax.cli.console import error
from prime_jax.data import tokenizers
from prime_jax.errors import UserError
from prime_jax.evaluate import likelihood, presets, report, samples, score, texts, trained
from prime_jax.runtime.records import read_json


@pytest.fixture(scope="module")
def run(tiny_run):
    return trained.load(str(tiny_run))


@pytest.fixture(scope="module")
def scorer(run):
    return score.Scorer(run, devices=2, batch_size=16)


@pytest.fixture
def numbers(tmp_path):
    """Three texts for `synthetic:16`, of 40, 16 and 5 tokens."""
    rng = np.random.default_rng(0)
    for i, n in enumerate((40, 16, 5)):
        (tmp_path / f"{i}.txt").write_text(" ".join(map(str, rng.integers(0, 16, n))) + " ")
    return f"text:{tmp_path}/*.txt"


# --- windows


@pytest.mark.parametrize(("stride", "context"), [(16, 0), (8, 8), (1, 15), (5, 3)])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_windows_score_every_token_once(length, stride, context):
    scored = []
    for begin, start, stop in score.cut(length, 16, stride, context):
        assert stop - begin <= 16
        assert start - begin == min(start, context)  # as much context as was asked for
        scored += range(start, stop)
    assert scored == list(range(length))


def test_windows_longer_than_the_model_are_refused():
    with pytest.raises(UserError, match="at most 16"):
        list(score.cut(100, 16, 12, 5))


@pytest.mark.parametrize(("length", "longest"), [(1, 1024), (33, 1024), (1024, 1024), (5, 40)])
def test_padding_is_a_half_power_of_the_model(length, longest):
    padded = score.padded_to(length, longest)
    assert length <= padded <= longest
    assert longest % padded == 0
    assert padded // 2 < max(length, score.SHORTEST) or padded % 2


# --- numbers


def test_the_training_set_gives_the_numbers_of_training(run, scorer, tiny_run):
    found = texts.load(run.config.data.path, run, texts.Cutting(examples=16))
    losses = report.evaluate(scorer, found[0], report.names_of(run, ""), 8)
    stored = {loss["estimator"]: loss for loss in read_json(tiny_run / "result.json")["losses"]}
    assert {loss.estimator for loss in losses} == set(stored)
    for loss in losses:
        old = stored[loss.estimator]
        assert loss.value == pytest.approx(old["value"], rel=1e-5)
        assert loss.se_mc == pytest.approx(old["se_mc"], rel=1e-3)
        assert loss.se_data == pytest.approx(old["se_data"], rel=1e-3)


OTHERS = ["chain:l2r", "chain:confidence", "chain:margin", "chain:entropy"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["subtoken", *OTHERS])
def test_numbers_do_not_depend_on_batch_devices_or_padding(run, numbers, name, monkeypatch):
    """While nothing is visible all positions tie, and adaptive orders must not toss for them."""
    (found,) = texts.load(numbers, run, texts.Cutting(stride=6, context=4))
    batches = [(1, 1), (3, 1), (64, 1)] if name in OTHERS[1:] else [(3, 1)]
    scorers = [score.Scorer(run, devices=n, batch_size=size) for size, n in batches]
    first, *others = (report.evaluate(scorer, found, [name], 2) for scorer in scorers)
    monkeypatch.setattr(score, "SHORTEST", 2)
    others.append(report.evaluate(score.Scorer(run, devices=4, batch_size=8), found, [name], 2))
    for other in others:
        for x, y in zip(first, other, strict=True):
            assert (x.estimator, x.n_tokens) == (y.estimator, 61)
            assert x.value == pytest.approx(y.value, rel=1e-5)


@pytest.mark.slow
def test_left_to_right_is_the_chain_rule_of_the_network(run, scorer):
    """One text by hand: hide everything from i on, read off token i."""
    tokens = np.random.default_rng(1).integers(0, 16, 10)
    windows = score.Windows([tokens.astype(np.int32)], np.array([3], np.int32))
    rows, window = score.replicated(1, 1)
    got = scorer.draws("chain:l2r", windows, rows, window)["chain:l2r"][0]
    network, book = run.network(jax.device_get(run.params)), run.codebook
    at = np.arange(3, 10)
    visible = np.arange(10) < at[:, None]
    digits = np.where(visible[..., None], book.digits[tokens], book.base)
    h, head = network(digits, None, None)
    log_p = jax.nn.log_softmax(h[np.arange(7), at] @ head.T)[:, book.rows]
    want = -float(log_p[np.arange(7), tokens[at]].sum())
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_guidance_sharpens_towards_the_context(run):
    """Scale 0 is the model itself; without context there is nothing to guide by."""
    tokens = [np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32)]
    windows = score.Windows(tokens, np.array([0, 4], np.int32))
    rows, window = score.replicated(2, 1)
    plain, guided = (
        score.Scorer(run, devices=1, batch_size=2, guidance=w).draws(
            "chain:l2r", windows, rows, window
        )["chain:l2r"]
        for w in (0.0, 1.0)
    )
    assert guided[0] == pytest.approx(plain[0], rel=1e-5)
    assert abs(guided[1] - plain[1]) > 1e-6


def test_an_interrupted_evaluation_continues(run, scorer, numbers, tmp_path):
    (found,) = texts.load(numbers, run, texts.Cutting())
    whole = report.evaluate(scorer, found, ["subtoken"], 8)
    seen = 0

    def stop(name, rows, done):
        nonlocal seen
        seen += done
        if 0 < seen < rows:
            raise KeyboardInterrupt

    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        report.evaluate(scorer, found, ["subtoken"], 8, work, stop)
    told = []
    again = report.evaluate(
        scorer, found, ["subtoken"], 8, work, lambda name, rows, done: told.append(done)
    )
    assert told[0] == seen > 0  # what was done is not done again
    assert again == whole
    assert not list(work.iterdir())


# --- texts


def test_nothing_is_dropped_from_long_texts(run, numbers):
    (found,) = texts.load(numbers, run, texts.Cutting())
    assert sum(map(len, found.windows.tokens)) == 61
    assert found.texts == 3
    path = Path(numbers.removeprefix("text:")).parent
    assert found.n_bytes == sum(len(file.read_bytes()) for file in path.glob("*.txt"))


def test_a_dataset_of_another_tokenizer_is_refused(run, tmp_path):
    from prime_jax.data.prepare import prepare

    other = tmp_path / "other"
    prepare("markov:V=12,order=0,seed=0,tokens=4000", "synthetic:12", other, seq_len=16, workers=1)
    with pytest.raises(UserError, match=r"synthetic:12.*synthetic:16"):
        texts.load(str(other), run, texts.Cutting())


def test_a_prepared_split_can_be_cut_anew(run):
    (found,) = texts.load(run.config.data.path, run, texts.Cutting(stride=8, context=8))
    (plain,) = texts.load(run.config.data.path, run, texts.Cutting())
    scored = np.concatenate(
        [t[s:] for t, s in zip(found.windows.tokens, found.windows.start, strict=True)]
    )
    np.testing.assert_array_equal(scored, np.concatenate(plain.windows.tokens))
    with pytest.raises(UserError, match="--examples 0"):
        texts.load(run.config.data.path, run, texts.Cutting(stride=8, context=8, examples=4))


DETOKENISED = {
    "wikitext2": [
        (" = = Plot = = \n", " == Plot == \n"),
        ("a 1 @,@ 000 mile @-@ long 2 @.@ 5 road", "a 1,000 mile-long 2.5 road"),
        ('He said ( twice ) , " no " .', 'He said (twice), "no".'),
        ("the ship 's crew did n't", "the ship's crew didn't"),
    ],
    "ptb": [("it was $ N billion , he did n't", "it was $N billion, he didn't")],
    "lambada": [("“hi” , it’s ``he''", '"hi" , it\'s "he"')],
    "lm1b": [("The U.S. 's plan ( one ) .", "The U.S.'s plan (one).")],
    "ag_news": [("as , it is", "as , it is")],
}


@pytest.mark.parametrize("name", DETOKENISED)
def test_detokenisers(name):
    for raw, clean in DETOKENISED[name]:
        assert presets.PRESETS[name].detokenise(raw) == clean


def test_zero_shot_sets_are_found_and_named_with_their_version(run, tmp_path):
    (tmp_path / "lm1b.txt").write_text("1 2 3 \n4 5 \n")
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "test.jsonl").write_text('{"text": "7 8 "}\n{"text": "9 "}\n')
    found = {t.rules: t for t in texts.load(f"zero-shot:{tmp_path}", run, texts.Cutting())}
    assert set(found) == {"lm1b@1", "ptb@1"}
    assert [t.tolist() for t in found["lm1b@1"].windows.tokens] == [[1, 2, 3], [4, 5]]
    assert [t.tolist() for t in found["ptb@1"].windows.tokens] == [[7, 8, 9]]  # no EOS here
    rows = gzip.compress(b'{"text": "7 8 "}\n')
    (tmp_path / "x.jsonl.gz").write_bytes(rows)
    (tmp_path / "lines.txt").write_text("1 2 \u2028 3 \r\n\n4 \x0c 5 \n")
    for name, expected in (("x.jsonl.gz", [[7, 8]]), ("lines.txt", [[1, 2, 3], [4, 5]])):
        (found,) = texts.load(f"lm1b:{tmp_path}/{name}", run, texts.Cutting())
        assert [t.tolist() for t in found.windows.tokens] == expected
    for spec, right in (
        (f"{tmp_path}/lines.txt", f"write text:{tmp_path}/lines.txt"),
        (f"{tmp_path}/x.jsonl.gz", f"write jsonl:{tmp_path}/x.jsonl.gz"),
        (f"lm1:{tmp_path}/lines.txt", f"did you mean lm1b:{tmp_path}/lines.txt"),
    ):
        with pytest.raises(UserError, match=re.escape(right)):
            texts.load(spec, run, texts.Cutting())
    (tmp_path / "x.data.gz").write_bytes(rows)
    with pytest.raises(UserError, match=r"x\.data\.gz could be plain text or rows"):
        texts.load(f"lm1b:{tmp_path}/x.data.gz", run, texts.Cutting())
    (tmp_path / "ag_news.ndjson.gz").write_bytes(rows)
    assert len(texts.load(f"zero-shot:{tmp_path}", run, texts.Cutting())) == 3
    with pytest.raises(UserError, match="none of lambada"):
        texts.load(f"zero-shot:{tmp_path / 'ptb'}", run, texts.Cutting())


# --- samples


def test_samples_are_scored_by_another_run(run, scorer, tmp_path):
    file = tmp_path / "samples.jsonl"
    odd = "1 2\u2028 3\x85 4 "  # written as it is, and no end of a line
    rows = [{"tokens": [1, 2, 3, 4], "text": odd}, {"tokens": [5] * 20, "text": "5 " * 20}]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    record = samples.score(file, run, scorer, ["chain:l2r"], 8, lambda *_: None)
    assert record["quality"]["entropy"] == pytest.approx(np.log(4) / 2)
    assert record["losses"][0]["n_tokens"] == 24  # a sample longer than the scorer is cut, not lost
    file.write_text('{"tokens": [99], "text": "99 "}\n')
    with pytest.raises(UserError, match="token 99"):
        samples.score(file, run, scorer, ["chain:l2r"], 8, lambda *_: None)


def test_what_was_given_is_not_scored_and_bytes_are_those_of_tokens(tmp_path):
    """Bytes that are no UTF-8 are U+FFFD in the text, three bytes each there, but one here."""
    file = tmp_path / "samples.jsonl"
    model = SimpleNamespace(vocab_size=257)
    config = SimpleNamespace(data=SimpleNamespace(seq_len=8), model=model)
    of = SimpleNamespace(path="run", tokenizer=tokenizers.Bytes(), config=config)

    def loaded(*lines):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return samples.load(file, of, of)

    tokens = [*b"ab", 255, 254, 253, 65]
    line = {"tokens": tokens, "text": "ab\ufffd\ufffd\ufffdA", "drawn": [[2, 6]]}
    found, seen = loaded(line, {"tokens": tokens, "text": "older", "drawn": [[0, 6]]})
    assert found.n_bytes == 4 + 6
    assert found.windows.start.tolist() == [2, 0]
    assert seen.distinct[0] == 6 / 10
    found, _ = loaded({"tokens": list(range(30)), "text": "\u2028", "drawn": [[20, 30]]})
    assert [t.tolist() for t in found.windows.tokens] == [[*range(16, 24)], [*range(24, 30)]]
    assert found.windows.start.tolist() == [4, 0]
    with pytest.raises(UserError, match="only continuations"):
        loaded({"tokens": [1, 2, 3], "text": "", "drawn": [[1, 2]]})
    with pytest.raises(UserError, match="drawn token"):
        loaded({"tokens": [1, 2, 3], "text": "", "drawn": []})


# --- the command


@pytest.mark.slow
def test_the_command_records_what_it_shows(tiny_run, numbers, tmp_path, capsys):
    out = tmp_path / "out" / "eval.json"
    out.parent.mkdir()
    words = ["eval", str(tiny_run), "--data", numbers, "--out", str(out), "--replicates", "2"]
    words += ["--devices", "1"]
    assert cli.main([*words, "--estimators", "subtoken"]) == 0
    assert cli.main([*words, "--estimators", "token", "--stride", "8", "--context", "8"]) == 0
    assert cli.main([*words, "--estimators", "token"]) == 0
    record = read_json(out)
    assert record["run"] == trained.load(str(tiny_run)).id
    first, second = record["sets"]
    losses = {loss["estimator"]: loss for loss in first["losses"]}
    assert set(losses) == {"subtoken", "joint", "token"}
    assert not losses["joint"]["valid"]
    assert "perplexity" not in losses["joint"]
    for name in ("subtoken", "token"):
        loss = losses[name]
        assert loss["valid"]
        assert loss["perplexity"] == pytest.approx(np.exp(loss["value"]))
        bits = loss["value"] * 61 / np.log(2) / first["bytes"]
        assert loss["bits_per_byte"] == pytest.approx(bits)
    assert (second["stride"], second["context"]) == (8, 8)
    assert "joint" in capsys.readouterr().out
    assert cli.main([*words, "--estimators", "token", "--out", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["sets"][0]["losses"] == [losses["token"]]
    assert "token" in said.err


BAD = [
    (["--estimators", "subtokens"], "unknown"),
    (["--estimators", "ar"], "chain:l2r"),
    (["--estimators", "chain:up"], "ORDER"),
    (["--estimators", "chain:l2r:4"], "chain:ORDER (one token per network call)"),
    (["--data", "text:nowhere/*"], "no file matches"),
    (["--data", "nowhere"], "no such file, and no dataset"),
    (["--stride", "12", "--context", "8"], "at most 16"),
    (["--devices", "99"], "devices 99"),
    (["--replicates", "1"], "at least 2"),
    (["--split", "tst"], "test"),
    (["--scorer", "x"], "--samples"),
    (["--task-data", "x"], "--tasks"),
]


@pytest.mark.parametrize(("words", "said"), BAD)
def test_bad_input_is_one_line(tiny_run, words, said, capsys):
    assert cli.main(["eval", str(tiny_run), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_the_record_of_another_run_is_refused_before_the_work(
    tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.delattr(report, "evaluate")
    record = tmp_path / "eval.json"
    record.write_text('{"schema": 1, "run": "0123456789", "step": 1, "sets": []}')
    assert cli.main(["eval", str(tiny_run), "--out", str(record)]) == 2
    assert "is not of run" in capsys.readouterr().err


def test_a_run_without_its_dataset_keeps_its_tokenizer(tiny_run, tmp_path, numbers, capsys):
    """The run was copied to a machine without its dataset; once without its tokenizer, too."""
    alone = tmp_path / "alone"
    shutil.copytree(tiny_run, alone)
    config = read_json(alone / "config.json")
    config["data"]["path"] = str(tmp_path / "gone")
    (alone / "config.json").write_text(json.dumps(config))
    assert trained.load(alone).tokenizer.hash == trained.load(tiny_run).tokenizer.hash
    assert trained.load(alone).eos_id == trained.load(tiny_run).eos_id
    for command in (["eval", str(alone)], ["sample", str(alone), "--grid", "measured"]):
        assert cli.main(command) == 2
        assert f"its dataset is not at {tmp_path / 'gone'}" in capsys.readouterr().err
    (alone / "tokenizer.json").unlink()
    for command in (["eval", str(alone), "--data", numbers], ["sample", str(alone)]):
        assert cli.main(command) == 2
        assert "holds no tokenizer" in capsys.readouterr().err


def test_kinds():
    assert (error(None), error(0.0)) == ("unknown", "0.0000")
    assert likelihood.kind("ar") == likelihood.kind("chain:margin") == "nll"
    assert likelihood.kind("joint") == "train_loss"
    assert likelihood.kind("subtoken:independent") == likelihood.kind("chain:random") == "nelbo"
