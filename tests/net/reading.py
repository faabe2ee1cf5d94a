"""From what the product writes to flat names of our own: all that test_net.py knows of its schemas.

When a key of some JSON changes, its function here follows, and `numbers.json` stays.
"""

import hashlib
import json
import re
from pathlib import Path

LAW = ("E", "A", "B", "alpha", "beta")
BEST = ("params", "tokens", "loss")


def _read(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def _ends(name: str, ends: list | None) -> dict:
    low, high = ends or (None, None)
    return {f"{name}.low": low, f"{name}.high": high}


def training(run_dir: Path) -> dict:
    """Losses and gradient norms by step, the final evaluation, and the run's name."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = {row["step"]: row for row in map(json.loads, lines) if "loss" in row}
    found = {name: [steps[k][name] for k in sorted(steps)] for name in ("loss", "grad_norm")}
    result = _read(run_dir / "result.json")
    return {"run": result["run"], **found, **_losses(result["losses"])}


def _losses(losses: list[dict]) -> dict:
    found = {}
    for loss in losses:
        name = loss["estimator"]
        found |= {f"{name}.kind": loss["kind"], f"{name}.value": loss["value"]}
        found |= {f"{name}.se_mc": loss["se_mc"], f"{name}.se_data": loss["se_data"]}
    return found


def evaluation(path: Path) -> dict:
    (found,) = _read(path)["sets"]
    return _losses(found["losses"])


def plan(said: str) -> dict:
    """How many runs, their FLOPs, and their names, of a printed plan."""
    ids = re.findall(r"^\s*([0-9a-f]{10}) ", said, re.MULTILINE)
    words = " ".join(said.split())
    good, dropped, flops = re.search(r"(\d+) OK, (\d+) DROP, (\S+) FLOPs", words).groups()
    names = hashlib.sha256(" ".join(ids).encode()).hexdigest()[:16]
    return {
        "runs": int(good),
        "dropped": int(dropped),
        "flops": flops,
        "first": ids[:3],
        "listed": len(ids),
        "all ids": names,
    }


def fit(path: Path) -> dict:
    """The numbers of fit.json."""
    result, found = _read(path), {}
    for name, family in result["families"].items():
        found |= {f"{name}.{k}": v for k, v in _family(family).items()}
    found["comparable"] = [list(group) for group in result["comparable"]]
    found["left out"] = sorted(f"{x['run']} {x['status']}" for x in result["excluded"])
    return found


def _family(family: dict) -> dict:
    found = {"kind": family["kind"], "runs": family["runs"], "budgets": family["budgets"]}
    found |= {f"compute.{name}": family["compute"][name] for name in ("k", "q")}
    found |= _law(family["approach3"])
    two, one = family["approach2"], family["approach1"]
    found |= {"a2": two["a"], **_ends("a2", two["intervals"]["a"])}
    for k, best in enumerate(two["optima"]):
        found |= {f"a2.optimum{k}.{name}": best[name] for name in BEST}
        found |= _ends(f"a2.optimum{k}.params", best["interval"])
        found |= {f"a2.optimum{k}.censored": best.get("censored")}
    if bare := two["debiased"]:
        found |= {"a2.debiased": bare["a"], **_ends("a2.debiased", bare["intervals"]["a"])}
        for k, best in enumerate(bare["optima"]):
            found |= {f"a2.debiased.optimum{k}.{name}": best[name] for name in (*BEST, "shift")}
    found |= {"a1": one["a"], "a1.b": one["b"], **_ends("a1", one["intervals"]["a"])}
    for k, best in enumerate(one["optima"]):
        found |= {f"a1.optimum{k}.{name}": best[name] for name in BEST}
    errors = family["error_budget"]
    found |= {
        "seed sd": errors["seed"]["relative_sd"],
        "scatter": errors["scatter"],
        "weights": errors["weights"],
    }
    if family["rollout"]:
        found |= {f"rollout.{k}": v for k, v in _rollout(family["rollout"]).items()}
    found["warnings"] = sorted({one["code"] for one in family["warnings"]})
    found["refusals"] = sorted({one["code"] for one in family["warnings"] if one["refusal"]})
    return found


def _law(part: dict) -> dict:
    if part["params"] is None:
        return {"law": None}
    found = {"a3": part["a"], "objective": part["objective"]}
    for name in (*LAW, "a"):
        label = "a3" if name == "a" else f"law.{name}"
        found |= {} if name == "a" else {label: part["params"][name]}
        found |= _ends(label, part["intervals"][name])
        found |= _ends(f"{label}.profile", part["profile"][name])
    for name in ("converged", "smallest_eigenvalue", "starts", "agreeing", "bounds"):
        found[f"certificate.{name}"] = part["certificate"][name]
    for k, best in enumerate(part["optima"]):
        for name in BEST:
            found[f"a3.optimum{k}.{name}"] = best[name]
            found |= _ends(f"a3.optimum{k}.{name}", best["intervals"][name])
        wider = best["intervals_with_model"]
        found |= _ends(f"a3.optimum{k}.loss with model", wider and wider["loss"])
        found |= _ends(f"a3.optimum{k}.params.profile", (best["profile"] or {}).get("params"))
    return found


def _rollout(part: dict) -> dict:
    found = {name: part[name] for name in ("bias", "rms", "inside", "per_decade")}
    for i, step in enumerate(part["steps"]):
        found |= {f"step{i}.fitted": step["fitted"]}
        found |= {f"step{i}.{name}": step[name] for name in ("runs", "mean", "rms")}
        for k, row in enumerate(step["budgets"]):
            for label in ("approach3", "approach2"):
                errors = row[label] or {}
                found |= {
                    f"step{i}.budget{k}.{label}.{name}": errors.get(name)
                    for name in ("params", "loss", "params_error", "loss_error")
                }
    return found


def validate(path: Path) -> dict:
    found = {}
    for name, family in _read(path)["families"].items():
        found |= {f"{name}.{k}": v for k, v in _rollout(family).items()}
        found[f"{name}.warnings"] = sorted({one["code"] for one in family["warnings"]})
        for k, row in enumerate(family["runs"]):
            found[f"{name}.errors{k}"] = row["errors"]
    return found


def compare(path: Path) -> dict:
    result = _read(path)
    found = {"baseline": result["baseline"]["family"]}
    for name, family in result["families"].items():
        found |= {f"{name}.{k}": v for k, v in _pair(family).items()}
    return found


def _pair(pair: dict) -> dict:
    found = {}
    for side, label in (("at_family", "by it"), ("at_baseline", "by baseline")):
        for k, row in enumerate(pair["multiplier"][side]["budgets"]):
            where = f"multiplier {label}.budget{k}"
            found |= {where: row["value"], **_ends(where, row["interval"])}
            found |= {f"{where}.median": row["median"], f"{where}.in range": row["in_range"]}
            between = row["interpolated"] or {"value": None, "interval": None}
            found |= {f"{where}.between optima": between["value"]}
            found |= _ends(f"{where}.between optima", between["interval"])
        curve = pair["multiplier"][side]["curve"]
        found[f"multiplier {label}.curve"] = curve["value"][::10]
    found["lower"] = [row["probability"] for row in pair["lower"]]
    for label, difference in pair["exponents"].items():
        found[f"difference.{label}"] = difference and difference["difference"]
        found |= _ends(f"difference.{label}", difference and difference["interval"])
    for label, test in pair["tests"].items():
        found |= {f"test.{label}.p": test["p"], f"test.{label}.statistic": test["statistic"]}
        for side, law in test["params"].items():
            found |= {f"test.{label}.{side}.{name}": law[name] for name in LAW}
    found["warnings"] = sorted({one["code"] for one in pair["warnings"]})
    return found


def predictions(said: str) -> dict:
    found = {}
    for one in json.loads(said)["predictions"]:
        name = one["family"]
        parts = {"approach3": one["approach3"], "approach2": one["debiased"] or one["approach2"]}
        for approach, part in parts.items():
            for quantity, value in (part or {}).items():
                label = f"{name}.{approach}.{quantity}"
                found |= {label: value and value["value"]}
                found |= _ends(label, value and value["interval"])
        found |= {f"{name}.{key}": one[key] for key in ("in_range", "decades", "epochs")}
        keys = ("layers", "width", "heads", "params", "batch_size", "steps", "peak_lr", "loss")
        found |= {f"{name}.launch.{key}": one["launch"][key] for key in keys}
        found[f"{name}.warnings"] = sorted({finding["code"] for finding in one["findings"]})
    return found


def status(said: str) -> dict:
    keys = ("family", "seed", "budget", "status", "attempts", "failures", "steps", "reason")
    return {f"{one['run']}.{key}": one[key] for one in json.loads(said) for key in keys}


def table(rows: list[dict[str, str]]) -> dict:
    """A collected table; numbers as such."""
    words = ("family", "status", "kind", "reason", "data", "tokenizer", "eval_set")
    numbers = ("seed", "loss", "loss_se", "loss_se_data", "flops", "params", "tokens", "budget")
    numbers += ("epochs", "step", "lr", "batch_size", "layers", "width", "heads")
    numbers += ("flops_reference", "params_total", "params_nonembedding", "params_reference")
    found = {}
    for row in rows:
        found |= {f"{row['run']}.{name}": row[name] for name in words}
        found |= {
            f"{row['run']}.{name}": float(row[name]) if row[name] else None for name in numbers
        }
    return found
