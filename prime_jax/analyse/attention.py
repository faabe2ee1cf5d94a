"""Attention maps of every layer and head, and three statistics.

By the fraction of masked sub-tokens (an autoregressive model masks none), averaged over validation
blocks, with the standard error over blocks:

* sink: the mean weight on the position with the largest mean weight in the block;
* band: the mean weight within `BAND` positions of the query;
* entropy: of a query's weights, nats; that of uniform attention is the log of the key count.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prime_jax.analyse.bits import hide, keys_of
from prime_jax.analyse.subjects import Subject
from prime_jax.kernels.attention_mask import allowed, documents
from prime_jax.kernels.common import NEG
from prime_jax.model import build
from prime_jax.objectives import autoregressive_inputs

BAND = 4
CELLS = 64  # maximum cells per side of a map: neighbouring positions are summed
STATISTICS = ("sink", "band", "entropy")


def measure(
    subject: Subject, ratios: list[float], examples: int, tick: Callable[[], None]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray], dict[str, Any]]:
    """A row for each ratio, layer and head; mean maps [layers, heads, cells, cells] by
    `RUN/ratio`; and a description of the data."""
    run, blocks = subject.run, subject.blocks(examples)
    tokens = blocks.tokens
    causal = run.config.family == "arm"
    statistics_of = jax.jit(partial(_block_statistics, subject))
    rows, maps = [], {}
    for ratio in [0.0] if causal else ratios:
        parts = []
        for e in range(len(tokens)):  # one block at a time: scores are [H, L, L] per layer
            block = tokens[e : e + 1], np.array([e]), np.float32(ratio)
            parts.append(statistics_of(subject.params, *block))
            tick()
        *statistics, map_ExZxHxCxC = (np.stack(x) for x in zip(*jax.device_get(parts), strict=True))
        maps[f"{subject.name}/{ratio:g}"] = map_ExZxHxCxC.mean(axis=0)
        for layer, head in np.ndindex(*statistics[0].shape[1:]):
            row = {"run": subject.name, "hidden": ratio, "layer": layer, "head": head}
            for name, value_ExZxH in zip(STATISTICS, statistics, strict=True):
                value_E = value_ExZxH[:, layer, head].astype(np.float64)
                row[name] = float(value_E.mean())
                spread = value_E.std(ddof=1) if len(value_E) > 1 else 0.0
                row[f"{name}_se"] = float(spread / len(value_E) ** 0.5)
            rows.append(row)
    about = {"run": subject.name, "eval_set": blocks.hash, "examples": len(tokens)}
    return rows, maps, about | {"uniform": uniform(tokens.shape[1], causal)}


def _block_statistics(subject: Subject, params, token_1xL, example_1, ratio):
    """(sink, band, entropy) [layers, heads] and maps [layers, heads, cells, cells] of one block."""
    run = subject.run
    if run.config.family == "arm":
        inputs = autoregressive_inputs(run.config, run.codebook, token_1xL, run.eos_id)
    else:
        keys_1 = keys_of(jnp.zeros_like(example_1), example_1)
        inputs, _ = hide(subject, token_1xL, keys_1, jnp.full(1, ratio))
    network = build(run.config, run.codebook)
    _, seen = network.apply(
        {"params": params}, inputs.digits_BxLxS, inputs.segment_ids_BxL, mutable=["attention"]
    )
    ((q_Zx1xLxHxK, k_Zx1xLxGxK),) = seen["attention"]["layers"]["query_key"]
    segment_1xL = inputs.segment_ids_BxL
    runs_1xL = None if segment_1xL is None else documents(segment_1xL)
    mask = allowed(token_1xL.shape[1], run.config.family == "arm", runs_1xL)
    return jax.lax.map(
        lambda qk: describe(weights(*qk, mask)), (q_Zx1xLxHxK[:, 0], k_Zx1xLxGxK[:, 0])
    )


def weights(q_LxHxK, k_LxGxK, mask_1xLxL) -> jax.Array:
    """Attention weights float32 [H, L, L] (query, key) of one sequence."""
    heads, groups = q_LxHxK.shape[1], k_LxGxK.shape[1]
    k_LxHxK = jnp.repeat(k_LxGxK, heads // groups, axis=1)
    z_HxLxL = jnp.einsum("lhk,mhk->hlm", q_LxHxK, k_LxHxK, preferred_element_type=jnp.float32)
    z_HxLxL *= q_LxHxK.shape[-1] ** -0.5
    return jax.nn.softmax(z_HxLxL if mask_1xLxL is None else jnp.where(mask_1xLxL, z_HxLxL, NEG))


@jax.jit
def describe(a_HxLxL: jax.Array) -> tuple[jax.Array, ...]:
    """(sink, band, entropy) [H] and the map [H, cells, cells] of attention weights."""
    heads, length, _ = a_HxLxL.shape
    at = jnp.arange(length)
    near_LxL = jnp.abs(at[:, None] - at) <= BAND
    sink_H = a_HxLxL.mean(axis=1).max(axis=1)
    band_H = jnp.where(near_LxL, a_HxLxL, 0).sum(axis=2).mean(axis=1)
    entropy_H = jax.scipy.special.entr(a_HxLxL).sum(axis=2).mean(axis=1)
    side = -(-length // CELLS)  # positions per cell
    cells = -(-length // side)
    padding = cells * side - length
    padded = jnp.pad(a_HxLxL, ((0, 0), (0, padding), (0, padding)))
    sums = padded.reshape(heads, cells, side, cells, side).sum(axis=(2, 4))
    queries_C = np.minimum(side, length - side * np.arange(cells))
    return sink_H, band_H, entropy_H, sums / queries_C[:, None]


def uniform(length: int, causal: bool) -> dict[str, float]:
    """The three statistics of uniform attention."""
    seen = np.tril(np.ones((length, length))) if causal else np.ones((length, length))
    even = jnp.asarray(seen / seen.sum(axis=1, keepdims=True))[None]
    return {n: float(x[0]) for n, x in zip(STATISTICS, describe(even), strict=False)}
