"""Which implementation computes each heavy part on which chip, and why.

The first row of `TABLE` that fits decides. A plain XLA twin is the default wherever no measurement
on that chip favours a kernel: compiler estimates are upper bounds, real kernels reached 0.65 to 1.0
of theirs. A config (`kernels.*`) overrides the table; `prime-jax doctor` prints it for the device
it finds. A row that a measurement justifies names the measurement in `why`.
"""

import re
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

from prime_jax.config import KernelConfig, RunConfig

T = TypeVar("T")
Kernel = Literal["head", "attention", "embedding"]
Blocks = tuple[int, ...]


class Choice(NamedTuple):
    """An implementation, its block sizes (empty: the kernel's own) and the reason for it."""

    implementation: str
    blocks: Blocks
    why: str


class Row(NamedTuple):
    """One line of the table: what it fits, and the choice. Empty bounds fit everything."""

    kernel: Kernel
    device: str  # start of the device kind, as JAX names it
    choice: Choice
    max_length: int = 0
    min_width: int = 0
    block_diffusion: bool = False

    def fits(self, kernel: Kernel, device_kind: str, config: RunConfig) -> bool:
        return (
            self.kernel == kernel
            and device_kind.startswith(self.device)
            and not 0 < self.max_length < config.data.seq_len * config.sequences_read
            and config.model.width >= self.min_width
            and (config.objective.block_length > 0 or not self.block_diffusion)
        )

    @property
    def condition(self) -> str:
        bounds = {"L <=": self.max_length, "D >=": self.min_width}
        conditions = [f"{name} {bound}" for name, bound in bounds.items() if bound]
        return ", ".join(conditions + ["block diffusion"] * self.block_diffusion)


TABLE = (
    Row(
        "attention", "TPU", Choice("xla", (), "the scores of short rows are small"), max_length=511
    ),
    Row(
        "attention",
        "TPU v4",
        Choice("splash", (), "stores no scores; our kernels keep a head in VMEM, here 16 MiB"),
    ),
    Row(
        "attention",
        "TPU",
        Choice("splash", (), "skips what the rule hides; our kernels know one run of keys a query"),
        block_diffusion=True,
    ),
    Row(
        "attention",
        "TPU",
        Choice(
            "pallas",
            (),
            "stores no scores; static schedule like splash attention's, which does not skip "
            "blocks of other documents; not timed on a chip yet",
        ),
        max_length=8192,
    ),
    Row("attention", "TPU", Choice("splash", (), "stores no scores and streams whole heads")),
    Row(
        "attention",
        "NVIDIA",
        Choice(
            "scan", (), "stores no scores; cuDNN wants the rule as a bias [B, H, L, L]; not timed"
        ),
        block_diffusion=True,
    ),
    Row("attention", "NVIDIA", Choice("cudnn", (), "the vendor's; XLA where it has no kernel")),
    Row("attention", "cpu", Choice("scan", (), "one head's scores stay in cache: measured")),
    Row("attention", "", Choice("xla", (), "runs everywhere")),
    Row(
        "embedding",
        "TPU",
        Choice("xla", (), "two selects: at the memory bound, like the kernel (estimate)"),
    ),
    Row("embedding", "", Choice("xla", (), "a matmul with a multi-hot matrix, no scatter")),
    Row("head", "TPU", Choice("xla", (), "never stores [N, V]; the kernel was not timed here yet")),
    Row("head", "", Choice("xla", (), "never stores [N, V]; the kernel is for TPUs")),
)


def rows(device_kind: str) -> list[Row]:
    """The rows that can decide on this device, in order: of each kernel, the last always fits."""
    out: list[Row] = []
    for row in TABLE:
        decided = any(r.kernel == row.kernel and not r.condition for r in out)
        if device_kind.startswith(row.device) and not decided:
            out.append(row)
    return out


def _choose(kernel: Kernel, config: RunConfig, device_kind: str, blocks: Blocks = ()) -> Choice:
    wanted = getattr(config.kernels, kernel)
    if wanted != "auto":
        return Choice(wanted, blocks, f"kernels.{kernel} = {wanted}")
    choice = next(row.choice for row in TABLE if row.fits(kernel, device_kind, config))
    return choice._replace(blocks=blocks or choice.blocks)


def head(config: RunConfig, device_kind: str) -> Choice:
    return _choose("head", config, device_kind, config.kernels.head_blocks)


def attention(config: RunConfig, device_kind: str) -> Choice:
    return _choose("attention", config, device_kind, config.kernels.attention_blocks)


def embedding(config: RunConfig, device_kind: str) -> Choice:
    return _choose("embedding", config, device_kind)


PLAIN = KernelConfig(head="xla", attention="xla", embedding="xla")  # what a failure falls back to


def cause(error: Exception) -> str:
    """One line of a compiler's message: what is wrong, and in which kernel."""
    text = str(error)
    memory = re.search(r"for %(\S+) = .*?(Scoped allocation with size \S+ and limit \S+)", text)
    if memory:
        return f"out of VMEM in {memory[1]}: {memory[2]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if _names_kernel(line)]
    return (telling or lines or [type(error).__name__])[0][:300]


def _names_kernel(text: str) -> bool:
    return any(word in text.lower() for word in ("vmem", "mosaic", "pallas", "cudnn"))


def fallback(call: Callable[[], T], twin: Callable[[], T], name: str) -> T:
    """`call()`, or `twin()` with a warning if a kernel of `call` cannot be compiled.

    Anything else that goes wrong is raised: too little HBM, for one, is no kernel's fault.
    """
    try:
        return call()
    except Exception as error:
        hbm = re.search("memory (on|in memory space) hbm", str(error), re.IGNORECASE)
        if hbm or not _names_kernel(str(error)):
            raise
        warnings.warn(f"{name} falls back to plain XLA: {cause(error)}", stacklevel=2)
    return twin()
