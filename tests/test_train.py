"""Whole runs: determinism, resumption, damage, divergence, and the record."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
    run_id,
)
from prime_jax.data import manifest
from prime_jax.errors import UserError
from prime_jax.evaluate import trained
from prime_jax.hardware import chips, roofline
from prime_jax.runtime import checkpoint, meshes
from prime_jax.runtime.records import read_json
from prime_jax.settings import set_path
from prime_jax.step import Compiled
from prime_jax.subtokens import Codebook
from prime_jax.train import Preempted, Stopped, fill_fingerprint, starting_from, train

SILENT = lambda _: None  # noqa: E731


def column(run_dir, name: str) -> list[float]:
    """A number of every training row of a run's log."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if "loss" in row]


def losses(run_dir) -> list[float]:
    return column(run_dir, "loss")


def values(result) -> list[float]:
    return [loss["value"] for loss in result["losses"]]


@pytest.fixture(scope="module")
def whole(tiny_run):
    """An uninterrupted run and its directory."""
    return read_json(tiny_run / "result.json"), tiny_run


def stop_at(step: int):
    """A `heartbeat` that ends the run at `step`."""
    return lambda now: now["step"] < step


def test_a_result_has_predictions_beside_what_was_measured(quick, tmp_path, monkeypatch):
    """On a CPU with a data sheet, and with a count of the memory in use, which XLA's CPU has not."""
    sheet = dataclasses.replace(chips.CHIPS["v5e"], kind=jax.devices()[0].device_kind)
    monkeypatch.setitem(chips.CHIPS, "cpu", sheet)
    for module in ("train", "runtime.metrics"):
        monkeypatch.setattr(f"prime_jax.{module}.memory_high_water", lambda: 123_456)
    result = train(quick, tmp_path / "run", log=SILENT)
    assert result == read_json(tmp_path / "run" / "result.json")
    mesh = meshes.choose(quick, 1)
    expected = roofline.predict(quick, mesh, sheet)
    assert result["predicted"]["step_seconds"] == expected.step_seconds > 0
    assert result["step_seconds"] > 0
    state, temporaries = roofline.memory(quick, mesh)
    assert result["predicted"]["memory_bytes"] == state + temporaries > 12 * 16 * 16
    assert result["memory_bytes"] == 123_456
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["memory_bytes"] for row in rows if "step_seconds" in row} == {123_456}


def test_without_a_data_sheet_nothing_is_predicted(whole):
    result, _ = whole
    assert (result["predicted"], result["memory_bytes"]) == (None, None)


@pytest.fixture
def every_step(monkeypatch):
    """Call `heartbeat` at every step."""
    monkeypatch.setattr("prime_jax.train.HEARTBEAT_SECONDS", 0.0)


def test_the_record_is_complete(whole, tiny):
    result, run_dir = whole
    assert result == json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "done"
    assert result["tokens"] == 12 * 8 * 16
    kinds = {loss["estimator"]: loss["kind"] for loss in result["losses"]}
    assert kinds == {"subtoken": "nelbo", "joint": "train_loss", "token": "nelbo"}
    assert result["bits_per_byte"]["joint"] is None
    for loss in result["losses"]:
        assert loss["se_mc"] > 0
        assert loss["se_data"] > 0
        assert loss["n_tokens"] == 16 * 16
        assert loss["unit"] == "nats/token"
    codes = np.load(run_dir / "codebook.npy")
    assert sorted(codes) == list(range(16))
    assert checkpoint.steps(run_dir / "checkpoints") == [12]
    origin = read_json(run_dir / "checkpoints" / "000000012.json")["origin"]
    assert origin["config"] == read_json(run_dir / "config.json")
    assert origin["tokenizer"] == manifest.load(tiny.data.path).tokenizer_hash


@pytest.mark.slow
@pytest.mark.usefixtures("every_step")
def test_clipped_steps_are_counted_through_an_interruption(whole, quick, tmp_path):
    """Saved at step 5, between the rows of steps 3 and 6."""
    config = set_path(quick, "optim.clip", float(np.median(column(whole[1], "grad_norm"))))
    result = train(config, tmp_path / "whole", log=SILENT)
    beyond = np.array(column(tmp_path / "whole", "grad_norm")) > config.optim.clip
    expected = np.cumsum(beyond) / np.arange(1, 13)
    assert column(tmp_path / "whole", "clipped") == expected.tolist()
    assert result["clipped"] == expected[-1] not in (0, 1)

    sparse, first = set_path(config, "log.every", 3), tmp_path / "1"
    with pytest.raises(Stopped):
        train(sparse, first, heartbeat=stop_at(5), log=SILENT)
    older = shutil.copytree(first, tmp_path / "older")
    again = train(sparse, tmp_path / "2", earlier=[first], log=SILENT)
    assert column(tmp_path / "2", "clipped") == expected[[5, 8, 11]].tolist()
    assert again["clipped"] == expected[-1]
    seal = older / "checkpoints" / "000000005.json"
    values = read_json(seal)
    del values["tally"]
    seal.write_text(json.dumps(values))
    assert train(sparse, older, log=SILENT)["clipped"] is None  # as saved by an older version


@pytest.mark.usefixtures("every_step")
def test_a_resumed_run_is_the_same_to_the_bit(whole, tiny, tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    with pytest.raises(Stopped):
        train(tiny, first, heartbeat=stop_at(5), log=SILENT)
    said = []
    result = train(tiny, second, earlier=[first], log=said.append)
    assert any("continues at step 5 of 12" in line for line in said)
    assert losses(first)[:5] + losses(second) == losses(whole[1])
    assert values(result) == values(whole[0])


@pytest.mark.usefixtures("every_step")
def test_a_signal_saves_and_the_same_directory_continues(whole, tiny, tmp_path):
    def interrupt(now):
        if now["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    with pytest.raises(Preempted):
        train(tiny, tmp_path, heartbeat=interrupt, log=SILENT)
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] in (7, 8)
    assert values(train(tiny, tmp_path, log=SILENT)) == values(whole[0])
    assert losses(tmp_path) == losses(whole[1])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_program_is_traced_ends_at_once(quick, tmp_path, monkeypatch, number):
    def traced(*_):
        os.kill(os.getpid(), number)
        raise AssertionError("went on")

    monkeypatch.setattr(Compiled, "__call__", traced)
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match="nothing new to save"):
        train(quick, tmp_path, log=SILENT)
    assert checkpoint.steps(tmp_path / "checkpoints") == []
    assert signal.getsignal(number) == before


@pytest.mark.slow
@pytest.mark.usefixtures("every_step")
def test_an_interrupted_evaluation_is_made_again_and_the_trace_ends(quick, tmp_path, monkeypatch):
    """On the way, at step 4 of 12; the trace would go on to step 53."""
    traced = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda _: traced.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: traced.append("stop"))
    config = dataclasses.replace(quick, log=LogConfig(every=1, profile=50))
    config = set_path(set_path(config, "eval.every", 4), "eval.batch_size", 8)
    with pytest.raises(Stopped):
        train(config, tmp_path, heartbeat=lambda now: now["phase"] == "train", log=SILENT)
    assert traced == ["start", "stop"]
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]

    def evaluations():
        rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return [row["step"] for row in rows if "eval" in row]

    assert evaluations() == []
    with pytest.raises(Stopped):  # now it is there, and is not made a third time
        train(config, tmp_path, heartbeat=lambda now: now["step"] < 5, log=SILENT)
    assert evaluations() == [4]
    assert train(config, tmp_path, log=SILENT)["status"] == "done"
    assert evaluations() == [4, 8, 12]
    assert traced == ["start", "stop"] * (len(traced) // 2)


def test_a_finished_run_is_not_repeated(whole, tiny):
    result, run_dir = whole
    before = (run_dir / "metrics.jsonl").read_text()
    assert train(tiny, run_dir, log=SILENT) == result
    assert (run_dir / "metrics.jsonl").read_text() == before
    with pytest.raises(UserError, match="use another directory"):
        train(dataclasses.replace(tiny, seed=1), run_dir, log=SILENT)


@pytest.mark.usefixtures("every_step")
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, tiny, tmp_path):
    saving = dataclasses.replace(tiny, checkpoint=CheckpointConfig(every=3, keep=3))
    with pytest.raises(Stopped):
        train(saving, tmp_path, heartbeat=stop_at(7), log=SILENT)
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 6, 7]
    data = tmp_path / "checkpoints" / "000000007"
    largest = max((p for p in data.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1  # orbax restores this without noticing
    largest.write_bytes(content)
    said = []
    result = train(saving, tmp_path, log=said.append)
    assert any("000000007 is damaged" in line and "has changed" in line for line in said)
    assert any("continues at step 6" in line for line in said)
    assert values(result) == values(whole[0])


@pytest.mark.slow
@pytest.mark.usefixtures("every_step")
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_for_ever(quick, tmp_path):
    saving = dataclasses.replace(quick, checkpoint=CheckpointConfig(every=1, keep=2))
    with pytest.raises(Stopped):
        train(saving, tmp_path, heartbeat=stop_at(9), log=SILENT)
    saves, log = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    old = log.read_text().splitlines()
    for step in (8, 9):
        shutil.rmtree(saves / f"{step:09d}")
    said = []
    with pytest.raises(Stopped):
        train(saving, tmp_path, heartbeat=stop_at(5), log=said.append)
    assert "starting at step 0" in said[-1]
    assert checkpoint.steps(saves) == [4, 5, 8, 9]
    aside = tmp_path / "metrics.superseded.jsonl"
    assert aside.read_text().splitlines() == old
    assert len(log.read_text().splitlines()) < len(old)
    # Asked to leave at a step that has a seal and no data.
    with pytest.raises(Stopped):
        train(saving, tmp_path, heartbeat=stop_at(8), log=said.append)
    assert any("continues at step 5" in line for line in said)
    assert checkpoint.steps(saves) == [7, 8, 9]
    said.clear()
    assert train(saving, tmp_path, log=said.append)["status"] == "done"
    assert any("continues at step 8" in line for line in said)
    assert checkpoint.steps(saves) == [11, 12]
    assert aside.read_text().splitlines() == old
    steps = [json.loads(row)["step"] for row in log.read_text().splitlines()]
    assert steps == sorted(steps)


def test_an_unfinished_save_is_no_checkpoint(tiny, tmp_path):
    state = {"x": np.arange(8.0)}
    writer = checkpoint.Writer(tmp_path, {}, CheckpointConfig(keep=2))
    writer.save(1, state)
    writer.save(2, state)
    writer.wait()
    (tmp_path / "000000002.json").unlink()
    assert checkpoint.steps(tmp_path) == [1]
    writer.save(2, state)
    writer.save(3, state)
    writer.wait()
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert not (tmp_path / "000000001").exists()


def test_a_checkpoint_is_restored_onto_another_mesh_and_dtype(tmp_path):
    one, eight = (
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        jax.sharding.NamedSharding(
            jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data")
        ),
    )
    values = np.linspace(0, 1, 16, dtype=np.float32)
    with checkpoint.Writer(tmp_path, {}, CheckpointConfig()) as writer:
        writer.save(1, {"x": jax.device_put(values, one)})
    wanted = {"x": jax.ShapeDtypeStruct((16,), jnp.bfloat16, sharding=eight)}
    found = checkpoint.restore([tmp_path], wanted, {}, SILENT)["x"]
    assert (found.dtype, found.sharding) == (jnp.bfloat16, eight)
    np.testing.assert_array_equal(found, values.astype(jnp.bfloat16))


def test_a_full_disk_ends_in_one_line_and_keeps_what_was_saved(tmp_path):
    """A file size limit stands for the full disk; it must not reach into this process."""
    code = f"""
        import resource, signal, numpy as np, pathlib
        from prime_jax.runtime import checkpoint
        from prime_jax.config import CheckpointConfig
        from prime_jax.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        where = pathlib.Path({str(tmp_path)!r})
        big = {{"x": np.random.default_rng(0).normal(size=300_000)}}
        writer = checkpoint.Writer(where, {{}}, CheckpointConfig())
        writer.save(1, big)
        writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            writer.save(2, big)
            writer.wait()
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "cannot save step 2" in done.stdout
    assert "step 1 is kept" in done.stdout
    assert checkpoint.steps(tmp_path) == [1]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_diverged_run_is_a_result_with_a_reason(quick, tmp_path):
    wild = set_path(set_path(quick, "optim.peak_lr", 1e30), "optim.clip", 0.0)
    result = train(wild, tmp_path, log=SILENT)
    assert result["status"] == "diverged"
    assert result["losses"] == []
    assert "step" in result["reason"]
    assert "loss" in result["reason"]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert None in (last["loss"], last["grad_norm"])
    seconds = result["seconds"]["train"] + result["seconds"]["input"]
    made = result["tokens_per_second"] * seconds / (wild.batch_size * wild.data.seq_len)
    assert last["step"] <= made + 0.5 < wild.steps  # steps that were made, not those planned


@pytest.mark.slow
def test_devices_and_micro_batches_change_rounding_only(quick, tmp_path):
    """The other families and meshes are in test_sharding.py."""
    config = dataclasses.replace(quick, steps=6)
    eight = dataclasses.replace(config, mesh=MeshConfig(replica=1, data=8))
    micro = dataclasses.replace(config, mesh=MeshConfig(replica=1, data=1, accumulate=4))
    a = train(eight, tmp_path / "8", log=SILENT)
    b = train(micro, tmp_path / "1", log=SILENT)
    np.testing.assert_allclose(losses(tmp_path / "8"), losses(tmp_path / "1"), rtol=2e-5)
    np.testing.assert_allclose(values(a), values(b), rtol=2e-5)
    assert a["run"] == b["run"]  # where a run executes is not what it is


def test_a_profile_is_a_trace_of_some_steps(quick, tmp_path):
    train(set_path(quick, "log.profile", 2), tmp_path, log=SILENT)
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["input_seconds"] < row["step_seconds"] for row in rows[1:] if "loss" in row)


@pytest.mark.slow
def test_prime_with_one_subtoken_is_mdm_to_the_bit(quick, tmp_path):
    one = dataclasses.replace(quick, subtokens=SubtokenConfig(length=1), steps=5)
    results, said = {}, []
    for family in ("mdm", "prime"):
        run_dir = tmp_path / family
        results[family] = train(dataclasses.replace(one, family=family), run_dir, log=said.append)
    assert sum("with subtokens.length 1 is family mdm" in line for line in said) == 1
    assert losses(tmp_path / "mdm") == losses(tmp_path / "prime")
    assert values(results["mdm"]) == values(results["prime"])


def test_another_run_in_the_directory_names_what_differs(whole, tiny):
    _, directory = whole
    longer = dataclasses.replace(tiny, steps=20, batch_size=4)
    with pytest.raises(UserError) as error:
        train(longer, directory, log=SILENT)
    assert "steps = 12, not 20; batch_size = 8, not 4; use another directory" in str(error.value)
    assert f"--init-from {directory}" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("coded", [False, True])
def test_a_run_starts_from_the_weights_of_another(whole, quick, tmp_path, coded):
    """Also where their codes came with them, and only where they fit."""
    given = trained.weights(trained.load(str(whole[1])))
    still = OptimConfig(peak_lr=1e-30, warmup_steps=1, weight_decay=0.0, ema=0.5)
    plain = dataclasses.replace(quick, steps=2, optim=still, seed=5)
    if coded:
        old = given.codebook
        book = Codebook(old.length, old.base, old.codes[::-1].copy())
        known = set_path(given.config, "subtokens.codes", book.hash)
        given = dataclasses.replace(given, codebook=book, config=known)
    config = starting_from(plain, given)
    with pytest.raises(UserError, match="--init-from"):
        train(config, tmp_path, log=SILENT)
    result = train(config, tmp_path, initial=given, log=SILENT)
    assert result["run"] != run_id(plain)
    after = trained.load(str(tmp_path))
    assert after.codebook.hash == given.codebook.hash
    for name, value in trained.weights(after).tensors.items():
        np.testing.assert_allclose(value, given.tensors[name], rtol=1e-6, err_msg=name)
    assert train(config, tmp_path, log=SILENT) == result  # it needs them no more
    for path, value, message in (
        ("subtokens.seed", 1, "other codes"),
        ("model.layers", 2, r"--init-from: missing tensors layers\.1"),
    ):
        if not coded or path == "model.layers":
            with pytest.raises(UserError, match=message):
                starting_from(set_path(plain, path, value), given)


OPTIONS = {
    "random length, mixture": {
        "objective": ObjectiveConfig(random_length=0.5, token_mask_rho=0.5, schedule="cosine")
    },
    "published recipe": {"objective": ObjectiveConfig(loss="joint", carry_over=False)},
    "flat weight, wsd, ema": {
        "objective": ObjectiveConfig(weight="flat", schedule="poly"),
        "optim": OptimConfig(peak_lr=1e-3, schedule="wsd", ema=0.9, warmup_steps=2),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_train(quick, tmp_path, name):
    config = dataclasses.replace(quick, steps=4, **OPTIONS[name])
    result = train(config, tmp_path, log=SILENT)
    assert result["status"] == "done"
    assert all(np.isfinite(losses(tmp_path)))


@pytest.mark.slow
def test_segment_ids_are_labelled_and_leave_eos_out(tmp_path_factory, tmp_path):
    from prime_jax.data.prepare import prepare

    data = tmp_path_factory.mktemp("data") / "docs"
    prepare(
        "markov:V=15,order=0,seed=0,tokens=20000,doc_mean=10",
        "synthetic:15+eos",
        data,
        seq_len=16,
        workers=1,
    )
    config = RunConfig(
        family="mdm",
        steps=3,
        batch_size=8,
        model=ModelConfig(vocab_size=16, layers=1, width=16, heads=1),
        data=DataConfig(path=str(data), seq_len=16, segment_ids=True),
        optim=OptimConfig(warmup_steps=0),
        eval=EvalConfig(examples=16, batch_size=64),
    )
    (loss,) = train(config, tmp_path, log=SILENT)["losses"]
    assert loss["given"] == "lengths"
    assert loss["n_tokens"] < 16 * 16


def test_identity_leaves_out_where_a_run_executes(tiny, markov_data):
    moved = set_path(tiny, "data.path", "elsewhere")
    assert run_id(moved) == run_id(tiny)
    assert run_id(set_path(tiny, "mesh.accumulate", 2)) == run_id(tiny)
    assert run_id(set_path(tiny, "optim.peak_lr", 1e-3)) != run_id(tiny)
    from prime_jax.data import manifest

    assert run_id(fill_fingerprint(tiny, manifest.load(markov_data))) != run_id(tiny)
