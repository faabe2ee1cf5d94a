"""Tables of the report, from the contents of fit.json."""

import html
from collections.abc import Iterable
from typing import Any

from prime_jax.scaling import labels
from prime_jax.scaling.report_page import between, signed, table, within

PARAMETERS = ("E", "A", "B", "alpha", "beta")
SYMBOLS = {"alpha": "α", "beta": "β"}


def answer(families: dict[str, Any]) -> str:
    """The best model for the largest budget of each family."""
    rows = []
    for name, family in families.items():
        three, largest = family["approach3"], family["budgets"][-1]
        head = (
            f"<b>{html.escape(name)}</b><small>{html.escape(labels.kind(family['kind']))}</small>"
        )
        known = three["params"] and three["optima"][-1]
        if not known:
            rows.append((head, labels.flops(largest), *["refused"] * 5))
            continue
        ends, wider = known["intervals"], known["intervals_with_model"]
        rows.append(
            (
                head,
                labels.flops(largest),
                within(known["params"], ends["params"], labels.count),
                within(known["tokens"], ends["tokens"], labels.count),
                within(known["loss"], ends["loss"], labels.value),
                between(wider["loss"], labels.value) if wider else "not known",
                within(three["a"], three["intervals"]["a"], labels.value),
            )
        )
    head = ("family", "largest C", "N*", "D*", "loss", "loss, with model error", "exponent a")
    return table(head, rows)


def measured(record: dict[str, Any]) -> Iterable[str]:
    conventions = record["conventions"]
    yield table(
        ("family", "kind of loss", "runs", "budgets (FLOPs)", "FLOPs of a run"),
        (
            (
                html.escape(name),
                html.escape(labels.kind(family["kind"]))
                + (f", given {html.escape(family['given'])}" if family["given"] else ""),
                family["runs"],
                _budgets(family["budgets"]),
                f"{labels.value(family['compute']['k'], 3)} N{_power(family['compute']['q'])} D",
            )
            for name, family in record["families"].items()
        ),
    )
    yield (
        f"<p>N counts parameters by the convention <b>{html.escape(labels.convention(conventions['params']))}</b>, "
        f"C counts FLOPs by <b>{html.escape(labels.convention(conventions['flops']))}</b>; "
        "another convention gives other exponents. "
        f"The metric is <b>{html.escape(record['metric'])}</b>.</p>"
    )
    kinds = {kind for family in record["families"].values() for kind in family["kind"].split("+")}
    if kinds & {"nelbo", "nll"}:
        yield "<p>An NLL is exact; a NELBO is an upper bound on it: the model may be better than the number.</p>"
    if "train_loss" in kinds:
        yield (
            "<p>A training loss is neither: it can lie below the entropy of the text, "
            "is no perplexity, and is not comparable with an NLL or a NELBO.</p>"
        )


def _budgets(budgets: list[float]) -> str:
    shown = [labels.flops(budget) for budget in budgets]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:3], "…", *shown[-3:]])


def _power(q: float) -> str:
    return "" if q == 1 else f"<sup>{q:.3f}</sup>"


def laws(families: dict[str, Any]) -> str:
    """Parameters with bootstrap and profile intervals."""
    rows = []
    for name, family in families.items():
        three = family["approach3"]
        if three["params"] is None:
            rows.append((html.escape(name), "refused", *["–"] * 5))
            continue
        values = {**three["params"], "a": three["a"]}
        cells = [
            within(
                values[p],
                three["intervals"][p],
                labels.value,
                between(three["profile"][p], labels.value)
                + (", at a bound" if p in three["certificate"]["bounds"] else ""),
            )
            for p in (*PARAMETERS, "a")
        ]
        rows.append((html.escape(name), *cells))
    return table(("family", *(SYMBOLS.get(p, p) for p in PARAMETERS), "a"), rows)


def exponents(families: dict[str, Any]) -> str:
    """The exponent a by every approach, and where they contradict each other."""
    rows = []
    for name, family in families.items():
        two = family["approach2"]
        parts = (family["approach1"], two, two["debiased"] or {"a": None}, family["approach3"])
        disagree = [w for w in family["warnings"] if w["code"] == "approaches_disagree"]
        rows.append(
            (
                html.escape(name),
                *(_exponent(part) for part in parts),
                "<b>no</b>" if disagree else "yes",
            )
        )
    head = ("family", "approach 1", "approach 2", "de-biased", "approach 3", "agree")
    return table(head, rows)


def _exponent(part: dict[str, Any]) -> str:
    if part.get("a") is not None:
        return within(part["a"], part["intervals"]["a"], labels.value)
    codes = [warning["code"] for warning in part.get("warnings", ())]
    if codes == ["no_curves"]:
        return "no curves"
    return "refused" + "".join(f"<small>{code}</small>" for code in codes[-1:])


def optima(families: dict[str, Any]) -> str:
    """N*, D* and the loss at each budget, by approaches 3 and 2."""
    rows = []
    for name, family in families.items():
        two = family["approach2"]
        law = {row["flops"]: row for row in family["approach3"].get("optima", [])}
        curves = {row["flops"]: row for row in two["optima"]}
        shifts = {row["flops"]: row for row in (two["debiased"] or {"optima": []})["optima"]}
        if len(law) > len(curves) and not curves:
            law = {key: law[key] for key in _edges(sorted(law))}
        for budget in sorted({*law, *curves}):
            rows.append(
                (
                    html.escape(name),
                    labels.flops(budget),
                    *_law_cells(law.get(budget)),
                    *_valley_cells(curves.get(budget)),
                    _shift_cell(shifts.get(budget)),
                )
            )
    head = ("family", "C", "N*, approach 3", "D*", "loss", "N*, approach 2", "D*", "loss")
    return table((*head, "N*, de-biased"), rows)


def _edges(budgets: list[float]) -> list[float]:
    """Without IsoFLOP budgets every run may be one: the first, the middle and the last do."""
    return sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]})


def _law_cells(row: dict[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return "–", "–", "–"
    spread, wider = row["intervals"], row["intervals_with_model"]
    profile = row["profile"] and between(row["profile"]["params"], labels.count)
    return (
        within(row["params"], spread["params"], labels.count, profile or ""),
        within(row["tokens"], spread["tokens"], labels.count),
        within(
            row["loss"],
            spread["loss"],
            labels.value,
            between(wider["loss"], labels.value) if wider else "",
        ),
    )


def _valley_cells(row: dict[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return "no estimate", "–", "–"
    size, tokens = labels.count(row["params"]), labels.count(row["tokens"])
    loss = labels.value(row["loss"])
    if "censored" in row:
        below, above = "below ", "above "
        size_side, tokens_side = (below, above) if row["censored"] == "below" else (above, below)
        return f"{size_side}{size}<small>a bound</small>", tokens_side + tokens, f"at most {loss}"
    return within(row["params"], row["interval"], labels.count), tokens, loss


def _shift_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    shift = f"parabola {signed(row['shift'])}"
    return within(row["params"], row["interval"], labels.count, shift)


def envelopes(families: dict[str, Any]) -> str:
    """The winners of approach 1; empty without any."""
    rows = [
        (
            html.escape(name),
            html.escape(labels.kind(family["approach1"]["kind"])),
            labels.flops(row["flops"]),
            labels.count(row["params"]),
            labels.count(row["tokens"]),
            labels.value(row["loss"]),
        )
        for name, family in families.items()
        for row in family["approach1"]["optima"]
    ]
    head = ("family", "loss of the curves", "middle of the budgets it wins", "N*", "D*", "loss")
    return table(head, rows) if rows else ""


def rollouts(families: dict[str, Any]) -> str:
    """Errors of held-out budgets; empty where none was predicted."""
    rows = []
    for name, family in families.items():
        for step in (family["rollout"] or {"steps": []})["steps"]:
            for k, row in enumerate(step["budgets"]):
                three, two = row["approach3"], row["approach2"] or {}
                rows.append(
                    (
                        html.escape(name) if k == 0 else "",
                        labels.flops(step["fitted"][-1]) if k == 0 else "",
                        labels.flops(row["flops"]),
                        row["runs"],
                        signed(row["mean"], 2),
                        f"{row['rms']:.2%}",
                        signed(three["loss_error"]),
                        signed(three["params_error"]),
                        signed(two.get("loss_error")),
                        signed(two.get("params_error")),
                    )
                )
    head = ("family", "fitted up to C", "predicted C", "runs", "loss, mean", "rms", "L*, appr. 3")
    return table((*head, "N*", "L*, appr. 2", "N*"), rows) if rows else ""


def error_budget(families: dict[str, Any]) -> str:
    rows = []
    for name, family in families.items():
        part = family["error_budget"]
        model = part["model"]
        weights = part["weights"]
        rows.append(
            (
                html.escape(name),
                *(_source(part[key]) for key in ("seed", "tuning", "evaluation")),
                f"{part['scatter']:.2%}" if part["scatter"] is not None else "–",
                f"{signed(model['bias'], 2)}<small>{model['rms']:.2%} rms</small>"
                if model
                else "not known",
                f"{weights[0]:.2g} – {weights[1]:.2g}" if weights else "–",
            )
        )
    head = ("family", "seed", "tuning", "evaluation", "scatter about the law", "beyond the data")
    return table((*head, "weights of the runs"), rows)


def _source(source: dict[str, Any] | None) -> str:
    if source is None:
        return "not known"
    return f"{source['relative_sd']:.2%}<small>{html.escape(source['basis'])}</small>"


def certificates(families: dict[str, Any]) -> str:
    rows = []
    for name, family in families.items():
        three = family["approach3"]
        if three["params"] is None:
            continue
        certificate = three["certificate"]
        rows.append(
            (
                html.escape(name),
                "yes" if certificate["converged"] else "<b>no</b>",
                labels.value(three["objective"]),
                f"{certificate['gradient']:.1e}",
                f"{certificate['smallest_eigenvalue']:.1e}",
                f"{certificate['agreeing']:.0%} of {certificate['starts']}",
                ", ".join(SYMBOLS.get(p, p) for p in certificate["bounds"]) or "none",
            )
        )
    head = ("family", "converged", "objective", "scaled gradient", "least curvature")
    head = (*head, "starts that agree", "at a bound")
    return table(head, rows) if rows else "<p>Nothing was fitted by approach 3.</p>"


def excluded(runs: list[dict[str, str]]) -> str:
    if not runs:
        return "<p>None: every run is in the fit.</p>"
    keys = ("run", "family", "status", "reason")
    return table(keys, [tuple(html.escape(run[key]) for key in keys) for run in runs], long={3})


def provenance(record: dict[str, Any]) -> str:
    method, source, conventions = record["method"], record["source"], record["conventions"]
    delta = "" if method["delta"] is None else f", δ = {method['delta']:g}"
    approach2 = method["settings"]["approach2"]
    rows = [
        ("data", f"{html.escape(source['name'])}, SHA-256 <code>{source['sha256']}</code>"),
        ("metric", html.escape(record["metric"])),
        (
            "conventions",
            f"N {html.escape(labels.convention(conventions['params']))}, "
            f"FLOPs {html.escape(labels.convention(conventions['flops']))}",
        ),
        ("approach 3", f"objective: {html.escape(method['objective'])}{delta}"),
        ("approach 2", "parabola in log N" if approach2 == "parabola" else f"{approach2} in log N"),
        (
            "intervals",
            f"{method['level']:.0%}; approach 3: {method['bootstrap']} bootstrap replicates, runs "
            "redrawn within each budget (whole runs where checkpoints of one run enter); approach "
            f"2: {method['bootstrap']} draws from the errors of the parabolas",
        ),
        ("seed", f"{method['seed']}: the same data give the same numbers"),
        ("versions", html.escape(", ".join(f"{k} {v}" for k, v in record["versions"].items()))),
        ("files", "fit.json and points.csv beside this file; figures as SVG, PNG and PDF"),
    ]
    return table(("", ""), rows, long={1})
