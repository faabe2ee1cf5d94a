"""A folder for Hugging Face's transformers, which is an exported folder (`folder`) besides.

`config.json` and `model.safetensors` are those of `folder`, with what transformers asks for;
`modeling_prime_jax.py` is the network in PyTorch; `tokenizer.json` is Hugging Face's, and ours is in
`prime_jax/`. No path of this machine goes along, since such folders are published.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prime_jax import flops
from prime_jax.config import RunConfig, run_id
from prime_jax.data import tokenizers
from prime_jax.data.tokenizers import NO_EOS, Tokenizer
from prime_jax.errors import UserError
from prime_jax.interchange import folder, hf_tokenizer
from prime_jax.interchange.folder import Weights
from prime_jax.interchange.hf_tokenizer import BOS, MASK, Json
from prime_jax.runtime.records import write_json_atomic

CODE = Path(__file__).with_name("modeling_prime_jax.py")
CARD = "README.md"
UNKNOWN = "unknown"  # what the Hub calls a licence that nobody named
KINDS = {
    "nll": "negative log-likelihood, exact",
    "nelbo": "upper bound on the negative log-likelihood",
    "lower_bound": "lower bound on the negative log-likelihood",
    "difference": "difference of two of these",
    "train_loss": "training loss: no likelihood, and no bound on one",
}


def write(
    weights: Weights,
    out: Path,
    tokenizer: Tokenizer | None,
    record: Mapping[str, Any] | None = None,
    license: str = UNKNOWN,
) -> str:
    """Write the folder, `config.json` last; returns why the tokenizer could not be written, or "".

    Args:
        record: `result.json` of the run, from which the model card has its losses.
        license: of the weights, as the Hub names it.

    Raises:
        UserError: a model of block diffusion; `out` is not empty, or cannot be written; Hugging
            Face's tokenizers are not installed.
    """
    if weights.config.objective.block_length:
        raise UserError(
            "block diffusion is not written for transformers: its network reads a noisy and a clean "
            "sequence; --format safetensors writes it"
        )
    weights = replace(weights, config=without_paths(weights.config))
    made, missing = None, ""
    if tokenizer is not None:
        made = hf_tokenizer.tokenizer_json(tokenizer, _last(weights))
        missing = hf_tokenizer.differs(tokenizer, made)
    folder.write_tensors(weights, out)
    (out / CODE.name).write_text(CODE.read_text())
    (out / CARD).write_text(card(weights, tokenizer, record or {}, license))
    if tokenizer is not None and not missing:
        (out / tokenizers.OWN).mkdir()
        _nameless(tokenizer).save(out / tokenizers.OWN)
        write_json_atomic(out / tokenizers.FILE, made)
        write_json_atomic(out / "tokenizer_config.json", tokenizer_config(weights, made))
    if weights.config.family == "arm":  # as it is without settings: samples of the model itself
        rules = special_ids(weights) | {"do_sample": True, "top_k": 0}
        write_json_atomic(out / "generation_config.json", rules)
    write_json_atomic(out / folder.CONFIG, config(weights, tokenizer))
    return missing


def without_paths(c: RunConfig) -> RunConfig:
    """`c` without what is known on this machine alone; it names the same run."""
    return replace(
        c,
        data=replace(c.data, path=""),
        subtokens=replace(c.subtokens, codes_file=""),
        log=replace(c.log, wandb=""),
    )


def _nameless(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer; of the file that it was made from, the name alone."""
    out = copy.copy(tokenizer)
    kind, _, rest = tokenizer.spec.partition(":")
    out.spec = f"{kind}:{rest.rpartition('/')[2]}" if rest else kind
    return out


def config(weights: Weights, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`config.json`: that of an exported folder, and what transformers' own code reads.

    The vocabulary has V + 1 ids here, the mask or BOS being the last.
    """
    c, m = weights.config, weights.config.model
    name = "CausalLM" if c.family == "arm" else "MaskedLM"
    return folder.about(weights, tokenizer) | {
        "architectures": [f"PrimeJaxFor{name}"],
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.PrimeJaxConfig",
            f"AutoModelFor{name}": f"{CODE.stem}.PrimeJaxFor{name}",
        },
        "vocab_size": m.vocab_size + 1,
        **special_ids(weights),
        "hidden_size": m.width,
        "intermediate_size": m.ffn,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads or m.heads,
        "max_position_embeddings": c.data.seq_len,
        "tie_word_embeddings": False,  # the code reads a tied head from the embedding itself
        "dtype": "float32",
    }


def special_ids(weights: Weights) -> dict[str, int]:
    """The special ids that there are, by the names of transformers.

    Padding is EOS, which transformers never takes for padding in a prompt without an attention mask.
    """
    last = "bos_token_id" if weights.config.family == "arm" else "mask_token_id"
    ends = () if weights.eos_id == NO_EOS else ("eos_token_id", "pad_token_id")
    return {last: weights.config.model.vocab_size} | dict.fromkeys(ends, weights.eos_id)


def tokenizer_config(weights: Weights, made: Json) -> Json:
    """`tokenizer_config.json`: the special tokens of a `tokenizer.json`, and how it is used."""
    text = {token["id"]: token["content"] for token in made["added_tokens"]}
    special = {name.removesuffix("_id"): text[i] for name, i in special_ids(weights).items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": weights.config.data.seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **special,
    }


def _last(weights: Weights) -> str:
    return BOS if weights.config.family == "arm" else MASK


def card(
    weights: Weights, tokenizer: Tokenizer | None, record: Mapping[str, Any], license: str
) -> str:
    """The model card: what the model is, how it is used, and its numbers with their kinds."""
    c, causal = weights.config, weights.config.family == "arm"
    what = {
        "arm": "An autoregressive language model",
        "mdm": "A masked diffusion language model",
        "prime": f"A masked diffusion language model over sub-tokens ({weights.codebook.length} of "
        f"base {weights.codebook.base} for each token)",
    }[c.family]
    head = f"""\
---
license: {license}
library_name: transformers
pipeline_tag: {"text-generation" if causal else "fill-mask"}
tags: [prime_jax, {"autoregressive" if causal else "masked-diffusion"}]
---

# {run_id(c)}

{what}. `config.json` holds all settings of the run.
"""
    use = EXAMPLE_CAUSAL if causal else EXAMPLE_MASKED
    return "\n".join((head, use, _size(weights), _losses(record), _hashes(weights, tokenizer)))


EXAMPLE_CAUSAL = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
text = tokenizer("The", return_tensors="pt")  # begins with BOS
print(tokenizer.decode(model.generate(**text, max_new_tokens=20, do_sample=True)[0]))
print(model(**text, labels=text.input_ids).loss)  # nats per token, exact
```
"""
EXAMPLE_MASKED = f"""\
```python
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)
ids = tokenizer("The{MASK}{MASK}{MASK}", return_tensors="pt").input_ids
print(tokenizer.batch_decode(model.generate(ids)))  # what is masked is drawn
text = tokenizer("The end", return_tensors="pt").input_ids
nats = model.nelbo(text, draws=64)  # unbiased draws of an upper bound on -log p(text)
print(nats.mean(0), nats.std(0) / 64**0.5)
sub_tokens = model.digits_of(text)  # the digit `model.config.base` means masked
sub_tokens[0, 0, 0] = model.config.base
print(model.log_marginals(sub_tokens)[0, 0, 0].exp())  # of each value of this sub-token
```
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _size(weights: Weights) -> str:
    c = weights.config
    counts = flops.param_counts(c)
    products, published = (flops.train_flops(c, name) for name in ("matmul", "reference"))
    rows = [
        ("N", f"{counts['nonembedding']:,} without embedding and head; {counts['total']:,} in all"),
        ("D", f"{c.tokens:,} tokens: {c.steps:,} steps of {c.batch_size} x {c.data.seq_len}"),
        (
            "C",
            f"{products:.4g} FLOPs in matrix products; {published:.4g} as 6 x 12 width² layers D",
        ),
    ]
    if c.initial_weights == weights.hash:
        rows[1:] = [("D, C", "unknown: the weights were imported")]
    elif c.initial_weights:
        rows.append(
            ("began from", f"weights {c.initial_weights}, whose training is not in D and C")
        )
    if c.data.segment_ids:
        rows.append(("attention", "within documents: give one document a row"))
    return f"## Size\n\n{_table(('', ''), rows)}"


def _losses(record: Mapping[str, Any]) -> str:
    losses = record.get("losses") or ()
    if not losses:
        return "## Losses\n\nNone recorded with these weights.\n"
    errors = [
        " and ".join(
            f"{loss[key]:.2g} ({name})"
            for key, name in (("se_mc", "Monte Carlo"), ("se_data", "data"))
            if loss.get(key) is not None
        )
        for loss in losses
    ]
    rows = [
        (
            f"{loss['value']:.4f}",
            loss["unit"],
            error or "unknown",
            loss["kind"],
            loss["estimator"],
            f"knows {loss['given']}" if loss.get("given") else "",
        )
        for loss, error in zip(losses, errors, strict=True)
    ]
    head = ("loss", "unit", "standard error", "kind", "estimator", "")
    kinds = dict.fromkeys(loss["kind"] for loss in losses)
    notes = "".join(f"* `{kind}`: {KINDS[kind]}\n" for kind in kinds)
    found = f"On {losses[0]['n_tokens']:,} tokens of the validation split.\n"
    return f"## Losses\n\n{found}\n{_table(head, rows)}\n{notes}"


def _hashes(weights: Weights, tokenizer: Tokenizer | None) -> str:
    found = {
        "weights": weights.hash,
        "codes of tokens": weights.codebook.hash,
        "tokenizer": tokenizer.hash if tokenizer else "",
        "training data": weights.config.data.fingerprint,
    }
    rows = [(name, f"`{value}`") for name, value in found.items() if value]
    assumed = "".join(f"* assumed when it was imported: {line}\n" for line in weights.assumed)
    return f"## Hashes\n\n{_table(('of', 'hash'), rows)}" + (f"\n{assumed}" if assumed else "")
