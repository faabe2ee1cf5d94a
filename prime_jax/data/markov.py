"""A synthetic source whose entropies are known exactly: a stationary Markov chain.

`markov:V=16,order=1,seed=0,tokens=2000000,concentration=0.3,doc_mean=0`. Rows of the transition
table are Dirichlet draws; order 0 is the uniform i.i.d. source. By default it is one stream
without documents. With `doc_mean`, documents have geometric lengths of that mean (EOS not counted)
and EOS is the symbol V, so that the concatenated stream is again a chain with exactly known entropies.
"""

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prime_jax.errors import UserError

MAX_CONTEXTS = 4096


@dataclass(frozen=True)
class Markov:
    """The chain; every number in nats, float64."""

    V: int = 16
    order: int = 1
    seed: int = 0
    tokens: int = 2_000_000
    concentration: float = 0.3  # of the Dirichlet rows: smaller is more predictable
    doc_mean: float = 0.0  # mean tokens of a document; 0: no documents

    def __post_init__(self) -> None:
        if self.V < 2 or self.order < 0 or self.tokens < 1 or self.concentration <= 0:
            raise UserError(f"{self.spec}: needs V >= 2, order >= 0, tokens and concentration > 0")
        if self.V**self.order > MAX_CONTEXTS:
            raise UserError(f"{self.spec}: V**order is above {MAX_CONTEXTS}")
        if self.doc_mean and (self.doc_mean < 1 or self.order > 1):
            raise UserError(f"{self.spec}: doc_mean needs to be at least 1, with order 0 or 1")

    @property
    def spec(self) -> str:
        fields = dataclasses.asdict(self).items()
        return "markov:" + ",".join(f"{key}={value}" for key, value in fields)

    @property
    def symbols(self) -> int:
        """Distinct symbols of the stream: V, and EOS (= V) when there are documents."""
        return self.V + bool(self.doc_mean)

    @property
    def context(self) -> int:
        """Symbols that the next one depends on."""
        return max(self.order, 1) if self.doc_mean else self.order

    @cached_property
    def transition(self) -> np.ndarray:
        """[contexts, symbols]: probability of the next symbol; a context is a base-A number."""
        rng = np.random.Generator(np.random.PCG64(self.seed))
        if self.order == 0:
            table = np.full((1, self.V), 1 / self.V)
        else:
            table = rng.dirichlet(np.full(self.V, self.concentration), self.V**self.order)
            table = (table + 1e-6) / (1 + 1e-6 * self.V)  # no zeros: the chain is ergodic
        if not self.doc_mean:
            return table
        table = np.broadcast_to(table, (self.V, self.V))
        stop = 1 / self.doc_mean
        full = np.zeros((self.V + 1, self.V + 1))
        full[: self.V, : self.V] = (1 - stop) * table
        full[: self.V, self.V] = stop
        full[self.V, : self.V] = _stationary(
            table
        )  # a document starts from the stationary distribution
        return full

    @cached_property
    def contexts(self) -> np.ndarray:
        """Stationary probabilities [symbols] * context of that many consecutive symbols."""
        n, symbols = self.transition.shape
        step = np.zeros((n, n))
        for c in range(n):
            nexts = (c * symbols + np.arange(symbols)) % n
            np.add.at(step[c], nexts, self.transition[c])
        return _stationary(step).reshape((symbols,) * self.context)

    def entropy_rate(self) -> float:
        """Nats per symbol of the stream."""
        return float(self.contexts.reshape(-1) @ _entropies(self.transition))

    def block_entropy(self, length: int) -> float:
        """-E log p of a stationary window of `length` symbols, in nats."""
        known = min(length, self.context)
        start = _entropies(self._window(known).reshape(1, -1))[0]
        return float(start + (length - known) * self.entropy_rate())

    def log_prob(self, tokens_BxL: np.ndarray) -> np.ndarray:
        """Log-probabilities float64 [B] of stationary windows; -inf for impossible ones."""
        tokens = np.asarray(tokens_BxL, np.int64)
        known = min(tokens.shape[1], self.context)
        with np.errstate(divide="ignore"):
            start, table = np.log(self._window(known)), np.log(self.transition)
        total = start[tuple(tokens[:, :known].T)] + np.zeros(len(tokens))
        context = self._context_of(tokens[:, :known])
        for t in range(known, tokens.shape[1]):
            total += table[context, tokens[:, t]]
            context = (context * self.symbols + tokens[:, t]) % len(self.transition)
        return total

    def sample(self, batch: int, length: int, seed: int) -> np.ndarray:
        """Independent stationary windows int32 [batch, length]."""
        rng = np.random.Generator(np.random.PCG64([self.seed, seed]))
        start = rng.choice(self.contexts.size, batch, p=self.contexts.reshape(-1))
        out = np.empty((batch, self.context + length), np.int32)
        for t in range(self.context):
            out[:, t] = start // self.symbols ** (self.context - 1 - t) % self.symbols
        cumulative, context = self._cumulative, start
        for t in range(self.context, out.shape[1]):
            out[:, t] = (cumulative[context] <= rng.random(batch)[:, None]).sum(1)
            context = (context * self.symbols + out[:, t]) % len(cumulative)
        return out[:, self.context :]

    def stream(self) -> np.ndarray:
        """One chain int32 [tokens]; the same for the same fields. Starts a document, if any."""
        rng = np.random.Generator(np.random.PCG64([self.seed, 1]))
        rows = self._cumulative.tolist()
        n = len(rows)
        context = self.V if self.doc_mean else int(rng.choice(n, p=self.contexts.reshape(-1)))
        out = []
        for u in rng.random(self.tokens).tolist():
            symbol = bisect_right(rows[context], u)
            out.append(symbol)
            context = (context * self.symbols + symbol) % n
        return np.array(out, np.int32)

    @cached_property
    def _cumulative(self) -> np.ndarray:
        """Inner boundaries [contexts, symbols - 1] of the inverse distribution function."""
        return np.cumsum(self.transition, axis=1)[:, :-1]

    def _window(self, length: int) -> np.ndarray:
        return self.contexts.sum(axis=tuple(range(length, self.context)))

    def _context_of(self, tokens: np.ndarray) -> np.ndarray:
        context = np.zeros(len(tokens), np.int64)
        for column in tokens.T:
            context = context * self.symbols + column
        return context


def _entropies(rows: np.ndarray) -> np.ndarray:
    """Entropy in nats of each row of probabilities."""
    return -np.sum(rows * np.log(np.where(rows > 0, rows, 1)), axis=-1)


def _stationary(step: np.ndarray) -> np.ndarray:
    """Left eigenvector of a stochastic matrix for eigenvalue 1, summing to 1."""
    n = len(step)
    system = np.vstack([step.T - np.eye(n), np.ones((1, n))])
    solution = np.linalg.lstsq(system, np.append(np.zeros(n), 1.0), rcond=None)[0]
    solution = np.maximum(solution, 0)
    return solution / solution.sum()


def parse(options: str) -> Markov:
    """`V=16,order=1,...` as a `Markov`.

    Raises:
        UserError: an unknown option or a value that is not a number.
    """
    known = {f.name: f.type for f in dataclasses.fields(Markov)}
    values = {}
    for item in filter(None, options.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise UserError(f"markov option {item!r}: write {', '.join(f'{k}=...' for k in known)}")
        try:
            values[key] = known[key](value)
        except ValueError as error:
            raise UserError(f"markov option {item!r}: {value!r} is not a number") from error
    return Markov(**values)
