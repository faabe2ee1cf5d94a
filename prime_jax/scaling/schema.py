"""What every result is made of: fields that are written, warnings, and refusals in place of guesses.

Result objects are the schema: a dataclass is written to JSON field by field, and read in docs. A
field made by `key` says what it holds; that text is the documentation of the JSON. Fields made by
`hidden` (draws, data, what a later question needs) stay in memory.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def key(text: str, **default: Any) -> Any:
    """A field that is written, and what it holds."""
    return dataclasses.field(metadata={"doc": text}, **default)


def hidden(**default: Any) -> Any:
    """A field that is not written."""
    return dataclasses.field(metadata={"hidden": True}, repr=False, compare=False, **default)


def as_dict(value: Any) -> Any:
    """Plain JSON: arrays as lists, numbers that are none as null. `from_` is the key "from"."""
    if dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if not f.metadata.get("hidden")]
        return {f.name.rstrip("_"): as_dict(getattr(value, f.name)) for f in fields}
    if isinstance(value, Mapping):
        return {name: as_dict(part) for name, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return [as_dict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A hint for each, by code. A code is stable: scripts may look for it in fit.json.
HINTS = {
    "starts_disagree": "rely on neither minimum: add runs, mainly at sizes and budgets far apart",
    "not_converged": "report this data set as a bug of the solver",
    "negative_curvature": "add sizes on both sides of the best one, or repeat runs to lower the noise",
    "e_above_lowest_loss": "add larger budgets, and check that all losses come from one evaluation set",
    "bound_hit": "add runs that separate the terms: larger budgets, and sizes further from the optimum",
    "optimum_outside_range": "add runs on the side where the optimum lies",
    "below_the_data": "train that size rather than predict it",
    "too_few_points": "add runs",
    "too_few_budgets": "add budgets, each with three sizes or more around its optimum",
    "budget_ambiguous": "give a `budget` column, or fit in the FLOP convention that the sweep was planned in",
    "budget_spread": "fit in the FLOP convention that the budgets were planned in (--flops), or check that N and D are counted alike in all runs",
    "debias_implausible": "use the minima as they are; find out why the curves of approach 3 differ from those of the runs",
    "flops_not_a_power_law": "choose the N that the FLOPs follow (--params), or FLOPs counted from N (--flops)",
    "mixed_kinds": "choose one number with --metric, or give --allow-mixed-kinds",
    "mixed_evaluations": "evaluate all runs on one evaluation set with one tokenizer, or give --allow-mixed-kinds",
    "kind_unstated": "add a `kind` column: nll, nelbo or train_loss",
    "survivors_only": "finish or explain the missing runs: if large models or high learning rates fail more often, the fit is biased",
    "loss_not_predicted": "see why approach 3 was refused",
    "model_error_unknown": "add budgets: a rollout predicts the largest ones from three or more smaller ones",
    "no_launchable_shape": "give the settings of the runs: --sweep ROOT, --model.vocab-size, --data.seq-len",
    "held_out_bias": "expect the same error in predictions beyond the data; add budgets close to the target",
    "exponents_do_not_differ": "do not claim that one scales better; add larger budgets and repeats",
    "multiplier_extrapolated": "add runs of the baseline or the family where their losses overlap",
    "multipliers_disagree": "report both; add runs where they differ",
    "extrapolation": "add runs around the predicted optimum before using it",
    "delta_too_small": "choose a larger --delta, about the size of the scatter",
    "data_repeated": "use more unique data, or the law that counts repetition: --law repeated",
    "not_identified": "do not use these values; add larger budgets, and sizes further from the optimum",
    "no_repeated_runs": "train runs on part of the data (data.unique_tokens, or epochs of a sweep), or fit --law powers",
    "of_fresh_data": "use approach 3 alone, or predict without --data-limit",
    "at_chance": "evaluate larger models, or an easier task",
    "task_error_unknown": "give the standard errors of accuracies, acc_se_TASK",
    "too_few_rates": "run cells at three learning rates or more (lr_factors of a sweep), at budgets and sizes far apart",
    "rate_at_edge": "add rates on that side; such a cell is left out of the law",
    "rate_drifts": "fit a law to the rates (scaling rates) and plan with lr = fitted:FILE",
    "no_seed_repeats": "repeat one budget with a second seed",
    "checkpoints_of_one_run": "keep the last step of each run, unless losses along the way are comparable (constant or WSD schedule)",
    "runs_of_one_trajectory": "repeat the trajectories with other seeds: one tells as little of chance as one run",
    "approaches_disagree": "rely on none yet: look at the residuals, and at the warnings of each approach",
    "off_centre_grid": "lay the sizes evenly around the optimum",
    "drifting_grid": "lay the sizes around the optimum at every budget; the de-biased exponent allows for it",
    "mixed_conventions": "count N and FLOPs of all runs in one way; compare the rows named",
    "no_curves": "give training curves with --curves (approach 1 needs them, the others do not)",
    "curves_missing": "log the missing runs too: the envelope is only as good as the sizes in it",
    "curves_of_training_loss": "evaluate along training (--eval.every), on one evaluation set",
    "schedule_decays": "train with a constant or a WSD schedule (--optim.schedule wsd), or leave approach 1 out",
    "schedule_unknown": "add a column lr to the curves, or `schedule` to the runs",
    "too_few_winners": "add sizes on both sides of the best ones",
    "winner_at_edge": "add smaller and larger sizes, trained to the same budgets",
    "interval_unbounded": "add sizes around the optimum, or repeat runs",
    "small_scale": "read the figures as an example of the tool; conclusions need larger budgets",
}


@dataclasses.dataclass(frozen=True)
class Diagnostic:
    """One warning, or a refusal: something asked for that the data cannot give.

    Attributes:
        code: a key of HINTS.
        message: what was seen, in numbers.
        hint: what to do about it.
        refusal: True if a result is withheld because of it.
    """

    code: str
    message: str
    hint: str
    refusal: bool = False


def warn(code: str, message: str) -> Diagnostic:
    return Diagnostic(code, message, HINTS[code])


def refuse(code: str, message: str) -> Diagnostic:
    return Diagnostic(code, message, HINTS[code], refusal=True)
