"""The manifest: strict reading, and agreement with a config."""

import shutil
from pathlib import Path

import pytest
from corpora import corpus, make

from prime_jax import config as configs
from prime_jax.data import manifest as manifests
from prime_jax.errors import UserError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory):
    return make(text, tmp_path_factory.mktemp("data") / "set")


def copied(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared.path, tmp_path / "copy"))


def test_damage_is_named_with_the_command_that_rebuilds(prepared, tmp_path):
    def broken(name, data):
        directory = copied(prepared, tmp_path)
        (directory / name).unlink() if data is None else (directory / name).write_bytes(data)
        with pytest.raises(UserError, match="data prepare") as error:
            manifests.load(directory, verify=True).unigram()
        assert name in str(error.value)
        shutil.rmtree(directory)

    shard = prepared.train.shards[0].file
    data = (prepared.path / shard).read_bytes()
    middle = len(data) // 2
    altered = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    broken(shard, None)
    broken(shard, data[:-1])
    broken(shard, altered)
    broken("unigram.npy", b"")
    broken("manifest.json", None)
    broken("manifest.json", b'{"schema": 99}')
    broken("manifest.json", b'{"schema": 1}')


def test_damaged_json_is_refused(prepared, tmp_path):
    directory = copied(prepared, tmp_path)
    for text in ("{", "[]", '{"schema": 1, "wrong": 2}'):
        (directory / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json"):
            manifests.load(directory)


@pytest.mark.usefixtures("small_parts")
def test_exchanged_shards_are_found_by_verify(text, tmp_path):
    one = make(text, tmp_path / "one")
    a, b = (one.path / shard.file for shard in one.train.shards[:2])
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    with pytest.raises(UserError, match="altered"):
        manifests.load(one.path, verify=True)


def test_check_names_the_setting_and_what_is_right(prepared):
    right = configs.RunConfig(
        model=configs.ModelConfig(vocab_size=257), data=configs.DataConfig(seq_len=32)
    )
    manifests.check(prepared, right)
    manifests.check(prepared, configs.set_path(right, "data.fingerprint", prepared.fingerprint))
    for path, wrong, answer in (
        ("model.vocab_size", 1024, "257"),
        ("data.seq_len", 128, "32"),
        ("data.fingerprint", "0" * 16, prepared.fingerprint),
    ):
        with pytest.raises(UserError, match=f"{path}.*{answer}"):
            manifests.check(prepared, configs.set_path(right, path, wrong))


def test_command_repeats_the_request():
    request = manifests.Request("text:a b/*", "bpe:512", 64, max_bytes=9)
    assert request.command("out") == (
        "prime-jax data prepare 'text:a b/*' --tokenizer bpe:512 --out out --seq-len 64 "
        "--max-bytes 9"
    )
