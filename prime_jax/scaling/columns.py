"""Which column of a table is which: its name here, its unit, and in which convention it counts.

`interpret` brings anybody's table into the words of this project. Columns are named by the person
who asks (`loss=val_loss`), read off the names of runs (`{FLOPs}_{N}_{D}`), or recognised where
their name leaves no doubt (`val_loss`, `n_params`, `Tokens (B)`); counts may have units (354M).
What was read under another name stays in `Table.read_as`, and is said.
"""

import math
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from prime_jax.errors import UserError
from prime_jax.scaling.settings import DEFAULT_FLOPS, DEFAULT_METRIC, DEFAULT_PARAMS, Choice
from prime_jax.scaling.table import Row, Table, number, require, text
from prime_jax.settings import nearest

AS_GIVEN = "as given"  # plain `flops` and `params` columns, whatever they count
COUNTS = ("flops", "params", "tokens", "budget", "unique_tokens", "tokens_per_step")
LETTERS = {"n": "params", "d": "tokens", "c": "flops"}
# A column is recognised if all words of its name are here, one of them before the bar.
RECOGNISED = {
    "run": "run name | id",
    "family": "family arch architecture method | model",
    "loss": "loss nll | val valid validation eval evaluation test dev final last",
    "params": "params parameters param | n num number of count total model",
    "tokens": "tokens token | n num number of count total train training trained seen consumed",
    "flops": "flops flop compute | total train training budget",
    "lr": "lr | peak max base",
}
# Words by which other columns may be meant, the likeliest first: they are asked for, not taken.
MEANT = {
    "family": ("family", "model", "arch", "architecture", "method", "group", "experiment"),
    "loss": ("loss", "nll"),
    "params": ("params", "parameters", "param", "n"),
    "tokens": ("tokens", "token", "d"),
    "flops": ("flops", "flop", "compute", "c"),
}
PREFIXES = ("config", "summary", "hparams")  # of W&B's columns
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21}
UNITS |= {"thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12}
AT_END = ("k", "m", "b", "t", "thousands", "millions", "billions", "trillions")  # tokens_b
NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
WITH_UNIT = re.compile(
    rf"({NUMBER})\s*([kmbgtpez]?)\s*(?:flops?|tokens?|params?|parameters?)?", re.IGNORECASE
)
IN_UNIT = re.compile(r"(?P<name>.*\S)\s*[\[(](?P<unit>[^\])]+)[\])]")  # N [M], tokens (1e9)


@dataclass(frozen=True)
class Columns:
    """Column names; "" for the one of flops, params, tokens that C = 6 N D gives."""

    loss: str
    loss_se: str
    kind: str
    flops: str
    params: str
    tokens: str
    flops_convention: str
    params_convention: str
    read_as: Mapping[str, str] = field(default_factory=dict)  # as in `Table`


def interpret(table: Table, choice: Choice) -> Table:
    """The table in the words of this project, counts in units of one.

    Raises:
        UserError: a column or a name of a run is not as `choice` says.
    """
    table = renamed(table, choice.names)
    if choice.name_pattern:
        table = _by_names_of_runs(table, choice.name_pattern)
    if choice.family:
        table = _of_one_family(table, choice.family)
    return _in_ones(renamed(table, recognised(table, choice)))


def renamed(table: Table, names: Mapping[str, str]) -> Table:
    """The table with columns called as they are here; `names` holds their own: {"loss": "val_loss"}.

    A column that had the new name before is left out. A unit behind a name ("N [M]"), or at its end
    (`tokens_b`), is multiplied out.

    Raises:
        UserError: such a column is not there, or stands for two.
    """
    if not names:
        return table
    units = {ours: _unit(theirs, table.columns) for ours, theirs in names.items()}
    for column, _ in units.values():
        if column not in table.columns:
            raise UserError(
                f"{table.source}: no column {column!r}{nearest(column, table.columns)} (of --columns)"
            )
    new = {column: ours for ours, (column, _) in units.items()}
    if len(new) < len(names):
        raise UserError("--columns: one column stands for two")
    kept = [name for name in table.columns if name in new or name not in names]
    rows = [{new.get(name, name): row[name] for name in kept if name in row} for row in table.rows]
    columns = [new.get(name, name) for name in kept]
    for ours, (_, unit) in units.items():
        if unit != 1 and is_count(ours):
            rows = [row | {ours: _times(row, ours, unit)} for row in rows]
    if (
        "loss" in names
        and "kind" not in columns
        and {"train", "training"} & {*_words(names["loss"])}
    ):
        columns.append("kind")
        rows = [row | {"kind": "train_loss"} for row in rows]
    said = {ours: theirs for ours, theirs in names.items() if ours != theirs}
    return replace(table, rows=rows, columns=columns, read_as={**table.read_as, **said})


def is_count(column: str) -> bool:
    return column in COUNTS or column.startswith(("flops_", "params_"))


def _unit(name: str, columns: list[str]) -> tuple[str, float]:
    """The column that is meant, and in which unit it counts."""
    found = IN_UNIT.fullmatch(name)
    factor = _factor(found["unit"]) if found else math.nan
    if name in columns or not found:
        *others, last = _words(name) or [""]
        at_end = UNITS.get(last, 1.0) if others and last in AT_END else 1.0
        return name, at_end if math.isnan(factor) else factor
    if math.isnan(factor):
        raise UserError(f"--columns: {name!r}: a unit is k, M, B, T, or a number like 1e6")
    return found["name"], factor


def _factor(unit: str) -> float:
    """What a unit stands for; NaN for none."""
    try:
        factor = UNITS.get(unit.strip().lower()) or float(unit)
    except ValueError:
        return math.nan
    return factor if 0 < factor < math.inf else math.nan


def _times(row: Row, column: str, unit: float) -> float | str:
    value = number(row, column) * unit
    return text(row, column) if math.isnan(value) else value


def _in_ones(table: Table) -> Table:
    """Counts such as 354M, 20B tokens or 1e18 FLOPs as numbers; other cells stay as they are."""
    rows = [dict(row) for row in table.rows]
    for column in filter(is_count, table.columns):
        for row in rows:
            found = WITH_UNIT.fullmatch(text(row, column))
            if found and found[0] != found[1]:
                row[column] = float(found[1]) * UNITS.get(found[2].lower(), 1.0)
    return replace(table, rows=rows)


def _by_names_of_runs(table: Table, pattern: str) -> Table:
    """Columns from the parts of every run's name.

    Raises:
        UserError: no column holds names, some are not like the pattern, or that is none.
    """
    fields, matcher = _matcher(pattern)
    column = next(iter(candidates(table, "run")), None)
    if column is None:
        raise UserError(f"{table.source}: no column of names for --name-pattern; {_has(table)}")
    found = [matcher.fullmatch(text(row, column)) for row in table.rows]
    require(table, column, [one is not None for one in found], f"names must be like {pattern}")
    rows = [
        row | dict(zip(fields, one.groups(), strict=True))
        for row, one in zip(table.rows, found, strict=True)
    ]
    columns = list(dict.fromkeys((*table.columns, *fields)))
    said = {ours: f"{{{theirs}}} of {column}" for ours, theirs in fields.items()}
    return replace(table, rows=rows, columns=columns, read_as={**table.read_as, **said})


def _matcher(pattern: str) -> tuple[dict[str, str], re.Pattern[str]]:
    """The fields of a pattern, {name here: name there}, and a group for each; {} is anything."""
    example = "a pattern is like {family}_{N}_{D}"
    fields: dict[str, str] = {}
    expression = ""
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise UserError(f"--name-pattern {pattern}: {error}; {example}") from error
    for literal, name, *_ in parts:
        expression += re.escape(literal)
        if name is None:
            continue
        ours = next((q for q in RECOGNISED if _means(q, name)), name)
        if ours in fields:
            raise UserError(f"--name-pattern {pattern}: {ours} comes twice; {example}")
        cell = NUMBER + "[kKmMbBgGtT]?" if is_count(ours) else ".+?"
        expression += f"({cell})" if name else ".*?"
        fields |= {ours: name} if name else {}
    if not fields:
        raise UserError(f"--name-pattern {pattern}: no field in it; {example}")
    return fields, re.compile(expression)


def _of_one_family(table: Table, family: str) -> Table:
    if "family" in table.columns:
        names = list(dict.fromkeys(text(row, "family") for row in table.rows))
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise UserError(
            f"{table.source}: it has a column 'family' ({shown}); --family is for tables without"
        )
    rows = [row | {"family": family} for row in table.rows]
    return replace(table, rows=rows, columns=["family", *table.columns])


def recognised(table: Table, choice: Choice) -> dict[str, str]:
    """Columns that are not there under their name here, and the only ones that can be meant."""
    found = {}
    conventions = {
        "loss": f"loss_{choice.metric}",
        "flops": f"flops_{choice.flops or DEFAULT_FLOPS}",
        "params": f"params_{choice.params or DEFAULT_PARAMS}",
    }
    for quantity in RECOGNISED:
        here = {quantity, conventions.get(quantity)} & {*table.columns}
        if here or getattr(choice, quantity, None):  # one that is asked for has to be there
            continue
        meant = candidates(table, quantity)
        if len(meant) == 1 and (quantity != "run" or _tell_apart(table, meant[0])):
            found[quantity] = meant[0]
    return found


def candidates(table: Table, quantity: str) -> list[str]:
    """The columns that a quantity may be; that of its own name, in whatever case, before others."""
    same = [name for name in table.columns if name.lower() == quantity]
    return sorted(same, key=lambda name: name != quantity) or [
        name for name in table.columns if _means(quantity, name)
    ]


def _tell_apart(table: Table, column: str) -> bool:
    names = [text(row, column) for row in table.rows]
    return len(set(names)) == len(names)


def _means(quantity: str, name: str) -> bool:
    unit = IN_UNIT.fullmatch(name)
    words = _words(unit["name"] if unit and not math.isnan(_factor(unit["unit"])) else name)
    if len(words) > 1 and is_count(quantity) and words[-1] in AT_END:
        words = words[:-1]
    if len(words) == 1 and words[0] in LETTERS:
        return LETTERS[words[0]] == quantity
    core, _, beside = (part.split() for part in RECOGNISED[quantity].partition("|"))
    return bool(words) and set(words) <= {*core, *beside} and any(word in core for word in words)


def _words(name: str) -> list[str]:
    words = re.findall("[a-z]+", name.lower().replace("learning_rate", "lr"))
    return words[1:] if words[:1] and words[0] in PREFIXES and len(words) > 1 else words


def choose_columns(table: Table, choice: Choice, counts: int = 2) -> Columns:
    """Which column is which; of flops, params and tokens `counts` are needed, flops if it is one.

    Raises:
        UserError: a column is not there; with what there is.
    """
    if any(name.endswith(("__MIN", "__MAX")) for name in table.columns):
        raise UserError(
            f"{table.source}: training curves as W&B exports them; give a CSV with a row for each run (run, family, params, tokens), and this one with --curves"
        )
    missing = [] if "family" in table.columns else ["family"]
    loss, loss_se, kind = _loss(table, choice.metric)
    missing += [] if loss in table.columns else [loss]
    flops, flops_convention = _convention(table, "flops", choice.flops, DEFAULT_FLOPS)
    params, params_convention = _convention(table, "params", choice.params, DEFAULT_PARAMS)
    found = {name: name if name in table.columns else "" for name in (flops, params, "tokens")}
    absent = [name for name, column in found.items() if not column]
    missing += absent if len(absent) > 3 - counts else []
    missing += [flops] if counts == 1 and flops in absent else []
    if missing:
        raise UserError(f"{table.source}: {_lacks(table, missing, absent)}")
    if flops in absent:
        flops_convention = "6 N D"
    columns = found[flops], found[params], found["tokens"]
    return Columns(
        loss, loss_se, kind, *columns, flops_convention, params_convention, table.read_as
    )


def _loss(table: Table, metric: str) -> tuple[str, str, str]:
    if metric == DEFAULT_METRIC:
        return "loss", "loss_se", "kind"
    names = f"loss_{metric}", f"se_{metric}", f"kind_{metric}"
    if names[0] not in table.columns:
        others = [c.removeprefix("kind_") for c in table.columns if c.startswith("kind_")]
        known = f"metrics here: {', '.join([DEFAULT_METRIC, *others])}" if others else _has(table)
        raise UserError(f"{table.source}: no column {names[0]!r}; {known}")
    return names


def _lacks(table: Table, missing: list[str], absent: list[str]) -> str:
    """All the columns that are missing, what there is, and which of that may be meant."""
    named = ", ".join(map(repr, missing))
    two = " (two of flops, params, tokens are needed)" if len(absent) > 1 else ""
    what = "columns" if len(missing) > 1 else "column"
    free = [name for name in table.columns if name not in (*MEANT, "kind", "run", "seed", "budget")]
    numbers = [name for name in free if number(table.rows[0], name) > 0]
    texts = [name for name in free if name not in numbers]
    near = {
        name: found
        for name in missing
        if (found := _likeliest(name, texts if name == "family" else numbers))
    }
    pairs = ",".join(f"{ours}={theirs}" for ours, theirs in near.items())
    hints = [f"if these are meant, say --columns {pairs}"] if pairs else []
    if "family" in missing and "family" not in near:
        hints.append("if all runs are of one family, say --family NAME")
    if len(absent) > 1 and candidates(table, "run"):
        hints.append("if names of runs tell, say --name-pattern {family}_{N}_{D} or the like")
    return "; ".join([f"no {what} {named}{two}", _has(table), *hints])


def _likeliest(wanted: str, columns: list[str]) -> str:
    """The column whose words are nearest to a name, or ""."""

    known = MEANT.get(wanted, ())

    def distance(name: str) -> tuple[bool, bool, int, int]:
        words = re.findall("[a-z]+", name.lower())
        said = words if len(words) == 1 else [word for word in words if len(word) > 1]
        first = min((known.index(word) for word in said if word in known), default=len(known))
        return first == len(known), "train" in words, first, len(words)

    best = min(columns, key=distance, default="")
    return best if best and not distance(best)[0] else ""


def _has(table: Table) -> str:
    names = [table.read_as.get(name, name) for name in table.columns]
    return f"it has {', '.join(names[:20])}" + (", ..." if len(names) > 20 else "")


def _convention(table: Table, quantity: str, wanted: str | None, default: str) -> tuple[str, str]:
    """The column that counts a quantity, and the name of the convention."""
    column = f"{quantity}_{wanted or default}"
    if column in table.columns:
        return column, wanted or default
    if wanted:
        known = [c for c in table.columns if c.startswith(f"{quantity}_")]
        has = f"it has {', '.join(known)}" if known else f"its {quantity} are taken as they are"
        raise UserError(f"{table.source}: no column {column!r}; {has}")
    return quantity, AS_GIVEN
