"""The presets: every plan can be made, and every number in a docstring is what our functions say."""

import ast
import json
import math
import re
import runpy
import shlex
from decimal import Decimal
from functools import cache
from pathlib import Path

import pytest

from prime_jax import cli, experiment, flops
from prime_jax.cli.sweep import plan_table
from prime_jax.config import FAMILIES, OptimConfig, RunConfig, SubtokenConfig, run_id, validate
from prime_jax.errors import UserError
from prime_jax.hardware import chips
from prime_jax.runtime import meshes
from prime_jax.sweep import grid, plan
from prime_jax.sweep.grid import Sweep

ROOT = Path(__file__).parents[1]
FILES = {
    name: experiment.located(f"preset:{name}")
    for name in ("c4_grid", "reference", "owt_92m", "text8", "lm1b", "slimpajama_1b")
}
LABELS = (14, 25, 36, 49, 64, 79, 106, 154, 201, 252, 315, 354, 413, 571, 771, 1107, 1529)
LABELS = (*LABELS, 2359, 3426)  # theory.md, "The published grid"
RETRACTED = re.compile(r"\b(?:7\.77|15\.36|13\.41|21\.8x)")

all_presets = pytest.mark.parametrize("name", FILES)


def test_the_package_names_its_presets():
    assert set(FILES) < set(experiment.presets())
    with pytest.raises(UserError, match=r"preset:c4grid: no such preset; did you mean c4_grid"):
        experiment.load_config("preset:c4grid")


@cache
def candidates(name: str) -> list[plan.Candidate]:
    return plan.candidates(grid.load_experiment(FILES[name]), {})


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse(FILES[name].read_text()))


def words(candidate: plan.Candidate) -> set[str]:
    """What a row of a docstring's table can be called by."""
    row, reference = candidate.row, flops.param_counts(candidate.config)["reference"]
    budget = f"{row.budget:.0e}".replace("e+", "e")
    return {"all", row.family, budget, f"{reference / 1e6:.0f}M"}


def column(title: str, group: list[RunConfig]) -> float:
    """The value of a table's column for the runs of one row."""
    counts = {
        "N reference": "reference",
        "N": "nonembedding",
        "N with head": "nonembedding_plus_head",
        "N total": "total",
    }
    if title in counts:
        (count,) = {flops.param_counts(config)[counts[title]] for config in group}
        return count
    matmul = sum(flops.train_flops(config, "matmul") for config in group)
    tokens = sum(config.tokens for config in group)
    if title.startswith("epochs of "):
        return tokens / float(title.removeprefix("epochs of "))
    peaks = {"v5e hours": "TPU v5 lite", "H100 hours": "NVIDIA H100"}
    if title in peaks:
        return matmul / (0.4 * chips.peak_flops(peaks[title])) / 3600
    return {
        "runs": len(group),
        "D": tokens,
        "C reference": sum(flops.train_flops(config, "reference") for config in group),
        "C matmul": matmul,
    }[title]


def tables(text: str) -> list[tuple[str, str, str]]:
    """(label, column, cell) of every cell of the tables in a docstring."""
    cells, titles = [], None
    for line in text.splitlines():
        if not line.strip().startswith("|"):
            titles = None
            continue
        row = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not row[0].strip("-"):
            continue
        if titles is None:
            titles = row
        else:
            cells += [(row[0], *pair) for pair in zip(titles[1:], row[1:], strict=True)]
    return cells


def rounds_to(quoted: str, value: float) -> bool:
    """Whether `quoted` is `value` to the digits that it gives."""
    number = Decimal(quoted.replace(",", ""))
    half = Decimal(5).scaleb(number.as_tuple().exponent - 1)
    return abs(Decimal(value) - number) <= half


def test_rounding_to_the_digits_given():
    assert rounds_to("1.23e9", 1.2349e9)
    assert not rounds_to("1.23e9", 1.236e9)
    assert rounds_to("1,456", 1456.4)
    assert not rounds_to("1,456", 1457.0)


@all_presets
def test_every_row_of_every_plan_can_run(name):
    listed = candidates(name)
    assert listed
    assert [c.drop for c in listed if c.drop] == []
    table = plan_table(grid.load_experiment(FILES[name]), listed, 1e14)
    assert len(table.rows) == len(listed)
    assert f"{len(listed)} OK, 0 DROP" in table.notes[0]


def test_memory_of_the_largest_size_of_the_grid():
    params = max(flops.param_counts(c.config)["total"] for c in candidates("c4_grid"))
    assert "78 GB, is 5 GB on each of 16 chips" in docstring("c4_grid").replace("\n", " ")
    assert (round(16 * params / 1e9), round(params / 1e9)) == (78, 5)
    (total,) = {flops.param_counts(c.config)["total"] for c in candidates("slimpajama_1b")[:1]}
    choice = meshes.choose(candidates("slimpajama_1b")[0].config, 16)
    assert (choice.data, choice.replica) == (16, 1), "chips share the parameters"
    assert total > meshes.SMALL == 64_000_000


@all_presets
def test_the_arithmetic_of_the_docstring(name):
    cells = [cell for cell in tables(docstring(name)) if cell[2] != "-"]
    assert {"D", "C reference", "C matmul", "v5e hours", "H100 hours"} <= {c[1] for c in cells}
    wrong = []
    for label, title, quoted in cells:
        group = [c.config for c in candidates(name) if set(label.split()) <= words(c)]
        assert group, f"{name}: no run is called {label!r}"
        value = column(title, group)
        if not rounds_to(quoted, value):
            wrong.append(f"{label} {title}: {quoted}, not {value:.6g}")
    assert wrong == []
    labels = {label for label, *_ in cells}
    assert labels >= {c.row.family for c in candidates(name)} | {"all"}


@all_presets
def test_products_and_speeds_in_the_prose(name):
    text = docstring(name)
    for batch, length, tokens in re.findall(r"1M steps x (\d+) x (\d+) = ([\d.e]+\d)", text):
        assert rounds_to(tokens, 1e6 * int(batch) * int(length))
        assert {c.config.tokens for c in candidates(name)} == {10**6 * int(batch) * int(length)}
    for speed, chip in re.findall(r"([\d.]+e\d+)(?: FLOP/s)? on an? (v5e|H100)", text):
        peak = chips.peak_flops({"v5e": "TPU v5 lite", "H100": "NVIDIA H100"}[chip])
        assert rounds_to(speed, 0.4 * peak)
    for size, budget, tokens in re.findall(r"longest run, (\d+M) at (\w+), reads ([\d.e]+)", text):
        longest = max(candidates(name), key=lambda c: c.config.tokens)
        assert {size, budget} <= words(longest)
        assert rounds_to(tokens, longest.config.tokens)


def test_the_costs_of_the_page():
    cells = tables((ROOT / "docs" / "presets.md").read_text())
    assert {label for label, *_ in cells} == {f"`{name}`" for name in FILES}
    for label, title, quoted in cells:
        group = [c.config for c in candidates(label.strip("`"))]
        assert rounds_to(quoted, column(title, group)), (label, title, column(title, group))


@all_presets
def test_bits_and_perplexities_of_the_docstring_convert(name):
    text = docstring(name)
    for perplexity, nats in re.findall(r"perplexity (\S+) = (\S+) nats", text):
        assert rounds_to(nats, math.log(float(perplexity)))
    for bits, nats in re.findall(r"(\S+) bits = (\d\S+) nats", text):
        assert rounds_to(nats, float(bits) * math.log(2))


@all_presets
def test_the_preparation_of_the_docstring_fits_the_runs(name):
    text = docstring(name).replace("\\\n", " ")
    commands = [line.strip() for line in text.splitlines() if "data prepare" in line]
    if name == "reference":
        assert "preset:c4_grid" in text
        return
    (command,) = commands
    _, args = cli.parsed(shlex.split(command)[1:])
    for candidate in candidates(name):
        assert str(args.out) == candidate.config.data.path
        assert args.request.seq_len == candidate.config.data.seq_len
        size = args.request.tokenizer.partition(":")[2]
        assert not size.isdigit() or int(size) == candidate.config.model.vocab_size


@pytest.mark.parametrize(
    "path", [*FILES.values(), ROOT / "docs" / "presets.md"], ids=lambda p: p.stem
)
def test_retracted_numbers_are_called_retracted(path):
    for paragraph in re.split(r"\n\s*\n", path.read_text()):
        if RETRACTED.search(paragraph):
            assert "retracted" in paragraph


def test_the_c4_grid_has_the_published_cells():
    oracle = json.loads((ROOT / "tests" / "oracles" / "mdm_prime_v2_isoflop.json").read_text())
    shapes = runpy.run_path(str(FILES["c4_grid"]))["SHAPES"]
    assert tuple(shapes) == LABELS
    published = {
        (family, float(budget), 3426 if size == 3416 else round(size))
        for family, record in oracle["families"].items()
        for budget, points in record["budgets"].items()
        for size in points["params_millions"]
    }
    ours = [(c.row, flops.param_counts(c.config)) for c in candidates("c4_grid")]
    assert len(ours) == 195
    assert {(r.family, r.budget, round(n["reference"] / 1e6)) for r, n in ours} == published


def test_the_c4_grid_spends_each_budget_at_the_published_batch():
    for c in candidates("c4_grid"):
        size = flops.param_counts(c.config)["reference"]
        assert c.config.batch_size == (512 if size > 1.5e9 else 256)
        assert c.config.optim.peak_lr == 2e-4
        assert flops.train_flops(c.config, "reference") == pytest.approx(c.row.budget, rel=1e-3)


def test_as_published_turns_any_run_into_the_published_recipe():
    as_published = runpy.run_path(str(FILES["reference"]))["as_published"]
    for family in FAMILIES:
        slots = SubtokenConfig(length=10 if family == "prime" else 1)
        plain = RunConfig(family=family, subtokens=slots, optim=OptimConfig(warmup_steps=100))
        run = validate(as_published(plain))
        assert run.model.dropout == 0.1
        assert run.model.tied_head == (family == "arm")
        assert (run.objective.loss, run.objective.carry_over) == (
            ("joint", False) if family == "prime" else ("marginal", True)
        )
    base = {(c.row.family, c.row.budget, c.config.model.width, c.config.model.layers): c.config
            for c in candidates("c4_grid")}  # fmt: skip
    for c in candidates("reference"):
        model = c.config.model
        ours = base[c.row.family, c.row.budget, model.width, model.layers]
        assert run_id(c.config) == run_id(as_published(ours))


def test_slimpajama_has_the_published_sizes_and_steps():
    run = experiment.load_config(FILES["slimpajama_1b"])
    assert flops.param_counts(run)["nonembedding"] == 1_027_677_952
    assert f"{flops.param_counts(run)['total'] / 1e9:.1f}" == "1.1"
    small = grid.rules.with_shape(run, (6, 256, 4))
    assert flops.param_counts(small)["nonembedding"] == 6_294_784
    text = docstring("slimpajama_1b")
    for number in (1_027_677_952, 6_294_784, run.steps):
        assert f"{number:,}" in text
    assert f"{run.model.init_std:.4f}" in text
    assert run.optim.warmup_steps == run.steps // 100
    (alone,) = [c for c in candidates("slimpajama_1b") if c.row.family == "prime"]
    assert run_id(alone.config) == run_id(run)


def test_studies_give_every_family_the_same_tokens():
    for name in ("owt_92m", "text8", "lm1b", "slimpajama_1b"):
        base = experiment.call(FILES[name], "sweep", Sweep).base
        assert {c.config.tokens for c in candidates(name)} == {base.tokens}
        assert {c.config.optim.peak_lr for c in candidates(name)} == {base.optim.peak_lr}
        assert {c.config.optim.warmup_steps for c in candidates(name)} == {base.optim.warmup_steps}


def test_base_sizes_named_in_the_openwebtext_study():
    from prime_jax import subtokens

    bases = [subtokens.base(50257, length) for length in (2, 3, 4, 6, 8, 16)]
    assert ", ".join(map(str, bases)) in docstring("owt_92m")
