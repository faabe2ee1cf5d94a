"""Tokenizers: text to ids and back without loss, with the bytes of text that each id stands for.

A tokenizer here is an encoder plus a table of pieces, one byte string per id. Decoding concatenates
pieces, so it is exact whatever library encodes, and bits per byte follow from the same table.

Specs:
    bytes               256 byte values and EOS
    chars:27            a-z and space (text8), no EOS; chars:27+eos adds one
    synthetic:V         the text is numbers, the numbers are the ids; synthetic:V+eos adds EOS
    bpe:N, unigram:N    sentencepiece with N ids, EOS included, trained on a sample of the source
    sentencepiece:PATH  a trained model
    hf:PATH             a Hugging Face tokenizer.json                      (prime_jax[tokenizers])
    tiktoken:PATH       a .tiktoken rank file, or GPT-2's encoder.json; text is split as GPT-2
                        does                                             (prime_jax[tokenizers])
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from prime_jax.errors import UserError
from prime_jax.runtime.records import read_json, write_json_atomic

NO_EOS = -1
ALPHABET = " abcdefghijklmnopqrstuvwxyz"


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        kind: names the class in a saved dataset.
        spec: what it was made from; not part of its identity.
        pieces: the bytes of text of every id; empty for EOS and unused ids.
        eos_id: id that ends a document, or -1 if there is none.
        model: the file that defines it, empty if the spec alone does.
    """

    kind: str
    model: bytes = b""

    def __init__(self, spec: str, pieces: list[bytes], eos_id: int):
        self.spec, self.pieces, self.eos_id = spec, pieces, eos_id

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids int32 [n] of each text, without EOS."""

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self.pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 (a cut character) show as U+FFFD."""
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
        """Twelve hex digits that name the mapping from text to ids."""
        digest = hashlib.sha256(f"{self.kind} {self.vocab_size} {self.eos_id} ".encode())
        digest.update(self.model)
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        return digest.hexdigest()[:12]

    def save(self, directory: Path) -> None:
        """Write `tokenizer.model` (if there is a model) and, last, `tokenizer.json`."""
        if self.model:
            try:
                (directory / "tokenizer.model").write_bytes(self.model)
            except OSError as error:
                raise UserError(f"cannot write {directory}: {error.strerror}") from error
        about = {"kind": self.kind, "spec": self.spec, "hash": self.hash}
        write_json_atomic(directory / "tokenizer.json", about)


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
                f"chars:27 knows a-z and space only; found {bad[0]!r} at character {bad.start()}"
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


def make(spec: str, sample: Callable[[int], Iterable[str]]) -> Tokenizer:
    """The tokenizer that a spec describes.

    Args:
        spec: see the module docstring.
        sample: gives about so many bytes of text, for tokenizers that are trained here.
    Raises:
        UserError: unknown spec, missing file or extra, or a sample too small to train on.
    """
    from prime_jax.data import tokenizer_models as models

    kind, _, value = spec.partition(":")
    if spec == "bytes":
        return Bytes()
    if kind == "chars":
        return Chars(spec)
    if kind == "synthetic":
        return Synthetic(spec)
    if kind in ("bpe", "unigram"):
        size, _ = _count(spec)
        return models.SentencePiece(spec, models.train_sentencepiece(kind, size, sample))
    if kind == "sentencepiece":
        return models.SentencePiece(spec, models.read(value))
    if kind == "hf":
        return models.HuggingFace(spec, models.read(value))
    if kind == "tiktoken":
        return models.Tiktoken(spec, models.read_ranks(value))
    raise UserError(
        f"tokenizer {spec!r} is unknown; use bytes, chars:27, bpe:N, unigram:N, "
        "sentencepiece:PATH, hf:PATH, tiktoken:PATH or synthetic:N"
    )


def load(directory: Path) -> Tokenizer:
    """Read what `save` wrote.

    Raises:
        UserError: a missing, damaged or altered file.
    """
    from prime_jax.data import tokenizer_models as models

    about = read_json(directory / "tokenizer.json")
    try:
        kind, spec, expected = about["kind"], about["spec"], about["hash"]
        if kind in ("bytes", "chars", "synthetic"):
            tokenizer = {"bytes": Bytes, "chars": Chars, "synthetic": Synthetic}[kind](spec)
        else:
            cls = {
                "sentencepiece": models.SentencePiece,
                "hf": models.HuggingFace,
                "tiktoken": models.Tiktoken,
            }[kind]
            tokenizer = cls(spec, models.read(str(directory / "tokenizer.model")))
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory / 'tokenizer.json'} is damaged: {error!r}") from error
    if tokenizer.hash != expected:
        raise UserError(f"{directory}: the tokenizer was altered after the data was prepared")
    return tokenizer


def check_lossless(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> None:
    """Refuse a tokenizer that loses text.

    Raises:
        UserError: decoding does not give the text back; shows the first difference.
    """
    got, want = tokenizer.decode_bytes(ids), text.encode()
    if got == want:
        return
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
    at = min(len(got), len(want)) if at is None else at
    raise UserError(
        f"tokenizer {tokenizer.spec} loses text: at byte {at} of a document "
        f"{json.dumps(_around(want, at))} came back as {json.dumps(_around(got, at))}"
    )


def _around(text: bytes, at: int) -> str:
    return text[max(0, at - 12) : at + 12].decode("utf-8", "replace")
