"""Random weights of the published layouts and a plain NumPy forward pass over them, in float64.

Written from the names and conventions of the published code (tests/oracles of `interchange`), not
from this package: no line of it is shared with the importer or the model.
"""

import ml_dtypes
import numpy as np


def weights(kind, *, vocab, padded, width, heads, groups, layers, slots=1, base=None, embedding="",
            causal=False, tied=False, fused_norms=False, seed=0):  # fmt: skip
    """{name: float32 array} of a lit_gpt or Megatron checkpoint."""
    rng = np.random.default_rng(seed)
    size, ffn = width // heads, 4 * width

    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    def scale(n):
        return (1 + 0.3 * rng.standard_normal(n)).astype(np.float32)

    def table(rows, columns):
        return rng.standard_normal((rows, columns)).astype(np.float32)

    per_digit = width if embedding == "sum" else width // slots
    rows_of_slots = (base + 1) * slots if slots > 1 else 0
    out = {}
    if kind == "lit_gpt":
        rows = rows_of_slots or (padded if causal else padded + 1)
        out["transformer.wte.weight"] = table(rows, per_digit if slots > 1 else width)
        out["lm_head.weight"] = matrix(padded, width)
        out["transformer.ln_f.weight"] = scale(width)
        for i in range(layers):
            h = f"transformer.h.{i}."
            out[h + "norm_1.weight"] = scale(width)
            out[h + "attn.attn.weight"] = matrix((heads + 2 * groups) * size, width)
            out[h + "attn.proj.weight"] = matrix(width, width)
            out[h + "norm_2.weight"] = scale(width)
            out[h + "mlp.swiglu.w1.weight"] = matrix(ffn, width)
            out[h + "mlp.swiglu.w2.weight"] = matrix(ffn, width)
            out[h + "mlp.swiglu.w3.weight"] = matrix(width, ffn)
        return out
    rows = rows_of_slots or padded
    if embedding == "cat_shared":
        rows = base + 1 + 5  # padded_input
    out["embedding.word_embeddings.weight"] = table(rows, per_digit if slots > 1 else width)
    if not tied:
        out["output_layer.weight"] = matrix(padded, width)
    body = "decoder" if causal else "encoder"
    out[f"{body}.final_layernorm.weight"] = scale(width)
    for i in range(layers):
        h = f"{body}.layers.{i}."
        first = (
            "self_attention.linear_qkv.layer_norm_weight"
            if fused_norms
            else "input_layernorm.weight"
        )
        second = "mlp.linear_fc1.layer_norm_weight" if fused_norms else "pre_mlp_layernorm.weight"
        out[h + first] = scale(width)
        out[h + "self_attention.linear_qkv.weight"] = matrix((heads + 2 * groups) * size, width)
        out[h + "self_attention.q_layernorm.weight"] = scale(size)
        out[h + "self_attention.k_layernorm.weight"] = scale(size)
        out[h + "self_attention.linear_proj.weight"] = matrix(width, width)
        out[h + second] = scale(width)
        out[h + "mlp.linear_fc1.weight"] = matrix(2 * ffn, width)
        out[h + "mlp.linear_fc2.weight"] = matrix(width, ffn)
    return out


def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def turn(x, rounded):
    """Rotate-half RoPE of [L, H, K]: element k is paired with element k + K/2."""
    length, _, size = x.shape
    out = np.empty_like(x)
    for position in range(length):
        for k in range(size // 2):
            angle = position * 10000.0 ** (-2 * k / size)
            c, s = np.cos(angle), np.sin(angle)
            if rounded:
                c, s = float(ml_dtypes.bfloat16(c)), float(ml_dtypes.bfloat16(s))
            a, b = x[position, :, k], x[position, :, k + size // 2]
            out[position, :, k] = a * c - b * s
            out[position, :, k + size // 2] = b * c + a * s
    return out


def attend(x, fused, heads, groups, causal, rounded, q_scale=None, k_scale=None):
    length, width = x.shape
    size, each = width // heads, heads // groups
    rows = x @ fused.T
    out = np.zeros((length, heads, size))
    for g in range(groups):
        block = rows[:, g * (each + 2) * size : (g + 1) * (each + 2) * size]
        q = block[:, : each * size].reshape(length, each, size)
        k = block[:, each * size : (each + 1) * size].reshape(length, 1, size)
        v = block[:, (each + 1) * size :]
        if q_scale is not None:
            q, k = norm(q, q_scale), norm(k, k_scale)
        q, k = turn(q, rounded), turn(k, rounded)[:, 0]
        for h in range(each):
            scores = q[:, h] @ k.T / np.sqrt(size)
            if causal:
                scores[np.triu_indices(length, 1)] = -np.inf
            p = np.exp(scores - scores.max(1, keepdims=True))
            out[:, g * each + h] = p / p.sum(1, keepdims=True) @ v
    return out.reshape(length, width)


def silu(x):
    return x / (1 + np.exp(-x))


def logits(kind, w, ids, *, heads, groups, layers, slots=1, base=None, embedding="",
           causal=False, tied=False, rounded=False, **_):  # fmt: skip
    """[L, padded vocabulary] for the digits (ids where l = 1) int [L, l] of one sequence."""
    w = {
        name.replace(
            "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
        ).replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"): x.astype(
            np.float64
        )
        for name, x in w.items()
    }
    lit = kind == "lit_gpt"
    body = "transformer" if lit else "decoder" if causal else "encoder"
    table = w["transformer.wte.weight" if lit else "embedding.word_embeddings.weight"]
    final = w[f"{body}.{'ln_f' if lit else 'final_layernorm'}.weight"]
    width = len(final)
    if slots == 1:
        x = table[ids[:, 0]]
    elif embedding == "sum":
        offset = (base + 1) if lit else 0
        x = sum(table[ids[:, j] + j * offset] for j in range(slots))
    else:
        offset = 0 if embedding == "cat_shared" else base + 1
        x = np.concatenate([table[ids[:, j] + j * offset] for j in range(slots)], axis=1)
        x = np.pad(x, ((0, 0), (0, width - x.shape[1])))
    for i in range(layers):
        if lit:
            h = f"transformer.h.{i}."
            y = norm(x, w[h + "norm_1.weight"])
            y = attend(y, w[h + "attn.attn.weight"], heads, groups, causal, rounded)
            x = x + y @ w[h + "attn.proj.weight"].T
            y = norm(x, w[h + "norm_2.weight"])
            y = silu(y @ w[h + "mlp.swiglu.w1.weight"].T) * (y @ w[h + "mlp.swiglu.w2.weight"].T)
            x = x + y @ w[h + "mlp.swiglu.w3.weight"].T
        else:
            h = f"{body}.layers.{i}."
            q, k = (w[h + f"self_attention.{n}_layernorm.weight"] for n in "qk")
            y = norm(x, w[h + "input_layernorm.weight"])
            y = attend(
                y, w[h + "self_attention.linear_qkv.weight"], heads, groups, causal, rounded, q, k
            )
            x = x + y @ w[h + "self_attention.linear_proj.weight"].T
            y = norm(x, w[h + "pre_mlp_layernorm.weight"]) @ w[h + "mlp.linear_fc1.weight"].T
            half = y.shape[1] // 2
            x = x + silu(y[:, :half]) * y[:, half:] @ w[h + "mlp.linear_fc2.weight"].T
    head = table if tied else w["lm_head.weight" if lit else "output_layer.weight"]
    return norm(x, final) @ head.T
