"""A sweep whose ROOT is a bucket: claims, the whole command line, outages, moves."""

import json
import threading
import time
from collections import Counter

import fake_store
import fake_trainer
import pytest
from fake_trainer import Trainer
from fsspec.config import conf

from prime_jax.runtime import storage
from prime_jax.sweep import state, worker


@pytest.fixture(params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def bucket(request):
    with fake_store.bucket(request.param) as made:
        yield made


def claimer(url: str, runs: list[str], won: list, own_client) -> None:
    own_client()
    root = storage.path(url)
    won.append([run for run in runs if state.claim(root, run, 1)])


@pytest.mark.parametrize("runs", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_eight_claimers_share_the_runs(bucket, runs, monkeypatch):
    """Each with a client and connections of its own, all starting at once."""
    import fsspec

    protocol = "gcs" if bucket.url.startswith("gs") else "s3"
    local, start = threading.local(), threading.Barrier(8)

    def own_client():
        local.client = fsspec.filesystem(protocol, skip_instance_cache=True)
        start.wait()

    monkeypatch.setattr(storage, "_of", lambda place: local.client)
    ids, won = [f"{i:010x}" for i in range(runs)], []
    threads = [
        threading.Thread(target=claimer, args=(bucket.url, ids, won, own_client)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(run for mine in won for run in mine) == ids
    assert conf["gcs"]["use_listings_cache"] is False


def test_a_claim_whose_answer_is_lost_is_still_ours(bucket):
    """The client asks again, and meets its own claim."""
    root = storage.path(bucket.url)
    fake_trainer.planned(root, families={"arm": {}}, budgets=(1e9,))
    run = state.list_runs(root)[0]
    bucket.store.lost = 1
    assert state.claim(root, run.id, 1)
    assert not state.claim(root, run.id, 1)


def test_one_listing_and_each_file_read_once(bucket):
    root, store = storage.path(bucket.url), bucket.store
    fake_trainer.planned(root)
    watch = state.Watch()
    state.list_runs(root, watch)
    store.counts.clear()
    runs = state.list_runs(root, watch)
    assert [run.state for run in runs] == ["pending"] * 8
    assert store.counts == {"list": 1}
    state.claim(root, runs[0].id, 1)
    store.counts.clear()
    assert state.list_runs(root, watch)[0].state == "running"
    assert store.counts == {"list": 1, "read": 1}


def test_a_sweep_is_worked_and_collected_like_a_local_one(bucket, tmp_path):
    from prime_jax.cli import main
    from prime_jax.sweep import collect

    root, local = storage.path(bucket.url), tmp_path / "local"
    for place in (root, local):
        fake_trainer.planned(place)
        assert worker.work(place, trainer=Trainer(), heartbeat_seconds=0.05) == 0
        collect.write(place, tmp_path / f"{place.name}.csv")
    assert (tmp_path / "here.csv").read_text() == (tmp_path / "local.csv").read_text()
    victim = state.list_runs(root)[0].id
    assert (
        f"attempt 1 of run {victim}"
        in storage.read(root / "runs" / victim / "1" / "log.0.txt").decode()
    )
    assert main(["sweep", "status", bucket.url]) == 0


def test_an_outage_stops_neither_training_nor_the_worker(bucket, monkeypatch):
    """The store is gone while a run trains, and still when it ends."""
    root, store = storage.path(bucket.url), bucket.store
    fake_trainer.planned(root, families={"arm": {}}, budgets=(1e9,))
    monkeypatch.setattr(storage, "_of", no_patience(storage._of))

    def act(config, call, heartbeat):
        store.down = True
        for step in range(30):
            assert heartbeat({"step": step})
            time.sleep(0.01)
        threading.Timer(0.3, lambda: setattr(store, "down", False)).start()

    trainer = Trainer(act)
    assert worker.work(root, trainer=trainer, heartbeat_seconds=0.05) == 0
    assert Counter(run.k for run in state.list_runs(root)) == {1: 2}
    assert len(trainer.calls) == 2


def no_patience(of):
    """Clients fail at once: what is tested is our own patience."""

    def impatient(place):
        client = of(place)
        client.retries = 1
        return client

    return impatient


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_sweep_begun_here_and_finished_in_a_bucket_gives_the_same_table(tmp_path, direction):
    from prime_jax.sweep import collect

    quiet = tmp_path / "quiet"
    fake_trainer.planned(quiet)
    worker.work(quiet, trainer=Trainer(), heartbeat_seconds=0.05)
    collect.write(quiet, tmp_path / "quiet.csv")
    with fake_store.bucket("gs") as made:
        places = [tmp_path / "moved", storage.path(made.url)]
        first, second = places if direction == "up" else reversed(places)
        fake_trainer.planned(first)

        def act(config, call, heartbeat):
            if call == 4:
                raise Trainer.Preempted

        assert worker.work(first, trainer=Trainer(act), heartbeat_seconds=0.05) == 85
        if direction == "up":
            storage.upload(first, second)
        else:
            storage.download(first, second)
        rest = Trainer()
        assert worker.work(second, trainer=rest, heartbeat_seconds=0.05) == 0
        assert len(rest.calls) == 5
        collect.write(second, tmp_path / "moved.csv")
    assert (tmp_path / "moved.csv").read_text() == (tmp_path / "quiet.csv").read_text()


def test_no_rights_and_no_sweep_are_one_line_each(bucket, capsys):
    from prime_jax.cli import main

    assert main(["sweep", "status", bucket.url]) == 2
    assert "no sweep here" in capsys.readouterr().err
    bucket.store.denied = True
    for command in ("status", "work", "collect"):
        assert main(["sweep", command, bucket.url]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        assert bucket.url in text


def test_logs_in_a_bucket_are_to_be_copied(bucket, capsys):
    from prime_jax.cli import main

    storage.write(storage.path(bucket.url) / "run" / "events.out.tfevents.1", b"x")
    for words in (["fit", bucket.url], ["scaling", "compare", bucket.url, "--baseline", "arm"]):
        assert main(words) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        assert "are read from a local folder, so copy them first" in text


def test_json_of_a_bucket(bucket, capsys):
    from prime_jax.cli import main

    fake_trainer.planned(storage.path(bucket.url))
    assert main(["sweep", "status", bucket.url, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 8
