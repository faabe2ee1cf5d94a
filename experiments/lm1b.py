"""One Billion Words: ARM, MDM (MDLM) and MDM-Prime for l = 3 (b = 32) and l = 15 (b = 2).

Source: MDLM (arXiv 2406.07524, suppl. D.2 and D.4): 12 layers, width 768, 12 heads, blocks of 128,
batch 512, 1M steps, AdamW 3e-4 constant after 2500 warm-up steps, betas .9/.999, no weight decay,
clip 1, EMA .9999, dropout 0.1 (here 0). SwiGLU at 3 x width, as in preset:owt_92m.

Tokens: 1M steps x 512 x 128 = 6.55e10. MDLM counts only the masked half and calls it 33B; its ARM
had 0.5M steps. Here every family sees the same D.

Not comparable digit by digit: the published numbers are per token of bert-base-uncased, which
lower-cases and strips accents. Our preparation refuses a tokenizer that loses text, so this preset
trains one of the same size (V = 30522, the same N and C) and its number to compare is bits per
byte. Sentences were padded to 128 one by one; ours are cut from the concatenated stream, which
tells no model where a sentence ends.

Data (the test split stays as it is; validation is cut from training by hash):
    prime-jax data prepare tfds:lm1b --tokenizer bpe:30522 --out data/lm1b --seq-len 128 \
        --valid-fraction 0.01 --test-fraction 0

Arithmetic (hours = C matmul / (40 % of the bfloat16 peak) / 3600: 7.88e13 FLOP/s on a v5e chip,
3.956e14 on an H100; 40 % is an assumption):
    | runs of   | N total |      N | N reference |       D | C reference | C matmul | v5e hours | H100 hours |
    | all       |       - | 9.20e7 |      8.49e7 | 2.62e11 |     1.34e20 |  1.86e20 |       655 |        130 |
    | arm       |  1.39e8 | 9.20e7 |      8.49e7 | 6.55e10 |     3.34e19 |  4.59e19 |       162 |       32.2 |
    | mdm       |  1.39e8 | 9.20e7 |      8.49e7 | 6.55e10 |     3.34e19 |  4.63e19 |       163 |       32.5 |
    | prime-l3  |  1.15e8 | 9.20e7 |      8.49e7 | 6.55e10 |     3.34e19 |  4.71e19 |       166 |       33.1 |
    | prime-l15 |  1.15e8 | 9.20e7 |      8.49e7 | 6.55e10 |     3.34e19 |  4.66e19 |       164 |       32.7 |

Published results that stand, test perplexity per bert-base-uncased token (MDLM, table 1):
    ARM, 33B tokens    perplexity 22.32 = 3.105 nats   nll
    ARM, 327B tokens   perplexity 20.86 = 3.038 nats   nll
    MDLM, 33B tokens   perplexity 27.04 = 3.297 nats   nelbo
    MDLM, 327B tokens  perplexity 23.00 = 3.135 nats   nelbo
    SEDD, 33B tokens   perplexity 32.79 = 3.490 nats   nelbo
On the concatenated stream, as here, they are higher; BD3-LM (arXiv 2503.09573, second-hand):
    ARM, 65B tokens    perplexity 22.83 = 3.128 nats   nll
    MDLM, 65B tokens   perplexity 31.78 = 3.459 nats   nelbo
No MDM-Prime number on LM1B is known to us.

    prime-jax sweep plan preset:lm1b
"""

from prime_jax import flops
from prime_jax.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
)
from prime_jax.sweep.grid import Sweep

BASE = RunConfig(
    steps=1_000_000,
    batch_size=512,
    model=ModelConfig(
        vocab_size=30522,
        layers=12,
        width=768,
        heads=12,
        ffn_multiple=3,
        qk_norm=False,
        dtype="bfloat16",
    ),
    objective=ObjectiveConfig(schedule="log-linear", time_eps=1e-3),
    data=DataConfig(path="data/lm1b", seq_len=128),
    optim=OptimConfig(
        peak_lr=3e-4,
        final_lr_fraction=1.0,  # constant
        warmup_steps=2500,
        b2=0.999,
        weight_decay=0.0,
        ema=0.9999,
    ),
    eval=EvalConfig(examples=4096),
)


def sweep() -> Sweep:
    return Sweep(
        name="lm1b",
        base=BASE,
        families={
            "arm": {},
            "mdm": {},
            "prime-l3": {"family": "prime", "subtokens.length": 3},
            "prime-l15": {"family": "prime", "subtokens.length": 15},
        },
        budgets=[flops.train_flops(BASE, "reference")],
        sizes=[(12, 768, 12)],
        flops="reference",
        batch=f"fixed:{BASE.batch_size}",
        lr=f"fixed:{BASE.optim.peak_lr}",
    )
