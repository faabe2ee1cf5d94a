"""Runs to fit in the tests: a published table, and surfaces whose law is known."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prime_jax.scaling import readers, record
from prime_jax.scaling.fits import fit_runs
from prime_jax.scaling.laws import Compute, PowerLaw, optimum
from prime_jax.scaling.points import Measure, Points, select

ORACLE = json.loads((Path(__file__).parent / "oracles" / "mdm_prime_v2_isoflop.json").read_text())
LAW = PowerLaw(E=1.8, A=400.0, B=2000.0, alpha=0.34, beta=0.38)
BUDGETS = (1e18, 3e18, 1e19, 3e19)


def published(family):
    """Points of the published table."""
    budgets = ORACLE["families"][family]["budgets"]
    rows = [
        (float(budget), 1e6 * params, loss)
        for budget, runs in budgets.items()
        for params, loss in zip(runs["params_millions"], runs["loss"], strict=True)
    ]
    flops, params, loss = np.array(rows).T
    return points(family, flops, params, loss, ORACLE["families"][family]["kind"])


def points(family, flops, params, loss, kind="nelbo", compute=None):
    tokens = (compute or Compute()).tokens(flops, params)
    unknown = np.full(len(flops), np.nan)
    return Points(family, Measure(kind), flops, params, tokens, loss, unknown, flops)


def surface(law=LAW, budgets=BUDGETS, ratios=(0.25, 0.5, 1, 2, 4), noise=0.0, seed=0, compute=None):
    """IsoFLOP runs of a known law, at ratios of the true optimum of each budget."""
    compute = compute or Compute()
    flops = np.repeat(budgets, len(ratios))
    params = optimum(law, compute, flops).params * np.tile(ratios, len(budgets))
    loss = law.loss(params, compute.tokens(flops, params))
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    return points("known", flops, params, loss, compute=compute)


def csv_rows(part, **extra):
    """Rows of a CSV with the columns that everybody has."""
    return [
        {"family": part.family, "kind": part.measure.kind, "flops": c, "params": n, "tokens": d, "loss": loss} | extra
        for c, n, d, loss in zip(part.flops.tolist(), part.params.tolist(), part.tokens.tolist(), part.loss.tolist(), strict=True)
    ]  # fmt: skip


def shared(name):
    """Columns of a file of public points that is not part of the project; skips without it."""
    path = Path(__file__).parents[2] / "shared" / "data" / "scaling" / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this checkout (../shared/data/scaling)")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def chinchilla(drop=5):
    """Params, tokens and loss of the points of Hoffmann et al. that Epoch extracted."""
    column = {name: v.astype(float) for name, v in shared("chinchilla_epoch_points.csv").items()}
    kept = np.argsort(column["loss"], kind="stable")[: len(column["loss"]) - drop]
    params, flops, loss = (column[name][kept] for name in ("params", "flops", "loss"))
    return params, flops / (6 * params), loss


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of_a_sweep():
    """Two families in two conventions, with planned budgets, seeds, epochs, errors, lost runs."""
    rows = []
    for family, estimator in (("arm", "ar"), ("prime", "subtoken")):
        data = surface(noise=3e-3, seed=len(rows))
        for k, row in enumerate(csv_rows(data)):
            row |= {"family": family, "run": f"{family}{k}", "seed": k % 3, "status": "done"}
            row |= {"kind": "nelbo", "loss_se": 0.001 * k, "budget": 1.3 * row["flops"]}
            row |= {"unique_tokens": 1e10, "step": 10, "lr": 1e-3, "reason": ""}
            row |= {"flops_matmul": row.pop("flops"), "params_total": 1.1 * row["params"]}
            row |= {"tokenizer": "t", "eval_set": "e", "given": ""}
            row |= {f"loss_{e}": "" for e in ("ar", "subtoken")}
            row |= {f"loss_{estimator}": row["loss"]}
            rows.append(row)
    rows[3] |= {"status": "diverged", "reason": "loss is not finite", "loss": "", "loss_se": ""}
    rows[25] |= {"status": "failed", "reason": "gone, twice", "loss": "", "kind": ""}
    return rows


def write_fit(path, rows, settings, choice=None, templates=None):
    """What `prime-jax fit` leaves in `path`, without its figures; returns the fit."""
    path.mkdir()
    data = readers.read_csv(write_csv(path / "runs.csv", rows))
    fitted = fit_runs(select(data, choice), settings)
    families = {
        name: replace(family, template=(templates or {}).get(name))
        for name, family in fitted.families.items()
    }
    fitted = replace(fitted, families=families, table=data)
    record.write(fitted, path)
    return fitted
