"""What a run is: frozen dataclasses, and the hash that identifies the result.

Identity (`run_id`) covers everything that determines the numbers and nothing else: paths, mesh,
checkpoint cadence and logging are left out, so a run keeps its name wherever it executes.
"""

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from prime_jax.errors import UserError
from prime_jax.settings import Checked, flatten, setting, to_dict
from prime_jax.settings import from_dict as from_dict
from prime_jax.settings import nearest as nearest
from prime_jax.settings import set_path as set_path

Family = Literal["arm", "mdm", "prime"]
FAMILIES: tuple[Family, ...] = typing.get_args(Family)

HERE = {"excluded_from_identity": True}  # where and how a run executes, not what it is
ADDED = {"excluded_at_default": True}  # a setting that came later: older runs keep their identity
ENDS = ("steps", "optim.cooldown_fraction", "optim.final_lr_fraction")  # of a run, not its way


@dataclass(frozen=True)
class ModelConfig(Checked, path="model"):
    """The transformer shared by all families (theory.md, "The backbone")."""

    vocab_size: int = setting(1024, "token ids V, end of text included", at_least=1)
    layers: int = setting(4, "transformer blocks", at_least=1)
    width: int = setting(128, "width D of the residual stream", at_least=1)
    heads: int = setting(2, "attention heads; the head size is width / heads", at_least=1)
    kv_heads: int = setting(
        0, "key-value heads (grouped-query attention); 0: as many as heads", at_least=0
    )
    ffn_multiple: int = setting(4, "hidden width of SwiGLU, as a multiple of width", at_least=1)
    ffn_width: int = setting(
        0, "hidden width of SwiGLU; 0: ffn_multiple times width", at_least=0, **ADDED
    )
    embedding: Literal["cat_shared", "cat", "sum"] = setting(
        "cat_shared", "how the vectors of a token's sub-tokens become one"
    )
    tied_head: bool = setting(False, "the head reuses the token embedding; only for arm and l = 1")
    qk_norm: bool = setting(True, "RMS norm of queries and keys, per head")
    dropout: float = setting(0.0, "dropout rate in training", at_least=0, below=1)
    rope_base: float = setting(10_000.0, "base of the rotary position embedding", above=0)
    rope_tables: Literal["float32", "bfloat16"] = setting(
        "float32",
        "precision of RoPE's cosines and sines; bfloat16 in the published lit_gpt runs",
        **ADDED,
    )
    norm_eps: float = setting(1e-5, "epsilon of the RMS norms", above=0)
    init_std: float = setting(0.02, "standard deviation of the initial weights", above=0)
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "precision of the computation; parameters stay float32"
    )

    @property
    def ffn(self) -> int:
        """SwiGLU's hidden width F."""
        return self.ffn_width or self.ffn_multiple * self.width


@dataclass(frozen=True)
class SubtokenConfig(Checked, path="subtokens"):
    """How a token id becomes `length` digits (theory.md, "Sub-token codes")."""

    length: int = setting(
        1, "sub-tokens per token, l; 1 is plain masked diffusion", at_least=1, at_most=32
    )
    shuffle: float = setting(
        1.0,
        "fraction of the codes that is permuted; 0: none, an id is its code",
        at_least=0,
        at_most=1,
    )
    scope: Literal["vocab", "codes"] = setting(
        "vocab", "permute the first V codes, or all b**l of them"
    )
    seed: int = setting(0, "seed of the permutation", at_least=0)
    codes: str = setting(
        "",
        "hash of the codes of codes_file or of imported weights; filled in automatically",
        **ADDED,
    )
    codes_file: str = setting(
        "", "file of codes from `prime-jax data codes`, in place of the permutation", **HERE
    )


@dataclass(frozen=True)
class ObjectiveConfig(Checked, path="objective"):
    """Forward process and training loss; ignored by `arm` (theory.md, "Forward process")."""

    loss: Literal["marginal", "joint"] = setting(
        "marginal", "training loss; marginal is a bound, joint the published loss, which is none"
    )
    carry_over: bool = setting(
        True, "tokens that disagree with a visible sub-token get no probability"
    )
    weight: Literal["nelbo", "flat"] = setting(
        "nelbo", "weight of a time: nelbo is w(t), flat is 1 and not a bound"
    )
    times: Literal["uniform", "bell"] = setting(
        "uniform",
        "distribution of training times; bell: around one half, weighted so that the loss estimates "
        "the same bound (with weight flat: not weighted); needs the linear schedule",
        **ADDED,
    )
    times_sd: float = setting(
        0.2, "standard deviation of bell before it is cut to [0, 1]", at_least=0.15, **ADDED
    )
    schedule: Literal["linear", "log-linear", "cosine", "poly", "geometric"] = setting(
        "linear", "masked fraction as a function of time"
    )
    power: float = setting(2.0, "exponent K of the poly schedule", above=0)
    sigma_min: float = setting(1e-4, "smallest sigma of the geometric schedule", above=0)
    sigma_max: float = setting(20.0, "largest sigma of the geometric schedule", above=0)
    time_eps: float = setting(1e-6, "smallest training time", above=0, below=1)
    token_mask_rho: float = setting(
        0.0, "fraction of sequences whose masks cover whole tokens", at_least=0, at_most=1
    )
    random_length: float = setting(
        0.0, "fraction of sequences cut to a random length", at_least=0, at_most=1
    )
    block_length: int = setting(
        0,
        "block diffusion (BD3-LM): tokens per block, blocks left to right; 0: one block",
        at_least=0,
        **ADDED,
    )
    time_steps: int = setting(
        0, "train at the discrete times i / n (D3PM); 0: continuous time", at_least=0, **ADDED
    )


@dataclass(frozen=True)
class DataConfig(Checked, path="data"):
    """A prepared dataset. `fingerprint` (of the manifest) is its identity, the path is not."""

    path: str = setting("data/quickstart", "folder made by `prime-jax data prepare`", **HERE)
    fingerprint: str = setting(
        "", "hash of the dataset; filled in automatically, a given value must match"
    )
    seq_len: int = setting(128, "tokens per sequence, L", at_least=1)
    unique_tokens: int = setting(
        0,
        "train on the first so many tokens of the training split, in whole blocks, again and again; 0: on all",
        at_least=0,
        **ADDED,
    )
    segment_ids: bool = setting(
        False, "attention stays inside documents; results are marked `given: lengths`"
    )

    @property
    def unique_blocks(self) -> int:
        """Blocks of the training split that are used, the first ones; 0: all."""
        return self.unique_tokens // self.seq_len


@dataclass(frozen=True)
class BaseShape(Checked, path="optim.base"):
    """The shape that a learning rate was tuned for; in a run's identity only with a transfer."""

    layers: int = setting(0, "transformer blocks; 0: not given", at_least=0)
    width: int = setting(0, "of the residual stream; 0: not given", at_least=0)
    heads: int = setting(0, "attention heads; 0: not given", at_least=0)
    ffn_multiple: int = setting(4, "SwiGLU's hidden width is this times width", at_least=1)

    @property
    def given(self) -> bool:
        return 0 not in (self.layers, self.width, self.heads)


@dataclass(frozen=True)
class OptimConfig(Checked, path="optim"):
    """AdamW (weight decay on matrices only) and its learning-rate schedule."""

    peak_lr: float = setting(
        2e-4, "learning rate after warm-up; of the base shape if it is transferred", above=0
    )
    final_lr_fraction: float = setting(
        0.1, "learning rate at the end, as a fraction of the peak", at_least=0, at_most=1
    )
    warmup_steps: int = setting(
        1000, "steps in which the learning rate rises to its peak", at_least=0
    )
    schedule: Literal["cosine", "wsd"] = setting(
        "cosine", "learning-rate schedule; wsd: warm-up, constant, then decay"
    )
    cooldown_fraction: float = setting(
        0.2, "wsd: fraction of the steps with a falling learning rate", at_least=0, at_most=1
    )
    b1: float = setting(0.9, "beta_1 of Adam", at_least=0, below=1)
    b2: float = setting(0.95, "beta_2 of Adam", at_least=0, below=1)
    eps: float = setting(1e-8, "epsilon of Adam", above=0)
    weight_decay: float = setting(0.1, "weight decay of matrices", at_least=0)
    clip: float = setting(
        1.0,
        "clipping of the global gradient norm; 0: off. It does not transfer to other shapes",
        at_least=0,
    )
    ema: float = setting(
        0.0,
        "decay of the exponential average of parameters, which is then evaluated; 0: off",
        at_least=0,
        below=1,
    )
    transfer: Literal["none", "completep"] = setting(
        "none",
        "completep: initial weights, rates, decay and eps are those of the base shape, scaled to "
        "the width and layers of this one (theory.md, Transfer of learning rates)",
        **ADDED,
    )
    base: BaseShape = setting(BaseShape(), "the shape that transfer starts from", **ADDED)


@dataclass(frozen=True)
class EvalConfig(Checked, path="eval"):
    """Likelihood on the validation split; `subtoken` and `token` are valid bounds."""

    examples: int = setting(256, "blocks of the validation split; 0: all of them", at_least=0)
    replicates: int = setting(
        8, "independent Monte-Carlo passes, from which se_mc comes", at_least=1
    )
    estimators: tuple[str, ...] = setting(
        ("subtoken", "token"), "estimators of the likelihood; docs/evaluation.md lists them"
    )
    every: int = setting(0, "steps between evaluations; 0: only at the end", at_least=0, **HERE)
    batch_size: int = setting(32, "blocks per call; does not change results", at_least=1, **HERE)


@dataclass(frozen=True)
class MeshConfig(Checked, path="mesh"):
    """Where a run executes; the numbers change by rounding at most."""

    replica: int = setting(
        0,
        "groups of devices that split the batch; each holds all parameters; 0: automatic",
        at_least=0,
    )
    data: int = setting(
        0, "devices that split the batch and the parameters; 0: automatic", at_least=0
    )
    model: int = setting(
        0, "devices that split heads, feed-forward and vocabulary; 0: automatic", at_least=0
    )
    accumulate: int = setting(1, "micro-batches per step", at_least=1)
    remat: Literal["none", "dots", "full"] = setting(
        "dots", "what the backward pass recomputes: nothing, all but matrix products, or everything"
    )


@dataclass(frozen=True)
class KernelConfig(Checked, path="kernels"):
    """Which implementation computes the heavy parts; the numbers change by rounding at most."""

    RETIRED: ClassVar = {"head_skip": False}

    head: Literal["auto", "pallas", "xla"] = setting(
        "auto", "implementation of projection and loss; auto: as `prime-jax doctor` shows"
    )
    attention: Literal["auto", "pallas", "splash", "cudnn", "xla", "scan"] = setting(
        "auto", "implementation of attention"
    )
    embedding: Literal["auto", "pallas", "xla"] = setting(
        "auto", "implementation of the embedding of sub-tokens"
    )
    head_blocks: tuple[int, ...] = setting(
        (), "block sizes of the head kernel; none: its own choice", at_least=1
    )
    attention_blocks: tuple[int, ...] = setting(
        (), "block sizes of the attention kernel; none: its own choice", at_least=1
    )


@dataclass(frozen=True)
class CheckpointConfig(Checked, path="checkpoint"):
    """When a run is saved, and what stays."""

    every: int = setting(
        0, "steps between checkpoints; 0: only at the end and when interrupted", at_least=0
    )
    minutes: float = setting(10.0, "longest time between checkpoints, minutes; 0: off", at_least=0)
    keep: int = setting(2, "how many of the newest checkpoints are kept", at_least=1)
    keep_every: int = setting(
        0, "also keep every checkpoint at a multiple of this many steps; 0: none", at_least=0
    )
    grace_seconds: float = setting(
        0.0, "time that a signal leaves for saving, seconds; 0: unlimited", at_least=0
    )


@dataclass(frozen=True)
class LogConfig(Checked, path="log"):
    """What a run writes down on its way."""

    every: int = setting(10, "steps between rows of metrics.jsonl", at_least=1)
    profile: int = setting(
        0, "number of steps to trace for xprof, after the first few; 0: none", at_least=0
    )
    tensorboard: bool = setting(False, "also write TensorBoard files")
    wandb: str = setting("", "Weights & Biases project; empty: off")


@dataclass(frozen=True)
class RunConfig(Checked):
    """One training run, complete."""

    family: Family = setting(
        "prime",
        "arm: autoregressive; mdm: masked diffusion; prime: masked diffusion over sub-tokens",
    )
    # JAX's keys take 32 bits.
    seed: int = setting(0, "seed of weights, masks and data order", at_least=0, at_most=2**32 - 1)
    steps: int = setting(1000, "optimizer steps", at_least=1)
    batch_size: int = setting(
        16, "sequences per step, over all devices and micro-batches", at_least=1
    )
    initial_weights: str = setting(
        "",
        "hash of the weights that the run starts from (--init-from); empty: from the seed",
        **ADDED,
    )
    model: ModelConfig = setting(ModelConfig(), "the transformer")
    subtokens: SubtokenConfig = setting(SubtokenConfig(), "codes of tokens")
    objective: ObjectiveConfig = setting(ObjectiveConfig(), "forward process and loss")
    data: DataConfig = setting(DataConfig(), "what is read")
    optim: OptimConfig = setting(OptimConfig(), "AdamW and its schedule")
    eval: EvalConfig = setting(EvalConfig(), "likelihood at the end")
    mesh: MeshConfig = setting(MeshConfig(), "where a run executes", **HERE)
    kernels: KernelConfig = setting(KernelConfig(), "how it is computed", **HERE)
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), "when it is saved", **HERE)
    log: LogConfig = setting(LogConfig(), "what it writes down", **HERE)

    @property
    def tokens(self) -> int:
        """Training tokens D = steps x batch x length (cut sequences count in full)."""
        return self.steps * self.batch_size * self.data.seq_len

    @property
    def sequences_read(self) -> int:
        """Sequences that the network reads per sequence: block diffusion adds the clean one."""
        return 2 if self.objective.block_length else 1


def run_id(config: RunConfig) -> str:
    """Ten hex digits that name the result of `config` (see the module docstring)."""
    return _name(_identity(config))


def trajectory_id(config: RunConfig) -> str:
    """Ten hex digits that name the states of a run until its learning rate leaves the plateau.

    Runs of one trajectory differ in how long they are, how they cool down and how they are
    evaluated; both are in the same state after every step up to the smaller `constant_steps`.
    """
    return _name(trajectory_settings(config))


def trajectory_settings(config: RunConfig) -> dict[str, Any]:
    """The dotted settings that make up a trajectory."""
    identity = flatten(_identity(config))
    return {k: v for k, v in identity.items() if k not in ENDS and not k.startswith("eval.")}


def constant_steps(config: RunConfig) -> int:
    """Steps before the first one at which the learning rate is below the plateau; 0 without one.

    In float32, as `optim.learning_rate` has it.
    """
    o, steps = config.optim, np.float32(config.steps)
    if o.schedule != "wsd":
        return 0
    return int(steps - max(np.float32(o.cooldown_fraction) * steps, np.float32(1)))


def _name(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """The settings by which two configs are two runs: `steps = 60, not 80`."""
    first, second = (flatten(_identity(config)) for config in (one, other))
    default = flatten(to_dict(RunConfig()))
    value = lambda of, name: of.get(name, default.get(name))  # noqa: E731
    return [
        f"{name} = {value(first, name)}, not {value(second, name)}"
        for name in dict.fromkeys([*first, *second])
        if value(first, name) != value(second, name)
    ]


def _identity(config: RunConfig) -> dict[str, Any]:
    """The settings that make a run what it is."""
    optim, objective = config.optim, config.objective
    if optim.transfer == "none":  # nothing is transferred from the base shape
        optim = dataclasses.replace(optim, base=BaseShape())
    if objective.times == "uniform":  # without a spread
        objective = dataclasses.replace(objective, times_sd=ObjectiveConfig.times_sd)
    config = dataclasses.replace(config, optim=optim, objective=objective)
    return to_dict(config, _identifies)


def _identifies(field: dataclasses.Field, value: Any) -> bool:
    """Whether a setting at this value is part of what a run is."""
    at_default = field.metadata.get("excluded_at_default") and value == field.default
    return not (at_default or field.metadata.get("excluded_from_identity"))


def validate(config: RunConfig) -> RunConfig:
    """Return `config` if its parts fit together; each checked itself when it was made.

    Not in `__post_init__`: settings are replaced one by one, and fit only in the end.

    Raises:
        UserError: naming the setting, its value and what would be right.
    """
    m, s, o = config.model, config.subtokens, config.objective
    block, length = o.block_length, config.data.seq_len
    parts = config.mesh.accumulate
    if "://" in config.data.path:
        right = "must be a local folder; `sweep up` and `render` copy prepared data there (--data)"
        raise _wrong("data.path", config.data.path, right)
    if 0 < config.data.unique_tokens < length:
        right = f"must be 0, or hold a block of data.seq_len {length} tokens"
        raise _wrong("data.unique_tokens", config.data.unique_tokens, right)
    if m.width % (2 * m.heads):
        raise _wrong("model.heads", m.heads, f"the head size must be even: width {m.width}")
    if m.heads % (m.kv_heads or m.heads):
        raise _wrong("model.kv_heads", m.kv_heads, f"must divide heads {m.heads}")
    if config.family != "prime" and s.length != 1:
        right = f"must be 1 for family {config.family}; use family prime"
        raise _wrong("subtokens.length", s.length, right)
    if m.tied_head and s.length != 1:
        raise _wrong("model.tied_head", m.tied_head, "needs subtokens.length 1")
    drawn = dataclasses.replace(SubtokenConfig(), length=s.length)
    if s.codes_file and dataclasses.replace(s, codes="", codes_file="") != drawn:
        right = "shuffle, scope and seed mean nothing for codes from a file; leave them out"
        raise _wrong("subtokens.codes_file", s.codes_file, right)
    if m.embedding != "sum" and s.length > m.width:
        raise _wrong("subtokens.length", s.length, f"{m.embedding} needs a width of at least that")
    if config.batch_size % parts:
        raise _wrong("batch_size", config.batch_size, f"must be a multiple of accumulate {parts}")
    if block and length % block:
        right = f"must divide data.seq_len {length}, or be 0 for one block"
        raise _wrong("objective.block_length", block, right)
    if block and config.family == "arm":
        raise _wrong("objective.block_length", block, "family arm has no blocks; use mdm or prime")
    if o.times == "bell" and (o.schedule != "linear" or o.time_steps):
        other = f"time_steps {o.time_steps}" if o.time_steps else f"schedule {o.schedule}"
        right = (
            f"needs schedule linear and time_steps 0, not {other}: it draws the mask probability"
        )
        raise _wrong("objective.times", o.times, right)
    rising, steps = config.optim.warmup_steps, config.steps
    if rising >= steps:
        right = f"must be below steps {steps}, or the rate never reaches its peak"
        raise _wrong("optim.warmup_steps", rising, f"{right}; {steps // 10} would be a tenth")
    if config.optim.schedule == "wsd" and rising > steps * (1 - config.optim.cooldown_fraction):
        right = f"leaves no step between warm-up ({rising} steps) and cool-down, of {steps}"
        raise _wrong("optim.cooldown_fraction", config.optim.cooldown_fraction, right)
    if config.optim.transfer != "none":
        _validate_transfer(config.optim, m)
    return config


def _validate_transfer(optim: OptimConfig, model: ModelConfig) -> None:
    base = optim.base
    if not base.given:
        right = "needs the shape that the rate is for: optim.base.layers, .width and .heads"
        raise _wrong("optim.transfer", optim.transfer, right)
    if base.width % base.heads:
        raise _wrong("optim.base.heads", base.heads, f"must divide optim.base.width {base.width}")
    if model.tied_head:
        right = "must be False with optim.transfer, which scales the head apart from the embedding"
        raise _wrong("model.tied_head", model.tied_head, right)
    if not model.qk_norm:
        right = "must be True with optim.transfer, whose attention logits rest on it"
        raise _wrong("model.qk_norm", model.qk_norm, right)
    size = base.width // base.heads
    if model.width != size * model.heads:
        right = f"head size must be the base's with optim.transfer, {size}, at width {model.width}"
        raise _wrong("model.heads", model.heads, right)
    if model.ffn != base.ffn_multiple * model.width:
        name = "ffn_width" if model.ffn_width else "ffn_multiple"
        right = f"must be {base.ffn_multiple} times width with optim.transfer, as optim.base says"
        raise _wrong(f"model.{name}", getattr(model, name), right)


def remark(config: RunConfig) -> str:
    """What a run is that its settings call something else; empty if there is nothing to say."""
    if config.family == "prime" and config.subtokens.length == 1:
        return "family prime with subtokens.length 1 is family mdm: set a length above 1"
    return ""


def _wrong(name: str, value: Any, right: str) -> UserError:
    return UserError(f"{name} = {value}: {right}")
