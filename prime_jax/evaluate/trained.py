"""A finished run, ready to be evaluated, sampled from, analysed or exported."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax

from prime_jax.config import RunConfig, run_id
from prime_jax.data import manifest, tokenizers
from prime_jax.data.manifest import Manifest
from prime_jax.data.tokenizers import NO_EOS, Tokenizer
from prime_jax.errors import UserError
from prime_jax.interchange import folder
from prime_jax.kernels import selection
from prime_jax.model import build
from prime_jax.objectives import Network
from prime_jax.runtime import checkpoint, storage
from prime_jax.runtime.records import read_json
from prime_jax.settings import from_dict
from prime_jax.step import Program, State, program
from prime_jax.subtokens import Codebook


@dataclass(frozen=True, eq=False)
class Trained:
    """A run's parameters and what is needed to use them.

    Attributes:
        path: the run directory, for messages and output files.
        params: float32, sharded over `program.mesh`; the moving average if the run has one.
        data: the dataset of the run, None if it is not on this machine.
        separator: EOS id if there is no dataset: that of an exported folder, else -1.
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

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises: UserError: the dataset that holds it is not on this machine."""
        if (self.path / "tokenizer.json").exists():
            return tokenizers.load(self.path)
        if self.data is None:
            raise UserError(
                f"{self.path}: no tokenizer, because {self.config.data.path} is not on this machine"
            )
        return self.data.tokenizer()

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
        UserError: no such run, an unfinished one, or data or a permutation of another run.
    """
    directories = [storage.path(directory) for directory in attempts]
    run, config, data = directories[0], read_config(*directories), None
    if folder.is_exported(run):
        return _load_exported(run)
    if (Path(config.data.path) / manifest.FILE).exists():
        data = manifest.load(config.data.path)
        manifest.check(data, config)
    elif config.data.segment_ids:
        raise UserError(f"{run}: needs its dataset, and {config.data.path} is not on this machine")
    files = [directory / selection.FILE for directory in directories]
    begun = next((read_json(file) for file in files if storage.exists(file)), None)
    if begun:  # as it was trained and evaluated; they differ by rounding
        config = selection.recorded(config, begun, jax.devices()[0].device_kind) or config
    made = program(config, data.eos_id if data else NO_EOS)
    about = {"run": run_id(config), "codebook": made.codebook.hash}
    saved = [directory / "checkpoints" for directory in directories]
    found: State | None = checkpoint.restore(saved, made.abstract, about, log)
    if found is None:
        raise UserError(f"{run}: holds no complete checkpoint; train it first")
    step = int(jax.device_get(found.step))
    if step < config.steps:
        raise UserError(f"{run} is at step {step} of {config.steps}; finish it first")
    params = found.ema if config.optim.ema else found.params
    return Trained(path=run, config=config, program=made, params=params, step=step, data=data)


def _load_exported(directory: Path) -> Trained:
    """Load an exported folder; a dataset with another fingerprint is ignored."""
    weights = folder.read(directory)
    config, data = weights.config, None
    if (Path(config.data.path) / manifest.FILE).exists():
        found = manifest.load(config.data.path)
        data = found if found.fingerprint == config.data.fingerprint else None
    made = program(config, weights.eos_id, weights.codebook)
    tree = folder.to_params(weights.tensors, config, weights.codebook)
    params = folder.place(tree, made.abstract.params)
    return Trained(
        path=directory,
        config=config,
        program=made,
        params=params,
        step=weights.step,
        data=data,
        separator=weights.eos_id,
    )
