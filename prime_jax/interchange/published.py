"""Weights of the published layouts: inference of the model from shapes, and conversion.

`lit_gpt` is the layout of the SlimPajama code (also of SMDM), `megatron` that of the C4 grid. Model
settings are inferred from the shapes; what cannot be inferred must be given. Training settings are
not in a file: the result has this package's defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prime_jax.config import DataConfig, Family, ModelConfig, RunConfig, SubtokenConfig, validate
from prime_jax.data.tokenizers import NO_EOS
from prime_jax.errors import UserError
from prime_jax.interchange import folder
from prime_jax.interchange.layouts import (
    LIT_GPT,
    MEGATRON,
    Layout,
    Shape,
    body,
    body_tensors,
    check,
    megatron_names,
)
from prime_jax.interchange.tensors import Tensor
from prime_jax.subtokens import Codebook, base

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Facts:
    """Information that is not in a file. None: infer from the shapes, or raise if ambiguous.

    Attributes:
        vocab_size: ids of the tokenizer; further rows are padding.
        length: sub-tokens per token.
        bos: ARM: the id whose embedding is the BOS.
        codes: int [>= V], the code of each id; None for the identity.
        rope_tables: dtype to which the published code rounded RoPE tables.
    """

    family: Family | None = None
    vocab_size: int | None = None
    heads: int | None = None
    length: int | None = None
    embedding: str | None = None
    bos: int | None = None
    codes: np.ndarray | None = None
    seq_len: int = 2048
    rope_tables: str = "float32"
    eos_id: int = NO_EOS


def convert(kind: str, where: str, tensors: Tensors, facts: Facts, out: Path) -> folder.Weights:
    """The model in a file of a published layout.

    Args:
        kind: `lit_gpt` or `megatron`.
        out: folder of the result; also its `data.path`, since it has no dataset.
    Raises:
        UserError: unknown or missing tensors, wrong shapes, or facts that are missing or do not
            fit; with their names.
    """
    layout = LIT_GPT if kind == "lit_gpt" else MEGATRON
    causal = any(name.startswith("decoder.") for name in tensors)
    tensors = megatron_names(tensors) if kind == "megatron" else dict(tensors)
    facts = replace(facts, family=facts.family or ("arm" if causal else None))
    config = infer(layout, where, tensors, facts, out)
    codes = facts.codes
    book = codebook(where, config, np.arange(config.model.vocab_size) if codes is None else codes)
    if codes is not None:
        given = replace(config.subtokens, codes=book.hash)
        config = replace(config, subtokens=given)
    m = config.model
    expected: dict[str, Shape | None] = {name: s for name, (s, _) in body(layout, m).items()}
    expected |= {layout.embedding: None} | ({} if m.tied_head else {layout.head: None})
    check(where, tensors, expected)
    ours = body_tensors(layout, m, tensors)
    ours["embedding"] = embedding(layout, where, config, tensors, facts.bos)
    if not m.tied_head:
        ours["head"] = rows_of(where, layout.head, tensors, m.vocab_size, m.width)
    return folder.Weights(config, book, ours, config.steps, facts.eos_id)


def infer(layout: Layout, where: str, tensors: Tensors, facts: Facts, out: Path) -> RunConfig:
    """The config of the network in a file."""
    first = dict.fromkeys(("qkv", "gate", "q_norm"), "") | {
        part: layout.layer_name(0, name) for name, parts in layout.layers.items() for part in parts
    }
    needed = [layout.embedding, layout.final_norm, first["qkv"], first["gate"]]
    if missing := [name for name in needed if name not in tensors]:
        raise UserError(
            f"{where}: missing tensors {', '.join(missing)}; is it another layout? It holds "
            f"{', '.join(sorted(tensors)[:3])}, ..."
        )
    start, end = layout.layer.split("{}")
    numbers = {name[len(start) :].partition(end)[0] for name in tensors if name.startswith(start)}
    width = tensors[layout.final_norm].shape[0]
    qk_norm = first["q_norm"] in tensors
    heads = width // tensors[first["q_norm"]].shape[0] if qk_norm else facts.heads
    if not heads or width % heads:
        raise UserError(f"{where}: the number of heads cannot be inferred; give --heads")
    size = width // heads
    rows = tensors[first["qkv"]].shape[0]
    groups, odd = divmod(rows // size - heads, 2)
    gates = tensors[first["gate"]].shape[0] // len(layout.layers.get("mlp.linear_fc1.weight", "1"))
    if rows % size or odd or groups < 1 or heads % groups or gates % width:
        raise UserError(
            f"{where}: {first['qkv']} {list(tensors[first['qkv']].shape)} and {first['gate']} "
            f"{list(tensors[first['gate']].shape)} do not fit {heads} heads and a feed-forward "
            f"width that is a multiple of {width}"
        )
    tied = layout.head not in tensors
    padded = tensors[layout.embedding if tied else layout.head].shape[0]
    vocab = facts.vocab_size or padded
    if not 2 <= vocab <= padded:
        raise UserError(f"{where}: --vocab-size {vocab} is not between 2 and its {padded} rows")
    family, slots, merge = subtokens(
        layout, where=where, tensors=tensors, facts=facts, vocab=vocab, width=width
    )
    model = ModelConfig(
        vocab_size=vocab,
        layers=sum(number.isdigit() for number in numbers),
        width=width,
        heads=heads,
        kv_heads=0 if groups == heads else groups,
        ffn_multiple=gates // width,
        embedding=merge,
        tied_head=tied,
        qk_norm=qk_norm,
        rope_tables=facts.rope_tables,
    )
    return validate(
        RunConfig(
            family=family,
            steps=1,
            model=model,
            subtokens=SubtokenConfig(length=slots, shuffle=0.0),
            data=DataConfig(path=str(out), seq_len=facts.seq_len),
        )
    )


def subtokens(
    layout: Layout, where: str, tensors: Tensors, facts: Facts, vocab: int, width: int
) -> tuple[Family, int, str]:
    """(family, sub-tokens per token, embedding kind) from the embedding's shape and the facts."""
    rows, size = tensors[layout.embedding].shape
    lengths = range(1, min(32, width) + 1) if facts.length is None else (facts.length,)
    found = []
    for slots in lengths:
        b = base(vocab, slots)
        kinds = {
            "sum": size == width and rows == (b + 1) * slots,
            "cat": size == width // slots and rows == (b + 1) * slots,
            # Any padding, but fewer rows than the other kinds would need.
            "cat_shared": not layout.spare_mask
            and size == width // slots
            and b < rows < 2 * b + 64,
        }
        if slots == 1:
            kinds = {"cat_shared": size == width and rows >= vocab}
        found += [
            (slots, kind)
            for kind, fits in kinds.items()
            if fits and facts.embedding in (None, kind)
        ]
    if facts.family in ("arm", "mdm"):
        found = [pair for pair in found if pair[0] == 1]
    if len(found) != 1:
        may = ", ".join(f"--length {slots} --embedding {kind}" for slots, kind in found)
        raise UserError(
            f"{where}: {layout.embedding} {[rows, size]} with {vocab} ids and width {width} could "
            f"be {may or 'no known embedding'}; give --family, --vocab-size, --length or "
            "--embedding"
        )
    slots, kind = found[0]
    head = tensors.get(layout.head)
    causal = layout.spare_mask and head is not None and rows == head.shape[0]
    family = facts.family or ("prime" if slots > 1 else "arm" if causal else "mdm")
    return family, slots, kind


def codebook(where: str, config: RunConfig, codes: np.ndarray) -> Codebook:
    """The codebook that gives id `v` the code `codes[v]`.

    Raises:
        UserError: too few codes, duplicate codes, or codes out of range.
    """
    vocab, slots = config.model.vocab_size, config.subtokens.length
    b = base(vocab, slots)
    codes = np.asarray(codes, np.int64)[:vocab]
    fits = len(codes) == vocab and codes.min() >= 0 and codes.max() < b**slots
    if not fits or len(np.unique(codes)) < vocab:
        raise UserError(
            f"{where}: the permutation must give each of {vocab} ids a distinct code below "
            f"{b}**{slots} = {b**slots}"
        )
    return Codebook(slots, b, codes)


def rows_of(where: str, name: str, tensors: Tensors, count: int, width: int) -> np.ndarray:
    """The first `count` rows [count, width] of a table that may be padded."""
    shape = tensors[name].shape
    if len(shape) != 2 or shape[0] < count or shape[1] != width:
        raise UserError(f"{where}: {name} {list(shape)} instead of [{count} or more, {width}]")
    return tensors[name].float32()[:count]


def embedding(
    layout: Layout, where: str, config: RunConfig, tensors: Tensors, bos: int | None
) -> np.ndarray:
    """Our tables [T, b+1, E]; if l = 1 by token id, with the row of "masked" (ARM: BOS) last."""
    m, slots = config.model, config.subtokens.length
    tables, rows, size = folder.embedding_shape(m, slots)
    if slots > 1:
        # Megatron's `sum` uses the first rows of its table for all digits.
        alike = m.embedding == "sum" and not layout.spare_mask
        count = rows if alike else tables * rows
        table = rows_of(where, layout.embedding, tensors, count, size)
        return np.tile(table, (slots, 1, 1)) if alike else table.reshape(tables, rows, size)
    if config.family == "arm":
        table = rows_of(where, layout.embedding, tensors, m.vocab_size, size)
        bos = bos if bos is not None else (1 if layout.spare_mask else m.vocab_size - 1)
        if not 0 <= bos < m.vocab_size:
            raise UserError(f"--bos {bos}: not an id below {m.vocab_size}")
        return np.concatenate([table, table[bos : bos + 1]])[None]
    table = rows_of(where, layout.embedding, tensors, rows, size)
    if layout.spare_mask:
        last = tensors[layout.embedding].float32()[-1:]
        return np.concatenate([table[: m.vocab_size], last])[None]
    return table[None]
