"""What people see: tables that lose no digits, numbers with their intervals, progress."""

import io
import re

import pytest
from rich.console import Console

from prime_jax.cli import console
from prime_jax.cli.console import Progress, Table, rounded, show

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


def test_text_of_users_is_no_markup():
    assert "a[b]" in drawn(TABLE, 80)
    assert "[red]x[/]" in drawn(Table(("x",), [("[red]x[/]",)]), 80)


@pytest.mark.parametrize(
    ("value", "ends", "text"),
    [
        (3.14159, None, "3.142"),
        (3.4121, (3.4052, 3.4187), "3.4121 (3.4052 to 3.4187)"),
        (3.4121, (2.9, 4.1), "3.412 (2.9 to 4.1)"),
        (1.5e21, (1.4e21, 1.7e21), "1.5e+21 (1.4e+21 to 1.7e+21)"),
        (1000.0, (999.99, 1000.01), "1000 (999.99 to 1000.01)"),
        (0.0, (-1e-3, 1e-3), "0 (-0.001 to 0.001)"),
    ],
)
def test_an_interval_is_never_coarser_than_its_value(value, ends, text):
    assert rounded(value, ends) == text


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = Console(file=io.StringIO(), width=80)
    with Progress(out) as progress:
        for _ in range(100):
            now[0] += 7
            progress.tick("[reading]", 100, 1)
    lines = out.file.getvalue().splitlines()
    assert len(lines) == 700 // 63
    assert lines[0] == "[reading]: 9 of 100"


def test_progress_is_a_bar_on_a_terminal():
    out = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Progress(out) as progress:
        progress.show("run", "step [1]", 10, 5)
        progress.log("a [line]")
    assert "step [1]" in out.file.getvalue()
    assert "5/10" in out.file.getvalue()
    assert "a [line]" in out.file.getvalue()
