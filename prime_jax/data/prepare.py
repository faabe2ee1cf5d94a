"""Prepare a dataset: tokenize in parallel, then cut the stream of each split into blocks.

Two passes over files in OUT/parts (encode.py, assemble.py). Files are written atomically and each
task ends with a `.json`, so an interruption, even kill -9, loses only unfinished tasks. The result
does not depend on the number of workers. The manifest is written last; then OUT/parts is removed.
"""

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from prime_jax.data import assemble, encode, inputs, parallel, shards, sources, tokenizers
from prime_jax.data import manifest as manifests
from prime_jax.data.manifest import SPLITS, Manifest, Request
from prime_jax.errors import UserError
from prime_jax.runtime import storage
from prime_jax.runtime.records import read_json, write_json_atomic

Tick = Callable[[str, int, int], None]


def prepare(
    source: str,
    tokenizer: str,
    out: str | Path,
    seq_len: int = 128,
    *,
    workers: int = 0,
    tick: Tick = lambda what, total, more: None,
    log: Callable[[str], None] = lambda line: None,
    **options: float,
) -> Manifest:
    """Make the dataset in `out`, continue an interrupted call, or return the finished dataset.

    Args:
        source: see sources.py.
        tokenizer: see tokenizers.py.
        seq_len: tokens of a block.
        workers: processes; 0 for one per core. They are spawned and import the calling script, so
            that needs `if __name__ == "__main__"`, or pass 1.
        tick: receives what is done, of how much, and how much more of it.
        log: receives a line where a finished dataset cannot be compared with its source.
        options: `valid_fraction` and `test_fraction` of the documents, chosen by the hash of their
            text and `seed` (of a stream without documents: its end); `max_documents` and
            `max_bytes` of each source.
    Raises:
        UserError: wrong or empty input, or another than the dataset was made of, a tokenizer that is
            not lossless, a directory with other content, or one that cannot be written.
    """
    request = Request(source, tokenizer, seq_len, **options)
    if workers < 0:
        raise UserError(f"--workers {workers}: must be at least 0")
    if "://" in str(out):
        raise UserError(f"--out {out}: prepare into a local folder, then copy it")
    directory = Path(out)
    if (directory / manifests.FILE).exists():
        return _finished(directory, request, log)
    try:
        begun = (directory / "parts").is_dir()
        if not begun and directory.is_dir() and any(directory.iterdir()):
            raise UserError(f"--out {directory}: not empty and not a dataset; give a new directory")
        (directory / "parts").mkdir(parents=True, exist_ok=True)
        with storage.locked(directory / "parts", f"preparing {directory}"):
            try:
                return _prepare(request, directory, workers or os.cpu_count() or 1, tick)
            except UserError:
                if not _finished_parts(directory):
                    _remove_leftovers(directory)
                raise
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}") from error


def _finished(directory: Path, request: Request, log: Callable[[str], None]) -> Manifest:
    manifest = manifests.load(directory)
    if manifest.request != request:
        raise UserError(
            f"{directory} holds another dataset, made by: {manifest.request.command(directory)}; "
            "choose another --out, or remove it"
        )
    try:
        corpus = sources.parse(request.source)
    except UserError as error:
        log(f"{directory} was prepared earlier, and its source is not here any more: {error}")
        return manifest
    if changed := inputs.changes(directory, _files(request, corpus)):
        raise UserError(
            f"{directory} was prepared from another {request.source}: {changed}; choose another "
            "--out, or remove it"
        )
    shutil.rmtree(directory / "parts", ignore_errors=True)
    return manifest


def _files(request: Request, corpus: list[sources.Source]) -> list[str]:
    """The files that a dataset is made of."""
    file = tokenizers.file_of(request.tokenizer)
    return [*(path for source in corpus for path in source.files), *([file] if file else [])]


def _finished_parts(directory: Path) -> bool:
    return any((directory / "parts").glob("[0-9]*.json"))


def _remove_leftovers(directory: Path) -> None:
    """Remove files that would block another request."""
    shutil.rmtree(directory / "parts", ignore_errors=True)
    for name in ("tokenizer.json", "tokenizer.model"):
        (directory / name).unlink(missing_ok=True)


def _prepare(request: Request, directory: Path, workers: int, tick: Tick) -> Manifest:
    corpus = sources.parse(request.source)
    read = inputs.stamped(_files(request, corpus))
    _check_plan(request, directory, corpus, read)
    tokenizer = _tokenizer(request, directory, corpus)
    endless = corpus[0].endless
    if not endless and tokenizer.eos_id == tokenizers.NO_EOS:
        raise UserError(
            f"source {request.source} has documents, but tokenizer {request.tokenizer} has no EOS "
            f"to end them; use {request.tokenizer}+eos"
        )
    started = time.monotonic()
    parts, encoded = _encode_all(request, directory, corpus, tokenizer.hash, workers, tick)
    pieces = assemble.streams(assemble.mix(parts, [s.weight for s in corpus]) if parts else [])
    _check_enough(request, directory, pieces)
    dtype = encode.stored_dtype(tokenizer.vocab_size)
    tasks = [
        task
        for split, stream in enumerate(pieces)
        for task in assemble.shard_tasks(
            split,
            pieces=stream,
            seq_len=request.seq_len,
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            out=directory,
        )
    ]
    todo = [t for t in tasks if not (Path(f"{t.stem}.json").exists() and t.shard.exists())]
    tick("writing blocks", len(tasks), len(tasks) - len(todo))
    for _ in parallel.run(assemble.assemble_shard, todo, min(workers, len(todo))):
        tick("writing blocks", len(tasks), 1)

    splits = [
        assemble.summary(stream, [t for t in tasks if t.split == i], tokenizer.token_bytes)
        for i, stream in enumerate(pieces)
    ]
    unigram = assemble.counts([t for t in tasks if t.split == 0], tokenizer.vocab_size)
    tables = (
        _table(directory, manifests.UNIGRAM, unigram),
        _table(directory, manifests.TOKEN_BYTES, tokenizer.token_bytes),
    )
    if not (request.max_documents or request.max_bytes):  # else more might be read than is taken
        total = sum(known.size for known in read)
        read = list(inputs.hashed(read, lambda more: tick("identifying the source", total, more)))
    inputs.save(read, directory)
    for leftover in directory.glob(f".*{storage.TEMPORARY}"):  # of a killed process
        leftover.unlink(missing_ok=True)
    eos_policy = "none" if endless else "append"
    identity = (tokenizer.hash, request.seq_len, eos_policy, splits)
    left_out = [read_json(Path(f"{part.stem}.json")) for prefix in parts for part in prefix]
    manifests.save(
        Manifest(
            schema=manifests.SCHEMA,
            request=request,
            fingerprint=manifests.fingerprint(*identity),
            tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            eos_policy=eos_policy,
            seq_len=request.seq_len,
            dtype=dtype,
            skipped=sum(counts["skipped"] for counts in left_out),
            empty=sum(counts["empty"] for counts in left_out),
            train=splits[0],
            valid=splits[1],
            test=splits[2],
            tables=tables,
            tokens_per_second=round(encoded / max(time.monotonic() - started, 1e-9), 1),
        ),
        directory,
    )
    shutil.rmtree(directory / "parts", ignore_errors=True)
    return manifests.load(directory)


def _table(directory: Path, name: str, array: np.ndarray) -> manifests.Table:
    return manifests.Table(name, shards.write_array(directory / name, array))


def _check_plan(
    request: Request, directory: Path, corpus: list[sources.Source], read: list[inputs.Input]
) -> None:
    """Finished parts are reused only for the same request on the same files."""
    parts = repr([(part.args, part.size) for source in corpus for part in source.parts])
    plan = {
        "schema": manifests.SCHEMA,
        "request": dataclasses.asdict(request),
        "inputs": hashlib.sha256(f"{parts}{read}".encode()).hexdigest(),
    }
    path = directory / "parts" / "plan.json"
    changed = path.exists() and read_json(path) != plan
    if changed and not _finished_parts(directory):
        (directory / "tokenizer.json").unlink(missing_ok=True)
    elif changed:
        raise UserError(
            f"{directory} holds an unfinished dataset of other arguments, or its input files "
            "changed; remove it or choose another --out"
        )
    write_json_atomic(path, plan)


def _tokenizer(
    request: Request, directory: Path, corpus: list[sources.Source]
) -> tokenizers.Tokenizer:
    if (directory / "tokenizer.json").exists():
        return tokenizers.load(directory)

    def sample(n_bytes: int) -> Iterator[str]:
        total = sum(source.weight for source in corpus)
        for source in corpus:
            yield from sources.sample(source, round(n_bytes * source.weight / total))

    tokenizer = tokenizers.make(request.tokenizer, sample)
    tokenizer.save(directory)
    return tokenizer


def _encode_all(
    request: Request,
    directory: Path,
    corpus: list[sources.Source],
    tokenizer_hash: str,
    workers: int,
    tick: Tick,
) -> tuple[list[list[assemble.PartPrefix]], int]:
    """First pass: the parts of each source, within the limits, and tokens encoded by this call."""
    stems = [
        [directory / "parts" / f"{i:02d}-{k:06d}" for k in range(len(source.parts))]
        for i, source in enumerate(corpus)
    ]

    def needed() -> Iterator[encode.Encode]:
        for source, row in zip(corpus, stems, strict=True):
            for part, stem in zip(source.parts, row, strict=True):
                if _reached(request, row):
                    break
                if not _done(stem):
                    yield encode.Encode(
                        part=part,
                        stem=stem,
                        dataset=directory,
                        tokenizer_hash=tokenizer_hash,
                        request=request,
                        endless=source.endless,
                    )

    sizes = [part.size for source in corpus for part in source.parts]
    done = [_done(stem) for row in stems for stem in row]
    earlier = sum(size for size, d in zip(sizes, done, strict=True) if d)
    processes = min(workers, sum(not d for d in done))
    encoded = 0
    tick("tokenising", sum(sizes), earlier)
    for task in parallel.run(encode.encode_part, needed(), processes):
        encoded += read_json(Path(f"{task.stem}.json"))["tokens"]
        tick("tokenising", sum(sizes), task.part.size)
    return [_within(request, row) for row in stems], encoded


def _done(stem: Path) -> bool:
    return Path(f"{stem}.json").exists()


def _prefix(stems: list[Path]) -> Iterator[tuple[Path, dict]]:
    """The finished parts before the first unfinished one."""
    for stem in stems:
        if not _done(stem):
            return
        yield stem, read_json(Path(f"{stem}.json"))


def _reached(request: Request, stems: list[Path]) -> bool:
    """Whether the finished parts of a source already reach its limits."""
    limits = {"documents": request.max_documents, "bytes": request.max_bytes}
    if not any(limits.values()):
        return False
    counts = [counts for _, counts in _prefix(stems)]
    return any(limit and sum(c[k] for c in counts) >= limit for k, limit in limits.items())


def _within(request: Request, stems: list[Path]) -> list[assemble.PartPrefix]:
    kept = [assemble.PartPrefix(stem, counts["documents"]) for stem, counts in _prefix(stems)]
    for what, limit in (("documents", request.max_documents), ("bytes", request.max_bytes)):
        if limit:
            kept = assemble.keep_first(kept, what, limit)
    return kept


def _check_enough(request: Request, directory: Path, pieces: list[list[assemble.Piece]]) -> None:
    asked = (True, request.valid_fraction > 0, request.test_fraction > 0)
    documents = sum(piece.documents for stream in pieces for piece in stream)
    for name, stream, wanted in zip(SPLITS, pieces, asked, strict=True):
        tokens = sum(piece.tokens for piece in stream)
        if wanted and tokens < request.seq_len:
            _remove_leftovers(directory)
            what = f"only {tokens} tokens" if documents else "no text"
            raise UserError(
                f"source {request.source}: {what} in the {name} split, less than one block of "
                f"{request.seq_len} ({documents} documents in all); give more text, other "
                f"fractions, or cut one long text by position with stream:PATH"
            )
