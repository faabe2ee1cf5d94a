"""Write rows to a sweep directory: every candidate is OK, or DROP with a reason.

Planning again only adds runs: specs are created exclusively, so existing runs do not change.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prime_jax import flops
from prime_jax.config import (
    EvalConfig,
    RunConfig,
    constant_steps,
    remark,
    run_id,
    trajectory_id,
    validate,
)
from prime_jax.data import codes, manifest
from prime_jax.errors import UserError
from prime_jax.runtime import storage
from prime_jax.runtime.records import read_json, write_json_atomic
from prime_jax.settings import set_path, to_dict
from prime_jax.sweep import grid, state
from prime_jax.sweep.grid import Experiment, Row

# The N that goes with each convention of C, as in `fit`.
PARAMS = {
    "matmul": "nonembedding_plus_head",
    "reference": "reference",
    "network": "nonembedding_plus_head",
}

WRITERS = 16  # concurrent writes: a bucket has a high latency
FAR = 2.0  # a stated budget off by more than this factor is flagged; fits do not believe it
OWN = ("state", "cache")  # folders that may exist before sweep.json


@dataclass(frozen=True)
class Candidate:
    """A row with its verdict.

    Attributes:
        row: the input.
        config: the run, None if the row is invalid.
        drop: why it will not run, empty if it will.
        epochs: passes over the training split, None while the data is not prepared.
        note: a remark about a run that is OK.
    """

    row: Row
    config: RunConfig | None
    drop: str = ""
    epochs: float | None = None
    note: str = ""

    @property
    def id(self) -> str:
        return run_id(self.config) if self.config else ""


def candidates(experiment: Experiment, datasets: Mapping[str, Any]) -> list[Candidate]:
    """Check every row.

    Args:
        experiment: the rows and the epochs limit.
        datasets: prepared manifests by `data.path`; other runs are checked without a manifest.
    """
    out, seen = [], set()
    for row in experiment.rows:
        candidate = _check(row, datasets, experiment.epochs_limit)
        if candidate.id in seen and not candidate.drop:
            candidate = replace(candidate, drop=f"duplicate: run {candidate.id} is listed above")
        if not candidate.drop:
            seen.add(candidate.id)
        out.append(candidate)
    return out


def load_datasets(experiment: Experiment, *, required: bool) -> dict[str, Any]:
    """The manifests that an experiment's rows name, by path.

    Raises:
        UserError: one is missing or damaged (only if `required`).
    """
    default = RunConfig().data.path
    runs = [row for row in experiment.rows if not row.problem]
    paths = {row.overrides.get("data.path", default) for row in runs}
    out = {}
    for path in sorted(paths):
        if required or (Path(path) / manifest.FILE).exists():
            out[path] = manifest.load(Path(path))
    return out


def write(
    root: storage.Path,
    experiment: Experiment,
    listed: Sequence[Candidate],
    slice: str = "",
    *,
    share_prefixes: bool = False,
) -> int:
    """Create or extend the sweep directory `root`, with runs for `slice` (empty: any machine).

    Args:
        share_prefixes: the new runs may continue from each other's checkpoints (prefixes.py).

    Returns:
        The number of new runs.

    Raises:
        UserError: nothing is OK, or `root` is not a sweep, another version, or not writable.
    """
    good = [candidate for candidate in listed if not candidate.drop]
    if not good:
        reason = f"; the first: {listed[0].drop}" if listed else ""
        raise UserError(f"{experiment.name}: no candidate can run{reason}")
    plans = _open(root)
    entry = {"experiment": experiment.name, "sha256": experiment.sha256}
    folder = root / "state"
    existing = set(storage.names(folder))
    new = [candidate for candidate in good if f"{candidate.id}.spec" not in existing]

    def add(candidate: Candidate) -> bool:
        what = spec(candidate, slice, share_prefixes=share_prefixes)
        return state.create(folder / f"{candidate.id}.spec", what)

    with ThreadPoolExecutor(WRITERS) as pool:
        added = sum(pool.map(add, new))
    if entry not in plans:
        write_json_atomic(root / "sweep.json", {"schema": state.SCHEMA, "plans": [*plans, entry]})
    return added


def spec(candidate: Candidate, slice: str = "", *, share_prefixes: bool = False) -> dict[str, Any]:
    """The content of `ROOT/state/<id>.spec`: the whole run and its expected FLOPs."""
    row, config = candidate.row, candidate.config
    # A worker may start in another directory.
    config = set_path(config, "data.path", str(Path(config.data.path).absolute()))
    if file := config.subtokens.codes_file:
        config = set_path(config, "subtokens.codes_file", str(Path(file).absolute()))
    constant = constant_steps(config)
    return {
        "schema": state.SCHEMA,
        "id": candidate.id,
        "slice": slice,
        "family": row.family,
        "budget": row.budget,
        "convention": row.flops,
        "tokens": config.tokens,
        "epochs": candidate.epochs,
        "flops": {name: flops.train_flops(config, name) for name in flops.CONVENTIONS},
        "params": flops.param_counts(config),
        "rules": dict(row.rules),
        "trajectory": trajectory_id(config) if constant else "",
        "branch_point": constant if share_prefixes else 0,
        "config": to_dict(config),
    }


def _check(row: Row, datasets: Mapping[str, Any], epochs_limit: float) -> Candidate:
    if row.problem:
        return Candidate(row, None, row.problem)
    try:
        config = grid.to_config(row)
        if row.steps < 1:
            return Candidate(row, None, _too_small(row, config))
        prepared = datasets.get(config.data.path)
        if prepared is not None:
            config = _with_fingerprint(config, prepared)
        validate(config)
        if config.initial_weights:
            raise UserError(
                "initial_weights: the runs of a sweep start from seeds; use prime-jax train --init-from"
            )
        if config.eval.estimators != EvalConfig().estimators:
            from prime_jax.evaluate import likelihood  # JAX, which most plans do without

            likelihood.estimators_of(config)
    except UserError as error:
        return Candidate(row, None, str(error))
    epochs, planned = None, config.data.unique_tokens > 0
    if prepared is not None:
        unique = config.data.unique_blocks * config.data.seq_len or prepared.train.tokens
        epochs = config.tokens / unique
    notes = []
    if epochs is not None and epochs > epochs_limit and not planned:
        notes.append(f"(repeats the data: {epochs:.1f} epochs, above {epochs_limit:g})")
    spent = flops.train_flops(config, row.flops)
    if not row.budget / FAR < spent < row.budget * FAR:
        notes.append(f"(trains for {spent:.3g} FLOPs, stated as {row.budget:.3g})")
    if said := remark(config):
        notes.append(f"({said})")
    return Candidate(row, config, "", epochs, " ".join(notes))


def _with_fingerprint(config: RunConfig, prepared: Any) -> RunConfig:
    if not config.data.fingerprint:
        config = set_path(config, "data.fingerprint", prepared.fingerprint)
    manifest.check(prepared, config)
    return codes.filled(config, prepared)


def _too_small(row: Row, config: RunConfig) -> str:
    one = flops.train_flops(replace(config, steps=1), row.flops)
    size = f"{row.batch_size} x {config.data.seq_len} tokens"
    return (
        f"too few steps: the budget is {row.budget / one:.2g} of one step ({size}, {one:.3g} FLOPs)"
    )


def _open(root: storage.Path) -> list[dict[str, Any]]:
    """Create the folders of a sweep if needed; the plans that it already has."""
    if not storage.exists(root / "sweep.json"):
        if any(name not in OWN for name in storage.names(root)):
            raise UserError(f"{root}: not empty and not a sweep; give a new directory")
        storage.make_folder(root / "state")
        write_json_atomic(root / "sweep.json", {"schema": state.SCHEMA, "plans": []})
    state.check_root(root)
    return read_json(root / "sweep.json")["plans"]
