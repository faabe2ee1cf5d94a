"""Weights of the published layouts: the model that shapes determine, and conversion.

`lit_gpt` is the layout of the SlimPajama code (also of SMDM), `megatron` that of the C4 grid. Model
settings are read from the shapes and from the permutation; what these leave open must be given, and
what is given must fit them. Training settings are not in a file: the result has this package's
defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prime_jax.config import (
    DataConfig,
    Family,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
    validate,
)
from prime_jax.data.tokenizers import NO_EOS
from prime_jax.errors import UserError
from prime_jax.interchange import folder
from prime_jax.interchange.layouts import (
    LIT_GPT,
    MEGATRON,
    MEGATRON_ALIASES,
    Layout,
    Shape,
    body,
    body_tensors,
    check,
    finite,
    plain_names,
)
from prime_jax.interchange.tensors import Tensor
from prime_jax.subtokens import Codebook, base

Tensors = Mapping[str, Tensor]
SEQ_LEN = 2048  # of both published codes
PADDINGS = tuple(64 << k for k in range(5))  # vocabularies are padded to a multiple of one of these


@dataclass(frozen=True)
class Facts:
    """Information that is not in a file. None: infer from the shapes, or raise if ambiguous.

    Attributes:
        vocab_size: ids of the tokenizer; further rows are padding.
        length: sub-tokens per token.
        bos: ARM: the id whose embedding is the BOS.
        codes: int [V] or [b**l], the code of each id; empty for the identity.
        permutation: where the codes come from, for messages.
        rope_tables: dtype to which the published code rounded RoPE tables.
    """

    family: Family | None = None
    vocab_size: int | None = None
    heads: int | None = None
    length: int | None = None
    embedding: str | None = None
    bos: int | None = None
    codes: np.ndarray | None = None
    permutation: str = "--permutation"
    seq_len: int | None = None
    rope_tables: str | None = None
    eos_id: int = NO_EOS


class Reading(NamedTuple):
    """How an embedding table can be read: sub-tokens per token, base, and how they are joined."""

    slots: int
    base: int
    embedding: str

    def __str__(self) -> str:
        return f"--length {self.slots} --embedding {self.embedding} (b = {self.base})"


def convert(kind: str, where: str, tensors: Tensors, facts: Facts, out: Path) -> folder.Weights:
    """The model in a file of a published layout.

    Args:
        kind: `lit_gpt` or `megatron`.
        out: folder of the result; also its `data.path`, since it has no dataset.
    Raises:
        UserError: unknown or missing tensors, wrong shapes, numbers that are not finite, or facts
            that are missing or do not fit; with their names.
    """
    layout = LIT_GPT if kind == "lit_gpt" else MEGATRON
    tensors = plain_names(where, tensors, {})
    decoder = any(name.startswith("decoder.") for name in tensors)
    if layout is MEGATRON:
        tensors = plain_names(where, tensors, MEGATRON_ALIASES)
        facts = replace(facts, family=facts.family or ("arm" if decoder else None))
    config, assumed = infer(layout, where=where, tensors=tensors, facts=facts, out=out)
    family = config.family
    if layout is MEGATRON and decoder != (family == "arm"):
        raise UserError(
            f"{where}: its layers are {'a decoder' if decoder else 'an encoder'}, which is not "
            f"family {family}"
        )
    book = codebook(config, facts)
    if facts.codes is not None and len(facts.codes):
        given = replace(config.subtokens, codes=book.hash)
        config = replace(config, subtokens=given)
    m = config.model
    expected: dict[str, Shape | None] = {name: s for name, (s, _) in body(layout, m).items()}
    expected |= {layout.embedding: None} | ({} if m.tied_head else {layout.head: None})
    check(where, tensors, expected)
    ours = body_tensors(layout, where, m, tensors)
    bos = facts.bos if facts.bos is not None else (1 if layout is LIT_GPT else m.vocab_size - 1)
    if family == "arm" and facts.bos is None:
        assumed += (f"BOS is id {bos} (--bos)",)
    ours["embedding"] = embedding(layout, where, config, tensors, bos)
    if not m.tied_head:
        ours["head"] = rows_of(where, layout.head, tensors, m.vocab_size, m.width)
    return folder.imported(
        folder.Weights(
            config=config,
            codebook=book,
            tensors=ours,
            step=config.steps,
            eos_id=facts.eos_id,
            assumed=assumed,
        )
    )


def infer(
    layout: Layout, *, where: str, tensors: Tensors, facts: Facts, out: Path
) -> tuple[RunConfig, tuple[str, ...]]:
    """The config of the network in a file, and what was assumed in it."""
    first = {"qkv": "", "gate": "", "q_norm": ""} | {
        part: layout.layer_name(0, name) for name, parts in layout.layers.items() for part in parts
    }
    width = _shape(where, tensors, layout.final_norm, 1)[0]
    start, end = layout.layer.split("{}")
    numbers = {name[len(start) :].partition(end)[0] for name in tensors if name.startswith(start)}
    qk_norm = first["q_norm"] in tensors
    heads = facts.heads
    if qk_norm:
        heads = width // _shape(where, tensors, first["q_norm"], 1)[0]
        if facts.heads not in (None, heads):
            raise UserError(f"{where}: --heads {facts.heads}, but its norms of queries say {heads}")
    qkv = _shape(where, tensors, first["qkv"], 2)
    gates = _shape(where, tensors, first["gate"], 2)[0]
    if layout.layers.get("mlp.linear_fc1.weight"):  # gate and up in one
        gates //= 2
    groups = _key_value_heads(where, first["qkv"], qkv, width, heads)
    tied = layout.head not in tensors
    rows = _shape(where, tensors, layout.embedding if tied else layout.head, 2)[0]
    vocab = vocabulary(where, rows, facts)
    table = _shape(where, tensors, layout.embedding, 2)
    reading, assumed = subtokens(
        layout, where=where, table=table, facts=facts, vocab=vocab, width=width
    )
    family = _family(
        layout=layout,
        where=where,
        tensors=tensors,
        table=table,
        reading=reading,
        given=facts.family,
    )
    if facts.seq_len is None:
        assumed += (f"blocks of {SEQ_LEN} tokens (--seq-len)",)
    if facts.rope_tables is None:
        assumed += ("RoPE's tables in float32 (--rope-tables)",)
    model = ModelConfig(
        vocab_size=vocab,
        layers=sum(number.isdigit() for number in numbers),
        width=width,
        heads=heads,
        kv_heads=0 if groups == heads else groups,
        ffn_multiple=gates // width or 1,
        ffn_width=gates if gates % width else 0,
        embedding=reading.embedding,
        tied_head=tied,
        qk_norm=qk_norm,
        rope_tables=facts.rope_tables or "float32",
    )
    config = RunConfig(
        family=family,
        steps=1,
        model=model,
        subtokens=SubtokenConfig(length=reading.slots, shuffle=0.0),
        data=DataConfig(path=str(out), seq_len=facts.seq_len or SEQ_LEN),
        optim=OptimConfig(warmup_steps=0),
    )
    return validate(config), assumed


def _shape(where: str, tensors: Tensors, name: str, sides: int) -> Shape:
    if name not in tensors:
        raise UserError(
            f"{where}: missing tensors {name}; is it another layout? It holds "
            f"{', '.join(sorted(tensors)[:3])}, ..."
        )
    shape = tensors[name].shape
    if len(shape) != sides or 0 in shape:
        raise UserError(f"{where}: {name} is of shape {list(shape)}, not of {sides} dimensions")
    return shape


def _key_value_heads(where: str, name: str, qkv: Shape, width: int, heads: int | None) -> int:
    """Groups G of queries, from the rows (H + 2 G) K of the fused matrix."""
    if heads is None:
        raise UserError(f"{where}: the number of heads cannot be inferred; give --heads")
    size = width // heads
    groups, odd = divmod(qkv[0] // max(size, 1) - heads, 2)
    if width % heads or qkv[0] % size or odd or groups < 1 or heads % groups:
        raise UserError(f"{where}: {name} {list(qkv)} and width {width} do not fit {heads} heads")
    return groups


def vocabulary(where: str, rows: int, facts: Facts) -> int:
    """The number of ids V, of `rows` that may be padded to a round number.

    Raises:
        UserError: it is not given and the rows may be padded, or it is given and cannot be.
    """
    vocab = facts.vocab_size
    if vocab is None:
        if rows % PADDINGS[0] == 0:
            raise UserError(
                f"{where}: some of its {rows} rows may be padding; give --tokenizer, or "
                "--vocab-size V, the ids that the tokenizer has"
            )
        return rows
    needed = (vocab, vocab + 1)  # with a row for "masked"
    padded = {-(-n // multiple) * multiple for n in needed for multiple in (1, *PADDINGS)}
    if rows not in padded:
        raise UserError(
            f"{where}: its {rows} rows are not those of {vocab} ids (--vocab-size, or the "
            f"tokenizer's), with or without padding to a multiple of {PADDINGS[0]} to "
            f"{PADDINGS[-1]}"
        )
    return vocab


def subtokens(
    layout: Layout, *, where: str, table: Shape, facts: Facts, vocab: int, width: int
) -> tuple[Reading, tuple[str, ...]]:
    """How the embedding is read, by its shape and the number of codes; and what was assumed."""
    found = [r for r in _readings(layout, table, vocab, width) if _given(r, facts)]
    codes = None if facts.codes is None else len(facts.codes)
    fits = [r for r in found if _takes(r, codes, vocab)]
    size = f"{layout.embedding} {list(table)} with {vocab} ids and width {width}"
    if codes and found and all(r.slots == 1 for r in found):
        raise UserError(f"{facts.permutation}: {where} has one sub-token per token, without codes")
    if found and not fits:
        expected = " or ".join(sorted({f"{r.base}**{r.slots} = {r.base**r.slots}" for r in found}))
        raise UserError(
            f"{facts.permutation}: holds {codes} codes; {where}: {size} takes {vocab}, or "
            f"{expected} for {', '.join(map(str, found))}"
        )
    if codes and len(fits) > 1:
        # Codes are shuffled in the published models with binary digits.
        binary = [r for r in fits if r.base == 2]
        others = ", ".join(str(r) for r in fits if r not in binary)
        if len(binary) == 1:
            return binary[0], (f"binary digits, l = {binary[0].slots}; {others} would fit too",)
    if len(fits) != 1:
        right = "give --family, --vocab-size, --length or --embedding"
        if fits and codes is None:
            right += ", or --permutation, whose length tells"
        may = ", ".join(map(str, fits)) or "no known embedding"
        raise UserError(f"{where}: {size} could be {may}; {right}")
    (reading,) = fits
    if reading.slots > 1 and codes is None:
        raise UserError(
            f"{where}: {reading.slots} sub-tokens per token; give --permutation FILE, the codes "
            "that it was trained with, or --permutation identity if ids are their own codes"
        )
    return reading, ()


def _readings(layout: Layout, table: Shape, vocab: int, width: int) -> list[Reading]:
    rows, size = table
    found = []
    if size == width and rows >= vocab:
        found.append(Reading(1, vocab, "cat_shared"))
    for slots in range(2, min(32, width) + 1):
        b = base(vocab, slots)
        apart = rows == (b + 1) * slots
        # Any padding, but fewer rows than the other kinds would need.
        shared = layout is MEGATRON and b < rows < 2 * b + 64
        if size == width and apart:
            found.append(Reading(slots, b, "sum"))
        if size == width // slots:
            found += [Reading(slots, b, "cat")] if apart else []
            found += [Reading(slots, b, "cat_shared")] if shared else []
    return found


def _given(reading: Reading, facts: Facts) -> bool:
    """Whether a reading is what the user said."""
    one = {"arm": True, "mdm": True, "prime": False, None: None}[facts.family]
    return (
        facts.length in (None, reading.slots)
        and (facts.embedding in (None, reading.embedding) or reading.slots == 1)
        and one in (None, reading.slots == 1)
    )


def _takes(reading: Reading, codes: int | None, vocab: int) -> bool:
    """Whether so many codes (None: not said; 0: the identity) can be those of a reading."""
    if codes in (None, 0):
        return True
    return reading.slots > 1 and codes in (vocab, reading.base**reading.slots)


def _family(
    layout: Layout,
    where: str,
    tensors: Tensors,
    table: Shape,
    reading: Reading,
    given: Family | None,
) -> Family:
    """Prime by its sub-tokens; else lit_gpt's MDM has a row for "masked" more than its head."""
    if reading.slots > 1:
        return "prime"
    if layout is not LIT_GPT:
        return given or "mdm"
    head = tensors.get(layout.head)
    causal = head is None or table[0] == head.shape[0]
    found: Family = "arm" if causal else "mdm"
    if given not in (None, found):
        more = "no row" if causal else "a row"
        raise UserError(f'{where}: {layout.embedding} has {more} for "masked": not family {given}')
    return found


def codebook(config: RunConfig, facts: Facts) -> Codebook:
    """The codebook that gives id `v` the code `codes[v]`.

    Raises:
        UserError: duplicate codes, or codes out of range.
    """
    vocab, slots = config.model.vocab_size, config.subtokens.length
    b = base(vocab, slots)
    if facts.codes is None or not len(facts.codes):
        return Codebook(slots, b, np.arange(vocab))
    every = np.asarray(facts.codes, np.int64)
    if every.min() < 0 or every.max() >= b**slots or len(np.unique(every)) < len(every):
        raise UserError(
            f"{facts.permutation}: must give each id a code of its own from 0 to "
            f"{b}**{slots} - 1 = {b**slots - 1}"
        )
    return Codebook(slots, b, every[:vocab])


def rows_of(where: str, name: str, tensors: Tensors, count: int, width: int) -> np.ndarray:
    """The first `count` rows [count, width] of a table that may be padded."""
    shape = tensors[name].shape
    if len(shape) != 2 or shape[0] < count or shape[1] != width:
        raise UserError(f"{where}: {name} {list(shape)} instead of [{count} or more, {width}]")
    return finite(where, name, tensors[name].float32()[:count])


def embedding(
    layout: Layout, where: str, config: RunConfig, tensors: Tensors, bos: int
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
        if not 0 <= bos < m.vocab_size:
            raise UserError(f"--bos {bos}: not an id below {m.vocab_size}")
        return np.concatenate([table, table[bos : bos + 1]])[None]
    table = rows_of(where, layout.embedding, tensors, rows, size)
    if layout.spare_mask:
        last = finite(where, layout.embedding, tensors[layout.embedding].float32()[-1:])
        return np.concatenate([table[: m.vocab_size], last])[None]
    return table[None]
