import pytest

from prime_jax.errors import UserError
from prime_jax.scaling import columns, readers
from prime_jax.scaling.columns import interpret
from prime_jax.scaling.settings import Choice
from prime_jax.scaling.table import number, of_columns

COUNTS = ("flops", "params", "tokens")


def table(*rows):
    return of_columns({name: [row[name] for row in rows] for name in rows[0]}, "runs.csv")


def test_columns_of_others_are_named(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("model,C,N,loss,val_loss\narm,1e18,1e8,9,3.2\n")
    found = readers.read(path)
    choice = Choice(columns="family=model, flops=C,params=N,loss=val_loss")
    new = columns.renamed(found, choice.names)
    assert new.rows == [{"family": "arm", "flops": "1e18", "params": "1e8", "loss": "3.2"}]
    assert new.columns == ["family", "flops", "params", "loss"]
    for names, message in (
        ("loss=val", r"no column 'val'; did you mean val_loss\?"),
        ("loss=C,flops=C", "one column stands for two"),
        ("params=N [parsecs]", "a unit is k, M, B, T"),
        ("params=N [0]", "a unit is k, M, B, T"),
    ):
        with pytest.raises(UserError, match=message):
            columns.renamed(found, Choice(columns=names).names)
    for names in ("loss", "=a", "loss=a,,"):
        with pytest.raises(UserError, match="pairs such as"):
            Choice(columns=names)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("loss", "val_loss Validation-Loss eval/loss Summary.final_val_loss test_nll Loss"),
        ("params", "N n_params num_parameters param_count Parameters config.n_params params_M"),
        ("tokens", "D train_tokens tokens_seen Tokens num_tokens config.tokens"),
        ("flops", "C total_flops compute_budget training_compute FLOPs"),
        ("lr", "learning_rate peak_lr"),
        ("run", "Name run_name run_id"),
        ("family", "Family model_family arch"),
        ("", "d_model train_loss unique_tokens flops_per_token model n_layer budget lr_end tokens_per_step loss_se"),
    ],
)  # fmt: skip
def test_names_that_leave_no_doubt_are_recognised_and_said(ours, theirs):
    for name in theirs.split():
        new = interpret(table({name: 1}), Choice())
        assert new.read_as == ({ours: name} if ours else {})
        assert new.columns == [ours or name]


def test_of_several_names_none_is_taken():
    both = table({"val_loss": 3, "test_loss": 4, "n_params": 1e8, "N": 2e8, "params": 5e8})
    assert interpret(both, Choice()).read_as == {}
    one = table({"Loss": 3, "val_loss": 4})
    assert interpret(one, Choice()).read_as == {"loss": "Loss"}
    again = table({"Name": "a"}, {"Name": "a"})
    assert interpret(again, Choice()).read_as == {}  # such a name tells no runs apart
    asked = table({"n_params": 1e8})
    with pytest.raises(UserError, match="no column 'params_total'"):
        columns.choose_columns(
            interpret(asked, Choice(params="total")), Choice(params="total", metric="best-valid")
        )


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"params": "354M", "tokens": "20B", "flops": "1e18 FLOPs"}, (1e18, 354e6, 20e9)),
        ({"params": "1.5b params", "tokens": "7T tokens", "flops": "3.5 ZFLOPs"}, (3.5e21, 1.5e9, 7e12)),
        ({"Params (M)": "354", "tokens_b": 20, "C [1e18]": 2}, (2e18, 354e6, 20e9)),
        ({"params": "1e8", "tokens": 2e9, "flops": "5e17"}, (5e17, 1e8, 2e9)),
    ],
)  # fmt: skip
def test_units_are_multiplied_out(cells, expected):
    (row,) = interpret(table(cells), Choice()).rows
    assert [number(row, name) for name in COUNTS] == pytest.approx(expected, rel=1e-12)


def test_units_of_columns_that_are_named():
    given = table({"N": "354", "tok": 20, "loss": 3.5})
    new = interpret(given, Choice(columns="params=N [M],tokens=tok [1e9]"))
    assert [number(new.rows[0], name) for name in ("params", "tokens")] == [354e6, 20e9]
    assert new.read_as == {"params": "N [M]", "tokens": "tok [1e9]"}
    twice = interpret(table({"N": "354M"}), Choice(columns="params=N [M]"))
    assert number(twice.rows[0], "params") == 354e6
    cell = interpret(table({"params": "12 apples", "loss": "3M"}), Choice()).rows[0]
    assert cell == {"params": "12 apples", "loss": "3M"}  # no count: left to the check of cells


def test_a_loss_of_training_says_so():
    given = table({"train/loss": 3.5, "lr": 1})
    assert interpret(given, Choice(columns="loss=train/loss")).rows[0]["kind"] == "train_loss"
    stated = table({"train/loss": 3.5, "kind": "nll"})
    assert interpret(stated, Choice(columns="loss=train/loss")).rows[0]["kind"] == "nll"


def test_names_of_runs_are_read():
    given = table({"Name": "my_arm-3e18_354M_1.4B_s7", "tokens": 5})
    new = interpret(given, Choice(name_pattern="my_{family}-{FLOPs}_{N}_{D}_s{seed}"))
    row = new.rows[0]
    assert (row["family"], row["seed"]) == ("arm", "7")
    assert [number(row, name) for name in COUNTS] == [3e18, 354e6, 1.4e9]
    assert new.read_as["tokens"] == "{D} of Name"
    other = interpret(
        table({"run": "x/arm_25M/version_0"}), Choice(name_pattern="{}/{family}_{N}/{}")
    )
    assert (other.rows[0]["family"], other.rows[0]["params"]) == ("arm", 25e6)
    for pattern, message in (
        ("{family}-{N}", "names must be like .*row 0 has 'my_arm"),
        ("{family", "a pattern is like"),
        ("abc", "no field"),
        ("{N}_{params}", "params comes twice"),
    ):
        with pytest.raises(UserError, match=message):
            interpret(given, Choice(name_pattern=pattern))
    with pytest.raises(UserError, match="no column of names"):
        interpret(table({"loss": 3}), Choice(name_pattern="{N}"))


def test_one_family_for_all():
    new = interpret(table({"loss": 3}, {"loss": 4}), Choice(family="arm"))
    assert [row["family"] for row in new.rows] == ["arm", "arm"]
    with pytest.raises(UserError, match=r"a column 'family' \(mdm\)"):
        interpret(table({"family": "mdm"}), Choice(family="arm"))
