"""IsoFLOP quickstart: ARM, MDM and MDM-Prime-v2 on the Python standard library's sources.

    make quickstart

Three budgets x four sizes x three families, and a second seed of every cell at the middle budget:
48 runs on two CPU cores in a few minutes. At this scale the exponents illustrate the tool; they
are not a scientific result.

Data: `pysource` under a byte-fallback BPE of 1,024 ids, blocks of 128 tokens; 11.7e6 training
tokens, so that no run sees a block twice.

Sizes: a ladder of shapes, each about 2.5 times the one before in N (without embeddings and head).
A budget uses four neighbouring steps, a span of 16: about four times below and above the optimum
expected from a pilot with other seeds. They were fixed before the runs that the report shows; a
minimum at an edge is reported as censored.

Arithmetic, `matmul` FLOPs a token of Prime (head, attention and marginal columns included):
    N      3.5e3   1.7e4   3.3e4   7.4e4   2.0e5   4.4e5
"""

from prime_jax.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig
from prime_jax.sweep.grid import Sweep

LADDER = [(1, 16, 1), (1, 32, 1), (2, 32, 1), (2, 48, 2), (3, 64, 2), (3, 96, 3)]


def config() -> RunConfig:
    """One run of MDM-Prime-v2: binary sub-tokens (l = 10), shuffled ids."""
    return RunConfig(
        family="prime",
        steps=500,
        batch_size=16,
        model=ModelConfig(vocab_size=1024, layers=2, width=64, heads=2),
        data=DataConfig(path="data/quickstart", seq_len=128),
        optim=OptimConfig(peak_lr=6e-3, warmup_steps=50),
        eval=EvalConfig(examples=64, estimators=("subtoken",), batch_size=64),
    )


def sweep() -> Sweep:
    return Sweep(
        name="quickstart",
        base=config(),
        families={
            "arm": {},
            "mdm": {},
            "prime": {"subtokens.length": 10},
        },
        budgets=[1e11, 3e11, 9e11],
        sizes={1e11: LADDER[0:4], 3e11: LADDER[1:5], 9e11: LADDER[2:6]},
        extra_seeds={3e11: (1,)},
        batch="fixed:16",
        lr="step-law",
    )
