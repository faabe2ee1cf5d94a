"""The trainer with each implementation of the kernels: same losses, from the kernel asked for."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from prime_jax.config import EvalConfig, KernelConfig, MeshConfig, OptimConfig, RunConfig
from prime_jax.kernels import attention_mosaic, embedding_mosaic, subtoken_head_mosaic
from prime_jax.train import train

KERNELS = {  # what must have been called, and from which module
    "head": (subtoken_head_mosaic, "loss_and_gradients"),
    "attention": (attention_mosaic, "masked_attention"),
    "embedding": (embedding_mosaic, "from_words"),
}
ALL = KernelConfig(  # 64 rows a step and 16 head rows: four tiles by two
    head="pallas",
    attention="pallas",
    embedding="pallas",
    head_blocks=(16, 8, 8),
)


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def brief(quick) -> RunConfig:
    return dataclasses.replace(
        quick,
        steps=4,
        batch_size=4,
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=1),
        eval=EvalConfig(estimators=()),
        mesh=MeshConfig(data=1, remat="none"),
    )


EVALUATED = EvalConfig(examples=4, replicates=2, batch_size=8, estimators=("subtoken",))


def losses(config: RunConfig, run_dir) -> list[float]:
    """The loss of every step, and of an evaluation if there is one."""
    result = train(config, run_dir, log=lambda _: None)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in rows if "loss" in r] + [x["value"] for x in result["losses"]]


@pytest.fixture(scope="module")
def plain(brief, tmp_path_factory):
    kernels = KernelConfig(head="xla", attention="scan", embedding="xla")
    config = dataclasses.replace(brief, kernels=kernels)
    return losses(config, tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernels",
    [
        ALL,
        KernelConfig(attention="xla"),
        KernelConfig(head="pallas"),
        KernelConfig(attention="pallas"),
        KernelConfig(attention="splash"),
        KernelConfig(embedding="pallas"),
    ],
    ids=str,
)
def test_every_implementation_trains_to_the_same_losses(
    kernels, brief, plain, tmp_path, monkeypatch
):
    called = set()
    for name, (module, function) in KERNELS.items():
        real = getattr(module, function)

        def spy(*args, name=name, real=real, **kwargs):
            called.add(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, spy)
    got = losses(dataclasses.replace(brief, kernels=kernels), tmp_path)
    assert called == {name for name in KERNELS if getattr(kernels, name) == "pallas"}
    np.testing.assert_allclose(got, plain, rtol=2e-5)


@pytest.mark.slow
def test_every_implementation_evaluates_alike(brief, tmp_path):
    config = dataclasses.replace(brief, eval=EVALUATED)
    plain = losses(config, tmp_path / "plain")
    got = losses(dataclasses.replace(config, kernels=ALL), tmp_path / "kernels")
    assert len(plain) > config.steps
    np.testing.assert_allclose(got, plain, rtol=2e-5)


@pytest.mark.slow
def test_packed_documents_train_alike(brief, tmp_path):
    """With segment ids, through the model: the kernels skip what XLA masks."""
    data = dataclasses.replace(brief.data, segment_ids=True)
    config = dataclasses.replace(brief, steps=2, data=data)
    plain = losses(config, tmp_path / "plain")
    kernels = KernelConfig(attention="pallas")
    got = losses(dataclasses.replace(config, kernels=kernels), tmp_path / "kernels")
    np.testing.assert_allclose(got, plain, rtol=2e-5)


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_leaves_the_run_to_plain_xla(
    brief, plain, tmp_path, monkeypatch
):
    def broken(*args, **kwargs):
        raise RuntimeError("Mosaic failed to compile TPU kernel: no layout")

    monkeypatch.setattr(embedding_mosaic, "from_words", broken)
    # Another blocks setting: programs are kept, and the one of `embedding = pallas` may be there.
    kernels = KernelConfig(embedding="pallas", attention_blocks=(256, 256))
    config = dataclasses.replace(brief, kernels=kernels)
    with pytest.warns(UserWarning, match="no layout") as told:
        got = losses(config, tmp_path)
    assert len(told) == 1
    np.testing.assert_allclose(got, plain, rtol=2e-5)
