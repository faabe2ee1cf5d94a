import dataclasses
import json
import math
import re
from pathlib import Path

import fake_trainer
import pytest

from prime_jax import experiment, flops
from prime_jax.config import RunConfig, run_id
from prime_jax.errors import UserError
from prime_jax.settings import set_path
from prime_jax.sweep import grid, rules

SWEEP_FILE = """
from prime_jax.config import DataConfig, ModelConfig, RunConfig
from prime_jax.sweep.grid import Sweep

def sweep():
    base = RunConfig(model=ModelConfig(vocab_size=64), data=DataConfig(seq_len=16))
    return Sweep("mine", base, {"arm": {}}, [1e9], [(2, 32, 2)], batch="fixed:4", lr="fixed:1e-3")

def config():
    return RunConfig(family="mdm")
"""


def test_rows_are_families_times_budgets_times_sizes_times_seeds():
    rows = grid.rows(fake_trainer.sweep(extra_seeds={2e9: (1, 2)}))
    keys = [(r.family, r.budget, r.layers, r.seed) for r in rows]
    assert len(set(keys)) == len(keys) == 2 * 2 * (1 + 3)
    assert [r.budget for r in rows] == sorted(r.budget for r in rows)
    assert {r.seed for r in rows if r.budget == 1e9} == {0}
    assert {r.seed for r in rows if r.budget == 2e9} == {0, 1, 2}


@pytest.mark.parametrize("convention", flops.CONVENTIONS)
def test_steps_spend_the_budget(convention):
    for row in grid.rows(fake_trainer.sweep(flops=convention)):
        config = grid.to_config(row)
        one_step = flops.train_flops(dataclasses.replace(config, steps=1), convention)
        assert abs(flops.train_flops(config, convention) - row.budget) <= one_step / 2
        assert config.optim.warmup_steps <= row.steps // 10


def test_configs_carry_base_family_and_rules():
    base = set_path(fake_trainer.BASE, "optim.weight_decay", 0.3)
    families = {"arm": {}, "coarse": {"family": "prime", "subtokens.length": 2, "seed": 9}}
    rows = grid.rows(fake_trainer.sweep(base=base, families=families))
    coarse = next(r for r in rows if r.family == "coarse")
    config = grid.to_config(coarse)
    assert (config.family, config.subtokens.length, config.optim.weight_decay) == ("prime", 2, 0.3)
    assert (config.optim.peak_lr, config.batch_size, config.seed) == (1e-3, 4, 0)
    expected = {
        "sizes": "given",
        "shape": "given",
        "batch": "fixed:4",
        "lr": "fixed:1e-3",
        "warmup": "capped",
    }
    assert coarse.rules == expected
    arm = grid.to_config(next(r for r in rows if r.family == "arm"))
    assert (arm.family, arm.subtokens.length) == ("arm", 1)


def test_sizes_by_budget_by_target_and_around_the_optimum():
    by_budget = grid.rows(fake_trainer.sweep(sizes={1e9: [(2, 32, 2)], 2e9: [5e4]}))
    assert {(r.budget, r.layers) for r in by_budget} == {(1e9, 2), (2e9, 3)}
    assert {r.rules["shape"] for r in by_budget} == {"given", "aspect"}
    around = grid.rows(
        fake_trainer.sweep(budgets=(1e15,), families={"arm": {}}, sizes=grid.Around(4, 5))
    )
    counts = [flops.param_counts(grid.to_config(r))["nonembedding"] for r in around]
    optimum = (1e15 / 120) ** 0.5
    assert counts == pytest.approx([optimum * 2.0**i for i in range(-2, 3)], rel=0.2)
    assert around[0].rules["sizes"] == "around:chinchilla"
    with pytest.raises(UserError, match="sizes"):
        grid.rows(fake_trainer.sweep(sizes={1e9: [(2, 32, 2)]}))


def test_a_user_function_is_a_rule_and_its_name_is_recorded():
    def half(cell):
        return cell.budget / 1e12

    def sizes_of(config, budget):
        return [(2, 32, 2)] if config.family == "arm" else [(3, 32, 2)]

    rows = grid.rows(fake_trainer.sweep(lr=half, sizes=sizes_of))
    assert {(r.budget, r.peak_lr, r.rules["lr"]) for r in rows} == {
        (1e9, 1e-3, "half"),
        (2e9, 2e-3, "half"),
    }
    assert {(r.family, r.layers) for r in rows} == {("arm", 2), ("prime", 3)}


def test_impossible_cells_are_rows_with_a_problem():
    rows = grid.rows(
        fake_trainer.sweep(
            families={"arm": {}}, budgets=(1e9,), sizes=((2, 32, 5), (2, 0, 1), 10.0)
        )
    )
    assert all(r.problem for r in rows)
    assert "model.heads" in rows[0].problem
    assert "no shape" in rows[2].problem
    assert grid.rows(fake_trainer.sweep(batch="fixed:0"))[0].problem


def test_rows_survive_json():
    for row in grid.rows(fake_trainer.sweep(seeds=(3,))):
        again = grid.from_json(json.loads(json.dumps(dataclasses.asdict(row))))
        assert run_id(grid.to_config(again)) == run_id(grid.to_config(row))
        assert again == row


def a_row(**changes):
    row = {"family": "arm", "budget": 1e9, "seed": 0, "layers": 2, "width": 32, "heads": 2}
    return row | {"steps": 10, "batch_size": 4, "peak_lr": 1e-3} | changes


def test_json_rows_may_give_tokens():
    row = a_row(tokens=4 * 16 * 25, overrides={"data.seq_len": 16})
    del row["steps"]
    assert grid.from_json(row).steps == 25


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([], "expected an object"),
        (a_row(widht=3), r"widht: no such setting; did you mean width\?"),
        ({"budgett": 1e9}, r"budgett: no such setting; did you mean budget\?"),
        (a_row(budget=-1), "budget = -1.0: must be above 0"),
        (a_row(overrides={"optim.schedule": "x"}), "= 'x': must be one of cosine, wsd"),
        (a_row(width="3"), "width = '3': must be an integer"),
        (a_row(width=-3), "model.width = -3: must be at least 1"),
        (a_row(tokens=3), "either steps or tokens"),
        ({"family": "arm", "steps": 1}, "missing budget, seed"),
        (a_row(family="prim"), "prime"),
        (a_row(flops="all"), "flops"),
        (a_row(overrides={"optim.wd": 1}), "wd: no such setting"),
    ],
)
def test_bad_json_rows_are_told_in_one_line(row, says):
    with pytest.raises(UserError, match=says) as caught:
        grid.from_json(row)
    assert "\n" not in str(caught.value)


def test_experiment_files(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SWEEP_FILE)
    read = grid.load_experiment(path)
    assert (read.name, len(read.rows), read.rows[0].family) == ("mine", 1, "arm")
    assert experiment.load_config(path).family == "mdm"
    as_json = tmp_path / "rows.json"
    as_json.write_text(json.dumps([dataclasses.asdict(row) for row in read.rows]))
    assert grid.load_experiment(as_json).rows == read.rows
    assert grid.load_experiment(as_json).sha256 != read.sha256


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such experiment"),
        ("x = (\n", "line 1"),
        ("x = 1\n", r"sweep\(\) -> Sweep"),
        ("def sweep():\n    return 3\n", "returned int"),
        ("a = 1\nimport nowhere_to_be_found\n", "line 2: ModuleNotFoundError"),
        ("def sweep():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        (SWEEP_FILE.replace("[1e9]", "[]"), "no runs: families, budgets"),
    ],
)
def test_bad_experiment_files_are_told_in_one_line(tmp_path, text, says):
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        grid.load_experiment(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("tokens", [True, "3", 0, -5, math.inf, math.nan])
def test_tokens_of_a_row_are_a_number_above_0(tokens):
    row = a_row(tokens=tokens)
    del row["steps"]
    with pytest.raises(UserError, match=r"tokens = .*: must be a number above 0"):
        grid.from_json(row)


def test_an_error_in_a_row_names_its_number(tmp_path):
    path = tmp_path / "rows.json"
    bad = {"budgett" if key == "budget" else key: value for key, value in a_row().items()}
    path.write_text(json.dumps([a_row(), bad, a_row()]))
    with pytest.raises(UserError) as caught:
        grid.load_experiment(path)
    says = "row 2: budgett: no such setting; did you mean budget?"
    assert str(caught.value) == f"{path}, {says}"


STRICT_FILE = """
from prime_jax.config import ModelConfig, RunConfig
from prime_jax.sweep.grid import Around, Sweep

def sweep():
    fields = dict(name="mine", base=RunConfig(), families={"arm": {}}, budgets=[1e9], sizes=[1e5])
    return Sweep(**fields | dict(%s))
"""


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("budgets=['x']", r"sweep.budgets = \['x'\]: must be numbers of FLOPs above 0"),
        ("budgets=1e9", "sweep.budgets = 1000000000.0: must be numbers"),
        ("budgets=[-1e9]", "line 7: sweep.budgets = -1000000000.0: must be above 0"),
        ("lr=lambda: 3", "TypeError: .*takes 0 positional arguments"),
        ("name=3", "sweep.name = 3: must be text"),
        ("base=3", "sweep.base = 3: must be a RunConfig"),
        ("base=RunConfig(family='foo')", "line 7: family = 'foo': must be one of arm, mdm, prime"),
        (
            "base=RunConfig(model=ModelConfig(qk_norm=3))",
            "model.qk_norm = 3: must be True or False",
        ),
        ("families=['arm']", "sweep.families = .*must be label -> overrides"),
        ("families={'arm': 3}", "sweep.families = .*must be label -> overrides"),
        ("sizes=[(2, 32)]", r"sweep.sizes = .*must be shapes \(layers, width, heads\)"),
        ("sizes=['8M']", "sweep.sizes = .*must be shapes"),
        ("sizes=lambda config: [1e5]", "TypeError: .*positional argument"),
        ("sizes=lambda config, budget: [1 / 0]", "line 7: ZeroDivisionError"),
        ("sizes=Around(spam=4)", r"Around\(spam=...\): no such setting; did you mean span"),
        ("flops='all'", "sweep.flops = 'all': must be one of matmul, reference"),
        ("seeds=3", "sweep.seeds = 3: must be whole numbers"),
        ("seeds=[0.5]", "must be whole numbers"),
        ("extra_seeds={1e9: 1}", "sweep.extra_seeds = .*must be budget -> whole numbers"),
        ("batch=16", "sweep.batch = 16: must be the name of a rule"),
        ("sizes=Around(span=0.5)", "Around.span = 0.5: must be at least 1"),
        ("epochs_limit='4'", "sweep.epochs_limit = '4': must be a number, above 0"),
        ("budget=[1e9]", r"Sweep\(budget=...\): no such setting; did you mean budgets\?"),
    ],
)
def test_fields_of_a_sweep_are_checked(tmp_path, changed, says):
    path = tmp_path / "bad.py"
    path.write_text(STRICT_FILE % changed)
    with pytest.raises(UserError, match=says) as caught:
        grid.load_experiment(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_documented_fields_are_those_that_there_are(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text()
    tables = [re.findall(r"^\| `(\w+)`", part, re.MULTILINE) for part in text.split("\n## ")]
    documented = [names for names in tables if names]
    fields = lambda cls: [f.name for f in dataclasses.fields(cls)]  # noqa: E731
    row = fields(grid.Row)
    row.insert(row.index("steps") + 1, "tokens")
    assert documented == [fields(grid.Sweep), list(rules.RULES), row]
    for kind, named in rules.RULES.items():
        listed = re.search(rf"^\| `{kind}` \| (`[^|(]*)[^|]*\|[^|]*->", text, re.MULTILINE)
        assert re.findall(r"`([\w-]+)`", listed[1]) == list(named)
    example, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.py").write_text(example)
    read = grid.load_experiment(tmp_path / "mine.py").rows
    assert (len(read), [row.problem for row in read if row.problem]) == (2 * 2 * 5, [])
    assert experiment.load_config(tmp_path / "mine.py").data.seq_len == 64
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert [grid.from_json(value).family for value in json.loads(example)] == ["arm", "prime-l9"]


def test_json_that_is_no_list(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="list of rows"):
        grid.load_experiment(path)


def test_unknown_family_and_setting():
    with pytest.raises(UserError, match="arm"):
        grid.rows(fake_trainer.sweep(families={"amr": {}}))
    with pytest.raises(UserError, match="length"):
        grid.rows(fake_trainer.sweep(families={"prime": {"subtokens.lenght": 2}}))
    assert RunConfig().family == "prime"


def test_a_grid_over_epochs_trains_on_parts_of_the_data():
    rows = grid.rows(fake_trainer.sweep(epochs=(1, 4), budgets=(2e9,)))
    assert {row.rules["epochs"] for row in rows} == {"1", "4"}
    for row in rows:
        config = grid.to_config(row)
        passes = config.tokens / (config.data.unique_blocks * config.data.seq_len)
        assert passes == pytest.approx(float(row.rules["epochs"]), rel=0.05)
    assert len({run_id(grid.to_config(row)) for row in rows}) == len(rows)
    plain = grid.rows(fake_trainer.sweep(budgets=(2e9,)))
    assert not any("data.unique_tokens" in row.overrides for row in plain)
