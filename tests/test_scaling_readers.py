import gzip
import math

import pytest
from scaling_cases import csv_rows, surface, write_csv

from prime_jax.errors import UserError
from prime_jax.scaling import readers
from prime_jax.scaling.table import number
from prime_jax.sweep import collect

GOOD = "family,flops,params,loss\narm,1e18,1e8,3.2\n"


def read(tmp_path, content):
    path = tmp_path / "runs.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return readers.read(path)


def test_rows_keep_their_line_numbers(tmp_path):
    found = read(tmp_path, "family,flops\n\narm,1e18\n,\nmdm , 2e18\n")
    assert found.rows == [{"family": "arm", "flops": "1e18"}, {"family": "mdm", "flops": "2e18"}]
    assert found.names == ["row 3", "row 5"]


def test_excels_byte_order_mark_and_line_ends_are_dropped(tmp_path):
    found = read(tmp_path, b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert found.columns == ["family", "flops", "params", "loss"]
    assert found.rows[0]["loss"] == "3.2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("family,loss\n", "no runs"),
        (GOOD.replace(",", ";"), "semicolons"),
        (GOOD.replace(",", "\t"), "tabs"),
        (GOOD.replace(",", " "), "spaces"),
        (GOOD.replace(",", ";").replace(".", ","), "semicolons"),
        ("arm,1e18,1e8,3.2\narm,1e19,1e8,3.1\n", "header .* is missing"),
        (GOOD.encode("utf-16"), "UTF-16"),
        (gzip.compress(GOOD.encode(), mtime=0), "gzip; unpack it"),
        (b"PK\x03\x04\0", "zip or Excel"),
        ("# one\n# two\n", "comments only"),
        ("[]", "not a list of objects"),
        ('[{"family": "arm"}, 3]', "not a list of objects"),
        ('{"rows": [1', "not JSON"),
        (b"\x89PNG\r\n\0\0\0", "binary"),
        (b"family,loss\narm,\xff\xfe\xfa\n", "UTF-8"),
        (GOOD + "arm,1e18\n", r"row 3: 2 cells, but the header has 4"),
        ("family,loss,loss\narm,1,2\n", "'loss' appears twice"),
        ('family,loss\narm,"3.2\n', "not a CSV"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_training_log_is_refused(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(GOOD + "arm,1e18,1e8,3.2\n" * 3)
    with pytest.raises(UserError, match="more than 3 rows"):
        readers.read_csv(path, 3)
    assert len(readers.read_csv(path, 4).rows) == 4


def test_excels_hint_at_the_separator_is_no_header(tmp_path):
    found = read(tmp_path, "sep=,\n" + GOOD)
    assert found.columns == ["family", "flops", "params", "loss"]
    assert found.names == ["row 3"]


@pytest.mark.parametrize(
    "content",
    [
        "# exported by me, in May\n" + GOOD,
        GOOD.replace("3.2", "3.2,,"),
        '[{"family": "arm", "flops": 1e18, "params": 1e8, "loss": 3.2}]',
        '{"family": ["arm"], "flops": [1e18], "params": [1e8], "loss": [3.2]}',
    ],
    ids=["comment", "empty cells at the end", "JSON rows", "JSON columns"],
)
def test_other_ways_to_write_the_same_table(tmp_path, content):
    found = read(tmp_path, content)
    assert found.columns == ["family", "flops", "params", "loss"]
    assert [number(found.rows[0], name) for name in found.columns[1:]] == [1e18, 1e8, 3.2]


def test_an_integer_beyond_all_floats_is_no_number(tmp_path):
    found = read(tmp_path, f'[{{"loss": 1{"0" * 400}}}]')
    assert math.isnan(number(found.rows[0], "loss"))


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        readers.read(tmp_path / "none.csv")


def test_the_hash_is_that_of_the_data(tmp_path):
    first = write_csv(tmp_path / "a.csv", csv_rows(surface()))
    second = write_csv(tmp_path / "b.csv", csv_rows(surface(noise=1e-9)))
    assert readers.read(first).sha256 != readers.read(second).sha256


def test_a_sweep_directory_gives_the_rows_that_collect_gives(tmp_path, monkeypatch):
    rows = csv_rows(surface(), run="a1", status="done")
    monkeypatch.setattr(collect, "rows", lambda root: rows if root == tmp_path else [])
    (tmp_path / "sweep.json").touch()
    found = readers.read(tmp_path)
    assert found.rows == rows
    assert found.columns == list(rows[0])
    assert found.names[0] == "run a1"
    monkeypatch.setattr(collect, "rows", lambda root: [])
    with pytest.raises(UserError, match="no runs"):
        readers.read(tmp_path)
