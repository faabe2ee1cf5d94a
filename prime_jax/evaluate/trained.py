"""A finished run, ready to be evaluated, sampled from, analysed or exported."""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prime_jax import tuned
from prime_jax.config import RunConfig, run_id
from prime_jax.data import manifest, tokenizers
from prime_jax.data.manifest import Manifest
from prime_jax.data.tokenizers import NO_EOS, Tokenizer
from prime_jax.errors import NoData, UserError
from prime_jax.interchange import folder
from prime_jax.kernels import selection
from prime_jax.model import build
from prime_jax.objectives import Network
from prime_jax.runtime import checkpoint, storage
from prime_jax.runtime.records import read_json
from prime_jax.settings import from_dict
from prime_jax.step import Program, State, program
from prime_jax.subtokens import Codebook, base


@dataclass(frozen=True, eq=False)
class Trained:
    """A run's parameters and what is needed to use them.

    Attributes:
        path: the run directory, for messages and output files.
        params: float32, sharded over `program.mesh`; the moving average if the run has one.
        data: the dataset of the run, None if it is not at its path on this machine.
        separator: EOS id if there is no dataset: that of the tokenizer or of an exported folder.
    """

    path: storage.Path
    config: RunConfig
    program: Program
    params: Any
    step: int
    data: Manifest | None
    separator: int = NO_EOS

    @property
    def id(self) -> str:
        return run_id(self.config)

    @property
    def codebook(self) -> Codebook:
        return self.program.codebook

    @property
    def eos_id(self) -> int:
        return self.data.eos_id if self.data else self.separator

    @property
    def dataset(self) -> Manifest:
        """Raises: NoData: the dataset of the run is not at its path on this machine."""
        if self.data is None:
            raise NoData(
                f"{self.path}: its dataset is not at {Path(self.config.data.path).absolute()}"
            )
        return self.data

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises: UserError: the run does not hold it, and its dataset is not on this machine; or
        it is another model's."""
        own = storage.exists(self.path / tokenizers.FILE)
        if not own and self.data is None:
            place = Path(self.config.data.path).absolute()
            raise UserError(f"{self.path}: holds no tokenizer, and its dataset is not at {place}")
        found = tokenizers.load(self.path) if own else self.dataset.tokenizer()
        tokenizers.check_size(found, self.config.model.vocab_size, str(self.path))
        return found

    @property
    def has_tokenizer(self) -> bool:
        return self.data is not None or storage.exists(self.path / tokenizers.FILE)

    @cached_property
    def network(self) -> Callable[[Any], Network]:
        """params -> (digits [B, L, l], segment ids, dropout keys) -> (hidden states, head rows).

        For one device, or inside a `shard_map` over replicated parameters.
        """
        model = build(self.config, self.codebook)
        return lambda params: partial(model.apply, {"params": params})


def read_config(*attempts: storage.Path) -> RunConfig:
    """The config of the run in these directories (`load`), or of an exported folder.

    Raises:
        UserError: no such run, or a damaged config.
    """
    for directory in attempts:
        file = directory / "config.json"
        if storage.exists(file):
            if folder.is_exported(directory):
                return folder.read_config(directory)
            return from_dict(RunConfig, read_json(file), str(file))
    raise UserError(f"{attempts[0]}: no run here (no config.json); give a run directory or ROOT:ID")


def load(*attempts: str | storage.Path, log: Callable[[str], None] = print) -> Trained:
    """The finished run in a directory, on all devices.

    Args:
        attempts: the run's directories, newest first (a run of a sweep has one per attempt); the
            newest complete step of any is loaded. Or one exported folder.
        log: receives one line for each damaged checkpoint that is skipped.

    Raises:
        UserError: no such run, an unfinished one, or a permutation of another run.
    """
    directories = [storage.path(directory) for directory in attempts]
    run, config = directories[0], read_config(*directories)
    if folder.is_exported(run):
        return _load_exported(run)
    data = _dataset(config)
    separator = data.eos_id if data else NO_EOS
    if data is None and storage.exists(run / tokenizers.FILE):
        separator = tokenizers.load(run).eos_id
    elif data is None and config.data.segment_ids:
        place = Path(config.data.path).absolute()
        raise NoData(f"{run}: needs its dataset, which is not at {place}")
    if begun := tuned.begun(
        directories
    ):  # as it was trained and evaluated; they differ by rounding
        config = selection.recorded(config, begun, jax.devices()[0].device_kind) or config
    made = program(config, separator, codebook_of(config, directories))
    about = {"run": run_id(config), "codebook": made.codebook.hash}
    saved = [directory / "checkpoints" for directory in directories]
    found: State | None = checkpoint.restore(saved, made.abstract, about, log)
    if found is None:
        raise UserError(f"{run}: holds no complete checkpoint; train it first")
    step = int(jax.device_get(found.step))
    if step < config.steps:
        raise UserError(f"{run} is at step {step} of {config.steps}; finish it first")
    params = found.ema if config.optim.ema else found.params
    return Trained(
        path=run,
        config=config,
        program=made,
        params=params,
        step=step,
        data=data,
        separator=separator,
    )


def codebook_of(config: RunConfig, directories: Iterable[storage.Path]) -> Codebook | None:
    """The codes that came with a run's weights or from a file, from its directories; None: its
    config makes them.

    Raises:
        UserError: they are not there, or are others.
    """
    s = config.subtokens
    if not s.codes:
        return None
    for file in (directory / "codebook.npy" for directory in directories):
        if storage.exists(file):
            codes = np.load(io.BytesIO(storage.read(file)), allow_pickle=False)
            book = Codebook(s.length, base(config.model.vocab_size, s.length), codes)
            if book.hash != s.codes:
                raise UserError(f"{file}: other codes ({book.hash}) than the run's ({s.codes})")
            return book
    raise UserError(
        f"subtokens.codes = {s.codes}: these codes came with imported weights; start from them with "
        "--init-from"
    )


def weights(run: Trained) -> folder.Weights:
    """The weights of a run outside of JAX."""
    tensors = folder.from_params(run.params, run.codebook)
    return folder.Weights(run.config, run.codebook, tensors, run.step, run.eos_id)


def _dataset(config: RunConfig) -> Manifest | None:
    """The dataset of a run, if it is what lies at its path."""
    if not (Path(config.data.path) / manifest.FILE).exists():
        return None
    found = manifest.load(config.data.path)
    return found if found.fingerprint == config.data.fingerprint else None


def _load_exported(directory: Path) -> Trained:
    weights = folder.read(directory)
    config = weights.config
    made = program(config, weights.eos_id, weights.codebook)
    tree = folder.to_params(weights.tensors, config, weights.codebook)
    params = folder.place(tree, made.abstract.params)
    return Trained(
        path=directory,
        config=config,
        program=made,
        params=params,
        step=weights.step,
        data=_dataset(config),
        separator=weights.eos_id,
    )
