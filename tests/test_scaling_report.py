"""Figures, report and command: what a person gets."""

import argparse
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from scaling_cases import csv_rows, published, surface, write_csv

from prime_jax.errors import UserError
from prime_jax.scaling import commands, labels, plots, record, report
from prime_jax.scaling.columns import Choice
from prime_jax.scaling.fit import Settings, fit_runs
from prime_jax.scaling.points import select
from prime_jax.scaling.table import read


def fit_file(path, **choice):
    return fit_runs(select(read(path), Choice(**choice)), Settings(replicates=100))


def command(*arguments):
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    args = parser.parse_args(["fit", "--bootstrap", "100", *map(str, arguments)])
    return args.run(args)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A CSV of three families, the last with a training loss, and one run that failed."""
    rows = [
        row | {"status": "done", "reason": ""}
        for f in ("arm", "mdm", "prime")
        for row in csv_rows(published(f))
    ]
    rows.append(rows[0] | {"status": "failed", "loss": "", "reason": "<b>out of memory</b>"})
    return write_csv(tmp_path_factory.mktemp("three") / "three.csv", rows)


@pytest.fixture(scope="module")
def figures(three):
    return plots.draw_all(fit_file(three))


@pytest.fixture(scope="module")
def censored(tmp_path_factory):
    rows = csv_rows(surface(budgets=(1e13, 3e13, 1e14), ratios=(2, 3, 4, 8), noise=1e-3))
    return write_csv(tmp_path_factory.mktemp("censored") / "censored.csv", rows)


@pytest.fixture(scope="module")
def fitted(three):
    """The directory that the command wrote."""
    assert command(three) == 0
    return three.with_name("three-fit")


def lines_of(panel):
    return {text.get_text() for text in panel.texts}


def test_a_training_loss_never_shares_an_axis_with_a_likelihood(three, figures):
    valid, joint = figures["frontier"].axes
    assert lines_of(valid) == {"arm", "mdm"}
    assert lines_of(joint) == {"prime"}
    assert "not a likelihood" in joint.get_ylabel()
    assert "training" not in valid.get_ylabel()
    assert [panel.get_title() for panel in figures["isoflop"].axes] == ["arm", "mdm", "prime"]
    assert "training loss" in figures["isoflop"].axes[2].get_ylabel()
    mixed = plots.draw_all(fit_file(three, allow_mixed_kinds=True))
    (both,) = mixed["frontier"].axes
    assert "mixed kinds" in both.get_ylabel()


def test_axes_name_conventions_and_units(figures):
    for name, figure in figures.items():
        for panel in figure.axes:
            text = panel.get_xlabel() + panel.get_ylabel()
            assert "as given" in text, name
            assert "N" in text or "FLOPs" in text
    assert "(nats / token)" in labels.loss_axis(["nll"])
    assert "nats" not in labels.loss_axis([""])


def test_censored_optima_are_drawn_as_open_arrows(censored):
    figures = plots.draw_all(fit_file(censored))
    marks = {line.get_marker() for line in figures["isoflop"].axes[0].get_lines()}
    assert "<" in marks
    assert "*" not in marks
    assert "v" in {line.get_marker() for line in figures["optimum"].axes[0].get_lines()}
    assert "^" in {line.get_marker() for line in figures["optimum"].axes[1].get_lines()}


def test_more_families_than_one_row_holds(tmp_path):
    rows = [row for k in range(5) for row in csv_rows(surface(noise=1e-3, seed=k), seed=k)]
    rows = [row | {"family": f"family-{row['seed']}"} for row in rows]
    figures = plots.draw_all(fit_file(write_csv(tmp_path / "many.csv", rows)))
    assert sum(panel.get_visible() for panel in figures["isoflop"].axes) == 5


def test_many_budgets_get_a_colour_bar_in_place_of_names(tmp_path):
    rows = csv_rows(surface(budgets=tuple(10 ** (18 + k / 5) for k in range(12)), noise=1e-3))
    panel, bar = plots.draw_all(fit_file(write_csv(tmp_path / "many.csv", rows)))["isoflop"].axes
    assert lines_of(panel) == set()
    assert "FLOPs" in bar.get_ylabel()


def test_the_report_is_one_whole_file(three, fitted):
    page = (fitted / "report.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(pictures) == 3
    for picture in pictures:
        ElementTree.fromstring(picture)
    outside = re.sub(r"<svg.*?</svg>", "", page, flags=re.S)
    assert not re.search(r"""(src|href)=|url\(|@import|<script""", outside)
    assert "&lt;b&gt;out of memory" in page
    assert "<b>out of memory" not in page
    assert read(three).sha256 in page
    for tag in ("table", "tr", "td", "figure", "div", "h2"):
        assert len(re.findall(rf"<{tag}[ >]", outside)) == outside.count(f"</{tag}>")


def test_the_report_says_what_is_a_bound_what_was_refused_and_that_it_illustrates(censored):
    page = report.render(record.as_dict(fit_file(censored)), {})
    assert "a bound" in page
    assert "Refused:" in page
    assert "too_few_budgets" in page
    assert "illustrate" in page


def test_the_command_writes_everything(fitted):
    names = {
        f"{figure}.{kind}"
        for figure in ("isoflop", "frontier", "optimum")
        for kind in plots.FORMATS
    }
    assert {path.name for path in fitted.iterdir()} == names | {"fit.json", "report.html"}
    assert (
        json.loads((fitted / "fit.json").read_text())["families"]["arm"]["approach3"]["params"]["E"]
        > 2
    )


def test_refusals_have_their_own_exit_code_and_the_same_data_the_same_files(
    censored, tmp_path, capsys
):
    for name in ("a", "b"):
        assert command(censored, "--out", tmp_path / name) == 3
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].endswith(str(tmp_path / "b" / "report.html"))
    assert any(line.startswith("refused") for line in lines)


def test_a_place_that_cannot_be_written_is_told(three, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make"):
        command(three, "--out", tmp_path / "file" / "fit")


@pytest.mark.parametrize("bad", ["0", "99", "many"])
def test_too_few_replicates_are_a_usage_error(three, bad, capsys):
    with pytest.raises(SystemExit) as caught:
        command(three, "--bootstrap", bad)
    assert caught.value.code == 2
    capsys.readouterr()


def test_default_places(tmp_path):
    assert commands.default_out(tmp_path) == tmp_path / "fit"
    assert commands.default_out(tmp_path / "runs.csv") == tmp_path / "runs-fit"


def test_fitting_imports_neither_jax_nor_matplotlib():
    code = "import sys, prime_jax.scaling.record, prime_jax.scaling.commands, prime_jax.scaling.table; print([m for m in ('jax', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("number", "text"), [(412e6, "412M"), (1.2056e9, "1.21B"), (999.6e6, "1B"), (65536, "65.5k"), (2e12, "2T"), (12, "12")]
)  # fmt: skip
def test_counts_as_people_write_them(number, text):
    assert labels.count(number) == text


def test_flops_as_people_write_them():
    assert (labels.flops(3e18), labels.flops(2.887e20)) == ("3e18", "2.89e20")
