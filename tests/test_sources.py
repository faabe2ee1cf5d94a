"""Sources read what is there, in a fixed order, and the Markov chain's entropies are exact."""

import bz2
import gzip
import itertools
import json
import logging
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from prime_jax.data import markov, readers, sources
from prime_jax.errors import UserError


def documents(spec):
    return [d for s in sources.parse(spec) for part in s.parts for d in part.documents()]


def texts(spec):
    return [d.text for d in documents(spec)]


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_store_out_of_reach_is_one_line(monkeypatch, caplog, error):
    """gcsfs logs a traceback before it raises; not every error of a store is an OSError."""

    class Store:
        def glob(self, path, detail):
            try:
                raise error("Cannot connect to host\nmore about it")
            except error:
                logging.getLogger("gcsfs").exception("out of retries")
                raise

    logging.getLogger("gcsfs").setLevel(logging.NOTSET)  # storage.py may have been here
    monkeypatch.setattr("fsspec.url_to_fs", lambda glob: (Store(), glob))
    with pytest.raises(UserError) as caught:
        sources.parse("text:gs://far/*.txt")
    assert str(caught.value) == "source text:gs://far/*.txt: Cannot connect to host"
    assert not caplog.records


def test_pysource_is_the_standard_library():
    [source] = sources.parse("pysource")
    paths = [p for part in source.parts for p in part.args[0]]
    root = Path(sysconfig.get_paths()["stdlib"])
    assert str(root / "argparse.py") in paths
    assert not any("site-packages" in p for p in paths)
    assert paths == sorted(paths)
    assert not source.endless
    part = next(p for p in source.parts if str(root / "argparse.py") in p.args[0])
    assert (root / "argparse.py").read_bytes().decode() in [d.text for d in part.documents()]


def test_pysource_leaves_out_files_in_other_encodings(tmp_path):
    (tmp_path / "a.py").write_bytes(b"# caf\xe9")
    (tmp_path / "b.py").write_bytes(b"x\r\n")
    paths = (str(tmp_path / "a.py"), str(tmp_path / "b.py"))
    assert list(readers.python_files(paths)) == [None, readers.Document("x\r\n")]


def test_text_is_one_document_per_file_byte_for_byte(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second\r\n\0\xe2\x96\x81")
    (tmp_path / "a.txt").write_bytes(b"first\n")
    (tmp_path / "c.md").write_bytes(b"other")
    assert texts(f"text:{tmp_path}/*.txt") == ["first\n", "second\r\n\0\u2581"]


def test_compressed_files_are_read_as_they_are(tmp_path):
    zstandard = pytest.importorskip("zstandard")

    line = json.dumps({"text": "hello"}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line))
    frame = zstandard.ZstdCompressor().compress(line)
    (tmp_path / "b.jsonl.zst").write_bytes(frame + frame)
    (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(line))
    assert texts(f"jsonl:{tmp_path}/*") == ["hello"] * 4
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 1000)[:40])
    (tmp_path / "b.jsonl.zst").write_bytes(frame + frame[:-3])
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        with pytest.raises(UserError, match=name):
            texts(f"jsonl:{tmp_path}/{name}")


def test_remote_globs():
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe({"/bucket/x/1.txt": b"one", "/bucket/x/2.txt": b"two"})
    assert texts("text:memory://bucket/x/*.txt") == ["one", "two"]


def test_jsonl(tmp_path):
    rows = [{"text": "a\nb", "id": 1}, {"text": ""}, {"text": "\ud800 lone surrogate"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = documents(f"jsonl:{tmp_path}/x.jsonl")
    assert found == [readers.Document("a\nb"), readers.Document(""), None]


BAD_LINES = {
    "{": r"not JSON \(",
    "[]": "an array, not a JSON object with the key 'text'",
    "3": "a number, not",
    '{"body": "x", "id": 3}': r"no 'text', but 'body', 'id'; .* jsonl\.KEY",
    '{"text": 3}': "'text' is a number, not text",
    '{"text": {"a": 1}}': "'text' is an object",
    '{"text": "\xff"}': "not UTF-8 text: byte 0xff at offset 10",
    "[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20])
def test_bad_jsonl_names_the_line_and_the_cause(tmp_path, line):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1"))
    with pytest.raises(UserError, match=rf"x\.jsonl line 2: {BAD_LINES[line]}"):
        texts(f"jsonl:{tmp_path}/x.jsonl")


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_rows_of_every_format_follow_one_rule(tmp_path):
    """No value is an empty document, another key is named, a value that is no text is refused."""
    rows = [{"text": None, "body": "one"}, {"text": "two\n", "body": "\u2028"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_parquet(tmp_path / "x.parquet", {k: [row[k] for row in rows] for k in rows[0]})
    for kind in ("jsonl", "parquet"):
        assert texts(f"{kind}:{tmp_path}/x.{kind}") == ["", "two\n"]
        assert texts(f"{kind}.body:{tmp_path}/x.{kind}") == ["one", "\u2028"]
        with pytest.raises(UserError, match=rf"no 'z', but 'text', 'body'; .* {kind}\.KEY"):
            texts(f"{kind}.z:{tmp_path}/x.{kind}")
    write_parquet(tmp_path / "x.parquet", {"text": [["one"], ["two"]]})
    with pytest.raises(UserError, match=r"column .text. is of type list<.*not text"):
        texts(f"parquet:{tmp_path}/x.parquet")


def test_damaged_files_are_one_line(tmp_path):
    whole = gzip.compress(json.dumps({"text": "x" * 5000}).encode() * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:60] + b"\xff" * 20 + whole[80:])
    (tmp_path / "b.jsonl.xz").write_bytes(b"no xz")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    for spec in ("jsonl:a.jsonl.gz", "jsonl:b.jsonl.xz", "parquet:c.parquet"):
        kind, _, name = spec.partition(":")
        with pytest.raises(UserError, match=f"cannot read .*{name}") as error:
            texts(f"{kind}:{tmp_path}/{name}")
        assert "\n" not in str(error.value)


def test_links_are_followed(tmp_path):
    """As in a Hugging Face cache, where every file is a link."""
    blobs, here = tmp_path / "blobs", tmp_path / "here"
    (blobs / "deep").mkdir(parents=True)
    here.mkdir()
    (blobs / "1").write_text("one")
    (blobs / "deep" / "2.txt").write_text("two")
    (here / "0.txt").write_text("zero")
    (here / "1.txt").symlink_to(blobs / "1")
    (here / "folder").symlink_to(blobs / "deep")
    (blobs / "deep" / "back").symlink_to(here)  # a walk must end
    assert texts(f"text:{here}/*.txt") == ["zero", "one"]
    assert texts(f"text:{here}/folder/*.txt") == ["two"]
    assert texts(f"text:{here}/*/*.txt") == ["two"]
    assert texts(f"text:{here}/**/*.txt") == ["zero", "one", "two"]
    [part] = sources.parse(f"text:{here}/*.txt")[0].parts
    assert part.size == 7
    (here / "2.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"2\.txt is a link to nothing"):
        texts(f"text:{here}/*.txt")


@pytest.mark.parametrize("kind", ["text", "jsonl", "stream"])
def test_archives_are_refused(tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in "abc":
            archive.writestr(name, name)
    with tarfile.open(tmp_path / "x.TGZ", "w:gz") as archive:
        archive.add(tmp_path / "x.zip")
    with tarfile.open(tmp_path / "x.txt", "w") as archive:
        archive.add(tmp_path / "x.zip")
    for name in ("x.zip", "x.TGZ"):
        with pytest.raises(UserError, match=f"{name} is an archive of files: unpack it"):
            texts(f"{kind}:{tmp_path}/{name}")
    with pytest.raises(UserError, match=r"x\.txt"):
        texts(f"{kind}:{tmp_path}/x.txt")


def test_tfds_without_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyLines(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(20), "validation": self._generate_examples(3)}

        def _generate_examples(self, n):
            for i in range(n):
                yield i, {"text": f"row {i} é"}

    tfds.disable_progress_bar()
    TinyLines(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(sources, "ROWS_PER_PART", 8)
    found = documents("tfds:tiny_lines")
    assert sorted(d.text for d in found if d.split == "train") == sorted(
        f"row {i} é" for i in range(20)
    )
    assert {d.text for d in found if d.split == "valid"} == {"row 0 é", "row 1 é", "row 2 é"}
    with pytest.raises(UserError, match="no_such_dataset"):
        sources.parse("tfds:no_such_dataset")


@pytest.mark.parametrize("text", ["a" * 10_007, "é漢😀" * 3001, "short"])
def test_stream_is_cut_by_position_and_loses_nothing(tmp_path, text):
    (tmp_path / "text8").write_text(text)
    found = documents(f"stream:{tmp_path}/text8")
    assert "".join(d.text for d in found) == text
    positions = [d.position for d in found]
    assert positions == sorted(positions)
    assert positions[0] == 0
    assert positions[-1] < 1
    bytes_before = np.cumsum([0] + [len(d.text.encode()) for d in found])[:-1]
    assert np.abs(bytes_before / len(text.encode()) - positions).max() < 4 / len(text)


@pytest.mark.parametrize(
    "spec",
    ["nonsense", "text", "text:", "text:/nowhere/*.txt", "markov:W=3", "markov:V=x", "markov:V=1"],
)
def test_bad_specs_are_one_clear_line(spec):
    with pytest.raises(UserError) as error:
        sources.parse(spec)
    assert "\n" not in str(error.value)


def test_binary_text_names_the_file_and_the_byte(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"fine so far\xff\xfe")
    with pytest.raises(UserError, match=r"x\.txt .* 0xff at offset 11"):
        texts(f"text:{tmp_path}/x.txt")


def test_mixture_is_parsed_with_globs_in_it(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}1.txt").write_text(name)
    mixed = sources.parse(f"text:{tmp_path}/a*.txt*0.7+text:{tmp_path}/b*.txt*0.3")
    assert [s.weight for s in mixed] == [0.7, 0.3]
    assert [s.spec for s in mixed] == [f"text:{tmp_path}/a*.txt", f"text:{tmp_path}/b*.txt"]
    assert len(sources.parse(f"text:{tmp_path}/a*")) == 1
    for weights in ((".5", "0.5"), ("5e-1", "1E+0")):
        mixed = sources.parse("+".join(f"text:{tmp_path}/a*.txt*{w}" for w in weights))
        assert [s.weight for s in mixed] == [float(w) for w in weights]
    with pytest.raises(UserError, match=r"a mixture is written A\*0\.7\+B\*0\.3"):
        sources.parse(f"text:{tmp_path}/a1.txt*half+text:{tmp_path}/b1.txt*half")
    with pytest.raises(UserError, match=r"is a folder: write .*/\* for its files"):
        sources.parse(f"text:{tmp_path}")
    with pytest.raises(UserError, match="endless"):
        sources.parse("markov:V=4*0.5+pysource*0.5")


def test_sample_spreads_over_the_source_and_is_bounded():
    [source] = sources.parse("pysource")
    pieces = list(sources.sample(source, 200_000))
    assert 150_000 < sum(map(len, pieces)) < 250_000
    assert len(pieces) >= min(len(source.parts), 64)


CHAINS = [
    markov.Markov(V=3, order=0),
    markov.Markov(V=3, order=1, seed=1),
    markov.Markov(V=2, order=3, seed=2),
    markov.Markov(V=3, order=1, seed=3, doc_mean=4),
    markov.Markov(V=3, order=0, doc_mean=2.5),
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.spec)
def test_markov_entropies_equal_enumeration(chain):
    blocks = {}
    for length in range(1, 7):
        windows = np.array(list(itertools.product(range(chain.symbols), repeat=length)))
        p = np.exp(chain.log_prob(windows))
        blocks[length] = -np.sum(p * np.log(np.where(p > 0, p, 1)))
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert chain.block_entropy(length) == pytest.approx(blocks[length], abs=1e-12)
        by_last = p.reshape(-1, chain.symbols).sum(0)  # stationary: every position alike
        by_first = p.reshape(chain.symbols, -1).sum(1)
        assert np.allclose(by_first, by_last, atol=1e-12)
    assert chain.entropy_rate() == pytest.approx(blocks[6] - blocks[5], abs=1e-12)


def test_uniform_source_has_log_v():
    chain = markov.parse("V=16,order=0")
    assert chain.entropy_rate() == pytest.approx(np.log(16), abs=1e-14)
    assert chain.block_entropy(32) == pytest.approx(32 * np.log(16), abs=1e-12)
    assert np.allclose(chain.log_prob(chain.sample(4, 32, seed=0)), -32 * np.log(16))


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.spec)
def test_markov_samples_follow_the_law(chain):
    sample = chain.sample(60_000, 4, seed=5)
    assert sample.dtype == np.int32
    assert (sample == chain.sample(60_000, 4, seed=5)).all()
    assert (sample != chain.sample(60_000, 4, seed=6)).any()
    log_prob = chain.log_prob(sample)
    error = log_prob.std() / len(sample) ** 0.5
    assert -log_prob.mean() == pytest.approx(chain.block_entropy(4), abs=4 * error + 1e-12)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.spec)
def test_markov_stream_is_one_chain(chain):
    stream = markov.parse(chain.spec.partition(":")[2] + ",tokens=30000").stream()
    assert len(stream) == 30_000
    per_token = -chain.log_prob(stream[None])[0] / len(stream)
    assert per_token == pytest.approx(chain.entropy_rate(), abs=0.03)


def test_markov_documents_are_the_stream_between_ends():
    spec = "markov:V=3,order=1,seed=3,doc_mean=4,tokens=5000"
    chain = markov.parse(spec.partition(":")[2])
    [source] = sources.parse(spec)
    assert not source.endless
    found = documents(spec)
    joined = [i for d in found for i in [*map(int, d.text.split()), 3]]
    assert joined == chain.stream()[: len(joined)].tolist()
    assert all(d.text.strip() for d in found)
    lengths = [len(d.text.split()) for d in found]
    assert np.mean(lengths) == pytest.approx(4, rel=0.15)
    assert np.mean([d.position for d in found]) == pytest.approx(0.5, abs=0.05)


def test_endless_markov_is_cut_by_position():
    found = documents("markov:V=4,tokens=5000")
    assert sum(len(d.text.split()) for d in found) == 5000
    assert [d.position for d in found] == sorted(d.position for d in found)
