"""`prime-jax export` and `prime-jax import`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prime_jax.cli.console import Table, say, show
from prime_jax.cli.parse import Arguments
from prime_jax.cli.runs import RUN
from prime_jax.config import Family, ModelConfig
from prime_jax.errors import UserError
from prime_jax.settings import REQUIRED, hints, setting

if TYPE_CHECKING:
    import numpy as np

    from prime_jax.data.tokenizers import Tokenizer

LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


@dataclass(frozen=True)
class Export(Arguments):
    """Write the weights of RUN as safetensors (linear weights [out, in], vocabulary rows by token
    id), its settings and permutation, and its tokenizer. Every command takes the new folder as RUN.

    With --format hf the folder is also one for Hugging Face's transformers: it holds the network in
    PyTorch, which AutoModelForCausalLM (ARM) and AutoModelForMaskedLM (MDM, Prime) load with
    trust_remote_code, Hugging Face's form of the tokenizer, and a model card. Needs
    prime_jax[tokenizers]; PyTorch is not needed."""

    EXAMPLES = (
        "prime-jax export quickstart:3f9a exported",
        "prime-jax export RUN for-the-hub --format hf --license apache-2.0",
    )

    run: str = setting(REQUIRED, RUN, positional=True)
    out: Path = setting(REQUIRED, "new folder", positional=True)
    format: Literal["safetensors", "hf"] = setting("safetensors", "kind of folder")
    license: str = setting(
        "",
        "with --format hf: licence of the weights as the Hub names it, for the model card (default: "
        "unknown)",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.license and self.format != "hf":
            raise UserError(f"--license {self.license}: only --format hf writes a model card")
        if self.license and not LICENSE.fullmatch(self.license):
            raise UserError(f"--license {self.license}: must be a name such as apache-2.0")


def export(args: Export) -> None:
    from prime_jax.cli import runs
    from prime_jax.evaluate import trained
    from prime_jax.interchange import folder, hf
    from prime_jax.runtime import storage
    from prime_jax.runtime.records import read_json

    run = runs.load(args.run)
    tokenizer = run.tokenizer if run.has_tokenizer else None
    missing = "" if tokenizer else f"the run holds none, and {run.config.data.path} is not here"
    weights = trained.weights(run)
    if args.format == "hf":
        records = (directory / "result.json" for directory in runs.attempts(args.run))
        record = next((read_json(file) for file in records if storage.exists(file)), None)
        license = args.license or hf.UNKNOWN
        missing = hf.write(weights, args.out, tokenizer, record, license) or missing
    else:
        folder.write(weights, args.out, tokenizer)
    if missing:
        say(f"no tokenizer written: {missing}")
    _show(weights, args.out)


@dataclass(frozen=True)
class Import(Arguments):
    """Read weights of another system into the folder OUT, which every command takes as RUN. FILE is
    .safetensors, or a file of torch.save (.pth, .pt, .bin), from which only tensors are read. Sizes
    are inferred from the shapes of the tensors; unknown, missing or misshapen tensors are listed.
    Options give what lit_gpt and megatron files do not contain."""

    NOTES = """
LAYOUT:  lit_gpt       SMDM and MDM-Prime-v2 on SlimPajama: transformer.h.0.attn.attn.weight, ...
         megatron      the C4 grid: encoder.layers.0.self_attention.linear_qkv.weight, ...
         safetensors   a folder or model.safetensors that `prime-jax export` wrote
How each layout is read: docs/interchange.md.
"""
    EXAMPLES = (
        "prime-jax import lit_gpt model.safetensors prime-1b --heads 14 "
        "--permutation perm_32768.pt \\\n      --tokenizer sentencepiece:llama/tokenizer.model "
        "--rope-tables bfloat16",
    )

    layout: Literal["lit_gpt", "megatron", "safetensors"] = setting(
        REQUIRED, "naming of the tensors in FILE, see below", positional=True
    )
    file: Path = setting(REQUIRED, "the weights, see above", positional=True)
    out: Path = setting(REQUIRED, "new folder", positional=True)
    family: Family | None = setting(None, "family of the model (default: from the shapes)")
    vocab_size: int | None = setting(
        None,
        "number of token ids; further rows are padding (default: that of the tokenizer)",
        at_least=2,
        metavar="V",
    )
    heads: int | None = setting(
        None, "query heads; needed if there is no qk-norm", at_least=1, metavar="H"
    )
    length: int | None = setting(None, "sub-tokens per token", at_least=1, at_most=32, metavar="l")
    embedding: hints(ModelConfig)["embedding"] | None = setting(
        None, "kind of sub-token embedding (default: from the shapes)"
    )
    permutation: Path | None = setting(
        None,
        "for Prime: file (.npy or .pt) with the code of each id, or identity if ids are their own codes",
        metavar="FILE",
    )
    bos: int | None = setting(
        None,
        "for ARM: id that begins a sequence (default: 1 as in Llama; megatron: the last id as in GPT-2)",
        at_least=0,
        metavar="ID",
    )
    seq_len: int | None = setting(None, "tokens per sequence (default: 2048)", at_least=1)
    rope_tables: Literal["float32", "bfloat16"] | None = setting(
        None,
        "precision of RoPE's cosines and sines (default: float32); the lit_gpt runs used bfloat16",
    )
    tokenizer: str | None = setting(
        None,
        "tokenizer of the model: sentencepiece:PATH, hf:PATH, tiktoken:PATH, ...",
        metavar="SPEC",
    )


def import_(args: Import) -> None:
    from prime_jax.interchange import folder, published, tensors

    if args.layout == "safetensors":
        weights, tokenizer = _exported(args.file)
    else:
        tokenizer = _tokenizer(args.tokenizer)
        ids = tokenizer.vocab_size if tokenizer else args.vocab_size
        if args.vocab_size not in (None, ids):
            raise UserError(f"--vocab-size {args.vocab_size}: the tokenizer has {ids} ids")
        facts = published.Facts(
            family=args.family,
            vocab_size=ids,
            heads=args.heads,
            length=args.length,
            embedding=args.embedding,
            bos=args.bos,
            codes=_codes(args.permutation),
            permutation=str(args.permutation),
            seq_len=args.seq_len,
            rope_tables=args.rope_tables,
            **({"eos_id": tokenizer.eos_id} if tokenizer else {}),
        )
        found = tensors.open_weights(args.file)
        weights = published.convert(args.layout, str(args.file), found, facts, args.out)
    folder.write(weights, args.out, tokenizer)
    _show(weights, args.out)


def _exported(file: Path) -> "tuple[Any, Tokenizer | None]":
    from prime_jax.data import tokenizers
    from prime_jax.interchange import folder

    directory = file if file.is_dir() else file.parent
    if not folder.is_exported(directory) or (file.is_file() and file.name != folder.WEIGHTS):
        raise UserError(f"{file}: give a folder with {folder.WEIGHTS} and {folder.CONFIG}")
    weights = folder.read_again(directory)
    if not (directory / tokenizers.FILE).exists():
        return weights, None
    tokenizer = tokenizers.load(directory)
    tokenizers.check_size(tokenizer, weights.config.model.vocab_size, str(directory))
    return weights, tokenizer


def _codes(permutation: Path | None) -> "np.ndarray | None":
    """The codes of --permutation; none of them for the identity."""
    import numpy as np

    from prime_jax.interchange import tensors

    if permutation is None or permutation == Path("identity"):
        return None if permutation is None else np.empty(0, np.int64)
    return tensors.open_integers(permutation)


def _tokenizer(spec: str | None) -> "Tokenizer | None":
    from prime_jax.data import tokenizers

    if spec is None:
        return None
    if spec.partition(":")[0] in ("bpe", "unigram"):
        raise UserError(f"--tokenizer {spec}: would be trained anew; give the model's own file")
    return tokenizers.make(spec, lambda _: ())


def _show(weights: Any, out: Path) -> None:
    """What the model is, and what was assumed of it."""
    from prime_jax.config import run_id

    c, m, book = weights.config, weights.config.model, weights.codebook
    count = sum(x.size for x in weights.tensors.values())
    groups = f" in {m.kv_heads} groups" if m.kv_heads else ""
    rows = (
        ("run", f"{run_id(c)}, family {c.family}, step {weights.step}"),
        ("weights", f"{weights.hash}, {count:,} numbers"),
        ("blocks", f"{m.layers} of width {m.width}, feed-forward {m.ffn}"),
        ("attention", f"{m.heads} heads{groups}{', qk-norm' if m.qk_norm else ''}"),
        (
            "vocabulary",
            f"{m.vocab_size} ids, EOS {weights.eos_id if weights.eos_id >= 0 else 'none'}",
        ),
        ("sub-tokens", f"l = {book.length}, b = {book.base}, embedding {m.embedding}"),
        (
            "codes",
            f"{book.hash}{' (identity)' if (book.codes == range(len(book.codes))).all() else ''}",
        ),
        *(("assumed", line) for line in weights.assumed),
    )
    show(Table(("", ""), rows, title=str(out)))
