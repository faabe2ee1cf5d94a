"""No command replaces what it reads."""

import contextlib
import os
import shutil
import stat

import fake_trainer
import pytest
from scaling_cases import csv_rows, surface, write_csv

from prime_jax import scaling
from prime_jax.cli import main
from prime_jax.errors import UserError
from prime_jax.runtime import outputs, storage


def test_an_input_is_spared_under_every_name(tmp_path):
    data, other = tmp_path / "runs.csv", tmp_path / "other.csv"
    data.write_text("a")
    other.write_text("a")
    (tmp_path / "link.csv").symlink_to(data)
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nothing")
    (tmp_path / "here").symlink_to(tmp_path)
    os.link(data, tmp_path / "hard.csv")
    for name in ("runs.csv", "link.csv", "hard.csv", "here/runs.csv", "here/here/runs.csv"):
        with pytest.raises(UserError, match="write somewhere else"):
            outputs.refuse_overwrite([data], [other, tmp_path / name])
        with pytest.raises(UserError):
            outputs.refuse_overwrite([tmp_path / name], [data])
    outputs.refuse_overwrite(
        [data, tmp_path / "nothing"], [other, tmp_path / "gone.csv", tmp_path / "new"]
    )


def test_what_lies_in_a_folder_that_is_read_is_spared(tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "spec").write_text("")
    (tmp_path / "short").symlink_to(tmp_path / "runs" / "a" / "spec")
    for name in ("runs/a/spec", "short"):
        with pytest.raises(UserError):
            outputs.refuse_overwrite(outputs.of_sweep(tmp_path), [tmp_path / name])
    outputs.refuse_overwrite(
        outputs.of_sweep(tmp_path), [tmp_path / "runs" / "new", tmp_path / "runs.csv"]
    )


def test_names_in_a_bucket_are_compared():
    class Bucket(type(storage.path("x"))):
        def __fspath__(self):
            return "gs://bucket/sweep/runs/a"

    with pytest.raises(UserError):
        outputs.refuse_overwrite([Bucket()], [Bucket()])


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """points.csv in the working directory, as a fit would write it, and the user's own file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("[]")
    return write_csv(tmp_path / "points.csv", csv_rows(surface(noise=0.002)))


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "points.csv", "--out", "."],
        ["fit", "points.csv", "--out", "linked"],
        ["fit", "other.csv", "--curves", "points.csv", "--out", "."],
        ["scaling", "compare", "compare.json", "--baseline", "known", "--out", "."],
        ["scaling", "validate", "validate.json", "--out", "../here"],
    ],
)
def test_a_fit_never_overwrites_its_runs(runs, words, capsys):
    here = runs.parent
    (here / "linked").mkdir()
    (here / "linked" / "points.csv").symlink_to(runs)
    for name in ("other.csv", "compare.json", "validate.json"):
        shutil.copy(runs, here / name)
    words = [f"../{here.name}" if word == "../here" else word for word in words]
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "would be replaced" in line
    assert {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("/proc/x/y", "/proc is read-only"),
        ("points.csv", "is a file"),
        ("points.csv/x", "is a file"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    runs, out, says, monkeypatch, capsys
):
    monkeypatch.setattr(scaling, "fit", None)
    assert main(["fit", "points.csv", "--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_new_runs_are_not_written_over_the_fit(runs, capsys):
    (runs.parent / "fit.json").write_text("{}")
    words = [
        "scaling",
        "design",
        ".",
        "--target",
        "1e20",
        "--budget",
        "1e19",
        "--emit",
        "points.csv",
    ]
    before = runs.read_bytes()
    assert main(words) == 2
    assert "would be replaced" in capsys.readouterr().err
    assert runs.read_bytes() == before


def test_a_table_is_not_written_over_its_sweep(tmp_path, capsys):
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "table.csv").symlink_to(tmp_path / "sweep.json")
    for name in ("sweep.json", "table.csv"):
        assert main(["sweep", "collect", str(tmp_path), "-o", str(tmp_path / name)]) == 2
        assert "would be replaced" in capsys.readouterr().err
    assert (tmp_path / "sweep.json").read_text() == "{}"


def test_evaluation_and_samples_spare_the_run_and_the_texts(tiny_run, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("1 2 3 ")
    (tmp_path / "result.json").symlink_to(tiny_run / "result.json")
    run, before = str(tiny_run), (tiny_run / "result.json").read_bytes()
    for words in (
        ["eval", run, "--data", f"text:{tmp_path}/*.txt", "--out", str(text)],
        ["eval", run, "--data", f"zero-shot:{tmp_path}", "--out", str(text)],
        ["eval", run, "--samples", str(text), "--out", str(text)],
        ["eval", run, "--out", str(tmp_path / "result.json")],
        ["sample", run, "--out", str(tiny_run / "result.json")],
        ["infill", run, "[[MASK*2]]", "--out", str(tmp_path / "result.json")],
    ):
        assert main(words) == 2
        assert "would be replaced" in capsys.readouterr().err
    assert text.read_text() == "1 2 3 "
    assert (tiny_run / "result.json").read_bytes() == before


def test_a_folder_keeps_what_is_not_ours(tmp_path):
    place = tmp_path / "fit"
    with outputs.folder(place, ["a", "b"]):
        (place / "a").write_text("1")
    outputs.check_folder(place, ["a", "b", "c"])  # the same again needs no flag
    (place / "c").write_text("mine")
    with pytest.raises(UserError, match=r"c was not made by prime-jax.*--force"):
        outputs.check_folder(place, ["c"])
    (place / "a").write_text("2")
    with pytest.raises(UserError, match="a was changed since"):
        outputs.check_folder(place, ["a"])
    outputs.check_folder(place, ["a", "c"], force=True)
    with contextlib.ExitStack() as interrupted:
        interrupted.enter_context(contextlib.suppress(KeyboardInterrupt))
        interrupted.enter_context(outputs.folder(place, ["a"], force=True))
        (place / "a").write_text("half")
        raise KeyboardInterrupt
    with outputs.folder(place, ["a"]):  # what was interrupted is made again
        (place / "a").write_text("3")
    outputs.check_folder(place, ["a"])


def test_a_full_disk_is_named():
    for write in (
        lambda place: outputs.write(place, "x"),
        lambda place: _write_much(place),
    ):
        with pytest.raises(OSError, match="/dev/full"):
            write(storage.path("/dev/full"))


def _write_much(place):
    with outputs.stream(place) as file:
        file.write("x" * 100_000)  # more than the buffer: fails before it is closed


def test_a_named_file_is_followed_and_written_into(tmp_path, capsys):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    outputs.write(tmp_path / "link.csv", "new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    outputs.write(tmp_path / "pipe", "through")
    assert os.read(reading, 99) == b"through"
    os.close(reading)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    outputs.write(storage.path("/dev/null"), "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    read, write = os.pipe()  # as behind /dev/stdout in a pipeline: its link names no path
    outputs.write(storage.path(f"/dev/fd/{write}"), "one ")
    with outputs.stream(storage.path(f"/dev/fd/{write}")) as file:
        file.write("two")
    assert os.read(read, 99) == b"one two"
    os.close(read), os.close(write)
    outputs.write(storage.path("-"), "to stdout")
    assert capsys.readouterr().out == "to stdout"


@pytest.mark.parametrize("name", ["missing/x.csv", "folder", "read-only"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "read-only").write_text("keep")
    (tmp_path / "read-only").chmod(0o444)
    with pytest.raises(UserError, match="cannot write"):
        outputs.check_file(tmp_path / name)
    with pytest.raises(UserError, match="cannot write"):
        outputs.write(tmp_path / name, "x")
    assert (tmp_path / "read-only").read_text() == "keep"


def test_a_fit_replaces_its_own_files_only(runs, capsys):
    words = ["fit", "points.csv", "--bootstrap", "100", "--out", "mine"]
    (runs.parent / "mine").mkdir()
    (runs.parent / "mine" / "isoflop.svg").write_text("a drawing of the user")
    assert main(words) == 2
    assert "isoflop.svg was not made by prime-jax" in capsys.readouterr().err
    assert [path.name for path in (runs.parent / "mine").iterdir()] == ["isoflop.svg"]
    words[:1] = ["scaling", "validate"]
    (runs.parent / "mine" / "validate.json").write_text("a record of the user")
    assert main(words) == 2
    assert main([*words, "--force"]) == 0
    assert main(words) == 0
    (runs.parent / "mine" / "validate.json").write_text("{}")
    assert main(words) == 2
    assert "validate.json was changed since" in capsys.readouterr().err


def test_a_table_goes_to_stdout_alone(tmp_path, capsys):
    fake_trainer.planned(tmp_path / "sweep")
    assert main(["sweep", "collect", str(tmp_path / "sweep"), "-o", "-"]) == 0
    streams = capsys.readouterr()
    assert streams.out.startswith("run,family,seed")
    assert len(streams.out.splitlines()) == 9
    assert "0 runs with a result" in streams.err
