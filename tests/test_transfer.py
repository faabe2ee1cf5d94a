"""Transfer of learning rates: the table against the unfolded one, and what it promises."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax import flops, optim, step
from prime_jax.config import (
    BaseShape,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
    run_id,
    validate,
)
from prime_jax.errors import UserError
from prime_jax.model import Block, build
from prime_jax.runtime import sharding
from prime_jax.runtime.metrics import Clock
from prime_jax.settings import set_path
from prime_jax.subtokens import Codebook
from prime_jax.sweep import grid, rules

V, LENGTH, BATCH = 16, 16, 8
BASE = BaseShape(layers=2, width=64, heads=2)
TOKENS = np.random.default_rng(0).integers(0, V, (BATCH, LENGTH), np.int32)
TOKENS[:, 1::2] = (5 * TOKENS[:, ::2] + 3) % V  # every second one can be learnt


def run(layers: int, width: int, base: BaseShape = BASE, **changes) -> RunConfig:
    """An ARM of a shape whose heads have the base's size."""
    settings = {"peak_lr": 1e-2, "warmup_steps": 0, "clip": 0.0, "transfer": "completep"}
    return validate(
        RunConfig(
            family="arm",
            batch_size=BATCH,
            model=ModelConfig(
                vocab_size=V, layers=layers, width=width, heads=width * base.heads // base.width
            ),
            subtokens=SubtokenConfig(length=1),
            data=DataConfig(seq_len=LENGTH),
            optim=OptimConfig(**settings | {"base": base} | changes),
            mesh=MeshConfig(replica=1, data=1, model=1),
        )
    )


def network(config: RunConfig):
    """(network, loss of parameters on tokens, what the network reads of TOKENS)."""
    net = build(config, Codebook.create(V, config.subtokens))

    def shifted(token_BxL):
        return jnp.pad(token_BxL[:, :-1], ((0, 0), (1, 0)), constant_values=V)[..., None]

    def loss(params, token_BxL=TOKENS):
        h_BxLxD, head_VxD = net.apply({"params": params}, shifted(token_BxL))
        logp_BxLxV = jax.nn.log_softmax(h_BxLxD @ head_VxD.T)
        return -jnp.take_along_axis(logp_BxLxV, token_BxL[..., None], axis=-1).mean()

    return net, loss, shifted(TOKENS)


def batch(program: step.Program) -> tuple[jax.Array, jax.Array]:
    return sharding.shard(program.mesh, (TOKENS, np.arange(BATCH, dtype=np.int32)))


def named(tree) -> dict[str, np.ndarray]:
    return {path[-1].key: np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# --- the table

N, D = 2, 3  # width and layers over the base's
SMALL = BaseShape(layers=1, width=16, heads=1)
# arXiv 2505.01618 at alpha = 1 (EleutherAI/nanoGPT-mup, branch completep), where branches are
# multiplied by 1 / D and logits by 1 / N: standard deviation of matrices (over the base's), rate,
# decay, eps.
PAPER = {
    "embedding": (1, 1, 1, 1 / N),
    "norms of blocks": (None, 1, 0, 1 / (N * D)),
    "last norm": (None, 1, 0, 1 / N),
    "hidden": (N**-0.5, 1 / N, N, 1 / (N * D)),
    "head": (1, 1, 1, 1 / N),
}
KIND = {
    "embedding": "embedding",
    "final_norm": "last norm",
    "head": "head",
    **dict.fromkeys(("attention_norm", "q_norm", "k_norm", "ffn_norm"), "norms of blocks"),
    **dict.fromkeys(("qkv", "attention_out", "gate", "up", "down"), "hidden"),
}
FORWARD = {"attention_out": 1 / D, "down": 1 / D, "head": 1 / N}


def test_steps_are_those_of_the_paper_with_its_multipliers_in_the_forward_pass():
    """AdamW written out, on weights that the network sees multiplied; eps and decay are large."""
    config = run(D, 16 * N, SMALL, eps=1e-3, weight_decay=2.0, b1=0.8, b2=0.9)
    net, loss, digits = network(config)
    params = optim.initial(net.init(jax.random.key(0), digits)["params"], config)
    tx, gradient = optim.optimizer(config), jax.jit(jax.grad(loss))
    assert set(optim.transfer(config)) == set(named(params)) == set(KIND)

    state, o = tx.init(params), config.optim
    seen = {k: FORWARD.get(k, 1.0) for k in KIND}
    theirs = {k: x.astype(np.float64) / seen[k] for k, x in named(params).items()}
    m = v = dict.fromkeys(KIND, 0.0)
    for at in range(1, 5):
        found = gradient(params)
        updates, state = tx.update(found, state, params)
        params = optim.apply(params, updates, 0.1)
        for k, g in named(found).items():
            _, rate, decay, eps = PAPER[KIND[k]]
            m = m | {k: o.b1 * m[k] + (1 - o.b1) * seen[k] * g}
            v = v | {k: o.b2 * v[k] + (1 - o.b2) * (seen[k] * g) ** 2}
            adam = m[k] / (1 - o.b1**at) / (np.sqrt(v[k] / (1 - o.b2**at)) + eps * o.eps)
            theirs[k] = theirs[k] - 0.1 * rate * (adam + decay * o.weight_decay * theirs[k])
        for k, x in named(params).items():
            np.testing.assert_allclose(x, seen[k] * theirs[k], rtol=1e-3, atol=1e-6, err_msg=k)


@pytest.mark.slow
def test_a_program_begins_and_steps_by_the_table():
    """Initial spreads; and Adam's first step, which is the rate wherever there is a gradient."""
    config = run(D, 16 * N, SMALL, eps=1e-12, weight_decay=0.0)
    program, clock = step.make_program(config, V, jax.devices()), Clock()
    state = program.init(clock, 0)
    before = named(state.params)
    horizon = optim.horizon(config)
    state, _ = program.train(clock, state, *batch(program), np.uint32(0), horizon)
    for name, x in named(state.params).items():
        std, rate, *_ = PAPER[KIND[name]]
        if std is not None:
            base = 0.02 / (2 * SMALL.layers) ** 0.5 if name in ("attention_out", "down") else 0.02
            expected = base * std * FORWARD.get(name, 1)
            assert before[name].std() == pytest.approx(expected, rel=0.1), name
        moved = np.abs(x - before[name]).max()
        assert moved == pytest.approx(1e-2 * rate * FORWARD.get(name, 1), rel=1e-3), name


@pytest.mark.slow
def test_at_the_base_shape_everything_is_as_without_transfer():
    """The same initial values, and the same program of a step: nothing is left to rounding."""

    def program_of_a_step(config: RunConfig) -> str:
        program = step.make_program(config, V, jax.devices())
        arguments = (*batch(program), np.uint32(0), optim.horizon(config))
        return program.train.lower(program.abstract, *arguments).as_text()

    plain, same, wider = (run(1, *of) for of in ((16, SMALL), (16, SMALL), (32, SMALL)))
    plain = set_path(plain, "optim.transfer", "none")
    assert program_of_a_step(plain) == program_of_a_step(same)
    assert program_of_a_step(wider) != program_of_a_step(set_path(wider, "optim.transfer", "none"))
    params = {"embedding": jnp.ones(3), "down": jnp.ones(3)}
    assert optim.initial(params, same) is params


def test_the_base_is_part_of_a_run_only_where_it_counts():
    plain = RunConfig()
    named_only = set_path(plain, "optim.base.width", 64)
    assert run_id(named_only) == run_id(plain)
    one, other = (run(2, 64, BaseShape(layers, 64, 2)) for layers in (2, 4))
    assert len({run_id(plain), run_id(one), run_id(other)}) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optim.base.width": 0}, "optim.transfer = completep: needs the shape"),
        ({"optim.base.heads": 3}, "optim.base.heads = 3: must divide"),
        ({"model.tied_head": True}, "model.tied_head = True: must be False"),
        ({"model.qk_norm": False}, "model.qk_norm = False: must be True"),
        ({"model.heads": 2}, "model.heads = 2: head size must be the base's .*, 32, at width 128"),
        ({"model.ffn_multiple": 3}, "model.ffn_multiple = 3: must be 4 times width"),
        ({"model.ffn_width": 500}, "model.ffn_width = 500: must be 4 times width"),
        ({"optim.base.ffn_multiple": 3}, "model.ffn_multiple = 4: must be 3 times width"),
    ],
)
def test_what_does_not_transfer_is_refused(changes, says):
    config = run(2, 128)
    for path, value in changes.items():
        config = set_path(config, path, value)
    with pytest.raises(UserError, match=f"^{says}") as caught:
        validate(config)
    assert "\n" not in str(caught.value)
    if "optim.base" not in next(iter(changes)):
        validate(set_path(config, "optim.transfer", "none"))


# --- sweeps


def test_a_sweep_has_the_rate_of_one_base_shape():
    """Named rules are asked about the base, given rates are its; heads keep its size."""

    def of_shape(cell: rules.Cell) -> float:
        return cell.shape[1] / cell.params

    base = run(2, 64)
    sweep = grid.Sweep(
        name="transfer",
        base=base,
        families={"arm": {}},
        budgets=[1e13],
        sizes=[(2, 64, 2), 3e6, (4, 128, 2)],
        batch="fixed:8",
        lr=of_shape,
    )
    small, large, wrong = grid.rows(sweep)
    assert "model.heads = 2: head size must be the base's" in wrong.problem
    assert large.width // large.heads == 32 < 64 < large.width
    params = flops.param_counts(base)["nonembedding"]
    assert small.peak_lr == large.peak_lr == 64 / params
    for row in (small, large):
        again = grid.from_json(json.loads(json.dumps(dataclasses.asdict(row))))
        assert validate(grid.to_config(again)).optim.base == BASE
        assert grid.to_config(again).optim.transfer == "completep"


# --- the coordinate check


@functools.cache
def coordinates(config: RunConfig) -> dict[str, tuple[float, float]]:
    """Activation -> root mean square at the start, and of its change in three steps."""
    net, loss, digits = network(config)
    block, tx = Block(config.model, True, LENGTH, net.attention), optim.optimizer(config)

    def activations(params):
        x_NxD = embedded_NxD = params["embedding"][0, digits.reshape(-1)]

        def layer(x_NxD, layer_params):
            x_NxD, _ = block.apply({"params": layer_params}, x_NxD, 0, None, None, None, None)
            return x_NxD, None

        x_NxD, _ = jax.lax.scan(layer, x_NxD, params["layers"])
        h_BxLxD, head_VxD = net.apply({"params": params}, digits)
        return {
            "embedding": embedded_NxD,
            "stream": x_NxD,
            "branches": x_NxD - embedded_NxD,
            "hidden": h_BxLxD,
            "logits": h_BxLxD @ head_VxD.T,
        }

    def train_step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optim.apply(params, updates, config.optim.peak_lr), state), None

    @jax.jit
    def check(key):
        params = optim.initial(net.init(key, digits)["params"], config)
        (after, _), _ = jax.lax.scan(train_step, (params, tx.init(params)), None, length=3)
        size = lambda x: jnp.sqrt((x**2).mean())  # noqa: E731
        old, new = activations(params), activations(after)
        return {name: (size(old[name]), size(new[name] - old[name])) for name in old}

    return {name: (float(a), float(b)) for name, (a, b) in check(jax.random.key(0)).items()}


def growth(large: RunConfig, small: RunConfig) -> dict[str, tuple[float, float]]:
    """Of each activation and of its change, from one shape to another."""
    before, after = coordinates(small), coordinates(large)
    return {k: (after[k][0] / a, after[k][1] / b) for k, (a, b) in before.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("small", "large"),
    [
        ((2, 64), (8, 64)),
        ((2, 64), (2, 256)),
        ((2, 64), (8, 256)),
        ((8, 256), (16, 1024)),
    ],
)
def test_activations_and_their_first_updates_neither_grow_nor_shrink(small, large):
    """Branches begin with 1 / sqrt(depth), logits with 1 / sqrt(width): only their updates last.

    Rates are always those of BASE. Two layers are few: the first quadrupling of them takes a quarter
    of the branches' change, and what follows nearly nothing (docs/theory.md has a table).
    """
    found = growth(run(*large), run(*small))
    for name, (start, change) in found.items():
        assert 0.7 < change < 1.4, (name, change)
        if name not in ("branches", "logits"):
            assert 0.8 < start < 1.25, (name, start)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "width"), [(2, 256), (8, 64)])
def test_without_transfer_updates_grow(layers, width):
    """So the check would notice."""
    plain = [run(*shape, transfer="none") for shape in ((layers, width), (2, 64))]
    assert growth(*plain)["branches"][1] > 2


# --- what it is for


RATES = 2.0 ** np.arange(-10, -1)
STEPS = 150


def chain(rng: np.random.Generator) -> np.ndarray:
    """Tokens [STEPS, BATCH, LENGTH] of a Markov chain of order one."""
    table = rng.dirichlet(np.full(V, 0.1), V).cumsum(1)
    found = [rng.integers(0, V, STEPS * BATCH)]
    for _ in range(LENGTH - 1):
        drawn = rng.random((STEPS * BATCH, 1)) > table[found[-1]]
        found.append(np.minimum(drawn.sum(1), V - 1))
    return np.stack(found, 1).reshape(STEPS, BATCH, LENGTH)


def best_rate(width: int, transfer: str) -> float:
    """The middle of the RATES within .01 nats of the best.

    By the loss over the last fifth of a short training on a chain: its minimum is flat, and the
    smallest of nine values moves by a step of the grid for nothing.
    """
    config = run(2, width, BaseShape(layers=2, width=16, heads=1), transfer=transfer)
    net, loss, digits = network(config)
    tx, tokens = optim.optimizer(config), jnp.asarray(chain(np.random.default_rng(0)))
    params = optim.initial(net.init(jax.random.key(0), digits)["params"], config)

    def last_losses(rate):
        def train_step(carry, now):
            (params, state), (tokens, at) = carry, now
            value, gradient = jax.value_and_grad(loss)(params, tokens)
            updates, state = tx.update(gradient, state, params)
            lr = rate * jnp.minimum(1, (at + 1) / 15) * (1 - at / STEPS)
            return (optim.apply(params, updates, lr), state), value

        data = (tokens, jnp.arange(STEPS))
        return jax.lax.scan(train_step, (params, tx.init(params)), data)[1][-STEPS // 5 :].mean()

    losses = np.asarray(jax.jit(jax.vmap(last_losses))(jnp.asarray(RATES)))
    good = RATES[losses < losses.min() + 0.01]
    assert not {RATES[0], RATES[-1]} & set(good)
    return float(np.exp(np.log(good).mean()))


@pytest.mark.slow
def test_the_best_rate_stays_over_an_eightfold_width_and_moves_without_transfer():
    base = best_rate(16, "completep")
    assert 0.5 <= best_rate(128, "completep") / base <= 2
    assert best_rate(128, "none") / base < 0.5
