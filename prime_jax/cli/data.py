"""`prime-jax data`: prepare, inspect, entropy."""

import argparse
import json
from typing import Any

DESCRIPTION = """Prepare text once into blocks of tokens; everything else reads the prepared data.

sources:     pysource | text:GLOB | stream:GLOB | jsonl:GLOB | parquet:GLOB | tfds:NAME |
             markov:V=16,order=1,... | A*0.7+B*0.3 (fractions of the tokens)
             GLOB may be gs://...; .gz, .zst, .bz2 and .xz are read as they are
tokenizers:  bpe:N | unigram:N (trained here) | bytes | sentencepiece:PATH | hf:PATH |
             tiktoken:PATH | chars:27 | synthetic:V
"""
PREPARED = "made by `prime-jax data prepare`"


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add `data` and its three commands."""
    data = subparsers.add_parser(
        "data",
        help="prepare and inspect datasets",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)

    prepare = commands.add_parser(
        "prepare",
        help="tokenize a source into blocks",
        description=DESCRIPTION + "\nRun it again to go on after an interruption.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prepare.add_argument("source", metavar="SOURCE", help="what text to read, see above")
    prepare.add_argument(
        "--tokenizer",
        required=True,
        metavar="SPEC",
        help="what makes ids of it, see above (required)",
    )
    prepare.add_argument(
        "--out", required=True, metavar="DIR", help="local folder to make (required)"
    )
    prepare.add_argument("--seq-len", type=int, default=128, help="tokens of a block (128)")
    prepare.add_argument("--valid-fraction", type=float, default=0.05, help="of documents (0.05)")
    prepare.add_argument("--test-fraction", type=float, default=0.05, help="of documents (0.05)")
    prepare.add_argument("--max-documents", type=int, default=0, help="of each source; 0: all")
    prepare.add_argument("--max-bytes", type=int, default=0, help="of each source; 0: all")
    prepare.add_argument("--seed", type=int, default=0, help="of the split (0)")
    prepare.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    prepare.set_defaults(run=run_prepare)

    inspect = commands.add_parser(
        "inspect",
        help="what a prepared dataset holds",
        description="Prints what DIR was made of, its sizes split by split, statistics of its "
        "tokens and the first block as text.",
    )
    inspect.add_argument("dir", metavar="DIR", help=PREPARED)
    inspect.add_argument("--verify", action="store_true", help="also read and hash every record")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=run_inspect)

    entropy = commands.add_parser(
        "entropy",
        help="how evenly sub-tokens of each length are used, by shuffling",
        description="Mean sub-token entropy, total correlation and mutual information, in bits.",
    )
    entropy.add_argument("dir", metavar="DIR", help=PREPARED)
    entropy.add_argument(
        "-l",
        "--length",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="sub-tokens per token, 1 to 32 (1 2 4 8)",
    )
    entropy.add_argument("--seed", type=int, default=0, help="of the permutation (0)")
    entropy.add_argument("--json", action="store_true", help="print one JSON object")
    entropy.set_defaults(run=run_entropy)


def run_prepare(args: argparse.Namespace) -> int | None:
    from pathlib import Path

    from prime_jax.data import manifest as manifests
    from prime_jax.data.prepare import prepare

    names = ("valid_fraction", "test_fraction", "max_documents", "max_bytes", "seed", "workers")
    options = {name: getattr(args, name) for name in names}
    finished = (Path(args.out) / manifests.FILE).exists()
    try:
        manifest = prepare(args.source, args.tokenizer, args.out, args.seq_len, **options)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on")
        return 130
    rate = f"{manifest.tokens_per_second:,.0f} tokens/s"
    print(f"{args.out} is already prepared" if finished else f"{args.out}: {rate}")
    _print_summary(manifest)
    return None


def run_inspect(args: argparse.Namespace) -> None:
    import dataclasses

    from prime_jax.data import loader
    from prime_jax.data import manifest as manifests

    manifest = manifests.load(args.dir, verify=args.verify)
    statistics = _statistics(manifest)
    block = loader.eval_blocks(manifest, "train", 1)
    sample = manifest.tokenizer().decode(block.tokens[0])
    if args.json:
        about = dataclasses.asdict(manifest)
        print(json.dumps(about | {"statistics": statistics, "sample": sample}, indent=2))
        return
    _print_summary(manifest)
    for name, value in statistics.items():
        print(f"{name.replace('_', ' '):24} {value:,.4g}")
    print(f"\nfirst block of the train split (document {block.doc[0]}):\n{sample}")


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


def _print_summary(manifest: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    request = manifest.request
    print(f"source {request.source}, tokenizer {request.tokenizer} ({manifest.tokenizer_hash})")
    print(
        f"vocabulary {manifest.vocab_size}, EOS {manifest.eos_policy} ({manifest.eos_id}), blocks "
        f"of {manifest.seq_len} {manifest.dtype}, fingerprint {manifest.fingerprint}"
    )
    if manifest.skipped or manifest.empty:
        print(f"left out: {manifest.skipped} documents not valid text, {manifest.empty} empty")
    table = Table("split", "documents", "blocks", "tokens", "bytes", "dropped tokens", "shards")
    for name in ("train", "valid", "test"):
        split = manifest.split(name)
        numbers = (split.documents, split.blocks, split.tokens, split.bytes, split.dropped_tokens)
        table.add_row(name, *(f"{n:,}" for n in numbers), str(len(split.shards)))
    Console().print(table)


def run_entropy(args: argparse.Namespace) -> None:
    import dataclasses

    from prime_jax.config import SubtokenConfig
    from prime_jax.data import manifest as manifests
    from prime_jax.data.entropy import SHUFFLES, entropies

    counts = manifests.load(args.dir).unigram()
    rows = [
        [entropies(counts, SubtokenConfig(n, shuffle, "vocab", args.seed)) for shuffle in SHUFFLES]
        for n in args.length
    ]
    if args.json:
        print(json.dumps({"entropies": [dataclasses.asdict(e) for row in rows for e in row]}))
        return
    print(f"entropy of a token: {rows[0][0].token:.4f} bits; shuffling: identity, 25 %, full")
    _print_entropies(rows, "mean sub-token entropy", "mean", limit=True)
    _print_entropies(rows, "total correlation (slots less token)", "total_correlation")
    _print_entropies(rows, "mutual information of two slots, mean", "mutual_information")


def _print_entropies(rows: list, title: str, name: str, *, limit: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    heads = ["l", "b", "identity", "25 %", "full", *["maximum"] * limit]
    table = Table(*heads, title=f"{title}, bits", title_justify="left")
    for row in rows:
        values = [getattr(e, name) for e in row] + [row[0].maximum] * limit
        table.add_row(str(row[0].length), str(row[0].base), *(f"{v:.4f}" for v in values))
    Console().print(table)
