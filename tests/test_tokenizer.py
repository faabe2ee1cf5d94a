"""Every tokenizer gives back every text, and its bytes per id add up."""

import argparse
import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_jax.data import tokenizers
from prime_jax.errors import UserError
from prime_jax.interchange import hf_tokenizer

CORPUS = Path(argparse.__file__).read_text()
TEXTS = [
    "",
    " ",
    "  two  spaces  ",
    "def f(x):\n\treturn x  # tab\r\n\n\n    four",
    "\u2581",
    "a\u2581b \u2581\u2581 c\u2581",
    "nul \0 inside\0",
    "naïve café 漢字 😀 \u2028 \ufeff \u2585 \ue000",
    "</s> <s> <unk> <0x41> <|endoftext|> \u2047",
    CORPUS[:3000],
]


def sample(n_bytes):
    return [CORPUS[:n_bytes]]


def hugging_face(directory: Path) -> str:
    library = pytest.importorskip("tokenizers")
    built = library.Tokenizer(library.models.BPE())
    built.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    built.train_from_iterator([CORPUS], trainer)
    built.save(str(directory / "tokenizer.json"))
    return f"hf:{directory / 'tokenizer.json'}"


def tiktoken_ranks(directory: Path) -> str:
    pytest.importorskip("tiktoken")
    pieces = [bytes([i]) for i in range(256)] + [b"  ", b"re", b" t", b" th", b"self"]
    rows = [base64.b64encode(p) + b" %d" % rank for rank, p in enumerate(pieces)]
    (directory / "tiny.tiktoken").write_bytes(b"\n".join(rows))
    return f"tiktoken:{directory / 'tiny.tiktoken'}"


def test_gpt2_encoder_json_is_a_rank_file(tmp_path):
    plain = tokenizers.make(tiktoken_ranks(tmp_path), sample)
    character = {byte: c for c, byte in tokenizers.BYTE_OF.items()}
    encoder = {"".join(character[b] for b in p): i for i, p in enumerate(plain.pieces[:-1])}
    encoder["<|endoftext|>"] = plain.eos_id
    (tmp_path / "encoder.json").write_text(json.dumps(encoder))
    assert tokenizers.make(f"tiktoken:{tmp_path}/encoder.json", sample).hash == plain.hash

    encoder["<|endoftext|>"] = 300
    (tmp_path / "encoder.json").write_text(json.dumps(encoder))
    elsewhere = tokenizers.make(f"tiktoken:{tmp_path}/encoder.json", sample)
    assert (elsewhere.eos_id, elsewhere.vocab_size) == (300, 301)
    ranks = tmp_path / "tiny.tiktoken"
    ranks.write_bytes(ranks.read_bytes() + b"\n" + base64.b64encode(b"<|endoftext|>") + b" 300")
    assert tokenizers.make(f"tiktoken:{ranks}", sample).hash == elsewhere.hash


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_text_is_split_as_the_rank_file_was_made(name, tmp_path, monkeypatch):
    public = pytest.importorskip("tiktoken_ext.openai_public")
    import regex

    if name == "gpt2":
        theirs = public.r50k_pat_str
    else:
        monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
        theirs = getattr(public, name)()["pat_str"]
    texts = [*TEXTS, CORPUS, "x=1;\ny=2;\n", "I'LL don't 12345 A.B/\r\n\n \t z", " \n  \u3000x"]
    for text in texts:
        assert regex.findall(tokenizers.SPLITS[name].pattern, text) == regex.findall(theirs, text)

    file = Path(tiktoken_ranks(tmp_path).partition(":")[2])
    plain = tokenizers.make(f"tiktoken:{file}", sample)
    file.write_bytes(file.read_bytes() + b"\n" + base64.b64encode(b";\n") + b" 261\n")
    with pytest.raises(UserError, match=r"never makes the token ';\\n'; name .*:cl100k_base:"):
        tokenizers.make(f"tiktoken:{file}", sample)
    named = tokenizers.make(f"tiktoken:{name}:{file}", sample)
    whole = name != "gpt2"
    assert named.encode("a;\nb").tolist() == [97, *([261] if whole else [59, 10]), 98]
    assert named.eos_id == 261 + (2 if whole else 1)  # as in the published encodings
    named.save(tmp_path)
    assert tokenizers.file_of(named.spec) == tokenizers.file_of(f"tiktoken:{file}") == str(file)
    assert tokenizers.file_of(f"tiktoken:{name}") == name  # a file of that name
    again = tokenizers.load(tmp_path)
    assert (again.hash, again.eos_id) == (named.hash, named.eos_id)
    assert len({named.hash, plain.hash}) == 2
    assert_exact(again, texts[-1])


def test_a_tokenizer_that_prepends_a_space_names_the_one_that_does_not(tmp_path):
    library = pytest.importorskip("tokenizers")
    rules = library.normalizers
    built = library.Tokenizer(library.models.BPE({"▁": 0, "a": 1}, []))
    built.normalizer = rules.Sequence([rules.Prepend("▁"), rules.Replace(" ", "▁")])
    built.save(str(tmp_path / "llama.json"))
    lossy = tokenizers.make(f"hf:{tmp_path / 'llama.json'}", sample)
    with pytest.raises(UserError, match=r"sentencepiece:tokenizer\.model"):
        tokenizers.check_lossless(lossy, "a a", lossy.encode("a a"))


def test_long_lines_are_trained_on_and_errors_of_the_source_are_its_own(monkeypatch):
    monkeypatch.setattr(tokenizers, "LONGEST_LINE", 4096)
    text = CORPUS.replace("\n", " ")
    assert tokenizers.make("bpe:400", lambda n: [text]).vocab_size == 400

    def broken(n_bytes):
        yield CORPUS[:20000]
        raise UserError("x.jsonl line 201: no 'text'")

    for kind in ("bpe", "unigram"):
        with pytest.raises(UserError, match="line 201"):
            tokenizers.make(f"{kind}:400", broken)


def trained_sentencepiece(path: Path, **options) -> str:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return f"sentencepiece:{path}"


@pytest.fixture(scope="module", params=["bytes", "bpe:400", "unigram:400", "hf", "tiktoken"])
def tokenizer(request, tmp_path_factory):
    special = {"hf": hugging_face, "tiktoken": tiktoken_ranks}
    spec = request.param
    if spec in special:
        spec = special[spec](tmp_path_factory.mktemp("tokenizer"))
    return tokenizers.make(spec, sample)


def assert_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.eos_id not in ids
    tokenizers.check_lossless(tokenizer, text, ids)


@pytest.fixture(scope="module")
def for_transformers(tokenizer):
    """Hugging Face's form of it."""
    library = pytest.importorskip("tokenizers")
    made = hf_tokenizer.tokenizer_json(tokenizer, hf_tokenizer.MASK)
    assert hf_tokenizer.differs(tokenizer, made) == ""
    return library.Tokenizer.from_str(json.dumps(made))


@pytest.mark.parametrize("text", [*TEXTS, CORPUS], ids=range(len(TEXTS) + 1))
def test_hugging_faces_form_gives_the_same_ids_and_text(tokenizer, for_transformers, text):
    special = ["\u2581", "</s>", "<|endoftext|>"]  # read as a space, and as special, there
    special += ["<unk>", "<0x41>"] if tokenizer.spec.startswith("unigram") else []
    for other in special:
        text = text.replace(other, "")
    ids = tokenizer.encode(text)
    assert for_transformers.encode(text).ids == ids.tolist()
    assert for_transformers.decode(ids.tolist()) == text


def test_hugging_faces_form_knows_the_special_ids(tokenizer, for_transformers):
    (mask,) = for_transformers.encode(hf_tokenizer.MASK).ids
    assert mask == tokenizer.vocab_size
    end = for_transformers.id_to_token(tokenizer.eos_id)
    assert for_transformers.encode(f"a{end}").ids[-1] == tokenizer.eos_id
    bos = hf_tokenizer.tokenizer_json(tokenizer, hf_tokenizer.BOS)
    library = pytest.importorskip("tokenizers")
    begins = library.Tokenizer.from_str(json.dumps(bos))
    assert begins.encode("a").ids == [mask, *tokenizer.encode("a")]


@pytest.mark.parametrize("spec", ["chars:27", "chars:27+eos", "synthetic:16", "synthetic:16+eos"])
def test_hugging_faces_form_of_closed_alphabets(spec):
    library = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.make(spec, sample)
    made = hf_tokenizer.tokenizer_json(tokenizer, hf_tokenizer.MASK)
    assert hf_tokenizer.differs(tokenizer, made) == ""
    theirs = library.Tokenizer.from_str(json.dumps(made))
    text = "a z" if "chars" in spec else "3 15 0"
    assert theirs.decode(theirs.encode(text).ids) == text
    with pytest.raises(Exception, match="UNK"):
        theirs.encode("A")


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_hugging_faces_form_splits_as_the_rank_file(name, tmp_path):
    library = pytest.importorskip("tokenizers")
    plain = tiktoken_ranks(tmp_path).partition(":")[2]
    tokenizer = tokenizers.make(f"tiktoken:{name}:{plain}", sample)
    made = hf_tokenizer.tokenizer_json(tokenizer, hf_tokenizer.MASK)
    assert hf_tokenizer.differs(tokenizer, made) == ""
    theirs = library.Tokenizer.from_str(json.dumps(made))
    for text in (CORPUS, "x=1;\ny=2;\n", "I'LL don't 12345 A.B/\r\n\n \t z"):
        assert theirs.encode(text).ids == tokenizer.encode(text).tolist()


def test_what_hugging_faces_form_does_otherwise_is_named(tokenizer):
    made = hf_tokenizer.tokenizer_json(tokenizer, hf_tokenizer.MASK)
    broken = {**made, "normalizer": {"type": "Lowercase"}}
    assert hf_tokenizer.differs(tokenizer, broken).startswith("other ids around ")
    assert "refuses it" in hf_tokenizer.differs(tokenizer, {**made, "model": {"type": "none"}})


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_round_trip(tokenizer, text):
    assert_exact(tokenizer, text)


def test_batch_equals_one_by_one(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert (ids == tokenizer.encode(text)).all()


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert (loaded.hash, loaded.vocab_size, loaded.eos_id, loaded.spec) == (
        tokenizer.hash,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.spec,
    )
    assert (loaded.token_bytes == tokenizer.token_bytes).all()
    assert (loaded.encode(CORPUS) == tokenizer.encode(CORPUS)).all()


def test_eos_counts_in_the_vocabulary_and_stands_for_no_text(tokenizer):
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size == len(tokenizer.token_bytes)
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0


BPE = tokenizers.make("bpe:400", sample)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \u2581\n\t\0")))
def test_bpe_round_trip_of_any_text(text):
    assert_exact(BPE, text)


def test_bpe_compresses_and_has_the_size_asked_for():
    assert BPE.vocab_size == 400
    assert len(BPE.encode(CORPUS)) < 0.7 * len(CORPUS)
    assert len(BPE.encode("        ")) < 8  # indentation is cheap


def test_training_is_repeatable_and_hashes_tell_tokenizers_apart():
    assert tokenizers.make("bpe:400", sample).hash == BPE.hash
    others = ["bytes", "bpe:401", "unigram:400", "chars:27", "chars:27+eos", "synthetic:28"]
    assert len({tokenizers.make(spec, sample).hash for spec in others} | {BPE.hash}) == 7


def test_sentencepiece_model_with_dummy_prefix_is_used_without_it(tmp_path):
    spec = trained_sentencepiece(tmp_path / "m.model", normalization_rule_name="identity")
    for text in TEXTS:
        assert_exact(tokenizers.make(spec, sample), text)


def test_normalising_sentencepiece_model_is_refused_with_the_difference(tmp_path):
    spec = trained_sentencepiece(tmp_path / "m.model", normalization_rule_name="nmt_nfkc")
    lossy = tokenizers.make(spec, sample)
    text = "ten \uff21 full width"  # NFKC makes it a plain A
    with pytest.raises(UserError, match="at byte 4 "):
        tokenizers.check_lossless(lossy, text, lossy.encode(text))


def test_chars_are_text8():
    tokenizer = tokenizers.make("chars:27", sample)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (27, -1)
    assert tokenizer.encode("z a").tolist() == [26, 0, 1]
    assert tokenizer.decode([1, 0, 26]) == "a z"
    with_end = tokenizers.make("chars:27+eos", sample)
    assert (with_end.vocab_size, with_end.eos_id) == (28, 27)
    with pytest.raises(UserError, match=r"'\\n' at character 3"):
        tokenizer.encode("abc\nd")


def test_synthetic_reads_numbers():
    tokenizer = tokenizers.make("synthetic:16", sample)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (16, -1)
    assert tokenizer.encode("3 15 0 ").tolist() == [3, 15, 0]
    assert tokenizer.decode([3, 15, 0]) == "3 15 0 "
    assert tokenizer.token_bytes[[3, 15, 0]].sum() == len("3 15 0 ")
    assert tokenizers.make("synthetic:16+eos", sample).eos_id == 16
    for bad in ("3 16 ", "-1 ", "a b "):
        with pytest.raises(UserError):
            tokenizer.encode(bad)


@pytest.mark.parametrize(
    "spec",
    [
        "words",
        "bpe",
        "bpe:many",
        "bpe:100",
        "bpe:90000",
        "unigram:90000",
        "chars:26",
        "synthetic:1",
        "sentencepiece:nowhere.model",
        "sentencepiece:" + __file__,
        "hf:" + __file__,
        "tiktoken:" + __file__,
    ],
)
def test_bad_specs_are_one_clear_line(spec):
    with pytest.raises(UserError) as error:
        tokenizers.make(spec, sample)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("spec", "package"), [("hf", "tokenizers"), ("tiktoken", "tiktoken")])
def test_missing_extra_is_named(spec, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"prime_jax\[tokenizers\]"):
        tokenizers.make(f"{spec}:{__file__}", sample)


def test_altered_or_damaged_tokenizer_is_refused(tmp_path):
    BPE.save(tmp_path)
    other = tokenizers.make("bpe:401", sample)
    (tmp_path / "tokenizer.model").write_bytes(other.model)
    with pytest.raises(UserError):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(BPE.model[:100])
    with pytest.raises(UserError):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError):
        tokenizers.load(tmp_path)


def test_model_module_reports_an_unreadable_file(tmp_path):
    with pytest.raises(UserError):
        tokenizers.read(str(tmp_path))
