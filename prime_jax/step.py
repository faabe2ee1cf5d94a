"""The training step: a pure, compiled function of (state, batch, horizon).

Everything that differs between cells of one shape is an argument, so a sweep compiles each shape
once. A step is a function of (seed, step, tokens): resuming continues to the bit.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prime_jax import hardware, optim, sharding
from prime_jax.config import RunConfig
from prime_jax.corrupt import step_key
from prime_jax.evaluate import likelihood
from prime_jax.kernels import selection
from prime_jax.kernels.subtoken_head import HeadLoss
from prime_jax.metrics import Clock
from prime_jax.model import build
from prime_jax.objectives import loss_sums, make_head, training_inputs
from prime_jax.subtokens import Codebook


class State(NamedTuple):
    """What a checkpoint holds. `ema` is an empty dict unless an average is kept."""

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
    """A function of one shape, compiled at its first call; the clock is told how long.

    Args:
        name: for the warning that a kernel does not compile and plain XLA takes its place.
        make: the jitted function that computes what a config says.
    """

    def __init__(self, name: str, config: RunConfig, make: Callable[[RunConfig], Any]):
        self.name, self.config, self.make = name, config, make
        self.executable: Any = None

    def __call__(self, clock: Clock, *args: Any) -> Any:
        if self.executable is None:
            with clock.measure("compile"):
                self.executable = self.compile(args)
        return self.executable(*args)

    def compile(self, args: tuple) -> Any:
        def attempt(config: RunConfig) -> Any:
            options = hardware.compiler_options(jax.default_backend())
            return self.make(config).lower(*args).compile(options)

        plain = dataclasses.replace(self.config, kernels=selection.PLAIN)
        return selection.fallback(lambda: attempt(self.config), lambda: attempt(plain), self.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The compiled functions of one shape on one mesh."""

    config: RunConfig
    codebook: Codebook
    mesh: Mesh
    init: Any  # (clock, seed) -> State
    train: Compiled  # (clock, state, tokens, rows, seed, horizon) -> (state, Metrics)
    draw: Any  # (clock, estimator, params, tokens, row) -> {label: nats [B]}


def shape_of(config: RunConfig) -> RunConfig:
    """`config` with everything that the compiled step does not depend on set to a constant."""
    o = dataclasses.replace(
        config.optim, peak_lr=1.0, warmup_steps=0, final_lr_fraction=0.0, cooldown_fraction=0.0
    )
    blank = RunConfig()
    return dataclasses.replace(
        config,
        seed=0,
        steps=1,
        optim=o,
        data=dataclasses.replace(config.data, path="", fingerprint=""),
        eval=dataclasses.replace(blank.eval, estimators=(), batch_size=config.eval.batch_size),
        checkpoint=blank.checkpoint,
        log=blank.log,
    )


def program(config: RunConfig, eos_id: int) -> Program:
    """The functions that train and evaluate `config`; shared by all configs of one shape."""
    return _program(shape_of(config), eos_id)


@lru_cache(maxsize=32)
def _program(config: RunConfig, eos_id: int) -> Program:
    hardware.keep_heap()
    codebook = Codebook.create(config.model.vocab_size, config.subtokens)
    mesh = sharding.make_mesh(config.mesh, config.batch_size)
    tx = optim.optimizer(config.optim)
    train = partial(_train_function, codebook=codebook, tx=tx, mesh=mesh, eos_id=eos_id)
    return Program(
        config=config,
        codebook=codebook,
        mesh=mesh,
        init=_make_init(config, codebook, tx, mesh),
        train=Compiled("training step", config, train),
        draw=_make_draw(config, codebook, mesh, eos_id),
    )


def _make_init(config, codebook, tx, mesh):
    digits = jnp.zeros((1, config.data.seq_len, codebook.length), jnp.int32)

    def make(config: RunConfig) -> Any:
        network = build(config, codebook)

        @jax.jit
        def init(seed) -> State:
            key = jax.random.fold_in(jax.random.key(seed), 0x1417)
            params = network.init(key, digits)["params"]
            ema = jax.tree.map(jnp.copy, params) if config.optim.ema else {}
            return State(jnp.zeros((), jnp.int32), params, tx.init(params), ema)

        return init

    compiled = Compiled("initialisation", config, make)
    return lambda clock, seed: sharding.replicate(mesh, compiled(clock, np.uint32(seed)))


def _train_function(config, codebook, tx, mesh, eos_id):
    network = build(config, codebook)
    head = make_head(config, codebook)
    chosen = config.objective.loss
    parts = config.mesh.accumulate

    def sums(params, tokens_BxL, row_B, key):
        """(gradient, loss sums, target tokens) of some rows, in float32."""
        inputs = training_inputs(config, codebook, tokens_BxL, row_B, key, eos_id)
        dropout_key = jax.random.fold_in(key, 1) if config.model.dropout else None

        def objective(params):
            apply = lambda *args: network.apply({"params": params}, *args)  # noqa: E731
            losses = loss_sums(head, apply, inputs, dropout_key, row_B)
            return getattr(losses, chosen), losses

        gradient, losses = jax.grad(objective, has_aux=True)(params)
        return gradient, losses, inputs.target_BxL.sum().astype(jnp.float32)

    def device_sums(params, tokens_BxL, row_B, key):
        """Sums over micro-batches and devices: what is divided is always the whole batch."""
        split = lambda x: x.reshape(parts, -1, *x.shape[1:])  # noqa: E731

        def micro(carry, part):
            return jax.tree.map(jnp.add, carry, sums(params, *part, key)), None

        if parts == 1:
            total = sums(params, tokens_BxL, row_B, key)
        else:
            zero = jnp.zeros((), jnp.float32)
            start = (jax.tree.map(jnp.zeros_like, params), HeadLoss(zero, zero), zero)
            total, _ = jax.lax.scan(micro, start, (split(tokens_BxL), split(row_B)))
        return jax.lax.psum(total, sharding.DATA)

    shared = sharding.per_device(
        device_sums,
        mesh,
        (sharding.REPLICATED, sharding.BATCH, sharding.BATCH, sharding.REPLICATED),
        sharding.REPLICATED,
    )

    @jax.jit(donate_argnames="state")
    def train(state: State, tokens_BxL, row_B, seed, horizon: optim.Horizon):
        key = step_key(seed, state.step)
        gradient, losses, n_tokens = shared(state.params, tokens_BxL, row_B, key)
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


def _make_draw(config, codebook, mesh, eos_id):
    specs = (sharding.REPLICATED, sharding.BATCH, sharding.BATCH)

    def make(config: RunConfig, name: str) -> Any:
        network = build(config, codebook)
        task = likelihood.make_task(config, codebook, eos_id)

        def device(params, tokens_BxL, row: likelihood.Row):
            apply = lambda *args: network.apply({"params": params}, *args)  # noqa: E731
            return likelihood.draw(task, name, apply, tokens_BxL, *row)

        return jax.jit(sharding.per_device(device, mesh, specs, sharding.BATCH))

    @lru_cache
    def compiled(name: str):
        return Compiled(f"estimator {name}", config, partial(make, name=name))

    def draw(clock: Clock, name: str, params, tokens_BxL: np.ndarray, row: likelihood.Row):
        return compiled(name)(clock, params, *sharding.share_batch(mesh, (tokens_BxL, row)))

    return draw
