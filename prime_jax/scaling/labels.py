"""Numbers and names as people read them: in tables, figures and the report."""

import math
import re
from collections.abc import Callable, Sequence

from prime_jax.flops import human
from prime_jax.scaling.columns import AS_GIVEN, Columns

Ends = Sequence[float | None] | None
MAX_DIGITS = 6  # closer than that, an interval is as good as none
KINDS = {"nll": "NLL", "nelbo": "NELBO", "train_loss": "training loss", "": "loss"}


count = human  # of parameters or tokens


def tick(value: float) -> str:
    """A count on an axis: 25M, 1B."""
    return re.sub(r"\.?0+(?=\D?$)", "", count(value)) if "." in count(value) else count(value)


def flops(value: float) -> str:
    """3e18, 2.89e20."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def value(number: float, digits: int = 4) -> str:
    """A parameter of a law, of any size."""
    if number == 0 or 1e-3 <= abs(number) < 1e5:
        return _plain(number, digits)
    return f"{number:.{digits - 1}g}"


def estimate(
    number: float, ends: Ends, show: Callable[[float, int], str], digits: int = 3
) -> tuple[str, str]:
    """A number and its interval, `2.69` and `2.66–2.72`; an end that is None is open.

    No end is rounded more coarsely than the number, and both have the digits that it takes to tell
    the nearer end from it.
    """
    known = [end for end in ends or () if end is not None and math.isfinite(end)]
    apart = [abs(end - number) for end in known if end != number]
    digits = max([digits, *(_magnitude(number) - _magnitude(gap) + 1 for gap in apart)])
    digits = min(digits, MAX_DIGITS)
    if ends is None:
        return show(number, digits), "no interval"
    # One more where an end has one more before the point: 998 (981–1015).
    low, high = (
        show(end, digits + (_magnitude(end) > _magnitude(number))) if end in known else "open"
        for end in ends
    )
    between = " to " if min([number, *known]) < 0 else "–"  # a dash is no minus
    return show(number, digits), f"{low}{between}{high}"


def _magnitude(number: float) -> int:
    return math.floor(math.log10(abs(number))) if number else 0


def fraction(probability: float, replicates: int) -> str:
    """A fraction of replicates, no finer than their number allows."""
    least = 1 / replicates
    if probability < least:
        return f"< {least:.2g}"
    return f"> {1 - least:.4g}" if probability > 1 - least else f"{probability:.3g}"


def kind(joined: str) -> str:
    """Of losses of one or several kinds ("nll+nelbo")."""
    return " and ".join(KINDS[k] for k in joined.split("+"))


def loss_axis(kinds: list[str]) -> str:
    """An axis label. The kinds are defined in nats per token; an unstated loss has no unit."""
    names = list(dict.fromkeys(k for joined in kinds for k in joined.split("+")))
    unit = "" if "" in names else " (nats / token)"
    text = " / ".join(KINDS[name] for name in names) + unit
    if "train_loss" in names:
        mixed = len(names) > 1
        text += "\nmixed kinds: not comparable" if mixed else "\nnot a likelihood"
    return text


def flops_axis(columns: Columns) -> str:
    return f"compute C (FLOPs, {convention(columns.flops_convention)})"


def params_axis(columns: Columns) -> str:
    return f"parameters N ({convention(columns.params_convention)})"


def convention(name: str) -> str:
    return "as given" if name == AS_GIVEN else name.replace("_plus_", " + ").replace("_", " ")


def _plain(number: float, digits: int) -> str:
    rounded = float(f"{number:.{digits - 1}e}")  # 0.9996 is 1.00
    places = max(0, digits - 1 - _magnitude(rounded)) if number else 0
    return f"{number:.{places}f}"
