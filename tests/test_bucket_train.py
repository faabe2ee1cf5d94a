"""Real training into buckets: checkpoints saved, pruned, restored, damaged, and cut off."""

import threading

import fake_store
import pytest

from prime_jax import train
from prime_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from prime_jax.runtime import checkpoint, storage

STEPS = 20


@pytest.fixture(params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def bucket(request):
    with fake_store.bucket(request.param) as made:
        yield made


@pytest.fixture(scope="module")
def config(markov_data) -> RunConfig:
    return RunConfig(
        family="arm",
        steps=STEPS,
        batch_size=8,
        model=ModelConfig(vocab_size=16, layers=1, width=32, heads=2),
        data=DataConfig(path=str(markov_data), seq_len=16),
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=3),
        eval=EvalConfig(examples=16, replicates=1, batch_size=16, estimators=()),
        mesh=MeshConfig(replica=1, data=2, model=1),
        checkpoint=CheckpointConfig(every=4, keep=2),
        log=LogConfig(every=1),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> list[dict]:
    return train.train(config, tmp_path_factory.mktemp("whole") / "run")["losses"]


def every_step(monkeypatch) -> None:
    monkeypatch.setattr(train, "HEARTBEAT_SECONDS", 0.0)


def until(step: int):
    return lambda values: values["step"] < step


@pytest.mark.slow
def test_a_run_continues_in_a_bucket_after_a_damaged_save(config, whole, bucket, monkeypatch):
    every_step(monkeypatch)
    root, said = storage.path(bucket.url), []
    with pytest.raises(train.Stopped):
        train.train(config, root / "1", heartbeat=until(10))
    saves = root / "1" / "checkpoints"
    assert checkpoint.steps(saves) == [8, 10]  # two are kept
    damaged = max(storage.checksums(saves / "000000010").items(), key=lambda item: item[1][0])[0]
    storage.write(saves / "000000010" / damaged, b"x" * 7)
    result = train.train(config, root / "2", earlier=[root / "1"], log=said.append)
    assert any("is damaged" in text for text in said)
    assert any(f"continues at step 8 of {STEPS}" in text for text in said)
    assert result["losses"] == whole
    rows = storage.read(root / "2" / "metrics.jsonl").decode().splitlines()
    assert len(rows) == STEPS - 8 + 1  # and the evaluation
    assert checkpoint.steps(root / "2" / "checkpoints") == [16, 20]
    assert train.train(config, root / "2") == result


@pytest.mark.slow
def test_a_run_moves_between_a_bucket_and_a_folder(config, whole, tmp_path, monkeypatch):
    every_step(monkeypatch)
    with fake_store.bucket("gs") as made:
        root = storage.path(made.url)
        with pytest.raises(train.Stopped):
            train.train(config, root / "1", heartbeat=until(6))
        storage.download(root / "1", tmp_path / "1")
        with pytest.raises(train.Stopped):
            train.train(config, tmp_path / "2", earlier=[tmp_path / "1"], heartbeat=until(12))
        storage.upload(tmp_path / "2", root / "2")
        result = train.train(config, root / "3", earlier=[root / "2", root / "1"])
    assert result["first_step"] == 12
    assert result["losses"] == whole


@pytest.mark.slow
def test_a_store_that_is_gone_for_a_while_costs_no_step(config, whole, bucket, monkeypatch):
    """It goes before a save, which waits for it."""
    every_step(monkeypatch)
    root, said, made = storage.path(bucket.url), [], []

    def heartbeat(values):
        made.append(values["step"])
        if values["step"] == 6:
            bucket.store.down = True
        if values["step"] == 7:
            threading.Timer(1.0, lambda: setattr(bucket.store, "down", False)).start()
        return True

    result = train.train(config, root / "1", heartbeat=heartbeat, log=said.append)
    assert result["losses"] == whole
    assert [step for step in made if step < STEPS] == list(range(1, STEPS))
    assert checkpoint.steps(root / "1" / "checkpoints")[-1] == STEPS
