"""What to fit and how: arguments of `prime_jax.scaling` and flags of `prime-jax fit` alike."""

from dataclasses import dataclass
from typing import Literal

from prime_jax.errors import UserError
from prime_jax.settings import Checked, setting

Objective = Literal["huber", "ls"]
Method = Literal["parabola", "akima"]  # of approach 2
POWERS, REPEATED = "powers", "repeated"  # laws: Hoffmann et al.; with repeated data
DELTA = 1e-3
DEFAULT_METRIC, DEFAULT_FLOPS, DEFAULT_PARAMS = "best-valid", "matmul", "nonembedding_plus_head"


@dataclass(frozen=True)
class Choice(Checked):
    """What to fit. A convention that is None is the default one where the table has it."""

    metric: str = setting(
        DEFAULT_METRIC,
        "loss to fit: best-valid (exact NLL of arm, sub-token NELBO otherwise) or an estimator of the runs",
        metavar="NAME",
    )
    flops: Literal["matmul", "reference", "network"] | None = setting(
        None, "how FLOPs are counted, see docs/theory.md"
    )
    params: Literal["total", "nonembedding", "nonembedding_plus_head", "reference"] | None = (
        setting(None, "which parameters N counts, see docs/theory.md")
    )
    allow_mixed_kinds: bool = setting(
        False, "also use losses of different kinds together; every figure is marked"
    )
    columns: str = setting(
        "",
        "names of columns in the CSV, if they differ, with their units: loss=val_loss,params=N [M]",
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
        "number of bootstrap replicates",
        at_least=100,
        flag="bootstrap",
    )
    seed: int = setting(0, "seed of the bootstrap", at_least=0)
    level: float = setting(0.95, "level of every interval", above=0, below=1, flag=False)
    delta: float = setting(
        DELTA, "log residual beyond which the Huber loss is linear", above=0, infinite=True
    )
    objective: Objective = setting(
        "huber", "objective of approach 3 on log residuals: Huber or least squares"
    )
    approach2: Method = setting(
        "parabola", "curve through the losses of one budget, for approach 2"
    )
    floor: float | None = setting(
        None,
        "L_inf at which the law of the frontier, L(C) = L_inf + A / C^a, is pinned (default: E of approach 3)",
        above=0,
        metavar="LOSS",
    )
    law: str = setting(
        POWERS,
        "law of approach 3: powers (L = E + A/N^alpha + B/D^beta), or repeated (tokens seen again, and parameters in excess, count less)",
        metavar="NAME",
    )


DEFAULTS = Settings()
