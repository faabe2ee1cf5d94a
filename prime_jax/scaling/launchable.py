"""From a size and a budget to a run that can be launched: shape, batch, steps, learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prime_jax import flops
from prime_jax.config import FAMILIES, RunConfig
from prime_jax.errors import UserError
from prime_jax.settings import from_dict
from prime_jax.sweep import grid, rules, state

RULES = ("shape", "batch", "lr", "warmup")
COUNT = "nonembedding"  # what N counts where a CSV does not say
ROUNDS = 30


@dataclass(frozen=True)
class Template:
    """What new runs of a family share with the old ones.

    Attributes:
        label: the family in the fit; `config.family` is what the run is.
        convention: in which C is counted.
        count: which parameters N counts.
        known: the settings are those of a sweep, not defaults.
        rules: kind -> name of the rule that chose shape, batch, lr or warmup.
        notes: what had to be assumed.
    """

    label: str
    config: RunConfig
    convention: flops.Convention
    count: str
    known: bool
    rules: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def of_sweep(root: Path) -> dict[str, dict[str, Any]]:
    """The settings of a sweep's families, as JSON: {label: {"config", "rules"}}.

    Shape, steps, batch, rate and seed of `config` are those of one run and not meant.

    Raises:
        UserError: `root` is no sweep.
    """
    state.check_root(root)
    found: dict[str, dict[str, Any]] = {}
    for run in state.list_runs(root):
        # The longest warm-up is the one that the experiment asks for, before a rule cut it.
        spec = run.spec
        known, warmup = found.get(spec["family"]), _warmup(spec)
        if known is None or warmup > _warmup(known):
            found[spec["family"]] = {"config": spec["config"], "rules": spec.get("rules", {})}
    return found


def _warmup(spec: dict[str, Any]) -> int:
    return spec["config"].get("optim", {}).get("warmup_steps", 0)


def template(
    label: str, conventions: dict[str, str], known: dict[str, Any] | None, family: str | None = None
) -> Template:
    """The template of a family.

    Args:
        label: the family in the fit.
        conventions: `{"flops", "params"}` of the fit.
        known: what `of_sweep` found, None for a fit of a plain CSV.
        family: arm, mdm or prime; needed where `label` is none of them and `known` is None.
    """
    notes = []
    if known:
        config = from_dict(RunConfig, known["config"])
    else:
        kind = family or (label if label in FAMILIES else "arm")
        config = replace(RunConfig(), family=kind)
        notes.append(f"settings are the defaults of {kind} (the fit is not of a sweep directory)")
    if family:
        config = replace(config, family=family)
    convention, count = conventions["flops"], conventions["params"]
    if convention not in flops.CONVENTIONS:
        notes.append(f"FLOPs are {convention} in the fit and matmul in new runs")
        convention = "matmul"
    if count not in flops.param_counts(config):
        notes.append(f"N is {count} in the fit; taken for {COUNT}")
        count = COUNT
    chosen, stated = {}, (known or {}).get("rules", {})
    for kind in RULES:
        default = getattr(grid.Sweep, kind)
        chosen[kind] = stated.get(kind, default)
        if not _is_rule(kind, chosen[kind]):
            if not (kind == "shape" and chosen[kind] == "given"):
                notes.append(f"{kind} rule {chosen[kind]!r} is unknown here; {default} instead")
            chosen[kind] = default
    missing = [kind for kind in ("batch", "lr") if kind not in stated]
    if missing:
        used = ", ".join(f"{kind} {chosen[kind]}" for kind in missing)
        notes.append(f"rules not stated by the fit: {used}")
    return Template(
        label=label,
        config=config,
        convention=convention,
        count=count,
        known=bool(known),
        rules=chosen,
        notes=tuple(notes),
    )


def shape_near(template: Template, params: float) -> rules.Shape:
    """The shape whose N, in the template's count, is nearest to `params` by the shape rule.

    Raises:
        UserError: no shape comes within 25 %.
    """
    rule = rules.resolve("shape", template.rules["shape"])[1]
    target, best, nearest, seen = float(params), None, float("inf"), set()
    for _ in range(ROUNDS):  # the rule counts neither embeddings nor head: correct its target
        try:
            shape = rule(target, template.config)
        except UserError:
            break
        if shape in seen:
            break
        seen.add(shape)
        n = count(template, shape)
        if abs(n / params - 1) < nearest:
            best, nearest = shape, abs(n / params - 1)
        target *= params / n  # converges, as N grows with the target, but not faster
    if best is None or nearest > 0.25:
        raise UserError(
            f"no {template.label} shape within 25 % of N = {params:.3g} ({template.count}, "
            f"vocabulary {template.config.model.vocab_size})"
        )
    return best


def count(template: Template, shape: rules.Shape) -> int:
    """N of a shape in the template's count."""
    return flops.param_counts(rules.with_shape(template.config, shape))[template.count]


def rows(
    template: Template, budget: float, shape: rules.Shape, seeds: Sequence[int]
) -> list[grid.Row]:
    """Rows for `sweep plan`: one run per seed, which never costs more than `budget`.

    Raises:
        UserError: there can be no such run, and why.
    """
    config, label = template.config, template.label
    one = grid.Sweep(
        name="next",
        base=config,
        families={label: {"family": config.family}},
        budgets=[budget],
        sizes=[shape],
        flops=template.convention,
        seeds=seeds,
        **{kind: template.rules[kind] for kind in ("batch", "lr", "warmup")},
    )
    made = [replace(row, rules={**row.rules, "sizes": "design"}) for row in grid.rows(one)]
    if made[0].problem:
        raise UserError(f"{label} at {budget:.3g} FLOPs: {made[0].problem}")
    if cost(made[0]) > budget:
        made = [replace(row, steps=row.steps - 1) for row in made]
    if made[0].steps < 1:
        raise UserError(f"{label} at {budget:.3g} FLOPs: less than one step of its batch")
    return made


def cost(row: grid.Row) -> float:
    """FLOPs of a row in its own convention."""
    return flops.train_flops(grid.to_config(row), row.flops)


def _is_rule(kind: str, name: str) -> bool:
    try:
        rules.resolve(kind, name)
    except UserError:
        return False
    return True
