"""What a fit leaves in a directory: fit.json, and points.csv, from which it can be fitted again.

`predict` and `design` need the bootstrap replicates, which are too many to store and cheap to
repeat: with the same runs, settings and seed they are the same numbers to the last bit.
"""

import csv
import hashlib
import io
import math
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from prime_jax.errors import UserError
from prime_jax.runtime.records import read_json, write_json_atomic
from prime_jax.scaling.fits import fit_family, whole
from prime_jax.scaling.points import Points, Runs, select
from prime_jax.scaling.readers import read_csv
from prime_jax.scaling.results import SCHEMA, Counted, ScalingFit
from prime_jax.scaling.schema import as_dict
from prime_jax.scaling.settings import Choice, Settings
from prime_jax.scaling.table import Table, number, status, text
from prime_jax.settings import from_dict

FIT, POINTS = "fit.json", "points.csv"
MEASURE = ("given", "tokenizer", "eval_set")
NUMBERS = ("flops", "params", "tokens", "budget", "loss", "loss_se")
KEPT = (
    "run",
    "seed",
    "trajectory",
    "step",
    "lr",
    "batch_size",
    "epochs",
    "unique_tokens",
    "data",
    "rules",
)


def write(fit: ScalingFit, path: Path) -> dict[str, Any]:
    """Write points.csv, and fit.json with its hash; returns the contents of fit.json.

    Raises:
        UserError: `path` cannot be written to.
    """
    text = points_csv(fit.table, fit.data)
    source = replace(fit.source, points=hashlib.sha256(text.encode()).hexdigest())
    result = as_dict(replace(fit, source=source))
    make(path)
    try:
        (path / POINTS).write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"cannot write {path / POINTS}: {error.strerror}") from error
    write_json_atomic(path / FIT, result)
    return result


def make(path: Path) -> Path:
    """Make the directory. Raises UserError if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path}: {error.strerror}") from error
    return path


def load(path: Path, families: Sequence[str] | None = None) -> ScalingFit:
    """Fit the runs of a directory again, all of their families or some: the same numbers.

    Raises:
        UserError: it is no fit, of another version, or its points are not those of its fit; or a
            family that it does not have.
    """
    result = _result(path)
    try:
        method, source, conventions = result["method"], result["source"], result["conventions"]
        settings = from_dict(Settings, method["settings"], f"{path / FIT}: settings")
        choice = Choice(allow_mixed_kinds=method["allow_mixed_kinds"])
        hashed = source["points"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path / FIT}: does not say how it was fitted ({error}); fit again"
        ) from error
    table = read_csv(path / POINTS)
    if table.sha256 != hashed:
        raise UserError(f"{path / POINTS}: not the runs of fit.json (it has changed); fit again")
    runs = select(table, choice)
    columns = replace(
        runs.columns,
        flops_convention=conventions["flops"],
        params_convention=conventions["params"],
        read_as=source.get("columns", {}),
    )
    choice = replace(choice, metric=result["metric"])
    runs = replace(
        runs, choice=choice, columns=columns, source=source["name"], sha256=source["sha256"]
    )
    fitted = {}
    for name in families or runs.families:
        family = fit_family(runs.points(name), settings)
        known = result["families"][name]
        counted = tuple(
            Counted(**{field.name: row.get(field.name) for field in fields(Counted)})
            for row in known.get("counted", ())
        )
        fitted[name] = replace(family, template=known.get("template"), counted=counted)
    found = whole(runs, settings, fitted, table)
    return replace(found, source=replace(found.source, points=hashed))


def families(path: Path) -> list[str]:
    """The names of the families of a fit. Raises UserError as `load`."""
    return list(_result(path)["families"])


def _result(path: Path) -> dict[str, Any]:
    """The contents of fit.json."""
    if path.is_file():
        raise UserError(f"{path}: is a file; give the folder that `prime-jax fit` wrote")
    if not (path / FIT).is_file():
        raise UserError(
            f"{path}: no fit.json there; make it with: prime-jax fit RUNS --out {shlex.quote(str(path))}"
        )
    result = read_json(path / FIT)
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{path / FIT}: schema {schema}, this version reads {SCHEMA}; run "
            "`prime-jax fit` on the runs again"
        )
    return result


def points_csv(data: Table, runs: Runs) -> str:
    """The runs in plain columns, one convention each; those left out keep status and reason.

    `points.select` makes the same `Runs` of it.
    """
    columns = ["family", "kind", *MEASURE, *NUMBERS, *(c for c in KEPT if c in data.columns)]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, [*columns, "status", "reason"], lineterminator="\n")
    writer.writeheader()
    used = {name: _numbers(part) for name, part in runs.families.items()}
    for row in data.rows:
        same = {name: text(row, name) for name in ("family", *MEASURE, *KEPT, "reason")}
        line = {name: value for name, value in same.items() if name in writer.fieldnames}
        line |= {"kind": text(row, runs.columns.kind), "status": status(row)}
        if line["status"] in ("", "done") and text(row, runs.columns.loss):
            line |= next(used[line["family"]])
        else:
            line |= _planned(row, runs)
        writer.writerow(line)
    return out.getvalue()


def unique_tokens(data: Table) -> dict[str, float]:
    """Of the training data: the most of any run, stated or tokens over epochs, by family."""
    found: dict[str, float] = {}
    for row in data.rows:
        unique = number(row, "unique_tokens")
        if math.isnan(unique):
            unique = number(row, "tokens") / (number(row, "epochs") or math.nan)
        if math.isfinite(unique):
            family = text(row, "family")
            found[family] = max(unique, found.get(family, 0.0))
    return found


def seeds(data: Table) -> frozenset[int]:
    """Of all runs, also those left out."""
    found = (number(row, "seed") for row in data.rows)
    return frozenset(int(seed) for seed in found if math.isfinite(seed))


def _numbers(part: Points) -> Any:
    """The numbers of each run in turn, as cells that read back to the same float."""
    arrays = [getattr(part, name).tolist() for name in NUMBERS]
    for values in zip(*arrays, strict=True):
        cells = ("" if value != value else repr(value) for value in values)
        yield dict(zip(NUMBERS, cells, strict=True))


def _planned(row: dict[str, Any], runs: Runs) -> dict[str, str]:
    """What is known of a run that left no loss."""
    columns = {name: getattr(runs.columns, name) for name in ("flops", "params", "tokens")}
    return {name: text(row, column) for name, column in columns.items()} | {
        "budget": text(row, "budget")
    }
