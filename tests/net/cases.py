"""Inputs of test_net.py: configs, tables, and the stored sweep."""

import contextlib
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

from prime_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    SubtokenConfig,
)
from prime_jax.settings import set_path

HERE = Path(__file__).parent
SWEEP, TABLE = HERE / "sweep", HERE / "runs.csv"
ORACLE = HERE.parent / "oracles" / "mdm_prime_v2_isoflop.json"
BOOTSTRAP = ("--bootstrap", "100", "--seed", "0")
PRESETS = ("quickstart", "c4_grid", "reference", "owt_92m", "text8", "lm1b", "slimpajama_1b")

VARIANTS = {
    "arm": {"family": "arm", "subtokens.length": 1},
    "mdm": {"family": "mdm", "subtokens.length": 1},
    "prime": {},
    "blocks": {"objective.block_length": 4},
}
CONFIGS = {
    "default": RunConfig(),
    "quickstart": RunConfig(
        family="prime",
        subtokens=SubtokenConfig(length=9),
        batch_size=16,
        model=ModelConfig(vocab_size=257, layers=2, width=40, heads=2, init_std=0.1),
        objective=ObjectiveConfig(weight="flat"),
        data=DataConfig(path="data/quickstart", seq_len=64),
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=100),
        eval=EvalConfig(examples=128, estimators=("subtoken",), batch_size=128),
    ),
    "unusual": RunConfig(
        family="mdm",
        seed=3,
        steps=77,
        model=ModelConfig(kv_heads=1, rope_tables="bfloat16", tied_head=True, dropout=0.1),
        objective=ObjectiveConfig(schedule="geometric", block_length=16, time_steps=32),
        data=DataConfig(path="elsewhere", fingerprint="0123456789abcdef", segment_ids=True),
        optim=OptimConfig(schedule="wsd", ema=0.999),
        eval=EvalConfig(estimators=("token", "finite:4"), every=10),
        checkpoint=CheckpointConfig(every=5),
    ),
}


def variant(tiny: RunConfig, name: str) -> RunConfig:
    """`tiny`, changed, with checkpoints on the way and one estimator, which compiles sooner."""
    config = replace(tiny, checkpoint=CheckpointConfig(every=5, keep=9))
    config = set_path(config, "eval.estimators", ("subtoken",))
    for path, value in VARIANTS[name].items():
        config = set_path(config, path, value)
    return config


# --- tables


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def curves(rows: list[dict[str, str]]) -> list[dict]:
    """Training curves of a known law for the runs of a table: two decades of tokens each."""
    return [
        {"run": row["run"], "tokens": d, "loss": 1.8 + 400 / n**0.34 + 2000 / d**0.38}
        for row in rows
        if row["loss"]
        for n in [float(row["params"])]
        for d in [float(row["tokens"]) * 10 ** (k / 12) for k in range(-24, 1)]
    ]


def published() -> list[dict]:
    """The published IsoFLOP table."""
    return [
        {"family": name, "kind": record["kind"], "flops": budget, "params": 1e6 * n, "loss": loss}
        for name, record in json.loads(ORACLE.read_text())["families"].items()
        for budget, runs in record["budgets"].items()
        for n, loss in zip(runs["params_millions"], runs["loss"], strict=True)
    ]


# --- the stored sweep: its rows, and where its data lies

DATA, GONE = "<data>", "<data>-gone"  # in place of a folder; of the other nobody has the data
OPEN = {"family": "arm", "width": 16, "seed": 1}  # planned, not yet trained
ADDED = {"family": "arm", "width": 16, "seed": 2}  # comes with the test


def rows(data: str) -> list[dict]:
    """What the stored sweep has trained; the last one failed."""
    return [
        *(
            {"family": "arm", "width": width, "seed": 0, "steps": steps}
            for steps in (16, 48, 144)
            for width in (16, 24, 32)
        ),
        {"family": "mdm", "width": 16, "seed": 0},
        {"family": "prime", "width": 16, "seed": 0},
        {"family": "prime", "width": 16, "seed": 5, "path": f"{data}-gone"},
    ]


def row(short: dict, data: str) -> dict:
    """A row of a JSON EXPERIMENT; what it compiles is that of a `variant` of its width."""
    changes = {
        "model.vocab_size": 16,
        "data.path": short.get("path", data),
        "data.seq_len": 16,
        "optim.warmup_steps": 2,
        "eval.examples": 16,
        "eval.replicates": 8,
        "eval.batch_size": 64,
        "eval.estimators": ["subtoken"],
        "mesh.replica": 1,
        "mesh.data": 1,
        "log.every": 4,
        "subtokens.length": 4 if short["family"] == "prime" else 1,
    }
    return {
        "family": short["family"],
        "budget": 6e6 * short.get("steps", 8),
        "seed": short["seed"],
        "layers": 1,
        "width": short["width"],
        "heads": 1,
        "steps": short.get("steps", 8),
        "batch_size": 8,
        "peak_lr": 1e-2,
        "overrides": changes,
    }


def unpack(root: Path, data: str) -> Path:
    """Copy the stored sweep to `root`, with its data at `data`."""
    shutil.copytree(SWEEP, root)
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".npy":
            path.write_text(path.read_text().replace(DATA, data))
    return root


def configs_of(root: Path) -> list[dict]:
    """The configs of the runs of a sweep."""
    specs = sorted((root / "state").glob("*.spec"))
    return [json.loads(path.read_text())["config"] for path in specs]


@contextlib.contextmanager
def own_compilation_cache():
    """A sweep sets JAX's cache; afterwards it is what it was."""
    import jax

    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)
    try:
        yield
    finally:
        jax.config.update(name, before)
