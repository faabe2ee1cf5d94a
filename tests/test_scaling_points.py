import numpy as np
import pytest
from scaling_cases import csv_rows, surface

from prime_jax.errors import UserError
from prime_jax.scaling.points import Measure, select
from prime_jax.scaling.settings import Choice
from prime_jax.scaling.table import Table


def table_of(rows):
    names = [f"row {number}" for number in range(2, len(rows) + 2)]
    return Table(rows, names, list(rows[0]), "runs.csv", "0" * 64)


def rows(**extra):
    return csv_rows(surface(), **extra)


def select_one(rows, **choice):
    (points,) = select(table_of(rows), Choice(**choice)).families.values()
    return points


def codes(points):
    return {diagnostic.code for diagnostic in points.diagnostics}


@pytest.mark.parametrize("absent", ["flops", "params", "tokens"])
def test_two_of_three_quantities_give_the_third(absent):
    part = surface()
    found = select_one([{k: v for k, v in row.items() if k != absent} for row in rows()])
    np.testing.assert_allclose(getattr(found, absent), getattr(part, absent), rtol=1e-12)
    np.testing.assert_allclose(found.budgets, np.unique(part.flops), rtol=1e-5)


def test_conventions_choose_their_columns():
    both = rows(flops_matmul=7e18, flops_reference=5e18, params_total=3e8)
    default = select(table_of(both))
    assert (default.columns.flops, default.columns.flops_convention) == ("flops_matmul", "matmul")
    assert (default.columns.params, default.columns.params_convention) == ("params", "as given")
    chosen = select(table_of(both), Choice(flops="reference", params="total"))
    (points,) = chosen.families.values()
    assert set(points.flops) == {5e18}
    assert set(points.params) == {3e8}
    with pytest.raises(UserError, match=r"'params_reference'.*params_total"):
        select(table_of(both), Choice(params="reference"))


def test_a_metric_chooses_its_loss_and_kind():
    both = rows(
        loss_token=4.5, se_token=0.02, kind_token="nelbo", kind_joint="train_loss", loss_joint=1.5
    )
    token = select_one(both, metric="token")
    assert set(token.loss) == {4.5}
    assert set(token.loss_se) == {0.02}
    assert select_one(both, metric="joint").measure.kind == "train_loss"
    with pytest.raises(UserError, match=r"'loss_ar'.*token"):
        select_one(both, metric="ar")


@pytest.mark.parametrize(
    ("column", "bad"), [("loss", "nan"), ("loss", -1), ("loss", ""), ("loss", "inf"), ("flops", 0), ("params", 25), ("tokens", "many"), ("family", "")]
)  # fmt: skip
def test_impossible_cells_are_named_by_row(column, bad):
    damaged = rows()
    damaged[3][column] = bad
    with pytest.raises(UserError, match=f"{column}.*row 5"):
        select(table_of(damaged))


def test_one_unit_for_all():
    mixed = rows()
    mixed[6]["params"] *= 1e-3
    with pytest.raises(UserError, match=r"6 N D.*row 8"):
        select(table_of(mixed))


@pytest.mark.parametrize("absent", ["family", "loss"])
def test_missing_columns_are_named(absent):
    with pytest.raises(UserError, match=f"no column '{absent}'"):
        select(table_of([{k: v for k, v in row.items() if k != absent} for row in rows()]))


def test_one_of_three_quantities_is_not_enough():
    with pytest.raises(UserError, match=r"'params', 'tokens' .two of flops"):
        select(table_of([{k: row[k] for k in ("family", "loss", "flops")} for row in rows()]))


def test_a_run_counts_once():
    with pytest.raises(UserError, match="row 2 and row 22"):
        select(table_of([*rows(), rows()[0]]))
    named = [row | {"run": f"r{k % 20}", "step": k // 20} for k, row in enumerate(rows() * 2)]
    assert "checkpoints_of_one_run" in codes(select_one(named))
    with pytest.raises(UserError, match="row 2 and row 42 are the same run"):
        select(table_of([*named, named[0] | {"loss": 9.0}]))


@pytest.mark.parametrize("name", ["seed", "lr", "batch_size"])
@pytest.mark.parametrize("run", ["", "d12"])
def test_runs_differ_by_what_was_chosen(name, run):
    """Also where a name is one of a shape, and losses are rounded."""
    named = {"run": run} if run else {}
    both = [row | named | {name: k, "loss": 3.0} for k in (1, 2) for row in rows()]
    points = select_one(both)
    assert len(points.loss) == 40
    assert points.run is None
    assert ("no_seed_repeats" in codes(points)) == (name != "seed")


def test_names_of_runs_may_come_again_in_another_family():
    named = [row | {"run": f"d{k}"} for k, row in enumerate(rows())]
    found = select(table_of(named + [row | {"family": "other"} for row in named]))
    assert [len(part.loss) for part in found.families.values()] == [20, 20]


def test_errors_that_are_all_0_are_not_known():
    assert np.isnan(select_one(rows(loss_se=0.0)).loss_se).all()
    assert set(select_one(rows(loss_se=0.01)).loss_se) == {0.01}


def test_the_range_of_runs_without_gaps_is_theirs():
    part = surface(budgets=np.geomspace(1e18, 1e20, 150), ratios=(0.5, 1, 2))
    found = select_one(csv_rows(part))
    assert len(found.budgets) == 1
    np.testing.assert_allclose(found.levels, [1e18, 1e19, 1e20], rtol=1e-3)
    np.testing.assert_array_equal(select_one(rows()).levels, select_one(rows()).budgets)


def test_unfinished_runs_are_kept_aside_with_their_reason():
    states = [
        row | {"status": "done", "reason": "", "run": f"r{k}"} for k, row in enumerate(rows())
    ]
    states[2] |= {"status": "diverged", "reason": "loss was nan", "loss": ""}
    states[7] |= {"status": "pending", "loss": ""}
    states[9] |= {"loss": ""}
    runs = select(table_of(states))
    assert [(run.run, run.status, run.reason) for run in runs.excluded] == [
        ("r2", "diverged", "loss was nan"),
        ("r7", "pending", "pending"),
        ("r9", "done", "no value in column loss"),
    ]
    (points,) = runs.families.values()
    assert len(points.loss) == 17
    assert "survivors_only" in codes(points)
    with pytest.raises(UserError, match="none of its 20 runs is done"):
        select(table_of([row | {"status": "failed"} for row in rows()]))


@pytest.mark.parametrize(
    "column", ["status", "State"], ids=["the column of ours", "the column of W&B"]
)
def test_status_words_of_others(column):
    words = ["finished", "FINISHED", "completed", "done", "crashed"] * 4
    runs = select(table_of([row | {column: w} for row, w in zip(rows(), words, strict=True)]))
    assert {(run.status, run.reason) for run in runs.excluded} == {("crashed", "crashed")}
    (points,) = runs.families.values()
    assert len(points.loss) == 16


@pytest.mark.parametrize(
    ("column", "values", "code"),
    [
        ("kind", ("nelbo", "train_loss"), "mixed_kinds"),
        ("kind", ("nll", ""), "mixed_kinds"),
        ("given", ("", "lengths"), "mixed_evaluations"),
        ("tokenizer", ("t1", "t2"), "mixed_evaluations"),
        ("eval_set", ("e1", "e2"), "mixed_evaluations"),
    ],
)
def test_different_kinds_of_number_are_not_fitted_together(column, values, code):
    mixed = [row | {column: values[k % 2]} for k, row in enumerate(rows())]
    refusals = [f.code for f in select_one(mixed).diagnostics if f.refusal]
    assert refusals == [code]
    allowed = select_one(mixed, allow_mixed_kinds=True)
    assert not any(f.refusal for f in allowed.diagnostics)
    assert code in codes(allowed)


def test_valid_numbers_may_be_fitted_together():
    mixed = [row | {"kind": ("nll", "nelbo")[k % 2]} for k, row in enumerate(rows())]
    found = select_one(mixed)
    assert found.measure.kind == "nll+nelbo"
    assert not any(f.refusal for f in found.diagnostics)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(UserError, match="nll, nelbo, train_loss"):
        select(table_of(rows(kind="perplexity")))


def test_groups_keep_training_losses_apart():
    assert Measure("nll").group == Measure("nelbo").group
    assert Measure("nelbo").group != Measure("train_loss").group != Measure("").group
    assert Measure("nelbo").group != Measure("nelbo", given="lengths").group


def test_what_the_data_do_not_say_is_warned_about():
    assert {"kind_unstated", "no_seed_repeats"} <= codes(select_one(rows(kind="")))
    repeated = codes(select_one(rows(epochs=2.5)))
    assert "data_repeated" in repeated
    twice = [row | {"seed": s} for s in (0, 1) for row in rows(epochs=0.5)]
    assert codes(select_one(twice)) == set()
