"""Four ways to give tokens codes, and what codes make of a corpus (theory.md, "Sub-token codes")."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from prime_jax.config import SubtokenConfig
from prime_jax.data import loader
from prime_jax.data.entropy import Entropies, entropy_bits, of_codebook
from prime_jax.data.manifest import Manifest
from prime_jax.errors import UserError
from prime_jax.subtokens import Codebook, base

Method = Literal["identity", "shuffle", "frequency", "cluster"]

WINDOW = 4  # neighbours on each side that are a token's context
DIMENSIONS = 64  # of word vectors
MAX_TOKENS = 20_000_000  # read of the train split, in evenly spaced blocks
READ = 1024  # blocks at a time


def make(
    manifest: Manifest,
    method: Method,
    length: int,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Codebook:
    """The codebook that a method makes of a dataset.

    Args:
        method: `identity`: an id is its code; `shuffle`: a permutation drawn from `seed`, as
            `subtokens.shuffle = 1` does; `frequency`: the rank of the id, most frequent first;
            `cluster`: tokens that occur in the same contexts have the same leading digits.
        length: sub-tokens per token, l.
        tick: called for every part that is read.
    Raises:
        UserError: the train split has no block.
    """
    vocab, counts = manifest.vocab_size, manifest.unigram()
    if method in ("identity", "shuffle"):
        return Codebook.create(vocab, SubtokenConfig(length, float(method == "shuffle"), seed=seed))
    if method == "frequency":
        rank = np.argsort(np.lexsort((np.arange(vocab), -counts)))
        return Codebook(length, base(vocab, length), rank.astype(np.int64))
    pairs = sum(pairs_at(manifest, distance, tick) for distance in range(1, WINDOW + 1))
    special = manifest.token_bytes() == 0  # EOS and the like stand for no text
    vectors = word_vectors(pairs + pairs.T, special | (counts == 0))
    return Codebook(length, base(vocab, length), clustered(vectors, counts, length))


def pairs_at(
    manifest: Manifest, distance: int, tick: Callable[[], None] = lambda: None
) -> sparse.csr_array:
    """Counts [V, V] of (token, the token `distance` further on) within blocks of the train split."""
    source, vocab = loader.blocks(manifest, "train"), manifest.vocab_size
    wanted = min(len(source), max(1, MAX_TOKENS // manifest.seq_len))
    if not wanted:
        raise UserError(f"{manifest.directory}: the train split has no block")
    index = np.arange(wanted) * len(source) // wanted
    total = sparse.csr_array((vocab, vocab), dtype=np.float64)
    for start in range(0, wanted, READ):
        tokens = source.read(index[start : start + READ])[0]
        first, second = tokens[:, :-distance].ravel(), tokens[:, distance:].ravel()
        ones = np.ones(len(first))
        total += sparse.coo_array((ones, (first, second)), shape=(vocab, vocab)).tocsr()
        tick()
    return total


def word_vectors(counts_VxV: sparse.csr_array, left_out_V: np.ndarray) -> np.ndarray:
    """Vectors [V, D] whose products approximate the positive PMI of symmetric pair counts.

    Tokens that are left out have the zero vector. The decomposition starts at a fixed vector, and
    each column's largest entry is positive, so that vectors are reproducible.
    """
    kept = (~left_out_V).astype(np.float64)
    counts = (sparse.diags_array(kept) @ counts_VxV @ sparse.diags_array(kept)).tocoo()
    sums = np.bincount(counts.row, counts.data, len(kept))
    row, column = counts.coords
    pmi = np.log(counts.data * sums.sum() / (sums[row] * sums[column]))
    positive = pmi > 1e-9
    matrix = sparse.csr_array(
        (pmi[positive], (row[positive], column[positive])), shape=counts.shape
    )
    rank = min(DIMENSIONS, len(kept) - 1)
    if not matrix.nnz or rank < 1:
        return np.zeros((len(kept), 1))
    start = np.cos(np.arange(len(kept)))  # any fixed vector that no symmetry makes orthogonal
    left, values, _ = sparse.linalg.svds(matrix, k=rank, v0=start)
    left *= np.sign(left[np.abs(left).argmax(axis=0), np.arange(rank)])
    return np.where(kept[:, None] > 0, left * np.sqrt(np.maximum(values, 0)), 0.0)[:, ::-1]


def clustered(vectors_VxD: np.ndarray, counts_V: np.ndarray, length: int) -> np.ndarray:
    """Codes int64 [V]: tokens with near vectors share leading digits.

    A set of tokens is split into the b parts of a digit by recursive bisection, each time along
    the first principal direction of the part; the side of floor(b / 2) digits gets its proportion of
    the tokens. Equal places go by frequency, then id. No part is larger than the codes below it.
    """
    codes = np.zeros(len(counts_V), np.int64)
    b = base(len(counts_V), length)

    def divide(tokens: np.ndarray, digits: int, first: int, below: int) -> None:
        """Give `tokens` the codes of `digits` parts from `first` on, of `below` codes each."""
        if digits == 1:
            if len(tokens) == 1:
                codes[tokens] = first
            elif len(tokens):
                divide(tokens, b, first, below // b)
            return
        left = digits // 2
        size = -(-len(tokens) * left // digits)
        tokens = tokens[_order(vectors_VxD[tokens], counts_V[tokens])]
        divide(np.sort(tokens[:size]), left, first, below)
        divide(np.sort(tokens[size:]), digits - left, first + left * below, below)

    divide(np.arange(len(counts_V)), b, 0, b ** (length - 1))
    return codes


def _order(vectors_NxD: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """Places of tokens along the first principal direction of their vectors."""
    place_N = np.zeros(len(counts_N))
    centred = vectors_NxD - vectors_NxD.mean(axis=0) if len(counts_N) else vectors_NxD
    if np.abs(centred).max(initial=0) > 1e-9:
        direction = np.linalg.svd(centred, full_matrices=False)[2][0]
        direction = direction * np.sign(direction[np.abs(direction).argmax()])
        place_N = centred @ direction
        place_N = np.round(place_N / np.abs(place_N).max(), 9)  # equal vectors, equal places
    return np.lexsort((np.arange(len(counts_N)), -counts_N, place_N))


@dataclass(frozen=True)
class Branch:
    """The tokens with one leading digit.

    Attributes:
        digit: the leading digit.
        tokens: how many tokens have it.
        share: fraction of the corpus that they are.
        words: the most frequent of them as text, most frequent first.
    """

    digit: int
    tokens: int
    share: float
    words: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """What codes make of a corpus.

    Attributes:
        hash: of the codes, which is part of the identity of runs with them.
        entropies: of the sub-tokens, in bits.
        neighbours: mutual information of the leading digits of neighbouring tokens, in bits.
        branches: the tokens by their leading digit.
    """

    hash: str
    entropies: Entropies
    neighbours: float
    branches: tuple[Branch, ...]


def describe(manifest: Manifest, book: Codebook, words: int, branches: int) -> Description:
    """Statistics of codes on the train split.

    Args:
        words: shown of each branch, at most.
        branches: shown, at most.
    """
    counts, leading = manifest.unigram(), book.digits[:, 0].astype(np.int64)
    pairs = pairs_at(manifest, 1).tocoo()
    first, second = (leading[index] for index in pairs.coords)
    _, cell = np.unique(first * book.base + second, return_inverse=True)
    marginals = [entropy_bits(np.bincount(digit, pairs.data)) for digit in (first, second)]
    neighbours = sum(marginals) - entropy_bits(np.bincount(cell, pairs.data))
    tokenizer, found = manifest.tokenizer(), []
    for digit in np.unique(leading)[:branches]:
        ids = np.flatnonzero(leading == digit)
        top = ids[np.argsort(-counts[ids], kind="stable")][:words]
        shown = tuple(tokenizer.decode([token]) for token in top)
        share = float(counts[ids].sum() / counts.sum())
        found.append(Branch(int(digit), len(ids), share, shown))
    entropies = of_codebook(counts, book)
    return Description(book.hash, entropies, float(max(neighbours, 0.0)), tuple(found))
