"""The training step: a pure, compiled function of (state, batch, horizon).

Everything that differs between cells of one shape is an argument, so a sweep compiles each shape
once. A step is a function of (seed, step, tokens): a resumed run is identical bit for bit.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from prime_jax import optim
from prime_jax.config import RunConfig
from prime_jax.corrupt import step_key
from prime_jax.hardware import chips
from prime_jax.kernels import selection
from prime_jax.kernels.subtoken_head import HeadLoss
from prime_jax.model import Transformer, build
from prime_jax.objectives import loss_sums, make_head, training_inputs
from prime_jax.runtime import meshes, sharding
from prime_jax.runtime.metrics import Clock
from prime_jax.runtime.sharding import Shardings
from prime_jax.subtokens import Codebook


class State(NamedTuple):
    """The content of a checkpoint. `ema` is an empty dict without a moving average."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


class Metrics(NamedTuple):
    """Scalars of one step. Losses are nats per target token; only `loss` was differentiated."""

    loss: jax.Array
    marginal: jax.Array
    joint: jax.Array
    grad_norm: jax.Array
    lr: jax.Array


class Compiled:
    """A function of one shape, compiled at its first call and timed by the clock.

    Args:
        name: for the warning that a kernel does not compile and plain XLA replaces it.
        make: returns the jitted function for a config; called inside the mesh.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig,
        mesh: Mesh | AbstractMesh,
        make: Callable[[RunConfig], Any],
    ):
        self.name, self.config, self.mesh, self.make = name, config, mesh, make
        self.plain = dataclasses.replace(config, kernels=selection.PLAIN)
        self.executable: Any = None
        self.kernels = config.kernels  # of the program that was made at last

    def __call__(self, clock: Clock, *args: Any) -> Any:
        if self.executable is None:
            with clock.measure("compile"):
                self.executable = self.compile(*args)
        return self.executable(*args)

    def compile(self, *args: Any, lowered: Any = None) -> Any:
        """Compiled for the mesh; `args` may be shapes with shardings.

        Args:
            lowered: what `lowered(*args)` gave, where it is there already.
        """
        options = chips.compiler_options(self.mesh.devices.flat[0].device_kind)
        lowered = lowered or self.lowered(*args)
        plain = lambda: self._lower_plain(*args).compile(options)  # noqa: E731
        return selection.fallback(lambda: lowered.compile(options), plain, self.name)

    def lowered(self, *args: Any) -> Any:
        """The program that the compiler is shown: plain XLA where a kernel cannot be traced."""
        plain = lambda: self._lower_plain(*args)  # noqa: E731
        return selection.fallback(lambda: self.lower(*args), plain, self.name)

    def _lower_plain(self, *args: Any) -> Any:
        self.kernels = selection.PLAIN
        return self.lower(*args, config=self.plain)

    def lower(self, *args: Any, config: RunConfig | None = None) -> Any:
        """Lowered for the mesh, which may be abstract."""
        config = config or self.config
        if isinstance(self.mesh, AbstractMesh):
            with jax.sharding.use_abstract_mesh(self.mesh):
                return self.make(config).trace(*args).lower(lowering_platforms=("tpu",))
        with jax.set_mesh(self.mesh):
            return self.make(config).lower(*args)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The compiled functions that train one shape on one mesh."""

    parts: "Parts"
    mesh_choice: meshes.Choice
    abstract: State  # shapes and shardings
    init: Any  # (clock, seed) -> State
    train: Compiled  # (clock, state, tokens, rows, seed, horizon) -> (state, Metrics)

    @property
    def codebook(self) -> Codebook:
        return self.parts.codebook

    @property
    def mesh(self) -> Mesh | AbstractMesh:
        return self.parts.mesh


def shape_of(config: RunConfig) -> RunConfig:
    """`config` with all settings that the compiled step does not depend on set to constants."""
    o = dataclasses.replace(
        config.optim, peak_lr=1.0, warmup_steps=0, final_lr_fraction=0.0, cooldown_fraction=0.0
    )
    blank = RunConfig()
    return dataclasses.replace(
        config,
        seed=0,
        steps=1,
        initial_weights="",
        subtokens=dataclasses.replace(config.subtokens, codes_file=""),
        optim=o,
        data=dataclasses.replace(config.data, path="", fingerprint=""),
        eval=dataclasses.replace(blank.eval, estimators=(), batch_size=config.eval.batch_size),
        checkpoint=blank.checkpoint,
        log=blank.log,
    )


def program(config: RunConfig, eos_id: int, codebook: Codebook | None = None) -> Program:
    """The functions that train `config`; shared by all configs of one shape.

    Args:
        codebook: of a file or imported weights; by default the one that the config describes.
    """
    kernels = selection.resolved(config, jax.devices()[0].device_kind)
    return _program(dataclasses.replace(shape_of(config), kernels=kernels), eos_id, codebook)


@lru_cache(maxsize=32)
def _program(config: RunConfig, eos_id: int, codebook: Codebook | None) -> Program:
    chips.keep_heap()
    return make_program(config, eos_id, jax.devices(), codebook)


def make_program(
    config: RunConfig,
    eos_id: int,
    devices: Sequence[Any] | int,
    codebook: Codebook | None = None,
) -> Program:
    """The program of `config` on `devices`, which may be those of a topology description.

    Given only their number, it can be lowered for a TPU but neither compiled nor run.
    """
    codebook = codebook or Codebook.create(config.model.vocab_size, config.subtokens)
    mesh, choice = meshes.make(config, devices)
    tx = optim.optimizer(config)
    init, abstract = _make_init(config, codebook, tx, mesh)
    shardings = Shardings.of(mesh)
    parts = Parts(
        config=config,
        codebook=codebook,
        mesh=mesh,
        shardings=shardings,
        specs=shardings.specs(abstract.params),
        eos_id=eos_id,
    )

    def train(config: RunConfig) -> Any:
        return _train_function(parts._replace(config=config), tx)

    return Program(
        parts=parts,
        mesh_choice=choice,
        abstract=abstract,
        init=init,
        train=Compiled("training step", config, mesh, train),
    )


class Parts(NamedTuple):
    """What all functions of a program share: config, codebook, mesh and shardings."""

    config: RunConfig
    codebook: Codebook
    mesh: Mesh | AbstractMesh
    shardings: Shardings
    specs: Any  # of the parameters
    eos_id: int

    def network(self) -> Transformer:
        return build(self.config, self.codebook, self.shardings)

    def head_axis(self) -> str | None:
        return self.shardings.head_axis(self.config.model)


def _make_init(config: RunConfig, codebook: Codebook, tx, mesh: Mesh):
    """(clock, seed) -> State, and the shapes and shardings of that state."""
    digits = jnp.zeros((1, config.data.seq_len, codebook.length), jnp.int32)

    plain = dataclasses.replace(
        config, kernels=selection.PLAIN
    )  # parameters do not depend on kernels

    def values(seed):
        network, key = build(plain, codebook), jax.random.fold_in(jax.random.key(seed), 0x1417)
        return optim.initial(network.init(key, digits)["params"], config)

    specs = Shardings.of(mesh).specs(jax.eval_shape(values, np.uint32(0)))

    def init(seed) -> State:
        place = lambda x, spec: jax.reshard(x, NamedSharding(mesh, spec))  # noqa: E731
        params = jax.tree.map(place, values(seed), specs)
        ema = jax.tree.map(jnp.copy, params) if config.optim.ema else {}
        step = place(jnp.zeros((), jnp.int32), sharding.REPLICATED)
        return State(step, params, tx.init(params), ema)  # which inherits their shardings

    compiled = Compiled("initialisation", config, mesh, lambda _: jax.jit(init))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shapes = jax.eval_shape(init, np.uint32(0))

    def on_mesh(x):
        spec = x.sharding.spec if x.sharding else sharding.REPLICATED
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    abstract = jax.tree.map(on_mesh, shapes)
    return lambda clock, seed: compiled(clock, np.uint32(seed)), abstract


def _train_function(p: Parts, tx) -> Any:
    config, codebook, eos_id = p.config, p.codebook, p.eos_id
    network, head = p.network(), make_head(config, codebook, p.head_axis())
    chosen = config.objective.loss
    parts = config.mesh.accumulate

    def sums(params, tokens_BxL, row_B, key):
        """(gradient, loss sums, target tokens) of some rows, in float32."""
        inputs = training_inputs(
            config, book=codebook, token_BxL=tokens_BxL, row_B=row_B, key=key, eos_id=eos_id
        )
        dropout_key = jax.random.fold_in(key, 1) if config.model.dropout else None

        def objective(params):
            apply = lambda *args: network.apply({"params": params}, *args)  # noqa: E731
            losses = loss_sums(head, apply, inputs, dropout_key, row_B)
            return getattr(losses, chosen), losses

        gradient, losses = jax.grad(objective, has_aux=True)(params)
        return gradient, losses, inputs.target_BxL.sum().astype(jnp.float32)

    def device_sums(params, tokens_BxL, row_B, key):
        """Sums over micro-batches and devices; they are normalised by the whole batch later."""
        split = lambda x: x.reshape(parts, -1, *x.shape[1:])  # noqa: E731

        def micro(carry, part):
            return jax.tree.map(jnp.add, carry, sums(params, *part, key)), None

        if parts == 1:
            total = sums(params, tokens_BxL, row_B, key)
        else:
            zero = jnp.zeros((), jnp.float32)
            start = (jax.tree.map(jnp.zeros_like, params), HeadLoss(zero, zero), zero)
            total, _ = jax.lax.scan(micro, start, (split(tokens_BxL), split(row_B)))
        gradient, losses, n_tokens = total
        total_sums = jax.lax.psum((losses, n_tokens), (sharding.REPLICA, sharding.DATA))
        return p.shardings.summed(gradient, p.specs), *total_sums

    all_sums = sharding.per_device(
        device_sums,
        p.mesh,
        (p.specs, sharding.BATCH, sharding.BATCH, sharding.REPLICATED),
        (p.specs, sharding.REPLICATED, sharding.REPLICATED),
    )

    @jax.jit(donate_argnames="state")
    def train(state: State, tokens_BxL, row_B, seed, horizon: optim.Horizon):
        key = step_key(seed, state.step)
        gradient, losses, n_tokens = all_sums(state.params, tokens_BxL, row_B, key)
        gradient = jax.tree.map(lambda g: g / n_tokens, gradient)
        losses = jax.tree.map(lambda x: x / n_tokens, losses)
        lr = optim.learning_rate(config.optim.schedule, horizon, state.step)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optim.apply(state.params, updates, lr)
        ema = state.ema
        if config.optim.ema:
            ema = optim.averaged(ema, params, config.optim.ema, state.step)
        norm = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(gradient)))
        metrics = Metrics(getattr(losses, chosen), losses.marginal, losses.joint, norm, lr)
        return State(state.step + 1, params, opt_state, ema), metrics

    return train
