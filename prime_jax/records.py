"""What a run leaves behind: numbers with a kind, a unit and a standard error, written atomically."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prime_jax.errors import UserError

SCHEMA = 1
Kind = Literal["nll", "nelbo", "train_loss"]


@dataclass(frozen=True)
class Loss:
    """One estimated number, in nats per target token.

    Attributes:
        kind: `nll` (exact), `nelbo` (an upper bound on it) or `train_loss` (neither).
        estimator: `ar`, `subtoken`, `token`, `finite:T`, `chain:ORDER` or `joint`.
        value: the estimate.
        se_mc: standard error over the Monte-Carlo replicates (0 for an exact number).
        se_data: standard error from the finite evaluation set, clustered by document.
        n_tokens: target tokens in the evaluation set.
        n_mc: Monte-Carlo replicates.
        given: side information the model was told (`""` or `"lengths"`).
    """

    kind: Kind
    estimator: str
    value: float
    se_mc: float
    se_data: float
    n_tokens: int
    n_mc: int
    given: str = ""
    unit: str = "nats/token"


def as_dict(loss: Loss) -> dict[str, Any]:
    return dataclasses.asdict(loss)


def best_valid(losses: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The number a fit uses by default: exact `nll`, else the sub-token bound, else any bound."""
    valid = [loss for loss in losses if loss["kind"] in ("nll", "nelbo")]
    order = {"ar": 0, "subtoken": 1, "token": 2}
    return min(valid, key=lambda loss: order.get(loss["estimator"], 3), default=None)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write JSON so that a reader, or a crash, sees the old file or the new one, never half.

    Raises:
        UserError: the place cannot be written to (missing rights, full disk).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, unreadable or damaged.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
