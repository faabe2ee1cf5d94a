"""Analysed runs: finished runs with a label each, and validation blocks."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prime_jax.data import loader, manifest
from prime_jax.errors import UserError
from prime_jax.evaluate import trained
from prime_jax.evaluate.trained import Trained
from prime_jax.objectives import targets

SEED = 4_711  # of masks; the same for all runs, for paired comparisons


@dataclass(frozen=True, eq=False)
class Subject:
    """A run, its label in tables and figures, and its dataset (its own, or a given one)."""

    name: str
    run: Trained
    data: manifest.Manifest | None

    def blocks(self, examples: int) -> loader.EvalBlocks:
        """Validation blocks.

        Raises:
            UserError: no dataset, or one of another tokenizer.
        """
        return loader.eval_blocks(self.data or self.run.dataset, "valid", examples)

    def target_counts(self, token_ExL: np.ndarray) -> np.ndarray:
        """int [E]: target tokens of each block."""
        return np.asarray(targets(self.run.config, token_ExL, self.run.eos_id)).sum(axis=1)

    @property
    def given(self) -> str:
        return "lengths" if self.run.config.data.segment_ids else ""

    @cached_property
    def params(self) -> Any:
        """All parameters, on one device."""
        return jax.device_put(jax.device_get(self.run.params), jax.devices()[0])

    def about(self) -> dict[str, Any]:
        c = self.run.config
        return {
            "run": self.name,
            "path": str(self.run.path),
            "id": self.run.id,
            "family": c.family,
            "length": self.run.codebook.length,
            "layers": c.model.layers,
            "width": c.model.width,
            "step": self.run.step,
            "permutation": self.run.codebook.hash,
        }


def load(attempts: list[list[Any]], data: Path | None = None) -> list[Subject]:
    """The runs, each with a unique label: family, l, a prefix of its id (and a number).

    Args:
        attempts: the directories of each run (`trained.load`).
    Raises:
        UserError: no such run, an unfinished one, or a dataset that does not match it.
    """
    runs = [trained.load(*directories) for directories in attempts]
    labels = [_label(run) for run in runs]
    labels = [f"{x} #{k + 1}" if labels.count(x) > 1 else x for k, x in enumerate(labels)]
    given = manifest.load(data) if data else None
    for run in runs if given else []:
        manifest.check(given, _any_data(run.config))
    return [Subject(n, run, given or run.data) for n, run in zip(labels, runs, strict=True)]


def _any_data(config: Any) -> Any:
    from dataclasses import replace

    return replace(config, data=replace(config.data, fingerprint=""))


def _label(run: Trained) -> str:
    length = f" l={run.codebook.length}" if run.config.family == "prime" else ""
    return f"{run.config.family}{length} {run.id[:6]}"


def diffusion_only(subjects: list[Subject], what: str) -> None:
    """Raises: UserError: an autoregressive run, which masks nothing, or block diffusion, whose
    network reads noisy and clean sequences and masks each block at its own level."""
    for subject in subjects:
        if subject.run.config.family == "arm":
            raise UserError(
                f"{subject.name}: {what} needs a diffusion model; family arm masks nothing"
            )
        if subject.run.config.objective.block_length:
            raise UserError(
                f"{subject.name}: {what} does not support block diffusion "
                "(objective.block_length); `prime-jax eval` gives its bound"
            )
