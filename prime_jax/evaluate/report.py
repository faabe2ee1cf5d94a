"""Likelihoods of one run on sets of text, and their record `eval.json`.

eval.json (beside result.json; readable without this package):

    schema, run, step, family
    sets     one per set of text: data, rules (preset@version or split), hash, stride, context,
             texts, bytes (null: the tokenizer loses text), clusters, losses
    losses   as in result.json (records.Loss), with `valid` (a likelihood or a NELBO) and, if
             so, `perplexity` and `bits_per_byte`
    samples  one per sample file that was scored: `samples.py`
    tasks    one per harness call: `tasks.py`
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prime_jax.errors import UserError
from prime_jax.evaluate import likelihood
from prime_jax.evaluate.partial import Partial
from prime_jax.evaluate.score import Scorer, replicated
from prime_jax.evaluate.texts import TextSet
from prime_jax.evaluate.trained import Trained
from prime_jax.runtime.records import VALID, Loss, as_dict, read_json, write_json_atomic

SCHEMA = 1
FILE, WORK = "eval.json", "eval"


def names_of(run: Trained, asked: str) -> list[str]:
    """The estimators to run; by default all that apply.

    Args:
        asked: names separated by commas, or empty.
    Raises:
        UserError: an unknown estimator, or one that this family does not have.
    """
    arm = run.config.family == "arm"
    if not asked:
        return likelihood.estimators_of(run.config)
    names = list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
    for name in names:
        likelihood.estimator(name)
        if name == "greedy":
            raise UserError("estimator 'greedy' is not a likelihood; it is for the task harness")
        if arm != (name == "ar"):
            right = "its only estimator is ar" if arm else "use chain:l2r for left to right"
            raise UserError(
                f"estimator {name!r}: {run.path} is of family {run.config.family}; {right}"
            )
        likelihood.feasible(run.config, name)
    return names


def evaluate(
    scorer: Scorer,
    texts: TextSet,
    names: list[str],
    replicates: int,
    work: Path | None = None,
    tick: Callable[[str, int, float], None] = lambda name, rows, done: None,
    log: Callable[[str], None] = lambda line: None,
) -> list[Loss]:
    """All estimators on one set.

    Args:
        work: directory in which unfinished draws are saved for a later call; None: not saved.
        tick: called with the estimator, its number of draws, and how many were newly done (a part
            of one after a call of an estimator that takes many).
        log: receives a line that says what a long evaluation will take.
    """
    run = scorer.run
    n_tokens_W = scored_tokens(run, texts)
    losses = []
    for name in names:
        count = likelihood.passes(name, replicates)
        rows, window = replicated(len(texts.windows.tokens), count)
        identity = texts.identity | {
            "run": run.id,
            "step": run.step,
            "codebook": run.codebook.hash,
            "estimator": name,
            "replicates": count,
        }
        path = work and work / f"{texts.windows.hash}-{name.replace(':', '-')}.npz"
        partial = Partial(path, identity, len(window))
        report = functools.partial(tick, name, len(window))
        drawn = scorer.draws(name, texts.windows, rows, window, partial, report, log)
        nats = {label: drawn[label].reshape(count, -1) for label in (name, *drawn)}
        losses += likelihood.losses_of(run.config, name, nats, n_tokens_W, texts.doc)
        partial.discard()
    return losses


def scored_tokens(run: Trained, texts: TextSet) -> np.ndarray:
    """int [W]: targets in each window, without EOS where segment ids reveal the lengths."""
    scored = [t[s:] for t, s in zip(texts.windows.tokens, texts.windows.start, strict=True)]
    if run.config.data.segment_ids:
        scored = [tokens[tokens != run.eos_id] for tokens in scored]
    return np.array([len(tokens) for tokens in scored])


def described(loss: Loss, n_bytes: int | None) -> dict[str, Any]:
    """A loss for the record, with perplexity and bits if it is a likelihood or a bound."""
    valid = loss.kind in VALID
    out = as_dict(loss) | {"valid": valid}
    if valid:
        out["perplexity"] = math.exp(min(loss.value, 700.0))
        out["bits_per_byte"] = likelihood.bits_per_byte(loss, n_bytes or 0)
    return out


def as_record(texts: TextSet, losses: list[Loss]) -> dict[str, Any]:
    return {
        "data": texts.name,
        "rules": texts.rules,
        **texts.identity,
        "texts": texts.texts,
        "bytes": texts.n_bytes,
        "clusters": likelihood.clusters(texts.doc)[1],
        "losses": [described(loss, texts.n_bytes) for loss in losses],
    }


def stored(run: Trained, path: Path) -> dict[str, Any]:
    """The results in `path`, none where it is not there.

    Raises:
        UserError: the file belongs to another run, or is damaged.
    """
    about = {"schema": SCHEMA, "run": run.id, "step": run.step, "family": run.config.family}
    found = read_json(path) if path.exists() else about
    if not isinstance(found, dict) or any(found.get(k) != v for k, v in about.items()):
        raise UserError(f"{path} is not of run {run.id} at step {run.step}; move it away")
    return found


def store(run: Trained, path: Path, key: str, entry: dict[str, Any], same: tuple[str, ...]) -> None:
    """Add an entry to a list of eval.json, replacing one that agrees in the fields `same`.

    Losses of other estimators in the replaced entry are kept.

    Raises:
        UserError: the file belongs to another run, is damaged or cannot be written.
    """
    found = stored(run, path)
    entries = found.setdefault(key, [])
    for i, old in enumerate(entries):
        if all(old.get(field) == entry.get(field) for field in same):
            if "losses" in entry:
                new = {loss["estimator"] for loss in entry["losses"]}
                kept = [loss for loss in old["losses"] if loss["estimator"] not in new]
                entry = entry | {"losses": kept + entry["losses"]}
            entries[i] = entry
            break
    else:
        entries.append(entry)
    write_json_atomic(path, found)
