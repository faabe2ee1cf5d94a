"""Bad tables of runs as a person meets them: one line, with the rows where they help."""

import numpy as np
import pytest
from scaling_cases import csv_rows, surface, write_csv

from prime_jax import cli
from prime_jax.errors import UserError
from prime_jax.scaling import points, readers, table

ROWS = csv_rows(surface())


def fit(path):
    run, args = cli.parsed(["fit", "--bootstrap", "100", str(path)])
    return run(args)


def without(*columns):
    return [{k: v for k, v in row.items() if k not in columns} for row in ROWS]


def changed(number, **cells):
    """Row `number` of the file (the header is row 1)."""
    return [row | (cells if k == number else {}) for k, row in enumerate(ROWS, 2)]


def scaled(column, factor):
    return [row | {column: row[column] * factor} for row in ROWS]


BAD = {
    "no family": (without("family"), "no column 'family'; it has kind, flops"),
    "no loss": (without("loss"), "no column 'loss'"),
    "only C": (without("params", "tokens"), "no columns 'params', 'tokens' .two of flops"),
    "names of others": ([{"model_name": "a", "d_model": 64, "n_params": 1e8, "train_loss": 2, "Summary.eval/loss": 3, "compute_budget": 1e18}], "no column 'family'; it has model_name, d_model, n_params.*--columns family=model_name$"),
    "names that may be meant": ([{"model": "a", "size_params": 1e8, "loss_train": 3, "c_tokens": 1}], "--columns family=model,loss=loss_train,params=size_params,tokens=c_tokens"),
    "letters": ([{"N": 1e8, "D": 1e9, "loss": 3}], "no column 'family'; it has N, D, loss; .*--family NAME"),
    "millions": (scaled("params", 1e-6), r"units of one.*row 2.*13 more rows"),
    "one in millions": (changed(7, params=50), "params .* row 7 has '50'"),
    "one in thousands": (changed(9, tokens=5e6), "6 N D.*row 9"),
    "suffix": (changed(4, params="25X"), "row 4 has '25X'"),
    "not a number": (changed(5, loss="nan"), "loss .* row 5 has 'nan'"),
    "negative": (changed(5, loss=-3), "loss .* row 5 has '-3'"),
    "decimal comma": (changed(5, loss="3,21"), "loss has commas inside.*row 5 has '3,21'"),
    "thousands separator": (changed(5, flops="1,000,000"), "flops has commas.*row 5 has '1,000,000'"),
    "no value": (changed(5, loss=""), "row 5 has nothing"),
    "diverged": (changed(5, loss="inf"), "left out where a column status says diverged.*row 5"),
    "negative error": ([row | {"loss_se": -0.1} for row in ROWS], "loss_se .*0 or more.*row 2"),
    "words for epochs": ([row | {"epochs": "one"} for row in ROWS], "epochs .*row 2 has 'one'"),
    "duplicate": ([*ROWS, ROWS[3]], "row 5 and row 22 are the same run"),
    "one budget": (ROWS[:5] * 1, "only 5 runs"),
    "two points": (ROWS[:2], "only 2 runs"),
    "all of one size": ([row | {"params": 1e8, "tokens": row["flops"] / 6e8, "seed": k} for k, row in enumerate(ROWS)], "only 1 size"),
    "another status": ([row | {"status": "stopped"} for row in ROWS], r"none of its 20 .*stopped.*finished"),
    "mixed kinds": ([row | {"kind": ("nelbo", "train_loss")[k % 2]} for k, row in enumerate(ROWS)], "nothing can be fitted.*10 nelbo, 10 train_loss"),
    "curves": ([{"Step": 1, "a - loss": 3, "a - loss__MIN": 3, "a - loss__MAX": 3}], "W&B.*--curves"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_clear_line(tmp_path, name):
    rows, message = BAD[name]
    with pytest.raises(UserError, match=message) as caught:
        fit(write_csv(tmp_path / "bad.csv", rows))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not (tmp_path / "bad-fit").exists()


def test_one_budget_of_many_sizes(tmp_path):
    part = surface(budgets=(1e19,), ratios=np.geomspace(0.1, 10, 12))
    with pytest.raises(UserError, match="only 1 budget"):
        fit(write_csv(tmp_path / "one.csv", csv_rows(part)))


def test_a_training_log_is_refused_before_it_is_read_to_its_end(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("family,flops,params,tokens,loss\n" + "a,1e18,1e8,1.6e9,3.2\n" * 100_001 + "?")
    with pytest.raises(UserError, match=r"more than 100,000 rows.*--curves"):
        readers.read(path)


def codes(rows):
    columns = list(rows[0])
    names = [f"row {k}" for k in range(2, len(rows) + 2)]
    runs = points.select(table.Table(rows, names, columns, "runs.csv", "0" * 64))
    return {
        diagnostic.code: diagnostic.message for diagnostic in runs.families["known"].diagnostics
    }


def test_flops_counted_in_two_ways_are_named_by_row():
    plain = codes(ROWS)
    assert "mixed_conventions" not in plain
    found = codes([row | {"flops": row["flops"] * (1.5 if k % 2 else 1)} for k, row in enumerate(ROWS)])  # fmt: skip
    assert "row " in found["mixed_conventions"]
    twice = [row | {"seed": seed} for seed in (0, 1) for row in ROWS]
    twice[3] = twice[3] | {"flops": twice[3]["flops"] * 1.1}
    message = codes(twice)["mixed_conventions"]
    assert "row 5" in message
    assert "row 25" in message


def test_one_smooth_count_of_flops_is_no_mixture():
    embedded = [row | {"flops": row["flops"] * (1 + 3e7 / row["params"])} for row in ROWS]
    assert "mixed_conventions" not in codes(embedded)
    attention = [row | {"flops": row["flops"] * (1 + (1e7 / row["params"]) ** 0.3)} for row in ROWS]
    assert "mixed_conventions" not in codes(attention)


def test_more_tokens_than_unique_ones_are_repeated_data():
    assert "data_repeated" not in codes([row | {"unique_tokens": 1e13} for row in ROWS])
    assert "up to 29" in codes([row | {"unique_tokens": 1e9} for row in ROWS])["data_repeated"]
