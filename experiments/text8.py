"""text8, 27 characters: ARM, MDM and MDM-Prime for l = 3 (b = 3) and l = 5 (b = 2).

Source: the recipe of MD4 (arXiv 2406.04329) and its configuration for text8: 12 layers, width 768,
12 heads, blocks of 256, batch 512, 1M steps, AdamW 5e-4 cosine after 2000 warm-up steps, b2 .999,
weight decay .03, no clipping, EMA .9999, dropout .05. We decay to a tenth and clip at 1, and
leave dropout at 0.05 because these runs repeat the text 1456 times. 27 = 3^3, so that l = 3 uses
every code; l = 5 leaves 5 of 32 unused. SwiGLU at 3 x width, as in preset:owt_92m.

Bits per character: a token is one character and one byte, so bits = nats / ln 2, and the
`bits_per_byte` of a result is the usual number. The source has no documents: no EOS, `chars:27`.

Data (text8 is 10^8 characters; the usual split, 90M/5M/5M by position):
    prime-jax data prepare stream:text8 --tokenizer chars:27 --out data/text8 --seq-len 256 \
        --valid-fraction 0.05 --test-fraction 0.05

Arithmetic (hours = C matmul / (40 % of the bfloat16 peak) / 3600: 7.88e13 FLOP/s on a v5e chip,
3.956e14 on an H100; 40 % is an assumption; epochs of the 9e7 training characters):
    | runs of  |      N | N reference |       D | epochs of 9e7 | C reference | C matmul | v5e hours | H100 hours |
    | all      | 9.20e7 |      8.49e7 | 5.24e11 |             - |     2.67e20 |  3.02e20 |     1,066 |        212 |
    | arm      | 9.20e7 |      8.49e7 | 1.31e11 |         1,456 |     6.68e19 |  7.42e19 |       262 |       52.1 |
    | mdm      | 9.20e7 |      8.49e7 | 1.31e11 |         1,456 |     6.68e19 |  7.61e19 |       268 |       53.4 |
    | prime-l3 | 9.20e7 |      8.49e7 | 1.31e11 |         1,456 |     6.68e19 |  7.61e19 |       268 |       53.4 |
    | prime-l5 | 9.20e7 |      8.49e7 | 1.31e11 |         1,456 |     6.68e19 |  7.61e19 |       268 |       53.4 |

Published results that stand (test split; a run here reports the validation split):
    AR Transformer  1.23 bits = 0.853 nats   nll
    D3PM absorbing  1.45 bits = 1.005 nats   nelbo
    MDLM            1.40 bits = 0.970 nats   nelbo
    SEDD            1.39 bits = 0.963 nats   nelbo
    MD4             1.37 bits = 0.950 nats   nelbo
No MDM-Prime number on text8 is known to us.

    prime-jax sweep plan preset:text8
"""

from prime_jax import flops
from prime_jax.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig
from prime_jax.sweep.grid import Sweep

BASE = RunConfig(
    steps=1_000_000,
    batch_size=512,
    model=ModelConfig(
        vocab_size=27,
        layers=12,
        width=768,
        heads=12,
        ffn_multiple=3,
        qk_norm=False,
        dropout=0.05,
        dtype="bfloat16",
    ),
    data=DataConfig(path="data/text8", seq_len=256),
    optim=OptimConfig(peak_lr=5e-4, warmup_steps=2000, b2=0.999, weight_decay=0.03, ema=0.9999),
    eval=EvalConfig(examples=2048),
)


def sweep() -> Sweep:
    return Sweep(
        name="text8",
        base=BASE,
        families={
            "arm": {},
            "mdm": {},
            "prime-l3": {"family": "prime", "subtokens.length": 3},
            "prime-l5": {"family": "prime", "subtokens.length": 5},
        },
        budgets=[flops.train_flops(BASE, "reference")],
        sizes=[(12, 768, 12)],
        flops="reference",
        batch=f"fixed:{BASE.batch_size}",
        lr=f"fixed:{BASE.optim.peak_lr}",
    )
