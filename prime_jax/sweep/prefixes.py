"""Shared prefixes: the steps that several runs have in common are trained once.

While its learning rate is constant, a run goes through the states of any longer run of the same
trajectory (`config.trajectory_id`), so the longer one can continue from its checkpoints. The runs of
a trajectory are a *ladder*, in the order in which their rates leave the plateau. Each saves at that
step, its *branch point*; a run above it waits for that, and continues from the highest one that it
finds. Where none is left, or it was made on another kind of machine, the run trains from the start:
that costs time, and changes no number.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prime_jax import flops
from prime_jax.config import (
    CheckpointConfig,
    RunConfig,
    constant_steps,
    run_id,
    trajectory_id,
    trajectory_settings,
)
from prime_jax.errors import UserError
from prime_jax.runtime import checkpoint, storage
from prime_jax.settings import from_dict
from prime_jax.sweep.plan import Candidate
from prime_jax.sweep.state import Run

RULES = {"batch_size": "batch", "optim.peak_lr": "lr", "optim.warmup_steps": "warmup"}


@dataclass(frozen=True)
class Shared:
    """What the runs of a plan share.

    Attributes:
        listed: the candidates, ladder by ladder; their notes say where they continue.
        branches: id -> steps that another run trains for this one.
        why_not: what keeps other runs from sharing -> how many.
    """

    listed: list[Candidate]
    branches: dict[str, int]
    why_not: dict[str, int]

    def own(self, config: RunConfig) -> RunConfig:
        """A run as long as what it trains itself."""
        return replace(config, steps=config.steps - self.branches.get(run_id(config), 0))

    def summary(self, flops_per_second: float | None = None) -> list[str]:
        """How much is saved, and why others share nothing."""
        if not self.branches:
            return []
        runs = [one.config for one in self.listed if not one.drop]
        total, left = (
            sum(flops.train_flops(config, "matmul") for config in those)
            for those in (runs, map(self.own, runs))
        )
        text = f"shared prefixes: {len(self.branches)} runs continue from another, which saves "
        text += f"{1 - left / total:.0%} of the FLOPs: {left:.3g} are left"
        if flops_per_second:
            text += f", {left / flops_per_second / 3600:.3g} h"
        alone = (f"{n} share nothing: {reason}" for reason, n in self.why_not.items())
        return [text, *alone]

    def planned_alone(self, runs: Sequence[Run]) -> int:
        """How many of a sweep's runs are in this plan, but were planned before, to share nothing."""
        could = {one.id for one in self.listed if not one.drop and constant_steps(one.config)}
        return sum(run.id in could and not run.branch_point for run in runs)


def plan(listed: Sequence[Candidate]) -> Shared:
    """What the runs share that a plan lists.

    Raises:
        UserError: nothing; says which rules or settings prevent it.
    """
    good = [candidate for candidate in listed if not candidate.drop]
    ladders: dict[Any, list[Candidate]] = {}
    for one in good:
        ladders.setdefault(_trajectory(one.config), []).append(one)
    in_order, branches = [], {}
    for ladder in ladders.values():
        ladder.sort(key=lambda one: (constant_steps(one.config), one.config.steps, one.id))
        in_order.append(ladder[0])
        for lower, upper in itertools.pairwise(ladder):
            branches[upper.id] = steps = constant_steps(lower.config)
            where = f"(continues {lower.id} at step {steps})"
            in_order.append(replace(upper, note=f"{where} {upper.note}".rstrip()))
    why_not = _why_not([ladder[0] for ladder in ladders.values() if len(ladder) == 1], good)
    if good and not branches:
        raise UserError(
            f"--share-prefixes: no two of these {len(good)} runs have a prefix in common: "
            f"{'; '.join(why_not)}"
        )
    return Shared([*in_order, *(one for one in listed if one.drop)], branches, why_not)


def _trajectory(config: RunConfig) -> Any:
    """What names a ladder; a run without a constant rate is one by itself."""
    return trajectory_id(config) if constant_steps(config) else config


def _why_not(alone: Sequence[Candidate], good: Sequence[Candidate]) -> dict[str, int]:
    """What keeps runs from sharing, and how many of them, the most first."""
    key = lambda one: (one.row.family, one.config.model, one.config.seed)  # noqa: E731
    cells: dict[Any, list[Candidate]] = {}
    for one in good:
        cells.setdefault(key(one), []).append(one)
    found: Counter[str] = Counter()
    for one in alone:
        optim, rules = one.config.optim, one.row.rules
        cooldown = f"optim.cooldown_fraction = {optim.cooldown_fraction}"
        if optim.schedule != "wsd":
            found[f"optim.schedule = {optim.schedule} has no constant phase (wsd has)"] += 1
        elif not constant_steps(one.config):
            found[f"{cooldown} leaves no constant phase"] += 1
        if len(cells[key(one)]) == 1:
            rule = f" (rule sizes = {rules['sizes']})" if "sizes" in rules else ""
            found[f"a shape has one budget only{rule}"] += 1
        settings = [trajectory_settings(other.config) for other in cells[key(one)]]
        for name in sorted(set().union(*settings)):
            if any(other.get(name) != settings[0].get(name) for other in settings):
                kind = RULES.get(name)
                rule = f" (rule {kind} = {rules[kind]})" if kind in rules else ""
                found[f"{name} differs between budgets{rule}"] += 1
    return dict(found.most_common())


class Ladders:
    """Those of a sweep, as one listing of its runs shows them."""

    def __init__(self, root: storage.Path, runs: Sequence[Run]):
        self.root = root
        ladders: dict[tuple[str, str], list[Run]] = {}
        for run in runs:
            if run.branch_point:
                ladders.setdefault((run.spec["trajectory"], run.slice), []).append(run)
        for ladder in ladders.values():
            ladder.sort(key=lambda run: (run.branch_point, run.spec["config"]["steps"], run.id))
        self._of = {run.id: ladder for ladder in ladders.values() for run in ladder}

    def waits_for(self, run: Run, ready: set[str], backoff: float) -> Run | None:
        """The run below it for whose branch point a run waits that may be taken; None if it is due.

        Args:
            ready: ids of all runs that may be taken here, now.
            backoff: as for `Run.opens_in`.
        """
        for lower in reversed(self._below(run)):
            if lower.result is not None or self._has_branch_point(lower):
                return None
            if lower.id in ready or lower.state == "running" or lower.opens_in(backoff=backoff):
                return lower
        return None  # those below it have been given up, or cannot run on this machine

    def donors(self, run: Run) -> list[tuple[str, list[int]]]:
        """The other runs of its ladder, each with its attempts, oldest first."""
        others = [other for other in self._of.get(run.id, ()) if other.id != run.id]
        return [(one.id, [a.k for a in one.attempts]) for one in others if one.attempts]

    def pinned(self, run: Run) -> int:
        """Its branch point, if there are runs that may need it; else 0."""
        ladder = self._of.get(run.id, [])
        waiting = any(one.result is None for one in ladder[len(self._below(run)) + 1 :])
        return run.branch_point if waiting else 0

    def release(self, run: Run) -> None:
        """Now that `run` is done: remove branch points of which no run above is open any more.

        Raises:
            UserError, Unreachable: checkpoints cannot be read or removed.
        """
        for one in reversed(self._of.get(run.id, ())):
            if one.result is None:
                return
            keep = from_dict(CheckpointConfig, one.spec["config"]["checkpoint"])
            for folder in self._checkpoints(one):
                if checkpoint.is_sealed(folder, one.branch_point):
                    checkpoint.prune(folder, keep)

    def _below(self, run: Run) -> list[Run]:
        return list(itertools.takewhile(lambda one: one.id != run.id, self._of.get(run.id, ())))

    def _has_branch_point(self, run: Run) -> bool:
        """Whether the branch point of a run is there, by it or by one with the same."""
        step = run.branch_point
        same = [one for one in self._of[run.id] if one.branch_point == step]
        return any(checkpoint.is_sealed(d, step) for one in same for d in self._checkpoints(one))

    def _checkpoints(self, run: Run) -> list[storage.Path]:
        folder = self.root / "runs" / run.id
        return [folder / str(attempt.k) / "checkpoints" for attempt in run.attempts]
