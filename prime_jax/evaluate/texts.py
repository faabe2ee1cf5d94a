"""Evaluation sets as windows of tokens: a prepared dataset, text files or a zero-shot set.

DIR                    a prepared dataset, its blocks as in training
text:GLOB              each file one text; jsonl:GLOB, parquet:GLOB and the others of sources.py
PRESET:PATH            a zero-shot set (presets.py): a file, a directory or a glob of .txt,
                       .jsonl or .parquet
zero-shot:DIR          every zero-shot set found in DIR, as NAME.txt, NAME.jsonl, NAME/...
"""

import dataclasses
import difflib
import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prime_jax.data import loader, manifest, sources, tokenizers
from prime_jax.errors import UserError
from prime_jax.evaluate.presets import PRESETS
from prime_jax.evaluate.score import Windows, cut
from prime_jax.evaluate.trained import Trained

SUFFIXES = {
    **dict.fromkeys((".txt", ".tokens", ".raw"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
}  # and compressed, .txt.gz


@dataclass(frozen=True)
class Cutting:
    """How texts become windows: `stride` scored tokens after at most `context` tokens.

    Attributes:
        stride: 0 for the model's length less the context.
        examples: blocks of a prepared dataset, evenly spaced; 0 for all.
        split: of a prepared dataset.
    """

    stride: int = 0
    context: int = 0
    examples: int = 0
    split: str = "valid"


@dataclass(frozen=True, eq=False)
class TextSet:
    """Windows to score and their description for the record.

    Attributes:
        name: as given by the user; `rules`: the preset and its version, or empty.
        doc: int64 [W], the text of each window's first scored token.
        n_bytes: of the scored text; None if the tokenizer is not lossless on it.
    """

    name: str
    rules: str
    windows: Windows
    doc: np.ndarray
    texts: int
    n_bytes: int | None
    stride: int
    context: int

    @property
    def identity(self) -> dict:
        """Two results are comparable if this is equal."""
        return {"hash": self.windows.hash, "stride": self.stride, "context": self.context}


def load(spec: str, run: Trained, cutting: Cutting) -> list[TextSet]:
    """The sets that a spec names.

    Raises:
        UserError: no such data, unreadable text, or a dataset of another tokenizer.
    """
    kind, colon, rest = spec.partition(":")
    size = run.config.data.seq_len
    stride = cutting.stride or size - cutting.context
    cutting = dataclasses.replace(cutting, stride=stride)
    list(cut(1, size, stride, cutting.context))  # raises before anything is read
    if kind == "zero-shot":
        return [_preset(f"{n}:{p}", n, p, run, cutting) for n, p in _found(rest)]
    if kind in PRESETS and colon:
        return [_preset(spec, kind, rest, run, cutting)]
    if Path(spec).is_file():
        kind = _reader(spec) or "text"
        raise UserError(f"--data {spec}: is a file; write {kind}:{spec}, or PRESET:{spec}")
    if not colon and not Path(spec).exists():
        raise UserError(f"--data {spec}: no such file, and no dataset")
    if not colon or Path(spec).exists():
        return [_prepared(spec, run, cutting)]
    if near := difflib.get_close_matches(kind, PRESETS, n=1, cutoff=0.75):
        raise UserError(f"--data {spec}: no such set; did you mean {near[0]}:{rest}?")
    return [_tokenised(spec, "", read(spec), run, cutting, stream=False)]


def read(spec: str) -> list[str]:
    """The texts of a source (`sources.parse`), without empty or invalid ones."""
    documents = [
        document.text
        for source in sources.parse(spec)
        for part in source.parts
        for document in part.documents()
        if document is not None and document.text
    ]
    if not documents:
        raise UserError(f"{spec}: holds no text")
    return documents


def _found(directory: str) -> list[tuple[str, str]]:
    """(preset, path) of the sets in a directory."""
    out = []
    for name in PRESETS:
        files = [name + suffix + c for suffix in SUFFIXES for c in ("", *sources.COMPRESSED)]
        paths = [Path(directory) / found for found in (name, *files)]
        out += [(name, str(path)) for path in paths if path.exists()][:1]
    if not out:
        names = ", ".join(PRESETS)
        raise UserError(f"zero-shot:{directory}: none of {names} (.txt, .jsonl, .parquet) is there")
    return out


def _reader(path: str) -> str | None:
    """The kind of source that a file is by its name, None if that is unknown."""
    for suffix in sources.COMPRESSED:
        path = path.removesuffix(suffix)
    return SUFFIXES.get(Path(path).suffix)


def _preset(name: str, kind: str, path: str, run: Trained, cutting: Cutting) -> TextSet:
    preset = PRESETS[kind]
    if Path(path).is_dir():
        files = [str(file) for file in sorted(Path(path).iterdir()) if _reader(file.name)]
        if not files:
            raise UserError(f"{name}: no .txt, .jsonl or .parquet file in {path}")
    else:
        files = [file for file, _ in sources.files(name, path)]
    texts: list[str] = []
    for file in files:
        reader = _reader(file)
        if reader is None:
            raise UserError(
                f"{name}: {file} could be plain text or rows; its name must end in "
                f"{', '.join(SUFFIXES)}, or these and {', '.join(sources.COMPRESSED)}"
            )
        for text in read(f"{reader}:{glob.escape(file)}"):
            by_line = reader == "text" and preset.unit == "line"
            texts += _lines(text) if by_line else [text]
    clean = [preset.detokenise(text) for text in texts]
    rules = f"{kind}@{preset.version}"
    return _tokenised(name, rules, clean, run, cutting, stream=preset.layout == "stream")


def _lines(text: str) -> list[str]:
    r"""The lines that hold something; a line is what ends in \n."""
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def _tokenised(
    name: str, rules: str, texts: list[str], run: Trained, cutting: Cutting, *, stream: bool
) -> TextSet:
    ids = run.tokenizer.encode_batch(texts)
    n_bytes: int | None = sum(len(text.encode()) for text in texts)
    for text, tokens in zip(texts, ids, strict=True):
        try:
            tokenizers.check_lossless(run.tokenizer, text, tokens)
        except UserError:
            n_bytes = None
            break
    number = np.repeat(np.arange(len(ids)), [len(i) for i in ids])
    if stream:
        end = [run.eos_id] if run.eos_id >= 0 else []
        ids = [np.append(i, np.array(end, i.dtype)) for i in ids]
        number = np.repeat(np.arange(len(ids)), [len(i) for i in ids])
        ids = [np.concatenate(ids)]
    return _windows(
        name,
        rules=rules,
        ids=ids,
        number=number,
        run=run,
        cutting=cutting,
        texts=len(texts),
        n_bytes=n_bytes,
    )


def _prepared(name: str, run: Trained, cutting: Cutting) -> TextSet:
    data = manifest.load(name)
    if run.has_tokenizer and data.tokenizer_hash != run.tokenizer.hash:
        raise UserError(
            f"{name} was prepared with tokenizer {data.request.tokenizer} ({data.tokenizer_hash}), "
            f"the run with {run.tokenizer.spec} ({run.tokenizer.hash}); give its text as text:GLOB "
            "instead"
        )
    if data.vocab_size != run.config.model.vocab_size:
        raise UserError(
            f"{name} has {data.vocab_size} token ids, the run {run.config.model.vocab_size}"
        )
    blocks = loader.eval_blocks(data, cutting.split, cutting.examples)
    n_bytes = int(blocks.n_bytes.sum())
    size = run.config.data.seq_len
    if (data.seq_len, cutting.stride, cutting.context) == (size, size, 0):
        windows = Windows(list(blocks.tokens), np.zeros(len(blocks.tokens), np.int32))
        texts = len(np.unique(blocks.doc))
        return TextSet(
            name=name,
            rules=cutting.split,
            windows=windows,
            doc=blocks.doc,
            texts=texts,
            n_bytes=n_bytes,
            stride=size,
            context=0,
        )
    if cutting.examples:
        raise UserError(
            f"{name}: blocks of {data.seq_len} tokens, picked with gaps, cannot be cut again with "
            f"stride {cutting.stride} and context {cutting.context}; add --examples 0 for the whole split"
        )
    stream, number = blocks.tokens.reshape(-1), np.repeat(blocks.doc, data.seq_len)
    found = len(np.unique(blocks.doc))
    return _windows(
        name,
        rules=cutting.split,
        ids=[stream],
        number=number,
        run=run,
        cutting=cutting,
        texts=found,
        n_bytes=n_bytes,
    )


def _windows(
    name: str, rules: str, ids: list[np.ndarray], number, run: Trained, cutting: Cutting, **counts
) -> TextSet:
    """Args: number: int [tokens of all ids], the text that each token belongs to."""
    tokens, starts, texts_of, at = [], [], [], 0
    for stream in ids:
        size = run.config.data.seq_len
        for begin, start, stop in cut(len(stream), size, cutting.stride, cutting.context):
            tokens.append(np.asarray(stream[begin:stop], np.int32))
            starts.append(start - begin)
            texts_of.append(number[at + start])
        at += len(stream)
    if not tokens:
        raise UserError(f"{name}: holds no text")
    windows = Windows(tokens, np.array(starts, np.int32))
    return TextSet(
        name=name,
        rules=rules,
        windows=windows,
        doc=np.array(texts_of),
        stride=cutting.stride,
        context=cutting.context,
        **counts,
    )
