import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prime_jax import flops
from prime_jax.config import FAMILIES, ModelConfig, RunConfig, validate
from prime_jax.errors import UserError
from prime_jax.sweep import rules

CELL = rules.Cell(
    family="arm",
    budget=1e19,
    shape=(16, 1024, 16),
    params=200_000_000,
    tokens=8e9,
    seq_len=2048,
    warmup_steps=1000,
)


@pytest.mark.parametrize("target", np.geomspace(3e4, 5e10, 13))
def test_aspect_shapes_are_valid_near_the_target_and_of_standard_head_size(target):
    config = RunConfig(steps=10_000)
    shape = rules.shape_aspect(target, config)
    layers, width, heads = shape
    made = validate(rules.with_shape(config, shape))
    assert abs(flops.param_counts(made)["nonembedding"] / target - 1) < 0.25
    assert width // heads in ((64, 128) if width >= 128 else (16, 32))
    assert layers >= 2
    if target > 1e8:
        assert 0.5 < width / layers / rules.ASPECT < 2


def test_shape_of_a_target_no_shape_can_meet():
    with pytest.raises(UserError, match="no shape within 25 %"):
        rules.shape_aspect(1000, RunConfig())
    with pytest.raises(UserError, match="no shape within 25 %"):
        rules.shape_published(1e6, RunConfig())


def test_shape_follows_the_configured_block():
    """With grouped queries a layer is smaller, so the same N is deeper or wider."""
    plain = RunConfig()
    wide = replace(plain, model=replace(plain.model, ffn_multiple=8))
    assert rules.shape_aspect(1e7, plain) != rules.shape_aspect(1e7, wide)


def test_published_shapes_and_aspect():
    config = RunConfig(steps=10_000, model=ModelConfig(vocab_size=50257))
    for shape in rules.PUBLISHED:
        validate(rules.with_shape(config, shape))
        n = flops.param_counts(rules.with_shape(config, shape))["nonembedding"]
        assert rules.shape_published(n, config) == shape
    mean = np.mean([math.log(width / layers) for layers, width, _ in rules.PUBLISHED])
    assert math.exp(mean) == pytest.approx(rules.ASPECT, rel=0.01)


def test_published_batch_is_256_sequences_and_512_from_1529m():
    small, large = (flops_of(shape) for shape in (rules.PUBLISHED[15], rules.PUBLISHED[16]))
    assert rules.batch_published(replace(CELL, params=small)) == 256
    assert rules.batch_published(replace(CELL, params=large)) == 512


def flops_of(shape):
    return flops.param_counts(rules.with_shape(RunConfig(), shape))["nonembedding"]


def test_fitted_laws_at_a_point():
    # DeepSeek at 1e19: .2920e19^.3271 = 4.8e5 tokens; lr .3118 * 1e19^-.125.
    assert rules.batch_deepseek(CELL) == 256
    assert rules.lr_deepseek(CELL) == pytest.approx(1.3144e-3, rel=1e-3)
    # Step Law: .58 * (8e9)^.571 = 2.65e5 tokens; lr 1.79 * (2e8)^-.713 * (8e9)^.307
    assert rules.batch_step_law(CELL) == 128
    assert rules.lr_step_law(CELL) == pytest.approx(2.3685e-3, rel=1e-3)
    assert rules.lr_step_law(replace(CELL, params=50_000)) == 0.01
    assert rules.batch_deepseek(replace(CELL, budget=1e3)) == 1


def test_warmup_fits_into_short_runs():
    assert rules.warmup_capped(replace(CELL, steps=20_000)) == 1000
    assert rules.warmup_capped(replace(CELL, steps=200)) == 20
    assert rules.warmup_capped(replace(CELL, steps=1)) == 0


@pytest.mark.parametrize(
    ("family", "expected"), [("arm", 1206e6), ("mdm", 512e6), ("prime", 418e6)]
)
def test_published_optimum(family, expected):
    """theory.md, "The published grid": N* at 2.887e20, counted as 12 d^2 layers."""
    assert rules.optimum_published(family, 2.887e20) * 3 / 4 == pytest.approx(expected, rel=0.015)


def test_the_page_on_the_mathematics_has_the_published_grid():
    page = (Path(__file__).parents[1] / "docs" / "theory.md").read_text()
    cells = re.findall(r"\| (\d+) \| (\d+) x (\d+) x (\d+) ", page)
    grid = {int(label): tuple(map(int, shape)) for label, *shape in cells}
    assert tuple(grid[label] for label in sorted(grid)) == rules.PUBLISHED
    for label, (layers, width, _) in grid.items():
        assert label == round(12 * width**2 * layers / 1e6)


def test_chinchilla_optimum_has_twenty_tokens_per_parameter():
    for family in FAMILIES:
        n = rules.optimum_chinchilla(family, 6e20)
        assert 6e20 / (6 * n) == pytest.approx(20 * n)


def test_rules_resolve_by_name_value_or_function():
    def mine(cell):
        return 7

    assert rules.resolve("batch", mine) == ("mine", mine)
    name, fixed = rules.resolve("lr", "fixed:3e-4")
    assert (name, fixed(CELL)) == ("fixed:3e-4", 3e-4)
    for kind, named in rules.RULES.items():
        for rule, function in named.items():
            assert rules.resolve(kind, rule) == (rule, function)
            assert function.__doc__


@pytest.mark.parametrize(
    ("kind", "rule", "hint"),
    [
        ("lr", "step-lav", "step-law"),
        ("shape", "fixed:1", "aspect"),
        ("batch", "fixed:many", "number"),
    ],
)
def test_unknown_rules_are_refused(kind, rule, hint):
    with pytest.raises(UserError, match=hint):
        rules.resolve(kind, rule)
