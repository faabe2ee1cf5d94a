"""`prime-jax export` and `prime-jax import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prime_jax.cli.console import say
from prime_jax.cli.parse import Arguments
from prime_jax.cli.runs import RUN
from prime_jax.config import Family, ModelConfig
from prime_jax.errors import UserError
from prime_jax.settings import REQUIRED, hints, setting

if TYPE_CHECKING:
    from prime_jax.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Export(Arguments):
    """Write the weights of RUN as safetensors (linear weights [out, in], vocabulary rows by token
    id), its settings and permutation, and its tokenizer. The folder is a RUN."""

    EXAMPLES = ("prime-jax export quickstart:3f9a exported",)

    run: str = setting(REQUIRED, RUN, positional=True)
    out: Path = setting(REQUIRED, "new folder", positional=True)
    format: Literal["safetensors"] = setting("safetensors", "the only one so far")


def export(args: Export) -> None:
    from prime_jax.cli import runs
    from prime_jax.interchange import folder

    run = runs.load(args.run)
    tokenizer = None
    if run.data is not None or (run.path / "tokenizer.json").exists():
        tokenizer = run.tokenizer
    else:
        say(f"no tokenizer written: {run.config.data.path} is not on this machine")
    tensors = folder.from_params(run.params, run.codebook)
    weights = folder.Weights(run.config, run.codebook, tensors, run.step, run.eos_id)
    folder.write(weights, args.out, tokenizer)
    _show(weights, args.out)


@dataclass(frozen=True)
class Import(Arguments):
    """Read weights from another system into the folder OUT, which every command takes as RUN. FILE
    is .safetensors, or what torch.save wrote (.pth, .pt, .bin), of which only tensors are read.
    Sizes come from the shapes of the tensors; unknown, missing or misshapen ones are listed. What
    lit_gpt and megatron files cannot say is given by options."""

    NOTES = """
LAYOUT:  lit_gpt       SMDM and MDM-Prime-v2 on SlimPajama: transformer.h.0.attn.attn.weight, ...
         megatron      the C4 grid: encoder.layers.0.self_attention.linear_qkv.weight, ...
         safetensors   a folder or model.safetensors that `prime-jax export` wrote
How each layout is read: docs/interchange.md.
"""
    EXAMPLES = (
        "prime-jax import lit_gpt model.safetensors prime-1b --heads 14 "
        "--permutation perm_32768.pt \\\n      --tokenizer sentencepiece:llama/tokenizer.model",
    )

    layout: Literal["lit_gpt", "megatron", "safetensors"] = setting(
        REQUIRED, "how FILE names its tensors, see below", positional=True
    )
    file: Path = setting(REQUIRED, "the weights, see above", positional=True)
    out: Path = setting(REQUIRED, "new folder", positional=True)
    family: Family | None = setting(None, "of the model (default: by the shapes)")
    vocab_size: int | None = setting(None, "ids; more rows are padding", at_least=1, metavar="V")
    heads: int | None = setting(None, "query heads (without qk-norm)", at_least=1, metavar="H")
    length: int | None = setting(None, "sub-tokens per token", at_least=1, at_most=32, metavar="l")
    embedding: hints(ModelConfig)["embedding"] | None = setting(
        None, "of the sub-tokens of a token (default: by the shapes)"
    )
    permutation: Path | None = setting(
        None, ".npy or .pt: the code of each id (default: identity)", metavar="FILE"
    )
    bos: int | None = setting(
        None,
        "ARM: id that opens a sequence (default: 1, Llama's; megatron: the last id, GPT-2's)",
        at_least=0,
        metavar="ID",
    )
    seq_len: int = setting(2048, "tokens of a block", at_least=1)
    rope_tables: Literal["float32", "bfloat16"] = setting(
        "float32", "precision of RoPE's cosines and sines; lit_gpt trained with bfloat16"
    )
    tokenizer: str | None = setting(
        None, "sentencepiece:PATH, hf:PATH, tiktoken:PATH, ...", metavar="SPEC"
    )


def import_(args: Import) -> None:
    from prime_jax.interchange import folder, published, tensors

    if args.layout == "safetensors":
        weights, tokenizer = _exported(args.file)
    else:
        tokenizer = _tokenizer(args.tokenizer)
        facts = published.Facts(
            family=args.family,
            vocab_size=args.vocab_size or (tokenizer.vocab_size if tokenizer else None),
            heads=args.heads,
            length=args.length,
            embedding=args.embedding,
            bos=args.bos,
            codes=tensors.open_integers(args.permutation) if args.permutation else None,
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
    known = (directory / "tokenizer.json").exists()
    return folder.read(directory), tokenizers.load(directory) if known else None


def _tokenizer(spec: str | None) -> "Tokenizer | None":
    from prime_jax.data import tokenizers

    if spec is None:
        return None
    if spec.partition(":")[0] in ("bpe", "unigram"):
        raise UserError(f"--tokenizer {spec}: would be trained anew; give the model's own file")
    return tokenizers.make(spec, lambda _: ())


def _show(weights: Any, out: Path) -> None:
    from prime_jax.config import run_id

    m, book = weights.config.model, weights.codebook
    count = sum(x.size for x in weights.tensors.values())
    say(
        f"{out}: {weights.config.family} {run_id(weights.config)}, {count:,} numbers, "
        f"{m.layers} layers x {m.width} x {m.heads} heads, {m.vocab_size} ids, l = {book.length}, "
        f"b = {book.base}, permutation {book.hash}"
    )
