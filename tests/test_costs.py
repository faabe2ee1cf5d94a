"""The paper model of step time, memory and money, and the names of slices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from prime_jax import flops
from prime_jax.compile_check import gpu_target
from prime_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, SubtokenConfig
from prime_jax.errors import UserError
from prime_jax.hardware import chips, roofline, slices
from prime_jax.hardware.chips import GIB
from prime_jax.hardware.prices import load_prices
from prime_jax.model import build
from prime_jax.runtime import meshes
from prime_jax.runtime.sharding import AXES, Shardings
from prime_jax.subtokens import Codebook

BIG = RunConfig(
    family="mdm",
    steps=100,
    batch_size=256,
    model=ModelConfig(vocab_size=32000, layers=24, width=2048, heads=16, dtype="bfloat16"),
    data=DataConfig(seq_len=2048),
)


@pytest.mark.parametrize(
    ("name", "canonical", "topology", "devices", "chips"),
    [
        ("v5e-16", "v5e-16", "v5e:4x4", 16, 16),
        ("v5litepod-256", "v5e-256", "v5e:16x16", 256, 256),
        ("v5e-8", "v5e-8", "v5e:2x4", 8, 8),
        ("v5p-128", "v5p-128", "v5p:4x4x4", 64, 64),
        ("v5p-512", "v5p-512", "v5p:4x8x8", 256, 256),
        ("v4-32", "v4-32", "v4:2x2x4", 16, 16),
        ("v4-8", "v4-8", "v4:2x2x1", 4, 4),
        ("2xv6e-256", "2xv6e-256", "v6e:16x16", 512, 512),
        ("TPU7x-8", "tpu7x-8", "tpu7x:2x2x1", 8, 4),
        ("v6e-1", "v6e-1", "v6e:1x1", 1, 1),
    ],
)
def test_slice_names(name, canonical, topology, devices, chips):
    found = slices.parse(name)
    assert (found.name, found.topology) == (canonical, topology)
    assert (found.devices, found.chips) == (devices, chips)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "expected CHIP-N"),
        ("v5q-16", "did you mean v5"),
        ("v5p-7", "counts cores"),
        ("v5e-12", "has sizes"),
        ("v6e-512", "has sizes"),
        ("0xv5e-16", "slice '0xv5e-16'"),
        ("h100-64", "8xh100-8"),
    ],
)
def test_a_bad_slice_name_says_what_is_right(name, message):
    with pytest.raises(UserError, match=message):
        slices.parse(name)


def test_a_tpu7x_device_is_half_a_chip():
    assert chips.of_device("TPU7x").per_chip == 2
    assert chips.of_device("TPU v5 lite") is chips.CHIPS["v5e"]  # not v5p, a prefix of it
    assert chips.of_device("TPU v5") is chips.CHIPS["v5p"]
    assert chips.of_device("cpu") is None


def predicted(config=BIG, name="v5e-16", **mesh):
    where = slices.parse(name)
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
    choice = meshes.choose(config, where.devices, where.slices)
    return roofline.predict(config, choice, where.chip, where.slices)


def test_matmul_time_is_flops_over_the_stated_share_of_the_peak():
    tokens = 256 * 2048
    work = flops.flops_per_token(BIG, "matmul") * tokens
    assert predicted().matmul == pytest.approx(work / (16 * 197e12 * 0.6))
    assert predicted(remat="full").matmul == pytest.approx(4 / 3 * predicted().matmul)


def test_fully_sharded_messages_by_hand():
    counts = flops.param_counts(BIG)
    layers = counts["nonembedding"]
    outer = counts["total"] - layers
    fraction = 15 / 16 / (200e9 * 0.8)
    gathered = (2 * layers + outer) * 2 * fraction  # bfloat16, again for the backward pass
    scattered = 2 * (layers + outer) * 4 * fraction  # float32, summed whole
    one = predicted(remat="dots")
    assert (one.overlapped, one.not_overlapped) == pytest.approx((gathered, scattered))
    four = predicted(remat="dots", accumulate=4)
    assert (four.overlapped, four.not_overlapped) == pytest.approx((4 * gathered, 4 * scattered))
    gpus = predicted(name="2xh100-8", replica=1, data=16)
    assert gpus.not_overlapped == 0


def test_gradients_are_summed_whole_or_scattered():
    sent = 4 * flops.param_counts(BIG)["total"] * 15 / 16 / 0.8
    for name, rounds in (("v5p-32", 2), ("v5e-16", 2), ("v6e-16", 1)):
        link = slices.parse(name).chip.link_speed
        assert predicted(name=name).not_overlapped == pytest.approx(rounds * sent / link)


def test_gradients_of_two_slices_cross_the_network():
    two = predicted(name="2xv5e-16")
    counts = flops.param_counts(BIG)["total"]
    network = 2 * 4 * counts / 16 / 2 / (3.125e9 * 0.7)
    assert two.not_overlapped == pytest.approx(predicted(name="v5e-16").not_overlapped + network)


def test_tensor_parallel_messages_are_on_the_critical_path():
    split = predicted(model=4)
    assert split.not_overlapped > 0
    assert split.step_seconds == pytest.approx(
        max(split.matmul, split.hbm, split.overlapped) + split.not_overlapped
    )
    assert 0 < split.communication < 1


def test_memory_falls_with_what_frees_it():
    def total(**mesh):
        config = dataclasses.replace(BIG, mesh=MeshConfig(**mesh))
        return sum(roofline.memory(config, meshes.choose(config, 16)))

    assert total(remat="full") < total(remat="dots") < total(remat="none")
    assert total(accumulate=16) < total(accumulate=2)
    assert total(replica=16, data=1) > total(replica=1, data=16)
    state, _ = roofline.memory(BIG, meshes.choose(BIG, 16))
    assert state == pytest.approx(12 * flops.param_counts(BIG)["total"] / 16)


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("split", [(1, 8, 1), (2, 1, 4), (1, 2, 4), (1, 3, 2), (1, 1, 8)])
def test_a_device_is_counted_what_sharding_gives_it(split, tied_head):
    """Of a big vocabulary `model` splits the head, never the embedding, and not if it is odd."""
    for vocab_size, embedding in ((4096, "sum"), (4096, "cat"), (4097, "sum")):
        model = ModelConfig(vocab_size, 2, 64, 8, embedding=embedding, tied_head=tied_head)
        if tied_head and embedding == "cat":
            continue
        config = dataclasses.replace(
            BIG, family="prime", model=model, subtokens=SubtokenConfig(1 if tied_head else 2)
        )
        mesh = meshes.Choice(*split, "")
        codebook = Codebook.create(vocab_size, config.subtokens)
        digits = jnp.zeros((1, 8, codebook.length), jnp.int32)
        whole = jax.eval_shape(build(config, codebook).init, jax.random.key(0), digits)["params"]
        specs = Shardings(*split).specs(whole)
        sizes = dict(zip(AXES, split, strict=True))
        held = sum(
            x.size / math.prod(sizes[axis] for axis in spec if axis)
            for x, spec in zip(jax.tree.leaves(whole), jax.tree.leaves(specs), strict=True)
        )
        vectors = (2 * 2 + 1) * 64  # norms, which every device holds
        assert roofline.sizes(config, mesh).held == pytest.approx(held, abs=vectors + 100)


def test_memory_agrees_with_a_whole_program_that_the_compiler_made():
    """12 x 768 on v5e-16, 32 Ki tokens a chip: 10.92 GiB of temporaries (libtpu 0.0.42)."""
    model = ModelConfig(vocab_size=50257, layers=12, width=768, heads=12, dtype="bfloat16")
    config = dataclasses.replace(BIG, model=model, mesh=MeshConfig(remat="dots"))
    _, temporaries = roofline.memory(config, meshes.choose(config, 16))
    assert temporaries / GIB == pytest.approx(10.92, rel=0.1)


def test_devices_without_a_data_sheet_have_no_prediction():
    assert roofline.of_run(BIG, meshes.choose(BIG, 16), "cpu") is None
    found = roofline.of_run(BIG, meshes.choose(BIG, 16), "TPU v5 lite")
    assert found["step_seconds"] == pytest.approx(predicted().step_seconds)


@pytest.mark.parametrize("name", chips.CHIPS)
def test_one_row_says_all_that_a_generation_needs(name):
    """A new chip is one row: what a launcher, the roofline and the compilers ask is a column."""
    chip = chips.CHIPS[name]
    assert chips.of_device(f"{chip.kind} and more") is chip
    assert chips.peak_flops(chip.kind) == chip.peak
    assert all(chips.generation_of(alias) == name for alias in (name, *chip.aliases))
    optional = {"cloud", "compiler", "aliases", "summed_whole", "dimensions"}
    for field in dataclasses.fields(chip):
        assert field.name in optional or getattr(chip, field.name), field.name
    if chip.platform == "cuda":
        assert chip.full_name in gpu_target.text(chip)
        assert chip.dimensions == 0
        return
    assert chip.dimensions in (2, 3)
    one = slices.parse(f"{name}-{chip.counted * chip.per_chip}")
    assert one.topology == f"{name}:" + "x".join("1" * chip.dimensions)


def test_prices(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text(
        'date = "2026-11-01"\ncurrency = "EUR"\n[per_chip_hour]\nv5e = 1.5\ntpu7x = 8\n'
    )
    prices = load_prices(path)
    assert prices.of(slices.parse("2xv5e-16"), hours=10) == 2 * 16 * 1.5 * 10
    assert prices.of(slices.parse("tpu7x-8"), hours=1) == 4 * 8  # chips, not cores
    assert prices.of(slices.parse("v6e-8"), hours=1) is None


@pytest.mark.parametrize(
    "text", [None, "date = ", 'date = "today"\n', '[per_chip_hour]\nv5e = "x"\n']
)
def test_a_bad_price_list_is_refused(tmp_path, text):
    path = tmp_path / "prices.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"prices\.toml"):
        load_prices(path)
