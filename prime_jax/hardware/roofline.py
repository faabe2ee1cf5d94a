"""Estimates of step time and memory of a run. Imports no JAX.

A roofline model: matrix products, HBM traffic and collectives of one step, each divided by the
speed of the chip (slices.py) times an assumed efficiency. All-gathers of parameters overlap with
compute. Collectives of tensor parallelism do not, nor do sums of gradients on TPUs, according to
the compiled programs (`--check`):

    step = max(matmul, hbm, overlapped collectives) + other collectives

Every result has the prediction and the measured time, so that the efficiencies can be checked.
"""

from dataclasses import asdict, dataclass
from typing import Protocol

from prime_jax import flops
from prime_jax.config import RunConfig
from prime_jax.hardware.chips import Chip, of_device

EFFICIENCY = {"hbm": 0.8, "link": 0.8, "network": 0.7}  # fractions of the peak; matmul's: chips.py
ADAM_BYTES = 32  # read and write value and two moments in float32, write and read the gradient
# Numbers moved to and from HBM per token and layer in a forward pass, with elementwise operations
# fused into products, in units of the width and of the feed-forward width.
MOVED_WIDTH, MOVED_FFN = 12, 5


class Mesh(Protocol):
    """`meshes.Choice`: sizes of the axes."""

    replica: int
    data: int
    model: int


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step per device; the last two are collectives."""

    matmul: float
    hbm: float
    overlapped: float
    not_overlapped: float

    @property
    def step_seconds(self) -> float:
        return max(self.matmul, self.hbm, self.overlapped) + self.not_overlapped

    @property
    def bound(self) -> str:
        parts = {"matmul": self.matmul, "hbm": self.hbm, "collectives": self.overlapped}
        return max(parts, key=parts.get)

    @property
    def communication(self) -> float:
        """Fraction of the step in which the links are used."""
        return (self.overlapped + self.not_overlapped) / self.step_seconds

    def as_dict(self) -> dict[str, float]:
        return {"step_seconds": self.step_seconds, **asdict(self)}


@dataclass(frozen=True)
class Sizes:
    """Sizes for both estimates, per device unless stated otherwise."""

    layers: float  # parameters of all layers' matrices, split over `model` only
    outer: float  # embedding and head; `model` splits only an untied head that it divides
    held: float  # parameters stored on a device
    tokens: float  # of a micro-batch in a group of `model` devices
    item: int  # bytes of a number in the compute dtype


def sizes(config: RunConfig, mesh: Mesh) -> Sizes:
    """By `sharding.SPLIT`, except that norm vectors, which are never split, count as matrices."""
    counts, m = flops.param_counts(config), config.model
    layers = counts["nonembedding"] / mesh.model
    head = 0 if m.tied_head else m.vocab_size * m.width
    embedding = counts["total"] - counts["nonembedding"] - head
    if m.vocab_size % mesh.model == 0:
        head /= mesh.model
    row = m.width if m.embedding == "sum" else m.width // config.subtokens.length
    rows = config.batch_size / (mesh.replica * mesh.data * config.mesh.accumulate)
    return Sizes(
        layers=layers,
        outer=embedding + head,
        held=_sharded(layers + head, m.width, mesh) + _sharded(embedding, row, mesh),
        tokens=rows * config.data.seq_len * config.sequences_read,
        item=2 if m.dtype == "bfloat16" else 4,
    )


def _sharded(params: float, width: int, mesh: Mesh) -> float:
    """Parameters per device of matrices that `data` splits along `width`, if it is divisible."""
    return params if width % mesh.data else params / mesh.data


def predict(config: RunConfig, mesh: Mesh, chip: Chip, slices: int = 1) -> Prediction:
    """The roofline of one training step."""
    s, parts, remat = sizes(config, mesh), config.mesh.accumulate, config.mesh.remat
    devices = mesh.replica * mesh.data * mesh.model
    step_tokens = config.batch_size * config.data.seq_len
    passes = (
        4 / 3 if remat == "full" else 1.0
    )  # forward, backward (two forwards), recomputed forward
    arithmetic = flops.flops_per_token(config, "matmul") * step_tokens * passes / devices
    speed = chip.peak * chip.matmul_efficiency
    overlapped, not_overlapped = _collective_seconds(config, mesh, s, chip, slices)
    width, ffn = config.model.width, config.model.ffn
    moved = MOVED_WIDTH * width + MOVED_FFN * ffn / mesh.model
    activations = 3 * passes * config.model.layers * s.tokens * parts * moved * s.item
    weights = parts * (s.layers + s.outer) * (3 * passes * s.item + 2 * 4)
    traffic = activations + weights + ADAM_BYTES * s.held
    return Prediction(
        matmul=arithmetic / speed,
        hbm=traffic / (chip.memory_speed * EFFICIENCY["hbm"]),
        overlapped=overlapped,
        not_overlapped=not_overlapped,
    )


def _collective_seconds(
    config, mesh: Mesh, s: Sizes, chip: Chip, slices: int
) -> tuple[float, float]:
    """(overlapped, not overlapped) seconds of a step's collectives."""
    link = chip.link_speed * EFFICIENCY["link"]
    network = chip.network_speed * EFFICIENCY["network"]
    parts, remat = config.mesh.accumulate, config.mesh.remat
    params = s.layers + s.outer
    multislice = slices > 1  # then replicas are slices, or sharded parameters use the network
    across = network if multislice and mesh.replica % slices else link
    # Gathered in the compute dtype, again for the backward pass unless saved; scattered in float32.
    gathered = (s.layers * (1 if remat == "none" else 2) + s.outer) * s.item
    gather = parts * gathered * _ring(mesh.data) / across
    rounds = 2 if chip.summed_whole else 1
    scatter = rounds * parts * 4 * params * _ring(mesh.data) / across
    between = network if multislice and mesh.replica > 1 else link
    summed = 2 * 4 * s.held * _ring(mesh.replica) / between  # gradients over replicas
    sums = {"none": 4, "dots": 6, "full": 6}[remat]  # of activations, per layer
    activations = config.model.layers * parts * s.tokens * config.model.width * s.item
    not_overlapped = 2 * sums * activations * _ring(mesh.model) / link
    if chip.platform == "tpu":
        return gather, scatter + summed + not_overlapped
    return gather + scatter + summed, not_overlapped


def _ring(n: int) -> float:
    """Fraction of an array that a device sends in a ring all-gather or reduce-scatter over n."""
    return (n - 1) / n


def memory(config: RunConfig, mesh: Mesh) -> tuple[float, float]:
    """(arguments, temporaries): estimated bytes per device, to choose what to compile first.

    The compiler's numbers are authoritative. Not included: padding, fragmentation, head chunks.
    """
    s, m, remat = sizes(config, mesh), config.model, config.mesh.remat
    width, ffn = m.width, m.ffn
    key_values = 2 * width // m.heads * (m.kv_heads or m.heads)
    dots = 3 * width + (2 * width + key_values + 2 * ffn) / mesh.model  # what `dots` saves
    everything = dots + 5 * width + 3 * ffn / mesh.model
    saved = {"full": width, "dots": dots, "none": everything}[remat]
    activations = s.tokens * s.item * (m.layers * saved + 2 * everything * (remat != "none"))
    one_layer = s.layers if remat == "none" else 2 * s.layers / m.layers
    weights = s.item * one_layer * (mesh.data > 1) + s.outer * s.item
    weights += 4 * s.outer * (mesh.data > 1)  # their gradients, whole before they are scattered
    gradients = 4 * s.held * (2 if config.mesh.accumulate > 1 else 1)
    return state_bytes(config, s.held), activations + weights + gradients


def state_bytes(config: RunConfig, params: float) -> float:
    """Value, two moments and the average, if there is one, in float32."""
    return params * (12 + 4 * (config.optim.ema > 0))


def of_run(config: RunConfig, mesh: Mesh, device_kind: str, slices: int = 1) -> dict | None:
    """The field `predicted` of result.json; None for devices that are not in the table."""
    chip = of_device(device_kind)
    if chip is None:
        return None
    prediction = predict(config, mesh, chip, slices).as_dict()
    return {**prediction, "memory_bytes": sum(memory(config, mesh))}
