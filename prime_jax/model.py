"""One transformer for all families: sub-token digits in, hidden states and head rows out.

math.md section 6: pre-norm RMSNorm, SwiGLU, RoPE over tokens, RMSNorm on q and k per head, no
biases. The network never sees the time; L positions, not l * L. Activations are kept as [B*L, D]
between the attention calls, which is what XLA's CPU and TPU matmuls like best.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import ModelConfig, RunConfig
from prime_jax.kernels import selection
from prime_jax.kernels.attention import SAVED, attention
from prime_jax.kernels.embedding import subtoken_embedding
from prime_jax.subtokens import Codebook


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + eps) * scale).astype(x.dtype)


def rope_tables(length: int, size: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin float32 [L, K/2] of the rotate-half convention."""
    angle = np.arange(length)[:, None] / base ** (np.arange(0, size, 2) / size)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x_BxLxHxK: jax.Array, cos_LxK: np.ndarray, sin_LxK: np.ndarray) -> jax.Array:
    first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_LxK[None, :, None], sin_LxK[None, :, None]
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x_BxLxHxK.dtype)


def dropout(x_NxD: jax.Array, keys_B: jax.Array | None, rate: float, salt: jax.Array) -> jax.Array:
    """Dropout keyed per sequence, so that it does not depend on the mesh; off without keys."""
    if keys_B is None or rate == 0.0:
        return x_NxD
    shape = (x_NxD.shape[0] // keys_B.shape[0], x_NxD.shape[1])

    def draw(key):
        return jax.random.bernoulli(jax.random.fold_in(key, salt), 1 - rate, shape)

    keep_NxD = jax.vmap(draw)(keys_B).reshape(x_NxD.shape)
    return jnp.where(keep_NxD, x_NxD / (1 - rate), 0).astype(x_NxD.dtype)


class Block(nn.Module):
    """Attention and SwiGLU with residuals; scanned over layers."""

    config: ModelConfig
    causal: bool
    length: int
    attention: selection.Choice

    @nn.compact
    def __call__(self, x_NxD, layer, segment_ids_BxL, keys_B):
        c = self.config
        heads, groups = c.heads, c.kv_heads or c.heads
        size, ffn = c.width // c.heads, c.ffn_multiple * c.width
        inward = nn.initializers.normal(c.init_std)
        residual = nn.initializers.normal(c.init_std / (2 * c.layers) ** 0.5)

        def dense(name, y_NxI, outputs, init=inward):
            w_IxO = self.param(name, init, (y_NxI.shape[-1], outputs))
            return y_NxI @ w_IxO.astype(y_NxI.dtype)

        def norm(name, y):
            scale = self.param(name, nn.initializers.ones, (y.shape[-1],))
            return rms_norm(y, scale, c.norm_eps)

        qkv = dense("qkv", norm("attention_norm", x_NxD), (heads + 2 * groups) * size)
        qkv = qkv.reshape(-1, self.length, heads + 2 * groups, size)
        q, k, v = jnp.split(qkv, [heads, heads + groups], axis=2)
        if c.qk_norm:
            q, k = norm("q_norm", q), norm("k_norm", k)
        tables = rope_tables(self.length, size, c.rope_base)
        q, k = rotate(q, *tables), rotate(k, *tables)
        a = attention(q, k, v, self.causal, segment_ids_BxL, *self.attention[:2])
        a_NxD = dense("attention_out", a.reshape(-1, c.width), c.width, residual)
        x_NxD = x_NxD + dropout(a_NxD, keys_B, c.dropout, 2 * layer)

        h_NxD = norm("ffn_norm", x_NxD)
        h_NxF = jax.nn.silu(dense("gate", h_NxD, ffn)) * dense("up", h_NxD, ffn)
        m_NxD = dense("down", h_NxF, c.width, residual)
        return x_NxD + dropout(m_NxD, keys_B, c.dropout, 2 * layer + 1), None


class Transformer(nn.Module):
    """The backbone of ARM (causal), MDM and MDM-Prime (bidirectional).

    Attributes:
        slots: sub-tokens per token, S.
        base: digits per slot; the digit `base` is the mask (for ARM: BOS).
        attention, embedding: what computes them.
        remat: `none`, `dots` (keep matmul outputs) or `full` (recompute each block).
    """

    config: ModelConfig
    slots: int
    base: int
    causal: bool
    attention: selection.Choice
    embedding: selection.Choice
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        digits_BxLxS: jax.Array,
        segment_ids_BxL: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states [B, L, D] and head rows [V, D] in code order, both in `config.dtype`."""
        c = self.config
        batch, length, _ = digits_BxLxS.shape
        rows, size = self.base + 1, c.width if c.embedding == "sum" else c.width // self.slots
        tables = 1 if c.embedding == "cat_shared" else self.slots
        init = nn.initializers.normal(c.init_std)
        table_TxRxE = self.param("embedding", init, (tables, rows, size))
        digits_NxS = digits_BxLxS.reshape(-1, self.slots)
        implementation = self.embedding.implementation
        x_NxD = subtoken_embedding(
            c.embedding, table_TxRxE, digits_NxS, c.width, implementation, c.dtype
        )
        block = Block
        if self.remat != "none":
            policies = jax.checkpoint_policies
            dots = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable,
                policies.save_only_these_names(SAVED),
            )
            policy = dots if self.remat == "dots" else None
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.layers,
        )(c, self.causal, length, self.attention, name="layers")
        x_NxD, _ = layers(x_NxD, jnp.arange(c.layers), segment_ids_BxL, dropout_keys_B)
        scale = self.param("final_norm", nn.initializers.ones, (c.width,))
        h_NxD = rms_norm(x_NxD, scale, c.norm_eps)
        if c.tied_head:
            head_VxD = table_TxRxE.reshape(-1, c.width)[: c.vocab_size]
        else:
            head_VxD = self.param("head", init, (c.vocab_size, c.width))
        return h_NxD.reshape(batch, length, c.width), head_VxD.astype(c.dtype)


def build(config: RunConfig, codebook: Codebook) -> Transformer:
    """The network of a run: causal for ARM, bidirectional otherwise."""
    device_kind = selection.target_kind()
    return Transformer(
        config=config.model,
        slots=codebook.length,
        base=codebook.base,
        causal=config.family == "arm",
        attention=selection.attention(config, device_kind),
        embedding=selection.embedding(config, device_kind),
        remat=config.mesh.remat,
    )
