"""From sizes to runs that can be launched: shapes in any count of N, and the rows of a sweep."""

import dataclasses

import fake_trainer
import pytest

from prime_jax import flops
from prime_jax.config import ModelConfig, RunConfig
from prime_jax.errors import UserError
from prime_jax.scaling import launchable
from prime_jax.sweep import grid, rules

CONVENTIONS = {"flops": "as given", "params": "as given"}
TEMPLATE = launchable.template("mdm", CONVENTIONS, None)


@pytest.mark.parametrize("count", ["total", "nonembedding", "nonembedding_plus_head", "reference"])
@pytest.mark.parametrize("params", [2e6, 1e8, 3e9])
def test_nearest_shape_in_any_count(count, params):
    model = ModelConfig(vocab_size=8000)
    config = RunConfig(family="mdm", model=model)
    template = dataclasses.replace(TEMPLATE, config=config, count=count)
    shape = launchable.shape_near(template, params)
    assert launchable.count(template, shape) == pytest.approx(params, rel=0.15)
    assert shape[1] % shape[2] == 0


def test_no_shape_so_small():
    with pytest.raises(UserError, match="no mdm shape"):
        launchable.shape_near(TEMPLATE, 100.0)


def test_launch_is_a_run_of_the_sweep(tmp_path):
    sweep = fake_trainer.sweep(families={"fine": {"family": "prime", "subtokens.length": 3}})
    fake_trainer.planned(tmp_path, families=sweep.families)
    known = launchable.of_sweep(tmp_path)["fine"]
    conventions = {"flops": "matmul", "params": "nonembedding_plus_head"}
    template = launchable.template("fine", conventions, known)
    assert template.notes == ()
    shape = launchable.shape_near(template, 50_000)
    first, second = launchable.rows(template, 1e12, shape, [7, 8])
    config = grid.to_config(first)
    assert config.family == "prime"
    assert (config.subtokens.length, config.model.vocab_size, config.batch_size) == (3, 64, 4)
    assert config.optim.peak_lr == 1e-3
    assert (first.seed, second.seed) == (7, 8)
    assert 0.99e12 < flops.train_flops(config, "matmul") <= 1e12
    with pytest.raises(UserError, match="fine at 1 FLOPs"):
        launchable.rows(template, 1.0, shape, [0])


def test_a_rule_that_is_gone_is_named():
    known = {"config": {}, "rules": {"batch": "mine", "lr": "fixed:2e-3", "shape": "given"}}
    template = launchable.template("arm", CONVENTIONS, known)
    assert template.rules["lr"] == "fixed:2e-3"
    assert template.rules["batch"] == grid.Sweep.batch
    assert rules.resolve("shape", template.rules["shape"])
    assert any("mine" in note for note in template.notes)
