"""Attention: every implementation against the reference, packing, skipping, and what the TPU gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from prime_jax.errors import UserError
from prime_jax.kernels import attention_mosaic
from prime_jax.kernels.attention import attention, attention_reference, cudnn_serves
from prime_jax.kernels.attention_mask import SAVED, Blocks, fitted, visits
from prime_jax.runtime.sharding import AXES, BATCH, per_device, shard

jitted_visits = jax.jit(visits, static_argnums=(0, 1, 4))
SMALL = (16, 32)  # blocks of queries and keys: only the interpreter takes them
HERE = ("pallas", "splash", "xla", "scan")


def arrays(length, size, heads=2, groups=1, batch=2, dtype=jnp.float32):
    """q, k, v and a cotangent."""
    keys = jax.random.split(jax.random.key(length + size), 4)
    counts = (heads, groups, groups, heads)
    shapes = [(batch, length, n, size) for n in counts]
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def packed(length):
    """Segment ids [2, L]: one-token documents, an id that comes back, padding; all padding."""
    row = np.repeat([0, 1, 2, 0, 3], [length // 3, 1, 1, 2, length])[:length]
    row[-(length // 5) :] = -1
    return jnp.asarray(np.stack([row, np.full(length, -1)]), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def pulled(function, q, k, v, dout):
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(dout)


def with_gradients(function, q, k, v, dout):
    """(output, dq, dk, dv) as float32; compiled once per function."""
    with jax.default_matmul_precision("highest"):
        return [np.asarray(x, np.float32) for x in pulled(function, q, k, v, dout)]


def assert_equals_reference(implementation, qkv, causal, ids, blocks=(), block_length=0):
    see = (causal, ids, implementation, blocks, block_length)
    got = with_gradients(lambda *a: attention(*a, *see), *qkv)
    want = with_gradients(lambda *a: attention_reference(*a, causal, ids, block_length), *qkv)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return got


@pytest.mark.parametrize(
    ("implementation", "causal"),
    [(name, causal) for name in ("pallas", "xla", "scan") for causal in (False, True)]
    + [("splash", True), pytest.param("splash", False, marks=pytest.mark.slow)],
)
def test_equals_the_reference(implementation, causal):
    qkv = arrays(50, 12, heads=4, groups=2)
    out, *gradients = assert_equals_reference(implementation, qkv, causal, packed(50))
    for x in (out, *gradients):
        assert not x[0, 40:].any()  # padding gives zeros and takes no gradient
        assert not x[1].any()


def dense(q, k, v, seen):
    """The definition, one row at a time."""
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(*q.shape[:3]):
        js = np.flatnonzero(seen[b, i])
        if len(js):
            group = h * k.shape[2] // q.shape[2]
            e = np.exp(k[b, js, group] @ q[b, i, h] / q.shape[-1] ** 0.5)
            out[b, i, h] = e @ v[b, js, group] / e.sum()
    return out


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_the_definition(causal):
    q, k, v, _ = (np.asarray(x, np.float64) for x in arrays(12, 4, heads=4, groups=2))
    ids = [0, 0, 0, 4, 4, 0, 0, -1, 2, 2, -1, -1]  # three documents and padding between them
    spans = [(0, 3), (3, 5), (5, 7), (8, 10)]
    seen = np.zeros((2, 12, 12), bool)
    for first, last in spans:
        seen[:, first:last, first:last] = True
    if causal:
        seen &= np.tril(np.ones((12, 12), bool))
    got = attention_reference(*(jnp.asarray(x) for x in (q, k, v)), causal, jnp.asarray([ids] * 2))
    np.testing.assert_allclose(got, dense(q, k, v, seen), atol=1e-5)


def test_reference_of_block_diffusion_is_the_definition():
    """Two copies of six tokens in blocks of two; documents of three tokens, one of padding."""
    q, k, v, _ = (np.asarray(x, np.float64) for x in arrays(12, 4, heads=4, groups=2))
    ids = [0, 0, 0, 4, 4, -1]
    seen = np.zeros((2, 12, 12), bool)
    for i, j in np.ndindex(12, 12):
        noisy = i < 6 and j < 6 and i // 2 == j // 2
        clean = j >= 6 and (i % 6 // 2 > j % 6 // 2 or (i >= 6 and i % 6 // 2 == j % 6 // 2))
        seen[:, i, j] = (noisy or clean) and ids[i % 6] == ids[j % 6] >= 0
    segments = jnp.asarray([ids * 2] * 2)
    got = jax.jit(lambda *a: attention_reference(*a, False, segments, 2))(q, k, v)
    np.testing.assert_allclose(got, dense(q, k, v, seen), atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "ids"),
    [
        ("scan", True),
        ("splash", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("splash", "xla", "cudnn")),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("scan", "xla", "cudnn")),
    ],
)
def test_block_diffusion_equals_the_reference(implementation, ids):
    segments = jnp.tile(packed(20), 2) if ids else None
    qkv = arrays(40, 12, heads=4, groups=2)
    assert_equals_reference(implementation, qkv, False, segments, block_length=5)


@pytest.mark.parametrize(
    ("size", "causal", "ids"),
    [
        (4, False, False),
        (96, True, True),
        pytest.param(64, True, True, marks=pytest.mark.slow),
        pytest.param(96, False, True, marks=pytest.mark.slow),
    ],
)
def test_kernel_at_any_head_size(size, causal, ids, monkeypatch):
    monkeypatch.setattr(attention_mosaic, "PART", 12)  # three parts, the last one shorter
    assert_equals_reference("pallas", arrays(40, size), causal, packed(40) if ids else None, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 12, 132])
@pytest.mark.parametrize("length", [1, 31, 130])
@pytest.mark.parametrize("blocks", [(16, 32), (32, 16), (16, 64), ()])
@pytest.mark.parametrize(("causal", "groups"), [(False, 3), (True, 1)])
def test_kernel_over_shapes(size, length, blocks, causal, groups):
    ids = packed(length) if length > 1 else None
    assert_equals_reference("pallas", arrays(length, size, 3, groups), causal, ids, blocks)


@pytest.mark.parametrize("implementation", [*HERE, "cudnn"])
def test_packed_documents_equal_separate_ones(implementation):
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs a GPU")
    dtype, tolerance = (jnp.bfloat16, 2e-2) if implementation == "cudnn" else (jnp.float32, 1e-5)
    q, k, v, dout = arrays(64, 16, batch=1, dtype=dtype)
    ids = jnp.asarray([[7] * 32 + [3] * 32])
    run = lambda ids: lambda *a: attention(*a, False, ids, implementation, SMALL)  # noqa: E731
    whole = with_gradients(run(ids), q, k, v, dout)
    split = lambda x: x.reshape(2, 32, *x.shape[2:])  # noqa: E731
    parts = with_gradients(run(None), *(split(x) for x in (q, k, v, dout)))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(split(a), b, atol=tolerance, rtol=tolerance)


def in_bfloat16(implementation):
    """(output, gradients) of rounded inputs, which the exact result shares."""
    qkv = arrays(128, 64, heads=4, groups=2, dtype=jnp.bfloat16)
    if implementation == "exact":
        return with_gradients(attention_reference, *(x.astype(jnp.float32) for x in qkv))
    return with_gradients(lambda *a: attention(*a, implementation=implementation), *qkv)


def test_bfloat16_is_as_exact_as_xla():
    exact, xla, ours = (in_bfloat16(name) for name in ("exact", "xla", "pallas"))
    for want, theirs, got in zip(exact, xla, ours, strict=True):
        assert np.abs(got - want).mean() < 1.2 * np.abs(theirs - want).mean()


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=8),
    padding=st.lists(st.booleans(), min_size=8, max_size=8),
    causal=st.booleans(),
    blocks=st.sampled_from([Blocks(8, 16), Blocks(16, 16), Blocks(16, 8)]),
)
def test_visits_are_the_blocks_that_share_a_document(lengths, padding, causal, blocks):
    segments = [-1 if pad else n for n, pad in zip(range(len(lengths)), padding, strict=False)]
    ids = np.full(64, -1)
    row = np.repeat(segments, lengths)[:64]
    ids[: len(row)] = row
    seen = (ids[:, None] == ids) & (ids >= 0)
    if causal:
        seen &= np.tril(np.ones((64, 64), bool))
    got = jitted_visits(64, causal, jnp.asarray(ids)[None], jnp.asarray(ids)[None] < 0, blocks)

    first, last = np.asarray(got.span_Bx2xL)[0, :, :, None]
    np.testing.assert_array_equal((first <= np.arange(64)) & (np.arange(64) < last), seen)

    meet = seen.reshape(64 // blocks.queries, blocks.queries, -1, blocks.keys).any((1, 3))
    for table, wanted in ((got.keys_Bx2xI, meet), (got.queries_Bx2xJ, meet.T)):
        for start, count, row in zip(*np.asarray(table)[0], wanted, strict=True):
            hits = np.flatnonzero(row)
            assert count == (hits[-1] - hits[0] + 1 if len(hits) else 0)
            assert count == 0 or start == hits[0]


def test_blocks_of_other_documents_are_never_read():
    """Not a number times a probability of zero would show in both passes."""
    q, k, v, dout = arrays(64, 16, batch=1)
    other = jnp.arange(64)[:, None, None] >= 32
    ids = jnp.asarray([[0] * 32 + [1] * 32])
    poisoned = [jnp.where(other, jnp.nan, x) for x in (q, k, v, dout)]
    run = lambda *a: attention(*a, False, ids, "pallas", (16, 16))  # noqa: E731
    for a, b in zip(
        with_gradients(run, *poisoned), with_gradients(run, q, k, v, dout), strict=True
    ):
        assert np.isnan(a[:, 32:]).all()
        np.testing.assert_array_equal(a[:, :32], b[:, :32])


@pytest.mark.slow
def test_no_races_and_no_uninitialised_memory():
    q, k, v, dout = arrays(32, 64, batch=1)
    ids = jnp.asarray([[0] * 20 + [-1] * 12])
    run = functools.partial(
        attention_mosaic.masked_attention,
        segment_ids_BxL=ids,
        blocks=(16, 16),
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    got = with_gradients(run, q, k, v, dout)
    want = with_gradients(lambda *a: attention_reference(*a, False, ids), q, k, v, dout)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_eight_devices_share_a_batch():
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    mesh = jax.make_mesh((1, 8, 1), AXES, axis_types=explicit)
    qkv = arrays(32, 16, batch=8)
    ids = jnp.asarray([[0] * 20 + [1] * 12] * 8, jnp.int32)

    def run(q, k, v, dout, ids):
        out, pull = jax.vjp(lambda *a: attention(*a, False, ids, "pallas", SMALL), q, k, v)
        return out, *pull(dout)

    got = jax.jit(per_device(run, mesh, BATCH, BATCH))(*shard(mesh, (*qkv, ids)))
    want = with_gradients(lambda *a: attention_reference(*a, False, ids), *qkv)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_rematerialisation_keeps_what_the_backward_pass_needs(capsys):
    q, k, v, _ = arrays(32, 16)
    policy = jax.checkpoint_policies.save_only_these_names(SAVED)
    run = jax.checkpoint(lambda *a: attention(*a, implementation="pallas"), policy=policy)
    jax.ad_checkpoint.print_saved_residuals(run, q, k, v)
    saved = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line]
    assert len(saved) == 2  # the output and the log-sum-exp, from which no score is made again
    assert all(f"'{SAVED}'" in line for line in saved)


# A compiler asks which chip it works for; here a mesh says so.
V5E = AbstractMesh((1,), ("chip",), abstract_device=AbstractDevice("TPU v5 lite", 1, "tpu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [64, 128])
def test_lowers_for_a_tpu(size, dtype):
    q, k, v, dout = arrays(300, size, batch=1, dtype=dtype)
    ids = packed(300)[:1]

    @jax.jit
    def run(q, k, v):
        call = functools.partial(attention_mosaic.masked_attention, segment_ids_BxL=ids)
        return jax.vjp(call, q, k, v)[1](dout)

    with jax.sharding.use_abstract_mesh(V5E):
        text = run.trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2


@pytest.mark.parametrize("length", [2048, 1 << 16])
def test_a_tpu_gets_splash_attention_until_it_is_measured(length):
    x = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(V5E):
        assert "splash_mha" in str(jax.make_jaxpr(attention)(x, x, x))


def test_a_tpu_gets_splash_attention_for_block_diffusion():
    x = jax.ShapeDtypeStruct((1, 2048, 1, 128), jnp.bfloat16)
    call = functools.partial(attention, block_length=256)
    with jax.sharding.use_abstract_mesh(V5E):
        assert "splash_mha" in str(jax.make_jaxpr(call)(x, x, x))


@pytest.mark.parametrize(
    ("length", "blocks", "want", "padded"),
    [
        (2048, (), (512, 1024), 2048),
        (2560, (), (512, 512), 2560),
        (1100, (), (512, 512), 1536),
        (300, (), (384, 384), 384),
        (40, SMALL, (16, 16), 48),
    ],
)
def test_blocks_fit_the_length(length, blocks, want, padded):
    assert fitted(length, blocks) == (want, padded)


def test_bad_choices_are_refused():
    q, k, v, _ = arrays(8, 4)
    with pytest.raises(UserError, match="flash"):
        attention(q, k, v, implementation="flash")
    with pytest.raises(UserError, match="blocks"):
        attention(q, k, v, implementation="pallas", blocks=(128,))
    with pytest.raises(UserError, match="splash"):
        attention(q, k, v, implementation="pallas", block_length=2)


def test_cudnn_gives_way_to_xla_where_it_has_no_kernel():
    q, k, v, dout = arrays(8, 4)
    assert not cudnn_serves(q, packed=False)
    assert_equals_reference("cudnn", (q, k, v, dout), True, None)
    half = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    assert cudnn_serves(half, packed=True)
    assert not cudnn_serves(half[:, :7], packed=True)
    assert not cudnn_serves(half[..., :60], packed=False)
