"""Preparation: what comes out is the text that went in, whoever interrupts it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from corpora import corpus, make

from prime_jax import cli
from prime_jax.data import assemble, encode, loader, parallel, prepare, readers, sources, tokenizers
from prime_jax.data import manifest as manifests
from prime_jax.errors import UserError
from prime_jax.runtime import storage


def stream(manifest, split):
    """Tokens of a split's blocks and the document of each block."""
    blocks = loader.Blocks(manifest, split)
    tokens, doc = blocks.read(np.arange(len(blocks)))
    return tokens.reshape(-1), doc


def contents(directory: Path) -> dict:
    """Every file but the one timing."""
    files = {p.name: p.read_bytes() for p in directory.iterdir()}
    about = json.loads(files["manifest.json"])
    del about["tokens_per_second"]
    return files | {"manifest.json": about}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory):
    return make(text, tmp_path_factory.mktemp("data") / "set")


def test_streams_hold_every_document_once_in_the_split_of_its_hash(prepared, text):
    files = [Path(p) for part in sources.parse(text)[0].parts for p in part.args[0]]
    expected = {name: [] for name in manifests.SPLITS}
    for file in files:
        u = readers.uniform(file.read_bytes().decode())
        split = "train" if u < 0.9 else "valid" if u < 0.95 else "test"
        expected[split].append([*file.read_bytes(), 256])
    assert all(expected.values())
    for name, documents in expected.items():
        split = prepared.split(name)
        tokens, doc = stream(prepared, name)
        whole = [t for d in documents for t in d]
        assert tokens.tolist() == whole[: len(tokens)]
        assert len(whole) - len(tokens) == split.dropped_tokens < 32
        assert (split.documents, split.tokens) == (len(documents), len(tokens))
        assert split.blocks == len(tokens) // 32
        assert split.bytes == sum(t != 256 for t in tokens)
        of_token = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
        assert doc.tolist() == of_token[: len(tokens) : 32].tolist()


def test_tables(prepared):
    tokens, _ = stream(prepared, "train")
    assert prepared.unigram().tolist() == np.bincount(tokens, minlength=257).tolist()
    assert prepared.token_bytes().tolist() == [1] * 256 + [0]
    assert (prepared.vocab_size, prepared.eos_id, prepared.eos_policy) == (257, 256, "append")
    assert prepared.dtype == "uint16"
    assert prepared.tokenizer().decode_bytes(tokens[:10]) == bytes(tokens[:10].tolist())


def test_same_bytes_for_any_number_of_workers(text, tmp_path, small_parts):
    one = make(text, tmp_path / "one", "bpe:320", workers=1)
    many = make(text, tmp_path / "many", "bpe:320", workers=2)
    assert len(one.train.shards) > 2
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert one.fingerprint == many.fingerprint


def test_number_of_parts_and_shards_does_not_change_the_stream(
    prepared, text, tmp_path, small_parts
):
    cut = make(text, tmp_path / "cut")
    assert len(cut.train.shards) > 2
    for name in manifests.SPLITS:
        for got, want in zip(stream(cut, name), stream(prepared, name), strict=True):
            assert (got == want).all()


KILLED = """
import os, signal, sys
from prime_jax.data import assemble, prepare, sources
sources.PART_BYTES = assemble.SHARD_BYTES = 4000
replace, left = os.replace, int(sys.argv[3])
def replace_or_die(a, b):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
os.replace = replace_or_die
prepare.prepare(sys.argv[1], "bytes", sys.argv[2], 32, workers=1)
"""


def test_kill_9_at_any_file_loses_at_most_the_task_in_work(
    text, tmp_path, small_parts, monkeypatch
):
    whole = make(text, tmp_path / "whole")
    parts = len(sources.parse(text)[0].parts)
    out = tmp_path / "killed"
    finished = 0
    for files in (25, 5 * parts + 12):  # in the first pass; in the second
        command = [sys.executable, "-c", KILLED, text, str(out), str(files)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        with pytest.raises(UserError, match="unfinished"):
            manifests.load(out)
        now = len(list((out / "parts").glob("[0-9]*.json")))
        assert now > finished
        finished = now
    assert finished == parts
    shards = len(list((out / "parts").glob("shard*.json")))
    assert 0 < shards < len(list(tmp_path.glob("whole/*.array_record")))
    monkeypatch.setattr(encode, "encode_part", lambda task: pytest.fail("encoded again"))
    assert make(text, out).fingerprint == whole.fingerprint
    assert contents(out) == contents(tmp_path / "whole")


def test_workers_die_with_their_parent(tmp_path):
    """An orphan would hold memory for ever, and write into a directory somebody else resumes."""
    (tmp_path / "slow.py").write_text(
        "import os, sys, time\n"
        "from prime_jax.data import parallel\n"
        "def task(path):\n"
        "    open(path, 'w').write(str(os.getpid())); time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    list(parallel.run(task, [sys.argv[1] + '/a', sys.argv[1] + '/b'], 2))\n"
    )
    parent = subprocess.Popen([sys.executable, str(tmp_path / "slow.py"), str(tmp_path)])
    pids = []
    wait = threading.Event()
    for name in ("a", "b"):
        while not (tmp_path / name).exists() or not (tmp_path / name).read_text():
            assert parent.poll() is None
            wait.wait(0.05)
        pids.append(int((tmp_path / name).read_text()))
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not any(map(alive, pids)):
            return
        wait.wait(0.05)
    pytest.fail("a worker outlived its parent")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_again_is_idempotent_and_another_request_is_refused(prepared, text):
    before = contents(prepared.path)
    assert make(text, prepared.path) == prepared
    assert contents(prepared.path) == before
    with pytest.raises(UserError, match="another dataset"):
        make(text, prepared.path, seq_len=64)


def test_sources_and_tokenizer_files_are_known_by_their_content(tmp_path):
    spec = corpus(tmp_path / "text")
    files = sources.parse(spec)[0].files
    model = tmp_path / "m.model"
    trained = tokenizers.make("bpe:320", lambda n: [Path(p).read_bytes().decode() for p in files])
    model.write_bytes(trained.model)
    made = make(spec, tmp_path / "set", f"sentencepiece:{model}")
    again = lambda: make(spec, tmp_path / "set", f"sentencepiece:{model}")  # noqa: E731
    whole = Path(files[7]).read_bytes()
    os.utime(files[7], ns=(0, 0))
    assert again() == made  # another time, the same content
    for path, content, message in (
        (Path(files[7]), whole[::-1], "007.txt has changed"),
        (model, trained.model + b" ", "m.model has changed"),
        (tmp_path / "text" / "0-999.txt", b"more", "reads 62 files now, 61 then"),
    ):
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"was prepared from another .*{message}"):
            again()
        path.unlink() if before is None else path.write_bytes(before)
    assert again() == made
    (made.path / "inputs.json").unlink()  # as prepared by earlier versions
    assert again() == made
    shutil.rmtree(tmp_path / "text")
    lines = []
    prepare.prepare(spec, f"sentencepiece:{model}", made.path, 32, log=lines.append)
    assert "its source is not here any more" in lines[0]


def test_unfinished_work_of_another_request_is_kept(text, tmp_path, small_parts, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(assemble, "assemble_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(text, tmp_path / "set")
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished"):
        make(text, tmp_path / "set", seq_len=64)
    assert list((tmp_path / "set" / "parts").glob("[0-9]*.json"))


def test_two_at_once_are_refused(text, tmp_path):
    out = tmp_path / "set"
    with storage.locked(out / "parts"), pytest.raises(UserError, match="another process"):
        make(text, out)


def test_limits_take_the_beginning(text, tmp_path, small_parts):
    every = {"valid_fraction": 0.0, "test_fraction": 0.0}
    whole, _ = stream(make(text, tmp_path / "all", **every), "train")
    for workers in (1, 2):
        some = make(text, tmp_path / f"n{workers}", max_documents=7, workers=workers, **every)
        assert some.train.documents == 7
        tokens, _ = stream(some, "train")
        assert (tokens == whole[: len(tokens)]).all()
    few = make(text, tmp_path / "b", max_bytes=5000, **every)
    sizes = np.cumsum([len(t) for t in np.split(whole, np.nonzero(whole == 256)[0] + 1)])
    assert few.train.documents == 1 + np.searchsorted(sizes - np.arange(1, len(sizes) + 1), 5000)


def test_mixture_has_the_shares_asked_for(tmp_path, small_parts):
    a, b = corpus(tmp_path / "t", seed=1), corpus(tmp_path / "t", seed=2, words=600)
    mixed = make(f"{a}*0.75+{b}*0.25", tmp_path / "mix", valid_fraction=0.0, test_fraction=0.0)
    only_a = make(a, tmp_path / "a", valid_fraction=0.0, test_fraction=0.0)
    total = mixed.train.tokens + mixed.train.dropped_tokens
    whole_a = only_a.train.tokens + only_a.train.dropped_tokens
    assert whole_a / total == pytest.approx(0.75, abs=0.03)  # all of a, the beginning of b


def test_seed_changes_the_split(text, tmp_path):
    one, other = (
        make(text, tmp_path / str(seed), seed=seed, valid_fraction=0.4, test_fraction=0.0)
        for seed in (0, 1)
    )
    assert other.fingerprint != one.fingerprint
    for manifest in (one, other):
        assert manifest.train.documents + manifest.valid.documents == 60


def test_duplicates_never_straddle_the_split(tmp_path):
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text("the same document again and again")
    every = {"valid_fraction": 0.0, "test_fraction": 0.0}
    assert make(f"text:{tmp_path}/*.txt", tmp_path / "all", **every).train.documents == 50
    with pytest.raises(UserError, match=r"0 tokens in the (train|valid) split"):
        make(f"text:{tmp_path}/*.txt", tmp_path / "two", valid_fraction=0.5, test_fraction=0.0)


def test_endless_stream_is_cut_by_position_without_eos(tmp_path):
    (tmp_path / "text8").write_text("the quick brown fox " * 1000)
    got = make(f"stream:{tmp_path}/text8", tmp_path / "set", "chars:27")
    assert (got.eos_policy, got.eos_id, got.vocab_size) == ("none", -1, 27)
    sizes = [got.split(name).tokens for name in manifests.SPLITS]
    assert np.array(sizes) / 20_000 == pytest.approx([0.9, 0.05, 0.05], abs=0.002)
    tokens, _ = stream(got, "valid")
    assert got.tokenizer().decode(tokens[:20]) == "the quick brown fox "


def test_markov_blocks_are_windows_of_the_chain(tmp_path):
    from prime_jax.data import markov

    got = make("markov:V=5,seed=2,tokens=20000", tmp_path / "set", "synthetic:5")
    chain = markov.parse("V=5,seed=2,tokens=20000").stream()
    assert (stream(got, "train")[0] == chain[: got.train.tokens]).all()
    assert (stream(got, "valid")[0] == chain[18_000:][: got.valid.tokens]).all()
    with pytest.raises(UserError, match=r"synthetic:5\+eos"):
        make("markov:V=5,doc_mean=8", tmp_path / "docs", "synthetic:5")


def test_lossy_tokenizer_is_refused_and_another_may_follow(tmp_path, text, monkeypatch):
    exact = tokenizers.Bytes.encode_batch
    last = Path(sources.parse(text)[0].files[-1]).read_bytes().decode()
    for changed in (last.swapcase(), last[:-1]):  # of the same size, and of another
        with monkeypatch.context() as patch:
            patch.setattr(
                tokenizers.Bytes,
                "encode_batch",
                lambda self, texts, new=changed: exact(
                    self, [new if t == last else t for t in texts]
                ),
            )
            with pytest.raises(UserError, match="loses text: at byte"):
                make(text, tmp_path / "set")
    assert make(text, tmp_path / "set", seq_len=64).seq_len == 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"valid_fraction": 0.7, "test_fraction": 0.3}, "fraction"),
        ({"valid_fraction": -0.1}, "fraction"),
        ({"valid_fraction": float("nan")}, "fraction"),
        ({"seq_len": 1}, "--seq-len 1: must be at least 2"),
        ({"workers": -3}, "--workers -3: must be at least 0"),
        ({"max_documents": -1}, "--max-documents -1"),
        ({"max_bytes": -1}, "--max-bytes -1"),
        ({"seed": -1}, "--seed -1"),
        ({"tokenizer": "chars:27"}, r"chars:27\+eos"),
        ({"tokenizer": "chars:27+eos"}, "a-z"),
        ({"source": "text:/nowhere/*"}, "nowhere"),
    ],
)
def test_bad_requests_are_one_clear_line_and_leave_nothing(text, tmp_path, options, words):
    arguments = {"source": text, "out": tmp_path / "set"} | options
    with pytest.raises(UserError, match=words) as error:
        make(**arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "set" / "manifest.json").exists()
    assert not list(tmp_path.glob("set/**/*.json"))


def test_empty_and_tiny_sources_are_refused(tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match="no text"):
        make(f"text:{tmp_path}/x.txt", tmp_path / "set")
    (tmp_path / "x.txt").write_text("only few words")
    with pytest.raises(UserError, match="less than one block"):
        make(f"text:{tmp_path}/x.txt", tmp_path / "set", valid_fraction=0.0, test_fraction=0.0)


def test_unwritable_output_is_one_clear_line(text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        make(text, tmp_path / "file" / "set")
    with pytest.raises(UserError, match="local"):
        make(text, "gs://bucket/set")


@pytest.mark.parametrize("there", ["sweep.json", "config.json"])
def test_a_directory_of_a_sweep_or_a_run_is_refused(text, tmp_path, there):
    (tmp_path / there).write_text("{}")
    with pytest.raises(UserError, match="not empty and not a dataset; give a new directory"):
        make(text, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [there]


def test_full_disk_is_one_clear_line_and_nothing_is_lost(text, tmp_path, small_parts, monkeypatch):
    def full(path, *_):
        from array_record.python import array_record_module

        return array_record_module.ArrayRecordWriter("/dev/full", "group_size:1,uncompressed")

    from prime_jax.data import shards

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_writer", full)
        with pytest.raises(UserError, match=r"cannot write .*No space left") as error:
            make(text, tmp_path / "set")
        assert "\n" not in str(error.value)
    monkeypatch.setattr(encode, "encode_part", lambda task: pytest.fail("encoded again"))
    make(text, tmp_path / "set")


def test_full_disk_in_a_worker(text, tmp_path, small_parts, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        make(text, tmp_path / "set")


def test_dead_worker_is_one_clear_line():
    with pytest.raises(UserError, match="worker process died"):
        list(parallel.run(os._exit, [1, 1, 1], 2))


def test_workers_do_not_import_jax():
    code = "import sys, prime_jax.data.prepare as p; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The commands.


def run(*words: str) -> int:
    return cli.main(["data", *words])


def test_commands(text, tmp_path, capsys):
    out = str(tmp_path / "set")
    arguments = ["prepare", text, "--tokenizer", "bytes", "--out", out, "--seq-len", "32"]
    assert not run(*arguments, "--workers", "1")
    assert "tokens/s" in capsys.readouterr().out
    assert not run(*arguments)
    assert "already prepared" in capsys.readouterr().out
    assert not run("inspect", out, "--verify")
    assert "unigram entropy" in capsys.readouterr().out
    assert not run("inspect", out, "--json")
    about = json.loads(capsys.readouterr().out)
    assert about["train"]["blocks"] == manifests.load(out).train.blocks
    tokens, _ = stream(manifests.load(out), "train")
    assert about["sample"] == bytes(tokens[:32].tolist()).decode("utf-8", "replace")
    assert not run("entropy", out, "-l", "1", "2", "16")
    assert "mean sub-token entropy" in capsys.readouterr().out
    assert not run("entropy", out, "-l", "2", "16", "--json")
    rows = json.loads(capsys.readouterr().out)["entropies"]
    assert [(r["length"], r["shuffle"]) for r in rows] == [
        (n, shuffle) for n in (2, 16) for shuffle in (0.0, 0.25, 1.0)
    ]
    assert len(rows[-1]["slots"]) == 16
