"""What a run is: frozen dataclasses, strict reading, and the hash that identifies the result.

Identity (`run_id`) covers everything that determines the numbers and nothing else: paths, mesh,
checkpoint cadence and logging are left out, so a run keeps its name wherever it executes.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from prime_jax import ranges
from prime_jax.errors import UserError

Family = Literal["arm", "mdm", "prime"]
FAMILIES: tuple[Family, ...] = typing.get_args(Family)
T = TypeVar("T")

HERE = {"excluded_from_identity": True}  # where and how a run executes, not what it is
ADDED = {"excluded_at_default": True}  # a setting that came later: older runs keep their identity
RETIRED = {"kernels.head_skip": False}  # settings that are gone; stored runs hold their default


@dataclass(frozen=True)
class ModelConfig:
    """The transformer shared by all families (theory.md, "The backbone")."""

    vocab_size: int = 1024
    layers: int = 4
    width: int = 128
    heads: int = 2
    kv_heads: int = 0  # grouped-query attention; 0 means as many as heads
    ffn_multiple: int = 4  # SwiGLU hidden width = ffn_multiple * width
    embedding: Literal["cat_shared", "cat", "sum"] = "cat_shared"
    tied_head: bool = False  # ARM and l = 1 only: the head reuses the token embedding
    qk_norm: bool = True
    dropout: float = 0.0
    rope_base: float = 10_000.0
    # What RoPE's cosines and sines are rounded to; bfloat16 in the published lit_gpt runs.
    rope_tables: Literal["float32", "bfloat16"] = field(default="float32", metadata=ADDED)
    norm_eps: float = 1e-5
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16"] = "float32"  # compute; parameters stay float32


@dataclass(frozen=True)
class SubtokenConfig:
    """How a token id becomes `length` digits (theory.md, "Sub-token codes")."""

    length: int = 1  # l, the granularity; 1 is plain masked diffusion
    shuffle: float = 1.0  # fraction of the codes that is permuted; 0 is the identity
    scope: Literal["vocab", "codes"] = "vocab"  # permute the first V codes, or all b**l
    seed: int = 0
    codes: str = field(default="", metadata=ADDED)  # hash of codes that came with imported weights


@dataclass(frozen=True)
class ObjectiveConfig:
    """Forward process and training loss; ignored by `arm` (theory.md, "Forward process")."""

    loss: Literal["marginal", "joint"] = "marginal"  # joint is the published loss, not a bound
    carry_over: bool = True  # tokens that disagree with a visible sub-token get no probability
    weight: Literal["nelbo", "flat"] = "nelbo"  # flat: same integrand without w(t), not a bound
    schedule: Literal["linear", "log-linear", "cosine", "poly", "geometric"] = "linear"
    power: float = 2.0  # K of the poly schedule
    sigma_min: float = 1e-4  # geometric schedule
    sigma_max: float = 20.0
    time_eps: float = 1e-6  # smallest training time
    token_mask_rho: float = 0.0  # fraction of sequences whose masks cover whole tokens
    random_length: float = 0.0  # fraction of sequences cut to a random length
    # Block diffusion (BD3-LM): tokens of a block, finished left to right; 0: one block, all of L.
    block_length: int = field(default=0, metadata=ADDED)
    # Train at the discrete times i / n (D3PM); 0: continuous time.
    time_steps: int = field(default=0, metadata=ADDED)


@dataclass(frozen=True)
class DataConfig:
    """A prepared dataset. `fingerprint` (of the manifest) is its identity, the path is not."""

    path: str = field(default="data/quickstart", metadata=HERE)
    fingerprint: str = ""  # filled in from the manifest; a value given here must match it
    seq_len: int = 128
    segment_ids: bool = False  # attention stays inside documents; results say `given: lengths`


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (weight decay on matrices only) and its learning-rate schedule."""

    peak_lr: float = 2e-4
    final_lr_fraction: float = 0.1
    warmup_steps: int = 1000
    schedule: Literal["cosine", "wsd"] = "cosine"
    cooldown_fraction: float = 0.2  # wsd: fraction of the steps spent going down
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # global gradient norm; 0 turns clipping off
    ema: float = 0.0  # decay of the parameter average that is evaluated; 0 turns it off


@dataclass(frozen=True)
class EvalConfig:
    """Likelihood on the validation split; `subtoken` and `token` are valid bounds."""

    examples: int = 256  # blocks of the validation split; 0 means all of them
    replicates: int = 8  # independent Monte-Carlo passes, from which se_mc comes
    estimators: tuple[str, ...] = ("subtoken", "token")
    every: int = field(default=0, metadata=HERE)  # steps between evaluations; 0: at the end
    batch_size: int = field(default=32, metadata=HERE)


@dataclass(frozen=True)
class MeshConfig:
    """Where a run executes; the numbers change by rounding at most."""

    replica: int = 0  # groups of devices that share the batch, not the parameters; 0: automatic
    data: int = 0  # devices that share the batch and the parameters; 0: automatic
    model: int = 0  # devices that split heads, feed-forward and vocabulary; 0: automatic
    accumulate: int = 1  # micro-batches per step
    remat: Literal["none", "dots", "full"] = "dots"  # what a backward pass recomputes


@dataclass(frozen=True)
class KernelConfig:
    """Which implementation computes the heavy parts; the numbers change by rounding at most.

    `auto` asks the table of `kernels/selection.py`. Empty blocks are the kernel's own choice.
    """

    head: Literal["auto", "pallas", "xla"] = "auto"
    attention: Literal["auto", "pallas", "splash", "cudnn", "xla", "scan"] = "auto"
    embedding: Literal["auto", "pallas", "xla"] = "auto"
    head_blocks: tuple[int, ...] = ()
    attention_blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0  # steps between checkpoints; 0: only at the end and when interrupted
    minutes: float = 10.0  # and at least this often; 0 turns it off
    keep: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # and those of every so many steps, for good; 0: none
    grace_seconds: float = 0.0  # a signal leaves this long for a save; 0: as long as it takes


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between rows of metrics.jsonl
    profile: int = 0  # steps to trace for xprof, after the first few; 0: none
    tensorboard: bool = False
    wandb: str = ""  # project name; empty means off


@dataclass(frozen=True)
class RunConfig:
    """One training run, complete."""

    family: Family = "prime"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 16  # sequences per step, over all devices and micro-batches
    model: ModelConfig = ModelConfig()
    subtokens: SubtokenConfig = SubtokenConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = field(default=MeshConfig(), metadata=HERE)
    kernels: KernelConfig = field(default=KernelConfig(), metadata=HERE)
    checkpoint: CheckpointConfig = field(default=CheckpointConfig(), metadata=HERE)
    log: LogConfig = field(default=LogConfig(), metadata=HERE)

    @property
    def tokens(self) -> int:
        """Training tokens D = steps x batch x length (cut sequences count in full)."""
        return self.steps * self.batch_size * self.data.seq_len

    @property
    def sequences_read(self) -> int:
        """Sequences that the network reads per sequence: block diffusion adds the clean one."""
        return 2 if self.objective.block_length else 1


def to_dict(config: Any, *, identity_only: bool = False) -> dict[str, Any]:
    """Nested plain dict of a config; with `identity_only`, only what makes a run's identity."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        at_default = f.metadata.get("excluded_at_default") and value == f.default
        if identity_only and (at_default or f.metadata.get("excluded_from_identity")):
            continue
        if dataclasses.is_dataclass(value):
            value = to_dict(value, identity_only=identity_only)
        out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Strict inverse of `to_dict`; missing keys take their defaults, retired ones are passed over.

    Raises:
        UserError: an unknown key (with the nearest valid one), a value of the wrong type, or a
            retired setting that is not at its default.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object with the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    known = {}
    for key, value in values.items():
        path = f"{where}.{key}"
        if key in hints:
            known[key] = _typed(hints[key], value, path)
            continue
        gone = [default for name, default in RETIRED.items() if path.endswith(f".{name}")]
        if not gone:
            raise UserError(f"{path}: no such setting{nearest(key, hints)}")
        if value not in gone:
            raise UserError(
                f"{path} = {value!r}: a retired setting; only {gone[0]!r} is left of it"
            )
    return cls(**known)


def nearest(key: str, valid: typing.Iterable[str]) -> str:
    """A hint to append to "no such ...": the closest valid name, or all of them."""
    valid = list(valid)
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid are {', '.join(valid)}"


def allowed(cls: type, path: str) -> str:
    """What a dotted setting of the config class `cls` takes, in words."""
    head, _, rest = path.partition(".")
    hint = typing.get_type_hints(cls)[head]
    if rest:
        return allowed(hint, rest)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if typing.get_origin(hint) is tuple:
        return f"any number of {typing.get_args(hint)[0].__name__}"
    return "True or False" if hint is bool else hint.__name__


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(args[0], v, where) for v in value)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _typed(next(a for a in args if a is not type(None)), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    boolean_for_number = isinstance(value, bool) and hint is not bool
    if isinstance(hint, type) and isinstance(value, hint) and not boolean_for_number:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise UserError(f"{where}: expected {name}, got {value!r}")


def set_path(config: T, path: str, value: Any, prefix: str = "") -> T:
    """`config` with one dotted field replaced, e.g. `set_path(run, "model.width", 256)`."""
    head, _, rest = path.partition(".")
    hints = typing.get_type_hints(type(config))
    where = prefix + head
    if head not in hints:
        raise UserError(f"{where}: no such setting{nearest(head, hints)}")
    inner = getattr(config, head)
    if not rest:
        new = _typed(hints[head], value, where)
    elif dataclasses.is_dataclass(inner):
        new = set_path(inner, rest, value, f"{where}.")
    else:
        raise UserError(f"{where}.{rest}: {where} is one value, without settings inside")
    return dataclasses.replace(config, **{head: new})


def run_id(config: RunConfig) -> str:
    """Ten hex digits that name the result of `config` (see the module docstring)."""
    canonical = json.dumps(to_dict(config, identity_only=True), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def validate(config: RunConfig) -> RunConfig:
    """Return `config` if its values are of their types and in range, and its parts fit together.

    Raises:
        UserError: naming the setting, its value and what would be right.
    """
    from_dict(RunConfig, to_dict(config))
    ranges.check(config)
    m, s, o = config.model, config.subtokens, config.objective
    _require(
        m.width % (2 * m.heads) == 0,
        "model.heads",
        m.heads,
        f"the head size must be even: width {m.width}",
    )
    _require(
        m.heads % (m.kv_heads or m.heads) == 0,
        "model.kv_heads",
        m.kv_heads,
        f"must divide heads {m.heads}",
    )
    one = config.family == "prime" or s.length == 1
    _require(
        one, "subtokens.length", s.length, f"must be 1 for family {config.family}; use family prime"
    )
    _require(
        not m.tied_head or s.length == 1, "model.tied_head", m.tied_head, "needs subtokens.length 1"
    )
    fits = m.embedding == "sum" or s.length <= m.width
    _require(fits, "subtokens.length", s.length, f"{m.embedding} needs a width of at least that")
    per_step = config.batch_size % config.mesh.accumulate == 0
    _require(
        per_step,
        "batch_size",
        config.batch_size,
        f"must be a multiple of accumulate {config.mesh.accumulate}",
    )
    block, length = o.block_length, config.data.seq_len
    _require(
        block == 0 or length % block == 0,
        "objective.block_length",
        block,
        f"must divide data.seq_len {length}, or be 0 for one block",
    )
    _require(
        block == 0 or config.family != "arm",
        "objective.block_length",
        block,
        "family arm has no blocks; use mdm or prime",
    )
    return config


def _require(ok: bool, name: str, value: Any, right: str) -> None:
    if not ok:
        raise UserError(f"{name} = {value}: {right}")
