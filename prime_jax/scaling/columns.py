"""Which column of a table is which: its names here, and in which convention it counts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from prime_jax.errors import UserError
from prime_jax.scaling.settings import DEFAULT_FLOPS, DEFAULT_METRIC, DEFAULT_PARAMS, Choice
from prime_jax.scaling.table import Table, number
from prime_jax.settings import nearest

AS_GIVEN = "as given"  # plain `flops` and `params` columns, whatever they count
# Words by which columns of others are recognised, the likeliest first.
MEANT = {
    "family": ("family", "model", "arch", "architecture", "method", "group", "experiment"),
    "loss": ("loss", "nll"),
    "params": ("params", "parameters", "param", "n"),
    "tokens": ("tokens", "token", "d"),
    "flops": ("flops", "flop", "compute", "c"),
}


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


def renamed(table: Table, names: Mapping[str, str]) -> Table:
    """The table with columns called as they are here; `names` holds their own: {"loss": "val_loss"}.

    A column that had the new name before is left out.

    Raises:
        UserError: such a column is not there, or stands for two.
    """
    for wanted in names.values():
        if wanted not in table.columns:
            raise UserError(
                f"{table.source}: no column {wanted!r}{nearest(wanted, table.columns)} (of --columns)"
            )
    new = {theirs: ours for ours, theirs in names.items()}
    if len(new) < len(names):
        raise UserError("--columns: one column stands for two")
    kept = [name for name in table.columns if name in new or name not in names]
    rows = [{new.get(name, name): row[name] for name in kept if name in row} for row in table.rows]
    return replace(table, rows=rows, columns=[new.get(name, name) for name in kept])


def choose_columns(table: Table, choice: Choice) -> Columns:
    """Raises UserError for a column that is not there, with what there is."""
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
    missing += absent if len(absent) > 1 else []
    if missing:
        raise UserError(f"{table.source}: {_lacks(table, missing, absent)}")
    if flops in absent:
        flops_convention = "6 N D"
    columns = found[flops], found[params], found["tokens"]
    return Columns(loss, loss_se, kind, *columns, flops_convention, params_convention)


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
    hint = f"; if these are meant, say --columns {pairs}" if pairs else ""
    return f"no {what} {named}{two}; {_has(table)}{hint}"


def _likeliest(wanted: str, columns: list[str]) -> str:
    """The column whose words are nearest to a name, or ""."""

    known = MEANT.get(wanted, ())

    def distance(name: str) -> tuple[bool, int, int]:
        words = re.findall("[a-z]+", name.lower())
        said = words if len(words) == 1 else [word for word in words if len(word) > 1]
        first = min((known.index(word) for word in said if word in known), default=len(known))
        return "train" in words, first, len(words)

    best = min(columns, key=distance, default="")
    return best if best and distance(best)[1] < len(known) else ""


def _has(table: Table) -> str:
    shown = ", ".join(table.columns[:20]) + (", ..." if len(table.columns) > 20 else "")
    return f"it has {shown}"


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
