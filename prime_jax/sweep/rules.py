"""Named rules for shape, batch size, peak learning rate, warm-up and expected optimum.

Each rule is one small function with its source. A sweep names one per kind, or gives
`fixed:VALUE` or a function; the name is stored in every result.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prime_jax import flops
from prime_jax.config import RunConfig
from prime_jax.errors import UserError
from prime_jax.runtime.records import read_json
from prime_jax.settings import nearest

Shape = tuple[int, int, int]  # layers, width, heads

# The published IsoFLOP grid (MDM-Prime-v2, arXiv 2603.16077; theory.md, "The published grid").
PUBLISHED: tuple[Shape, ...] = (
    (6, 448, 7),
    (8, 512, 8),
    (9, 576, 9),
    (10, 640, 10),
    (13, 640, 10),
    (16, 640, 10),
    (15, 768, 12),
    (16, 896, 16),
    (16, 1024, 16),
    (20, 1024, 16),
    (16, 1280, 10),
    (18, 1280, 10),
    (21, 1280, 10),
    (24, 1408, 11),
    (20, 1792, 14),
    (22, 2048, 16),
    (24, 2304, 18),
    (30, 2560, 20),
    (36, 2816, 22),
)
ASPECT = 66.0  # width / layers, the geometric mean over PUBLISHED


@dataclass(frozen=True)
class Cell:
    """What is known about a run when the rules are applied.

    With `optim.transfer` the learning-rate rule gets `shape` and `params` of the base shape.

    Attributes:
        family: `arm`, `mdm` or `prime`.
        budget: training FLOPs C, in the sweep's convention.
        shape: layers, width, heads.
        params: N, exact, without embeddings and head.
        tokens: D = C / FLOPs per token, before rounding to whole steps.
        seq_len: tokens per sequence.
        warmup_steps: of the base configuration.
        steps, batch_size: 0 until the batch size is known; available to the warm-up and
            learning-rate rules, and so is `label`, what the sweep calls the family.
        counts: N by every convention.
    """

    family: str
    budget: float
    shape: Shape
    params: int
    tokens: float
    seq_len: int
    warmup_steps: int
    steps: int = 0
    batch_size: int = 0
    label: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)


def with_shape(config: RunConfig, shape: Shape) -> RunConfig:
    layers, width, heads = shape
    return replace(config, model=replace(config.model, layers=layers, width=width, heads=heads))


# Shape: (target N, config) -> (layers, width, heads)


def shape_aspect(params: float, config: RunConfig) -> Shape:
    """The shape closest to N and to the aspect ratio of the published grid.

    Widths are multiples of 64 (of 16 below 128, for models that train in minutes on a CPU; of 128
    from 1280 on), with at least two layers; heads as in `heads_of`, or of the base shape's size
    with `optim.transfer`. An error of 1 % in N weighs as much as one of 10 % in the aspect ratio.

    Raises:
        UserError: no shape is within 25 % of the target.
    """
    widths = [*range(32, 128, 16), *range(128, 1280, 64), *range(1280, 16384, 128)]
    base, shapes = config.optim.base, {}
    size = base.width // base.heads if config.optim.transfer != "none" and base.given else None
    for width in (width for width in widths if not size or width % size == 0):
        heads = width // size if size else heads_of(width)
        layer = flops.layer_params(replace(config.model, width=width, heads=heads))
        layers = max(2, round((params - width) / layer))
        shapes[layers, width, heads] = layers * layer + width

    def distance(shape: Shape) -> float:
        layers, width, _ = shape
        return 10 * _log_distance(shapes[shape], params) + _log_distance(width / layers, ASPECT)

    return _within(25, min(shapes, key=distance), params, config)


def shape_published(params: float, config: RunConfig) -> Shape:
    """The nearest of the 19 published shapes, head sizes as published (154M: 56).

    Raises:
        UserError: no published shape is within 25 % of the target.
    """
    best = min(PUBLISHED, key=lambda shape: _log_distance(_count(config, shape), params))
    return _within(25, best, params, config)


def heads_of(width: int) -> int:
    """Heads of size 128 from width 1280 on, else 64; 32 or 16 only below width 128.

    The published grid switches from 64 to 128 at the same width.
    """
    if width >= 1280 and width % 128 == 0:
        return width // 128
    if width >= 128 and width % 64 == 0:
        return width // 64
    return width // 32 if width % 32 == 0 and width >= 64 else width // 16


# Batch: cell -> sequences per step


def batch_published(cell: Cell) -> int:
    """2**19 tokens per step, 2**20 for the published models from 1529M on.

    The published N counts `12 d^2 layers`; 1529M is 2.0e9 in our N (theory.md, "The published
    grid").
    """
    return max(1, round((2**20 if cell.params >= 2.0e9 else 2**19) / cell.seq_len))


def batch_deepseek(cell: Cell) -> int:
    """0.2920 C^0.3271 tokens (DeepSeek LLM, arXiv 2401.02954), to the nearest power of two.

    Fitted on budgets of 1e17 to 2e19 FLOPs; flat within a factor of two around the optimum.
    """
    return _power_of_two(0.2920 * cell.budget**0.3271 / cell.seq_len)


def batch_step_law(cell: Cell) -> int:
    """0.58 D^0.571 tokens (Step Law, arXiv 2503.04715), to the nearest power of two."""
    return _power_of_two(0.58 * cell.tokens**0.571 / cell.seq_len)


# Peak learning rate: cell -> rate


def lr_published(cell: Cell) -> float:
    """2e-4 for every size, as published (theory.md, "The published grid")."""
    return 2e-4


def lr_step_law(cell: Cell) -> float:
    """1.79 N^-0.713 D^0.307 (Step Law, arXiv 2503.04715; N without embeddings).

    Fitted from 60M to 1B parameters. For smaller models it becomes unstably large; capped at 0.01.
    """
    return min(0.01, 1.79 * cell.params**-0.713 * cell.tokens**0.307)


def lr_deepseek(cell: Cell) -> float:
    """0.3118 C^-0.125 (DeepSeek LLM, arXiv 2401.02954), capped at 0.01 like `step-law`."""
    return min(0.01, 0.3118 * cell.budget**-0.125)


def lr_fitted(path: str) -> Callable[[Cell], float]:
    """k N^n D^d B^b as `prime-jax scaling rates` wrote it, in its count of N; B are sequences.

    Raises:
        UserError: no such file, or no law in it; when asked, a family that it does not have.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"lr rule fitted:{path}: no such file; prime-jax scaling rates writes one")
    found = read_json(file)
    try:
        laws = {name: one["params"] for name, one in found["families"].items() if one["params"]}
        count = found["conventions"]["params"]
        known = [set(law) == {"k", "n", "d", "b"} for law in laws.values()]
    except (KeyError, TypeError, AttributeError):
        known = []
    if not known or not all(known):
        raise UserError(
            f"lr rule fitted:{path}: no law of rates in it; prime-jax scaling rates writes one"
        )

    def rate(cell: Cell) -> float:
        name = next((name for name in (cell.label, cell.family) if name in laws), None)
        if name is None:
            raise UserError(
                f"lr rule fitted:{path}: no family {cell.label!r}; it has {', '.join(laws)}"
            )
        if count not in cell.counts:
            raise UserError(
                f"lr rule fitted:{path}: its N is counted {count}, not as one of "
                f"{', '.join(cell.counts)}; fit the rates of a sweep"
            )
        k, n, d, b = (laws[name][key] for key in "kndb")
        return k * cell.counts[count] ** n * cell.tokens**d * max(cell.batch_size, 1) ** b

    rate.__name__ = f"fitted:{path}"
    return rate


# Warm-up: cell -> steps


def warmup_capped(cell: Cell) -> int:
    """The base configuration's warm-up, at most a tenth of the steps.

    A warm-up that takes a large fraction of a run biases fits: arXiv 2406.19146 attributes part of
    the difference between the Kaplan and the Chinchilla exponents to it.
    """
    return min(cell.warmup_steps, cell.steps // 10)


# Expected optimum: (family, C) -> N without embeddings


def optimum_chinchilla(family: str, budget: float) -> float:
    """20 tokens per parameter with C = 6 N D (arXiv 2203.15556), the same for every family."""
    return math.sqrt(budget / (6 * 20))


def optimum_published(family: str, budget: float) -> float:
    """N*(C) of our converged fits to the published runs (theory.md, "The published grid").

    The published N counts `12 d^2 layers`, 3/4 of ours. Prime's fit is to the joint loss.
    """
    a, b, alpha, beta = {
        "arm": (197.5, 1096, 0.303, 0.334),
        "mdm": (366, 1969, 0.347, 0.341),
        "prime": (502, 4325, 0.379, 0.380),
    }[family]
    scale = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    return 4 / 3 * scale * (budget / 6) ** (beta / (alpha + beta))


RULES: dict[str, dict[str, Callable[..., Any]]] = {
    "shape": {"aspect": shape_aspect, "published": shape_published},
    "batch": {"published": batch_published, "deepseek": batch_deepseek, "step-law": batch_step_law},
    "lr": {"published": lr_published, "step-law": lr_step_law, "deepseek": lr_deepseek},
    "warmup": {"capped": warmup_capped},
    "optimum": {"chinchilla": optimum_chinchilla, "published": optimum_published},
}


def resolve(kind: str, rule: str | Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
    """The name and the function of a rule, given as a name, `fixed:VALUE` or a function.

    Raises:
        UserError: no such rule of that kind.
    """
    if callable(rule):
        return rule.__name__, rule
    named, fixed = RULES[kind], {"batch": int, "lr": float, "warmup": int, "optimum": float}
    if rule in named:
        return rule, named[rule]
    head, _, text = rule.partition(":")
    if kind == "lr" and head == "fitted":
        return rule, lr_fitted(text)
    if head != "fixed" or kind not in fixed:
        raise UserError(f"{kind} rule {rule!r}: no such rule{nearest(rule, named)}, or fixed:VALUE")
    try:
        value = fixed[kind](text)
    except ValueError:
        raise UserError(f"{kind} rule {rule!r}: {text!r} is not a number") from None
    return rule, lambda *_: value


def _count(config: RunConfig, shape: Shape) -> int:
    return flops.param_counts(with_shape(config, shape))["nonembedding"]


def _log_distance(x: float, y: float) -> float:
    return abs(math.log(x / y))


def _within(percent: int, shape: Shape, params: float, config: RunConfig) -> Shape:
    count = _count(config, shape)
    if abs(count / params - 1) > percent / 100:
        raise UserError(
            f"no shape within {percent} % of N = {params:.3g}; the nearest has {count:.3g}"
        )
    return shape


def _power_of_two(x: float) -> int:
    return 2 ** max(0, round(math.log2(x)))
