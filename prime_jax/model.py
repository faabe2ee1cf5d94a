"""One transformer for all families: sub-token digits in, hidden states and head rows out.

Pre-norm RMSNorm, SwiGLU, RoPE over tokens, RMSNorm on q and k per head, no biases (theory.md,
"The backbone"). The time is not an input; there are L positions, not l * L. Activations have shape
[B*L, D] between the attention calls, which is fastest for XLA's matmuls on CPU and TPU.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.config import ModelConfig, RunConfig
from prime_jax.kernels import selection
from prime_jax.kernels.attention import attention, attention_to_cache
from prime_jax.kernels.attention_mask import SAVED
from prime_jax.kernels.common import target_kind
from prime_jax.kernels.embedding import subtoken_embedding
from prime_jax.runtime.sharding import WHOLE, Shardings, enter_split, leave_split
from prime_jax.subtokens import Codebook


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + eps) * scale).astype(x.dtype)


def rope_tables(
    length: int, size: int, base: float, rounded: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin float32 [L, K/2] of the rotate-half convention, first rounded to `rounded`."""
    angle = np.arange(length)[:, None] / base ** (np.arange(0, size, 2) / size)
    cos, sin = (f(angle).astype(jnp.dtype(rounded)) for f in (np.cos, np.sin))
    return cos.astype(np.float32), sin.astype(np.float32)


def rotate(x_BxLxHxK: jax.Array, cos_BxLxK: jax.Array, sin_BxLxK: jax.Array) -> jax.Array:
    first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BxLxK[:, :, None], sin_BxLxK[:, :, None]
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x_BxLxHxK.dtype)


def dropout(x_NxD: jax.Array, keys_B: jax.Array | None, rate: float, salt: jax.Array) -> jax.Array:
    """Dropout with a key per sequence, so independent of the mesh; off without keys."""
    if keys_B is None or rate == 0.0:
        return x_NxD
    shape = (x_NxD.shape[0] // keys_B.shape[0], x_NxD.shape[1])

    def draw(key):
        return jax.random.bernoulli(jax.random.fold_in(key, salt), 1 - rate, shape)

    keep_NxD = jax.vmap(draw)(keys_B).reshape(x_NxD.shape)
    return jnp.where(keep_NxD, x_NxD / (1 - rate), 0).astype(x_NxD.dtype)


class Cache(NamedTuple):
    """KV cache of Z layers, so that a sequence can be read in parts.

    Attributes:
        k_ZxBxMxGxK, v_ZxBxMxGxK: capacity of M positions; those from `length_B` on are not used.
        length_B: positions read of each sequence.
    """

    k_ZxBxMxGxK: jax.Array
    v_ZxBxMxGxK: jax.Array
    length_B: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int) -> "Cache":
        groups = config.kv_heads or config.heads
        shape = (config.layers, batch, capacity, groups, config.width // config.heads)
        zeros = jnp.zeros(shape, config.dtype)
        return cls(zeros, zeros, jnp.zeros(batch, jnp.int32))


def _updated(old_BxMxGxK: jax.Array, new_BxLxGxK: jax.Array, start_B: jax.Array) -> jax.Array:
    def write(old, new, start):
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=0)

    return jax.vmap(write)(old_BxMxGxK, new_BxLxGxK, start_B)


class Block(nn.Module):
    """Attention and SwiGLU with residuals; scanned over layers."""

    config: ModelConfig
    causal: bool
    length: int
    attention: selection.Choice
    block_length: int = 0
    shardings: Shardings = WHOLE

    @nn.compact
    def __call__(self, x_NxD, layer, kv, segment_ids_BxL, keys_B, start_B):
        """`kv`: the layer's (keys, values) of a `Cache`, returned updated, or None."""
        c = self.config
        size, ffn = c.width // c.heads, c.ffn
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
        # Columns by group (its query heads, its key, its value), so that groups can be split.
        qkv = h_NxD @ weight("qkv", (c.width, groups * (shared + 2) * size), inward)
        qkv = qkv.reshape(-1, self.length, groups // split, shared + 2, size)
        q, k, v = jnp.split(qkv, [shared, shared + 1], axis=3)
        q, k, v = (y.reshape(*y.shape[:2], -1, size) for y in (q, k, v))
        if c.qk_norm:
            q, k = norm("q_norm", q), norm("k_norm", k)
        if kv is None:
            copies = 2 if self.block_length else 1  # noisy and clean have the same positions
            tables = rope_tables(self.length // copies, size, c.rope_base, c.rope_tables)
            tables = [np.tile(x, (copies, 1))[None] for x in tables]
            q, k = rotate(q, *tables), rotate(k, *tables)
            self.sow("attention", "query_key", (q, k))  # stored only if `apply` collects it
            see = (self.causal, segment_ids_BxL, *self.attention[:2], self.block_length)
            a = attention(q, k, v, *see)
        else:
            at_BxL = start_B[:, None] + jnp.arange(self.length)
            tables = rope_tables(kv[0].shape[1], size, c.rope_base, c.rope_tables)
            tables = [jnp.asarray(x)[at_BxL] for x in tables]
            q, k = rotate(q, *tables), rotate(k, *tables)
            kv = tuple(_updated(old, new, start_B) for old, new in zip(kv, (k, v), strict=True))
            last_BxL = at_BxL if self.causal else jnp.broadcast_to(at_BxL[:, -1:], at_BxL.shape)
            a = attention_to_cache(q, *kv, last_BxL)
        a_NxD = a.reshape(x_NxD.shape[0], -1) @ weight(
            "attention_out", (c.width, c.width), residual
        )
        x_NxD = x_NxD + dropout(summed(a_NxD), keys_B, c.dropout, 2 * layer)

        h_NxD = columns(norm("ffn_norm", x_NxD))
        gate_NxF = h_NxD @ weight("gate", (c.width, ffn), inward)
        h_NxF = jax.nn.silu(gate_NxF) * (h_NxD @ weight("up", (c.width, ffn), inward))
        m_NxD = summed(h_NxF @ weight("down", (ffn, c.width), residual))
        return x_NxD + dropout(m_NxD, keys_B, c.dropout, 2 * layer + 1), kv


class Transformer(nn.Module):
    """The backbone of ARM (causal), MDM and MDM-Prime (bidirectional, or by blocks).

    Attributes:
        slots: sub-tokens per token, S.
        base: digits per slot; the digit `base` is the mask (for ARM: BOS).
        attention, embedding: their implementations.
        remat: `none`, `dots` (keep matmul outputs) or `full` (recompute each block).
        block_length: above 0 for block diffusion. The digits are then [B, 2, L, S], a noisy and a
            clean sequence, and the hidden states are those of the noisy one
            (kernels/attention.py). Digits [B, L, S] are used for both (sampling).
    """

    config: ModelConfig
    slots: int
    base: int
    causal: bool
    attention: selection.Choice
    embedding: selection.Choice
    remat: str = "none"
    block_length: int = 0
    shardings: Shardings = WHOLE

    @nn.compact
    def __call__(
        self,
        digits_BxLxS: jax.Array,
        segment_ids_BxL: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, ...]:
        """Hidden states [B, L, D] and head rows [V, D] in code order, both in `config.dtype`.

        With a cache the digits continue the cached positions, all of which are visible, and the
        updated cache is returned as well; segments are not supported. Block diffusion then reads
        one block at a time: noisy to denoise it, clean to add it to the cache.
        """
        c = self.config

        def weight(name, shape):
            part = self.param(name, init, self.shardings.local(name, shape))
            return self.shardings.gathered(name, shape, part, c.dtype)

        noisy_and_clean = self.block_length > 0 and cache is None
        if noisy_and_clean:
            if digits_BxLxS.ndim == 3:
                digits_BxLxS = jnp.stack([digits_BxLxS, digits_BxLxS], axis=1)
            digits_BxLxS = digits_BxLxS.reshape(digits_BxLxS.shape[0], -1, self.slots)
            segment_ids_BxL = None if segment_ids_BxL is None else jnp.tile(segment_ids_BxL, 2)
        batch, length, _ = digits_BxLxS.shape
        rows, size = self.base + 1, c.width if c.embedding == "sum" else c.width // self.slots
        tables = 1 if c.embedding == "cat_shared" else self.slots
        init = nn.initializers.normal(c.init_std)
        # In float32, so that gradients of frequent tokens are summed in float32.
        table_TxRxE = weight("embedding", (tables, rows, size)).astype(jnp.float32)
        digits_NxS = digits_BxLxS.reshape(-1, self.slots)
        x_NxD = subtoken_embedding(
            c.embedding,
            table_TxRxE=table_TxRxE,
            digits_NxS=digits_NxS,
            width=c.width,
            implementation=self.embedding.implementation,
            dtype=c.dtype,
        )
        layers = nn.scan(
            _recomputed(Block, self.remat),
            variable_axes={"params": 0, "attention": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
        )(c, self.causal, length, self.attention, self.block_length, self.shardings, name="layers")
        kv, start_B = (None, None) if cache is None else (cache[:2], cache.length_B)
        x_NxD, kv = layers(
            x_NxD, jnp.arange(c.layers), kv, segment_ids_BxL, dropout_keys_B, start_B
        )
        if noisy_and_clean:  # the clean part is only context
            length //= 2
            x_NxD = x_NxD.reshape(batch, 2, -1)[:, 0].reshape(-1, c.width)
        scale = self.param("final_norm", nn.initializers.ones, (c.width,))
        h_NxD = rms_norm(x_NxD, scale, c.norm_eps)
        if c.tied_head:
            head_VxD = table_TxRxE.reshape(-1, c.width)[: c.vocab_size].astype(c.dtype)
        else:
            head_VxD = weight("head", (c.vocab_size, c.width))
        h_BxLxD = h_NxD.reshape(batch, length, c.width)
        if cache is None:
            return h_BxLxD, head_VxD
        return h_BxLxD, head_VxD, Cache(*kv, start_B + length)


def _recomputed(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """`block`, whose backward pass recomputes what `remat` does not keep."""
    if remat == "none":
        return block
    policies = jax.checkpoint_policies
    dots = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED)
    )
    return nn.remat(block, prevent_cse=False, policy=dots if remat == "dots" else None)


def build(config: RunConfig, codebook: Codebook, shardings: Shardings = WHOLE) -> Transformer:
    """The network of a run: causal for ARM, bidirectional otherwise.

    Args:
        shardings: of the parameters passed to `apply`; by default they are not sharded.
    """
    device_kind = target_kind()
    return Transformer(
        config=config.model,
        slots=codebook.length,
        base=codebook.base,
        causal=config.family == "arm",
        attention=selection.attention(config, device_kind),
        embedding=selection.embedding(config, device_kind),
        remat=config.mesh.remat,
        block_length=config.objective.block_length,
        shardings=shardings,
    )
