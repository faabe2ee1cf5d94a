"""Records of a run: numbers with a kind, a unit and a standard error, written atomically."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from prime_jax.errors import UserError
from prime_jax.runtime import storage
from prime_jax.runtime.storage import Path

SCHEMA = 1
Kind = Literal["nll", "nelbo", "train_loss", "lower_bound", "difference"]
VALID = ("nll", "nelbo")  # a likelihood, or a bound that says as much against a model


@dataclass(frozen=True)
class Loss:
    """One estimated number, in nats per target token.

    Attributes:
        kind: `nll` (exact), `nelbo` (an upper bound on it), `lower_bound` (on it), `difference` (of
            two of them) or `train_loss` (neither).
        estimator: as docs/evaluation.md lists them.
        value: the estimate.
        se_mc: standard error over the Monte-Carlo replicates: 0 for a number without any, None
            (unknown) for a single one.
        se_data: standard error from the finite evaluation set, clustered by document where there
            are enough of them; None (unknown) for a single block.
        n_tokens: target tokens in the evaluation set.
        n_mc: Monte-Carlo replicates.
        given: side information that the model has (`""` or `"lengths"`).
        note: what to know of this number beyond its kind; empty for nothing.
    """

    kind: Kind
    estimator: str
    value: float
    se_mc: float | None
    se_data: float | None
    n_tokens: int
    n_mc: int
    given: str = ""
    note: str = ""
    unit: str = "nats/token"


def as_dict(loss: Loss) -> dict[str, Any]:
    return dataclasses.asdict(loss)


def best_valid(losses: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The number a fit uses by default: exact `nll`, else the sub-token bound, else any bound."""
    valid = [loss for loss in losses if loss["kind"] in VALID]
    order = {"ar": 0, "subtoken": 1, "token": 2}
    return min(valid, key=lambda loss: order.get(loss["estimator"], 3), default=None)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader, or a crash, sees the old file or the new one.

    Raises:
        UserError: the file cannot be written (permissions, full disk).
    """
    storage.write(path, as_json(value))


def as_json(value: Any) -> bytes:
    """Strict JSON, indented for people."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, unreadable or damaged.
    """
    return parse_json(storage.read(path), path)


def parse_json(data: bytes, path: Path) -> Any:
    """Raises: UserError: the content of `path` is damaged."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
