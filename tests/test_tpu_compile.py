"""Kernels compiled for TPUs that are not there (`make test-tpu-compile`), and how it is reported."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from prime_jax import cli
from prime_jax.cli import kernels as commands
from prime_jax.config import DataConfig, KernelConfig, ModelConfig, RunConfig, SubtokenConfig
from prime_jax.hardware import chips
from prime_jax.kernels import check, embedding_mosaic, selection
from prime_jax.kernels.common import Case

TARGETS = ("v5e", "v5p", "v6e", "tpu7x")
WIDTHS = (512, 1024, 2048)
VOCABULARIES = (32768, 51200)
HAVE_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(
    not HAVE_LIBTPU, reason="libtpu is not installed: make test-tpu-compile"
)

BUNDLES = """
     0   :  { %7 = vsyncpa [#allocation3], 0 }
   0x1   :  { %9 = vsyncpa [#allocation3], 0 }
   0x2 LB: > { %s1 = sshll.u32 %s4637_s1, 4 }
   0x3   : > { %1 = sbr.rel (%p0) target bundleno = 9 }
   0x4   : > { %2 = vmatmul.f32.gmra.mxu0 %v1 }
   0x5   : > { %3 = vmatmul.f32.gmra.mxu0 %v1 }
   0x6   : > { %4 = vadd %v1 }
   0x7 PF: > { %5 = vmatmul.f32.gmra.mxu0 %v1 }
"""
UTILIZATION = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 1 0 0 0 0
0 0 0 0 0 1 0 0 0 0
0 0 0 0 0 1 0 0 0 0
0 5 0 0 0 1 0 0 0 0
2 1 0 0 0 1 0 0 0 0
2 0 0 0 0 1 1 0 0 0
0 1 0 0 0 1 0 0 2 0
1 9 0 0 0 1 0 0 0 0
"""


def test_the_hot_block_is_the_one_with_most_matrix_products():
    got = check.parse_schedule("k", BUNDLES, UTILIZATION)
    assert got == check.Schedule("k", bundles=8, hot_bundles=3, matmuls=4, shuffles=2, spills=3)


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["kernels", "check"]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert "make test-tpu-compile" in told


def test_a_kernel_that_does_not_compile_is_an_exit_code(monkeypatch, capsys):
    case = Case("broken forward", lambda: None, ())
    reports = [check.Report(case, "v5e", 1.0), check.Report(case, "v6e", 1.0, error="no layout")]
    monkeypatch.setattr(check, "check_all", lambda *args: iter(reports))
    assert cli.main(["kernels", "check"]) == 1
    out = capsys.readouterr().out
    assert "no layout" in out
    assert "1 of 2 compiled" in out
    monkeypatch.setattr(check, "check_all", lambda *args: iter(reports[:1]))
    assert cli.main(["kernels", "check"]) == 0


def test_every_kernel_has_a_forward_and_a_backward_case():
    for name, cases in check.CASES.items():
        names = [case.name for case in cases("v5e", 1024, 51200)]
        assert any(n.startswith(f"{name} forward") for n in names)
        assert any(n.startswith(f"{name} backward") for n in names)


@pytest.mark.parametrize(
    "chip",
    [c if c in ("v5e", "v6e") else pytest.param(c, marks=pytest.mark.slow) for c in chips.tpus()],
)
@pytest.mark.parametrize("kernel", list(check.CASES))
def test_the_kernels_lower_for_every_chip(kernel, chip, lower_for):
    for width in (512, 2048):
        for case in check.CASES[kernel](chip, width, 32768):
            assert lower_for(chip, case).count("tpu_custom_call") >= case.mosaic_calls


def failures(kernel: str, chip: str, width: int, vocab_size: int = 51200) -> list[str]:
    check.set_environment()
    reports = [check.check(case, chip) for case in check.CASES[kernel](chip, width, vocab_size)]
    return [f"{report.case.name}: {report.error}" for report in reports if report.error]


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("chip", TARGETS)
def test_the_head_compiles(chip, width, vocab_size):
    assert not failures("head", chip, width, vocab_size)


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("kernel", ["attention", "embedding"])
def test_attention_and_embedding_compile(kernel, chip, width):
    assert not failures(kernel, chip, width)


@needs_libtpu
@pytest.mark.tpu_compile
def test_a_program_without_a_mosaic_call_is_a_failure():
    check.set_environment()
    plain = Case("plain", lambda x: x + 1, (jax.ShapeDtypeStruct((8, 128), "float32"),))
    assert "0 Mosaic calls" in check.check(plain, "v5e").error


@needs_libtpu
@pytest.mark.tpu_compile
def test_too_little_vmem_is_a_kernels_failure_and_too_little_hbm_is_not(monkeypatch):
    check.set_environment()
    monkeypatch.setattr(embedding_mosaic, "TOKENS", 8192)
    large = embedding_mosaic.cases("v5e", 2048, 51200)[0]
    with pytest.warns(UserWarning, match=r"VMEM.*embedding_forward.*limit 16.00M"):
        selection.fallback(lambda: check.compile_case(large, "v5e"), lambda: None, "embedding")

    def matmul_and_kernel(x):
        big = jnp.broadcast_to(x, (1 << 18, 1 << 16)) @ jnp.ones((1 << 16, 1 << 16), x.dtype)
        case = embedding_mosaic.cases("v5e", 512, 51200)[0]
        return big, case.function(*(jnp.ones(a.shape, a.dtype) for a in case.arguments))

    struct = jax.ShapeDtypeStruct((1, 1 << 16), jnp.bfloat16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="on HBM"):
        selection.fallback(
            lambda: check.compile_case(Case("big", matmul_and_kernel, (struct,)), "v5e"),
            lambda: None,
            "step",
        )


@needs_libtpu
@pytest.mark.tpu_compile
def test_a_training_gradient_with_all_kernels_compiles():
    """The kernels where they are used: under shard_map, scan, rematerialisation and grad."""
    from prime_jax.corrupt import step_key
    from prime_jax.model import build
    from prime_jax.objectives import loss_sums, make_head, training_inputs
    from prime_jax.subtokens import Codebook

    config = RunConfig(
        batch_size=2,
        model=ModelConfig(vocab_size=2048, layers=2, width=256, heads=2, dtype="bfloat16"),
        subtokens=SubtokenConfig(length=11),
        data=DataConfig(seq_len=512, segment_ids=True),
        kernels=KernelConfig(head="pallas", attention="pallas", embedding="pallas"),
    )
    book = Codebook.create(config.model.vocab_size, config.subtokens)

    def gradient(params, tokens_BxL, row_B):
        network, head = build(config, book), make_head(config, book)
        inputs = training_inputs(config, book, tokens_BxL, row_B, step_key(0, 0), 0)

        def loss(params):
            apply = lambda *args: network.apply({"params": params}, *args)  # noqa: E731
            return loss_sums(head, apply, inputs).marginal

        return jax.grad(loss)(params)

    digits = jnp.zeros((1, config.data.seq_len, book.length), jnp.int32)
    params = jax.eval_shape(lambda: build(config, book).init(jax.random.key(0), digits)["params"])
    tokens_BxL = jax.ShapeDtypeStruct((2, config.data.seq_len), jnp.int32)
    row_B = jax.ShapeDtypeStruct((2,), jnp.int32)
    check.set_environment()
    function = jax.shard_map(
        gradient, mesh=check.mesh("v5e"), in_specs=jax.P(), out_specs=jax.P(), check_vma=False
    )
    case = Case("gradient", function, (params, tokens_BxL, row_B))
    calls = " ".join(check.MOSAIC_CALL.findall(check.compile_case(case, "v5e").as_text()))
    for kernel in ("attention", "embedding", "head"):
        for direction in ("forward", "backward"):
            assert f"{kernel}_{direction}" in calls


@needs_libtpu
@pytest.mark.tpu_compile
def test_the_command_reports_the_schedule():
    command = ["kernels", "check", "--chips", "v5e", "--kernels", "embedding"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "prime_jax", *command],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [x for x in done.stdout.splitlines() if "embedding_forward" in x][:1]
    assert int(line.split("hot block ")[1].split(":")[0]) < 950  # 815 with libtpu 0.0.42
    assert "0 spill slots" in line


def test_every_kernel_is_known_everywhere():
    assert set(check.CASES) == set(commands.KERNELS)
