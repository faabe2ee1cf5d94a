"""Codes from a file: how they are made, read, refused and trained with."""

import itertools
import json
from dataclasses import replace

import corpora
import numpy as np
import pytest
from scipy import sparse

from prime_jax import cli
from prime_jax.config import SubtokenConfig, run_id, validate
from prime_jax.data import clusters, codes, manifest
from prime_jax.data.clusters import clustered, word_vectors
from prime_jax.data.entropy import entropies
from prime_jax.errors import NoData, UserError
from prime_jax.evaluate import trained
from prime_jax.settings import set_path
from prime_jax.subtokens import Codebook, base
from prime_jax.sweep import grid, plan
from prime_jax.train import fill_fingerprint, prepare_directory, train

RNG = np.random.default_rng(0)


def silent(*_):
    pass


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Two kinds of words that never take each other's place, as characters: a noun after a verb."""
    folder = tmp_path_factory.mktemp("codes")
    rng = np.random.default_rng(0)
    for i in range(20):
        pairs = rng.integers(0, 4, (400, 2))
        text = "".join("abcd"[verb] + "wxyz"[noun] for verb, noun in pairs)
        (folder / f"{i}.txt").write_text(text)
    return corpora.make(f"text:{folder}/*.txt", folder / "data", "chars:27+eos", seq_len=32)


def by_pairs(book, data):
    """Mutual information of neighbours' leading digits from the blocks, one pair after the other."""
    from prime_jax.data.loader import blocks

    table, source = np.zeros((book.base, book.base)), blocks(data, "train")
    for row in source.read(np.arange(len(source)))[0]:
        for one, two in itertools.pairwise(row):
            table[book.digits[one, 0], book.digits[two, 0]] += 1
    p = table / table.sum()
    apart = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    return (p[p > 0] * np.log2(p[p > 0] / apart[p > 0])).sum()


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("method", ["identity", "shuffle", "frequency", "cluster"])
def test_every_method_gives_every_token_a_code_of_its_own(words, method, length):
    book = clusters.make(words, method, length)
    assert len(set(book.codes)) == words.vocab_size
    assert book.codes.min() >= 0
    assert book.codes.max() < book.base**length
    assert clusters.make(words, method, length).hash == book.hash
    found = clusters.describe(words, book, words=3, branches=99)
    assert sum(branch.tokens for branch in found.branches) == words.vocab_size
    assert sum(branch.share for branch in found.branches) == pytest.approx(1)
    if method in ("identity", "shuffle"):
        config = SubtokenConfig(length, float(method == "shuffle"))
        assert book.hash == Codebook.create(words.vocab_size, config).hash
        assert found.entropies.slots == entropies(words.unigram(), config).slots


def test_words_of_one_context_share_leading_digits(words):
    cluster, shuffled = (clusters.make(words, m, 5) for m in ("cluster", "shuffle"))
    tokenizer = words.tokenizer()
    verbs, nouns = (
        cluster.digits[[int(tokenizer.encode(x)[0]) for x in text], :2] for text in ("abcd", "wxyz")
    )
    assert not {tuple(row) for row in verbs} & {tuple(row) for row in nouns}
    known = [clusters.describe(words, book, 3, 9).neighbours for book in (cluster, shuffled)]
    assert known[0] == pytest.approx(by_pairs(cluster, words), abs=1e-9)
    assert known[1] == pytest.approx(by_pairs(shuffled, words), abs=1e-9)


def test_vectors_are_the_square_root_of_positive_pmi():
    counts = RNG.integers(0, 9, (12, 12)).astype(float)
    counts += counts.T
    left_out = np.arange(12) == 5
    found = word_vectors(sparse.csr_array(counts), left_out)
    counts[5], counts[:, 5] = 0, 0
    sums = counts.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.maximum(np.log(counts * counts.sum() / np.outer(sums, sums)), 0)
    pmi[np.isnan(pmi)] = 0
    left, values, _ = np.linalg.svd(pmi)
    wanted = (left[:, :11] * values[:11]) @ left[:, :11].T  # the same whatever the signs
    np.testing.assert_allclose(found @ found.T, wanted, atol=1e-7)
    assert (found[5] == 0).all()


@pytest.mark.parametrize(("vocab", "length"), [(8, 3), (27, 3), (5, 3), (13, 2), (100, 7), (7, 1)])
def test_bisection_keeps_order_along_a_line_and_never_overflows(vocab, length):
    """On a line the first principal direction is the line, so codes rise or fall along it."""
    place = RNG.permutation(vocab).astype(float)
    codes_V = clustered(place[:, None] * np.array([[0.6, 0.8]]), np.ones(vocab), length)
    rising = codes_V[np.argsort(place)]
    assert (np.diff(rising) > 0).all() or (np.diff(rising) < 0).all()
    assert 0 <= codes_V.min() <= codes_V.max() < base(vocab, length) ** length


def test_equal_vectors_go_by_frequency_then_id():
    counts = np.array([0, 7, 7, 9, 0, 0, 1, 0])
    assert clustered(np.zeros((8, 1)), counts, 1).argsort().tolist() == [3, 1, 2, 6, 0, 4, 5, 7]
    # Half by half: the sides are sorted by id again only to be split by frequency.
    assert clustered(np.zeros((8, 1)), counts, 3).argsort().tolist() == [3, 1, 2, 6, 0, 4, 5, 7]


def written(folder, data, values, **about):
    np.save(folder / "codes.npy", values)
    about = {"tokenizer": data.tokenizer_hash} | about
    (folder / "codes.json").write_text(json.dumps(about))
    return folder / "codes.npy"


BAD = {
    "holds 15 codes, but": (np.arange(15), {}),
    "tokens 0 and 3 share code 7": ([7, 1, 2, 7, *range(8, 16), 3, 4, 5, 6], {}),
    "token 2 has code 16; 4 sub-tokens of base 2 have codes 0 to 15": (
        [0, 1, 16, *range(3, 16)],
        {},
    ),
    "token 0 has code -1": (np.arange(16) - 1, {}),
    "made for tokenizer other": (np.arange(16), {"tokenizer": "other"}),
    "must hold integers": (np.arange(16.0), {}),
}


@pytest.mark.parametrize("message", BAD)
def test_codes_of_no_use_are_one_line(message, tiny, markov_data, tmp_path):
    data = manifest.load(markov_data)
    values, about = BAD[message]
    file = written(tmp_path, data, values, **about)
    with pytest.raises(NoData, match=f"^subtokens.codes_file: {tmp_path}.*{message}"):
        codes.filled(set_path(tiny, "subtokens.codes_file", str(file)), data)


def test_missing_and_damaged_files_are_one_line(markov_data, tmp_path):
    data = manifest.load(markov_data)
    file = written(tmp_path, data, np.arange(16))
    (tmp_path / "codes.json").unlink()
    with pytest.raises(UserError, match=r"codes.json is missing: .* tokenizer"):
        codes.read(file, data, 4)
    for damaged in (b"\x93NUMPY but no more", b"PK\x03\x04 but no archive", b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="holds no array"):
            codes.read(file, data, 4)
    with pytest.raises(UserError, match=r"none\.npy"):
        codes.read(tmp_path / "none.npy", data, 4)


def test_a_run_is_named_by_its_codes_and_refuses_others(quick, markov_data, tmp_path):
    data = manifest.load(markov_data)
    file = written(tmp_path, data, np.arange(16)[::-1])
    config = replace(quick, steps=4)
    coded = set_path(config, "subtokens.codes_file", str(file))
    named = fill_fingerprint(coded, data)
    assert named.subtokens.codes == codes.read(file, data, 4).hash
    assert run_id(named) != run_id(fill_fingerprint(config, data))
    moved = set_path(named, "subtokens.codes_file", "elsewhere")
    assert run_id(moved) == run_id(named)
    prepare_directory(named, tmp_path / "run")
    written(tmp_path, data, np.roll(np.arange(16), 1))
    with pytest.raises(NoData, match="the file was changed"):
        train(named, tmp_path / "run", log=silent)
    with pytest.raises(UserError, match=r"holds run .*: subtokens.codes = .*, not "):
        prepare_directory(fill_fingerprint(coded, data), tmp_path / "run")


@pytest.mark.slow
def test_a_trained_run_keeps_its_codes(quick, markov_data, tmp_path):
    file = written(tmp_path, manifest.load(markov_data), np.arange(16)[::-1])
    coded = set_path(replace(quick, steps=4), "subtokens.codes_file", str(file))
    result = train(coded, tmp_path / "run", log=silent)
    file.unlink()  # what is trained needs it no more
    run = trained.load(str(tmp_path / "run"))
    assert run.id == result["run"]
    assert run.codebook.hash == run.config.subtokens.codes == result["hashes"]["permutation"]
    np.testing.assert_array_equal(run.codebook.codes, np.arange(16)[::-1])


def test_settings_of_the_permutation_are_refused_beside_a_file(tiny):
    coded = set_path(tiny, "subtokens.codes_file", "codes.npy")
    validate(coded)
    with pytest.raises(UserError, match="shuffle, scope and seed mean nothing"):
        validate(set_path(coded, "subtokens.shuffle", 0.5))


def test_the_command_writes_what_a_plan_reads(words, tiny, tmp_path, capsys):
    out = tmp_path / "codes.npy"
    options = ["--method", "cluster", "-l", "5", "--out", str(out)]
    assert cli.main(["data", "codes", str(words.path), *options]) == 0
    shown = capsys.readouterr().out
    assert "'w'" in shown
    assert "leading digits of neighbours" in shown
    record = json.loads((tmp_path / "codes.json").read_text())
    assert record["hash"] == codes.read(out, words, 5).hash
    assert cli.main(["data", "codes", str(words.path), *options[:-1], "codes.txt"]) == 2
    assert "must end in .npy" in capsys.readouterr().err
    used = str(words.path / "unigram.npy")
    assert cli.main(["data", "codes", str(words.path), *options[:-1], used]) == 2
    assert "would be replaced" in capsys.readouterr().err

    row = {"family": "prime", "budget": 1e9, "seed": 0, "layers": 1, "width": 16, "heads": 1}
    row |= {"steps": 4, "batch_size": 8, "peak_lr": 1e-3}
    drawn = {"data.path": str(words.path), "data.seq_len": 32, "optim.warmup_steps": 1}
    drawn |= {"model.vocab_size": words.vocab_size, "subtokens.length": 5}
    coded = drawn | {"subtokens.codes_file": str(out)}
    rows = tuple(grid.from_json(row | {"overrides": changes}) for changes in (coded, drawn))
    tried = grid.Experiment("x", rows, "")
    listed = plan.candidates(tried, plan.load_datasets(tried, required=True))
    assert [candidate.drop for candidate in listed] == ["", ""]
    assert listed[0].config.subtokens.codes == record["hash"]
    assert listed[0].id != listed[1].id
    out.write_bytes(b"")
    listed = plan.candidates(tried, plan.load_datasets(tried, required=True))
    assert listed[0].drop.startswith("subtokens.codes_file:")
    assert listed[1].drop == ""
