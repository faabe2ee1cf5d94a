"""Sub-token embeddings: every implementation against plain table lookups, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prime_jax.kernels import embedding, embedding_mosaic
from prime_jax.kernels.embedding import resolve, subtoken_embedding

KINDS = ("cat_shared", "cat", "sum")


def example(kind: str, slots: int, base: int, tokens: int, width: int, seed: int = 0):
    """(tables, digits [N, S], cotangent [N, D])"""
    rng = np.random.default_rng(seed)
    shape = (1 if kind == "cat_shared" else slots, base + 1)
    size = width if kind == "sum" else width // slots
    table = rng.normal(size=(*shape, size)).astype(np.float32)
    digits = rng.integers(0, base + 1, (tokens, slots)).astype(np.int32)
    return table, digits, rng.normal(size=(tokens, width)).astype(np.float32)


def lookups(kind, table, digits, width):
    """The definition (theory.md, "Sub-token codes"), one slot at a time, in float64."""
    slots = digits.shape[1]
    by_slot = [table[s % len(table)].astype(np.float64)[digits[:, s]] for s in range(slots)]
    if kind == "sum":
        return sum(by_slot)
    merged = np.concatenate(by_slot, axis=1)
    return np.pad(merged, ((0, 0), (0, width - merged.shape[1])))


def lookup_gradients(kind, table, digits, g):
    out = np.zeros(table.shape, np.float64)
    size = table.shape[2]
    for s in range(digits.shape[1]):
        part = g if kind == "sum" else g[:, s * size : (s + 1) * size]
        np.add.at(out[s % len(table)], digits[:, s], part.astype(np.float64))
    return out


def value_and_gradient(kind, table, digits, g, implementation, dtype=np.float32):
    @jax.jit
    def both(table, g):
        call = lambda t: subtoken_embedding(kind, t, digits, g.shape[1], implementation, dtype)  # noqa: E731
        out, vjp = jax.vjp(call, table)
        return out, vjp(g.astype(dtype))[0]

    with jax.default_matmul_precision("highest"):
        return jax.tree.map(lambda x: np.asarray(x, np.float64), both(table, g))


SHAPES = (  # slots, base, tokens
    (6, 2, 5),
    (16, 2, 600),  # not a multiple of the kernel's block
    (18, 2, 32),  # two words per token
    (4, 15, 520),
    (2, 225, 40),
)
WAYS = [  # quick: two words, and the last block of a kernel's that is not full
    (way, kind, *shape)
    if shape in SHAPES[2:4] or way == "pallas"
    else pytest.param(way, kind, *shape, marks=pytest.mark.slow)
    for way in ("multi_hot", "select", "gather", "pallas")
    for kind in KINDS
    for shape in SHAPES
    if way != "select" or (shape[1] == 2 and kind != "sum")
]


@pytest.mark.parametrize(("implementation", "kind", "slots", "base", "tokens"), WAYS)
def test_values_and_gradients_are_those_of_lookups(
    implementation, kind, slots, base, tokens, monkeypatch
):
    monkeypatch.setattr(embedding, "MULTI_HOT_ROWS", 0 if implementation == "gather" else 10_000)
    width = 37  # a multiple of no number of slots
    table, digits, g = example(kind, slots, base, tokens, width)
    value, gradient = value_and_gradient(kind, table, digits, g, implementation)
    np.testing.assert_allclose(value, lookups(kind, table, digits, width), atol=1e-5)
    want = lookup_gradients(kind, table, digits, g)
    np.testing.assert_allclose(gradient, want, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_in_bfloat16_is_no_worse_than_xla(kind):
    """A concatenated value is one table entry, rounded once; gradients are float32 sums."""
    table, digits, g = example(kind, 6, 2, 40, 24)
    g = np.asarray(jnp.asarray(g, jnp.bfloat16), np.float32)
    value, gradient = value_and_gradient(kind, table, digits, g, "pallas", jnp.bfloat16)
    twin, _ = value_and_gradient(kind, table, digits, g, "multi_hot", jnp.bfloat16)
    exact = lookups(kind, table, digits, 24)
    if kind == "sum":
        assert np.abs(value - exact).max() <= 2 * np.abs(twin - exact).max()
    else:
        np.testing.assert_array_equal(value, twin)
    np.testing.assert_allclose(gradient, lookup_gradients(kind, table, digits, g), atol=1e-4)


def test_gradients_do_not_depend_on_the_blocks(monkeypatch):
    """Up to the order of sums: the last block, which reads past the end, adds nothing."""
    table, digits, g = example("cat", 6, 2, 300, 24)
    _, whole = value_and_gradient("cat", table, digits, g, "pallas")
    monkeypatch.setattr(embedding_mosaic, "TOKENS", 128)
    _, parts = value_and_gradient("cat", table, digits, g, "pallas")
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-5)


def test_large_tables_are_gathered_and_impossible_requests_refused():
    assert resolve("pallas", "cat_shared", 1, 50258) == "gather"
    assert resolve("xla", "cat", 2, 226) == "gather"
    assert resolve("pallas", "cat", 2, 226) == "pallas"
    with pytest.raises(ValueError, match="select"):
        resolve("select", "sum", 6, 3)
