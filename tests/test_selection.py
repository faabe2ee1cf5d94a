"""What computes what: defaults, measurements, overrides, and the way back to plain XLA."""

import dataclasses
import json

import pytest

from prime_jax.config import DataConfig, KernelConfig, RunConfig, run_id
from prime_jax.errors import UserError
from prime_jax.kernels import selection
from prime_jax.kernels.selection import Choices, Measured, Row
from prime_jax.settings import set_path

DEVICES = ("cpu", "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "NVIDIA H100", "MI300")
CHOOSERS = {f.__name__: f for f in (selection.head, selection.attention, selection.embedding)}
VMEM = (
    "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem "
    "while allocating on stack for %a_kernel.1 = f32[48,2048] custom-call(%x). Scoped allocation "
    "with size 64.44M and limit 16.00M exceeded scoped vmem limit by 48.44M."
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", list(CHOOSERS))
def test_every_device_has_a_choice_and_a_reason(device, kernel):
    for length in (1, 128, 2048, 1 << 17):
        choice = CHOOSERS[kernel](RunConfig(data=DataConfig(seq_len=length)), device)
        assert choice.implementation not in ("auto", "pallas")  # not before it is measured
        assert choice.why


def test_nothing_but_a_tpu_runs_a_tpu_kernel():
    config = RunConfig(data=DataConfig(seq_len=2048))
    for device in DEVICES:
        chosen = {choose(config, device).implementation for choose in CHOOSERS.values()}
        if not device.startswith("TPU"):
            assert not chosen & {"pallas", "splash"}


def test_a_config_overrides_the_choice_without_changing_the_run():
    kernels = KernelConfig(
        head="pallas", attention="xla", head_blocks=(256, 512, 128), attention_blocks=(128, 128)
    )
    config = RunConfig(kernels=kernels)
    assert selection.head(config, "cpu")[:2] == ("pallas", (256, 512, 128))
    assert selection.attention(config, "TPU v5 lite")[:2] == ("xla", (128, 128))
    assert run_id(config) == run_id(RunConfig())


def test_blocks_alone_keep_the_implementation():
    config = RunConfig(kernels=KernelConfig(attention_blocks=(256, 512)))
    plain = selection.attention(RunConfig(), "cpu")
    assert selection.attention(config, "cpu") == plain._replace(blocks=(256, 512))


def test_block_diffusion_gets_no_kernel_that_cannot_do_it():
    config = set_path(RunConfig(data=DataConfig(seq_len=2048)), "objective.block_length", 256)
    for device in DEVICES:
        choice = selection.attention(config, device)
        assert choice.implementation != "pallas"
        assert choice.implementation == "splash" or not device.startswith("TPU")


def table(implementation: str, blocks=(), measured=(), **changes) -> Choices:
    config = RunConfig()
    shape = selection.shape_of("attention", config) | changes
    row = Row("attention", shape, implementation, blocks, "measured", tuple(measured))
    return Choices("TPU v6 lite", "jax", (row,))


def test_a_measurement_decides_at_its_shape_on_its_chip():
    choices = table("pallas", (512, 512))
    found = selection.resolved(RunConfig(), "TPU v6 lite", choices)
    assert (found.attention, found.attention_blocks) == ("pallas", (512, 512))
    elsewhere = RunConfig(data=DataConfig(seq_len=4096))
    assert selection.resolved(elsewhere, "TPU v6 lite", choices).attention == "splash"
    assert selection.resolved(RunConfig(), "TPU v5 lite", choices).attention == "xla"
    named = RunConfig(kernels=KernelConfig(attention="scan"))
    assert selection.resolved(named, "TPU v6 lite", choices).attention == "scan"
    blocks = RunConfig(kernels=KernelConfig(attention_blocks=(256, 512)))
    assert selection.resolved(blocks, "TPU v6 lite", choices).attention_blocks == (256, 512)


def test_what_is_off_on_a_chip_is_chosen_at_no_shape_there():
    choices = table("xla", measured=[Measured("splash", problem="off by 0.4 where XLA is not")])
    long = RunConfig(data=DataConfig(seq_len=4096))
    assert selection.resolved(long, "TPU v6 lite", choices).attention == "xla"
    assert "off by 0.4" in choices.choose("attention", long, "TPU v6 lite").why
    assert selection.resolved(long, "TPU v5 lite", choices).attention == "splash"


def test_a_table_survives_its_file_and_a_strange_one_is_refused():
    choices = table("pallas", (512, 512), [Measured("pallas", (512, 512), 1.5, 1e-3)])
    assert Choices.from_dict(json.loads(json.dumps(choices.as_dict()))) == choices
    for strange in ({}, [], {"schema": 99}, choices.as_dict() | {"rows": [{"x": 1}]}):
        with pytest.raises(UserError, match=r"cpu\.json.*tune again"):
            Choices.from_dict(strange, "cpu.json")


def test_a_record_gives_back_the_kernels_of_a_run():
    choices = table("pallas", (512, 512))
    began = selection.resolved(RunConfig(), "TPU v6 lite", choices)
    kept = json.loads(json.dumps(selection.record(began, "TPU v6 lite")))
    assert selection.recorded(RunConfig(), kept, "TPU v6 lite").kernels == began
    assert selection.recorded(RunConfig(), kept, "TPU v5 lite") is None
    named = RunConfig(kernels=KernelConfig(attention="xla", attention_blocks=(128, 128)))
    again = selection.recorded(named, kept, "TPU v6 lite").kernels
    assert (again.attention, again.attention_blocks) == ("xla", (128, 128))
    assert again.head == "xla"


def raising(error: Exception):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (VMEM, "a_kernel.1: Scoped allocation with size 64.44M and limit 16.00M"),
        ("INTERNAL: Mosaic failed to compile TPU kernel: Invalid relayout\nmore", "relayout"),
        ("x\nThe Pallas TPU lowering currently requires that the last two", "last two"),
    ],
)
def test_a_kernel_that_does_not_compile_gives_way_with_the_cause(message, told):
    with pytest.warns(UserWarning, match="training step") as caught:
        assert selection.fallback(raising(RuntimeError(message)), lambda: "twin", "training step")
    assert len(caught) == 1
    assert told in str(caught[0].message)
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Ran out of memory in memory space hbm. Largest: a pallas call"),
        RuntimeError("Ran out of memory on HBM, the total memory of pallas (25.4G) exceeds"),
        ValueError("shapes do not match"),
        KeyboardInterrupt(),
    ],
)
def test_other_failures_are_not_the_kernels(error):
    with pytest.raises(type(error)):
        selection.fallback(raising(error), lambda: "twin", "training step")


def test_a_failure_of_the_twin_is_raised():
    with pytest.warns(UserWarning, match="Mosaic"), pytest.raises(ZeroDivisionError):
        selection.fallback(raising(RuntimeError("Mosaic failed")), lambda: 1 // 0, "step")


def test_what_works_is_not_compiled_twice():
    assert selection.fallback(lambda: "kernel", raising(AssertionError()), "step") == "kernel"


def test_the_plain_config_asks_for_no_kernel():
    config = dataclasses.replace(RunConfig(), kernels=selection.PLAIN)
    for device in DEVICES:
        assert {choose(config, device).implementation for choose in CHOOSERS.values()} == {"xla"}
