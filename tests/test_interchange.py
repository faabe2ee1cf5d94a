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
from prime_jax.data import tokenizers
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
        permutation="PERM",
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
    if kind == "lit_gpt":  # as torch.compile, DDP and Lightning save it
        given = {f"model.module._orig_mod.{n}": x for n, x in arrays.items()}
    else:
        given = {n.replace("layers.1.", "layers.1._orig_mod."): x for n, x in arrays.items()}
    model = published.convert(kind, name, tensors_of(given), facts, tmp_path)
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
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1  # as the umask says
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
    nan = "transformer.h.1.attn.proj.weight"
    assert f"{nan} holds 1024 of 1024" in refused(arrays | {nan: arrays[nan] * np.nan})
    assert "holds extra twice" in refused(
        {**arrays, "extra": np.zeros(1), "module.extra": np.zeros(1)}
    )
    assert "--heads" in refused(arrays, heads=None)
    assert "do not fit 1 heads" in refused(source("lit_gpt arm")[2], heads=1)
    assert "do not fit 64 heads" in refused(arrays, heads=64)
    assert "not those of 99 ids" in refused(arrays, vocab_size=99)
    assert "may be padding" in refused(arrays, vocab_size=None)
    assert "another layout" in refused(source("megatron mdm")[2])
    assert "is of shape" in refused(arrays | {"transformer.ln_f.weight": np.zeros((2, 2))})
    assert "PERM: FILE has one sub-token" in refused(arrays, codes=np.arange(VOCAB))
    assert 'has a row for "masked": not family arm' in refused(arrays, family="arm")
    kind, case, arrays = source("lit_gpt prime sum")
    facts = facts_of(case)
    assert refused(arrays, codes=np.zeros(64, int)).startswith("PERM: must give each id")
    assert refused(arrays, codes=np.arange(50)).startswith("PERM: holds 50 codes")
    assert "no known embedding" in refused(arrays, family="mdm")
    kind, case, arrays = source("megatron arm tied")
    facts = facts_of(case)
    assert "a decoder, which is not family mdm" in refused(arrays, family="mdm")
    assert "norms of queries say 4" in refused(arrays, heads=2)


BINARY_15 = "binary digits, l = 15; --length 5 --embedding sum (b = 8) would fit too"


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        ({}, "--length 5 .*--length 9 .*--length 15 .*or --permutation, whose length tells"),
        ({"codes": np.arange(32768)}, (15, BINARY_15)),
        ({"codes": np.arange(32768), "length": 5}, (5,)),
        ({"codes": np.arange(32768), "length": 9}, r"^PERM: holds 32768 .* 4\*\*9 = 262144 for"),
        ({"length": 15}, "give --permutation FILE.*--permutation identity"),
        ({"codes": np.arange(0), "length": 15}, (15,)),
        ({"codes": np.arange(16)}, "^PERM: holds 16 codes"),
        ({"codes": np.arange(32768), "length": 7}, "no known embedding"),
    ],
)
def test_the_published_table_is_read_as_far_as_it_can_be(facts, found):
    """45 rows for 32,000 ids are 5 x 9, 9 x 5 or 15 x 3; 2**15 = 8**5 codes leave two of them."""
    facts = published.Facts(permutation="PERM", **facts)
    about = {"where": "FILE", "table": (45, 1792), "vocab": 32000, "width": 1792}
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            published.subtokens(published.LIT_GPT, facts=facts, **about)
    else:
        reading, assumed = published.subtokens(published.LIT_GPT, facts=facts, **about)
        assert (reading.slots, *assumed) == found


@pytest.mark.parametrize(
    ("rows", "ids", "found"),
    [(257, None, 257), (256, None, None), (256, 250, 250), (256, 256, 256), (192, 100, None),
     (50304, 50257, 50257), (50432, 50304, 50304), (101, 100, 100), (1024, 37, 37)],
)  # fmt: skip
def test_padding_of_the_vocabulary_is_no_id(rows, ids, found):
    facts = published.Facts(vocab_size=ids)
    if found is None:
        with pytest.raises(UserError, match=f"its {rows} rows"):
            published.vocabulary("FILE", rows, facts)
    else:
        assert published.vocabulary("FILE", rows, facts) == found


def test_a_feed_forward_of_its_own_width(tmp_path):
    kind, case, arrays = source("lit_gpt arm")
    narrow = {
        n: x[:88] if ".w1." in n or ".w2." in n else x[:, :88] if ".w3." in n else x
        for n, x in arrays.items()
    }
    model = published.convert(kind, "FILE", tensors_of(narrow), facts_of(case), tmp_path)
    assert (model.config.model.ffn, model.config.model.width) == (88, 32)
    ids = np.arange(LENGTH)[:, None]
    expected = published_forward.logits(kind, narrow, ids, **case)[:, :VOCAB]
    params = folder.to_params(model.tensors, model.config, model.codebook)
    got = our_logits(model.config, model.codebook, params, ids)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_other_weights_are_another_run(tmp_path, capsys):
    _, _, arrays = source("lit_gpt arm")
    name = "transformer.h.0.attn.proj.weight"
    command = ["import", "lit_gpt"]
    options = ["--heads", "4", "--vocab-size", "37"]
    ids = set()
    for k in range(2):
        file, out = tmp_path / f"{k}.safetensors", tmp_path / str(k)
        save_file(arrays | {name: arrays[name] + k}, file)
        assert cli.main([*command, str(file), str(out), *options]) == 0
        ids.add(run_id(folder.read_config(out)))
        about = json.loads((out / "config.json").read_text())
        assert about["assumed"] == [
            "blocks of 2048 tokens (--seq-len)",
            "RoPE's tables in float32 (--rope-tables)",
            "BOS is id 1 (--bos)",
        ]
    assert len(ids) == 2
    ours = load_file(tmp_path / "0" / "model.safetensors")
    save_file(
        ours | {"final_norm.weight": ours["final_norm.weight"] + 1},
        tmp_path / "0" / "model.safetensors",
    )
    with pytest.raises(UserError, match="differ from those of"):
        trained.load(str(tmp_path / "0"))
    assert cli.main(["import", "safetensors", str(tmp_path / "0"), str(tmp_path / "again")]) == 0
    assert run_id(folder.read_config(tmp_path / "again")) not in ids
    assert "assumed" in capsys.readouterr().out


def test_a_tokenizer_of_another_size_is_refused(tmp_path, capsys):
    file = tmp_path / "w.safetensors"
    save_file(source("lit_gpt arm")[2], file)
    command = ["import", "lit_gpt", str(file), str(tmp_path / "out"), "--heads", "4"]
    for words, message in (
        (["--vocab-size", "37", "--tokenizer", "bytes"], "--vocab-size 37: the tokenizer has 257"),
        (["--tokenizer", "bytes"], "its 64 rows are not those of 257 ids"),
    ):
        assert cli.main([*command, *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*command, "--vocab-size", "37"]) == 0
    tokenizers.make("bytes", lambda _: ()).save(tmp_path / "out")
    with pytest.raises(UserError, match="a model of 37 ids, but tokenizer bytes has 257"):
        _ = trained.load(str(tmp_path / "out")).tokenizer


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
    for model in (ModelConfig(rope_tables="bfloat16"), ModelConfig(ffn_width=88)):
        assert run_id(RunConfig(model=model)) != run_id(RunConfig())
    coded = RunConfig(subtokens=SubtokenConfig(codes="0123"))
    assert run_id(coded) != run_id(RunConfig())
    with pytest.raises(UserError, match="imported"):
        Codebook.create(16, coded.subtokens)
