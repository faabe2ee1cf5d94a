"""Weights go out and come back unchanged, and published layouts compute what their code computes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import published_forward
import pytest
from safetensors.numpy import load_file, save_file

from prime_jax import cli
from prime_jax.config import ModelConfig, RunConfig, SubtokenConfig, run_id
from prime_jax.errors import UserError
from prime_jax.evaluate import trained
from prime_jax.interchange import folder, published
from prime_jax.interchange.tensors import Tensor
from prime_jax.model import build
from prime_jax.subtokens import Codebook

VOCAB, PADDED, LENGTH = 37, 64, 7
SMALL = {"vocab": VOCAB, "padded": PADDED, "width": 32, "heads": 4, "groups": 2, "layers": 2}
BINARY = {"slots": 6, "base": 2}
CASES = {
    "lit_gpt arm": ("lit_gpt", {"causal": True}),
    "lit_gpt mdm": ("lit_gpt", {"groups": 4, "heads": 4}),
    "lit_gpt prime sum": ("lit_gpt", {**BINARY, "embedding": "sum"}),
    "lit_gpt prime cat": ("lit_gpt", {"slots": 3, "base": 4, "embedding": "cat", "rounded": True}),
    "megatron arm tied": ("megatron", {"causal": True, "tied": True}),
    "megatron mdm": ("megatron", {"fused_norms": True}),
    "megatron prime cat_shared": ("megatron", {**BINARY, "embedding": "cat_shared"}),
    "megatron prime cat": ("megatron", {"slots": 2, "base": 7, "embedding": "cat"}),
    "megatron prime sum": ("megatron", {**BINARY, "embedding": "sum", "fused_norms": True}),
}


def source(name):
    kind, changes = CASES[name]
    case = SMALL | changes
    rounded = case.pop("rounded", False)
    return kind, case | {"rounded": rounded}, published_forward.weights(kind, **case)


def facts_of(case):
    codes = np.random.default_rng(1).permutation(case.get("base", VOCAB) ** case.get("slots", 1))
    return published.Facts(
        vocab_size=VOCAB,
        heads=case["heads"],
        length=case.get("slots"),
        embedding=case.get("embedding"),
        bos=5,
        codes=codes if "slots" in case else None,
        seq_len=LENGTH,
        rope_tables="bfloat16" if case["rounded"] else "float32",
    )


def tensors_of(arrays):
    return {name: Tensor(x.shape, lambda x=x: x) for name, x in arrays.items()}


def our_logits(config, book, params, digits_LxS):
    """[L, V] by token id."""
    network = jax.jit(lambda p, d: build(config, book).apply({"params": p}, d))
    h_BxLxD, head_VxD = network(params, digits_LxS[None])
    return np.asarray(h_BxLxD[0], np.float64) @ np.asarray(head_VxD, np.float64)[book.rows].T


@pytest.mark.parametrize("name", CASES)
def test_a_published_layout_gives_the_logits_of_its_own_code(name, tmp_path):
    kind, case, arrays = source(name)
    facts = facts_of(case)
    model = published.convert(kind, name, tensors_of(arrays), facts, tmp_path)
    family = name.split()[1]
    assert (model.config.family, model.codebook.length) == (family, case.get("slots", 1))
    assert model.codebook.vocab_size == VOCAB

    rng = np.random.default_rng(2)
    ids = rng.integers(0, VOCAB, LENGTH)
    hidden = rng.random((LENGTH, model.codebook.length)) < (0 if family == "arm" else 0.4)
    digits = np.where(hidden, model.codebook.base, model.codebook.encode(ids))
    if family == "arm":
        digits[0] = model.codebook.base  # BOS
    theirs = digits
    if model.codebook.length == 1:  # plain ids: the mask is V there or, in lit_gpt, padded V
        special = {"arm": 5, "mdm": PADDED if kind == "lit_gpt" else VOCAB}[family]
        theirs = np.where(digits == VOCAB, special, digits)
    expected = published_forward.logits(kind, arrays, theirs, **case)[:, :VOCAB]

    params = folder.to_params(model.tensors, model.config, model.codebook)
    got = our_logits(model.config, model.codebook, params, digits)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_bfloat16_rope_tables_move_the_logits(tmp_path):
    kind, case, arrays = source("lit_gpt prime cat")
    ids = np.random.default_rng(2).integers(0, 5, (LENGTH, 3))
    exact, rounded = (
        published_forward.logits(kind, arrays, ids, **case | {"rounded": r}) for r in (False, True)
    )
    assert np.abs(exact - rounded).max() > 1e-3


@pytest.mark.parametrize(
    ("embedding", "slots", "tied"), [("sum", 6, False), ("cat", 3, False), ("cat_shared", 1, True)]
)
def test_parameters_come_back_as_they_were(embedding, slots, tied):
    m = ModelConfig(VOCAB, 2, 32, 4, kv_heads=2, embedding=embedding, tied_head=tied)
    config = RunConfig("prime", model=m, subtokens=SubtokenConfig(slots, seed=3))
    book = Codebook.create(VOCAB, config.subtokens)
    digits = np.zeros((1, 4, slots), np.int32)
    shapes = jax.eval_shape(build(config, book).init, jax.random.key(0), digits)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    tensors = folder.from_params(params, book)
    assert {f"{name}.weight": x.shape for name, x in tensors.items()} | {
        "codes": (VOCAB,)
    } == folder.shapes(config)
    back = folder.to_params(tensors, config, book)
    jax.tree.map(np.testing.assert_array_equal, params, back)


def test_vocabulary_rows_of_an_export_are_token_ids():
    book = Codebook.create(VOCAB, SubtokenConfig(6, seed=3))
    head = np.arange(VOCAB * 2.0).reshape(VOCAB, 2)
    tree = {"embedding": np.zeros((1, 3, 1)), "final_norm": np.ones(2), "layers": {}, "head": head}
    exported = folder.from_params(tree, book)["head"]
    token = 11
    rank = int((np.sort(book.codes) == book.codes[token]).argmax())
    np.testing.assert_array_equal(exported[token], head[rank])


def test_an_exported_run_is_a_run(tiny_run, tiny, tmp_path, capsys):
    run = trained.load(str(tiny_run))
    out, again = tmp_path / "out", tmp_path / "again"
    assert cli.main(["export", str(tiny_run), str(out)]) == 0
    assert cli.main(["import", "safetensors", str(out), str(again)]) == 0
    digits = run.codebook.encode(np.arange(16) % tiny.model.vocab_size)
    expected = our_logits(run.config, run.codebook, run.params, digits)
    for directory in (out, again):
        got = trained.load(str(directory))
        assert (got.id, got.step, got.eos_id) == (run.id, run.step, run.eos_id)
        assert got.codebook.hash == run.codebook.hash
        assert got.tokenizer.hash == run.tokenizer.hash
        logits = our_logits(got.config, got.codebook, got.params, digits)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    about = json.loads((out / "config.json").read_text())
    assert (about["mask_id"], about["base"], about["length"]) == (2, 2, 4)
    assert cli.main(["export", str(tiny_run), str(out)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_an_exported_folder_needs_no_dataset_and_any_devices(tiny_run, tiny, tmp_path):
    assert cli.main(["export", str(tiny_run), str(tmp_path / "out")]) == 0
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    about["run"]["data"]["path"] = "nowhere"
    about["run"]["mesh"] |= {"data": 4}
    (tmp_path / "out" / "config.json").write_text(json.dumps(about))
    run, before = trained.load(str(tmp_path / "out")), trained.load(str(tiny_run))
    assert run.data is None
    assert run.tokenizer.vocab_size == tiny.model.vocab_size
    assert len(run.params["head"].sharding.device_set) == 4
    assert run.params["head"].addressable_shards[0].data.shape == (16, 4)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (run.params, before.params)))


def test_import_from_the_command_line(tmp_path, capsys):
    kind, case, arrays = source("lit_gpt prime sum")
    file, permutation = tmp_path / "weights.safetensors", tmp_path / "perm.npy"
    save_file(arrays, file)
    codes = np.random.default_rng(4).permutation(64)
    np.save(permutation, codes)
    out = tmp_path / "out"
    options = ["--heads", "4", "--vocab-size", str(VOCAB), "--permutation", str(permutation)]
    options += ["--seq-len", str(LENGTH), "--rope-tables", "bfloat16"]
    assert cli.main(["import", "lit_gpt", str(file), str(out), *options]) == 0
    assert "prime" in capsys.readouterr().out
    run = trained.load(str(out))
    np.testing.assert_array_equal(run.codebook.codes, codes[:VOCAB])
    digits = np.where(
        np.arange(LENGTH)[:, None] % 3 == 0, 2, run.codebook.encode(np.arange(LENGTH))
    )
    expected = published_forward.logits(kind, arrays, digits, **case | {"rounded": True})
    got = our_logits(run.config, run.codebook, run.params, digits)
    np.testing.assert_allclose(got, expected[:, :VOCAB], atol=1e-4)


def test_what_does_not_fit_is_listed(tmp_path):
    kind, case, arrays = source("lit_gpt mdm")
    facts = facts_of(case)

    def refused(changed, **about):
        with pytest.raises(UserError) as error:
            published.convert(kind, "FILE", tensors_of(changed), _with(facts, about), tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    bias = arrays | {"transformer.h.0.attn.attn.bias": np.zeros(3), "extra": np.zeros(1)}
    assert "unknown tensors extra, transformer.h.0.attn.attn.bias" in refused(bias)
    lost = {n: x for n, x in arrays.items() if n != "transformer.h.1.attn.proj.weight"}
    assert "missing tensors transformer.h.1.attn.proj.weight" in refused(lost)
    name = "transformer.h.1.mlp.swiglu.w3.weight"
    assert f"{name} [128, 32] instead of [32, 128]" in refused(arrays | {name: arrays[name].T})
    assert "--heads" in refused(arrays, heads=None)
    grouped = tensors_of(source("lit_gpt arm")[2])
    with pytest.raises(UserError, match="do not fit 1 heads"):
        published.convert(kind, "FILE", grouped, _with(facts, {"heads": 1}), tmp_path)
    assert "--vocab-size 99" in refused(arrays, vocab_size=99)
    assert "another layout" in refused(source("megatron mdm")[2])
    assert "permutation" in refused(arrays, codes=np.zeros(VOCAB, int))


def _with(facts, about):
    return dataclasses.replace(facts, **about)


def test_a_damaged_or_altered_folder_is_refused(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", str(tiny_run), str(out)]) == 0
    arrays = load_file(out / "model.safetensors")
    swapped = arrays | {"codes": arrays["codes"][::-1].copy()}
    for k, (changed, message) in enumerate(
        [
            (swapped, "its codes"),
            (arrays | {"more": np.zeros(1)}, "unknown tensors more"),
            (
                {n: x for n, x in arrays.items() if n != "head.weight"},
                "missing tensors head.weight",
            ),
        ]
    ):
        bad = tmp_path / f"bad{k}"
        shutil.copytree(out, bad)
        save_file(changed, bad / "model.safetensors")
        with pytest.raises(UserError, match=message):
            trained.load(str(bad))
    (out / "model.safetensors").write_bytes(b"junk")
    assert cli.main(["import", "safetensors", str(out), str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "safetensors" in error


def test_old_configs_keep_their_identity():
    # Computed before `model.rope_tables` and `subtokens.codes` existed.
    assert run_id(RunConfig()) == "f3d9797bdf"
    changed = RunConfig(model=ModelConfig(rope_tables="bfloat16"))
    assert run_id(changed) != run_id(RunConfig())
    coded = RunConfig(subtokens=SubtokenConfig(codes="0123"))
    assert run_id(coded) != run_id(RunConfig())
    with pytest.raises(UserError, match="imported"):
        Codebook.create(16, coded.subtokens)
