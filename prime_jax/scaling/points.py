"""The runs that a fit uses: checked, grouped by family and by compute budget.

Are N and C of all runs counted in one way? C / (N D) is a function of the shape of a model: near 6,
more where embeddings or attention are in C and not in N. No one way of counting gives two values of
it at one N, or moves it up and down from each size to the next (`mixed_conventions`).
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prime_jax.errors import UserError
from prime_jax.scaling import labels
from prime_jax.scaling.columns import Columns, choose_columns
from prime_jax.scaling.laws import Law
from prime_jax.scaling.schema import Diagnostic, refuse, warn
from prime_jax.scaling.settings import Choice
from prime_jax.scaling.table import (
    DONE,
    KINDS,
    Table,
    number,
    require,
    status,
    text,
)
from prime_jax.settings import nearest

Array = NDArray[np.float64]

SAME, JUMP = 1.05, 1.25  # largest ratio of C / (N D) at one size, and between neighbours
SEED = 0.0014  # of the loss: a standard deviation of .004 nats at a loss of 2.9, as is typical
GAP = 1.05  # runs further apart than this belong to different budgets
SPREAD = 1.10  # a budget whose FLOPs differ by more is no IsoFLOP: loss moves with C as well as N
CHOSEN = ("family", "run", "seed", "lr", "batch_size")  # of a run, besides its size
INDEX = ("", "index", "id", "Unnamed: 0")  # columns that only number the rows
LOSS_RULE = "loss must be a number above 0 (a run that ended without one is left out where a column status says diverged, failed or the like)"
MIN_COUNT = 1000  # fewer parameters or tokens than this are counted in another unit
UNIT_RATIO = 100  # no convention moves C / (6 N D) this far from one; a wrong unit does


def mixed_conventions(
    flops: Array, params: Array, tokens: Array, names: list[str]
) -> list[Diagnostic]:
    """A warning that names two runs which cannot both be right; `names` are those of the rows."""
    order = np.argsort(params, kind="stable")
    size, ratio = np.log(params[order]), np.log((flops / (params * tokens))[order])
    step, jump = np.diff(size), np.diff(ratio)
    twice = (step < 1e-6) & (np.abs(jump) > np.log(SAME))
    apart = np.abs(jump) > np.log(JUMP)
    both_ways = (jump[apart] > 0).any() and (jump[apart] < 0).any()
    k = np.flatnonzero(twice if twice.any() else apart & both_ways)
    if not len(k):
        return []
    shown = (
        f"{np.exp(ratio[j]):.3g} N D for {names[order[j]]} (N = {labels.count(params[order[j]])})"
        for j in (k[0], k[0] + 1)
    )
    return [warn("mixed_conventions", f"FLOPs are {' and '.join(shown)}: no one count gives both")]


def repeated(*columns: Array | None) -> list[NDArray[np.intp]]:
    """Groups of runs that differ in nothing but their seed: N, D and what was chosen agree."""
    return groups(cells(*columns))


def cells(*columns: Array | None) -> NDArray[np.intp]:
    """The group_n of runs that agree in all columns; NaN agrees with NaN."""
    known = [np.nan_to_num(c, nan=-1.0) for c in columns if c is not None]
    return np.unique(np.stack(known, 1), axis=0, return_inverse=True)[1].ravel()


def groups(cell_n: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Members of each cell of two runs or more; a cell below 0 is none."""
    order = np.argsort(cell_n, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(cell_n[order])) + 1)
    return [part for part in parts if cell_n[part[0]] >= 0 and len(part) > 1]


def assign_budgets(flops: Array, stated: Array | None) -> Array:
    """The budget of each run, [n].

    Groups are runs without a gap of 5 % between them, in their stated budgets where given, else in
    their FLOPs. A group is named by the budget that most of it states, unless that counts FLOPs in
    another convention: then, and where nothing is stated, by the geometric mean of its FLOPs.
    """
    by = flops if stated is None else stated
    order = np.argsort(by, kind="stable")
    steps = np.diff(np.log(by[order])) > np.log(GAP)
    group = np.empty(len(by), dtype=int)
    group[order] = np.concatenate([[0], np.cumsum(steps)])
    means = np.exp(np.bincount(group, np.log(flops)) / np.bincount(group))
    budget = np.array([float(f"{mean:.6g}") for mean in means])
    if stated is not None:
        named = np.array([_commonest(stated[group == k]) for k in range(len(means))])
        budget = np.where(np.abs(np.log(budget / named)) < np.log(SPREAD), named, budget)
    return budget[group]


def _commonest(values: Array) -> float:
    unique, counts = np.unique(values, return_counts=True)
    commonest = unique[counts == counts.max()].tolist()
    return min(commonest, key=lambda value: len(f"{value:g}"))  # the roundest, as plans have them


def budget_spread(flops: Array) -> float:
    """Largest over smallest FLOPs of one budget."""
    return float(flops.max() / flops.min())


def budget_levels(budget: Array, flops: Array) -> int:
    """Different amounts of compute: the budgets, and for runs without gaps between them the times
    that their FLOPs double."""
    runs = (flops[budget == value] for value in np.unique(budget))
    return sum(max(1, int(np.log2(budget_spread(of_one)))) for of_one in runs)


def strata(budget: Array) -> Array:
    """Groups to resample within, [n]: the budgets; those of one or two runs are pooled.

    A run alone in its stratum would be drawn every time, as if it had no error.
    """
    values, counts = np.unique(budget, return_counts=True)
    small = np.isin(budget, values[counts < 3])
    return np.where(small, 0.0, budget)


@dataclass(frozen=True)
class Measure:
    """What a loss is. Losses may be compared, or share an axis, if their `group` is the same."""

    kind: str  # nll, nelbo, train_loss, "" (not stated), or several joined by "+"
    given: str = ""
    tokenizer: str = ""
    eval_set: str = ""

    @property
    def group(self) -> tuple[str, str, str, str]:
        kinds = {"valid" if k in ("nll", "nelbo") else k for k in self.kind.split("+")}
        return "+".join(sorted(kinds)), self.given, self.tokenizer, self.eval_set

    @property
    def label(self) -> str:
        kind = labels.kind(self.kind)
        return f"{kind}, given {self.given}" if self.given else kind


@dataclass(frozen=True)
class Points:
    """The finished runs of one family: arrays [n], N and D in units of one."""

    family: str
    measure: Measure
    flops: Array
    params: Array
    tokens: Array
    loss: Array
    loss_se: Array  # NaN where not known; errors that are all 0 are not known
    budget: Array
    diagnostics: tuple[Diagnostic, ...] = ()
    run: NDArray[np.intp] | None = None  # of each point, where some are of one run or trajectory
    lr: Array | None = None  # peak learning rate, NaN where not known
    batch: Array | None = None  # batch size, alike
    rule_lr: Array | None = None  # what the plan's rule for lr gives, NaN where not known
    stated: bool = False  # the budgets are those that the table states
    row: NDArray[np.intp] | None = None  # of each run in its table
    unique: Array | None = None  # tokens that a run had to train on, inf where not known

    @property
    def available(self) -> Array:
        """Unique tokens, inf where not known."""
        return np.full(len(self.loss), np.inf) if self.unique is None else self.unique

    @property
    def repeats(self) -> NDArray[np.bool_]:
        """Which runs saw their data more than once."""
        return self.tokens > SAME * self.available

    def of_isoflop(self, law: Law | type[Law]) -> "Points":
        """The runs of IsoFLOP curves, beside a law: where it tells repeated data from fresh, those of
        fresh data; else all."""
        return self.only(~self.repeats) if law.knows_repetition else self

    def expected(self, law: Law) -> Array:
        """What a law says of these runs."""
        return law.loss(self.params, self.tokens, self.available)

    def only(self, mine: NDArray[np.bool_]) -> "Points":
        """Some of the runs."""
        arrays = {
            field.name: value[mine]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), np.ndarray)
        }
        return replace(self, **arrays)

    @property
    def budgets(self) -> Array:
        return np.unique(self.budget)

    @property
    def levels(self) -> Array:
        """The budgets, from the smallest to the largest C of the data: where runs are of one
        budget only because there is no gap between them, its name is not their range."""
        budgets = self.budgets
        ends = [self.flops[self.budget == budgets[k]] for k in (0, -1)]
        wide = [budget_spread(end) > SPREAD and not self.stated for end in ends]
        low = ends[0].min() if wide[0] else budgets[0]
        high = ends[1].max() if wide[1] else budgets[-1]
        return np.unique([low, *budgets, high])

    def sizes_near(self, flops: float) -> Array:
        """N of the runs of a budget; of those next to it where no run has it."""
        budgets = self.budgets
        k = np.searchsorted(budgets, flops)
        known = k < len(budgets) and budgets[k] == flops
        beside = budgets[k : k + 1] if known else budgets[max(0, k - 1) : k + 1]
        return self.params[np.isin(self.budget, beside)]


@dataclass(frozen=True)
class Excluded:
    """A run that is no point of the fit, and why."""

    run: str
    family: str
    status: str
    reason: str


@dataclass(frozen=True)
class Runs:
    """Everything read from one source, and the conventions it was read in."""

    families: dict[str, Points]
    excluded: tuple[Excluded, ...]
    choice: Choice
    columns: Columns
    source: str
    sha256: str

    def points(self, family: str) -> Points:
        """Raises UserError if there is no such family."""
        if family not in self.families:
            raise UserError(f"{self.source}: no family {family!r}{nearest(family, self.families)}")
        return self.families[family]


def select(table: Table, choice: Choice | None = None) -> Runs:
    """Check a table and take the columns of `choice`.

    Raises:
        UserError: a missing column, or impossible values (with their rows).
    """
    choice = choice or Choice()
    columns = choose_columns(table, choice)
    reasons = [_why_not(row, columns.loss) for row in table.rows]
    excluded = tuple(
        Excluded(text(row, "run", name), text(row, "family", "?"), status(row) or "done", reason)
        for row, name, reason in zip(table.rows, table.names, reasons, strict=True)
        if reason
    )
    used = _subset(table, [reason is None for reason in reasons])
    if not used.rows:
        states = ", ".join(sorted({run.status for run in excluded}))
        raise UserError(
            f"{table.source}: none of its {len(excluded)} runs is done; nothing to fit (status: {states}; a run counts as {', '.join(DONE[:3])} or with none)"
        )
    _refuse_duplicates(used, columns)
    arrays = _arrays(used, columns)
    arrays["row"] = np.flatnonzero([reason is None for reason in reasons])
    labels = [text(row, "family") for row in used.rows]
    require(used, "family", [bool(label) for label in labels], "family is empty")
    families = {}
    for label in sorted(set(labels)):
        mine = np.array([other == label for other in labels])
        lost = [run for run in excluded if run.family == label]
        part = {name: values[mine] for name, values in arrays.items()}
        families[label] = _family(
            label, table=_subset(used, mine), arrays=part, columns=columns, choice=choice, lost=lost
        )
    return Runs(
        families=families,
        excluded=excluded,
        choice=choice,
        columns=columns,
        source=table.source,
        sha256=table.sha256,
    )


def _subset(table: Table, keep: Any) -> Table:
    rows = [row for row, kept in zip(table.rows, keep, strict=True) if kept]
    names = [name for name, kept in zip(table.names, keep, strict=True) if kept]
    return replace(table, rows=rows, names=names)


def _why_not(row: dict[str, Any], loss: str) -> str | None:
    found = status(row)
    if found not in ("", "done"):
        return text(row, "reason", found)
    if found == "done" and not text(row, loss):
        return f"no value in column {loss}"
    return None


def _arrays(table: Table, columns: Columns) -> dict[str, Array]:
    """The numbers [n] of all runs; the one of C, N, D that is not in the table is derived."""
    out = {"loss": _positive(table, columns.loss, 0, LOSS_RULE)}
    for quantity in ("flops", "params", "tokens"):
        column = getattr(columns, quantity)
        if column:
            read_from = columns.read_as.get(quantity, column).partition(" [")[0]
            millions = f"of millions say --columns '{quantity}={read_from} [M]'"
            rule = f"{column} must be a number in units of one, at least {MIN_COUNT}; {millions}"
            out[quantity] = _positive(table, column, MIN_COUNT, rule)
    if not columns.flops:
        out["flops"] = 6 * out["params"] * out["tokens"]
    elif not columns.params:
        out["params"] = out["flops"] / (6 * out["tokens"])
    elif not columns.tokens:
        out["tokens"] = out["flops"] / (6 * out["params"])
    ratio = out["flops"] / (6 * out["params"] * out["tokens"])
    in_unit = (ratio < UNIT_RATIO) & (ratio > 1 / UNIT_RATIO)
    require(table, columns.flops, in_unit, "flops are far from 6 N D; check the units of all three")
    for name, column in (("loss_se", columns.loss_se), ("epochs", "epochs")):
        out[name] = _unsigned(table, column)
    for name in ("lr", "batch_size"):
        out[name] = np.array([number(row, name) for row in table.rows])
    factors = [_factor(text(row, "rules")) for row in table.rows]
    out["rule_lr"] = out["lr"] / np.array(factors)
    if "unique_tokens" in table.columns:
        unique = _positive(table, "unique_tokens", 0, "unique_tokens must be a number above 0")
        out["epochs"] = out["tokens"] / unique
    if "budget" in table.columns:
        out["budget"] = _positive(table, "budget", 0, "budget must be a number above 0")
    return out


def _factor(rules: str) -> float:
    """A run's learning rate over that of its rule: 0.5 of "shape=given;lr=step-law*0.5"."""
    found = re.search(r"(?:^|;)lr=([^;*]*)(?:\*([0-9.e+-]+))?(?:;|$)", rules)
    return float(found[2] or 1) if found else math.nan


def _positive(table: Table, column: str, least: float, rule: str) -> Array:
    values = np.array([number(row, column) for row in table.rows])
    require(table, column, np.isfinite(values) & (values > 0) & (values >= least), rule)
    return values


def _unsigned(table: Table, column: str) -> Array:
    """A column of which cells may be empty: NaN there."""
    values = np.array([number(row, column) for row in table.rows])
    empty = np.array([not text(row, column) for row in table.rows])
    good = empty | (np.isfinite(values) & (values >= 0))
    require(table, column, good, f"{column} must be a number, 0 or more, or empty")
    return values


def _refuse_duplicates(table: Table, columns: Columns) -> None:
    """One run in two rows counts twice; checkpoints of it (another step) are another matter."""
    if "run" in table.columns:
        apart = [*CHOSEN, columns.params, columns.tokens, "step"]
    else:
        apart = [name for name in table.columns if name not in INDEX]
    first: dict[tuple[str, ...], str] = {}
    for row, name in zip(table.rows, table.names, strict=True):
        key = tuple(text(row, column) for column in apart)
        if key in first:
            raise UserError(f"{table.source}: {first[key]} and {name} are the same run; drop one")
        first[key] = name


def _family(
    label: str,
    table: Table,
    arrays: dict[str, Array],
    columns: Columns,
    choice: Choice,
    lost: list[Excluded],
) -> Points:
    measure, diagnostics = _measure(table, columns, choice)
    budget = assign_budgets(arrays["flops"], arrays.get("budget"))
    run_n, shared = _shared_runs(table, columns)
    diagnostics += [*_data_findings(arrays, lost), *shared]
    counts = (arrays[name] for name in ("flops", "params", "tokens"))
    diagnostics += mixed_conventions(*counts, table.names)
    columns_n = (arrays[name] for name in ("flops", "params", "tokens", "loss"))
    return Points(
        label,
        measure,
        *columns_n,
        loss_se=arrays["loss_se"]
        if (arrays["loss_se"] > 0).any()
        else np.full(len(budget), np.nan),
        budget=budget,
        diagnostics=tuple(diagnostics),
        run=run_n,
        lr=_known(arrays["lr"]),
        batch=_known(arrays["batch_size"]),
        rule_lr=_known(arrays["rule_lr"]),
        stated="budget" in arrays,
        row=arrays["row"],
        unique=_unique(arrays),
    )


def _unique(arrays: dict[str, Array]) -> Array | None:
    """Unique tokens, inf where not known; None if no run repeats any."""
    epochs = np.nan_to_num(arrays["epochs"], nan=0.0)
    known = epochs > 0
    unique = np.where(known, arrays["tokens"] / np.where(known, epochs, 1.0), np.inf)
    return unique if (epochs > 1).any() else None


def _known(values: Array) -> Array | None:
    """The values, NaN where they are not above 0; None if none is."""
    known = np.where(values > 0, values, np.nan)
    return None if np.isnan(known).all() else known


def _shared_runs(
    table: Table, columns: Columns
) -> tuple[NDArray[np.intp] | None, list[Diagnostic]]:
    """The run of each row, if some rows are checkpoints of one; runs of one trajectory count as one.

    A name that comes twice at one step is no name of one run: what was chosen tells those apart.
    """
    names = [text(row, "run", name) for row, name in zip(table.rows, table.names, strict=True)]
    steps = [(text(row, "step"), text(row, columns.tokens)) for row in table.rows]
    seen = Counter(zip(names, steps, strict=True))
    several = {name for (name, _), count in seen.items() if count > 1}
    runs = [
        (name, *(text(row, c) for c in (*CHOSEN, columns.params))) if name in several else (name,)
        for name, row in zip(names, table.rows, strict=True)
    ]
    ways = [text(row, "trajectory") for row in table.rows]
    units = [("", way) if way else run for way, run in zip(ways, runs, strict=True)]
    index = {unit: k for k, unit in enumerate(sorted(set(units)))}
    if len(index) == len(units):
        return None, []
    count = len(set(runs))
    if len(index) < count:
        code, what = "runs_of_one_trajectory", f"{count} runs are of {len(index)} trajectories"
    else:
        code, what = "checkpoints_of_one_run", f"{len(units)} points come from {count} runs"
    found = warn(code, f"{what}, which intervals take as the units")
    return np.array([index[unit] for unit in units]), [found]


def _measure(table: Table, columns: Columns, choice: Choice) -> tuple[Measure, list[Diagnostic]]:
    kinds = [text(row, columns.kind) for row in table.rows]
    known = f"kind must be one of {', '.join(KINDS)}"
    require(table, columns.kind, [kind in ("", *KINDS) for kind in kinds], known)
    sides = {name: _values(table, name) for name in ("given", "tokenizer", "eval_set")}
    joined = {name: "+".join(sorted(values)) for name, values in sides.items()}
    measure = Measure("+".join(k for k in (*KINDS, "") if k in kinds), **joined)
    report = warn if choice.allow_mixed_kinds else refuse
    diagnostics = []
    if len({Measure(kind).group for kind in kinds}) > 1:
        counts = ", ".join(f"{n} {kind or 'not stated'}" for kind, n in Counter(kinds).items())
        diagnostics.append(
            report("mixed_kinds", f"its losses are different kinds of number: {counts}")
        )
    for name, values in sides.items():
        if len(values) > 1:
            shown = ", ".join(value or "nothing" for value in sorted(values))
            diagnostics.append(report("mixed_evaluations", f"its runs differ in {name}: {shown}"))
    if set(kinds) == {""}:
        diagnostics.append(warn("kind_unstated", "the file does not say what kind of loss this is"))
    return measure, diagnostics


def _values(table: Table, column: str) -> set[str]:
    return {text(row, column) for row in table.rows}


def _data_findings(arrays: dict[str, Array], lost: list[Excluded]) -> list[Diagnostic]:
    diagnostics = []
    if lost:
        states = ", ".join(
            f"{n} {status}" for status, n in Counter(run.status for run in lost).items()
        )
        total = len(lost) + len(arrays["loss"])
        diagnostics.append(
            warn("survivors_only", f"{len(lost)} of {total} runs are left out ({states})")
        )
    again = int(np.sum(arrays["epochs"] > 1))
    if again:
        most = np.nanmax(arrays["epochs"])
        diagnostics.append(
            warn(
                "data_repeated",
                f"{again} runs saw their data more than once (up to {most:.3g} times)",
            )
        )
    chosen = (arrays[name] for name in ("params", "tokens", "lr", "batch_size"))
    if not repeated(*chosen, np.maximum(np.nan_to_num(arrays["epochs"]), 1.0)):
        diagnostics.append(
            warn(
                "no_seed_repeats",
                f"no run is repeated with another seed: a noise floor of {SEED:.2%} of the loss is assumed",
            )
        )
    return diagnostics
