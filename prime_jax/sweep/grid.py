"""Expand a sweep into rows; each row describes one training run completely.

An EXPERIMENT is a Python file with `sweep() -> Sweep`, or a JSON file that holds a list of rows,
the fields of `Row`. docs/experiments.md describes both.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prime_jax import experiment, flops
from prime_jax.config import FAMILIES, RunConfig, validate
from prime_jax.errors import UserError
from prime_jax.flops import Convention
from prime_jax.runtime import records
from prime_jax.settings import (
    REQUIRED,
    Checked,
    flatten,
    from_dict,
    nearest,
    set_path,
    setting,
    to_dict,
)
from prime_jax.sweep import rules
from prime_jax.sweep.rules import Shape

Size = Shape | float  # an explicit shape, or a target N (without embeddings and head)
Sizes = Sequence[Size] | Mapping[float, Sequence[Size]] | Callable[..., Sequence[Size]]
Rule = str | Callable[..., Any]
DRIFT_FACTORS = (0.5, 2.0)  # of the rule's learning rate, besides itself
RULE = "the name of a rule, fixed:VALUE or a function"


@dataclass(frozen=True)
class Around(Checked, path="Around"):
    """Sizes in equal ratios from N*/span to N* span around an expected optimum N*."""

    span: float = setting(4.0, "ratio of the largest size to the optimum", at_least=1)
    count: int = setting(5, "number of sizes", at_least=1)
    optimum: Rule = setting("chinchilla", "rule for the expected optimum", takes=RULE)

    def __call__(self, config: RunConfig, budget: float) -> list[float]:
        center = rules.resolve("optimum", self.optimum)[1](config.family, budget)
        if self.count == 1:
            return [center]
        exponents = (2 * i / (self.count - 1) - 1 for i in range(self.count))
        return [center * self.span**e for e in exponents]

    @property
    def __name__(self) -> str:
        return f"around:{rules.resolve('optimum', self.optimum)[0]}"


@dataclass(frozen=True)
class Sweep(Checked, path="sweep"):
    """Families x budgets x sizes x seeds, and the rules for the rest."""

    name: str = setting(REQUIRED, "what tables and reports call it")
    base: RunConfig = setting(REQUIRED, "the run that every cell starts from", takes="a RunConfig")
    # A label that is no family of `RunConfig` gives it under `family`, e.g.
    # {"prime-l2": {"family": "prime", "subtokens.length": 2}}.
    families: Mapping[str, Mapping[str, Any]] = setting(
        REQUIRED,
        "label -> dotted overrides",
        takes='label -> overrides, e.g. {"arm": {}, "mdm": {"optim.peak_lr": 1e-3}}',
    )
    budgets: Sequence[float] = setting(
        REQUIRED, "training FLOPs C, as `flops` counts", above=0, takes="numbers of FLOPs above 0"
    )
    sizes: Sizes = setting(
        REQUIRED,
        "for all budgets, or by budget, or a function of (config, budget) such as `Around`",
        takes="shapes (layers, width, heads) or numbers of parameters; or these by budget; or a "
        "function",
    )
    flops: Convention = setting("matmul", "how FLOPs are counted")
    seeds: Sequence[int] = setting((0,), "of every cell", takes="whole numbers")
    extra_seeds: Mapping[float, Sequence[int]] = setting(
        dict,
        "more of them at named budgets",
        takes="budget -> whole numbers, e.g. {1e18: (1, 2)}",
    )
    shape: Rule = setting("aspect", "layers, width and heads of a size", takes=RULE)
    batch: Rule = setting("deepseek", "sequences of a step", takes=RULE)
    lr: Rule = setting(
        "step-law", "peak learning rate; with optim.transfer of the base shape", takes=RULE
    )
    warmup: Rule = setting("capped", "steps of warm-up", takes=RULE)
    lr_factors: Sequence[float] = setting(
        (),
        "every cell once for each: the rule's learning rate times this",
        above=0,
        takes="factors above 0, e.g. (0.5, 1, 2)",
    )
    epochs: Sequence[float] = setting(
        (),
        "every cell once for each: passes over a part of the data, its data.unique_tokens = D / passes",
        at_least=1,
        takes="numbers of passes, 1 or more, e.g. (1, 4, 16)",
    )
    epochs_limit: float = setting(
        4.0, "runs that repeat the data more often are flagged", above=0, infinite=True
    )


@dataclass(frozen=True)
class Row(Checked):
    """One run to be, and the schema of a JSON row."""

    family: str = setting(REQUIRED, "label; also the RunConfig's unless overrides has `family`")
    budget: float = setting(REQUIRED, "training FLOPs, in the convention `flops`", above=0)
    seed: int = setting(REQUIRED, "of the run")
    layers: int = setting(REQUIRED, "of the model")
    width: int = setting(REQUIRED, "of the model")
    heads: int = setting(REQUIRED, "of the model")
    steps: int = setting(REQUIRED, "of the optimizer")
    batch_size: int = setting(REQUIRED, "sequences of a step")
    peak_lr: float = setting(
        REQUIRED, "learning rate after warm-up; with optim.transfer of the base shape"
    )
    overrides: dict = setting(dict, "dotted setting -> value")
    rules: dict = setting(dict, "kind -> name of the rule that chose")
    flops: Convention = setting("matmul", "how FLOPs are counted")
    problem: str = setting("", "why there can be no such run")


@dataclass(frozen=True)
class Experiment:
    """The rows of an experiment file and the hash of its text."""

    name: str
    rows: tuple[Row, ...]
    sha256: str
    epochs_limit: float = Sweep.epochs_limit


OWN = {  # settings that are fields of a row, so never among its overrides
    "seed": "seed",
    "steps": "steps",
    "batch_size": "batch_size",
    "model.layers": "layers",
    "model.width": "width",
    "model.heads": "heads",
    "optim.peak_lr": "peak_lr",
}


def load_experiment(path: str | Path) -> Experiment:
    """Read an EXPERIMENT, Python or JSON.

    Raises:
        UserError: as `experiment.call` and `from_json`; no runs.
    """
    path = experiment.located(path)
    made = _read(path)
    if not made.rows:
        raise UserError(f"{path}: no runs: families, budgets, seeds or the list of rows is empty")
    return made


def _read(path: Path) -> Experiment:
    if path.suffix.lower() not in (".py", ".json"):
        raise UserError(f"{path}: an experiment is a Python file (.py) or a list of rows (.json)")
    if path.suffix.lower() == ".json":
        values = records.read_json(path)
        if not isinstance(values, list):
            raise UserError(f"{path}: expected a list of rows")
        made = [_numbered(value, f"{path}, row {i}") for i, value in enumerate(values, 1)]
        return Experiment(path.stem, tuple(made), _hash(path))
    sweep = experiment.call(path, "sweep", Sweep)
    made = experiment.guarded(path, lambda: tuple(rows(sweep)))  # rules may be the file's own
    return Experiment(sweep.name, made, _hash(path), sweep.epochs_limit)


def rows(sweep: Sweep) -> list[Row]:
    """Every candidate of a sweep, smallest budget first, including impossible ones.

    Raises:
        UserError: an unknown rule, family or setting.
    """
    named = {
        kind: rules.resolve(kind, getattr(sweep, kind))
        for kind in ("shape", "batch", "lr", "warmup")
    }
    out = []
    for label, changes in sweep.families.items():
        base = _of_family(sweep.base, label, changes)
        for budget in sorted(sweep.budgets):
            sizes, sizes_rule = _sizes(sweep, base, budget)
            seeds = [*sweep.seeds, *sweep.extra_seeds.get(budget, ())]
            for size in sizes:
                cell = _row(
                    label, base=base, budget=budget, size=size, named=named, convention=sweep.flops
                )
                cell = replace(cell, rules={"sizes": sizes_rule, **cell.rules})
                cells = [_repeating(cell, base, passes) for passes in sweep.epochs] or [cell]
                cells = [_at_rate(one, f) for one in cells for f in sweep.lr_factors or (1.0,)]
                out += [replace(one, seed=seed) for one in cells for seed in seeds]
    return sorted(out, key=lambda row: row.budget)


def to_config(row: Row) -> RunConfig:
    """The run of a row; of one step where the budget does not pay for one.

    Raises:
        UserError: an unknown setting, or a value that it does not take.
    """
    config = _of_family(RunConfig(), row.family, row.overrides)
    for path, name in OWN.items():
        value = getattr(row, name)
        config = set_path(config, path, max(value, 1) if name == "steps" else value)
    return config


def _numbered(value: Any, where: str) -> Row:
    try:
        return from_json(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def from_json(value: Any) -> Row:
    """A row from the documented schema.

    Raises:
        UserError: an unknown field (with the nearest valid name), a missing field, or a wrong type.
    """
    if not isinstance(value, Mapping):
        raise UserError("expected an object with the fields of a row")
    tokens = value.get("tokens")
    row = from_dict(Row, {"steps": 0} | {k: v for k, v in value.items() if k != "tokens"})
    if (tokens is None) == ("steps" not in value):
        raise UserError("give either steps or tokens")
    config = to_config(row)
    if tokens is None:
        return row
    number = isinstance(tokens, (int, float)) and not isinstance(tokens, bool)
    if not (number and 0 < tokens < math.inf):
        raise UserError(f"tokens = {tokens!r}: must be a number above 0")
    return replace(row, steps=round(tokens / max(1, row.batch_size * config.data.seq_len)))


def _of_family(base: RunConfig, label: str, changes: Mapping[str, Any]) -> RunConfig:
    if label not in FAMILIES and "family" not in changes:
        raise UserError(
            f"family {label!r}: no such family{nearest(label, FAMILIES)}; or set one under 'family'"
        )
    config = set_path(base, "family", changes.get("family", label))
    for path, value in changes.items():
        config = set_path(config, path, value)
    return config


def _sizes(sweep: Sweep, config: RunConfig, budget: float) -> tuple[Sequence[Size], str]:
    if callable(sweep.sizes):
        return sweep.sizes(config, budget), sweep.sizes.__name__
    if isinstance(sweep.sizes, Mapping):
        if budget not in sweep.sizes:
            raise UserError(f"sizes: no entry for the budget {budget:.3g}")
        return sweep.sizes[budget], "given"
    return sweep.sizes, "given"


def _row(
    label: str,
    base: RunConfig,
    budget: float,
    size: Size,
    named: Mapping[str, tuple[str, Callable[..., Any]]],
    convention: Convention,
) -> Row:
    names = {kind: name for kind, (name, _) in named.items()}
    shape = (0, 0, 0)
    try:
        if isinstance(size, (int, float)):
            shape = named["shape"][1](size, base)
        else:
            shape, names["shape"] = tuple(size), "given"
        config = rules.with_shape(base, shape)
        # Batch size, steps and warm-up are not chosen yet.
        open_ = {
            "batch_size": config.mesh.accumulate,
            "optim": replace(config.optim, warmup_steps=0),
        }
        validate(replace(config, **open_))
        cell = _cell(config, budget, convention)
        batch = named["batch"][1](cell)
        if batch < 1:
            raise UserError(f"batch rule {names['batch']} gives {batch} sequences")
    except UserError as error:
        return Row(
            label,
            budget,
            0,
            *shape,
            steps=0,
            batch_size=0,
            peak_lr=0.0,
            overrides={},
            rules=names,
            flops=convention,
            problem=str(error),
        )
    cell = replace(
        cell, steps=round(cell.tokens / (batch * cell.seq_len)), batch_size=batch, label=label
    )
    config = set_path(config, "optim.warmup_steps", named["warmup"][1](cell))
    peak_lr = float(named["lr"][1](_whose_rate(cell, config)))
    overrides = {k: v for k, v in _changes(config).items() if k not in OWN and k != "family"}
    if label != config.family:
        overrides["family"] = config.family
    return Row(
        label,
        budget,
        0,
        *shape,
        steps=cell.steps,
        batch_size=batch,
        peak_lr=peak_lr,
        overrides=overrides,
        rules=names,
        flops=convention,
    )


def _repeating(row: Row, base: RunConfig, passes: float) -> Row:
    """The row on as many unique tokens, in whole blocks, as give that many passes over them."""
    if row.problem:
        return row
    blocks = max(1, round(row.steps * row.batch_size / passes))
    overrides = row.overrides | {"data.unique_tokens": blocks * base.data.seq_len}
    return replace(row, overrides=overrides, rules=row.rules | {"epochs": f"{passes:g}"})


def _at_rate(row: Row, factor: float) -> Row:
    """The row at another learning rate; the rule keeps the factor in its name."""
    if factor == 1 or row.problem:
        return row
    named = f"{row.rules.get('lr', 'given')}*{factor:g}"
    return replace(row, peak_lr=row.peak_lr * factor, rules=row.rules | {"lr": named})


def drift_check(rows: Sequence[Row]) -> list[Row]:
    """The rows, and those at the corners of each family's grid at half and at twice their rate.

    Corners are the smallest and the largest N of the smallest and the largest budget. Where the
    best of three rates differs between them by more than the rule says, the rule drifts.
    """
    out = []
    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if row.family == family and not row.problem]
        mine = [row for row in mine if "*" not in row.rules.get("lr", "")]  # at the rule's own rate
        budgets = sorted({row.budget for row in mine})
        for budget in dict.fromkeys(budgets[:1] + budgets[-1:]):
            cells = [row for row in mine if row.budget == budget]
            sizes = [row.layers * row.width**2 for row in cells]
            corners = {sizes.index(min(sizes)), sizes.index(max(sizes))}
            out += [_at_rate(cells[k], f) for k in sorted(corners) for f in DRIFT_FACTORS]
    return sorted([*rows, *(row for row in out if row not in rows)], key=lambda row: row.budget)


def _cell(config: RunConfig, budget: float, convention: Convention) -> rules.Cell:
    return rules.Cell(
        family=config.family,
        budget=budget,
        shape=(config.model.layers, config.model.width, config.model.heads),
        params=flops.param_counts(config)["nonembedding"],
        counts=flops.param_counts(config),
        tokens=budget / flops.flops_per_token(config, convention),
        seq_len=config.data.seq_len,
        warmup_steps=config.optim.warmup_steps,
    )


def _whose_rate(cell: rules.Cell, config: RunConfig) -> rules.Cell:
    """The cell for which a learning rate is asked: of the base shape where rates are transferred."""
    if config.optim.transfer == "none":
        return cell
    base = config.optim.base
    shape = (base.layers, base.width, base.heads)
    counts = flops.param_counts(rules.with_shape(config, shape))
    return replace(cell, shape=shape, params=counts["nonembedding"], counts=counts)


def _changes(config: RunConfig) -> dict[str, Any]:
    """The dotted settings in which `config` differs from the defaults."""
    mine, default = flatten(to_dict(config)), flatten(to_dict(RunConfig()))
    return {key: value for key, value in mine.items() if value != default[key]}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
