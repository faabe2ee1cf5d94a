"""Our tokenizers as the `tokenizer.json` of Hugging Face's library, id for id.

Id V, behind the tokens, is the mask or, for family arm, BOS. Special tokens that appear in a text are
read as such there, and as plain text here. `differs` compares both on the pieces of a vocabulary.
"""

import base64
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from prime_jax.data import tokenizers
from prime_jax.data.tokenizers import BYTE_OF, NO_EOS, SPACE, SPLITS, Tokenizer

MASK, BOS = "<|mask|>", "<|bos|>"
END = "<|endoftext|>"
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}
LOWER = 100.0  # scores of pieces that no text has, below those of the others
Json = dict[str, Any]

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
JOINED = {"type": "Fuse"}


def tokenizer_json(tokenizer: Tokenizer, last: str) -> Json:
    """The content of `tokenizer.json`.

    Args:
        last: the text of id V; where it is BOS, texts begin with it.
    """
    made = MAKERS[tokenizer.kind](tokenizer)
    special = {tokenizer.vocab_size: last}
    if tokenizer.eos_id != NO_EOS:
        special[tokenizer.eos_id] = _text_of(made, tokenizer.eos_id) or END
    for i, text in sorted(special.items()):
        _name(made["model"], i, text)
    added = [token for token in made.get("added_tokens", []) if token["id"] not in special]
    added += [_added(i, text, special=True) for i, text in special.items()]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder"))
    rules = {
        "truncation": None,
        "padding": None,
        "post_processor": _begins_with(tokenizer.vocab_size) if last == BOS else None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
    }
    return {"version": "1.0", **empty, **made, **rules}


def differs(tokenizer: Tokenizer, made: Json) -> str:
    """What `made` does otherwise than the tokenizer, on all pieces in a row; empty for nothing.

    Raises:
        UserError: Hugging Face's library is not installed.
    """
    library = tokenizers.optional("tokenizers")
    try:
        theirs = library.Tokenizer.from_str(json.dumps(made))
    except Exception as error:  # the library raises bare Exception
        return f"Hugging Face's library refuses it: {error}"
    for token in made["added_tokens"]:
        if theirs.token_to_id(token["content"]) != token["id"]:
            return f"{token['content']} has not id {token['id']}"
    text = tokenizer.decode(np.arange(tokenizer.vocab_size))
    text = text.replace("\ufffd", "").replace(SPACE, "")
    got, want = theirs.encode(text, add_special_tokens=False).ids, tokenizer.encode(text).tolist()
    if got == want:
        return ""
    same = (a == b for a, b in zip(got, want, strict=False))
    at = sum(itertools.takewhile(bool, same))
    return f"other ids around {tokenizer.decode(want[max(0, at - 3) : at + 4])!r}"


def _text_of(made: Json, i: int) -> str | None:
    """The text of an id in a tokenizer.json."""
    for token in made.get("added_tokens") or ():
        if token["id"] == i:
            return token["content"]
    vocabulary = made["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return next((text for text, j in vocabulary.items() if j == i), None)
    return vocabulary[i][0] if i < len(vocabulary) else None


def _name(model: Json, i: int, text: str) -> None:
    """Give a text an id in the model's own vocabulary, or the library would choose it."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary.setdefault(text, i)
    elif len(vocabulary) == i:
        vocabulary.append([text, min(score for _, score in vocabulary)])


def _added(i: int, text: str, special: bool) -> Json:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": text, **plain, "special": special}


def _begins_with(i: int) -> Json:
    """BOS before a text, and before each of a pair."""
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {BOS: {"id": BOS, "ids": [i], "tokens": [BOS]}},
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **rules: Any) -> Json:
    return {"type": "BPE", "vocab": vocabulary, "merges": merges, **rules}


def _of_bytes(_: Tokenizer) -> Json:
    vocabulary = {CHAR_OF[byte]: byte for byte in range(256)}
    return {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "model": _bpe(vocabulary, [])}


def _words(vocabulary: dict[str, int]) -> Json:
    return {"type": "WordLevel", "vocab": vocabulary, "unk_token": ""}  # an error for other words


def _of_chars(tokenizer: Tokenizer) -> Json:
    split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated"}
    words = {piece.decode(): i for i, piece in enumerate(tokenizer.pieces) if piece}
    return {
        "pre_tokenizer": split | {"invert": False},
        "decoder": JOINED,
        "model": _words(words),
    }


def _of_synthetic(tokenizer: Tokenizer) -> Json:
    words = {piece.decode().strip(): i for i, piece in enumerate(tokenizer.pieces) if piece}
    return {"pre_tokenizer": {"type": "WhitespaceSplit"}, "model": _words(words)}


def _of_hugging_face(tokenizer: Tokenizer) -> Json:
    return json.loads(tokenizer.model)


def _of_tiktoken(tokenizer: Tokenizer) -> Json:
    """Byte pairs by rank: the merge behind a rank is the last that leads to its piece."""
    head = tokenizers.HEAD.match(tokenizer.model)
    split = head[1].decode() if head else "gpt2"
    ranks = {piece: i for i, piece in enumerate(tokenizer.pieces) if piece}
    write = lambda piece: "".join(CHAR_OF[byte] for byte in piece)  # noqa: E731
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda row: row[1]):
        parts = _merged(ranks, piece, below=rank)
        if len(parts) == 2:
            merges.append([write(part) for part in parts])
    pattern = {"type": "Split", "pattern": {"Regex": SPLITS[split].pattern}}
    pattern |= {"behavior": "Isolated", "invert": False}
    vocabulary = {write(piece): rank for piece, rank in ranks.items()}
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pattern, BYTE_LEVEL]},
        "decoder": BYTE_LEVEL,
        "model": _bpe(vocabulary, merges, ignore_merges=True),
    }


def _merged(ranks: dict[bytes, int], piece: bytes, below: int) -> list[bytes]:
    """The parts of a piece after all merges of a lower rank."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, below) for a, b in itertools.pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[at] >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _of_sentencepiece(tokenizer: Tokenizer) -> Json:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.model)
    own = [i for i, piece in enumerate(proto.pieces) if piece.type == _kinds(proto).USER_DEFINED]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    charsmap = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    precompiled = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    unigram = proto.trainer_spec.model_type == type(proto.trainer_spec).UNIGRAM
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [precompiled] * bool(charsmap) + [spaces],
        },
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, JOINED]},
        "added_tokens": [
            _added(i, proto.pieces[i].piece.replace(SPACE, " "), special=False) for i in own
        ],
        "model": (_unigram if unigram else _merges_of_scores)(proto),
    }


def _kinds(proto: Any) -> Any:
    return type(proto).SentencePiece


def _unigram(proto: Any) -> Json:
    normal = _kinds(proto).NORMAL
    other = min(piece.score for piece in proto.pieces if piece.type == normal) - LOWER
    return {
        "type": "Unigram",
        "vocab": [[p.piece, p.score if p.type == normal else other] for p in proto.pieces],
        "unk_id": proto.trainer_spec.unk_id,
        "byte_fallback": True,
    }


def _merges_of_scores(proto: Any) -> Json:
    """Sentencepiece's BPE joins the neighbours whose piece has the highest score."""
    normal = _kinds(proto).NORMAL
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == normal}
    merges = []
    for text in sorted(ids, key=lambda text: -proto.pieces[ids[text]].score):
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        known = [(a, b) for a, b in halves if a in ids and b in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return _bpe(
        {piece.piece: i for i, piece in enumerate(proto.pieces)},
        [list(pair) for pair in merges],
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=True,
    )


MAKERS: dict[str, Callable[[Tokenizer], Json]] = {
    "bytes": _of_bytes,
    "chars": _of_chars,
    "synthetic": _of_synthetic,
    "hf": _of_hugging_face,
    "tiktoken": _of_tiktoken,
    "sentencepiece": _of_sentencepiece,
}
