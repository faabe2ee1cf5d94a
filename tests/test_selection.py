"""What computes what: the table, its overrides, and the way back to plain XLA."""

import dataclasses

import pytest

from prime_jax.config import DataConfig, KernelConfig, RunConfig, run_id
from prime_jax.kernels import selection
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
        config = RunConfig(data=DataConfig(seq_len=length))
        choice = CHOOSERS[kernel](config, device)
        assert choice.implementation != "auto"
        assert choice.why
        assert any(choice == row.choice for row in selection.rows(device))
    last = [row for row in selection.rows(device) if row.kernel == kernel][-1]
    assert not last.condition


def test_nothing_but_a_tpu_runs_a_tpu_kernel():
    config = RunConfig(data=DataConfig(seq_len=2048))
    for device in DEVICES:
        chosen = {choose(config, device).implementation for choose in CHOOSERS.values()}
        if not device.startswith("TPU"):
            assert not chosen & {"pallas", "splash"}


def test_a_config_overrides_the_table_without_changing_the_run():
    kernels = KernelConfig(
        head="pallas", attention="xla", head_blocks=(256, 512, 128), attention_blocks=(128, 128)
    )
    config = RunConfig(kernels=kernels)
    assert selection.head(config, "cpu")[:2] == ("pallas", (256, 512, 128))
    assert selection.attention(config, "TPU v5 lite")[:2] == ("xla", (128, 128))
    assert run_id(config) == run_id(RunConfig())


def test_blocks_alone_keep_the_implementation_of_the_table():
    config = RunConfig(kernels=KernelConfig(attention_blocks=(256, 512)))
    plain = selection.attention(RunConfig(), "cpu")
    assert selection.attention(config, "cpu") == plain._replace(blocks=(256, 512))


def test_block_diffusion_gets_no_kernel_that_cannot_do_it():
    config = set_path(RunConfig(data=DataConfig(seq_len=2048)), "objective.block_length", 256)
    for device in DEVICES:
        choice = selection.attention(config, device)
        assert choice.implementation != "pallas"
        assert choice.implementation == "splash" or not device.startswith("TPU")
    assert (
        selection.attention(RunConfig(data=config.data), "TPU v6 lite").implementation == "pallas"
    )


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
