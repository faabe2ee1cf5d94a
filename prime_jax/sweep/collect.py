"""ROOT -> runs.csv, the input of `fit`. Runs without a result have a row with their status."""

import csv
import io
from typing import Any

from prime_jax.runtime import outputs, storage
from prime_jax.runtime.records import best_valid, read_json
from prime_jax.runtime.storage import Path
from prime_jax.sweep import state
from prime_jax.sweep.state import Run
from prime_jax.sweep.status import status_of

# `loss` is best-valid, `loss_se` its Monte-Carlo part (all runs share the evaluation set, so
# `loss_se_data` does not enter differences), `flops` matmul, `params` nonembedding_plus_head;
# `trajectory` names runs whose steps are the same until one of them cools down.
COLUMNS = [
    "run",
    "family",
    "seed",
    "status",
    "kind",
    "loss",
    "loss_se",
    "flops",
    "params",
    "tokens",
    "budget",
    "epochs",
    "step",
    "lr",
    "batch_size",
    "layers",
    "width",
    "heads",
    "given",
    "reason",
    "rules",
    "trajectory",
    "loss_se_data",
    "flops_matmul",
    "flops_reference",
    "flops_network",
    "params_total",
    "params_nonembedding",
    "params_nonembedding_plus_head",
    "params_reference",
]
HASHES = ("data", "tokenizer", "eval_set")


def rows(root: Path) -> list[dict[str, Any]]:
    """One dict per run, all with the same keys in the order of the columns; "" where unknown.

    Besides `COLUMNS` there are `loss_e`, `se_e` and `kind_e` for every estimator e in any result,
    then the hashes of data, tokenizer and evaluation set.

    A run whose spec is damaged has a row that names the file.

    Raises:
        UserError: `root` is not a sweep of this version.
    """
    state.check_root(root)
    watch = state.Watch()
    runs = state.list_runs(root, watch)
    left_out = [
        {"run": run, "status": "damaged", "reason": why} for run, why in watch.left_out.items()
    ]
    seen = sorted({loss["estimator"] for run in runs for loss in _losses(run)})
    columns = [*COLUMNS, *(f"{what}_{e}" for e in seen for what in ("loss", "se", "kind")), *HASHES]
    return [dict.fromkeys(columns, "") | row for row in [*map(_row, runs), *left_out]]


def write(root: Path, out: Path) -> int:
    """Write `rows(root)` as CSV; returns the number of runs with a result.

    Raises:
        UserError: as `rows`, or `out` cannot be written, or is part of the sweep.
    """
    outputs.refuse_overwrite(outputs.of_sweep(root), [out])
    outputs.check_file(out)
    found = rows(root)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, found[0] if found else COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    outputs.write(out, text.getvalue())
    return sum(row["status"] in ("done", "diverged") for row in found)


def with_tasks(root: Path, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with acc_TASK and acc_se_TASK of each task in the newest eval.json of a run; the
    last evaluation of a task counts."""
    found = {}
    for row in listed:
        attempts = root / "runs" / str(row["run"])
        newest = sorted((name for name in storage.names(attempts) if name.isdigit()), key=int)
        files = [attempts / name / "eval.json" for name in reversed(newest)]
        file = next((file for file in files if storage.exists(file)), None)
        entries = read_json(file).get("tasks", []) if file else []
        results = {name: r for entry in entries for name, r in entry["results"].items()}
        cells = {
            f"{what}{name}": "" if value is None else value
            for name, measures in results.items()
            if "acc" in measures
            for what, value in zip(("acc_", "acc_se_"), measures["acc"], strict=True)
        }
        found[row["run"]] = cells
    columns = dict.fromkeys(column for cells in found.values() for column in cells)
    return [
        row | {column: found[row["run"]].get(column, "") for column in columns} for row in listed
    ]


def _row(run: Run) -> dict[str, Any]:
    row = _planned(run) | {"run": run.id, "status": status_of(run), "reason": run.reason}
    if run.result is None:
        heartbeat = run.attempts[-1].heartbeat if run.attempts else None
        return row | {"step": (heartbeat or {}).get("step", 0)}
    row |= {name: run.result.get("hashes", {}).get(name, "") for name in HASHES}
    row |= {"step": run.result.get("steps", ""), "epochs": run.result.get("epochs", "")}
    row |= {"reason": run.result.get("reason", "")}
    for loss in _losses(run):
        name = loss["estimator"]
        row |= {
            f"loss_{name}": loss["value"],
            f"se_{name}": loss.get("se_mc", ""),
            f"kind_{name}": loss["kind"],
        }
    best = best_valid(_losses(run))
    if best:
        row |= {"kind": best["kind"], "given": best.get("given", ""), "loss": best["value"]}
        row |= {
            name: best.get(key, "")
            for name, key in (("loss_se", "se_mc"), ("loss_se_data", "se_data"))
        }
    return row


def _planned(run: Run) -> dict[str, Any]:
    spec, config = run.spec, run.spec["config"]
    row = {name: spec[name] for name in ("family", "tokens", "budget")}
    row |= {name: config[name] for name in ("seed", "batch_size")}
    row |= {name: config["model"][name] for name in ("layers", "width", "heads")}
    row |= {f"flops_{name}": value for name, value in spec["flops"].items()}
    row |= {f"params_{name}": value for name, value in spec["params"].items()}
    row |= {"flops": spec["flops"]["matmul"], "params": spec["params"]["nonembedding_plus_head"]}
    row |= {"lr": config["optim"]["peak_lr"], "data": config["data"]["fingerprint"]}
    row |= {"rules": ";".join(f"{kind}={name}" for kind, name in spec["rules"].items())}
    row |= {"trajectory": spec.get("trajectory", "")}  # not there in older sweeps
    return row | {"epochs": "" if spec["epochs"] is None else spec["epochs"]}


def _losses(run: Run) -> list[dict[str, Any]]:
    return run.result["losses"] if run.result else []
