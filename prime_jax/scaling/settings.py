"""What to fit and how: arguments of `prime_jax.scaling` and flags of `prime-jax fit` alike."""

from dataclasses import dataclass
from typing import Literal

from prime_jax.errors import UserError
from prime_jax.settings import Checked, setting

Objective = Literal["huber", "ls"]
Method = Literal["parabola", "akima"]  # of approach 2
POWERS = "powers"  # the law L = E + A / N**alpha + B / D**beta
DELTA = 1e-3
DEFAULT_METRIC, DEFAULT_FLOPS, DEFAULT_PARAMS = "best-valid", "matmul", "nonembedding_plus_head"


@dataclass(frozen=True)
class Choice(Checked):
    """What to fit. A convention that is None is the default one where the table has it."""

    metric: str = setting(
        DEFAULT_METRIC,
        "best-valid (exact NLL of arm, sub-token NELBO otherwise) or an estimator of the runs",
        metavar="NAME",
    )
    flops: Literal["matmul", "reference", "network"] | None = setting(None, "how FLOPs are counted")
    params: Literal["total", "nonembedding", "nonembedding_plus_head", "reference"] | None = (
        setting(None, "which parameters N counts")
    )
    allow_mixed_kinds: bool = setting(
        False, "fit and draw losses of different kinds together; every figure says so"
    )
    columns: str = setting(
        "",
        "how a table of others calls its columns, with units where these are not one, as in "
        "loss=val_loss,params=N [M]",
        metavar="OURS=THEIRS,...",
    )
    name_pattern: str = setting(
        "",
        "columns in the names of runs, as in {family}_{FLOPs}_{N}_{D}; {} is anything",
        metavar="PATTERN",
    )
    family: str = setting(
        "", "the family of all runs, for a table without such a column", metavar="NAME"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(all(pair.partition("=")[::2]) for pair in self._pairs):
            raise UserError(f"columns {self.columns!r}: pairs such as loss=val_loss, with commas")

    @property
    def names(self) -> dict[str, str]:
        """Columns by the name that they have here."""
        return dict(pair.split("=", 1) for pair in self._pairs)

    @property
    def _pairs(self) -> list[str]:
        return [pair.strip() for pair in self.columns.split(",")] if self.columns else []


@dataclass(frozen=True)
class Settings(Checked):
    """How to fit."""

    replicates: int = setting(
        1000,
        "bootstrap replicates; intervals of 95 % need some in their tails",
        at_least=100,
        flag="bootstrap",
    )
    seed: int = setting(0, "of the bootstrap", at_least=0)
    level: float = setting(0.95, "of every interval", above=0, below=1, flag=False)
    delta: float = setting(DELTA, "log residual from which Huber is linear", above=0, infinite=True)
    objective: Objective = setting(
        "huber", "of approach 3, on log residuals: Huber or least squares"
    )
    approach2: Method = setting("parabola", "the curve through the losses of one budget")
    law: str = setting(POWERS, "of `laws.LAWS`", flag=False)


DEFAULTS = Settings()
