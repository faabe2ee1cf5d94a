"""What `prime-jax fit` leaves in DIR to be fitted again: points.csv and the method in fit.json.

`predict` and `design` need the bootstrap replicates, which are too many to store and cheap to
repeat: with the same runs, settings and seed they are the same numbers to the last bit.
"""

import csv
import dataclasses
import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_jax.config import from_dict, nearest
from prime_jax.errors import UserError
from prime_jax.runtime.records import read_json, write_json_atomic
from prime_jax.scaling import fit, points, record, table
from prime_jax.scaling.points import Points, Runs
from prime_jax.scaling.settings import Settings
from prime_jax.scaling.table import Choice, Table, number, text

POINTS = "points.csv"
MEASURE = ("given", "tokenizer", "eval_set")
NUMBERS = ("flops", "params", "tokens", "budget", "loss", "loss_se")
KEPT = ("run", "seed", "step", "lr", "batch_size", "epochs", "unique_tokens", "data")


@dataclass(frozen=True)
class Saved:
    """A fit read back: fit.json, and the runs and settings that it came from."""

    path: Path
    result: dict[str, Any]
    runs: Runs
    settings: Settings
    unique_tokens: dict[str, float]  # of the training data, where the runs say it
    seeds: frozenset[int]  # of all runs, also those left out

    def points(self, family: str) -> Points:
        """Raises UserError if there is no such family."""
        if family not in self.runs.families:
            raise UserError(
                f"{self.path}: no family {family!r}{nearest(family, self.runs.families)}"
            )
        return self.runs.families[family]

    def refit(self, family: str) -> fit.FamilyFit:
        return fit.fit_family(self.points(family), self.settings)


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
        same = {name: text(row, name) for name in ("family", *MEASURE, *KEPT, "status", "reason")}
        line = {name: value for name, value in same.items() if name in writer.fieldnames}
        line["kind"] = text(row, runs.columns.kind)
        if text(row, "status") in ("", "done") and text(row, runs.columns.loss):
            line |= next(used[line["family"]])
        else:
            line |= _planned(row, runs)
        writer.writerow(line)
    return out.getvalue()


def write(
    path: Path, result: dict[str, Any], data: Table, runs: Runs, templates: dict[str, Any]
) -> None:
    """Write points.csv, and fit.json with its hash and the settings that new runs would share.

    Raises:
        UserError: `path` cannot be written to.
    """
    text = points_csv(data, runs)
    result["source"]["points"] = hashlib.sha256(text.encode()).hexdigest()
    for name, family in result["families"].items():
        if name in templates:
            family["template"] = templates[name]
    try:
        (path / POINTS).write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"cannot write {path / POINTS}: {error.strerror}") from error
    write_json_atomic(path / "fit.json", result)


def read(path: Path) -> Saved:
    """Read a DIR of `prime-jax fit`.

    Raises:
        UserError: it is none, of another version, or its points are not those of its fit.
    """
    if not (path / "fit.json").is_file():
        raise UserError(f"{path}: no fit.json there; make it with: prime-jax fit RUNS --out {path}")
    result = read_json(path / "fit.json")
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != record.SCHEMA:
        raise UserError(
            f"{path / 'fit.json'}: schema {schema}, this version reads {record.SCHEMA}; run "
            "`prime-jax fit` on the runs again"
        )
    try:
        method, source, conventions = result["method"], result["source"], result["conventions"]
        settings = from_dict(Settings, method["settings"], f"{path / 'fit.json'}: settings")
        choice = Choice(allow_mixed_kinds=method["allow_mixed_kinds"])
        hashed = source["points"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path / 'fit.json'}: does not say how it was fitted ({error}); fit again"
        ) from error
    data = table.read_csv(path / POINTS)
    if data.sha256 != hashed:
        raise UserError(f"{path / POINTS}: not the runs of fit.json (it has changed); fit again")
    runs = points.select(data, choice)
    columns = dataclasses.replace(
        runs.columns,
        flops_convention=conventions["flops"],
        params_convention=conventions["params"],
    )
    choice = dataclasses.replace(choice, metric=result["metric"])
    runs = dataclasses.replace(
        runs, choice=choice, columns=columns, source=source["name"], sha256=source["sha256"]
    )
    return Saved(
        path=path,
        result=result,
        runs=runs,
        settings=settings,
        unique_tokens=_unique_tokens(data),
        seeds=_seeds(data),
    )


def _unique_tokens(data: Table) -> dict[str, float]:
    """The most of any run, stated or tokens over epochs, by family."""
    found: dict[str, float] = {}
    for row in data.rows:
        unique = number(row, "unique_tokens")
        if math.isnan(unique):
            unique = number(row, "tokens") / (number(row, "epochs") or math.nan)
        if math.isfinite(unique):
            family = text(row, "family")
            found[family] = max(unique, found.get(family, 0.0))
    return found


def _seeds(data: Table) -> frozenset[int]:
    seeds = (number(row, "seed") for row in data.rows)
    return frozenset(int(seed) for seed in seeds if math.isfinite(seed))


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
