"""Tasks of the lm-evaluation-harness for a finished run, from local files or the network.

The eight tasks of the published table are in offline/: each uses the harness's prompts and reads
DIR/NAME.jsonl, with the field names of the original dataset. All other tasks of the harness work
where their data can be downloaded.
"""

import dataclasses
import hashlib
import importlib.util
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_jax.errors import UserError
from prime_jax.evaluate.score import Scorer
from prime_jax.evaluate.trained import Trained
from prime_jax.settings import nearest

OFFLINE = Path(__file__).parent / "offline"
FEWSHOT_SEED = 1234  # default of the harness
MEASURES = ("acc", "acc_norm", "f1", "exact_match", "bits_per_byte", "perplexity")
LIKELIHOOD = {
    "nll_type": ("subtoken", "token", "chain:l2r"),
    "mc_num": (32, 128, 512),
    "cfg": (0.0, 0.5, 1.0),
}
MAY_BE_EMPTY = ("support", "reason")  # fields that the published records leave empty
GENERATION = {"gen_length": (64, 256), "steps": (32, 128), "block_length": (8, 32, 128)}


@dataclass(frozen=True)
class Call:
    """One call of the harness.

    Attributes:
        names: tasks, separated by commas.
        data: directory of local files; None: the harness's datasets.
        include: directory with more task definitions.
        limit: documents per task; None for all.
    """

    names: str
    data: Path | None = None
    include: Path | None = None
    limit: int | None = None


def check(names: str, include: Path | None, data: Path | None) -> None:
    """Check the options before a run is loaded.

    Raises:
        UserError: the harness is not installed, a directory is missing, an unknown offline task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs the harness; install it with: pip install 'prime_jax[eval]'")
    for option, directory in (("--include-path", include), ("--task-data", data)):
        if directory is not None and not directory.is_dir():
            raise UserError(f"{option} {directory}: no such directory")
    if not expanded(names):
        raise UserError(f"--tasks {names}: names no task")
    if data is not None:
        for name in expanded(names) if include is None else []:
            if not (OFFLINE / f"{name}.yaml").exists():
                raise UserError(f"--tasks {name}: no such offline task{nearest(name, available())}")
            if not (data / f"{name}.jsonl").exists():
                raise UserError(f"--tasks {name}: {data / f'{name}.jsonl'} does not exist")
            check_records(data / f"{name}.jsonl")


def check_records(file: Path) -> None:
    """Hold every record of a local task against the first one: its fields and their types.

    Raises:
        UserError: the file, the line and the field; or there is no record.
    """
    first: dict[str, Any] | None = None
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: no JSON object") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: no JSON object")
        first = record if first is None else first
        _check_like(first, record, where)
    if first is None:
        raise UserError(f"{file}: no record")


def _check_like(first: Any, found: Any, where: str, field: str = "") -> None:
    """Raises UserError where `found` is not of the form of `first`, or is an empty text."""
    words = {str: "text", bool: "true or false", int: "a number", float: "a number"}
    words |= {list: "a list", dict: "an object", type(None): "null"}
    kind, needed = words[type(found)], words[type(first)]
    if found is None or kind != needed:
        right = "something" if first is None else needed
        raise UserError(f"{where}: {field} is {kind}; it must be {right}")
    if found == "" and field not in MAY_BE_EMPTY:
        raise UserError(f"{where}: {field} is empty")
    if isinstance(found, dict):
        for name, value in first.items():
            inner = f"{field}.{name}" if field else name
            if name not in found:
                raise UserError(f"{where}: no field {inner}")
            _check_like(value, found[name], where, inner)
    elif isinstance(found, list):
        for part in found:
            _check_like(first[0] if first else part, part, where, field)


def available() -> list[str]:
    return sorted(path.stem for path in OFFLINE.glob("*.yaml"))


def expanded(names: str) -> list[str]:
    """Task names, with the group `anli` replaced by its members."""
    out: list[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        out += ["anli_r1", "anli_r2", "anli_r3"] if name == "anli" else [name]
    return list(dict.fromkeys(out))


def settings(text: str, *, offline: bool) -> Any:
    """The harness settings of `--model-args`."""
    _prepare(offline=offline)
    from prime_jax.evaluate.harness import Settings

    return Settings.parse(text)


def _prepare(*, offline: bool) -> None:
    """Set the environment and log levels; the harness reads them when it is imported."""
    if offline:
        os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # we have our own progress bar
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load(call: Call) -> dict[str, Any]:
    """The harness's `TaskDict`: tasks with their documents, and groups.

    Raises:
        UserError: an unknown task, or data that cannot be read.
    """
    from lm_eval.tasks import TaskManager

    names = expanded(call.names)
    local = [name for name in names if call.data and (OFFLINE / f"{name}.yaml").exists()]
    manager = TaskManager(
        include_path=str(call.include) if call.include else None,
        include_defaults=len(local) < len(names),
    )
    unknown = [n for n in names if n not in local and n not in manager.all_tasks]
    if unknown:
        known = [*manager.all_tasks, *available()]
        raise UserError(f"--tasks {unknown[0]}: no such task{_close(unknown[0], known)}")
    specs = [offline(name, call.data) if name in local else name for name in names]
    try:
        loaded = manager.load(specs)
    except Exception as error:  # datasets raise many types for file and network errors
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise UserError(f"--tasks {call.names}: {type(error).__name__}: {reason}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _close(name: str, known: list[str]) -> str:
    hint = nearest(name, known)
    return hint if hint.startswith("; did") else ""


def offline(name: str, data: Path) -> dict[str, Any]:
    """The harness's definition of an offline task, with its records in a local file."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    ours = load_yaml(OFFLINE / f"{name}.yaml", recursive=False)
    theirs = load_yaml(Path(lm_eval.tasks.__file__).parent / ours.pop("include"))
    files = {k: str(data / v) for k, v in ours["dataset_kwargs"]["data_files"].items()}
    theirs.pop("tag", None)
    return theirs | ours | {"dataset_kwargs": {"data_files": files}}


def evaluate(scorer: Scorer, call: Call, chosen: Any, tick: Any) -> dict[str, Any]:
    """Run the tasks once; returns the entry of eval.json. Call `settings` before."""
    import lm_eval
    from lm_eval import evaluator

    from prime_jax.evaluate.harness import PrimeJax

    if chosen.cfg != scorer.guidance:
        scorer = Scorer(
            scorer.run,
            devices=scorer.mesh.size,
            batch_size=scorer.batch_size,
            guidance=chosen.cfg,
        )
    model = PrimeJax(scorer=scorer, tick=tick, **dataclasses.asdict(chosen))
    found = evaluator.evaluate(
        lm=model, task_dict=load(call), limit=call.limit, bootstrap_iters=1000, log_samples=False
    )
    return {
        "tasks": call.names,
        "settings": dataclasses.asdict(chosen),
        "estimator": model.estimator,
        "limit": call.limit,
        "local": call.data is not None,
        "data_hash": _data_hash(call),
        "harness": lm_eval.__version__,
        "contexts_cut": model.contexts_cut,
        "documents": {name: n["effective"] for name, n in found.get("n-samples", {}).items()},
        "results": {name: _measures(values) for name, values in found["results"].items()},
    }


def _data_hash(call: Call) -> str | None:
    """Twelve hex digits of the local files that the tasks read; other records are another result."""
    if call.data is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(call.data / f"{name}.jsonl" for name in expanded(call.names)):
        if file.is_file():
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _measures(values: dict[str, Any]) -> dict[str, Any]:
    """{measure: [value, standard error or null]}."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        name, _, rest = key.partition(",")
        if name.endswith("_stderr") or not rest or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{name}_stderr,{rest}")
        known = isinstance(error, (int, float)) and math.isfinite(error)
        out[name] = [float(value), float(error) if known else None]
    return out


def mean_accuracy(results: dict[str, Any]) -> float | None:
    """Mean over tasks; the rounds of anli count as one task, as in the published table."""
    by_task: dict[str, list[float]] = {}
    for name, values in results.items():
        if "acc" in values:
            by_task.setdefault(name.partition("_r")[0] if "anli" in name else name, []).append(
                values["acc"][0]
            )
    means = [sum(values) / len(values) for values in by_task.values()]
    return sum(means) / len(means) if means else None


def output_types(call: Call) -> set[str]:
    return {task.OUTPUT_TYPE for task in load(call)["tasks"].values()}


def variations(chosen: Any, run: Trained, kinds: set[str]) -> list[Any]:
    """The settings with one changed at a time, limited to those that affect these tasks.

    Args:
        kinds: output types of the tasks (`output_types`).
    """
    changes: dict[str, tuple] = {}
    if run.config.family != "arm":
        changes |= LIKELIHOOD if kinds - {"generate_until"} else {"cfg": LIKELIHOOD["cfg"]}
    if "generate_until" in kinds:
        size = run.config.data.seq_len
        changes |= {k: tuple(v for v in vs if v < size) for k, vs in GENERATION.items()}
    out = [chosen]
    for name, values in changes.items():
        out += [dataclasses.replace(chosen, **{name: value}) for value in values]
    return list(dict.fromkeys(out))
