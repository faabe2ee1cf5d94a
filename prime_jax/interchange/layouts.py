"""Names, shapes and orientation of weights: ours (the exported folder) and the published ones.

Ours, all float32, linear weights [out, in], vocabulary rows in the order of token ids:

    embedding.weight                  [T, b+1, E], row b = masked; l = 1: [1, V+1, D] by token id
    layers.{i}.attention_norm.weight  [D]
    layers.{i}.qkv.weight             [G (H/G + 2) K, D], by group: its query heads, key, value
    layers.{i}.q_norm.weight, k_norm  [K], with qk_norm
    layers.{i}.attention_out.weight   [D, D]
    layers.{i}.ffn_norm.weight        [D]
    layers.{i}.gate.weight, up        [F, D];  down [D, F]
    final_norm.weight                 [D]
    head.weight                       [V, D], unless tied
    codes                             int64 [V], the code of each token id

T tables of width E: `cat_shared` 1 x D//l, `cat` l x D//l, `sum` l x D. RoPE is rotate-half over
the whole head, SwiGLU is down(silu(gate) * up). The others follow the published code:
docs/interchange.md, "The published layouts".
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from prime_jax.config import ModelConfig
from prime_jax.errors import UserError
from prime_jax.interchange.tensors import Tensor

Shape = tuple[int, ...]
SHOWN = 6  # names in a message


@dataclass(frozen=True)
class Layout:
    """Names of our tensors in a family of files.

    Attributes:
        layer: prefix of a layer's tensors, by number.
        layers: tensor of a layer -> our tensors, stacked along its rows.
        embedding, final_norm, head: the others.
        spare_mask: the embedding's last row, after padding rows, means "masked" (l = 1).
    """

    layer: str
    layers: Mapping[str, tuple[str, ...]]
    embedding: str
    final_norm: str
    head: str
    spare_mask: bool = False

    def layer_name(self, layer: int, name: str) -> str:
        return self.layer.format(layer) + name


OURS = Layout(
    layer="layers.{}.",
    layers={
        f"{name}.weight": (name,)
        for name in (
            "attention_norm",
            "qkv",
            "q_norm",
            "k_norm",
            "attention_out",
            "ffn_norm",
            "gate",
            "up",
            "down",
        )
    },
    embedding="embedding.weight",
    final_norm="final_norm.weight",
    head="head.weight",
)
LIT_GPT = Layout(
    layer="transformer.h.{}.",
    layers={
        "norm_1.weight": ("attention_norm",),
        "attn.attn.weight": ("qkv",),
        "attn.proj.weight": ("attention_out",),
        "norm_2.weight": ("ffn_norm",),
        "mlp.swiglu.w1.weight": ("gate",),
        "mlp.swiglu.w2.weight": ("up",),
        "mlp.swiglu.w3.weight": ("down",),
    },
    embedding="transformer.wte.weight",
    final_norm="transformer.ln_f.weight",
    head="lm_head.weight",
    spare_mask=True,
)
MEGATRON = Layout(
    layer="encoder.layers.{}.",
    layers={
        "input_layernorm.weight": ("attention_norm",),
        "self_attention.linear_qkv.weight": ("qkv",),
        "self_attention.q_layernorm.weight": ("q_norm",),
        "self_attention.k_layernorm.weight": ("k_norm",),
        "self_attention.linear_proj.weight": ("attention_out",),
        "pre_mlp_layernorm.weight": ("ffn_norm",),
        "mlp.linear_fc1.weight": ("gate", "up"),
        "mlp.linear_fc2.weight": ("down",),
    },
    embedding="embedding.word_embeddings.weight",
    final_norm="encoder.final_layernorm.weight",
    head="output_layer.weight",
)
# With Transformer Engine a norm is part of the following matrix; ARM's layers are a decoder.
MEGATRON_ALIASES: Mapping[str, str] = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "decoder.": "encoder.",
}


WRAPPERS = ("module.", "model.")  # of DDP and Lightning


def plain_names(
    where: str, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    """`tensors` without the prefixes that wrappers give to names, and by the usual aliases.

    Raises:
        UserError: two tensors have one name then.
    """
    out: dict[str, Tensor] = {}
    for given, tensor in tensors.items():
        name = given.replace("_orig_mod.", "")  # torch.compile's, also within a name
        while wrapper := next((w for w in WRAPPERS if name.startswith(w)), ""):
            name = name.removeprefix(wrapper)
        for alias, usual in aliases.items():
            name = name.replace(alias, usual)
        if name in out:
            raise UserError(f"{where}: holds {name} twice, once as {given}")
        out[name] = tensor
    return out


def finite(where: str, name: str, values: np.ndarray) -> np.ndarray:
    """`values` as they are.

    Raises:
        UserError: some are not finite.
    """
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise UserError(f"{where}: {name} holds {bad} of {values.size} numbers that are not finite")
    return values


def layer_shapes(m: ModelConfig) -> dict[str, Shape]:
    """Our tensors of one layer and their shapes [out, in]."""
    size, ffn = m.width // m.heads, m.ffn
    rows = (m.heads + 2 * (m.kv_heads or m.heads)) * size
    shapes: dict[str, Shape] = {
        "attention_norm": (m.width,),
        "qkv": (rows, m.width),
        "attention_out": (m.width, m.width),
        "ffn_norm": (m.width,),
        "gate": (ffn, m.width),
        "up": (ffn, m.width),
        "down": (m.width, ffn),
    }
    return shapes | ({"q_norm": (size,), "k_norm": (size,)} if m.qk_norm else {})


def body(layout: Layout, m: ModelConfig) -> dict[str, tuple[Shape, list[str]]]:
    """Every tensor of a file except embedding and head: its shape, and our tensors in it."""
    ours = layer_shapes(m)
    out: dict[str, tuple[Shape, list[str]]] = {layout.final_norm: ((m.width,), ["final_norm"])}
    for layer in range(m.layers):
        for name, parts in layout.layers.items():
            if all(part in ours for part in parts):
                rows = sum(ours[part][0] for part in parts)
                inside = [f"layers.{layer}.{part}" for part in parts]
                out[layout.layer_name(layer, name)] = ((rows, *ours[parts[0]][1:]), inside)
    return out


def check(
    where: str, tensors: Mapping[str, Tensor | np.ndarray], expected: Mapping[str, Shape | None]
) -> None:
    """Check the names and shapes of tensors.

    Args:
        expected: shape of each tensor; None if it is checked elsewhere.
    Raises:
        UserError: unknown names, missing names, wrong shapes, all of them listed.
    """
    problems = []
    if unknown := sorted(set(tensors) - set(expected)):
        problems.append(f"unknown tensors {listed(unknown)}")
    if missing := sorted(set(expected) - set(tensors)):
        problems.append(f"missing tensors {listed(missing)}")
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if shape is not None and name in tensors and tensors[name].shape != tuple(shape)
    ]
    if wrong:
        problems.append(f"wrong shapes: {listed(wrong)}")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")


def listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def body_tensors(
    layout: Layout, where: str, m: ModelConfig, tensors: Mapping[str, Tensor]
) -> dict[str, np.ndarray]:
    """Our tensors except embedding and head, float32 [out, in], from those of a file.

    Raises:
        UserError: numbers that are not finite.
    """
    out: dict[str, np.ndarray] = {}
    for name, (_, parts) in body(layout, m).items():
        values = finite(where, name, tensors[name].float32())
        out |= zip(parts, np.split(values, len(parts)), strict=True)
    return out
