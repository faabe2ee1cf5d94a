"""OpenWebText, 92M: ARM, MDM (MDLM) and MDM-Prime for l = 2, 3, 4, 6, 8 and 16.

Source: MDM-Prime (arXiv 2505.18495) on the code and recipe of MDLM (arXiv 2406.07524, suppl. D.4):
12 layers, width 768, 12 heads, context 1024, GPT-2 BPE, batch 512, 1M steps, AdamW 3e-4 constant
after 2500 warm-up steps, betas .9/.999, no weight decay, clip 1, EMA .9999, dropout 0.1 (here 0).
Bases of l = 2, 3, 4, 6, 8, 16: 225, 37, 15, 7, 4, 2. Up to l = 8 the codes are not shuffled (v1);
l = 16 is v2: binary, full shuffle over all codes.

The size: the published network is a DiT with GELU at 4 x width and adaLN; 12 width^2 layers is
84.9M of it and adaLN about 7.1M, together 92M. Ours has neither time input nor adaLN; SwiGLU at
3 x width gives it 92.0M. What the papers themselves count under that label is not verified.

Tokens: 1M steps x 512 x 1024 = 5.24e11. MDLM counts only the masked half and calls it 262B; its
ARM (17.54) had 0.5M steps. Here every family sees the same D; for the published ARM halve it.
OpenWebText is about 9e9 GPT-2 tokens, so these runs repeat it and the plan flags them.

Data (the published validation set is the last 100k of 8.0M documents; ours as many, by hash):
    prime-jax data prepare 'parquet:openwebtext/*.parquet' --tokenizer tiktoken:gpt2 \
        --out data/owt --seq-len 1024 --valid-fraction 0.0125 --test-fraction 0

Arithmetic (hours = C matmul / (40 % of the bfloat16 peak) / 3600: 7.88e13 FLOP/s on a v5e chip,
3.956e14 on an H100; 40 % is an assumption):
    | runs of   | N total |      N | N reference |       D | C reference | C matmul | v5e hours | H100 hours |
    | all       |       - | 9.20e7 |      8.49e7 | 4.19e12 |     2.14e21 |  3.81e21 |    13,427 |      2,674 |
    | arm       |  1.69e8 | 9.20e7 |      8.49e7 | 5.24e11 |     2.67e20 |  4.41e20 |     1,553 |        309 |
    | mdm       |  1.69e8 | 9.20e7 |      8.49e7 | 5.24e11 |     2.67e20 |  4.70e20 |     1,658 |        330 |
    | prime-l2  |  1.31e8 | 9.20e7 |      8.49e7 | 5.24e11 |     2.67e20 |  5.18e20 |     1,825 |        363 |
    | prime-l3  |  1.31e8 | 9.20e7 |      8.49e7 | 5.24e11 |     2.67e20 |  4.82e20 |     1,699 |        338 |
    | prime-l4  |  1.31e8 | 9.20e7 |      8.49e7 | 5.24e11 |     2.67e20 |  4.77e20 |     1,680 |        335 |
    | prime-l6  |  1.31e8 | 9.20e7 |      8.49e7 | 5.24e11 |     2.67e20 |  4.75e20 |     1,673 |        333 |
    | prime-l8  |  1.31e8 | 9.20e7 |      8.49e7 | 5.24e11 |     2.67e20 |  4.74e20 |     1,670 |        333 |
    | prime-l16 |  1.31e8 | 9.20e7 |      8.49e7 | 5.24e11 |     2.67e20 |  4.74e20 |     1,670 |        333 |

Published results that stand, validation perplexity per GPT-2 token:
    ARM     perplexity 17.54 = 2.864 nats   nll     (MDLM, table 2)
    MDLM    perplexity 22.98 = 3.135 nats   nelbo   (second-hand; MDLM's own table 2 has 23.21)
    SEDD    perplexity 24.10 = 3.182 nats   nelbo   (MDLM, table 2)
    BD3-LM  perplexity 20.73 = 3.032 nats   nelbo   (second-hand)
    at 3e20 FLOPs, sizes of their own (v2): ARM 12.99 (nll), MDM 18.94 (nelbo)
MDM-Prime's 15.36 (v1) and MDM-Prime-v2's 7.77 are the joint loss, a train_loss; retracted. The
authors' re-evaluation of the same weights with marginals (kind nelbo, 100 batches, no standard
errors; chen-hao-chao/mdm-prime, text/README.md):
    l = 2    perplexity 36.55 = 3.599 nats   nelbo
    l = 3    perplexity 41.20 = 3.718 nats   nelbo
    l = 4    perplexity 44.08 = 3.786 nats   nelbo
    l = 6    perplexity 47.68 = 3.865 nats   nelbo
    l = 8    perplexity 48.85 = 3.889 nats   nelbo
    l = 16   perplexity 51.22 = 3.936 nats   nelbo
Those networks were trained on the joint loss. Whether training on the marginal loss closes the gap
to MDLM is the question of this sweep; `as_published` of preset:reference restores the joint
loss.

    prime-jax sweep plan preset:owt_92m
"""

from prime_jax import flops
from prime_jax.config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
)
from prime_jax.sweep.grid import Sweep

BASE = RunConfig(
    steps=1_000_000,
    batch_size=512,
    model=ModelConfig(
        vocab_size=50257,
        layers=12,
        width=768,
        heads=12,
        ffn_multiple=3,
        qk_norm=False,
        dtype="bfloat16",
    ),
    subtokens=SubtokenConfig(shuffle=0.0),
    objective=ObjectiveConfig(schedule="log-linear", time_eps=1e-3),
    data=DataConfig(path="data/owt", seq_len=1024),
    optim=OptimConfig(
        peak_lr=3e-4,
        final_lr_fraction=1.0,  # constant
        warmup_steps=2500,
        b2=0.999,
        weight_decay=0.0,
        ema=0.9999,
    ),
    eval=EvalConfig(examples=512),
    mesh=MeshConfig(accumulate=4),
)
V2 = {"subtokens.length": 16, "subtokens.shuffle": 1.0, "subtokens.scope": "codes"}


def sweep() -> Sweep:
    v1 = {
        f"prime-l{length}": {"family": "prime", "subtokens.length": length}
        for length in (2, 3, 4, 6, 8)
    }
    return Sweep(
        name="owt-92m",
        base=BASE,
        families={"arm": {}, "mdm": {}, **v1, "prime-l16": {"family": "prime", **V2}},
        budgets=[flops.train_flops(BASE, "reference")],
        sizes=[(12, 768, 12)],
        flops="reference",
        batch=f"fixed:{BASE.batch_size}",
        lr=f"fixed:{BASE.optim.peak_lr}",
    )
