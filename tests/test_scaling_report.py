"""Figures, report and command: what a person gets."""

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from scaling_cases import csv_rows, published, surface, write_csv

from prime_jax import cli
from prime_jax.cli import fit as commands
from prime_jax.errors import UserError
from prime_jax.runtime import outputs
from prime_jax.scaling import drawing, figures, labels, record, report
from prime_jax.scaling.fits import fit_runs
from prime_jax.scaling.laws import PowerLaw
from prime_jax.scaling.points import select
from prime_jax.scaling.readers import read
from prime_jax.scaling.results import Approach3
from prime_jax.scaling.schema import as_dict
from prime_jax.scaling.settings import Choice, Settings


def fit_file(path, **choice):
    return fit_runs(select(read(path), Choice(**choice)), Settings(replicates=100))


def command(*arguments):
    run, args = cli.parsed(["fit", "--bootstrap", "100", *map(str, arguments)])
    return run(args)


def compare(*arguments):
    words = ["scaling", "compare", "--bootstrap", "100", "--baseline", "arm"]
    run, args = cli.parsed([*words, *map(str, arguments)])
    return run(args)


def outside_pictures(page):
    return re.sub(r"<svg.*?</svg>", "", page, flags=re.S)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A CSV of three families, the last with a training loss."""
    rows = [row for f in ("arm", "mdm", "prime") for row in csv_rows(published(f))]
    return write_csv(tmp_path_factory.mktemp("three") / "three.csv", rows)


@pytest.fixture(scope="module")
def fit(three):
    return fit_file(three)


@pytest.fixture(scope="module")
def drawn(fit):
    return figures.draw_all(fit)


@pytest.fixture(scope="module")
def censored(tmp_path_factory):
    rows = csv_rows(surface(budgets=(1e13, 3e13, 1e14), ratios=(2, 3, 4, 8), noise=1e-3))
    return write_csv(tmp_path_factory.mktemp("censored") / "censored.csv", rows)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    rows = [row | {"status": "done", "reason": ""} for row in csv_rows(published("arm"))]
    rows.append(rows[0] | {"status": "failed", "loss": "", "reason": "<b>out of memory</b>"})
    return write_csv(tmp_path_factory.mktemp("one") / "one.csv", rows)


@pytest.fixture(scope="module")
def fitted(one):
    """The directory that the command wrote."""
    assert command(one) == 0
    return one.with_name("one-fit")


def lines_of(panel):
    return {text.get_text() for text in panel.texts}


def test_a_training_loss_never_shares_an_axis_with_a_likelihood(fit, drawn):
    valid, joint = drawn["frontier"].axes
    assert lines_of(valid) == {"arm", "mdm"}
    assert lines_of(joint) == {"prime"}
    assert "not a likelihood" in joint.get_ylabel()
    assert "training" not in valid.get_ylabel()
    assert [panel.get_title() for panel in drawn["isoflop"].axes] == ["arm", "mdm", "prime"]
    assert "training loss" in drawn["isoflop"].axes[2].get_ylabel()
    (both,) = figures.frontier(replace(fit, comparable=(tuple(fit.families),))).axes
    assert "mixed kinds" in both.get_ylabel()


def test_losses_of_the_checks_have_an_axis_for_each_family(drawn):
    for name in ("isoloss", "rollout"):
        panels = drawn[name].axes
        assert [panel.get_title().split(":")[0] for panel in panels] == ["arm", "mdm", "prime"]
        shared = panels[0].get_shared_y_axes().get_siblings(panels[0])
        assert shared == [panels[0]], name
    by_loss = drawn["residuals"].axes[::2]
    assert ["training loss" in panel.get_xlabel() for panel in by_loss] == [False, False, True]
    assert "training loss" in drawn["rollout"].axes[2].get_ylabel()
    for panel in by_loss:
        others = panel.get_shared_y_axes().get_siblings(panel)
        assert not set(others) & (set(by_loss) - {panel})


def test_residuals_are_measured_over_fitted(fit, drawn):
    family = fit.families["arm"]
    points, law = family.points, family.approach3.law
    (dots,) = drawn["residuals"].axes[0].collections
    expected = points.loss / law.loss(points.params, points.tokens) - 1
    np.testing.assert_allclose(dots.get_offsets()[:, 1], expected)
    band = drawn["residuals"].axes[0].patches[0]
    assert band.get_height() == pytest.approx(2 * 1.96 * 0.0014, rel=1e-3)


def test_a_prediction_that_is_too_high_lies_above_zero(fit, drawn):
    means = drawn["rollout"].axes[0].get_lines()[1].get_ydata()
    expected = [p.errors_n.mean() for p in fit.families["arm"].rollout.predictions]
    np.testing.assert_allclose(means, expected)


def test_figures_without_anything_to_show_are_left_out(fit):
    bare = {n: replace(f, approach3=Approach3(None), rollout=None) for n, f in fit.families.items()}
    assert set(figures.draw_all(replace(fit, families=bare))) == {
        "isoflop", "frontier", "optimum", "intervals"
    }  # fmt: skip


def test_axes_name_conventions_and_units(drawn):
    for name, figure in drawn.items():
        if name == "rollout":
            continue
        texts = [panel.get_xlabel() + panel.get_ylabel() for panel in figure.axes]
        texts = texts[1::2] if name == "residuals" else texts
        assert all("as given" in text for text in texts), name
        assert all("N" in text or "FLOPs" in text for text in texts), name
    assert "(nats / token)" in labels.loss_axis(["nll"])
    assert "nats" not in labels.loss_axis([""])


def test_censored_optima_are_drawn_as_open_arrows(censored):
    drawn = figures.draw_all(fit_file(censored))
    marks = {line.get_marker() for line in drawn["isoflop"].axes[0].get_lines()}
    assert "<" in marks
    assert "*" not in marks
    assert "v" in {line.get_marker() for line in drawn["optimum"].axes[0].get_lines()}
    assert "^" in {line.get_marker() for line in drawn["optimum"].axes[1].get_lines()}


def test_more_families_than_one_row_holds(fit):
    many = {f"family-{k}": fit.families["arm"] for k in range(5)}
    panels = figures.isoflop(replace(fit, families=many)).axes
    assert sum(panel.get_visible() for panel in panels) == 5


def test_many_budgets_get_a_colour_bar_in_place_of_names(tmp_path):
    rows = csv_rows(surface(budgets=tuple(10 ** (18 + k / 5) for k in range(12)), noise=1e-3))
    panel, bar = figures.isoflop(fit_file(write_csv(tmp_path / "many.csv", rows))).axes
    assert lines_of(panel) == set()
    assert "FLOPs" in bar.get_ylabel()


def test_the_report_is_one_whole_file(one, fitted):
    page = (fitted / "report.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(pictures) == len(figures.NAMES)
    assert set(report.OF_A_FIT) == set(figures.NAMES)
    for picture in pictures:
        ElementTree.fromstring(picture)
    outside = outside_pictures(page)
    assert not re.search(r"""(src|href)=|url\(|@import|<script""", outside)
    assert "&lt;b&gt;out of memory" in page
    assert "<b>out of memory" not in page
    assert read(one).sha256 in page
    for tag in ("table", "tr", "td", "figure", "div", "h2"):
        assert len(re.findall(rf"<{tag}[ >]", outside)) == outside.count(f"</{tag}>")


def test_the_report_says_what_is_a_bound_what_was_refused_and_that_it_illustrates(censored):
    page = report.render(as_dict(fit_file(censored)), {})
    assert "a bound" in page
    assert "Refused:" in page
    assert "too_few_budgets" in page
    assert "illustrate" in page


def test_the_answer_stands_at_the_top_with_intervals_and_refusals(fit):
    result = as_dict(fit)
    result["families"]["mdm"]["approach3"]["params"] = None
    result["families"]["mdm"]["warnings"].append(
        {"code": "too_few_points", "message": "only 2 runs", "hint": "add runs", "refusal": True}
    )
    page = report.render(result, {})
    top = page[: page.index("What was measured")]
    best = result["families"]["arm"]["approach3"]["optima"][-1]
    for quantity in ("params", "tokens"):
        for value in (best[quantity], *best["intervals"][quantity]):
            assert labels.count(value) in top
    for value in (best["loss"], *best["intervals_with_model"]["loss"]):
        assert labels.value(value) in top
    assert "only 2 runs" in top
    assert top.count("refused") >= 5


def test_what_the_fit_found_is_in_the_report(fit):
    result = as_dict(fit)
    page = report.render(result, {})
    arm = result["families"]["arm"]
    for number in (
        *arm["approach3"]["profile"]["alpha"],
        arm["approach2"]["debiased"]["a"],
        arm["approach3"]["objective"],
    ):
        assert labels.value(number) in page
    assert f"{arm['approach2']['debiased']['optima'][0]['shift']:+.1%}" in page
    assert f"{arm['rollout']['steps'][0]['budgets'][0]['mean']:+.2%}" in page
    assert f"{arm['error_budget']['scatter']:.2%}" in page
    for text in (result["method"]["objective"], result["metric"], result["source"]["sha256"]):
        assert text in page


def test_open_and_unknown_intervals_are_said(fit):
    result = as_dict(fit)
    arm = result["families"]["arm"]
    arm["approach3"]["profile"]["E"] = [None, 2.0]
    arm["rollout"] = arm["approach2"]["debiased"] = arm["error_budget"]["model"] = None
    arm["approach3"]["optima"][-1]["intervals_with_model"] = None
    result["method"]["delta"] = None
    page = report.render(result, {})
    assert "open–2.0" in page
    assert "not known" in page


def test_envelopes_are_listed_where_there_are_some(fit):
    result = as_dict(fit)
    assert "win along training" not in report.render(result, {})
    best = {"flops": 1e19, "params": 123456789.0, "tokens": 1e10, "loss": 3.0}
    result["families"]["arm"]["approach1"]["optima"] = [best]
    assert "123M" in report.render(result, {})


def test_a_comparison_joins_the_report_and_mixed_kinds_are_marked(three, fit, tmp_path):
    record.write(replace(fit, table=read(three)), tmp_path)
    assert compare(three, "--out", tmp_path) == 3
    page = (tmp_path / "report.html").read_text()
    assert "mdm against arm" in page
    assert "mixed_kinds" in page
    result = json.loads((tmp_path / "compare.json").read_text())
    panels = figures.draw_comparison(result, ["arm", "mdm", "prime"])["multiplier"].axes
    assert len(panels) == 2  # prime is refused
    assert panels[0].get_title(loc="left") == "mdm against arm"
    assert panels[0].get_ylim()[0] < 16 < panels[0].get_ylim()[1]
    result["families"]["mdm"]["mixed"] = "a training loss"
    panels = figures.draw_comparison(result, ["arm", "mdm"])["multiplier"].axes
    assert "mixed kinds" in panels[0].get_title(loc="left")
    lines = {line.get_linestyle() for line in panels[0].get_lines()}
    assert {"-", "--"} <= lines
    result["families"]["mdm"]["multiplier"] = None
    assert figures.draw_comparison(result, ["arm", "mdm"]) == {}
    outside = outside_pictures(page)
    assert not re.search(r"""(src|href)=|url\(|@import|<script""", outside)
    result["source"]["sha256"] = "other"
    (tmp_path / "compare.json").write_text(json.dumps(result))
    assert report.refresh(tmp_path)
    assert "compare again" in (tmp_path / "report.html").read_text()


def test_a_multiplier_that_is_no_number_is_drawn_as_far_as_it_is_one(three):
    curve = {
        "flops": [1e18, 1e19, 1e20],
        "value": [2.0, 3.0, None],
        "median": [2.0, 3.0, None],
        "interval": [[1.0, 2.0, None], [3.0, None, None]],
        "in_range": [True, False, False],
    }
    side = {"curve": curve, "budgets": []}
    family = {"mixed": None, "multiplier": {"at_family": side, "at_baseline": side}}
    result = {"baseline": {"family": "arm"}, "families": {"mdm": family}}
    result |= {"method": {"level": 0.95}, "conventions": {"flops": "6 N D"}}
    figure = figures.draw_comparison(result, ["arm", "mdm"])["multiplier"]
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < 1 < 3 < high < 100


def far_apart(tmp_path):
    """Runs as far apart as the quickstart's: no loss of one family is within the other's data."""
    laws = {
        "arm": PowerLaw(E=1.15, A=30.0, B=2000.0, alpha=0.393, beta=0.887),
        "mdm": PowerLaw(E=2.28, A=1500.0, B=400.0, alpha=0.92, beta=0.567),
    }
    rows = []
    for seed, (name, law) in enumerate(laws.items()):
        part = surface(law, (1e10, 4e10, 1.5e11, 6e11), (0.3, 0.6, 1.3, 2.6), 0.01, seed)
        rows += csv_rows(replace(part, family=name))
    return write_csv(tmp_path / "runs.csv", rows)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["arm", "mdm"])
def test_families_without_a_common_loss_are_compared(base, tmp_path, capsys):
    assert compare(far_apart(tmp_path), "--baseline", base) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "never" in shown.out
    result = json.loads((tmp_path / "runs-fit" / "compare.json").read_text())
    (family,) = result["families"].values()
    sides = family["multiplier"].values()
    empty = [all(value is None for value in side["curve"]["value"]) for side in sides]
    assert any(empty)
    figure = (tmp_path / "runs-fit" / "multiplier.svg").read_text()
    assert "no loss that both reach" in figure


@pytest.mark.slow
def test_numbers_do_not_wait_for_a_figure_that_cannot_be_drawn(
    three, tmp_path, monkeypatch, capsys
):
    def broken(*_):
        raise ValueError("no such scale\nand more")

    compare(three, "--out", tmp_path)
    assert (tmp_path / "multiplier.svg").exists()  # and does not stay beside other numbers
    capsys.readouterr()
    monkeypatch.setattr(figures, "multiplier", broken)
    monkeypatch.setitem(figures.MAKERS, "intervals", (broken, figures.fitted))
    monkeypatch.setattr(Figure, "savefig", broken)
    assert compare(three, "--out", tmp_path) == 3
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "prime-jax: the figure multiplier cannot be drawn (ValueError: no such scale)"
    ]
    assert "one E for both?" in shown.out
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", outputs.MADE}
    assert command(three, "--out", tmp_path) == 0
    shown = capsys.readouterr()
    assert "loss there" in shown.out
    assert len(shown.err.splitlines()) == len(figures.NAMES)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"compare.json", "fit.json", "points.csv", "report.html", outputs.MADE}


def test_a_letter_that_the_font_lacks_is_one_line():
    told = []
    figure = Figure()
    figure.text(0.5, 0.5, "\N{CJK UNIFIED IDEOGRAPH-65E5}")
    drawn = drawing.attempt("isoflop", lambda: figure.savefig(io.BytesIO()) or "drawn", told.append)
    assert drawn == "drawn"
    (line,) = told
    assert line.startswith("the figure isoflop: Glyph 26085")
    assert "\n" not in line


def test_a_figure_of_an_earlier_fit_does_not_stay(tmp_path):
    for name in ("rollout.svg", "rollout.png", "mine.svg"):
        (tmp_path / name).write_text("")
    drawing.forget({("rollout", "svg"), ("rollout", "png")}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.svg"]


def test_the_command_writes_everything(fitted):
    names = {f"{figure}.svg" for figure in figures.NAMES}
    files = {"fit.json", "points.csv", "report.html", outputs.MADE}
    assert {path.name for path in fitted.iterdir()} == names | files
    assert (
        json.loads((fitted / "fit.json").read_text())["families"]["arm"]["approach3"]["params"]["E"]
        > 2
    )


def test_refusals_have_their_own_exit_code_and_the_same_data_the_same_files(
    censored, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(figures, "draw_all", lambda fit, log: {"optimum": figures.best_sizes(fit)})
    for name in ("a", "b"):
        assert command(censored, "--out", tmp_path / name) == 3
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].endswith(str(tmp_path / "b" / "report.html"))
    assert any(line.startswith("refused") for line in lines)


def test_more_formats_on_request(fit, tmp_path):
    drawn = {"frontier": figures.draw(fit, "frontier")}
    drawing.publish(drawn, figures.NAMES, tmp_path, formats=("svg", "pdf"))
    assert {path.name for path in tmp_path.iterdir()} == {"frontier.svg", "frontier.pdf"}
    drawing.publish(drawn, figures.NAMES, tmp_path)  # what was not asked for again goes
    assert {path.name for path in tmp_path.iterdir()} == {"frontier.svg"}


@pytest.mark.parametrize("bad", ["gif", "svg,", "svg png"])
def test_formats_that_are_none(three, bad):
    with pytest.raises(UserError, match=r"--formats .*some of svg, png, pdf"):
        command(three, "--formats", bad)


def test_every_format_is_the_same_for_the_same_fit(fit, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with matplotlib.rc_context(drawing.STYLE):
            drawing.save({"frontier": figures.frontier(fit)}, tmp_path / name)
    written = sorted((tmp_path / "a").iterdir())
    assert [path.suffix for path in written] == [".pdf", ".png", ".svg"]
    for path in written:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_place_that_cannot_be_written_is_told(one, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        command(one, "--out", tmp_path / "file" / "fit")


@pytest.mark.parametrize("bad", ["0", "99", "many"])
def test_too_few_replicates_are_a_usage_error(three, bad):
    with pytest.raises(UserError, match=f"--bootstrap {bad}: must be an integer, at least 100"):
        cli.parsed(["fit", str(three), "--bootstrap", bad])


def test_default_places(tmp_path):
    assert commands.default_out(tmp_path) == tmp_path / "fit"
    assert commands.default_out(tmp_path / "runs.csv") == tmp_path / "runs-fit"


@pytest.mark.parametrize(
    ("number", "text"), [(412e6, "412M"), (1.2056e9, "1.21B"), (999.6e6, "1.00B"), (65536, "65.5k"), (2e12, "2.00T"), (12, "12.0"), (0, "0"), (3e15, "3000T")]
)  # fmt: skip
def test_counts_as_people_write_them(number, text):
    assert labels.count(number) == text


@pytest.mark.parametrize(
    ("number", "ends", "show", "text"),
    [
        (2.69, (2.66, 2.72), labels.value, "2.69 (2.66–2.72)"),
        (3.4121, (3.4052, 3.4187), labels.value, "3.412 (3.405–3.419)"),
        (3.4121, (2.9, 4.1), labels.value, "3.41 (2.90–4.10)"),
        (998.2, (981.4, 1015.3), labels.value, "998 (981–1015)"),
        (2.0, (1.0, None), labels.value, "2.00 (1.00–open)"),
        (2.0, (2.0, 2.0), labels.value, "2.00 (2.00–2.00)"),
        (2.0, None, labels.value, "2.00 (no interval)"),
        (1.23e9, (844e6, 1.7e9), labels.count, "1.23B (844M–1.70B)"),
        (412e6, (398e6, 1.7e9), labels.count, "412M (398M–1.700B)"),
    ],
)
def test_an_interval_is_never_coarser_than_its_value(number, ends, show, text):
    assert "{} ({})".format(*labels.estimate(number, ends, show)) == text


@pytest.mark.parametrize("name", ["$#1 of $3", "[/]", "a_b^c", "$x$"])
def test_a_name_is_no_mathematics(name, tmp_path):
    def drawn():
        figure = Figure()
        figure.text(0, 0, name)
        return drawing.save({"x": figure}, tmp_path, formats=("svg",))

    (path,) = drawing.attempt("x", drawn).values()
    assert name in path.read_text()  # the comment of a text in the file


def test_ticks_are_short():
    shown = [labels.tick(x) for x in (25e6, 1e9, 1.5e9, 300, 0.5)]
    assert shown == ["25M", "1B", "1.5B", "300", "0.5"]


def test_flops_as_people_write_them():
    assert (labels.flops(3e18), labels.flops(2.887e20)) == ("3e18", "2.89e20")
