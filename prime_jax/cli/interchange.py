"""`prime-jax export` and `prime-jax import`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_jax.cli.runs import RUN
from prime_jax.errors import UserError

if TYPE_CHECKING:
    from prime_jax.data.tokenizers import Tokenizer

IMPORT = """\
Read weights from another system into the folder OUT, which every command takes as RUN.

lit_gpt       SMDM and MDM-Prime-v2 on SlimPajama: transformer.h.0.attn.attn.weight, ...
megatron      the C4 grid: encoder.layers.0.self_attention.linear_qkv.weight, ...
safetensors   a folder or model.safetensors that `prime-jax export` wrote

FILE is .safetensors, or what torch.save wrote (.pth, .pt, .bin), of which only tensors are
read. Sizes come from the shapes of the tensors; unknown, missing or misshapen ones are listed.
What a file cannot say is given by options. How each layout is read: docs/interchange.md.

    prime-jax import lit_gpt model.safetensors prime-1b --heads 14 \\
        --permutation perm_32768.pt --tokenizer sentencepiece:llama/tokenizer.model
"""


def register(subparsers: Any) -> None:
    export = subparsers.add_parser(
        "export",
        help="write a finished run as model.safetensors, config.json and tokenizer",
        description="Write the weights of RUN as safetensors (linear weights [out, in], vocabulary "
        "rows by token id), its settings and permutation, and its tokenizer. The folder is a RUN.",
    )
    export.add_argument("run_name", metavar="RUN", help=RUN)
    export.add_argument("out", type=Path, metavar="OUT", help="new folder")
    export.add_argument(
        "--format",
        choices=("safetensors",),
        default="safetensors",
        help="the only one so far (safetensors)",
    )
    export.set_defaults(run=run_export)

    read = subparsers.add_parser(
        "import",
        help="read published or exported weights into a folder that is a RUN",
        description=IMPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    read.add_argument(
        "layout", choices=("lit_gpt", "megatron", "safetensors"), help="how FILE names its tensors"
    )
    read.add_argument("file", type=Path, metavar="FILE", help="the weights, see above")
    read.add_argument("out", type=Path, metavar="OUT", help="new folder")
    facts = read.add_argument_group("what lit_gpt and megatron files do not say")
    facts.add_argument("--family", choices=("arm", "mdm", "prime"), help="default: by the shapes")
    facts.add_argument("--vocab-size", type=int, metavar="V", help="ids; more rows are padding")
    facts.add_argument("--heads", type=int, metavar="H", help="query heads (without qk-norm)")
    facts.add_argument("--length", type=int, metavar="l", help="sub-tokens per token")
    facts.add_argument(
        "--embedding",
        choices=("sum", "cat", "cat_shared"),
        help="of the sub-tokens of a token; default: by the shapes",
    )
    facts.add_argument(
        "--permutation",
        type=Path,
        metavar="FILE",
        help=".npy or .pt: the code of each id (identity)",
    )
    facts.add_argument(
        "--bos",
        type=int,
        metavar="ID",
        help="ARM: id that opens a sequence (1, Llama's; megatron: the last id, GPT-2's)",
    )
    facts.add_argument("--seq-len", type=int, default=2048, help="tokens of a block (2048)")
    facts.add_argument(
        "--rope-tables",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of RoPE's cosines and sines; lit_gpt trained with bfloat16 (float32)",
    )
    facts.add_argument(
        "--tokenizer", metavar="SPEC", help="sentencepiece:PATH, hf:PATH, tiktoken:PATH, ..."
    )
    read.set_defaults(run=run_import)


def run_export(args: argparse.Namespace) -> None:
    from prime_jax.cli import runs
    from prime_jax.interchange import folder

    run = runs.load(args.run_name)
    tokenizer = None
    if run.data is not None or (run.path / "tokenizer.json").exists():
        tokenizer = run.tokenizer
    else:
        print(f"no tokenizer written: {run.config.data.path} is not on this machine")
    tensors = folder.from_params(run.params, run.codebook)
    weights = folder.Weights(run.config, run.codebook, tensors, run.step, run.eos_id)
    folder.write(weights, args.out, tokenizer)
    _say(weights, args.out)


def run_import(args: argparse.Namespace) -> None:
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
    _say(weights, args.out)


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


def _say(weights: Any, out: Path) -> None:
    from prime_jax.config import run_id

    m, book = weights.config.model, weights.codebook
    count = sum(x.size for x in weights.tensors.values())
    print(
        f"{out}: {weights.config.family} {run_id(weights.config)}, {count:,} numbers, "
        f"{m.layers} layers x {m.width} x {m.heads} heads, {m.vocab_size} ids, l = {book.length}, "
        f"b = {book.base}, permutation {book.hash}"
    )
