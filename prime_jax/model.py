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
from prime_jax.sharding import WHOLE, Shardings, enter_split, leave_split
from prime_jax.subtokens import Codebook


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + eps) * scale).astype(x.dtype)


def rope_tables(
    length: int, size: int, base: float, rounded: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin float32 [L, K/2] of the rotate-half convention, rounded to a dtype before."""
    angle = np.arange(length)[:, None] / base ** (np.arange(0, size, 2) / size)
    cos, sin = (f(angle).astype(jnp.dtype(rounded)) for f in (np.cos, np.sin))
    return cos.astype(np.float32), sin.astype(np.float32)


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
    shardings: Shardings = WHOLE

    @nn.compact
    def __call__(self, x_NxD, layer, segment_ids_BxL, keys_B):
        c = self.config
        size, ffn = c.width // c.heads, c.ffn_multiple * c.width
        split = self.shardings.model
        groups = c.kv_heads or c.heads
        shared = c.heads // groups  # query heads of a group
        inward = nn.initializers.normal(c.init_std)
        residual = nn.initializers.normal(c.init_std / (2 * c.layers) ** 0.5)

        def weight(name, shape, init):
            part = self.param(name, init, self.shardings.local(name, shape))
            return self.shardings.gathered(name, shape, part, c.dtype)

        def norm(name, y):
            scale = self.param(name, nn.initializers.ones, (y.shape[-1],))
            return rms_norm(y, scale, c.norm_eps)

        def columns(y_NxD):
            """Inputs of matrices whose columns are split."""
            return enter_split(y_NxD) if split > 1 else y_NxD

        def summed(y_NxD):
            """Outputs of matrices whose rows are split."""
            return leave_split(y_NxD) if split > 1 else y_NxD

        h_NxD = columns(norm("attention_norm", x_NxD))
        # Columns by group: its query heads, its key, its value. So groups can be split.
        qkv = h_NxD @ weight("qkv", (c.width, groups * (shared + 2) * size), inward)
        qkv = qkv.reshape(-1, self.length, groups // split, shared + 2, size)
        q, k, v = jnp.split(qkv, [shared, shared + 1], axis=3)
        q, k, v = (y.reshape(*y.shape[:2], -1, size) for y in (q, k, v))
        if c.qk_norm:
            q, k = norm("q_norm", q), norm("k_norm", k)
        tables = rope_tables(self.length, size, c.rope_base, c.rope_tables)
        q, k = rotate(q, *tables), rotate(k, *tables)
        self.sow("attention", "query_key", (q, k))  # nothing, unless `apply` asks for it
        a = attention(q, k, v, self.causal, segment_ids_BxL, *self.attention[:2])
        a_NxD = a.reshape(x_NxD.shape[0], -1) @ weight(
            "attention_out", (c.width, c.width), residual
        )
        x_NxD = x_NxD + dropout(summed(a_NxD), keys_B, c.dropout, 2 * layer)

        h_NxD = columns(norm("ffn_norm", x_NxD))
        gate_NxF = h_NxD @ weight("gate", (c.width, ffn), inward)
        h_NxF = jax.nn.silu(gate_NxF) * (h_NxD @ weight("up", (c.width, ffn), inward))
        m_NxD = summed(h_NxF @ weight("down", (ffn, c.width), residual))
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
    shardings: Shardings = WHOLE

    @nn.compact
    def __call__(
        self,
        digits_BxLxS: jax.Array,
        segment_ids_BxL: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states [B, L, D] and head rows [V, D] in code order, both in `config.dtype`."""
        c = self.config

        def weight(name, shape, dtype):
            part = self.param(name, init, self.shardings.local(name, shape))
            return self.shardings.gathered(name, shape, part, dtype)

        batch, length, _ = digits_BxLxS.shape
        rows, size = self.base + 1, c.width if c.embedding == "sum" else c.width // self.slots
        tables = 1 if c.embedding == "cat_shared" else self.slots
        init = nn.initializers.normal(c.init_std)
        table_TxRxE = weight("embedding", (tables, rows, size), jnp.float32)
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
            variable_axes={"params": 0, "attention": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.layers,
        )(c, self.causal, length, self.attention, self.shardings, name="layers")
        x_NxD, _ = layers(x_NxD, jnp.arange(c.layers), segment_ids_BxL, dropout_keys_B)
        scale = self.param("final_norm", nn.initializers.ones, (c.width,))
        h_NxD = rms_norm(x_NxD, scale, c.norm_eps)
        if c.tied_head:
            head_VxD = table_TxRxE.reshape(-1, c.width)[: c.vocab_size].astype(c.dtype)
        else:
            head_VxD = weight("head", (c.vocab_size, c.width), c.dtype)
        return h_NxD.reshape(batch, length, c.width), head_VxD


def build(config: RunConfig, codebook: Codebook, shardings: Shardings = WHOLE) -> Transformer:
    """The network of a run: causal for ARM, bidirectional otherwise.

    Args:
        shardings: of the parameters that `apply` is given; `init` makes whole ones by default.
    """
    device_kind = selection.target_kind()
    return Transformer(
        config=config.model,
        slots=codebook.length,
        base=codebook.base,
        causal=config.family == "arm",
        attention=selection.attention(config, device_kind),
        embedding=selection.embedding(config, device_kind),
        remat=config.mesh.remat,
        shardings=shardings,
    )
