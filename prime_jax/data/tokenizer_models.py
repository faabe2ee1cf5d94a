"""Tokenizers that a model file defines: sentencepiece, Hugging Face JSON, tiktoken ranks."""

import base64
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from prime_jax.data.tokenizer import Tokenizer
from prime_jax.errors import UserError

SPACE = "\u2581"  # how sentencepiece writes a space; the character itself needs care
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer file {path}: {error.strerror}") from error


def _optional(name: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed: pip install 'prime_jax[tokenizers]'") from error


def train_sentencepiece(
    kind: str, vocab_size: int, sample: Callable[[int], Iterable[str]]
) -> bytes:
    """Train a lossless model: no normalisation, no dummy prefix, runs of spaces kept.

    Newline and tab are pieces of their own, other rare characters fall back to bytes.

    Raises:
        UserError: the sample is too small for `vocab_size`, or it is below 300.
    """
    import sentencepiece

    if vocab_size < 300:
        raise UserError(f"tokenizer {kind}:{vocab_size}: 256 bytes and symbols need at least 300")
    text = sample(min(max(2000 * vocab_size, 2 << 20), 64 << 20))
    lines = (
        line.replace(SPACE, "").replace("\0", "")
        for document in text
        for line in document.split("\n")
        if line.strip()
    )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=4,  # a constant: the result must not depend on the machine
            minloglevel=2,
        )
        trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    except RuntimeError as error:
        raise _too_small(kind, vocab_size) from error
    if trained.get_piece_size() != vocab_size:
        raise _too_small(kind, vocab_size)
    return model.getvalue()


def _too_small(kind: str, vocab_size: int) -> UserError:
    return UserError(
        f"tokenizer {kind}:{vocab_size} cannot be trained on this source: too little or too "
        "uniform text; use a smaller vocabulary, or bytes"
    )


class SentencePiece(Tokenizer):
    """A sentencepiece model, used without dummy prefix and without removal of spaces.

    A model whose normalisation rewrites characters, or without byte fallback, is not lossless and
    is refused when data is prepared with it.
    """

    kind = "sentencepiece"

    def __init__(self, spec: str, model: bytes):
        import sentencepiece

        self.model = _exact_whitespace(spec, model)
        self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        pieces = [self._piece(i) for i in range(sp.get_piece_size())]
        eos_id = sp.eos_id() if sp.eos_id() >= 0 else len(pieces)
        super().__init__(spec, pieces + [b""] * (eos_id == len(pieces)), eos_id)
        self._space_ids = np.array(
            [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()], np.int32
        )

    def _piece(self, i: int) -> bytes:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_byte(i):
            return bytes([int(BYTE_PIECE.fullmatch(piece)[1], 16)])
        if self._sp.is_control(i) or self._sp.is_unknown(i) or self._sp.is_unused(i):
            return b""
        return piece.replace(SPACE, " ").encode()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self._sp.encode(list(texts), num_threads=1)
        return [
            np.array(i, np.int32) if SPACE not in text else self._with_space_sign(text)
            for text, i in zip(texts, ids, strict=True)
        ]

    def _with_space_sign(self, text: str) -> np.ndarray:
        """U+2581 in the text would come back as a space: write it as its three bytes."""
        out: list[np.ndarray] = []
        for ids in self._sp.encode(text.split(SPACE), num_threads=1):
            out += [self._space_ids, np.array(ids, np.int32)]
        return np.concatenate(out[1:])


def _exact_whitespace(spec: str, model: bytes) -> bytes:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise UserError(f"tokenizer {spec}: the file is not a sentencepiece model") from error
    if not proto.pieces:
        raise UserError(f"tokenizer {spec}: the file is not a sentencepiece model")
    rules = proto.normalizer_spec
    if not (rules.add_dummy_prefix or rules.remove_extra_whitespaces):
        return model
    rules.add_dummy_prefix = rules.remove_extra_whitespaces = False
    return proto.SerializeToString(deterministic=True)


class HuggingFace(Tokenizer):
    """A `tokenizer.json`; special tokens that appear in the text are read as plain text."""

    kind = "hf"

    def __init__(self, spec: str, model: bytes):
        library = _optional("tokenizers")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are ours
        self.model = model
        try:
            self._tokenizer = library.Tokenizer.from_str(model.decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer {spec}: not a tokenizer.json ({error})") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        byte_level = "ByteLevel" in json.dumps(json.loads(model).get("decoder"))
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        pieces = [b""] * (max(vocabulary.values()) + 1)
        for piece, i in vocabulary.items():
            if i not in added:
                pieces[i] = _from_byte_level(piece) if byte_level else _from_metaspace(piece)
            elif not added[i].special:
                pieces[i] = piece.encode()
        eos_id = next((vocabulary[n] for n in END_NAMES if n in vocabulary), len(pieces))
        if eos_id == len(pieces):
            pieces.append(b"")
        pieces[eos_id] = b""
        super().__init__(spec, pieces, eos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE vocabularies write for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_level_alphabet()


def _from_byte_level(piece: str) -> bytes:
    if all(c in BYTE_OF for c in piece):
        return bytes([BYTE_OF[c] for c in piece])
    return piece.encode()


def _from_metaspace(piece: str) -> bytes:
    if match := BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE, " ").encode()


class Tiktoken(Tokenizer):
    """Byte-pair ranks in tiktoken's format with GPT-2's splitting; EOS follows the last rank."""

    kind = "tiktoken"

    def __init__(self, spec: str, model: bytes):
        library = _optional("tiktoken")
        try:
            rows = [line.split() for line in model.splitlines() if line.strip()]
            ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in rows}
            if not all(bytes([i]) in ranks for i in range(256)):
                raise ValueError("a single byte has no rank")
        except ValueError as error:
            raise UserError(f"tokenizer {spec}: not a .tiktoken rank file ({error})") from error
        self.model = _rank_file(ranks)  # one order and one layout, so that the hash is stable
        pieces = [b""] * (max(ranks.values()) + 2)
        for piece, rank in ranks.items():
            pieces[rank] = piece
        self._encoding = library.Encoding(
            "prime_jax", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={}
        )
        super().__init__(spec, pieces, eos_id=len(pieces) - 1)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self._encoding.encode_ordinary(text), np.int32) for text in texts]


def read_ranks(path: str) -> bytes:
    """A rank file; GPT-2's own `encoder.json`, whose ids are the ranks, is turned into one."""
    data = read(path)
    if not path.endswith(".json"):
        return data
    try:
        ids = {p: int(i) for p, i in json.loads(data).items() if p not in END_NAMES}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"tokenizer tiktoken:{path}: not an encoder.json ({error})") from error
    return _rank_file({_from_byte_level(piece): i for piece, i in ids.items()})


def _rank_file(ranks: dict[bytes, int]) -> bytes:
    rows = sorted(ranks.items(), key=lambda row: row[1])
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in rows)
