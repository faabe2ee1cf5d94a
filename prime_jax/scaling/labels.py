"""Numbers and names as people read them: in tables, figures and the report."""

import math

from prime_jax.flops import human
from prime_jax.scaling.table import AS_GIVEN, Columns

WIDTH = 100  # columns that the wider tables need; a narrower terminal wraps their lines
KINDS = {"nll": "NLL", "nelbo": "NELBO", "train_loss": "training loss", "": "loss"}


count = human  # of parameters or tokens


def flops(value: float) -> str:
    """3e18, 2.89e20."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def value(number: float, digits: int = 4) -> str:
    """A parameter of a law, of any size."""
    if number == 0 or 1e-3 <= abs(number) < 1e5:
        return _plain(number, digits)
    return f"{number:.{digits - 1}g}"


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
    places = max(0, digits - 1 - math.floor(math.log10(abs(number)))) if number else 0
    return f"{number:.{places}f}"
