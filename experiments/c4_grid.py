"""The published IsoFLOP grid on C4: ARM, MDM and MDM-Prime-v2, 7 budgets, 195 runs.

Source: MDM-Prime-v2 (arXiv 2603.16077, Megatron recipe). GPT-2 BPE, 50257 tokens, blocks of 2048,
batch 256 sequences (512 from 1529M on), peak learning rate 2e-4, cosine to 2e-5. Prime has l = 16,
b = 2 and a full shuffle over all 65536 codes. Sizes per budget and family are the published ones.
Sizes are named as published, by 12 width^2 layers, and C = 6 x 12 width^2 layers x D (`reference`).

What differs from the published points:
* They are read off single long cosine runs at the step where 6ND hits the budget, that is, in the
  middle of a schedule made for another length. Here every cell trains to its own budget with its
  own cosine; warm-up is 1000 steps, but at most a tenth of the run.
* Prime trains on the marginal loss with carry-over and reports a bound. The published recipe (joint
  loss, dropout 0.1, tied ARM head) is preset:reference.
* The shuffle is ours (by seed), not the published permutation.

Data (C4 `en` in its json.gz files; the longest run, 252M at 3e20, reads 2.0e11 tokens, which may
be a little more than one epoch: the size of C4 under GPT-2 BPE is not verified here):
    prime-jax data prepare 'jsonl:c4/en/c4-train.*.json.gz' --tokenizer tiktoken:gpt2 --out data/c4 \
        --seq-len 2048 --valid-fraction 0.001 --test-fraction 0.001

Arithmetic (sums over the cells; hours = C matmul / (40 % of the bfloat16 peak) / 3600, that is
7.88e13 FLOP/s on a v5e chip and 3.956e14 on an H100; 40 % is an assumption, not a measurement):
    | cells | runs |       D | C reference | C matmul | v5e hours | H100 hours |
    | all   |  195 | 5.05e12 |     1.27e22 |  2.13e22 |    74,963 |     14,932 |
    | 3e18  |   30 | 2.62e11 |     9.00e19 |  2.04e20 |       720 |        143 |
    | 6e18  |   31 | 3.57e11 |     1.86e20 |  3.90e20 |     1,374 |        274 |
    | 1e19  |   31 | 4.08e11 |     3.10e20 |  6.08e20 |     2,144 |        427 |
    | 3e19  |   28 | 6.06e11 |     8.40e20 |  1.52e21 |     5,353 |      1,066 |
    | 6e19  |   26 | 7.79e11 |     1.56e21 |  2.70e21 |     9,525 |      1,897 |
    | 1e20  |   25 | 8.16e11 |     2.50e21 |  4.15e21 |    14,624 |      2,913 |
    | 3e20  |   24 | 1.83e12 |     7.20e21 |  1.17e22 |    41,224 |      8,211 |
    | arm   |   65 | 1.07e12 |     3.86e21 |  5.99e21 |    21,103 |      4,204 |
    | mdm   |   68 | 1.96e12 |     4.64e21 |  7.95e21 |    28,036 |      5,584 |
    | prime |   62 | 2.02e12 |     4.19e21 |  7.33e21 |    25,824 |      5,144 |

    | size  | N reference |      N | N with head |
    | 14M   |      1.45e7 | 1.93e7 |      4.18e7 |
    | 25M   |      2.52e7 | 3.36e7 |      5.93e7 |
    | 36M   |      3.58e7 | 4.78e7 |      7.67e7 |
    | 49M   |      4.92e7 | 6.56e7 |      9.77e7 |
    | 64M   |      6.39e7 | 8.52e7 |      1.17e8 |
    | 79M   |      7.86e7 | 1.05e8 |      1.37e8 |
    | 106M  |      1.06e8 | 1.42e8 |      1.80e8 |
    | 154M  |      1.54e8 | 2.06e8 |      2.51e8 |
    | 201M  |      2.01e8 | 2.68e8 |      3.20e8 |
    | 252M  |      2.52e8 | 3.36e8 |      3.87e8 |
    | 315M  |      3.15e8 | 4.19e8 |      4.84e8 |
    | 354M  |      3.54e8 | 4.72e8 |      5.36e8 |
    | 413M  |      4.13e8 | 5.51e8 |      6.15e8 |
    | 571M  |      5.71e8 | 7.61e8 |      8.32e8 |
    | 771M  |      7.71e8 | 1.03e9 |      1.12e9 |
    | 1107M |      1.11e9 | 1.48e9 |      1.58e9 |
    | 1529M |      1.53e9 | 2.04e9 |      2.15e9 |
    | 2359M |      2.36e9 | 3.15e9 |      3.27e9 |
    | 3426M |      3.43e9 | 4.57e9 |      4.71e9 |

Memory: value, gradient and two moments are 16 bytes per parameter, shared by all chips of a slice
(docs/presets.md). On one chip they end near 0.7e9 parameters (v5e, 16 GB) or 4e9 (H100, 80 GB); the
largest size, 78 GB, is 5 GB on each of 16 chips. `--slice v5e-16 --check` asks the compiler.

Published results, in nats per token, best size at 3e20 (not rerun, valid or training split not
verified):
    ARM    2.619 at 1107M   nll
    MDM    3.081 at  771M   nelbo
    Prime  2.076 at  571M   train_loss: the joint loss, not a likelihood. The claims built on it
                            (21.8x compute, perplexity 7.77) were retracted by the authors.
Our converged fits of the published points (tests/oracles/mdm_prime_v2_isoflop.json) give N*(C) the
exponents ARM .524, MDM .496, Prime .501 (of its train_loss), each about +-.08.

    prime-jax sweep plan preset:c4_grid
"""

from prime_jax.config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    SubtokenConfig,
)
from prime_jax.sweep.grid import Sweep
from prime_jax.sweep.rules import PUBLISHED, Shape

BASE = RunConfig(
    model=ModelConfig(vocab_size=50257, dtype="bfloat16"),
    subtokens=SubtokenConfig(shuffle=0.0),
    data=DataConfig(path="data/c4", seq_len=2048),
    eval=EvalConfig(examples=256),
    mesh=MeshConfig(accumulate=8, remat="dots"),
)
FAMILIES = {
    "arm": {},
    "mdm": {},
    "prime": {
        "subtokens.length": 16,
        "subtokens.shuffle": 1.0,
        "subtokens.scope": "codes",
    },
}
SHAPES = {round(12 * width**2 * layers / 1e6): (layers, width, h) for layers, width, h in PUBLISHED}
SIZES = {  # million parameters, 12 width^2 layers
    "arm": {
        3e18: (25, 49, 79, 106, 154, 201, 252, 315, 354, 413, 571),
        6e18: (49, 79, 106, 154, 201, 252, 315, 354, 413, 571, 771),
        1e19: (79, 106, 154, 201, 252, 315, 354, 413, 571, 771, 1107),
        3e19: (106, 201, 252, 315, 413, 571, 771, 1107, 1529),
        6e19: (201, 315, 413, 571, 771, 1107, 1529, 2359),
        1e20: (315, 413, 571, 771, 1107, 1529, 2359, 3426),
        3e20: (413, 571, 771, 1107, 1529, 2359, 3426),
    },
    "mdm": {
        3e18: (14, 25, 36, 49, 64, 79, 106, 154, 201, 252),
        6e18: (25, 36, 49, 64, 79, 106, 154, 201, 252, 354, 413),
        1e19: (36, 64, 79, 106, 154, 201, 252, 354, 413, 571),
        3e19: (79, 106, 154, 201, 252, 354, 413, 571, 771, 1107),
        6e19: (106, 201, 252, 354, 413, 571, 771, 1107, 1529),
        1e20: (201, 252, 354, 413, 571, 771, 1107, 1529, 2359),
        3e20: (252, 354, 413, 571, 771, 1107, 1529, 2359, 3426),
    },
    "prime": {
        3e18: (14, 25, 36, 49, 64, 79, 106, 154, 201),
        6e18: (25, 36, 49, 64, 79, 106, 154, 201, 252),
        1e19: (36, 49, 64, 79, 106, 154, 201, 252, 354, 413),
        3e19: (79, 106, 154, 201, 252, 354, 413, 571, 771),
        6e19: (106, 154, 201, 252, 354, 413, 571, 771, 1107),
        1e20: (201, 252, 354, 413, 571, 771, 1107, 1529),
        3e20: (252, 354, 413, 571, 771, 1107, 1529, 2359),
    },
}


def published_sizes(config: RunConfig, budget: float) -> list[Shape]:
    return [SHAPES[size] for size in SIZES[config.family][budget]]


def sweep() -> Sweep:
    return Sweep(
        name="c4-grid",
        base=BASE,
        families=FAMILIES,
        budgets=list(SIZES["arm"]),
        sizes=published_sizes,
        flops="reference",
        batch="published",
        lr="published",
    )
