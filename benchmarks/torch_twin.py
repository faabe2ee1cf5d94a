"""The MDM of prime_jax as a plain eager PyTorch program: the baseline of `train_step.py`.

Same architecture (prime_jax/model.py), same corruption, loss, clipping and AdamW; written the way
one writes PyTorch, with its fused attention and dense logits.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from prime_jax.config import ModelConfig, RunConfig


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, size = c.heads, c.width // c.heads
        self.attention_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(size, eps=c.norm_eps) for _ in range(2))
        self.attention_out = nn.Linear(c.width, c.width, bias=False)
        self.ffn_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.gate, self.up = (nn.Linear(c.width, c.ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x_BxLxD, cos_LxK, sin_LxK):
        batch, length, width = x_BxLxD.shape
        qkv = self.qkv(self.attention_norm(x_BxLxD)).view(batch, length, 3, self.heads, -1)
        q, k, v = (y.transpose(1, 2) for y in qkv.unbind(2))
        q, k = rotate(self.q_norm(q), cos_LxK, sin_LxK), rotate(self.k_norm(k), cos_LxK, sin_LxK)
        a = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        x_BxLxD = x_BxLxD + self.attention_out(a.transpose(1, 2).reshape(batch, length, width))
        h = self.ffn_norm(x_BxLxD)
        return x_BxLxD + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x, cos_LxK, sin_LxK):
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        [first * cos_LxK - second * sin_LxK, second * cos_LxK + first * sin_LxK], dim=-1
    )


class Transformer(nn.Module):
    def __init__(self, c: ModelConfig, length: int):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size + 1, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.final_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        size = c.width // c.heads
        angle = torch.arange(length)[:, None] / c.rope_base ** (torch.arange(0, size, 2) / size)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        for name, p in self.named_parameters():
            residual = name.endswith(("attention_out.weight", "down.weight"))
            if p.ndim == 2:
                nn.init.normal_(p, std=c.init_std / (math.sqrt(2 * c.layers) if residual else 1))

    def forward(self, token_BxL):
        x_BxLxD = self.embedding(token_BxL)
        for layer in self.layers:
            x_BxLxD = layer(x_BxLxD, self.cos, self.sin)
        return self.head(self.final_norm(x_BxLxD))


class Trainer:
    """`step(tokens)` trains once on int64 tokens [B, L] and returns the loss in nats per token."""

    def __init__(self, config: RunConfig):
        torch.manual_seed(config.seed)
        m, o = config.model, config.optim
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.config = config
        self.model = Transformer(m, config.data.seq_len).to(self.device)
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": o.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, o.peak_lr, betas=(o.b1, o.b2), eps=o.eps)

    def loss(self, token_BxL):
        batch = token_BxL.shape[0]
        strata_B = torch.arange(batch, device=self.device) / batch
        eps = self.config.objective.time_eps
        t_B = eps + (1 - eps) * ((torch.rand((), device=self.device) + strata_B) % 1)
        masked_BxL = torch.rand(token_BxL.shape, device=self.device) < t_B[:, None]
        bfloat16 = self.config.model.dtype == "bfloat16"
        with torch.autocast(self.device, torch.bfloat16, enabled=bfloat16):
            z_BxLxV = self.model(token_BxL.masked_fill(masked_BxL, self.config.model.vocab_size))
        nats_N = F.cross_entropy(
            z_BxLxV.flatten(0, 1).float(), token_BxL.flatten(), reduction="none"
        )
        weight_BxL = masked_BxL / t_B[:, None]
        return (nats_N * weight_BxL.flatten()).sum() / token_BxL.numel()

    def step(self, token_BxL):
        self.optimizer.zero_grad()
        loss = self.loss(token_BxL)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.optimizer.step()
        return loss.detach()
