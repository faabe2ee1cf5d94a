"""A finished run is found by directory or by ROOT:ID; anything else is one clear line."""

import shutil

import jax
import numpy as np
import pytest

from prime_jax.cli import runs
from prime_jax.config import RunConfig, run_id
from prime_jax.errors import UserError
from prime_jax.evaluate import trained
from prime_jax.runtime.records import read_json, write_json_atomic
from prime_jax.settings import from_dict
from prime_jax.sweep import state


def test_a_run_directory_gives_a_network(tiny_run, tiny):
    run = trained.load(str(tiny_run))
    assert (run.step, run.config.steps) == (tiny.steps, tiny.steps)
    assert run.tokenizer.vocab_size == tiny.model.vocab_size
    digits = run.codebook.digits[np.arange(16)[None]]
    h_BxLxD, head_VxD = run.network(jax.device_get(run.params))(digits, None, None)
    assert h_BxLxD.shape == (1, 16, tiny.model.width)
    assert head_VxD.shape == (tiny.model.vocab_size, tiny.model.width)


def test_a_run_of_a_sweep_is_found_by_the_beginning_of_its_id(tiny_run, tmp_path):
    config = read_json(tiny_run / "config.json")
    run = run_id(from_dict(RunConfig, config))
    write_json_atomic(tmp_path / "sweep.json", {"schema": state.SCHEMA, "plans": []})
    (tmp_path / "state").mkdir()
    spec = {"flops": {"matmul": 1.0}, "config": config, "family": "prime", "params": {}}
    spec |= {"budget": 1.0, "tokens": 1, "convention": "matmul"}
    state.create(tmp_path / "state" / f"{run}.spec", spec)
    for k in (1, 2):  # the second attempt saved nothing: the first one's step is the newest
        state.claim(tmp_path, run, k)
        (tmp_path / "runs" / run / str(k)).mkdir(parents=True)
    shutil.copytree(tiny_run / "checkpoints", tmp_path / "runs" / run / "1" / "checkpoints")
    shutil.copy(tiny_run / "config.json", tmp_path / "runs" / run / "1")
    begun = read_json(tiny_run / "kernels.json")
    begun["attention"]["implementation"] = "xla"  # not what a CPU chooses
    write_json_atomic(tmp_path / "runs" / run / "1" / "kernels.json", begun)
    found = runs.load(f"{tmp_path}:{run[:6]}")
    assert found.step == config["steps"]
    assert found.id == run
    assert found.config.kernels.attention == "xla"  # as it was trained
    assert found.config.kernels.head == begun["head"]["implementation"]


def test_what_is_no_finished_run_is_refused(tiny_run, tmp_path):
    with pytest.raises(UserError, match="no run here"):
        trained.load(str(tmp_path / "nowhere"))
    config = read_json(tiny_run / "config.json") | {"steps": 20}
    unfinished = tmp_path / "unfinished"
    shutil.copytree(tiny_run, unfinished)
    write_json_atomic(unfinished / "config.json", config)
    with_about(unfinished, run=run_id(from_dict(RunConfig, config)))
    with pytest.raises(UserError, match="step 12 of 20"):
        trained.load(str(unfinished))


def test_parameters_in_another_order_are_refused(tiny_run, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(tiny_run, older)
    seal = next((older / "checkpoints").glob("*.json"))
    write_json_atomic(seal, read_json(seal) | {"layout": 0})
    with pytest.raises(UserError, match="layout 0"):
        trained.load(str(older))


def with_about(run_dir, **changes):
    """Let the seal of a checkpoint say something else about what it belongs to."""
    seal = next((run_dir / "checkpoints").glob("*.json"))
    value = read_json(seal)
    write_json_atomic(seal, value | {"about": value["about"] | changes})


def test_another_permutation_is_refused(tiny_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    with_about(other, codebook="0" * 12)
    with pytest.raises(UserError, match="codebook"):
        trained.load(str(other))
