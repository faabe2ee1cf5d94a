"""What machine time costs, by a price list that its reader owns. No JAX."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_jax.errors import UserError
from prime_jax.hardware.slices import Slice


@dataclass(frozen=True)
class Prices:
    """A price list that its reader owns: currency units per chip and hour by generation."""

    date: str
    currency: str
    per_chip_hour: dict[str, float]

    def of(self, slice_: Slice, hours: float) -> float | None:
        """Of all chips of a slice; None where the list does not say."""
        price = self.per_chip_hour.get(slice_.generation)
        return None if price is None else price * slice_.chips * hours


def load_prices(path: Path) -> Prices:
    """Read a price file (docs/prices.toml shows the form).

    Raises:
        UserError: missing, not TOML, or without a date, currency and prices.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML: {error}") from error
    prices = values.get("per_chip_hour")
    numbers = isinstance(prices, dict) and all(isinstance(p, (int, float)) for p in prices.values())
    if not numbers or "date" not in values or "currency" not in values:
        raise UserError(
            f"{path}: needs date, currency and [per_chip_hour] with v5e = 1.23 and so on"
        )
    return Prices(str(values["date"]), str(values["currency"]), prices)
