"""What a fit has to say besides its numbers: warnings, and refusals in place of guesses."""

from dataclasses import dataclass

# What would cure each, by code. A code is stable: scripts may look for it in fit.json.
CURES = {
    "starts_disagree": "trust neither minimum: add runs, above all at sizes and budgets far apart",
    "not_converged": "report this data set as a bug of the solver",
    "negative_curvature": "add sizes on both sides of the best one, or repeat runs to lower the noise",
    "e_above_lowest_loss": "add larger budgets, and check that all losses come from one evaluation set",
    "bound_hit": "add runs that tell the terms apart: larger budgets, and sizes further from the optimum",
    "optimum_outside_range": "add runs on the side where the optimum lies",
    "too_few_points": "add runs",
    "too_few_budgets": "add budgets, each with three sizes or more around its optimum",
    "budget_ambiguous": "give a `budget` column, or fit in the FLOP convention that the sweep was planned in",
    "flops_not_a_power_law": "choose the N that the FLOPs follow (--params), or FLOPs counted from N (--flops)",
    "mixed_kinds": "choose one number with --metric, or say --allow-mixed-kinds",
    "mixed_evaluations": "evaluate all runs on one evaluation set with one tokenizer, or say --allow-mixed-kinds",
    "kind_unstated": "add a `kind` column: nll, nelbo or train_loss",
    "survivors_only": "finish or explain the missing runs: where large or fast ones fail, the fit is biased",
    "extrapolation": "add runs around the predicted optimum before using it",
    "data_repeated": "use more unique data, or a law with a term for repetition",
    "no_seed_repeats": "repeat one budget with a second seed; the scatter around the law stands in for it",
    "checkpoints_of_one_run": "keep the last step of each run; intervals are too narrow otherwise",
    "interval_unbounded": "add sizes around the optimum, or repeat runs",
    "small_scale": "read the figures as an example of the tool; conclusions need larger budgets",
}


@dataclass(frozen=True)
class Finding:
    """One warning, or a refusal: something asked for that the data cannot give.

    Attributes:
        code: a key of CURES.
        message: what was seen, in numbers.
        refusal: True if a result is withheld because of it.
    """

    code: str
    message: str
    refusal: bool = False

    @property
    def cure(self) -> str:
        return CURES[self.code]

    def as_dict(self) -> dict[str, str | bool]:
        return {
            "code": self.code,
            "message": self.message,
            "cure": self.cure,
            "refusal": self.refusal,
        }


def warn(code: str, message: str) -> Finding:
    return Finding(code, message)


def refuse(code: str, message: str) -> Finding:
    return Finding(code, message, refusal=True)
