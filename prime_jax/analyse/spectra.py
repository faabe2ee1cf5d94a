"""Singular values of the weight matrices, and three statistics of their shape.

* stable rank: sum s^2 / max s^2.
* effective rank: exp of the entropy of s / sum s (Roy and Vetterli 2007).
* tail exponent a: the density of the eigenvalues s^2 of W^T W falls as x^-a beyond a threshold.
  Maximum likelihood given the threshold, and the threshold that minimises the Kolmogorov-Smirnov
  distance of the tail to a power law (Clauset, Shalizi and Newman 2009). The interval is a
  percentile bootstrap over eigenvalues, including the choice of the threshold; eigenvalues of a
  matrix are not independent, so it is approximate. A smaller exponent is a heavier tail.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from prime_jax.analyse.subjects import Subject
from prime_jax.interchange import folder

MATRICES = ("qkv", "attention_out", "gate", "up", "down")
MIN_TAIL = 8  # minimum eigenvalues in a tail
THRESHOLDS = 48  # tried, evenly spaced in rank
BOOTSTRAP, LEVEL = 200, 0.95


class Tail(NamedTuple):
    """A power law's exponent with its interval, None if there are too few eigenvalues."""

    exponent: float | None
    low: float | None
    high: float | None
    size: int
    distance: float | None


def measure(
    subjects: list[Subject], tick: Callable[[str], None] = lambda _: None
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A row for each matrix of each layer, and all singular values by `RUN/layer/matrix`."""
    rows, values = [], {}
    for subject in subjects:
        tensors = folder.from_params(subject.run.params, subject.run.codebook)
        for layer in range(subject.run.config.model.layers):
            tick(f"{subject.name}: layer {layer}")
            for matrix in MATRICES:
                s = np.linalg.svd(tensors[f"layers.{layer}.{matrix}"], compute_uv=False)
                values[f"{subject.name}/{layer}/{matrix}"] = s
                rows.append({"run": subject.name, "layer": layer, "matrix": matrix} | summary(s))
    return rows, values


def summary(singular: np.ndarray) -> dict[str, Any]:
    """Statistics of a spectrum; singular values in any order."""
    s = np.sort(np.asarray(singular, np.float64))[::-1]
    p = s / s.sum()
    found = tail(s**2)
    return {
        "singular_values": len(s),
        "largest": float(s[0]),
        "rms": float(np.sqrt((s**2).mean())),
        "stable_rank": float((s**2).sum() / s[0] ** 2),
        "effective_rank": float(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum())),
        "tail_exponent": found.exponent,
        "tail_low": found.low,
        "tail_high": found.high,
        "tail_size": found.size,
        "tail_distance": found.distance,
    }


def tail(values: np.ndarray, replicates: int = BOOTSTRAP) -> Tail:
    """The power-law tail of positive values."""
    x = np.sort(np.asarray(values, np.float64))
    x = x[x > 0]
    if len(x) < 2 * MIN_TAIL:
        return Tail(None, None, None, len(x), None)
    exponent, size, distance = _fit(x)
    rng = np.random.default_rng(0)
    again = [_fit(np.sort(rng.choice(x, len(x))))[0] for _ in range(replicates)]
    low, high = np.quantile(again, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Tail(exponent, float(low), float(high), size, distance)


def _fit(x: np.ndarray) -> tuple[float, int, float]:
    """(exponent, values in the tail, distance) of ascending values, over all thresholds."""
    starts = np.unique(np.linspace(0, len(x) - MIN_TAIL, THRESHOLDS).astype(int))
    best = (np.inf, 0.0, 0)
    for start in starts:
        logs = np.log(x[start:] / x[start])
        if logs[-1] == 0:  # all equal
            continue
        n = len(logs)
        slope = n / logs.sum()  # exponent - 1
        law = -np.expm1(-slope * logs)
        steps = np.arange(n + 1) / n
        distance = max((law - steps[:-1]).max(), (steps[1:] - law).max())
        best = min(best, (distance, 1 + slope, n))
    return float(best[1]), int(best[2]), float(best[0])
