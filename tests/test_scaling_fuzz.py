"""Random tables of runs, curves and records of sweeps: a fit, or one line that says why not."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
from scaling_cases import csv_rows, surface

from prime_jax import scaling
from prime_jax.errors import UserError

sys.path.append(str(Path(__file__).parent / "net"))
import cases

pytestmark = pytest.mark.slow
SEEDS, TABLES = (1, 2, 3), 20
ODD = (
    "", " ", "nan", "NaN", "inf", "-inf", "1e400", "-1", "0", "1e-300", "1e300", "N/A", "None", "é", "[red]x[/]",
    "$x_{1}$", "18M", "3,21", "1e18 FLOPs", "a" * 500, '"', "'", "\t", "done", "crashed", "True", "0x10", "1_000", "²",
)  # fmt: skip
NAMES = (
    "run", "seed", "step", "status", "State", "kind", "loss_se", "budget", "lr", "batch_size", "epochs", "unique_tokens",
    "given", "tokenizer", "eval_set", "schedule", "tokens_per_step", "reason", "index", "", "n_params", "val_loss",
)  # fmt: skip
ENDINGS = ("\n", "\r\n", "\r", "\n\n")


def told(act):
    """What `act` returns, or None where it says in one line why it cannot."""
    try:
        return act()
    except UserError as error:
        said = str(error).splitlines()
    assert len(said) == 1, said
    return None


def rows_of(rng):
    """A table that can be fitted, of one or two families, then with cells and columns made odd."""
    budgets = [10 ** rng.uniform(15, 20) for _ in range(rng.randint(1, 6))]
    ratios = [2 ** rng.uniform(-3, 3) for _ in range(rng.randint(1, 8))]
    rows = csv_rows(surface(budgets=budgets, ratios=ratios, noise=rng.choice((0, 1e-3, 0.1))))
    if rng.random() < 0.4:
        rows = rows + [row | {"family": "other", "loss": row["loss"] * 1.1} for row in rows]
    for name in rng.sample(NAMES, rng.choice((0, 1, 1, 2))):
        values = rng.choice((ODD, (1, 2, 3), ("nll",), ("",), (1e9, 2e10), ("finished", "crashed")))
        rows = [row | {name: rng.choice(values)} for row in rows]
    for _ in range(rng.choice((0, 0, 0, 1))):
        rng.choice(rows)[rng.choice(list(rows[0]))] = rng.choice(ODD)
    if rng.random() < 0.05:
        rows = [{k: v for k, v in row.items() if k != rng.choice(list(row))} for row in rows]
    if rng.random() < 0.1:
        rows = rows + rng.choices(rows, k=2)
    return rows


def text_of(rng, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    if rng.random() < 0.1:
        return json.dumps(rng.choice((rows, {name: [row.get(name) for row in rows] for name in names}, rows[0])))  # fmt: skip
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    comma, quote = rng.choice(",,,,,,,,,;|"), rng.random() < 0.3
    text = rng.choice(ENDINGS).join(
        comma.join(f'"{cell}"' if quote else str(cell) for cell in line) for line in lines
    )
    if rng.random() < 0.1:
        cut = rng.randrange(len(text))
        text = text[:cut] + rng.choice(("", "\0", '"', "\ud7ff", "\n,,")) + text[cut + 1 :]
    return rng.choice(("", "", "", "", "", "", "# mine\n", "\ufeff", "sep=,\n", "[")) + text


def ask(fit):
    """All that can be asked of a fit without drawing it."""
    fit.summary()
    json.dumps(fit.to_dict(), allow_nan=False)
    for name, family in fit.families.items():
        flops = family.points.levels[-1] * 3
        told(lambda name=name, c=flops: scaling.predict(fit, c, name))
        told(lambda name=name, c=flops: scaling.design(fit, name, target=c, budget=c))
    if len(fit.families) > 1:
        told(lambda: scaling.compare(fit, baseline=next(iter(fit.families))).summary())
    told(lambda: scaling.validate(fit).summary())


@pytest.mark.parametrize("seed", SEEDS)
def test_random_tables(seed, tmp_path, capsys):
    rng, fitted = random.Random(seed), 0
    for k in range(TABLES):
        path = tmp_path / f"{k}.csv"
        text = text_of(rng, rows_of(rng))
        path.write_bytes(text.encode(rng.choice((*["utf-8"] * 9, "utf-16")), "replace"))
        options = {"approach2": rng.choice(("parabola", "akima")), "objective": rng.choice(("huber", "ls"))}  # fmt: skip
        try:
            found = told(lambda p=path, o=options: scaling.fit(p, replicates=100, **o))
            if found:
                fitted += 1
                if fitted % 3 == 1:
                    ask(found)
            if found and fitted == 1:
                found.save(tmp_path / str(k))
                assert scaling.load(tmp_path / str(k)).to_dict()["families"]
        except Exception as error:
            raise AssertionError(f"table {k} of seed {seed}: {text[:2000]}") from error
    assert fitted
    assert "Traceback" not in capsys.readouterr().err


def curve_rows(rng):
    """Long or wide training curves of the runs r0 to r8."""
    steps = range(rng.randint(1, 30))
    if rng.random() < 0.5:
        rows = [
            {"run": f"r{k}", "step": step, "loss": 4 - step / 50 + k / 100}
            for k in range(9)
            for step in steps
        ]
    else:
        rows = [{"Step": step} | {f"r{k} - loss": 4 - step / 50 for k in range(9)} for step in steps]  # fmt: skip
    for _ in range(rng.choice((0, 0, 1, 4))):
        rng.choice(rows)[rng.choice(list(rows[0]))] = rng.choice(ODD)
    return rows


@pytest.mark.parametrize("seed", range(2))
def test_random_curves(seed, tmp_path):
    rng = random.Random(100 + seed)
    part = surface(budgets=(1e18, 3e18, 1e19), ratios=(0.5, 1, 2), noise=1e-3)
    runs = [
        row | {"run": f"r{k % 9}", "tokens_per_step": 1e6, "schedule": "constant"}
        for k, row in enumerate(csv_rows(part))
    ]
    for k in range(15):
        extra = {name: rng.choice(ODD) for name in rng.sample(NAMES, rng.choice((0, 0, 1)))}
        paths = tmp_path / f"{k}.csv", tmp_path / f"curves{k}.csv"
        for path, rows in zip(paths, ([row | extra for row in runs], curve_rows(rng)), strict=True):
            path.write_bytes(text_of(rng, rows).encode("utf-8", "replace"))
        told(lambda p=paths: scaling.fit(p[0], curves=p[1], replicates=100))
        told(lambda p=paths: scaling.fit(p[1], curves=p[1], replicates=100))


def odd_record(rng, row):
    """A record of a step as a crash, another version or a disk may leave it."""
    values = (None, "x", -1, 0, float("nan"), float("inf"), [], {}, True, 1e308, [{}], [1], "3")
    made = dict(row)
    for name in rng.sample([*row, "step", "eval", "loss"], 2):
        made[name] = rng.choice(values)
    if rng.random() < 0.3:
        made["eval"] = [{"estimator": "ar", "kind": "nll", "value": rng.choice(values)}]
    for name in rng.sample(list(made), 1):
        del made[name]
    text = json.dumps(made)
    return text[: rng.randrange(len(text))] if rng.random() < 0.2 else text


@pytest.mark.parametrize("seed", range(2))
def test_random_records_of_steps(seed, tmp_path):
    rng = random.Random(200 + seed)
    for k in range(3):
        root = tmp_path / str(k)
        shutil.copytree(cases.SWEEP, root)
        for spec in (root / "state").glob("*.spec"):
            spec.write_text(spec.read_text().replace('"cosine"', '"wsd"'))
        for log in (root / "runs").rglob("metrics.jsonl"):
            lines = log.read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            for _ in range(rng.randint(0, 5)):
                lines.insert(rng.randrange(len(lines) + 1), odd_record(rng, rng.choice(rows)))
            log.write_bytes("\n".join(lines).encode() + rng.choice((b"", b"\n", b'{"step": 5, "lo', b"\xff\n")))  # fmt: skip
        found = told(lambda root=root: scaling.fit(root, replicates=100))
        assert found is None or found.summary()
