"""Expand a sweep into rows; each row describes one training run completely.

An EXPERIMENT is a Python file with `sweep() -> Sweep`, or a JSON file that holds a list of rows,
the fields of `Row`. docs/experiments.md describes both.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prime_jax import experiment, flops
from prime_jax.config import FAMILIES, RunConfig, from_dict, nearest, set_path, to_dict, validate
from prime_jax.errors import UserError
from prime_jax.flops import Convention
from prime_jax.runtime import records
from prime_jax.sweep import rules
from prime_jax.sweep.rules import Shape
from prime_jax.sweep.strict import strict

Size = Shape | float  # an explicit shape, or a target N (without embeddings and head)
Rule = str | Callable[..., Any]


@dataclass(frozen=True)
class Around:
    """Sizes in equal ratios from N*/span to N* span around an expected optimum N*."""

    span: float = 4.0
    count: int = 5
    optimum: Rule = "chinchilla"

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
class Sweep:
    """Families x budgets x sizes x seeds, and the rules for the rest.

    Attributes:
        name: used in tables and reports.
        base: the configuration that every cell starts from.
        families: label -> dotted overrides. A label that is no family of `RunConfig` gives it
            under `family`, e.g. `{"prime-l2": {"family": "prime", "subtokens.length": 2}}`.
        budgets: training FLOPs C in the convention `flops`.
        sizes: for all budgets, or by budget, or a function of (config, budget) such as `Around`.
        seeds: of every cell; `extra_seeds` adds some at given budgets.
        epochs_limit: runs with more epochs are flagged.
    """

    name: str
    base: RunConfig
    families: Mapping[str, Mapping[str, Any]]
    budgets: Sequence[float]
    sizes: (
        Sequence[Size]
        | Mapping[float, Sequence[Size]]
        | Callable[[RunConfig, float], Sequence[Size]]
    )
    flops: Convention = "matmul"
    seeds: Sequence[int] = (0,)
    extra_seeds: Mapping[float, Sequence[int]] = field(default_factory=dict)
    shape: Rule = "aspect"
    batch: Rule = "deepseek"
    lr: Rule = "step-law"
    warmup: Rule = "capped"
    epochs_limit: float = 4.0


@dataclass(frozen=True)
class Row:
    """One planned run, and the schema of a JSON row."""

    family: str  # the label; also the RunConfig family unless overrides["family"] says otherwise
    budget: float  # training FLOPs, in the convention `flops`
    seed: int
    layers: int
    width: int
    heads: int
    steps: int
    batch_size: int  # sequences
    peak_lr: float
    overrides: dict = field(default_factory=dict)  # dotted setting -> value
    rules: dict = field(default_factory=dict)  # kind -> name of the rule used
    flops: Convention = "matmul"
    problem: str = ""  # why this run is impossible


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
        UserError: as `experiment.call` and `from_json`.
    """
    path = Path(path)
    if path.suffix == ".json":
        values = records.read_json(path)
        if not isinstance(values, list):
            raise UserError(f"{path}: expected a list of rows")
        made = [_numbered(value, f"{path}, row {i}") for i, value in enumerate(values, 1)]
        return Experiment(path.stem, tuple(made), _hash(path))
    sweep = strict(experiment.call(path, "sweep", Sweep), f"{path}: sweep")
    made = experiment.guarded(
        path, lambda: tuple(rows(sweep))
    )  # rules may be functions of the file
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
                out += [replace(cell, seed=seed) for seed in seeds]
    return sorted(out, key=lambda row: row.budget)


def to_config(row: Row) -> RunConfig:
    """The run of a row.

    Raises:
        UserError: an unknown setting, or a value of the wrong type.
    """
    config = _of_family(RunConfig(), row.family, row.overrides)
    for setting, name in OWN.items():
        config = set_path(config, setting, getattr(row, name))
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
    if not isinstance(value, dict):
        raise UserError("expected an object with the fields of a row")
    names = [f.name for f in dataclasses.fields(Row)]
    for key in value:
        if key not in (*names, "tokens"):
            raise UserError(f"{key}: no such field{nearest(key, [*names, 'tokens'])}")
    if ("tokens" in value) == ("steps" in value):
        raise UserError("give either steps or tokens")
    tokens = value.get("tokens")
    value = {"steps": 0} | {k: v for k, v in value.items() if k != "tokens"}
    required = [f.name for f in dataclasses.fields(Row) if _has_no_default(f)]
    if missing := [name for name in required if name not in value]:
        raise UserError(f"missing {', '.join(missing)}")
    row = from_dict(Row, value, "row")
    if not 0 < row.budget < math.inf:
        raise UserError(f"budget = {row.budget}: must be above 0 (FLOPs)")
    config = to_config(row)
    if tokens is None:
        return row
    number = isinstance(tokens, (int, float)) and not isinstance(tokens, bool)
    if not (number and 0 < tokens < math.inf):
        raise UserError(f"tokens = {tokens!r}: must be a number above 0")
    return replace(row, steps=round(tokens / max(1, row.batch_size * config.data.seq_len)))


def _has_no_default(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _of_family(base: RunConfig, label: str, changes: Mapping[str, Any]) -> RunConfig:
    if label not in FAMILIES and "family" not in changes:
        raise UserError(
            f"family {label!r}: no such family{nearest(label, FAMILIES)}; or set one under 'family'"
        )
    config = set_path(base, "family", changes.get("family", label))
    for setting, value in changes.items():
        config = set_path(config, setting, value)
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
        validate(
            replace(config, batch_size=config.mesh.accumulate)
        )  # the batch size is not chosen yet
        cell = _cell(config, budget, convention)
        batch = named["batch"][1](cell)
        if batch < 1:
            raise UserError(f"batch rule {names['batch']} gives {batch} sequences")
    except UserError as error:
        return Row(label, budget, 0, *shape, 0, 0, 0.0, {}, names, convention, str(error))
    cell = replace(cell, steps=round(cell.tokens / (batch * cell.seq_len)))
    config = set_path(config, "optim.warmup_steps", named["warmup"][1](cell))
    peak_lr = float(named["lr"][1](cell))
    overrides = {k: v for k, v in _changes(config).items() if k not in OWN and k != "family"}
    if label != config.family:
        overrides["family"] = config.family
    return Row(label, budget, 0, *shape, cell.steps, batch, peak_lr, overrides, names, convention)


def _cell(config: RunConfig, budget: float, convention: Convention) -> rules.Cell:
    return rules.Cell(
        family=config.family,
        budget=budget,
        params=flops.param_counts(config)["nonembedding"],
        tokens=budget / flops.flops_per_token(config, convention),
        seq_len=config.data.seq_len,
        warmup_steps=config.optim.warmup_steps,
    )


def _changes(config: RunConfig) -> dict[str, Any]:
    """The dotted settings in which `config` differs from the defaults."""
    mine, default = _flat(to_dict(config)), _flat(to_dict(RunConfig()))
    return {key: value for key, value in mine.items() if value != default[key]}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
