"""One path type over a folder and real gcsfs and s3fs clients on loopback buckets."""

import contextlib
import threading
import time
from pathlib import Path

import fake_store
import pytest

from prime_jax.errors import UserError
from prime_jax.runtime import storage
from prime_jax.runtime.logfile import Log

STORES = ("local", "gs", "s3")


@pytest.fixture
def bucket(request):
    with fake_store.bucket(request.param) as made:
        yield made


@pytest.fixture(params=STORES)
def folder(request, tmp_path):
    if request.param == "local":
        (tmp_path / "here").mkdir()
        yield tmp_path / "here"
        return
    with fake_store.bucket(request.param) as made:
        yield storage.path(made.url)


def test_files_come_and_go_alike_everywhere(folder):
    assert storage.names(folder / "absent") == []
    storage.make_folder(folder / "deep" / "er")
    storage.write(folder / "deep" / "er" / "a", b"1")
    storage.write(folder / "deep" / "er" / "a", b"22")
    storage.write(folder / "deep" / "b", b"3")
    assert storage.read(folder / "deep" / "er" / "a") == b"22"
    assert sorted(storage.names(folder / "deep")) == ["b", "er"]
    assert storage.read_all(folder / "deep", ["b", "er/a"]) == [b"3", b"22"]
    assert storage.exists(folder / "deep" / "b")
    sums = storage.checksums(folder)
    assert {name: size for name, (size, _) in sums.items()} == {"deep/b": 1, "deep/er/a": 2}
    storage.write(folder / "deep" / "b", b"4")
    assert not storage.same_sums(storage.checksums(folder)["deep/b"], sums["deep/b"])
    with pytest.raises(UserError, match="cannot read"):
        storage.read(folder / "absent")
    for _ in range(2):
        storage.remove(folder / "deep")
    assert not storage.exists(folder / "deep" / "b")


def test_creation_happens_once(folder):
    assert storage.create(folder / "x", b"mine")
    assert not storage.create(folder / "x", b"yours")
    assert storage.read(folder / "x") == b"mine"


@pytest.mark.parametrize("bucket", ["gs", "s3"], indirect=True)
def test_a_repeated_creation_of_our_own_is_ours(bucket):
    """The answer to the first try was lost on its way."""
    place = storage.path(bucket.url) / "x"
    assert storage.create(place, b"mine")
    assert storage.create(place, b"mine")


@pytest.mark.parametrize("bucket", ["gs", "s3"], indirect=True)
def test_a_refusal_says_how_to_log_in_and_an_outage_can_be_waited_for(bucket, monkeypatch):
    place = storage.path(bucket.url) / "x"
    bucket.store.denied = True
    for action in (storage.read, storage.exists, lambda p: storage.write(p, b"")):
        with pytest.raises(UserError, match=r"log in|AWS_ACCESS_KEY_ID") as error:
            action(place)
        assert not isinstance(error.value, storage.Unreachable)
        assert "\n" not in str(error.value)
    bucket.store.denied, bucket.store.down = False, True
    threading.Timer(0.5, lambda: setattr(bucket.store, "down", False)).start()
    storage.retry(lambda: storage.write(place, b"late"), lambda _: None)
    assert storage.read(place) == b"late"


def test_insisting_ends_and_says_what_it_waits_for():
    said = []

    def never():
        raise storage.Unreachable("gone")

    with pytest.raises(storage.Unreachable):
        storage.retry(never, said.append, patience=-1.0)

    with pytest.raises(UserError, match="no rights"):
        storage.retry(lambda: (_ for _ in ()).throw(UserError("no rights")), said.append)


@pytest.mark.parametrize("text", ["az://x/y", "gs://", "http://example.org/x"])
def test_other_places_are_refused_in_one_line(text):
    with pytest.raises(UserError, match="expected a folder"):
        storage.path(text)


def test_a_missing_package_is_named(monkeypatch):
    import fsspec

    def missing(*_, **__):
        raise ImportError("Please install gcsfs")

    storage._filesystem.cache_clear()
    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match=r"pip install 'prime_jax\[gcp\]'"):
        storage.path("gs://bucket/x")


def test_a_log_grows_locally_and_is_mirrored_into_a_bucket(folder):
    log = Log(folder / "log.txt", "old\n", seconds=0.02)
    log.write("new\n")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(UserError):
            if storage.read(folder / "log.txt") == b"old\nnew\n":
                break
        time.sleep(0.02)
    log.write("last\n")
    log.close()
    assert storage.read(folder / "log.txt") == b"old\nnew\nlast\n"


def test_folders_travel_to_a_bucket_and_back(tmp_path):
    source = tmp_path / "source"
    (source / "in").mkdir(parents=True)
    (source / "in" / "a").write_text("1")
    (source / "b").write_text("2")
    with fake_store.bucket("s3") as made:
        place = storage.path(made.url) / "copy"
        storage.upload(source, place)
        storage.download(place, tmp_path / "back")
        sums = storage.checksums(place)
    back = storage.checksums(tmp_path / "back")
    assert back == storage.checksums(source)
    assert all(storage.same_sums(back[name], sums[name]) for name in sums)  # by their sizes


def test_local_paths_stay_plain(tmp_path):
    assert type(storage.path(str(tmp_path))) is type(Path())
