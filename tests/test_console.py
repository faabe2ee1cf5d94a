"""What people see: tables that lose no digits, progress, pictures that renew themselves."""

import io
import re

import pytest
from rich.console import Console

from prime_jax.cli import console
from prime_jax.cli.console import Progress, picture, show
from prime_jax.table import Cell, Table

TABLE = Table(("name", "value"), [("a[b]", "1234567.891"), ("prime-l2", "-3e-05")], ("a [note]",))


def drawn(table: Table, width: int, **options) -> str:
    out = Console(width=width, file=io.StringIO(), **options)
    show(table, out)
    return out.file.getvalue()


@pytest.mark.parametrize("width", [80, 16, 12, 8])
def test_narrow_terminals_lose_no_digit(width):
    text = drawn(TABLE, width)
    assert "…" not in text
    found = re.sub(r"\s", "", text)
    assert sorted(found) == sorted("namevaluea[b]1234567.891prime-l2-3e-05a[note]")


def test_ids_of_runs_stay_whole():
    text = drawn(Table(("id", *"abcde"), [("3f9a0b1c2d", *("1234567",) * 5)]), 40)
    assert "3f9a0b1c2d" in text
    assert max(map(len, text.splitlines())) <= 40


def test_columns_of_one_value_are_said_once_where_they_do_not_fit():
    rows = [("3f9a0b1c2d", "256", "", "1.5"), ("9f9a0b1c2d", "256", "", "2.5")]
    table = Table(("id", "batch", "hint", "lr"), rows, ("two runs",))
    assert drawn(table, 40).splitlines()[0].split() == ["id", "batch", "hint", "lr"]
    narrow = drawn(table, 20).splitlines()
    assert narrow[-2:] == ["in every row: batch 256", "two runs"]
    assert narrow[0].split() == ["id", "lr"]


def test_text_of_users_is_no_markup():
    assert "a[b]" in drawn(TABLE, 80)
    assert "[red]x[/]" in drawn(Table(("x",), [("[red]x[/]",)]), 80)


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = Console(file=io.StringIO(), width=80)
    with Progress(out) as progress:
        for _ in range(100):
            now[0] += 7
            progress.tick("[reading]", 100, 1)
    lines = out.file.getvalue().splitlines()
    assert lines[:3] == [f"[reading]: {done} of 100" for done in (2, 11, 20)]
    assert len(lines) == 11


def test_progress_is_a_bar_on_a_terminal():
    out = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Progress(out) as progress:
        progress.show("run", "step [1]", 10, 5)
        progress.log("a [line]")
    assert "step [1]" in out.file.getvalue()
    assert "5/10" in out.file.getvalue()
    assert "a [line]" in out.file.getvalue()


def test_a_picture_renews_itself_and_reads_no_markup():
    out = Console(file=io.StringIO(), width=80, force_terminal=True)
    with picture(out) as renew:
        renew("first [x]")
        renew(Table(("a",), [(Cell("[b]", style="bad"),)], ("a note",)), "second [y]")
    text = out.file.getvalue()
    assert all(part in text for part in ("first [x]", "[b]", "a note", "second [y]"))


def test_what_is_done_now_has_no_count():
    out = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Progress(out) as progress:
        progress.doing("fitting [arm]")
    assert "fitting [arm]" in out.file.getvalue()
    assert "/" not in re.sub(r"\x1b\S*?[A-Za-z]", "", out.file.getvalue())
