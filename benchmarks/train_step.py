"""Training speed and memory of ARM, MDM and MDM-Prime beside a plain eager PyTorch MDM.

    python benchmarks/train_step.py [--sizes 6M 19M 34M] [--dtypes float32 bfloat16] [--rounds 7]

Every (side, size, dtype) is a process of its own. The sides of one size take turns, one side
stepping while the others wait, so that a busy machine slows all of them alike; printed are medians
over the turns, and `ratio` is the median over turns of tokens/s against PyTorch in that turn.
Sizes are named by their non-embedding parameters; the vocabulary has 4096 tokens, so Prime has
12 binary sub-tokens. GFLOP/s counts matrix products (prime_jax/flops.py, convention `matmul`).

Memory is what a side adds on top of its imported libraries: on a CPU the peak resident size during
the timed steps less the resident size after the imports (Linux), on a GPU the allocator's peak.
The tokens are random; neither the data pipeline nor the command line is imported.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from prime_jax import config as configs  # noqa: E402
from prime_jax.flops import flops_per_token, param_counts  # noqa: E402

VOCAB = 4096
# layers, width, heads; sequences, tokens in each; steps per turn
SIZES = {
    "6M": (6, 256, 4, 4, 256, 4),
    "19M": (8, 384, 6, 2, 512, 2),
    "34M": (8, 512, 8, 1, 2048, 1),
}
PEER = "torch mdm"
SIDES = (PEER, "jax arm", "jax mdm", "jax prime")
DTYPES = ("float32", "bfloat16")


def run_config(side: str, size: str, dtype: str) -> configs.RunConfig:
    layers, width, heads, batch, length, _ = SIZES[size]
    family = side.split()[1]
    slots = (VOCAB - 1).bit_length() if family == "prime" else 1
    return configs.validate(
        configs.RunConfig(
            family=family,
            batch_size=batch,
            model=configs.ModelConfig(
                vocab_size=VOCAB, layers=layers, width=width, heads=heads, dtype=dtype
            ),
            subtokens=configs.SubtokenConfig(length=slots),
            data=configs.DataConfig(seq_len=length),
            mesh=configs.MeshConfig(data=1),
        )
    )


# --- one side: a process that answers each line of its input with one line of JSON


def jax_side(config):
    """(name of the device, steps(n) -> last loss, peak memory of the device or None)."""
    import jax
    import numpy as np

    from prime_jax import optim, sharding, step
    from prime_jax.metrics import Clock

    device = jax.devices()[0]
    yield device.device_kind

    program, clock = step.program(config, eos_id=0), Clock()
    state = program.init(clock, config.seed)
    shape = (config.batch_size, config.data.seq_len)
    tokens = np.random.default_rng(0).integers(0, VOCAB, shape, np.int32)
    rows = np.arange(config.batch_size, dtype=np.int32)
    batch = sharding.share_batch(program.mesh, (tokens, rows))
    horizon, seed = optim.horizon(config), np.uint32(config.seed)
    loss = None
    while True:
        count = yield loss
        for _ in range(count):
            state, metrics = program.train(clock, state, *batch, seed, horizon)
        loss = float(metrics.loss)


def torch_side(config):
    import torch
    from torch_twin import Trainer

    yield torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

    trainer = Trainer(config)
    shape = (config.batch_size, config.data.seq_len)
    tokens = torch.randint(0, VOCAB, shape, device=trainer.device)
    loss = None
    while True:
        count = yield loss
        for _ in range(count):
            loss_tensor = trainer.step(tokens)
        loss = float(loss_tensor)
