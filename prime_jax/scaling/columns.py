"""Which columns of a table a fit reads: one loss, one count of N, one count of FLOPs."""

from dataclasses import dataclass

from prime_jax.errors import UserError
from prime_jax.scaling.table import Table

DEFAULT_METRIC, DEFAULT_FLOPS, DEFAULT_PARAMS = "best-valid", "matmul", "nonembedding_plus_head"
AS_GIVEN = "as given"  # plain `flops` and `params` columns, whatever they count


@dataclass(frozen=True)
class Choice:
    """What to fit. A convention that is None is the default one where the table has it."""

    metric: str = DEFAULT_METRIC
    flops: str | None = None
    params: str | None = None
    allow_mixed_kinds: bool = False


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


def choose(table: Table, choice: Choice) -> Columns:
    """Raises UserError for a column that is not there, with what there is."""
    if any(name.endswith(("__MIN", "__MAX")) for name in table.columns):
        raise UserError(
            f"{table.source}: training curves as W&B exports them; give a CSV with a row for each run (run, family, params, tokens), and this one with --curves"
        )
    if "family" not in table.columns:
        raise UserError(f"{table.source}: no column 'family'; {_has(table)}")
    loss, loss_se, kind = _loss(table, choice.metric)
    flops, flops_convention = _convention(table, "flops", choice.flops, DEFAULT_FLOPS)
    params, params_convention = _convention(table, "params", choice.params, DEFAULT_PARAMS)
    found = {name: name if name in table.columns else "" for name in (flops, params, "tokens")}
    missing = [name for name, column in found.items() if not column]
    if len(missing) > 1:
        raise UserError(
            f"{table.source}: no columns {' and '.join(missing)}; two of flops, params, tokens are needed, and {_has(table)}"
        )
    if flops in missing:
        flops_convention = "6 N D"
    columns = found[flops], found[params], found["tokens"]
    return Columns(loss, loss_se, kind, *columns, flops_convention, params_convention)


def _loss(table: Table, metric: str) -> tuple[str, str, str]:
    if metric == DEFAULT_METRIC:
        names = "loss", "loss_se", "kind"
    else:
        names = f"loss_{metric}", f"se_{metric}", f"kind_{metric}"
    if names[0] not in table.columns:
        others = [c.removeprefix("kind_") for c in table.columns if c.startswith("kind_")]
        known = f"; metrics here: {', '.join([DEFAULT_METRIC, *others])}" if others else ""
        raise UserError(f"{table.source}: no column {names[0]!r}; {_has(table)}{known}")
    return names


def _has(table: Table) -> str:
    """The columns there are; names as other tables have them are pointed out."""
    known = {"n": "params", "d": "tokens", "c": "flops", "name": "run"}
    known |= {name: name for name in ("family", "loss", "flops", "params", "tokens", "kind", "run")}
    meant = {name: known.get(name.lower()) for name in table.columns}
    hints = [
        f"{name} is called {right}" for name, right in meant.items() if right not in (None, name)
    ]
    shown = ", ".join(table.columns[:20]) + (", ..." if len(table.columns) > 20 else "")
    return f"it has {shown}" + (f" ({', '.join(hints)} here)" if hints else "")


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
