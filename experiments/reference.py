"""The published recipe on the C4 grid, for comparison: it reports a `train_loss`.

Source: MDM-Prime-v2 (arXiv 2603.16077) and its Megatron code. `as_published` turns any run into it:
* dropout 0.1 (ours 0): on by default there, at every size and budget;
* Prime: the joint loss, charged at every position, without carry-over (ours: marginal, with it).
  Initial losses are 60-90 instead of about 10, the variance is heavy-tailed, and samples can be
  codes of no token;
* ARM: the head reuses the token embedding (ours does not), which leaves out one table of V x width.

The joint loss charges a token's remaining sub-tokens together at the rate of one; at the Bayes
optimum it lies below the entropy of the data. It is stored with kind `train_loss` and the tools
never call it a likelihood, a perplexity or bits. The evaluation of the same run also gives its
valid bounds (`subtoken` and `token`, kind `nelbo`); compare those with other families. The
published perplexities of Prime rest on the joint loss and were retracted by the authors.

Still different from the published points: one schedule per cell (preset:c4_grid), our own
shuffle, and times stratified over the global batch instead of each micro-batch.

Arithmetic, cost and data: preset:c4_grid; N, D and C `reference` are the same. C matmul is
less by the marginal columns of Prime, which the joint loss does not need:
    | cells | runs |       D | C reference | C matmul | v5e hours | H100 hours |
    | all   |  195 | 5.05e12 |     1.27e22 |  2.13e22 |    74,917 |     14,923 |
    | arm   |   65 | 1.07e12 |     3.86e21 |  5.99e21 |    21,103 |      4,204 |
    | mdm   |   68 | 1.96e12 |     4.64e21 |  7.95e21 |    28,036 |      5,584 |
    | prime |   62 | 2.02e12 |     4.19e21 |  7.31e21 |    25,778 |      5,135 |

Published result: 2.076 nats per token at 3e20 and 571M is a train_loss.

    prime-jax sweep plan preset:reference

In an experiment of your own:
    as_published = runpy.run_path(experiment.located("preset:reference"))["as_published"]
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from prime_jax import experiment
from prime_jax.config import RunConfig
from prime_jax.settings import set_path
from prime_jax.sweep.grid import Sweep

PUBLISHED: dict[str, dict[str, Any]] = {
    "arm": {"model.dropout": 0.1, "model.tied_head": True},
    "mdm": {"model.dropout": 0.1},
    "prime": {
        "model.dropout": 0.1,
        "objective.loss": "joint",
        "objective.carry_over": False,
    },
}


def as_published(config: RunConfig) -> RunConfig:
    """`config` with the published recipe of its family."""
    for setting, value in PUBLISHED[config.family].items():
        config = set_path(config, setting, value)
    return config


def sweep() -> Sweep:
    grid = experiment.call(Path(__file__).with_name("c4_grid.py"), "sweep", Sweep)
    families = {name: changes | PUBLISHED[name] for name, changes in grid.families.items()}
    return replace(grid, name="c4-grid-as-published", families=families)
