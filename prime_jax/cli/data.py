"""`prime-jax data`: prepare, inspect, entropy, codes."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prime_jax.cli.console import Progress, say, show, write
from prime_jax.cli.parse import Arguments
from prime_jax.data import manifest as manifests
from prime_jax.data.manifest import Request
from prime_jax.errors import UserError
from prime_jax.runtime import outputs
from prime_jax.settings import REQUIRED, setting
from prime_jax.table import Table

PREPARED = "made by `prime-jax data prepare`"
SPECS = """
SOURCE, where GLOB may be gs://... and .gz, .zst, .bz2 and .xz files are decompressed:
  pysource             the sources of Python's standard library, one document per file
  text:GLOB            one document per file
  stream:GLOB          uncompressed files joined to one text, split by position (text8)
  jsonl:GLOB           one document per line, under the key "text" (jsonl.KEY:GLOB: under KEY)
  parquet:GLOB         one document per row, in the column "text" (parquet.KEY:GLOB: in KEY)
  tfds:NAME            a prepared TensorFlow dataset (tfds.KEY:NAME: the feature KEY)
  markov:V=16,order=1  synthetic sequences with known entropy
  A*0.7+B*0.3          a mixture of sources, as fractions of the tokens

SPEC:
  bytes                256 byte values and an end-of-text id
  bpe:N, unigram:N     a sentencepiece tokenizer with N ids, trained on this source
  sentencepiece:PATH   a sentencepiece model
  hf:PATH              a Hugging Face tokenizer.json
  tiktoken:PATH        a rank file that splits text as GPT-2 does, or GPT-2's encoder.json; others
                       as tiktoken:cl100k_base:PATH (GPT-4, Llama 3), tiktoken:o200k_base:PATH
  chars:27             a to z and space (text8); chars:27+eos adds an end-of-text id
  synthetic:V          ids written as numbers, for markov sources; synthetic:V+eos adds one more
"""


@dataclass(frozen=True)
class Prepare(Arguments):
    """Tokenise a source into blocks of tokens. All other commands read the prepared data. After an
    interruption the same command continues."""

    NOTES = SPECS
    EXAMPLES = (
        "prime-jax data prepare pysource --tokenizer bytes --seq-len 64 --out data/quickstart",
        "prime-jax data prepare 'text:books/*.txt' --tokenizer bpe:8192 --out data/books",
    )

    request: Request = setting(REQUIRED, "what is made")
    out: Path = setting(REQUIRED, "local folder to make", metavar="DIR")
    workers: int = setting(0, "number of processes; 0: one per core", at_least=0)


def prepare(args: Prepare) -> None:
    from prime_jax.data.prepare import prepare

    finished = (args.out / manifests.FILE).exists()
    request = {f.name: getattr(args.request, f.name) for f in dataclasses.fields(args.request)}
    with Progress(transient=True) as progress:
        shown = {"tick": progress.tick, "log": progress.log}
        made = prepare(**request, out=args.out, workers=args.workers, **shown)
    rate = f"{made.tokens_per_second:,.0f} tokens/s"
    say(f"{args.out} is already prepared" if finished else f"{args.out}: {rate}")
    _show_summary(made)


@dataclass(frozen=True)
class Inspect(Arguments):
    """Show what a prepared dataset was made from, the size of each split, statistics of its tokens and
    the first block as text."""

    EXAMPLES = ("prime-jax data inspect data/quickstart --verify",)

    dir: Path = setting(REQUIRED, PREPARED, positional=True)
    verify: bool = setting(False, "also read every record and check its hash")
    json: bool = setting(False, "print one JSON object")


def inspect(args: Inspect) -> None:
    from prime_jax.data import loader

    manifest = manifests.load(args.dir, verify=args.verify)
    statistics = _statistics(manifest)
    block = loader.eval_blocks(manifest, "train", 1)
    sample = manifest.tokenizer().decode(block.tokens[0])
    if args.json:
        about = dataclasses.asdict(manifest)
        write(json.dumps(about | {"statistics": statistics, "sample": sample}, indent=2))
        return
    _show_summary(manifest)
    for name, value in statistics.items():
        say(f"{name.replace('_', ' '):24} {value:,.4g}")
    say(f"\nfirst block of the train split (document {block.doc[0]}):\n{sample}")


def _statistics(manifest: Any) -> dict[str, float]:
    from prime_jax.data.entropy import entropy_bits

    counts, train = manifest.unigram(), manifest.train
    return {
        "unigram_entropy_bits": entropy_bits(counts),
        "bytes_per_token": train.bytes / train.tokens,
        "tokens_per_document": (train.tokens + train.dropped_tokens) / train.documents,
        "ids_used": int((counts > 0).sum()),
        "most_frequent_share": float(counts.max() / counts.sum()),
    }


def _show_summary(manifest: Any) -> None:
    request = manifest.request
    say(f"source {request.source}, tokenizer {request.tokenizer} ({manifest.tokenizer_hash})")
    say(
        f"vocabulary {manifest.vocab_size}, EOS {manifest.eos_policy} ({manifest.eos_id}), blocks "
        f"of {manifest.seq_len} {manifest.dtype}, fingerprint {manifest.fingerprint}"
    )
    if manifest.skipped or manifest.empty:
        say(f"left out: {manifest.skipped} documents not valid text, {manifest.empty} empty")
    rows = []
    for name in ("train", "valid", "test"):
        split = manifest.split(name)
        numbers = (split.documents, split.blocks, split.tokens, split.bytes, split.dropped_tokens)
        rows.append([name, *(f"{n:,}" for n in numbers), str(len(split.shards))])
    show(
        Table(("split", "documents", "blocks", "tokens", "bytes", "dropped tokens", "shards"), rows)
    )


@dataclass(frozen=True)
class Entropy(Arguments):
    """Show how evenly sub-tokens are used for each length and shuffling: mean sub-token entropy, total
    correlation and mutual information, in bits. It needs no training and helps to choose
    --subtokens.length."""

    EXAMPLES = ("prime-jax data entropy data/quickstart -l 1 2 4 8",)

    dir: Path = setting(REQUIRED, PREPARED, positional=True)
    length: tuple[int, ...] = setting(
        (1, 2, 4, 8), "sub-tokens per token", at_least=1, at_most=32, alias="-l", metavar="L"
    )
    seed: int = setting(0, "seed of the permutation", at_least=0)
    json: bool = setting(False, "print one JSON object")


def entropy(args: Entropy) -> None:
    from prime_jax.config import SubtokenConfig
    from prime_jax.data.entropy import SHUFFLES, entropies

    counts = manifests.load(args.dir).unigram()
    rows = [
        [entropies(counts, SubtokenConfig(n, shuffle, "vocab", args.seed)) for shuffle in SHUFFLES]
        for n in args.length
    ]
    if args.json:
        write(json.dumps({"entropies": [dataclasses.asdict(e) for row in rows for e in row]}))
        return
    say(f"entropy of a token: {rows[0][0].token:.4f} bits; shuffling: identity, 25 %, full")
    _show_entropies(rows, "mean sub-token entropy", "mean", limit=True)
    _show_entropies(rows, "total correlation (slots less token)", "total_correlation")
    _show_entropies(rows, "mutual information of two slots, mean", "mutual_information")


def _show_entropies(rows: list, title: str, name: str, *, limit: bool = False) -> None:
    cells = []
    for row in rows:
        values = [getattr(e, name) for e in row] + [row[0].maximum] * limit
        cells.append([str(row[0].length), str(row[0].base), *(f"{v:.4f}" for v in values)])
    head = ("l", "b", "identity", "25 %", "full", *["maximum"] * limit)
    show(Table(head, cells, title=f"{title}, bits"))


@dataclass(frozen=True)
class Codes(Arguments):
    """Give every token a code, whose l digits are its sub-tokens, and show statistics of the corpus
    under these codes. A run takes them with --subtokens.codes-file. The file codes.json beside FILE
    names their tokenizer.

    METHOD: identity (an id is its code), shuffle (drawn from --seed), frequency (the rank of the
    id), cluster (words that occur in the same contexts share leading digits)."""

    EXAMPLES = (
        "prime-jax data codes data/quickstart --method cluster -l 3 --out data/quickstart/codes.npy",
    )

    dir: Path = setting(REQUIRED, PREPARED, positional=True)
    method: Literal["identity", "shuffle", "frequency", "cluster"] = setting(
        REQUIRED, "identity, shuffle, frequency or cluster", metavar="METHOD"
    )
    length: int = setting(
        REQUIRED, "sub-tokens per token", at_least=1, at_most=32, alias="-l", metavar="L"
    )
    out: Path = setting(REQUIRED, "file to write (.npy)", metavar="FILE")
    seed: int = setting(0, "seed of the method shuffle", at_least=0)
    words: int = setting(8, "example tokens shown for each leading digit", at_least=1)
    branches: int = setting(16, "number of leading digits shown", at_least=1)
    json: bool = setting(False, "print one JSON object")


def codes(args: Codes) -> None:
    from prime_jax.data import clusters
    from prime_jax.data import codes as files
    from prime_jax.runtime import storage
    from prime_jax.runtime.records import write_json_atomic

    manifest = manifests.load(args.dir)
    about = files.about_file(args.out)
    if about == args.out or args.out.suffix != ".npy":
        raise UserError(f"--out {args.out}: must end in .npy")
    made = {args.dir / name for name in (manifests.UNIGRAM, manifests.TOKEN_BYTES, manifests.FILE)}
    outputs.refuse_overwrite([*made, args.dir / "tokenizer.json"], [args.out, about])
    for file in (args.out, about):
        outputs.check_file(file)
    with Progress(transient=True) as progress:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress.show("reading", "train split", None, done)

        book = clusters.make(manifest, args.method, args.length, args.seed, tick)
        found = clusters.describe(manifest, book, args.words, args.branches)
    record = {"tokenizer": manifest.tokenizer_hash, "vocab_size": manifest.vocab_size}
    record |= {"data": manifest.fingerprint, "method": args.method, "seed": args.seed}
    record |= dataclasses.asdict(found)
    storage.write(args.out, files.as_bytes(book))
    write_json_atomic(about, record)
    if args.json:
        write(json.dumps(record))
        return
    _show_codes(found)
    flags = f"--subtokens.codes-file {args.out} --subtokens.length {args.length}"
    say(f"wrote {args.out} and {about}; train with {flags}")


def _show_codes(found: Any) -> None:
    """Entropies of the sub-tokens, and the first branches as words."""
    e = found.entropies
    rows = [[str(slot + 1), f"{bits:.4f}"] for slot, bits in enumerate(e.slots)]
    notes = (
        f"at most log2 {e.base} = {e.maximum:.4f}; a token has {e.token:.4f} bits, total correlation "
        f"{e.total_correlation:.4f}, mutual information of two slots {e.mutual_information:.4f}",
        f"mutual information of the leading digits of neighbours: {found.neighbours:.4f} bits",
    )
    show(Table(("sub-token", "entropy, bits"), rows, notes, title=f"codes {found.hash}"))
    rows = [
        [str(b.digit), f"{b.tokens:,}", f"{100 * b.share:.1f} %", " ".join(map(repr, b.words))]
        for b in found.branches
    ]
    show(Table(("leading digit", "tokens", "of the corpus", "most frequent"), rows))
