"""SlimPajama, 1.1B: MDM-Prime-v2 in the lit_gpt recipe, with ARM and MDM at the same D.

Source: MDM-Prime-v2 (arXiv 2603.16077, section 4.3) on the code of SMDM (arXiv 2410.18514):
20 layers, width 1792, 14 heads, Llama's 32000 tokens, blocks of 2048, batch 256; no qk-norm, no
dropout, untied; l = 15, b = 2, shuffle over the first 32000 codes, `sum` embedding; AdamW 2e-4
cosine to 2e-5, betas .9/.95, weight decay .1, clip 1, warm-up of 1 % (at least 100 steps); 1 % of
the data cut to a random length. Weights start from N(0, sqrt(2/(5 width))) = N(0, 0.0149).

Three ways to count: the code names sizes by exact non-embedding parameters (the smallest, 6M =
6,294,784; this one 1028M = 1,027,677,952) and takes steps = C / (6 N x 256 x mean length 2037.8)
with C = 3.3e21: 1,025,915 steps. Our `reference` (12 width^2 layers) and `matmul` are below.

What differs:
* Loss: marginal with carry-over, a bound. The published loss is joint without carry-over.
* Masks: the published code hides whole tokens where t > 0.5 and single digits below, which is no
  bound of any process. Here half of the sequences hide whole tokens for all t (token_mask_rho).
* Residual outputs start at init_std / sqrt(2 layers), twice the published 1 / (sqrt(width) layers)
  at 20 layers; vectors do not decay; the random length is per sequence, not per micro-batch; the
  shuffle is by our seed; RoPE in float32.

Data (the Llama tokenizer's model file; its dummy prefix is turned off to be lossless):
    prime-jax data prepare 'jsonl:SlimPajama-627B/train/*/*.jsonl.zst' --out data/slimpajama \
        --tokenizer sentencepiece:llama/tokenizer.model --seq-len 2048 \
        --valid-fraction 0.0005 --test-fraction 0.0005

Arithmetic (hours = C matmul / (40 % of the bfloat16 peak) / 3600: 7.88e13 FLOP/s on a v5e chip,
3.956e14 on an H100; 40 % is an assumption). 1.1B x 16 bytes do not fit one 16 GB chip;
several share them (docs/presets.md):
    | runs of | N total |      N | N reference |       D | C reference | C matmul | v5e hours | H100 hours |
    | all     |       - | 1.03e9 |      7.71e8 | 1.61e12 |     7.46e21 |  1.17e22 |    41,211 |      8,209 |
    | arm     |  1.14e9 | 1.03e9 |      7.71e8 | 5.38e11 |     2.49e21 |  3.74e21 |    13,178 |      2,625 |
    | mdm     |  1.14e9 | 1.03e9 |      7.71e8 | 5.38e11 |     2.49e21 |  3.98e21 |    14,013 |      2,791 |
    | prime   |  1.09e9 | 1.03e9 |      7.71e8 | 5.38e11 |     2.49e21 |  3.98e21 |    14,020 |      2,793 |

Published results that stand: zero-shot accuracy, mean of eight tasks (cfg, temperature and masking
tuned per task): MDM-Prime-v2 49.42, SMDM 44.88, TinyLLaMA 45.07. No likelihood of these weights is
published: their loss is joint, a train_loss.

    prime-jax sweep plan preset:slimpajama_1b
    prime-jax train preset:slimpajama_1b           # the Prime run alone
"""

from dataclasses import replace

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
from prime_jax.sweep.rules import Cell

LAYERS, WIDTH, HEADS, BATCH, LENGTH = 20, 1792, 14, 256, 2048
RANDOM_LENGTH = 0.01
BASE = RunConfig(
    batch_size=BATCH,
    model=ModelConfig(
        vocab_size=32000,
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        embedding="sum",
        qk_norm=False,
        init_std=(2 / (5 * WIDTH)) ** 0.5,
        dtype="bfloat16",
    ),
    subtokens=SubtokenConfig(length=15),
    objective=ObjectiveConfig(time_eps=1e-3, token_mask_rho=0.5, random_length=RANDOM_LENGTH),
    data=DataConfig(path="data/slimpajama", seq_len=LENGTH),
    optim=OptimConfig(peak_lr=2e-4),
    eval=EvalConfig(examples=256),
    mesh=MeshConfig(accumulate=8, remat="dots"),
)


def config() -> RunConfig:
    mean_length = (1 - RANDOM_LENGTH) * LENGTH + RANDOM_LENGTH * (1 + LENGTH) / 2
    params = flops.param_counts(BASE)["nonembedding"]
    steps = int(3.3e21 / (6 * params * BATCH * mean_length))
    return replace(
        BASE, steps=steps, optim=replace(BASE.optim, warmup_steps=max(100, steps // 100))
    )


def one_percent(cell: Cell) -> int:
    return max(100, cell.steps // 100)


def sweep() -> Sweep:
    prime = config()
    return Sweep(
        name="slimpajama-1b",
        base=prime,
        families={"arm": {"subtokens.length": 1}, "mdm": {"subtokens.length": 1}, "prime": {}},
        budgets=[flops.train_flops(prime, "reference")],
        sizes=[(LAYERS, WIDTH, HEADS)],
        flops="reference",
        batch=f"fixed:{BATCH}",
        lr=f"fixed:{prime.optim.peak_lr}",
        warmup=one_percent,
    )
