"""Which implementation computes each heavy part, and why.

`auto` means a library's kernel that is kept for us (splash attention on TPUs, cuDNN's on GPUs) or
plain XLA, until a measurement on this kind of chip says otherwise: `prime-jax kernels tune` makes a
table of `Choices`, which is handed in. A config (`kernels.*`) overrides both. An implementation
whose numbers were off on a chip is not chosen there, whatever the shape.

A run holds on to what it began with (`recorded`): implementations differ by rounding.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

from prime_jax.config import KernelConfig, RunConfig
from prime_jax.errors import UserError

T = TypeVar("T")
Kernel = Literal["head", "attention", "embedding"]
Blocks = tuple[int, ...]
Shape = Mapping[str, Any]  # what a kernel's speed depends on, by name
KERNELS: tuple[Kernel, ...] = ("head", "attention", "embedding")
SCHEMA = 1
FILE = "kernels.json"  # of a run directory: what it began with
SHORT = 512  # tokens below which stored scores are small
OFF = "off by"  # how the reason of a wrong implementation begins


class Choice(NamedTuple):
    """An implementation, its block sizes (empty: the kernel's own) and the reason for it."""

    implementation: str
    blocks: Blocks
    why: str


@dataclass(frozen=True)
class Measured:
    """One implementation at one shape.

    Attributes:
        milliseconds: median of forward and backward; None if it was not timed.
        error: largest relative error of its values and gradients; None if it gave none.
        problem: why it is not to be chosen; empty if it may be.
    """

    implementation: str
    blocks: Blocks = ()
    milliseconds: float | None = None
    error: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Row:
    """What was measured of one kernel at one shape, and so is chosen there."""

    kernel: Kernel
    shape: Shape
    implementation: str
    blocks: Blocks
    why: str
    measured: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class Choices:
    """What was measured on one kind of chip; by default nothing."""

    device_kind: str = ""
    versions: str = ""
    rows: tuple[Row, ...] = ()

    def choose(self, kernel: Kernel, config: RunConfig, device_kind: str) -> Choice:
        """What `auto` means for a run on a kind of device."""
        usual = default(kernel, config, device_kind)
        if device_kind != self.device_kind:
            return usual
        shape = shape_of(kernel, config)
        for row in self.rows:
            if row.kernel == kernel and row.shape == shape:
                return Choice(row.implementation, row.blocks, row.why)
        off = self.wrong(kernel).get(usual.implementation)
        return Choice("xla", (), f"{usual.implementation}: {off}") if off else usual

    def wrong(self, kernel: Kernel) -> dict[str, str]:
        """Implementations whose numbers are off on this chip, and how."""
        found = [m for row in self.rows if row.kernel == kernel for m in row.measured]
        return {m.implementation: m.problem for m in found if m.problem.startswith(OFF)}

    def as_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str = "kernels") -> "Choices":
        """Raises: UserError: not a table of this version."""
        if not isinstance(value, Mapping) or value.get("schema") != SCHEMA:
            raise UserError(f"{where}: not a table of kernels of version {SCHEMA}; tune again")

        def row(x: Mapping[str, Any]) -> Row:
            sides = tuple(Measured(**{**m, "blocks": tuple(m["blocks"])}) for m in x["measured"])
            return Row(**{**x, "blocks": tuple(x["blocks"]), "measured": sides})

        try:
            rows = tuple(map(row, value["rows"]))
            return cls(value["device_kind"], value["versions"], rows)
        except (TypeError, KeyError) as error:
            raise UserError(f"{where}: a damaged table of kernels; tune again") from error


NOTHING = Choices()


def shape_of(kernel: Kernel, config: RunConfig) -> dict[str, Any]:
    """What was or is to be measured for a run; how many tokens at a time is left out."""
    m, o = config.model, config.objective
    slots = config.subtokens.length
    tokens = {"width": m.width, "vocab_size": m.vocab_size, "length": slots, "dtype": m.dtype}
    if kernel == "head":  # of plain tokens nothing is restricted, and the losses are one
        return tokens | ({"carry_over": o.carry_over, "loss": o.loss} if slots > 1 else {})
    if kernel == "embedding":
        return tokens | {"kind": m.embedding}
    return {
        "tokens": config.data.seq_len * config.sequences_read,
        "heads": m.heads,
        "kv_heads": m.kv_heads or m.heads,
        "size": m.width // m.heads,
        "causal": config.family == "arm",
        "documents": config.data.segment_ids or o.random_length > 0,
        "block_length": o.block_length,
        "dtype": m.dtype,
    }


def default(kernel: Kernel, config: RunConfig, device_kind: str) -> Choice:
    """What nothing measured has improved upon yet."""
    if kernel == "head":
        return Choice("xla", (), "never stores [N, V]")
    if kernel == "embedding":
        return Choice("xla", (), "two selects on a TPU, else a matmul; no scatter")
    length = config.data.seq_len * config.sequences_read
    return default_attention(device_kind, length, config.objective.block_length)


def default_attention(device_kind: str, length: int, block_length: int = 0) -> Choice:
    """The same for attention over `length` tokens."""
    if device_kind.startswith("TPU"):
        if length < SHORT:
            return Choice("xla", (), "the scores of short rows are small")
        return Choice("splash", (), "JAX's kernel: stores no scores")
    if device_kind.startswith("NVIDIA"):
        if block_length:
            return Choice("scan", (), "cuDNN wants the rule as a bias [B, H, L, L]")
        return Choice("cudnn", (), "the vendor's; XLA where it has no kernel")
    if device_kind == "cpu":
        return Choice("scan", (), "one head's scores stay in cache: measured")
    return Choice("xla", (), "runs everywhere")


def _choose(
    kernel: Kernel, config: RunConfig, device_kind: str, choices: Choices = NOTHING
) -> Choice:
    wanted = getattr(config.kernels, kernel)
    blocks = getattr(config.kernels, f"{kernel}_blocks", ())
    if wanted != "auto":
        return Choice(wanted, blocks, f"kernels.{kernel} = {wanted}")
    choice = choices.choose(kernel, config, device_kind)
    return choice._replace(blocks=blocks or choice.blocks)


def head(config: RunConfig, device_kind: str) -> Choice:
    return _choose("head", config, device_kind)


def attention(config: RunConfig, device_kind: str) -> Choice:
    return _choose("attention", config, device_kind)


def embedding(config: RunConfig, device_kind: str) -> Choice:
    return _choose("embedding", config, device_kind)


def resolved(config: RunConfig, device_kind: str, choices: Choices = NOTHING) -> KernelConfig:
    """The implementations and blocks of a run by name; nothing is `auto` any more."""
    found = {kernel: _choose(kernel, config, device_kind, choices) for kernel in KERNELS}
    return KernelConfig(
        head=found["head"].implementation,
        attention=found["attention"].implementation,
        embedding=found["embedding"].implementation,
        head_blocks=found["head"].blocks,
        attention_blocks=found["attention"].blocks,
    )


def record(kernels: KernelConfig, device_kind: str) -> dict[str, Any]:
    """What a run says of its kernels (kernels.json)."""
    blocks = {k: list(getattr(kernels, f"{k}_blocks", ())) for k in KERNELS}
    sides = {k: {"implementation": getattr(kernels, k), "blocks": blocks[k]} for k in KERNELS}
    return {"schema": SCHEMA, "device_kind": device_kind, **sides}


def recorded(config: RunConfig, record: Mapping[str, Any], device_kind: str) -> RunConfig | None:
    """`config` with the kernels that its run began with; None if those were another chip's.

    What the config names itself stays.
    """
    if record.get("schema") != SCHEMA or record.get("device_kind") != device_kind:
        return None
    now, changes = config.kernels, {}
    for kernel in KERNELS:
        if getattr(now, kernel) != "auto":
            continue
        changes[kernel] = record[kernel]["implementation"]
        if kernel != "embedding" and not getattr(now, f"{kernel}_blocks"):
            changes[f"{kernel}_blocks"] = tuple(record[kernel]["blocks"])
    return replace(config, kernels=replace(now, **changes))


PLAIN = KernelConfig(head="xla", attention="xla", embedding="xla")  # what a failure falls back to


def cause(error: Exception) -> str:
    """One line of a compiler's message, with the error and the kernel."""
    text = str(error)
    memory = re.search(r"for %(\S+) = .*?(Scoped allocation with size \S+ and limit \S+)", text)
    if memory:
        return f"out of VMEM in {memory[1]}: {memory[2]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    relevant = [line for line in lines if _mentions_kernel(line)]
    return (relevant or lines or [type(error).__name__])[0][:300]


def _mentions_kernel(text: str) -> bool:
    return any(word in text.lower() for word in ("vmem", "mosaic", "pallas", "cudnn"))


def fallback(call: Callable[[], T], plain: Callable[[], T], name: str) -> T:
    """`call()`, or `plain()` with a warning if a kernel of `call` cannot be compiled.

    Other errors are raised, e.g. too little HBM, which is not due to a kernel.
    """
    try:
        return call()
    except Exception as error:
        hbm = re.search("memory (on|in memory space) hbm", str(error), re.IGNORECASE)
        if hbm or not _mentions_kernel(str(error)):
            raise
        warnings.warn(f"{name} falls back to plain XLA: {cause(error)}", stacklevel=2)
    return plain()
