"""One run and a small IsoFLOP sweep on the Python standard library's sources, as bytes.

README.md beside this file has the commands. Change the numbers here; `prime-jax sweep plan
experiment.py` prints what they amount to, and writes nothing.
"""

from prime_jax.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
)
from prime_jax.sweep.grid import Sweep

# (layers, width, heads)
SHAPES = [(1, 10, 1), (1, 16, 1), (1, 32, 1), (2, 40, 2), (2, 64, 2)]


def config() -> RunConfig:
    """One run of MDM-Prime: every byte, and the end of a text, is l = 9 binary sub-tokens."""
    return RunConfig(
        family="prime",
        subtokens=SubtokenConfig(length=9),
        steps=300,
        batch_size=16,
        model=ModelConfig(vocab_size=257, layers=1, width=32, heads=1, init_std=0.1),
        objective=ObjectiveConfig(weight="flat"),
        data=DataConfig(path="data", seq_len=64),
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=30),
        eval=EvalConfig(examples=128, estimators=("subtoken",), batch_size=128),
    )


def sweep() -> Sweep:
    """At every budget C the same FLOPs are spent on three sizes: small ones see more tokens."""
    # D = C / (FLOPs of the matrix products per token, forward and backward, embedding and head
    # included); steps = D / (16 x 64 tokens). Tokens and steps of the family prime:
    #
    #   shape    1x10x1         1x16x1         1x32x1         2x40x2        2x64x2
    #   N        4.22k          8.29k          24.8k          61.8k         148k
    #   2e10     390k in 381    250k in 244    104k in 102
    #   4e10                    500k in 488    210k in 205    89.1k in 87
    #   8e10                                   420k in 410    178k in 174   79.9k in 78
    #
    # 2 families x 3 budgets x 3 sizes = 18 runs; 6 x (2 + 4 + 8)e10 = 8.4e11 FLOPs. Ten times the
    # budgets take ten times as long. MDM sees more tokens at the same C: its input is one digit.
    return Sweep(
        name="study",
        base=config(),
        families={"mdm": {"subtokens.length": 1}, "prime": {}},
        budgets=[2e10, 4e10, 8e10],
        sizes={2e10: SHAPES[0:3], 4e10: SHAPES[1:4], 8e10: SHAPES[2:5]},
        batch="fixed:16",
    )
