"""A prime_jax model in PyTorch. `prime-jax export --format hf` copies this file beside the weights.

    AutoModelForCausalLM   family arm: BOS, x_1, ..., x_{L-1} in, logits of x_1, ..., x_L out
    AutoModelForMaskedLM   families mdm and prime: tokens of which some, or some sub-tokens, are masked

Ids 0 to V-1 are tokens. Id V is read only: the mask, or BOS of family arm. A token of family prime is
l digits in base b, its sub-tokens; the digit b means "masked". The names of shapes: B batch, L
tokens, S = l sub-tokens, V tokens of the vocabulary, D width, H heads, G key-value heads, K head size.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput


class PrimeJaxConfig(PretrainedConfig):
    """`config.json`: `length` is l, `base` is b, `run` holds all settings of the run."""

    model_type = "prime_jax"


class Norm(nn.Module):
    """RMSNorm over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


class Embedding(nn.Module):
    """The vectors of a token's sub-tokens as one, by `model.embedding`: concatenated or summed."""

    def __init__(self, config: PrimeJaxConfig):
        super().__init__()
        slots, kind = config.length, config.run["model"]["embedding"]
        self.summed, self.width = kind == "sum", config.hidden_size
        tables = 1 if kind == "cat_shared" else slots
        size = self.width if self.summed else self.width // slots
        self.weight = nn.Parameter(torch.empty(tables, config.base + 1, size))

    def forward(self, digits_BxLxS):
        tables = self.weight.expand(digits_BxLxS.shape[-1], -1, -1)
        slots = torch.arange(len(tables), device=digits_BxLxS.device)
        x_BxLxSxE = tables[slots, digits_BxLxS]
        if self.summed:
            return x_BxLxSxE.sum(2)
        x_BxLxD = x_BxLxSxE.flatten(2)
        return F.pad(x_BxLxD, (0, self.width - x_BxLxD.shape[-1]))


def rope_tables(length: int, config: PrimeJaxConfig):
    """cos, sin float32 [L, K/2] on the CPU, where there is float64; rounded as in training."""
    m, size = config.run["model"], config.hidden_size // config.num_attention_heads
    at, even = (torch.arange(*x, dtype=torch.float64) for x in ((length,), (0, size, 2)))
    angle = at[:, None] / m["rope_base"] ** (even / size)
    rounded = getattr(torch, m["rope_tables"])
    return tuple(f(angle).to(rounded).float() for f in (torch.cos, torch.sin))


def rotate(x_BxHxLxK, cos_Bx1xLxk, sin_Bx1xLxk):
    """RoPE that pairs element k of a head with element k + K/2."""
    cos, sin = cos_Bx1xLxk, sin_Bx1xLxk
    first, second = x_BxHxLxK.float().chunk(2, dim=-1)
    out = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return out.to(x_BxHxLxK.dtype)


class Block(nn.Module):
    """Attention and SwiGLU with residuals."""

    def __init__(self, config: PrimeJaxConfig, layer: int):
        super().__init__()
        m, width, ffn = config.run["model"], config.hidden_size, config.intermediate_size
        self.layer, self.groups = layer, config.num_key_value_heads
        self.shared = config.num_attention_heads // self.groups  # query heads of a group
        size = width // config.num_attention_heads
        self.attention_norm = Norm(width, m["norm_eps"])
        self.qkv = nn.Linear(width, self.groups * (self.shared + 2) * size, bias=False)
        if m["qk_norm"]:
            self.q_norm, self.k_norm = Norm(size, m["norm_eps"]), Norm(size, m["norm_eps"])
        self.attention_out = nn.Linear(width, width, bias=False)
        self.ffn_norm = Norm(width, m["norm_eps"])
        self.gate = nn.Linear(width, ffn, bias=False)
        self.up = nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x_BxLxD, rope, visible_Bx1xLxT, cache):
        # Rows by group: its query heads, its key, its value.
        rows = self.qkv(self.attention_norm(x_BxLxD))
        rows = rows.unflatten(-1, (self.groups, self.shared + 2, -1))
        split = rows.split([self.shared, 1, 1], dim=3)
        q, k, v = (y.flatten(2, 3).transpose(1, 2) for y in split)  # [B, H or G, L, K]
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(y, *rope) for y in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (y.repeat_interleave(self.shared, dim=1) for y in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_Bx1xLxT)
        x_BxLxD = x_BxLxD + self.attention_out(a.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x_BxLxD)
        return x_BxLxD + self.down(F.silu(self.gate(h)) * self.up(h))


class PrimeJaxModel(PreTrainedModel):
    """The network and its codes; `PrimeJaxForCausalLM` and `PrimeJaxForMaskedLM` are for use."""

    config_class = PrimeJaxConfig
    _supports_sdpa = True

    def __init__(self, config: PrimeJaxConfig):
        super().__init__(config)
        m = config.run["model"]
        self.register_buffer("codes", torch.zeros(m["vocab_size"], dtype=torch.int64))
        self.embedding = Embedding(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([Block(config, layer) for layer in layers])
        self.final_norm = Norm(config.hidden_size, m["norm_eps"])
        if not m["tied_head"]:
            self.head = nn.Linear(config.hidden_size, m["vocab_size"], bias=False)
        self.post_init()

    def digits_of(self, ids):
        """Sub-tokens [..., S] of ids [...]; of id V all are masked (S = 1: a digit is the id)."""
        if self.config.length == 1:
            return ids[..., None]
        base, slots = self.config.base, self.config.length
        powers = base ** torch.arange(slots - 1, -1, -1, device=ids.device)
        known = ids < len(self.codes)
        digits = self.codes[torch.where(known, ids, 0)][..., None] // powers % base
        return torch.where(known[..., None], digits, base)

    def ids_of(self, digits):
        """Ids [...] of sub-tokens [..., S]; V where one is masked, or where no token has them."""
        vocab, base, slots = len(self.codes), self.config.base, self.config.length
        if slots == 1:
            return digits[..., 0]
        powers = base ** torch.arange(slots - 1, -1, -1, device=digits.device)
        codes = (digits * powers).sum(-1)
        sorted_codes, order = self.codes.sort()
        at = torch.searchsorted(sorted_codes, codes).clamp(max=vocab - 1)
        right = (sorted_codes[at] == codes) & (digits < base).all(-1)
        return torch.where(right, order[at], vocab)

    def hidden(self, digits_BxLxS, attention_mask=None, cache=None):
        """Hidden states [B, L, D].

        Args:
            attention_mask: [B, T], 0 for padding, which nothing sees and which has no position; T
                counts the positions of the cache too.
        """
        batch, length, _ = digits_BxLxS.shape
        start = cache.get_seq_length() if cache is not None else 0
        at = torch.arange(start + length, device=digits_BxLxS.device)
        if attention_mask is None:
            attention_mask = torch.ones(batch, len(at), device=at.device)
        real_BxT = attention_mask.bool()
        position_BxL = (real_BxT.cumsum(1) - 1).clamp(min=0)[:, start:]
        visible_BxLxT = real_BxT[:, None].expand(-1, length, -1)
        if self.config.family == "arm":
            visible_BxLxT = visible_BxLxT & (at <= at[start:, None])
        visible_BxLxT = visible_BxLxT | (at == at[start:, None])  # padding: nothing else is visible
        rope = rope_tables(len(at), self.config)
        rope = tuple(x.to(at.device)[position_BxL][:, None] for x in rope)
        x_BxLxD = self.embedding(digits_BxLxS)
        for layer in self.layers:
            x_BxLxD = layer(x_BxLxD, rope, visible_BxLxT[:, None], cache)
        return self.final_norm(x_BxLxD)

    def logits_of(self, h_BxLxD):
        """Logits [B, L, V] by token id."""
        if self.config.run["model"]["tied_head"]:
            return F.linear(h_BxLxD, self.embedding.weight[0, : len(self.codes)])
        return self.head(h_BxLxD)


def with_last_id(logits_BxLxV):
    """Logits [B, L, V + 1]: id V, the mask or BOS, is never predicted."""
    return F.pad(logits_BxLxV, (0, 1), value=torch.finfo(logits_BxLxV.dtype).min)


# Versions of transformers differ in the name of the cache.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class PrimeJaxForCausalLM(PrimeJaxModel, GenerationMixin):
    """Family arm. A text begins with BOS, id V, which the tokenizer puts there."""

    def forward(
        self,
        input_ids,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        labels=None,
        use_cache=False,
        **_,
    ):
        """Logits [B, L, V + 1] of the next token; `loss` is nats per token of `labels`, shifted here."""
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        h = self.hidden(self.digits_of(input_ids), attention_mask, cache)
        logits, loss = with_last_id(self.logits_of(h)), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})


class PrimeJaxForMaskedLM(PrimeJaxModel):
    """Families mdm and prime. `nelbo` is the number to report; the loss of all tokens at once,
    which other masked models report, is no bound for sub-tokens."""

    def forward(self, input_ids=None, attention_mask=None, sub_tokens=None, labels=None, **_):
        """Logits [B, L, V + 1] of every position's token, given all that is visible.

        Args:
            input_ids: [B, L]; id V where a token is masked as a whole.
            sub_tokens: [B, L, S], in place of `input_ids`; b where a sub-token is masked.
        """
        if labels is not None:
            raise NotImplementedError("no loss of labels, which would be no bound; use `nelbo`")
        digits = self.digits_of(input_ids) if sub_tokens is None else sub_tokens
        return MaskedLMOutput(logits=with_last_id(self.logits(digits, attention_mask)))

    def logits(self, sub_tokens, attention_mask=None, carry_over=None):
        """Logits [B, L, V]; with carry-over, the run's choice by default, tokens that disagree with
        a visible sub-token have no probability."""
        z_BxLxV = self.logits_of(self.hidden(sub_tokens, attention_mask))
        if carry_over is None:
            carry_over = self.config.run["objective"]["carry_over"]
        if self.config.length == 1 or not carry_over:
            return z_BxLxV
        lowest = torch.finfo(z_BxLxV.dtype).min
        for slot, table_V in enumerate(self._table().T):
            seen_BxLx1 = sub_tokens[..., slot, None]
            z_BxLxV = z_BxLxV.masked_fill(
                (seen_BxLx1 < self.config.base) & (seen_BxLx1 != table_V), lowest
            )
        return z_BxLxV

    def _table(self):
        """Sub-tokens [V, S] of all tokens."""
        return self.digits_of(torch.arange(len(self.codes), device=self.codes.device))

    def log_marginals(self, sub_tokens, attention_mask=None):
        """Log-probability [B, L, S, b] of every digit of every sub-token; below -1e30 where no token
        that agrees with what is visible has it."""
        log_p_BxLxV = self.logits(sub_tokens, attention_mask).float().log_softmax(-1)
        if self.config.length == 1:
            return log_p_BxLxV[:, :, None]
        out = log_p_BxLxV.new_full((*sub_tokens.shape, self.config.base), -torch.inf)
        for slot, table_V in enumerate(self._table().T):
            for digit in table_V.unique().tolist():
                out[..., slot, digit] = log_p_BxLxV[..., table_V == digit].logsumexp(-1)
        return out

    def log_probs(self, sub_tokens, truth, attention_mask=None):
        """Log-probability [B, L, S] of each true sub-token alone, where it is masked; 0 elsewhere.

        Args:
            truth: [B, L, S], nothing masked.
        """
        log_p_BxLxV = self.logits(sub_tokens, attention_mask).float().log_softmax(-1)
        if self.config.length == 1:
            found = log_p_BxLxV.gather(-1, truth)
        else:
            others = (truth[..., s, None] != table_V for s, table_V in enumerate(self._table().T))
            of_slot = [log_p_BxLxV.masked_fill(x, -torch.inf).logsumexp(-1) for x in others]
            found = torch.stack(of_slot, -1)
        return torch.where(sub_tokens == self.config.base, found, 0.0)

    @torch.no_grad()
    def nelbo(self, input_ids, draws: int = 16, generator=None):
        """Unbiased draws [draws, B] of an upper bound on -log p(x), in nats per row of `input_ids`.

        A draw masks exactly k of the n = L S sub-tokens, k uniform on 1 to n, and weighs their cost
        by n / k. Report the mean, and its standard error over the draws. Every id counts: give rows of
        equal length without padding.
        """
        if (input_ids >= len(self.codes)).any():
            raise ValueError(f"nelbo: id {len(self.codes)} is the mask; give the whole text")
        truth = self.digits_of(input_ids)
        batch, n = len(truth), truth[0].numel()
        drawn = {"device": truth.device, "generator": generator}
        out = []
        for _ in range(draws):
            count_Bx1 = torch.randint(1, n + 1, (batch, 1), **drawn)
            rank_BxN = torch.rand(batch, n, **drawn).argsort(1).argsort(1)
            masked = (rank_BxN < count_Bx1).view(truth.shape)
            log_p = self.log_probs(torch.where(masked, self.config.base, truth), truth)
            out.append(-log_p.sum((1, 2)) * n / count_Bx1[:, 0])
        return torch.stack(out)

    @torch.no_grad()
    def generate(self, input_ids, steps: int | None = None, temperature: float = 1.0,
                 attention_mask=None, generator=None):  # fmt: skip
        """Ids [B, L] with a token drawn wherever `input_ids` is masked.

        Masked sub-tokens are revealed in a random order in `steps` groups (default: as many as there
        are sub-tokens in a row). What a step reveals of a token is drawn jointly; different tokens
        are drawn independently, so fewer steps are less exact.
        """
        digits, base = self.digits_of(input_ids), self.config.base
        steps = steps or digits[0].numel()
        drawn = {"device": digits.device, "generator": generator}
        when = torch.randint(steps, digits.shape, **drawn)
        for step in range(steps):
            reveal = (digits == base) & (when == step)
            if reveal.any():
                z_BxLxV = self.logits(digits, attention_mask, carry_over=True).float() / temperature
                p_NxV = z_BxLxV.softmax(-1).flatten(0, 1)
                ids = torch.multinomial(p_NxV, 1, generator=generator).view(digits.shape[:2])
                digits = torch.where(reveal, self.digits_of(ids), digits)
        return self.ids_of(digits)
