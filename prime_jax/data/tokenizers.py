"""Lossless tokenizers: text to ids and back, with the bytes of text of each id.

A tokenizer here is an encoder plus a table of pieces, one byte string per id. Decoding concatenates
pieces, so it is exact for any encoder library, and bits per byte use the same table.

Specs:
    bytes               256 byte values and EOS
    chars:27            a-z and space (text8), no EOS; chars:27+eos adds one
    synthetic:V         the text is numbers, the numbers are the ids; synthetic:V+eos adds EOS
    bpe:N, unigram:N    sentencepiece with N ids, EOS included, trained on a sample of the source
    sentencepiece:PATH  a trained model
    hf:PATH             a Hugging Face tokenizer.json                      (prime_jax[tokenizers])
    tiktoken:PATH       a .tiktoken rank file of GPT-2's split, or its encoder.json; the files of
                        others as tiktoken:cl100k_base:PATH (GPT-4, Llama 3) and
                        tiktoken:o200k_base:PATH (GPT-4o)                (prime_jax[tokenizers])
"""

import base64
import hashlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np

from prime_jax.errors import UserError
from prime_jax.runtime import storage
from prime_jax.runtime.records import read_json, write_json_atomic

FILE, MODEL = "tokenizer.json", "tokenizer.model"
OWN = "prime_jax"  # the folder of these files where FILE is Hugging Face's
LONGEST_LINE = 1 << 20  # bytes; sentencepiece leaves longer ones out, so they are cut
DECODED = 1 << 20  # ids decoded at a time
NO_EOS = -1
SPACE = "\u2581"  # sentencepiece's sign for a space; needs escaping if it occurs in the text
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ALPHABET = " abcdefghijklmnopqrstuvwxyz"


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        kind: identifies the class in a saved dataset.
        spec: the spec it was made from; not part of its identity.
        pieces: the bytes of text of every id; empty for EOS and unused ids.
        eos_id: id that ends a document, or -1 if there is none.
        model: the file that defines it, empty if the spec is enough.
        lossy: why it may lose text and what would not, where that is known.
    """

    kind: str
    model: bytes = b""
    lossy: str = ""

    def __init__(self, spec: str, pieces: list[bytes], eos_id: int):
        self.spec, self.pieces, self.eos_id = spec, pieces, eos_id

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids int32 [n] of each text, without EOS."""

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = np.asarray(ids, np.int64)
        return b"".join(self._joined(ids[at : at + DECODED]) for at in range(0, len(ids), DECODED))

    def _joined(self, ids: np.ndarray) -> bytes:
        """The pieces of some ids in a row, as fast as a copy: every document is decoded once."""
        text, first = self._table
        sizes = self.token_bytes[ids]
        ends = np.cumsum(sizes)
        skipped = np.repeat(first[ids] - (ends - sizes), sizes)
        return text[skipped + np.arange(len(skipped))].tobytes()

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8, all pieces in a row, and int64 [V], where each begins."""
        sizes = self.token_bytes.astype(np.int64)
        return np.frombuffer(b"".join(self.pieces), np.uint8), np.cumsum(sizes) - sizes

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @property
    def vocab_size(self) -> int:
        """Number of ids, EOS included."""
        return len(self.pieces)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [V]: bytes of text each id stands for; they sum to the length of the text."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits that identify the mapping from text to ids."""
        digest = hashlib.sha256(f"{self.kind} {self.vocab_size} {self.eos_id} ".encode())
        digest.update(self.model)
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        return digest.hexdigest()[:12]

    def save(self, directory: storage.Path) -> None:
        """Write MODEL (if there is one) and, last, FILE."""
        if self.model:
            storage.write(directory / MODEL, self.model)
        about = {"kind": self.kind, "spec": self.spec, "hash": self.hash}
        write_json_atomic(directory / FILE, about)


class Bytes(Tokenizer):
    kind = "bytes"

    def __init__(self, spec: str = "bytes"):
        super().__init__(spec, [bytes([i]) for i in range(256)] + [b""], eos_id=256)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]


class Chars(Tokenizer):
    """The 27 characters of text8."""

    kind = "chars"

    def __init__(self, spec: str = "chars:27"):
        _, eos = _count(spec, allowed=(len(ALPHABET),))
        pieces = [c.encode() for c in ALPHABET]
        super().__init__(spec, pieces + [b""] * eos, eos_id=len(ALPHABET) if eos else NO_EOS)
        self._ids = np.full(256, -1, np.int32)
        self._ids[[ord(c) for c in ALPHABET]] = np.arange(len(ALPHABET))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        ids = self._ids[np.frombuffer(text.encode(), np.uint8)]
        if len(ids) and ids.min() < 0:
            bad = re.search("[^a-z ]", text)
            raise UserError(
                f"chars:27 has only a-z and space; found {bad[0]!r} at character {bad.start()}"
            )
        return ids


class Synthetic(Tokenizer):
    """Numbers, each followed by one space: `3 15 0 ` (the Markov source writes this)."""

    kind = "synthetic"

    def __init__(self, spec: str):
        size, eos = _count(spec)
        pieces = [f"{i} ".encode() for i in range(size)]
        super().__init__(spec, pieces + [b""] * eos, eos_id=size if eos else NO_EOS)
        self._size = size

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        try:
            ids = np.array(text.split(), np.int64)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{self.spec} reads numbers separated by spaces: {error}") from error
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._size:
            raise UserError(f"{self.spec}: {ids.max()} is not between 0 and {self._size - 1}")
        return ids.astype(np.int32)


def _count(spec: str, allowed: Sequence[int] = ()) -> tuple[int, bool]:
    """The number in `kind:N` or `kind:N+eos`, and whether EOS was asked for."""
    kind = spec.partition(":")[0]
    match = re.fullmatch(r"\w+:(\d+)(\+eos)?", spec)
    size = int(match[1]) if match else 0
    if size < 2 or (allowed and size not in allowed):
        right = " or ".join(f"{kind}:{n}" for n in allowed or ("N",))
        raise UserError(f"tokenizer {spec!r}: write {right}, with +eos to end documents")
    return size, bool(match[2])


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer file {path}: {error.strerror}") from error


def optional(name: str) -> ModuleType:
    """A library of the extra `tokenizers`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed: pip install 'prime_jax[tokenizers]'") from error


def train_sentencepiece(
    kind: str, vocab_size: int, sample: Callable[[int], Iterable[str]]
) -> bytes:
    """Train a lossless model: no normalisation, no dummy prefix, repeated spaces kept.

    Newline and tab are separate pieces, other rare characters fall back to bytes.

    Raises:
        UserError: the sample is too small for `vocab_size`, or `vocab_size` is below 300.
    """
    import sentencepiece

    if vocab_size < 300:
        raise UserError(f"tokenizer {kind}:{vocab_size}: 256 bytes and symbols need at least 300")
    text = sample(min(max(2000 * vocab_size, 2 << 20), 64 << 20))
    model, failed = io.BytesIO(), []

    def lines() -> Iterator[str]:
        try:
            for document in text:
                for line in document.split("\n"):
                    for at in range(0, len(line) if line.strip() else 0, LONGEST_LINE // 4):
                        piece = line[at : at + LONGEST_LINE // 4]  # of 4 bytes a character at most
                        yield piece.replace(SPACE, "").replace("\0", "")
        except BaseException as error:  # the library makes another error of it
            failed.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
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
            max_sentence_length=LONGEST_LINE,
            num_threads=4,  # a constant: the result must not depend on the machine
            minloglevel=2,
        )
        trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    except RuntimeError as error:
        if failed:
            raise failed[0] from None
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

    A model with normalisation of characters, or without byte fallback, is not lossless;
    `data prepare` rejects it.
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
        """Encode U+2581 in the text as its three bytes: its piece would decode to a space."""
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
        library = optional("tokenizers")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we run our own processes
        self.model = model
        try:
            self._tokenizer = library.Tokenizer.from_str(model.decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer {spec}: not a tokenizer.json ({error})") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        rules = json.dumps([json.loads(model).get(k) for k in ("normalizer", "pre_tokenizer")])
        if "Prepend" in rules or "Metaspace" in rules:
            self.lossy = (
                "it begins every text with a space; use the model's own file, "
                "sentencepiece:tokenizer.model, which is read without"
            )
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


@dataclass(frozen=True)
class Split:
    """How a tiktoken encoding splits text before merging, and its end-of-text id: the last rank +
    `end`."""

    pattern: str
    end: int


LETTERS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {
    "gpt2": Split(GPT2_SPLIT, 1),
    "cl100k_base": Split(
        rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        2,
    ),
    "o200k_base": Split(
        rf"[^\r\n\p{{L}}\p{{N}}]?[{LETTERS[0]}]*[{LETTERS[1]}]+{ENDINGS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{LETTERS[0]}]+[{LETTERS[1]}]*{ENDINGS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        2,
    ),
}
HEAD = re.compile(rb"# (\w+) (\d+)\n")  # of our rank files: the split, and the end-of-text id


class Tiktoken(Tokenizer):
    """Byte-pair ranks in tiktoken's format.

    The model is the rank file; where the split is not GPT-2's, or EOS does not follow the last
    rank, its first line says so.
    """

    kind = "tiktoken"

    def __init__(self, spec: str, model: bytes):
        library = optional("tiktoken")
        head = HEAD.match(model)
        ranks = _ranks(spec, model[head.end() :] if head else model)
        split = head[1].decode() if head else "gpt2"
        end = int(head[2]) if head else max(ranks.values()) + 1
        if split not in SPLITS or end in ranks.values():
            raise UserError(f"tokenizer {spec}: not a .tiktoken rank file (its first line)")
        self.model = _rank_file(ranks, split, end)  # canonical, so that the hash is stable
        pieces = [b""] * (max(*ranks.values(), end) + 1)
        for piece, rank in ranks.items():
            pieces[rank] = piece
        self._encoding = library.Encoding(
            "prime_jax", pat_str=SPLITS[split].pattern, mergeable_ranks=ranks, special_tokens={}
        )
        super().__init__(spec, pieces, eos_id=end)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self._encoding.encode_ordinary(text), np.int32) for text in texts]


def _ranks(spec: str, data: bytes) -> dict[bytes, int]:
    try:
        rows = [line.split() for line in data.splitlines() if line.strip()]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in rows}
        if not all(bytes([i]) in ranks for i in range(256)):
            raise ValueError("a single byte has no rank")
    except ValueError as error:
        raise UserError(f"tokenizer {spec}: not a .tiktoken rank file ({error})") from error
    return ranks


def read_ranks(spec: str) -> bytes:
    """The rank file of `tiktoken:PATH` or `tiktoken:SPLIT:PATH`, with its split and EOS.

    GPT-2's `encoder.json`, whose ids are the ranks, is converted to one.

    Raises:
        UserError: no such file, or one of another format; ranks of a split that is not named.
    """
    optional("tiktoken")
    split, path = _split_of(spec)
    if path.endswith(".json"):
        try:
            ids = {p: int(i) for p, i in json.loads(read(path)).items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"tokenizer {spec}: not an encoder.json ({error})") from error
        ends = [ids.pop(name) for name in END_NAMES if name in ids]
        ranks = {_from_byte_level(p): i for p, i in ids.items()}
    else:
        ranks = _ranks(spec, read(path))
        ends = [ranks.pop(name.encode()) for name in END_NAMES if name.encode() in ranks]
    if not split and (foreign := _foreign(ranks)) is not None:
        others = ", ".join(f"tiktoken:{name}:{path}" for name in SPLITS if name != "gpt2")
        raise UserError(
            f"tokenizer {spec}: not made with the split of GPT-2, which never makes the token "
            f"{foreign!r}; name its split: {others} (cl100k_base is Llama 3's too)"
        )
    split = split or "gpt2"
    usual = max(ranks.values()) + SPLITS[split].end
    return _rank_file(ranks, split, next(iter(ends), usual))


def _foreign(ranks: Iterable[bytes]) -> str | None:
    """A token that GPT-2's split cannot make; parts of characters and of contractions aside."""
    pattern = optional("regex").compile(GPT2_SPLIT)
    for piece in ranks:
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            continue
        if not pattern.fullmatch(text) and text not in ("'l", "'r", "'v"):
            return text
    return None


def _rank_file(ranks: dict[bytes, int], split: str, end: int) -> bytes:
    rows = sorted(ranks.items(), key=lambda row: row[1])
    usual = split == "gpt2" and end == max(ranks.values()) + 1
    head = b"" if usual else f"# {split} {end}\n".encode()
    return head + b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in rows)


def file_of(spec: str) -> str | None:
    """The file that a spec names, if any."""
    kind, _, value = spec.partition(":")
    if kind == "tiktoken":
        return _split_of(spec)[1]
    return value if kind in ("sentencepiece", "hf") else None


def _split_of(spec: str) -> tuple[str, str]:
    """The split that `tiktoken:SPLIT:PATH` names, or none, and the path."""
    value = spec.partition(":")[2]
    named, colon, path = value.partition(":")
    return (named, path) if colon and named in SPLITS else ("", value)


def make(spec: str, sample: Callable[[int], Iterable[str]]) -> Tokenizer:
    """The tokenizer that a spec describes.

    Args:
        spec: see the module docstring.
        sample: yields about the given number of bytes of text, to train a tokenizer.
    Raises:
        UserError: unknown spec, missing file or extra, or a sample too small to train on.
    """
    kind, _, value = spec.partition(":")
    if spec == "bytes":
        return Bytes()
    if kind == "chars":
        return Chars(spec)
    if kind == "synthetic":
        return Synthetic(spec)
    if kind in ("bpe", "unigram"):
        size, _ = _count(spec)
        return SentencePiece(spec, train_sentencepiece(kind, size, sample))
    if kind == "sentencepiece":
        return SentencePiece(spec, read(value))
    if kind == "hf":
        return HuggingFace(spec, read(value))
    if kind == "tiktoken":
        return Tiktoken(spec, read_ranks(spec))
    raise UserError(
        f"tokenizer {spec!r} is unknown; use bytes, chars:27, bpe:N, unigram:N, "
        "sentencepiece:PATH, hf:PATH, tiktoken:PATH or synthetic:N"
    )


def copy(source: storage.Path, target: storage.Path) -> None:
    """Copy what `save` wrote; needs none of the libraries that read it."""
    for name in (MODEL, FILE):
        if storage.exists(source / name):
            storage.write(target / name, storage.read(source / name))


def check_size(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Raises: UserError: the tokenizer has not as many ids as the model `where`."""
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{where}: a model of {vocab_size} ids, but tokenizer {tokenizer.spec} has "
            f"{tokenizer.vocab_size}"
        )


def load(directory: storage.Path) -> Tokenizer:
    """Read what `save` wrote.

    Raises:
        UserError: a missing, damaged or altered file.
    """
    about = read_json(directory / FILE)
    if isinstance(about, dict) and "model" in about:  # `export --format hf`
        return load(directory / OWN)
    try:
        kind, spec, expected = about["kind"], about["spec"], about["hash"]
        if kind in ("bytes", "chars", "synthetic"):
            tokenizer = {"bytes": Bytes, "chars": Chars, "synthetic": Synthetic}[kind](spec)
        else:
            cls = {
                "sentencepiece": SentencePiece,
                "hf": HuggingFace,
                "tiktoken": Tiktoken,
            }[kind]
            tokenizer = cls(spec, storage.read(directory / MODEL))
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory / FILE} is damaged: {error!r}") from error
    if tokenizer.hash != expected:
        raise UserError(f"{directory}: the tokenizer was altered after the data was prepared")
    return tokenizer


def check_lossless(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> None:
    """Check that a text is tokenized without loss.

    Raises:
        UserError: decoding does not reproduce the text; with the first difference.
    """
    got, want = tokenizer.decode_bytes(ids), text.encode()
    if got == want:
        return
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
    at = min(len(got), len(want)) if at is None else at
    raise UserError(
        f"tokenizer {tokenizer.spec} loses text: at byte {at} of a document "
        f"{json.dumps(_around(want, at))} was decoded as {json.dumps(_around(got, at))}"
        f"{'; ' * bool(tokenizer.lossy)}{tokenizer.lossy}"
    )


def _around(text: bytes, at: int) -> str:
    return text[max(0, at - 12) : at + 12].decode("utf-8", "replace")
