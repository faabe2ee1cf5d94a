"""Tables of a fit, a comparison and a validation, from the contents of their JSON files.

A `Table` is plain: the command line draws it with rich, the report as HTML, `summary()` as text.
"""

import math
from collections.abc import Callable
from typing import Any

from prime_jax.scaling import labels
from prime_jax.scaling.labels import Ends
from prime_jax.table import Cell, Table

Record = dict[str, Any]
Show = Callable[[float, int], str]

PARAMETERS = ("E", "A", "B", "alpha", "beta")  # of families that are all refused
UNSAID = ("A", "B")  # not in the summary: alone they mean nothing
SYMBOLS = {"alpha": "α", "beta": "β"}
MAX_ROWS = 40  # of a printed rollout; validate.json has all
VERDICTS = {True: "differ significantly", False: "do not differ significantly"}
QUESTIONS = {"exponents": "one α and one β for both?", "E": "one E for both?"}
DIGITS = {labels.value: 4, labels.count: 3}  # outside the summary
UNIT = "nats / token"  # of a loss whose kind is stated


def summary(record: Record) -> Table:
    """The fit in short: a column for each family."""
    families = record["families"]
    columns = [_summary(family) for family in families.values()]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return Table(("", *families), rows)


def _summary(family: Record) -> dict[str, str]:
    three, two, one = (family[f"approach{k}"] for k in (3, 2, 1))
    out = {"kind of loss": labels.kind(family["kind"]), "runs": str(family["runs"])}
    known = three["params"] is not None
    for name in (p for p in three["params"] or PARAMETERS if p not in UNSAID):
        found = known and _short(three["params"][name], three["intervals"][name], labels.value)
        out[name] = found or "refused"
    for name, part in (
        ("a, approach 3", three),
        ("a, approach 2", two),
        ("  de-biased", two["debiased"] or {"a": None}),
        ("a, approach 1", one),
    ):
        refused = part["a"] is None
        out[name] = (
            "refused" if refused else _short(part["a"], part["intervals"]["a"], labels.value)
        )
    if [w["code"] for w in one["warnings"][:1]] == ["no_curves"]:
        out["a, approach 1"] = "no curves"
    out["largest C"] = labels.flops(family["budgets"][-1])
    for quantity, name, show in (
        ("params", "N* there", labels.count),
        ("tokens", "D* there", labels.count),
        ("loss", "loss there", labels.value),
    ):
        best = three["optima"][-1] if known else None
        out[name] = _short(best[quantity], best["intervals"][quantity], show) if best else "refused"
    held_out = family["rollout"] and family["rollout"]["steps"]
    out["held-out loss error"] = (
        "{bias:+.1%} on average, {rms:.1%} rms".format(**family["rollout"])
        if held_out
        else "not known"
    )
    out["warnings"] = str(len(family["warnings"]))
    return out


def _short(value: float, ends: Ends, show: Show) -> str:
    return "{} ({})".format(*labels.estimate(value, ends, show))


def answer(families: Record) -> Table:
    """The best model for the largest budget of each family."""
    rows = []
    for name, family in families.items():
        three, largest = family["approach3"], family["budgets"][-1]
        head = Cell(name, (labels.kind(family["kind"]),), style="notable")
        if three["params"] is None:
            rows.append((head, labels.flops(largest), *["refused"] * 5))
            continue
        best = three["optima"][-1]
        ends, wider = best["intervals"], best["intervals_with_model"]
        rows.append(
            (
                head,
                labels.flops(largest),
                within(best["params"], ends["params"], labels.count),
                within(best["tokens"], ends["tokens"], labels.count),
                within(best["loss"], ends["loss"], labels.value),
                between(best["loss"], wider["loss"], labels.value) if wider else "not known",
                within(three["a"], three["intervals"]["a"], labels.value),
            )
        )
    head = ("family", "largest C", "N*", "D*", "loss", "loss, with model error", "exponent a")
    return Table(head, rows)


def measured(record: Record) -> Table:
    """What was read, and in which conventions."""
    rows = []
    for name, family in record["families"].items():
        given = f", given {family['given']}" if family["given"] else ""
        kind, compute = labels.kind(family["kind"]) + given, family["compute"]
        power = "N" if compute["q"] == 1 else f"N^{compute['q']:.3f}"
        cost = f"{labels.value(compute['k'], 3)} {power} D"
        rows.append((name, kind, family["runs"], _budgets(family["budgets"]), cost))
    conventions = record["conventions"]
    notes = [
        f"N counts parameters by the convention {labels.convention(conventions['params'])}, "
        f"C counts FLOPs by {labels.convention(conventions['flops'])}; "
        f"another convention gives other exponents. The metric is {record['metric']}."
    ]
    kinds = {kind for family in record["families"].values() for kind in family["kind"].split("+")}
    if kinds & {"nelbo", "nll"}:
        notes.append(
            "An NLL is exact; a NELBO is an upper bound on it: the model may be better than the number."
        )
    if "train_loss" in kinds:
        notes.append(
            "A training loss is neither: it can lie below the entropy of the text, "
            "is no perplexity, and is not comparable with an NLL or a NELBO."
        )
    head = ("family", "kind of loss", "runs", "budgets (FLOPs)", "FLOPs of a run")
    return Table(head, rows, notes=tuple(notes))


def _budgets(budgets: list[float]) -> str:
    shown = [labels.flops(budget) for budget in budgets]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:3], "…", *shown[-3:]])


def laws(families: Record) -> Table:
    """Parameters with bootstrap and profile intervals."""
    found = [family["approach3"]["params"] for family in families.values()]
    names = next((tuple(params) for params in found if params), PARAMETERS)
    rows = []
    for name, family in families.items():
        three = family["approach3"]
        if three["params"] is None:
            rows.append((name, "refused", *["–"] * len(names)))
            continue
        values = {**three["params"], "a": three["a"]}
        bounds, cells = three["certificate"]["bounds"], []
        for p, value in values.items():
            profile = between(value, three["profile"][p], labels.value)
            extra = profile + (", at a bound" if p in bounds else "")
            cells.append(within(value, three["intervals"][p], labels.value, extra))
        rows.append((name, *cells))
    return Table(("family", *(SYMBOLS.get(p, p) for p in names), "a"), rows)


def exponents(families: Record) -> Table:
    """The exponent a by every approach, and where they contradict each other."""
    rows = []
    for name, family in families.items():
        two = family["approach2"]
        parts = (family["approach1"], two, two["debiased"] or {"a": None}, family["approach3"])
        disagree = any(w["code"] == "approaches_disagree" for w in family["warnings"])
        agree = Cell("no", style="notable") if disagree else "yes"
        rows.append((name, *(_exponent(part) for part in parts), agree))
    head = ("family", "approach 1", "approach 2", "de-biased", "approach 3", "agree")
    return Table(head, rows)


def _exponent(part: Record) -> Cell:
    if part.get("a") is not None:
        return within(part["a"], part["intervals"]["a"], labels.value)
    codes = [warning["code"] for warning in part.get("warnings", ())]
    return Cell("no curves") if codes == ["no_curves"] else Cell("refused", tuple(codes[-1:]))


def optima(families: Record) -> Table:
    """N*, D* and the loss at each budget, by approaches 3 and 2."""
    rows = []
    for name, family in families.items():
        two = family["approach2"]
        law = {row["flops"]: row for row in family["approach3"]["optima"]}
        curves = {row["flops"]: row for row in two["optima"]}
        shifts = {row["flops"]: row for row in (two["debiased"] or {"optima": []})["optima"]}
        if law and not curves:
            law = {key: law[key] for key in _edges(sorted(law))}
        for budget in sorted({*law, *curves}):
            cells = (*_law_cells(law.get(budget)), *_curve_cells(curves.get(budget)))
            rows.append((name, labels.flops(budget), *cells, _shift_cell(shifts.get(budget))))
    head = ("family", "C", "N*, approach 3", "D*", "loss", "N*, approach 2", "D*", "loss")
    return Table((*head, "N*, de-biased"), rows)


def _edges(budgets: list[float]) -> list[float]:
    """Without IsoFLOP budgets every run may be one: the first, the middle and the last do."""
    return sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]})


def _law_cells(row: Record | None) -> tuple[Any, Any, Any]:
    if row is None:
        return "–", "–", "–"
    spread, wider = row["intervals"], row["intervals_with_model"]
    profile = ""
    if row["profile"]:
        profile = between(row["params"], row["profile"]["params"], labels.count)
    return (
        within(row["params"], spread["params"], labels.count, profile),
        within(row["tokens"], spread["tokens"], labels.count),
        within(
            row["loss"],
            spread["loss"],
            labels.value,
            between(row["loss"], wider["loss"], labels.value) if wider else "",
        ),
    )


def _curve_cells(row: Record | None) -> tuple[Any, Any, Any]:
    if row is None:
        return "no estimate", "–", "–"
    size, tokens = labels.count(row["params"]), labels.count(row["tokens"])
    loss = labels.value(row["loss"])
    if row["censored"]:
        sides = ("below ", "above ")
        size_side, tokens_side = sides if row["censored"] == "below" else sides[::-1]
        return Cell(f"{size_side}{size}", ("a bound",)), tokens_side + tokens, f"at most {loss}"
    return within(row["params"], row["interval"], labels.count), tokens, loss


def _shift_cell(row: Record | None) -> Cell | str:
    if row is None:
        return "–"
    shift = f"parabola {signed(row['shift'])}"
    return within(row["params"], row["interval"], labels.count, shift)


def envelopes(families: Record) -> Table:
    """The winners of approach 1."""
    rows = [
        (
            name,
            labels.kind(family["approach1"]["kind"]),
            labels.flops(row["flops"]),
            labels.count(row["params"]),
            labels.count(row["tokens"]),
            labels.value(row["loss"]),
        )
        for name, family in families.items()
        for row in family["approach1"]["optima"]
    ]
    head = ("family", "loss of the curves", "middle of the budgets it wins", "N*", "D*", "loss")
    return Table(head, rows)


def repetition(record: Record) -> Table:
    """R_D of every two families."""
    count = record["method"]["bootstrap"]
    rows = [
        (
            f"{row['family']} / {row['other']}",
            within(row["ratio"], row["interval"], labels.value),
            labels.fraction(row["higher"], count),
            VERDICTS[row["significant"]],
        )
        for row in record.get("repetition", ())
    ]
    return Table(("R_D of", "ratio", "P above 1", ""), rows)


def conventions(families: Record) -> Table:
    """Exponents and D*/N* under every count of N and C, and where D*/N* varies least."""
    rows, notes = [], []
    for name, family in families.items():
        counted = family.get("counted", ())
        known = [row for row in counted if row["growth"] is not None]
        least = min(known, key=lambda row: abs(row["growth"]), default=None)
        for row in counted:
            head = name, labels.convention(row["params"]), labels.convention(row["flops"])
            two = "refused" if row["approach2"] is None else labels.value(row["approach2"], 3)
            if row["growth"] is None:
                rows.append((*head, "refused", two, *["–"] * 3))
                continue
            low, high = (labels.value(ratio, 3) for ratio in row["ratio"])
            a, growth = within(row["a"], row["profile"], labels.value), f"{row['growth']:+.3f}"
            last = Cell(growth, ("varies least",), style="notable") if row is least else growth
            rows.append((*head, a, two, low, high, last))
        if least:
            factor = labels.value(max(least["ratio"]) / min(least["ratio"]), 3)
            notes.append(
                f"D*/N* of {name} varies least with N {labels.convention(least['params'])} and "
                f"FLOPs {labels.convention(least['flops'])}: by a factor of {factor} over its budgets."
            )
    head = ("family", "N", "FLOPs", "a, approach 3", "a, approach 2", "D*/N*, smallest C")
    return Table((*head, "largest C", "D*/N* ∝ C to the"), rows, tuple(notes))


def frontiers(found: dict[str, Record | None]) -> Table:
    """L(C) = L_inf + A / C**a of each family, free and pinned."""
    rows = []
    for name, frontier in found.items():
        for which, part in _frontier_fits(frontier):
            if part["params"] is None:
                code = part["warnings"][0]["code"]
                rows.append((name, which, Cell("refused", (code,)), *["–"] * 5))
                continue
            cells = [
                within(value, part["profile"][p], labels.value)
                if p in part["profile"]
                else Cell(labels.value(value), ("pinned",))
                for p, value in part["params"].items()
            ]
            error, certificate = part["error"], part["certificate"]
            held_out = f"{error['bias']:+.2%}, {error['rms']:.2%} rms" if error else "not known"
            converged = "yes" if certificate["converged"] else Cell("no", style="notable")
            agree = f"{certificate['agreeing']:.0%} of {certificate['starts']}"
            rows.append((name, which, *cells, held_out, converged, agree))
    head = ("family", "L∞", "value of L∞", "A", "a", "held-out budgets", "converged")
    return Table((*head, "starts that agree"), rows)


def frontier_losses(found: dict[str, Record | None]) -> Table:
    """What the frontiers say of budgets that were asked for."""
    rows = []
    for name, frontier in found.items():
        for which, part in _frontier_fits(frontier):
            for row in part["predictions"]:
                wider = row["with_model_error"]
                shown = between(row["loss"], wider, labels.value) if wider else "not known"
                loss = within(row["loss"], row["interval"], labels.value)
                rows.append((name, which, labels.flops(row["flops"]), _where(row), loss, shown))
    return Table(("family", "L∞", "C", "of the data", "loss", "with model error"), rows)


def _where(row: Record) -> str:
    """Where a budget lies."""
    side = "beyond" if row["decades"] > 0 else "below"
    return f"{abs(row['decades']):.2g} decades {side}" if row["decades"] else "within"


def frontier_notes(found: dict[str, Record | None]) -> list[str]:
    """A line for each warning."""
    families = {
        f"{name}, {which}": {"warnings": part["warnings"]}
        for name, frontier in found.items()
        for which, part in _frontier_fits(frontier)
    }
    return warnings_of({"families": families})


def _frontier_fits(frontier: Record | None) -> list[tuple[str, Record]]:
    parts = {which: (frontier or {}).get(which) for which in ("free", "pinned")}
    return [(which, part) for which, part in parts.items() if part]


def rates(record: Record) -> Table:
    """lr* = k N^n D^d B^b of each family."""
    rows = []
    for name, family in record["families"].items():
        inside = sum(cell["censored"] is None for cell in family["cells"])
        shown = f"{inside} of {len(family['cells'])}"
        if family["params"] is None:
            rows.append((name, "refused", *["–"] * 3, shown, "–", "–"))
            continue
        cells = [
            within(value, family["profile"][p], labels.value) if p in family["profile"] else "–"
            for p, value in family["params"].items()
        ]
        error, good = family["error"], family["certificate"]["converged"]
        factor = "not known" if error is None else f"a factor of {math.exp(error):.2f}, rms"
        converged = "yes" if good else Cell("no", style="notable")
        rows.append((name, *cells, shown, factor, converged))
    head = ("family", "k", "n (of N)", "d (of D)", "b (of B)", "cells", "held-out cells")
    return Table((*head, "converged"), rows)


def rate_cells(record: Record) -> Table:
    """The best rate of each cell, beside those of the law and of the plan's rule."""
    rows = []
    for name, family in record["families"].items():
        for cell in family["cells"]:
            side = {"above": "above ", "below": "below ", None: ""}[cell["censored"]]
            error = "" if cell["sd"] is None else f"± {cell['sd']:.0%}"
            rows.append(
                (
                    name,
                    labels.flops(cell["flops"]),
                    labels.count(cell["params"]),
                    labels.count(cell["tokens"]),
                    "–" if cell["batch"] is None else f"{cell['batch']:g}",
                    "{:.2g}–{:.2g}".format(*cell["rates"]),
                    Cell(f"{side}{cell['best']:.3g}", (error,) if error else ()),
                    "–" if cell["law"] is None else f"{cell['law']:.3g}",
                    "–" if cell["rule"] is None else f"{cell['rule']:.3g}",
                    f"{cell['curvature']:.3g}",
                )
            )
    head = ("family", "C", "N", "D", "B", "rates", "best rate", "law", "rule")
    return Table((*head, f"{UNIT} per (d log lr)²"), rows)


def tasks(record: Record) -> Table:
    """Both laws of each task: parameters, and the errors of held-out runs."""
    rows = []
    for name, family in record["families"].items():
        for task, part in family["tasks"].items():
            head = name, task, f"{part['chance']:.3g}–{part['ceiling']:.3g}", part["above_chance"]
            if part["direct"] is None:
                rows.append((*head, Cell("refused", (part["warnings"][0]["code"],)), *["–"] * 5))
                continue
            direct = _link(part["direct"], "alpha")
            sigmoid = part["sigmoid"]
            two = (_link(sigmoid, "k"), _link(sigmoid, "L0")) if sigmoid else ("refused", "–")
            errors = [
                "not known" if part[key] is None else f"{100 * part[key]:.2g} points rms"
                for key in ("direct_rms", "two_steps_rms")
            ]
            rows.append((*head, direct, *two, part["loss"], *errors))
    head = ("family", "task", "chance–ceiling", "budgets above", "α, directly", "k, two steps")
    return Table((*head, "L0", "loss", "held out, directly", "in two steps"), rows)


def _link(step: Record, name: str) -> Cell:
    return within(step["params"][name], step["profile"][name], labels.value)


def task_predictions(record: Record) -> Table:
    """Accuracies at the budgets that were asked for."""
    rows = []
    for name, family in record["families"].items():
        for task, part in family["tasks"].items():
            for row in part["predictions"]:
                two = "refused"
                if row["two_steps"] is not None:
                    two = within(row["two_steps"], row["two_steps_interval"], labels.value)
                direct = within(row["direct"], row["direct_interval"], labels.value)
                rows.append((name, task, labels.flops(row["flops"]), _where(row), direct, two))
    return Table(("family", "task", "C", "of the data", "directly", "in two steps"), rows)


def task_notes(record: Record) -> list[str]:
    """A line for each warning."""
    families = {
        f"{name}, {task}": part
        for name, family in record["families"].items()
        for task, part in family["tasks"].items()
    }
    return warnings_of({"families": families})


def rollouts(rollouts: dict[str, Record | None]) -> Table:
    """Errors of held-out budgets: predicted over measured, less 1."""
    rows = []
    for name, rollout in rollouts.items():
        for step in (rollout or {"steps": []})["steps"]:
            for k, row in enumerate(step["budgets"]):
                three, two = row["approach3"], row["approach2"] or {}
                rows.append(
                    (
                        name if k == 0 else "",
                        labels.flops(step["fitted"][-1]) if k == 0 else "",
                        labels.flops(row["flops"]),
                        f"{row['decades']:.2f}",
                        row["runs"],
                        signed(row["mean"], 2),
                        f"{row['rms']:.2%}",
                        signed(three["loss_error"]),
                        signed(three["params_error"]),
                        signed(two.get("loss_error")),
                        signed(two.get("params_error")),
                    )
                )
    head = ("family", "fitted to C", "predicted C", "decades", "runs", "loss, mean", "rms")
    return Table((*head, "L*, appr. 3", "N*", "L*, appr. 2", "N*"), rows)


def validation(name: str, family: Record) -> Table:
    """A rollout as it is printed: its steps, or its distances where they are too many."""
    title = (
        f"{name}: held-out loss {family['bias']:+.1%} on average, {family['rms']:.1%} rms, "
        f"{family['per_decade']:.1%} for each decade of extrapolation"
    )
    steps = rollouts({name: family})
    if len(steps.rows) <= MAX_ROWS:
        return Table(steps.head[1:], [row[1:] for row in steps.rows], title=title)
    rows = []
    for row in family["by_distance"]:
        end = f" to {row['to']:g}" if row["to"] else " and more"
        cells = (row["runs"], f"{row['mean']:+.2%}", f"{row['rms']:.2%}")
        rows.append((f"{row['from']:g}{end}", *cells))
    return Table(
        ("decades beyond the fitted budgets", "runs", "loss, mean", "rms"), rows, title=title
    )


def error_budget(families: Record) -> Table:
    rows = []
    for name, family in families.items():
        part = family["error_budget"]
        model, weights = part["model"], part["weights"]
        beyond = model and Cell(signed(model["bias"], 2), (f"{model['rms']:.2%} rms",))
        rows.append(
            (
                name,
                *(_source(part[key]) for key in ("seed", "tuning", "evaluation")),
                "–" if part["scatter"] is None else f"{part['scatter']:.2%}",
                beyond or "not known",
                f"{weights[0]:.2g} – {weights[1]:.2g}" if weights else "–",
            )
        )
    head = ("family", "seed", "tuning", "evaluation", "scatter about the law", "beyond the data")
    return Table((*head, "weights of the runs"), rows)


def _source(source: Record | None) -> Cell:
    if source is None:
        return Cell("not known")
    return Cell(f"{source['relative_sd']:.2%}", (source["basis"],))


def certificates(families: Record) -> Table:
    rows = []
    for name, family in families.items():
        three = family["approach3"]
        if three["params"] is None:
            continue
        found = three["certificate"]
        rows.append(
            (
                name,
                "yes" if found["converged"] else Cell("no", style="notable"),
                labels.value(three["objective"]),
                f"{found['gradient']:.1e}",
                f"{found['smallest_eigenvalue']:.1e}",
                f"{found['agreeing']:.0%} of {found['starts']}",
                ", ".join(SYMBOLS.get(p, p) for p in found["bounds"]) or "none",
            )
        )
    head = ("family", "converged", "objective", "scaled gradient", "least curvature")
    return Table((*head, "starts that agree", "at a bound"), rows)


def excluded(runs: list[dict[str, str]]) -> Table:
    keys = ("run", "family", "status", "reason")
    return Table(keys, [tuple(run[key] for key in keys) for run in runs], long=frozenset({3}))


def read_as(source: Record) -> str:
    """Which columns were read under another name than theirs, or ""."""
    names = source.get("columns", {}).items()
    return ", ".join(f"{ours} from {theirs}" for ours, theirs in names)


def provenance(record: Record) -> Table:
    method, source, conventions = record["method"], record["source"], record["conventions"]
    delta = "" if method["delta"] is None else f", δ = {method['delta']:g}"
    approach2, count = method["settings"]["approach2"], method["bootstrap"]
    rows = [
        ("data", f"{source['name']}, SHA-256 {source['sha256']}"),
        *([("columns", read_as(source))] if read_as(source) else []),
        ("metric", record["metric"]),
        (
            "conventions",
            f"N {labels.convention(conventions['params'])}, "
            f"FLOPs {labels.convention(conventions['flops'])}",
        ),
        ("approach 3", f"objective: {method['objective']}{delta}"),
        ("approach 2", f"{approach2} in log N"),
        (
            "intervals",
            f"{method['level']:.0%}; approach 3: {count} bootstrap replicates, runs "
            "redrawn within each budget (whole runs where checkpoints of one run enter); approach "
            f"2: {count} draws from the errors of the parabolas",
        ),
        ("seed", f"{method['seed']}: the same data give the same numbers"),
        ("versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items())),
        ("files", "fit.json, points.csv and the figures beside this file"),
    ]
    return Table(("", ""), rows, long=frozenset({1}))


def multipliers(name: str, base: str, family: Record, replicates: int) -> Table:
    """m at the budgets of the family and of the baseline, and who is lower there."""
    lower = {
        row["flops"]: labels.fraction(row["probability"], replicates) for row in family["lower"]
    }
    rows = []
    for side, who, never in (("at_family", name, base), ("at_baseline", base, name)):
        for row in family["multiplier"][side]["budgets"]:
            found = row["interpolated"] or {"value": None, "interval": None}
            rows.append(
                (
                    labels.flops(row["flops"]),
                    who,
                    _multiple(row["value"], row["interval"], f"{never} never"),
                    _multiple(found["value"], found["interval"], ""),
                    "in range" if row["in_range"] else Cell("extrapolated", style="notable"),
                    lower[row["flops"]],
                )
            )
    title = f"{name} against {base}: compute of {name} / of {base} for one loss; P({name} lower)"
    head = ("C", "spent by", "multiplier", "between optima", "range", "P lower")
    mixed = ("mixed kinds of number: no comparison of models",) if family["mixed"] else ()
    return Table(head, rows, mixed, title)


def _multiple(value: float | None, ends: Ends, never: str) -> Cell:
    if value is None:
        return Cell(never)
    shown, interval = labels.estimate(value, ends, labels.value)
    return Cell(shown, (interval,))


def tests(base: str, family: Record) -> Table:
    """Do the exponents, or E, of a family and the baseline differ?"""
    rows = []
    for number in (3, 2):
        found = family["exponents"][f"approach{number}"]
        if found:
            ends = found["interval"]
            shown = f" ({ends[0]:+.3f} to {ends[1]:+.3f})" if ends else " (no interval)"
            label = f"a less {base}'s, approach {number}"
            value = f"{found['difference']:+.3f}{shown}"
            rows.append((label, value, VERDICTS[found["significant"]]))
    for key, test in family["tests"].items():
        rows.append((QUESTIONS[key], f"p = {test['p']:.2g}", f"{test['simulations']} simulations"))
    return Table(("", "", ""), rows)


def comparison(record: Record) -> list[Table]:
    """The tables of every family that could be compared."""
    base, count, out = record["baseline"]["family"], record["method"]["bootstrap"], []
    for name, family in record["families"].items():
        if family["multiplier"]:
            out += [multipliers(name, base, family, count), tests(base, family)]
    return out


def warnings_of(record: Record) -> list[str]:
    """A line for each warning, refusals among them."""
    parts = {"": record.get("warnings", [])}
    parts |= {f"{name}: ": family["warnings"] for name, family in record["families"].items()}
    return [
        f"{'refused' if item['refusal'] else 'warning'} {where}{item['message']}"
        for where, items in parts.items()
        for item in items
    ]


def predictions(found: list[Record]) -> Table:
    """N*, D* and the loss at a budget: a column for each family."""
    unit = f" ({UNIT})" if all(one["kind"] for one in found) else ""
    columns = [_prediction(one, unit) for one in found]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return Table(("", *(one["family"] for one in found)), rows)


def _prediction(one: Record, unit: str) -> dict[str, str]:
    three, two, debiased = (one[name] for name in ("approach3", "approach2", "debiased"))
    inside = "within the data" if one["in_range"] else "within the budgets, N* outside the sizes"
    where = f"{one['decades']:.2g} decades beyond" if one["decades"] else inside
    if any(found["code"] == "below_the_data" for found in one["findings"]):
        where = "below the data"
    return {
        "kind of loss": labels.kind(one["kind"]),
        "C lies": where,
        "N* (parameters), approach 3": _estimate(three, "params", labels.count),
        "N* (parameters), approach 2": _estimate(two, "params", labels.count),
        "  de-biased N*": _estimate(debiased, "params", labels.count) if debiased else "not known",
        "D* (tokens), approach 3": _estimate(three, "tokens", labels.count),
        "D* (tokens), approach 2": _estimate(two, "tokens", labels.count),
        "  de-biased D*": _estimate(debiased, "tokens", labels.count) if debiased else "not known",
        f"loss{unit}": _estimate(three, "loss", labels.value),
        "  with model error": _estimate(three, "loss_with_model_error", labels.value),
        "  error of the rollout": _rollout_error(one["rollout"]),
        "D* / unique tokens": _epochs(one),
    } | _launch(one["launch"])


def run_predictions(found: list[Record]) -> Table:
    """The loss of a run: a column for each family."""
    unit = f" ({UNIT})" if all(one["kind"] for one in found) else ""
    columns = [
        {
            "kind of loss": labels.kind(one["kind"]),
            "N, D": f"{labels.count(one['params'])}, {labels.count(one['tokens'])}",
            "C": labels.flops(one["flops"]),
            "tokens per parameter": labels.value(one["tokens"] / one["params"], 3),
            "the run lies": f"{one['decades']:.2g} decades outside the data"
            if one["decades"]
            else "within the data",
            f"loss{unit}": _estimate(one, "loss", labels.value),
            "  with model error": _estimate(one, "loss_with_model_error", labels.value),
            "  error of the rollout": _rollout_error(one["rollout"]),
            "D / unique tokens": _epochs(one),
        }
        for one in found
    ]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return Table(("", *(one["family"] for one in found)), rows)


def _rollout_error(error: Record | None) -> str:
    return f"{error['bias']:+.2%} on average, {error['rms']:.2%} rms" if error else "not known"


def _epochs(one: Record) -> str:
    if one["epochs"] is None:
        return "not known"
    return f"{one['epochs']:.3g} ({labels.count(one['unique_tokens'])})"


def _launch(launch: Record | None) -> dict[str, str]:
    names = (
        "nearest run: layers x width x heads",
        "its N",
        "its steps x sequences",
        "its tokens D",
        "its loss, expected",
    )
    if launch is None:
        return dict.fromkeys(names, "none")
    cells = (
        f"{launch['layers']} x {launch['width']} x {launch['heads']}",
        f"{launch['params']:,} ({labels.convention(launch['count'])})",
        f"{launch['steps']:,} x {launch['batch_size']:,}",
        f"{launch['tokens']:,}",
        "refused" if launch["loss"] is None else labels.value(launch["loss"]),
    )
    return dict(zip(names, cells, strict=True))


def _estimate(best: Record | None, quantity: str, show: Show) -> str:
    if best is None:
        return "refused"
    found = best[quantity]
    if found is None:
        return "not known"
    return "{} ({})".format(*labels.estimate(found["value"], found["interval"], show, DIGITS[show]))


def prediction_notes(found: list[Record]) -> list[str]:
    """What was assumed, and the warnings."""
    notes = [
        f"note {one['family']}: {note}"
        for one in found
        for note in (one.get("launch") or {"notes": []})["notes"]
    ]
    families = {one["family"]: {"warnings": one["findings"]} for one in found}
    return notes + warnings_of({"families": families})


def design(found: Record, repeats: int) -> Table:
    """The runs to add, in the order in which they were chosen, and what they are worth."""
    rows = [
        (
            labels.flops(pick["cell"]["flops"]),
            labels.count(pick["cell"]["params"]),
            labels.count(pick["cell"]["tokens"]),
            repeats,
            labels.flops(pick["cost"]),
            f"{pick['sd']:.3g}",
        )
        for pick in found["picks"]
    ]
    cost = sum(pick["cost"] for pick in found["picks"])
    notes = [
        f"cost      {labels.flops(cost)} of {labels.flops(found['flops_budget'])} FLOPs; {found['stop']}",
        f"sd        of log N*: {found['sd_before']:.3g} now (bootstrap {found['sd_bootstrap']:.3g}), "
        f"{found['sd_after']:.3g} with these runs",
    ]
    if found["model_sd"] is None:
        notes.append(
            "model     too few budgets for a rollout: the error of the law itself is not known"
        )
    else:
        notes.append(
            f"model     the law itself is off by {found['model_sd']:.3g} in log N* (rollout, beyond noise)"
        )
    before, after = found["bias_before"], found["bias_after"]
    if before is None or after is None:
        notes.append("approach 2 has fewer than three budgets with their optimum inside the sizes")
    else:
        notes.append(
            f"approach 2 on this grid misses N* by {before:+.1%} now, by {after:+.1%} with these "
            "runs (parabolas on lopsided sizes; approach 3 does not)"
        )
    head = ("C of a run", "N", "D", "runs", "FLOPs", "sd of log N* after")
    return Table(head, rows, notes=tuple(notes))


def within(value: float, ends: Ends, show: Show, extra: str = "") -> Cell:
    """A value above its interval, and a second line of small print."""
    shown, interval = labels.estimate(value, ends, show, DIGITS[show])
    return Cell(shown, (interval, *([extra] if extra else [])))


def between(value: float, ends: Ends, show: Show) -> str:
    """The interval of a value that stands elsewhere."""
    return labels.estimate(value, ends, show, DIGITS[show])[1]


def signed(fraction: float | None, digits: int = 1) -> str:
    if fraction is None:
        return "–"
    least = 0.5 * 10 ** -(digits + 2)
    return f"{fraction:+.{digits}%}" if abs(fraction) >= least else f"{0:.{digits}%}"
