"""docs/scaling.md says what the code says."""

import dataclasses
import re
from pathlib import Path

import pytest

from prime_jax.cli.reference import fields_of, with_fields
from prime_jax.scaling.results import Approach3, FamilyFit, ScalingFit
from prime_jax.scaling.schema import HINTS

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PYTHON = DOCS / "scaling.md", DOCS / "scaling-python.md"


def test_the_page_on_scaling_has_every_code_with_its_cure():
    lines = PAGE.read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line) for line in lines if re.match(r"\| `[a-z_0-9]+` \|", line)]
    start = lines.index("| code | when | hint |")
    codes = {
        row[1].strip(" `"): row[3].strip()
        for row in rows
        if "|".join(row) in lines[start : start + 3 + len(HINTS)]
    }
    assert codes == HINTS


def test_the_fields_of_the_files_are_those_of_the_code():
    page = PAGE.read_text()
    assert with_fields(page) == page, "run: make docs"
    for name in ("families.F.approach3.params", "families.F.approach2.debiased.a", "excluded"):
        assert f"| `{name}` |" in page


def test_every_field_of_a_fit_is_described():
    places = {place for place, _ in fields_of(ScalingFit)}
    for cls, place in (
        (ScalingFit, ""),
        (FamilyFit, "families.F."),
        (Approach3, "families.F.approach3."),
    ):
        for field in dataclasses.fields(cls):
            known = place + field.name
            inside = any(one.startswith(f"{known}.") for one in places)
            assert field.metadata.get("hidden") or inside or known in places, known


@pytest.mark.slow
def test_the_page_on_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PYTHON.read_text(), flags=re.S))
    found = {}
    exec(code, found)
    said = capsys.readouterr().out
    assert "held-out loss error" in said
    assert found["fit"].families["arm"].approach3.params.alpha == pytest.approx(0.34, abs=0.05)
    names = {path.name for path in (tmp_path / "fit-of-a-known-law").iterdir()}
    assert {"fit.json", "compare.json", "points.csv", "report.html", "isoflop.svg"} <= names
