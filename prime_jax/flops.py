"""Exact parameter counts and training FLOPs of a run, in three conventions (theory.md, "FLOPs").

* `reference`: as published, `6 * 12 width^2 layers` per token for every model.
* `matmul`: every matrix product of one training step, forward and backward, of the actual model.
* `network`: the same without the marginal columns of the loss, which are how it is computed.
"""

import math
from typing import Literal, get_args

from prime_jax import subtokens
from prime_jax.config import ModelConfig, RunConfig
from prime_jax.errors import UserError
from prime_jax.settings import nearest

Convention = Literal["matmul", "reference", "network"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
BACKWARD = 3  # forward and backward over forward: one product, and one per factor's gradient


UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def human(count: float, digits: int = 3) -> str:
    """Parameters or tokens as people read them: 412M, 1.20B."""
    rounded = (u for u in UNITS if count >= u[0] * (1 - 0.5 * 10**-digits))  # 999.6M is 1.00B
    unit, suffix = next(rounded, (1.0, ""))
    number = float(f"{count / unit:.{digits - 1}e}")
    size = math.floor(math.log10(abs(number))) if number else digits
    return f"{number:.{max(0, digits - 1 - size)}f}{suffix}"


def param_counts(config: RunConfig) -> dict[str, int]:
    """Parameter counts in the four conventions that every result has.

    Returns:
        `total`: all trained parameters (a tied head counts once).
        `nonembedding`: without the embedding tables and the head.
        `nonembedding_plus_head`: with the head `[V, width]`, tied or not, since it is computed.
        `reference`: the published convention, `12 width^2 layers`.
    """
    m = config.model
    nonembedding = m.layers * layer_params(m) + m.width
    head = m.vocab_size * m.width
    return {
        "total": nonembedding + _embedding(config) + (0 if m.tied_head else head),
        "nonembedding": nonembedding,
        "nonembedding_plus_head": nonembedding + head,
        "reference": 12 * m.width**2 * m.layers,
    }


def layer_params(m: ModelConfig) -> int:
    """Parameters of one layer; what is left of `nonembedding` is the scale of the last norm."""
    return _layer_matrices(m) + 2 * m.width + 2 * (m.width // m.heads) * m.qk_norm


def flops_per_token(config: RunConfig, convention: Convention) -> float:
    """Training FLOPs per token; a multiply-add counts as two.

    Block diffusion reads a sequence twice, noisy and clean: in both conventions its layers count
    twice. `matmul` counts attention scores and values that the mask allows (half of them under the
    causal mask of ARM; seq_len + block_length keys for a token's noisy and clean position
    together), the head, and the marginal columns `P @ onehot(C)` of the marginal loss (forward and
    one backward product: the codebook has no gradient) unless V = b**l, where they are sums and no
    product. `network` is `matmul` without these columns. The embedding is a lookup, so 0;
    recomputation is not counted.

    Raises:
        UserError: no such convention.
    """
    if convention not in CONVENTIONS:
        raise UserError(
            f"FLOPs convention {convention!r}: no such name{nearest(convention, CONVENTIONS)}"
        )
    m = config.model
    if convention == "reference":
        return 6.0 * 12 * m.width**2 * m.layers * config.sequences_read
    keys_seen = config.data.seq_len * (0.5 if config.family == "arm" else 1.0)
    keys_seen += config.objective.block_length
    attention = 2 * keys_seen * m.width * 2  # scores, then values
    layers = m.layers * (2 * _layer_matrices(m) * config.sequences_read + attention)
    head = 2 * m.width * m.vocab_size
    columns = 0 if convention == "network" else _marginal_columns(config)
    return BACKWARD * (layers + head) + 2 * 2 * m.vocab_size * columns


def train_flops(config: RunConfig, convention: Convention) -> float:
    """FLOPs of the whole run: `flops_per_token` times D."""
    return flops_per_token(config, convention) * config.tokens


def evaluation_flops(config: RunConfig, convention: Convention) -> float:
    """FLOPs of one evaluation over its blocks; 0 if `eval.examples` is 0 (all blocks)."""
    e, names = config.eval, set(config.eval.estimators) - {"ar"}
    if config.subtokens.length == 1 and "subtoken" in names:
        names -= {"token"}  # the same number
    passes = 1 if config.family == "arm" else sum(_passes(config, name) for name in names)
    tokens = e.examples * config.data.seq_len
    return flops_per_token(config, convention) / BACKWARD * tokens * passes


def _passes(config: RunConfig, name: str) -> int:
    """Forward passes of an estimator: one a replicate; a chain's one a unit, once if it is exact;
    one a subset of a block's units, or one a unit of every order (`evaluate.exact`)."""
    head, _, order = name.partition(":")
    tokens = config.objective.block_length or config.data.seq_len
    units = tokens * (1 if name == "exact:token" else config.subtokens.length)
    if head == "exact":
        return 2 ** min(units, 64) - 1  # a run refuses far fewer
    if head == "bracket" and order.isdecimal():
        return 1 + 2 * int(order) * (units - 1)
    if head != "chain":
        return config.eval.replicates
    units = config.data.seq_len * (config.subtokens.length if order == "subtokens" else 1)
    return units * (config.eval.replicates if order in ("random", "subtokens") else 1)


def _layer_matrices(m: ModelConfig) -> int:
    """Weights of one layer in matrix products."""
    kv_width = m.width // m.heads * (m.kv_heads or m.heads)
    attention = 2 * m.width * m.width + 2 * m.width * kv_width  # q, output; k, v
    return attention + 3 * m.width * m.ffn


def _embedding(config: RunConfig) -> int:
    m, length = config.model, config.subtokens.length
    rows = subtokens.base(m.vocab_size, length) + 1  # one more: the mask, or BOS for ARM
    if m.embedding == "cat_shared":
        return rows * (m.width // length)
    if m.embedding == "cat":
        return length * rows * (m.width // length)
    return length * rows * m.width


def _marginal_columns(config: RunConfig) -> int:
    """Columns `l * b` of the codebook; 0 if l = 1, the loss is joint or every code is a token: head
    rows lie in the order of their codes, so the marginals are then a reshape and a sum."""
    length, vocab = config.subtokens.length, config.model.vocab_size
    if config.family != "prime" or length == 1 or config.objective.loss == "joint":
        return 0
    b = subtokens.base(vocab, length)
    return 0 if b**length == vocab else length * b
