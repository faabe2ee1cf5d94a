"""The program of a training step: its collectives as lowered, as compiled, and as read from text."""

import dataclasses
import importlib.util
import re

import pytest

from prime_jax import step
from prime_jax.compile_check import aot, hlo
from prime_jax.compile_check import worker as aot_worker
from prime_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, SubtokenConfig
from prime_jax.experiment import call
from prime_jax.hardware import roofline, slices
from prime_jax.sweep import grid
from prime_jax.sweep.grid import Sweep

V5E = slices.parse("v5e-16")
needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu: pip install 'prime_jax[tpu-compile]'"
)

HLO = """HloModule step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%chained (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %all-gather.9 = bf16[16,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="5"}
}

%chained.2 (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %all-gather.10 = bf16[16,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="5"}
}

%layer (x: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}
  %fusion.1 = bf16[16,8]{1,0} fusion(%w), kind=kCustom, calls=%chained
  %fusion.2 = bf16[16,8]{1,0} fusion(%w), kind=kCustom, calls=%chained.2
  %scatter = f32[4,8]{1,0} reduce-scatter(%g), replica_groups={{0,1,2,3}}, to_apply=%sum
  %kept = f32[16,1]{1,0:T(8,128)} copy(%y), metadata={op_name="jit(train)/keep"}
  ROOT %out = (s32[], f32[16,8]) tuple(%i, %x)
}

%more (x: (s32[], f32[16,8])) -> pred[] {
  %limit = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[16,8]) -> f32[16,8] {
  %norms = f32[8]{0} all-reduce(%n), replica_groups=mesh['a'=1,'b'=2,'c'=4] {'a','c'}, to_apply=%sum
  %loop = (s32[], f32[16,8]) while(%start), condition=%more, body=%layer
  ROOT %all-reduce.1 = (f32[16,8]{1,0}, f32[8]{0}) all-reduce(%a, %b), replica_groups={{0,1,2,3}}, to_apply=%sum
}
"""


def test_messages_of_a_program_by_hand():
    found = {collective.kind: collective for collective in hlo.collectives(HLO)}
    assert found["all-gather"].count == 24  # twice in each of 12 layers: a chain counts once
    assert found["all-gather"].bytes == 24 * (16 * 8 * 2) * 3 / 4
    assert found["all-gather"].background == found["all-gather"].bytes / 2
    assert found["reduce-scatter"].background == 0
    assert found["reduce-scatter"].bytes == 12 * (4 * 8 * 4) * 3
    assert found["all-reduce"].bytes == 2 * (16 * 8 + 8 + 8) * 4 * 3 / 4


def test_the_largest_array_is_padded_to_its_tiles():
    found = hlo.largest(HLO)
    assert found.bytes == 16 * 128 * 4
    assert found.source == "jit(train)/keep"


AS_WRITTEN = """HloModule jit_train

body.1 {
  x = f32[64,8]{1,0} dot(a, b)
  wide = f32[4096,8]{1,0} broadcast(x), dimensions={0,1}
  ROOT kept = f32[12,64,8]{2,1,0} dynamic-update-slice(stack, x, i), metadata={op_name="jit(train)/scan"}
}

more.1 {
  limit = s32[] constant(12)
  ROOT lt = pred[] compare(i, limit), direction=LT
}

step.1 {
  loop = (s32[], f32[12,64,8]{2,1,0}) while(start), condition=more.1, body=body.1
  ROOT sum = f32[64,8]{1,0} all-reduce(x), replica_groups={{0,1,2,3}}, to_apply=add.1
}

ENTRY main.1 {
  ROOT out = f32[64,8]{1,0} call(p), to_apply=step.1
}
"""


def test_a_refused_program_is_read_as_it_was_written():
    """Elementwise operations will be joined with others; what a loop stacks stays."""
    found = hlo.largest(AS_WRITTEN, hlo.NOT_FUSED)
    assert (found.shape, found.source) == ("f32[12,64,8]", "jit(train)/scan")
    (collective,) = hlo.collectives(AS_WRITTEN)
    assert (collective.kind, collective.count, collective.bytes) == (
        "all-reduce",
        1,
        64 * 8 * 4 * 1.5,
    )


PRESETS = ("c4_grid", "owt_92m", "slimpajama_1b", "reference", "text8", "lm1b", "quickstart")
QUICK = {("c4_grid", "prime"), ("owt_92m", "mdm"), ("slimpajama_1b", "arm")}
LOWERED = [
    pytest.param(preset, family, marks=() if (preset, family) in QUICK else pytest.mark.slow)
    for preset in PRESETS
    for family in ("arm", "mdm", "prime")
]


def largest_run(preset: str, family: str) -> RunConfig:
    """Of a preset, its parameters shared by 256 devices with a sequence or more each."""
    sweep = call(f"preset:{preset}", "sweep", Sweep)
    runs = [grid.to_config(r) for r in grid.rows(sweep) if r.family.startswith(family)]
    run = max(runs, key=lambda c: c.model.layers * c.model.width**2)
    mesh = dataclasses.replace(run.mesh, accumulate=1, data=256)
    return dataclasses.replace(run, mesh=mesh, batch_size=max(run.batch_size, 256))


@pytest.mark.parametrize(("preset", "family"), LOWERED)
def test_the_real_step_lowers_for_256_devices(preset, family):
    config = largest_run(preset, family)
    program = step.make_program(step.shape_of(config), 0, 256)
    text = program.train.lower(*aot_worker.arguments(program)).as_text()
    assert text.count("mhlo.num_partitions = 256") == 1
    gathered = re.findall(r'"stablehlo.all_gather".*-> tensor<([\dx]+)x(\w+)>', text)
    sums = re.findall(r'"stablehlo.all_reduce".*?\}\) : \(([^)]*)\)', text, re.DOTALL)
    summed = re.findall(r"tensor<([\dx]*)x\w+>", " ".join(sums))
    vocab, width = config.model.vocab_size, config.model.width
    head = f"1x{vocab + 1}x{width}" if config.model.tied_head else f"{vocab}x{width}"
    if width % 256:  # too thin to be shared by so many: gradients are summed whole
        assert (gathered, "reduce_scatter" in text) == ([], False)
        assert head in summed
        return
    assert (head, "bf16") in gathered
    # Nothing travels in float32 to be computed with in bfloat16, and gradients are scattered, not
    # summed whole.
    assert {dtype for _, dtype in gathered} == {"bf16"}
    assert text.count('"stablehlo.reduce_scatter"') >= 6
    assert head not in summed


SMALL = RunConfig(  # the size of preset:quickstart
    family="prime",
    batch_size=32,
    model=ModelConfig(vocab_size=256, layers=4, width=128, heads=2, dtype="bfloat16"),
    subtokens=SubtokenConfig(length=8),
    data=DataConfig(seq_len=64),
)


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", ["v4-32", "v5e-16", "v5p-32", "v6e-16", "tpu7x-16"])
def test_the_whole_step_compiles_for_16_devices(name):
    """A CPU-sized model: what the compiler says of its memory, and what sharding makes of it."""
    slice_ = slices.parse(name)
    assert slice_.devices == 16
    # libtpu 0.0.42 overflows its own stack on TPU7x with sequences as short as 64.
    data = DataConfig(seq_len=512) if slice_.generation == "tpu7x" else SMALL.data
    verdict = aot.check(dataclasses.replace(SMALL, data=data, mesh=MeshConfig(data=16)), slice_)
    assert verdict.fits
    memory = verdict.record["memory"]
    state, _ = roofline.memory(verdict.config, verdict.mesh)
    assert memory["arguments"] == pytest.approx(state, rel=0.25)  # tiles pad it
    assert memory["outputs"] < 0.1 * state  # the state is donated
    assert verdict.total < 0.1 * verdict.limit
    kinds = {collective["kind"] for collective in verdict.record["collectives"]}
    assert "all-gather" in kinds
    assert kinds & {"reduce-scatter", "all-reduce"}


@needs_libtpu
@pytest.mark.tpu_compile
def test_the_compiler_itself_refuses_an_oversized_run():
    """Two thin layers whose head, gradient and moments fill more than a chip of 15.75 GiB."""
    model = ModelConfig(vocab_size=400_000, layers=2, width=4096, heads=32, dtype="bfloat16")
    config = dataclasses.replace(SMALL, family="mdm", model=model, subtokens=SubtokenConfig())
    config = dataclasses.replace(config, mesh=MeshConfig(replica=16, data=1, model=1))
    verdict = aot.check(config, V5E)
    assert not verdict.fits
    assert verdict.limit == V5E.chip.memory
    assert verdict.total > verdict.limit
    assert "Ran out of memory" in verdict.record["message"]
    assert aot.fixes(verdict)
