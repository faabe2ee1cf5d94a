"""The order of the data is a function of (seed, step), on any number of hosts."""

import threading

import numpy as np
import pytest

from prime_jax.data import assemble, loader, manifest, prepare
from prime_jax.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loader")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "SHARD_BYTES", 8 * 2 * 23)  # 23 blocks in each shard
        return prepare.prepare(
            "markov:V=300,tokens=900", "synthetic:300", directory / "set", 8, workers=1
        )


def batches(prepared, start=0, stop=6, seed=1, batch_size=12, **hosts):
    return list(
        loader.train_batches(
            prepared, seed=seed, batch_size=batch_size, start=start, stop=stop, **hosts
        )
    )


def assert_equal(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a[0] == b[0]).all()
        assert (a[1] == b[1]).all()


def test_shapes_types_and_stream_positions(prepared):
    found = batches(prepared)
    assert len(found) == 6
    for step, (tokens, example) in enumerate(found):
        assert (tokens.shape, tokens.dtype) == ((12, 8), np.int32)
        assert example.dtype == np.int64
        assert example.tolist() == list(range(step * 12, step * 12 + 12))


def test_each_epoch_shows_every_block_once_in_another_order(prepared):
    blocks = loader.Blocks(prepared, "train")
    n = len(blocks)
    assert n == prepared.train.blocks == 101
    assert len(prepared.train.shards) == 5
    tokens = np.concatenate([t for t, _ in batches(prepared, stop=3 * n, batch_size=1)])
    epochs = [tuple(map(tuple, tokens[e * n : (e + 1) * n].tolist())) for e in range(3)]
    every = sorted(map(tuple, blocks.read(np.arange(n))[0].tolist()))
    assert all(sorted(epoch) == every for epoch in epochs)
    assert len(set(epochs)) == 3
    assert list(epochs[0]) != every


def test_the_order_is_that_of_every_version(prepared):
    """grain shuffles: under a version that does it otherwise, a resumed run would repeat data."""
    blocks = [tuple(block) for block in loader.Blocks(prepared, "train").read(np.arange(101))[0]]
    tokens, _ = batches(prepared, stop=1)[0]
    order = [blocks.index(tuple(block)) for block in tokens]
    assert order == [65, 46, 56, 73, 72, 23, 66, 2, 0, 97, 6, 33]


def test_start_in_the_middle_equals_the_uninterrupted_run(prepared):
    whole = batches(prepared, stop=30)  # several epochs
    for start in (1, 8, 9, 29, 30):
        assert_equal(batches(prepared, start=start, stop=30), whole[start:])
        assert_equal(batches(prepared, stop=start), whole[:start])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_hosts_share_each_batch(prepared, count):
    whole = batches(prepared, start=7, stop=12)
    shares = np.arange(12).reshape(count, -1)
    hosts = [batches(prepared, start=7, stop=12, rows=rows) for rows in shares]
    joined = [
        tuple(np.concatenate([host[i][k] for host in hosts]) for k in (0, 1))
        for i in range(len(whole))
    ]
    assert_equal(joined, whole)


def test_a_host_reads_only_its_share(prepared, monkeypatch):
    read = []
    original = loader.Blocks.read
    monkeypatch.setattr(
        loader.Blocks, "read", lambda self, i: (read.extend(i), original(self, i))[1]
    )
    batches(prepared, stop=5, rows=np.array([1, 4, 7, 10]))
    assert len(read) == 5 * 12 // 3


def test_the_seed_decides(prepared):
    first = batches(prepared, stop=2)
    assert_equal(batches(prepared, stop=2), first)
    assert (batches(prepared, stop=2, seed=2)[0][0] != first[0][0]).any()
    assert len(batches(prepared, stop=1, seed=-1)) == 1


def test_batches_larger_than_the_data(prepared):
    [(tokens, _)] = batches(prepared, stop=1, batch_size=250)
    assert tokens.shape == (250, 8)


def test_abandoned_iterators_leave_no_threads(prepared):
    before = threading.active_count()
    for _ in range(5):
        iterator = loader.train_batches(prepared, seed=0, batch_size=4, start=0, stop=10_000)
        next(iterator)
        iterator.close()
    assert threading.active_count() <= before + loader.THREADS + 1


def test_hosts_may_have_rows_in_common(prepared):
    whole = batches(prepared, start=7, stop=9)
    rows = np.array([0, 3, 4, 11])
    assert_equal(
        batches(prepared, start=7, stop=9, rows=rows), [(t[rows], e[rows]) for t, e in whole]
    )


def test_eval_blocks_are_spread_evenly_and_fixed(prepared):
    source = loader.Blocks(prepared, "train")
    some = loader.eval_blocks(prepared, "train", 4)
    assert (some.tokens.dtype, some.doc.dtype, some.n_bytes.dtype) == (np.int32, np.int64, np.int64)
    assert (some.tokens == source.read(np.array([0, 25, 50, 75]))[0]).all()
    again = loader.eval_blocks(prepared, "train", 4)
    assert (again.hash, again.tokens.tolist()) == (some.hash, some.tokens.tolist())
    whole = loader.eval_blocks(prepared, "train", 0)
    assert (whole.tokens == source.read(np.arange(101))[0]).all()
    assert whole.hash == loader.eval_blocks(prepared, "train", 1000).hash != some.hash
    assert whole.n_bytes.sum() == prepared.train.bytes
    text = [prepared.tokenizer().decode_bytes(block) for block in some.tokens]
    assert some.n_bytes.tolist() == [len(t) for t in text]
    assert (np.diff(whole.doc) >= 0).all()


def test_a_damaged_shard_is_named_when_read(tmp_path):
    made = prepare.prepare("markov:V=9,tokens=20000", "synthetic:9", tmp_path, 8, workers=1)
    shard = tmp_path / made.train.shards[0].file
    data = bytearray(shard.read_bytes())
    for i in range(len(data) // 4, len(data) // 2, 50):
        data[i] ^= 0xFF
    shard.write_bytes(data)
    found = manifest.load(tmp_path)  # sizes are right: only reading can tell
    with pytest.raises(UserError, match=shard.name):
        batches(found, stop=300)
    with pytest.raises(UserError, match=f"{shard.name}.*data prepare"):
        loader.eval_blocks(found, "train", 0)


def test_an_empty_split_is_one_clear_line(tmp_path):
    made = prepare.prepare(
        "markov:V=9,tokens=200",
        "synthetic:9",
        tmp_path,
        8,
        workers=1,
        valid_fraction=0.0,
        test_fraction=0.0,
    )
    with pytest.raises(UserError, match="valid split"):
        loader.eval_blocks(made, "valid", 4)


def test_a_part_of_the_data_is_its_first_blocks_again_and_again(prepared):
    every = loader.Blocks(prepared, "train").read(np.arange(101))[0].tolist()
    found = np.concatenate([t for t, _ in batches(prepared, stop=30, batch_size=1, first=10)])
    for epoch in found.reshape(3, 10, 8).tolist():
        assert sorted(epoch) == sorted(every[:10])
    assert_equal(batches(prepared, first=101), batches(prepared))
