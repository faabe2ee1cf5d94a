"""The folder for transformers: what is in it, and, where PyTorch is, that it computes what we do."""

import ast
import dataclasses
import importlib.util
import json
import math
import os
import sys

import jax
import numpy as np
import published_forward
import pytest
from safetensors.numpy import load_file

from prime_jax import cli
from prime_jax.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    SubtokenConfig,
)
from prime_jax.data import tokenizers
from prime_jax.errors import UserError
from prime_jax.evaluate import trained
from prime_jax.interchange import folder, hf, layouts
from prime_jax.kernels.subtoken_head_base import Head
from prime_jax.kernels.subtoken_head_reference import subtoken_log_probs_reference
from prime_jax.model import build
from prime_jax.subtokens import Codebook

V, L = 37, 7
FREE = {"objective": ObjectiveConfig(carry_over=False)}
CASES = {  # family, sub-tokens, model, further settings of the run
    "arm": ("arm", 1, {"kv_heads": 2}, {}),
    "arm tied": ("arm", 1, {"tied_head": True, "qk_norm": False}, {}),
    "mdm": ("mdm", 1, {"qk_norm": False, "rope_tables": "bfloat16"}, {}),
    "prime cat_shared": ("prime", 6, {"kv_heads": 1}, {}),
    "prime cat": ("prime", 3, {"embedding": "cat", "ffn_width": 40}, {}),
    "prime sum": ("prime", 2, {"embedding": "sum", "qk_norm": False}, FREE),
}
every_case = pytest.mark.parametrize("name", CASES)
masked_cases = pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("arm")])


def weights_of(name: str, vocab: int = V, eos_id: int = -1, **more) -> folder.Weights:
    """An untrained model with large random weights."""
    family, slots, model, changes = CASES[name]
    config = RunConfig(
        family=family,
        model=ModelConfig(vocab, layers=2, width=32, heads=4, **model),
        subtokens=SubtokenConfig(slots, seed=3),
        data=DataConfig(path="/home/me/data", seq_len=L),
        **{**changes, **more},
    )
    book = Codebook.create(vocab, config.subtokens)
    digits = np.zeros((1, L, slots), np.int32)
    shapes = jax.eval_shape(build(config, book).init, jax.random.key(0), digits)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape, np.float32), shapes)
    tensors = folder.from_params(params, book)
    return folder.Weights(config, book, tensors, step=1000, eos_id=eos_id)


def our_logits(weights: folder.Weights, digits_BxLxS) -> np.ndarray:
    """[B, L, V] by token id."""
    h_BxLxD, head_VxD = hidden_and_head(weights, digits_BxLxS)
    z_BxLxV = np.asarray(h_BxLxD, np.float64) @ np.asarray(head_VxD, np.float64).T
    return z_BxLxV[..., weights.codebook.rows]


def hidden_and_head(weights: folder.Weights, digits_BxLxS):
    config, book = weights.config, weights.codebook
    params = folder.to_params(weights.tensors, config, book)
    return jax.jit(lambda p, d: build(config, book).apply({"params": p}, d))(params, digits_BxLxS)


def some_digits(weights: folder.Weights, batch=2) -> np.ndarray:
    """Sub-tokens [B, L, S] with 40 % masked; for ARM BOS and tokens."""
    rng, book = np.random.default_rng(2), weights.codebook
    digits = book.encode(rng.integers(0, V, (batch, L)))
    hidden = rng.random(digits.shape) < 0.4
    if weights.config.family == "arm":
        hidden[:] = np.arange(L)[:, None] == 0
    return np.where(hidden, book.base, digits)


def in_folder(book: Codebook, digits: np.ndarray) -> np.ndarray:
    """Digits as the folder counts them: with one a token, they are ids, and id V is masked."""
    if book.length > 1:
        return digits
    ids = book.decode(digits)
    return np.where(ids < 0, V, ids)[..., None]


def under_published_names(kind: str, tensors: dict, config: RunConfig) -> dict:
    """The tensors of the file under the names of a published layout."""
    layout = layouts.LIT_GPT if kind == "lit_gpt" else layouts.MEGATRON
    out = {}
    for name, (_, inside) in layouts.body(layout, config.model).items():
        out[name] = np.concatenate([tensors[f"{ours}.weight"] for ours in inside])
    table = tensors["embedding.weight"]
    out[layout.embedding] = table.reshape(-1, table.shape[-1])
    if not config.model.tied_head:
        out[layout.head] = tensors["head.weight"]
    if config.family == "arm":
        out = {name.replace("encoder.", "decoder."): x for name, x in out.items()}
    return out


@every_case
def test_the_exported_tensors_give_our_logits_in_numpy(name, tmp_path):
    """As they are in the file, by the plain forward pass of the published layouts."""
    weights = weights_of(name)
    assert hf.write(weights, tmp_path / "out", None) == ""
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    m, book = weights.config.model, weights.codebook
    np.testing.assert_array_equal(tensors["codes"], book.codes)
    digits = some_digits(weights, batch=1)
    kind = "megatron" if m.qk_norm else "lit_gpt"
    got = published_forward.logits(
        kind,
        under_published_names(kind, tensors, weights.config),
        in_folder(book, digits)[0],
        heads=m.heads,
        groups=m.kv_heads or m.heads,
        layers=m.layers,
        slots=book.length,
        base=book.base,
        embedding=m.embedding,
        causal=weights.config.family == "arm",
        tied=m.tied_head,
        rounded=m.rope_tables == "bfloat16",
    )[:, :V]
    expected = our_logits(weights, digits)[0]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-4)


@every_case
def test_config_says_what_transformers_asks_for(name, tmp_path):
    weights = weights_of(name)
    hf.write(weights, tmp_path / "out", None)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    causal = weights.config.family == "arm"
    (auto,) = {"AutoModelForCausalLM", "AutoModelForMaskedLM"} & set(about["auto_map"])
    assert auto == ("AutoModelForCausalLM" if causal else "AutoModelForMaskedLM")
    file, _, model = about["auto_map"][auto].partition(".")
    assert about["architectures"] == [model]
    code = ast.parse((tmp_path / "out" / f"{file}.py").read_text())
    assert {model, about["auto_map"]["AutoConfig"].partition(".")[2]} <= {
        node.name for node in code.body if isinstance(node, ast.ClassDef)
    }
    special = {key: about.get(f"{key}_token_id") for key in ("bos", "mask", "eos", "pad")}
    assert special == {
        "bos": V if causal else None,
        "mask": None if causal else V,
        "eos": None,
        "pad": None,
    }
    assert about["vocab_size"] == V + 1
    assert about["num_key_value_heads"] == (weights.config.model.kv_heads or 4)
    assert "/home/me" not in (tmp_path / "out" / "config.json").read_text()


def test_the_code_of_the_folder_needs_transformers_and_torch_alone(tmp_path):
    tree = ast.parse(hf.CODE.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or node.names[0].name for node in nodes}
    outside = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    assert outside == {"torch", "transformers"}
    hf.write(weights_of("mdm"), tmp_path / "out", None)
    assert (tmp_path / "out" / hf.CODE.name).read_text() == hf.CODE.read_text()
    loaded = {name.partition(".")[0] for name in sys.modules if "prime_jax" in name}
    assert "modeling_prime_jax" not in loaded  # nothing of ours imports it


# --- from the command line


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "out"
    assert cli.main(["export", str(tiny_run), str(out), "--format", "hf", "--license", "mit"]) == 0
    return out


def test_the_folder_is_a_run(exported, tiny_run, tmp_path):
    run, got = trained.load(str(tiny_run)), trained.load(str(exported))
    assert (got.id, got.step, got.eos_id) == (run.id, run.step, run.eos_id)
    assert got.tokenizer.hash == run.tokenizer.hash
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (run.params, got.params)))
    assert cli.main(["import", "safetensors", str(exported), str(tmp_path / "copy")]) == 0
    assert trained.load(str(tmp_path / "copy")).tokenizer.hash == run.tokenizer.hash
    assert cli.main(["export", str(exported), str(tmp_path / "again"), "--format", "hf"]) == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def test_the_model_card_has_numbers_with_their_kinds(exported, tiny_run):
    card = (exported / "README.md").read_text()
    record = json.loads((tiny_run / "result.json").read_text())
    assert card.startswith("---\nlicense: mit\n")
    for number in (record["params"]["nonembedding"], record["params"]["total"], record["tokens"]):
        assert f" {number:,} " in card
    assert f"{record['flops']['matmul']:.4g} FLOPs" in card
    for loss in record["losses"]:
        row = f"| {loss['value']:.4f} | nats/token | "
        assert (
            f"| {loss['kind']} | {loss['estimator']} |" in card.partition(row)[2].partition("\n")[0]
        )
        assert f"* `{loss['kind']}`: {hf.KINDS[loss['kind']]}" in card
    about = json.loads((exported / "config.json").read_text())
    for value in (about["weights_hash"], about["permutation_hash"], about["tokenizer_hash"]):
        assert f"`{value}`" in card
    assert str(tiny_run) not in card


def test_an_imported_model_has_no_known_training(tmp_path):
    weights = folder.imported(weights_of("mdm"))
    hf.write(dataclasses.replace(weights, assumed=("BOS is id 1",)), tmp_path / "out", None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: unknown" in card
    assert "| D, C | unknown: the weights were imported |" in card
    assert "None recorded" in card
    assert "BOS is id 1" in card


def test_the_tokenizer_of_the_folder(exported):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert made.encode("3 15 0 <|mask|> 7").ids == [3, 15, 0, 16, 7]
    about = json.loads((exported / "tokenizer_config.json").read_text())
    assert (about["mask_token"], about["model_max_length"]) == ("<|mask|>", 16)
    assert tokenizers.load(exported).spec == "synthetic:16"


def test_a_tokenizer_that_cannot_be_written_is_said(tiny_run, tmp_path, monkeypatch, capsys):
    from prime_jax.interchange import hf_tokenizer

    monkeypatch.setattr(hf_tokenizer, "differs", lambda *_: "other ids around 'x'")
    out = tmp_path / "out"
    assert cli.main(["export", str(tiny_run), str(out), "--format", "hf"]) == 0
    assert "no tokenizer written: other ids around 'x'" in capsys.readouterr().out
    assert not (out / "tokenizer.json").exists()


def test_no_path_of_this_machine_is_in_the_folder(tmp_path):
    library = pytest.importorskip("tokenizers")
    own = library.Tokenizer(library.models.WordLevel({"a": 0, "b": 1, "</s>": 2}, "a"))
    own.pre_tokenizer = library.pre_tokenizers.Whitespace()
    (tmp_path / "secret").mkdir()
    own.save(str(tmp_path / "secret/mine.json"))
    tokenizer = tokenizers.make(f"hf:{tmp_path / 'secret/mine.json'}", lambda _: ())
    hf.write(weights_of("mdm", vocab=3, eos_id=2), tmp_path / "out", tokenizer)
    for file in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        for word in (b"secret", b"/home/me"):
            assert word not in file.read_bytes(), file
    again = tokenizers.load(tmp_path / "out/prime_jax")
    assert (again.hash, again.spec) == (tokenizer.hash, "hf:mine.json")
    assert tokenizer.spec.endswith("secret/mine.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--license", "mit"], "only --format hf writes a model card"),
        (["--format", "hf", "--license", "a: b"], "must be a name such as apache-2.0"),
        (["--format", "gguf"], "--format"),
    ],
)
def test_wrong_options_are_one_line(words, said, tiny_run, tmp_path, capsys):
    assert cli.main(["export", str(tiny_run), str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_block_diffusion_is_refused(tmp_path):
    weights = weights_of("mdm", objective=ObjectiveConfig(block_length=L))
    with pytest.raises(UserError, match=r"block diffusion is not written .* --format safetensors"):
        hf.write(weights, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_a_library_that_is_missing_is_said_before_anything_is_written(
    tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    out = tmp_path / "out"
    assert cli.main(["export", str(tiny_run), str(out), "--format", "hf"]) == 2
    assert "pip install 'prime_jax[tokenizers]'" in capsys.readouterr().err
    assert not out.exists()


# --- with PyTorch: `make test-hf`

installed = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
with_torch = pytest.mark.skipif(
    not installed, reason="torch and transformers are not installed: make test-hf"
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Load a folder as its users do."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
    import torch
    import transformers

    torch.set_num_threads(1)  # the programs are small, and other tests run beside these

    def load(weights: folder.Weights, tokenizer=None):
        out = tmp_path_factory.mktemp("folder") / "out"
        assert hf.write(weights, out, tokenizer) == ""
        causal = weights.config.family == "arm"
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        model = auto.from_pretrained(out, trust_remote_code=True)
        if tokenizer is None:
            return model.eval()
        loaded = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
        return model.eval(), loaded

    return load


def tensor(x):
    import torch

    return torch.tensor(np.asarray(x), dtype=torch.int64)


def restricted(weights: folder.Weights, digits_BxLxS) -> np.ndarray:
    """Our logits [B, L, V], without the tokens that a visible sub-token excludes."""
    book, z_BxLxV = weights.codebook, our_logits(weights, digits_BxLxS)
    if book.length == 1 or not weights.config.objective.carry_over:
        return z_BxLxV
    seen, of_token = digits_BxLxS[:, :, None], book.digits
    return np.where(((seen == book.base) | (seen == of_token)).all(-1), z_BxLxV, -np.inf)


@with_torch
@every_case
def test_logits_are_ours(name, theirs):
    weights = weights_of(name)
    model, digits = theirs(weights), some_digits(weights)
    given = tensor(in_folder(weights.codebook, digits))
    if weights.codebook.length == 1:
        got = model(input_ids=given[..., 0]).logits
    else:
        got = model(sub_tokens=given).logits
    got = got.detach().numpy()
    assert got.shape == (2, L, V + 1)
    assert (got[..., V] < -1e30).all()
    expected = restricted(weights, digits)
    possible = np.isfinite(expected)
    np.testing.assert_allclose(got[..., :V][possible], expected[possible], atol=1e-4)
    assert (got[..., :V][~possible] < -1e30).all()


@with_torch
@masked_cases
def test_ids_are_sub_tokens_and_back(name, theirs):
    model, book = theirs(weights_of(name)), weights_of(name).codebook
    ids = tensor(np.arange(V + 1))
    digits = model.digits_of(ids)
    expected = in_folder(book, np.vstack([book.digits, np.full((1, book.length), book.base)]))
    np.testing.assert_array_equal(digits.numpy(), expected)
    np.testing.assert_array_equal(model.ids_of(digits).numpy(), ids)


@with_torch
@masked_cases
def test_marginals_are_those_of_our_reference(name, theirs):
    weights = weights_of(name)
    model, digits, book = theirs(weights), some_digits(weights), weights.codebook
    truth = book.encode(np.random.default_rng(2).integers(0, V, (2, L)))
    given, masked = in_folder(book, digits), (digits == book.base).reshape(-1, book.length)
    h_BxLxD, head_VxD = hidden_and_head(weights, digits)
    row_N = book.rows[book.decode(truth)].reshape(-1)
    head = Head(codebook=book, carry_over=weights.config.objective.carry_over)
    states = (h_BxLxD.reshape(-1, h_BxLxD.shape[-1]), head_VxD, row_N, masked)
    _, marginals_NxSxb, joint_N = subtoken_log_probs_reference(head, *states)
    got = model.log_probs(tensor(given), tensor(in_folder(book, truth))).detach().numpy()
    got = got.reshape(-1, book.length)
    every = model.log_marginals(tensor(given)).detach().numpy()
    if book.length == 1:
        expected = np.where(masked, np.asarray(joint_N)[:, None], 0)
        z = our_logits(weights, digits)
        z -= np.log(np.exp(z).sum(-1, keepdims=True))
        np.testing.assert_allclose(every[:, :, 0], z, atol=1e-4)
    else:
        every = every.reshape(-1, book.length, book.base)
        marginals = np.asarray(marginals_NxSxb)
        possible = marginals > -1e29
        np.testing.assert_allclose(every[possible], marginals[possible], atol=1e-4)
        assert (every[~possible] < -1e30).all()
        true = np.take_along_axis(
            marginals, book.digits[book.decode(truth)].reshape(-1, book.length, 1), 2
        )
        expected = np.where(masked, true[..., 0], 0)
    np.testing.assert_allclose(got, expected, atol=1e-4)


@with_torch
@pytest.mark.parametrize("name", ["mdm", "prime sum"])
def test_nelbo_is_the_expectation_over_all_masks(name, theirs):
    """Three positions: every mask is enumerated, k of n having the weight 1 / C(n, k) / k."""
    import torch

    weights = weights_of(name)
    model, book = theirs(weights), weights.codebook
    ids = tensor([[5, 11, 30]])
    truth, n = model.digits_of(ids), 3 * book.length
    masks = (np.arange(1, 2**n)[:, None] >> np.arange(n) & 1).astype(bool)
    masked = torch.tensor(masks).view(-1, *truth.shape[1:])
    log_p = model.log_probs(torch.where(masked, model.config.base, truth), truth.expand_as(masked))
    counts = masks.sum(1)
    law = np.array([1 / (k * math.comb(n, k)) for k in counts])
    exact = -(log_p.sum((1, 2)).detach().numpy() * law).sum()
    rows = ids.expand(500, -1)
    draws = model.nelbo(rows, draws=6, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (6, 500)
    error = float(draws.std()) / draws.numel() ** 0.5
    assert abs(float(draws.mean()) - exact) < 4 * error
    assert error < 0.03 * exact
    with pytest.raises(ValueError, match="is the mask; give the whole text"):
        model.nelbo(tensor([[5, V]]))
    with pytest.raises(NotImplementedError, match="use `nelbo`"):
        model(ids, labels=ids)


@with_torch
@masked_cases
def test_generation_fills_what_is_masked_by_the_law_of_the_model(name, theirs):
    import torch

    weights = weights_of(name)
    model = theirs(weights)
    ids = tensor([[5, V, 30, V]])
    made = model.generate(ids, generator=torch.Generator().manual_seed(0))
    assert (made[0, [0, 2]] == ids[0, [0, 2]]).all()
    assert (made < V).all()
    one, count = tensor([[5, V]]), 4000
    generator = torch.Generator().manual_seed(1)
    drawn = model.generate(one.expand(count, -1), steps=1, generator=generator)[:, 1].numpy()
    p = model(one).logits[0, 1, :V].softmax(-1).detach().numpy()
    frequency = np.bincount(drawn, minlength=V) / count
    assert (np.abs(frequency - p) < 5 * np.sqrt(p * (1 - p) / count) + 1e-3).all()


@with_torch
def test_arm_generates_with_and_without_cache_and_in_padded_batches(theirs):
    weights = weights_of("arm")
    model = theirs(weights)
    prompts, greedy = [[V, 3, 8], [V, 21]], {"max_new_tokens": 4, "do_sample": False}
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(4):
            digits = np.where(np.array(ids) == V, V, weights.codebook.digits[np.array(ids) % V, 0])
            ids.append(int(our_logits(weights, digits[None, :, None])[0, -1].argmax()))
        expected.append(ids)
    for prompt, want in zip(prompts, expected, strict=True):
        for cached in (True, False):
            made = model.generate(tensor([prompt]), use_cache=cached, **greedy)
            assert made[0].tolist() == want
    padded, real = tensor([[V, 3, 8], [V, V, 21]]), tensor([[1, 1, 1], [0, 1, 1]])
    made = model.generate(padded, attention_mask=real, **greedy)
    assert [row[-4:].tolist() for row in made] == [want[-4:] for want in expected]


@with_torch
def test_arm_loss_is_nats_per_token(theirs):
    weights = weights_of("arm")
    ids = tensor([[V, 3, 8, 30]])
    loss = theirs(weights)(ids, labels=ids).loss.item()
    digits = np.array([[V, *weights.codebook.digits[[3, 8, 30], 0]]])[..., None]
    z = our_logits(weights, digits)[0, :3]
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    assert loss == pytest.approx(-log_p[range(3), [3, 8, 30]].mean(), abs=1e-4)


@with_torch
def test_padding_changes_nothing_of_a_masked_model(theirs):
    import torch

    model = theirs(weights_of("mdm"))
    ids = tensor([[4, V, 9]])
    padded, real = tensor([[4, V, 9, 1, 1]]), tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(padded, attention_mask=real).logits[:, :3], model(ids).logits)


@with_torch
@pytest.mark.parametrize("name", ["arm", "mdm"])
def test_their_tokenizer_gives_our_ids(name, theirs):
    ours = tokenizers.make("bytes", lambda _: ())
    weights = weights_of(name, vocab=257, eos_id=256)
    model, tokenizer = theirs(weights, ours)
    text = "naïve 漢字  \n"
    want = ours.encode(text).tolist()
    assert tokenizer(text).input_ids == ([257, *want] if name == "arm" else want)
    assert tokenizer.decode(want) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 256)
    if name == "arm":
        assert tokenizer.bos_token_id == model.config.bos_token_id == 257
    else:
        assert tokenizer.mask_token_id == model.config.mask_token_id == 257
        assert tokenizer(f"a{tokenizer.mask_token}b").input_ids == [97, 257, 98]
