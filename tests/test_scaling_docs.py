"""docs/scaling.md says what the code says."""

import re
from pathlib import Path

from scaling_cases import csv_rows, surface, write_csv

from prime_jax.scaling import record
from prime_jax.scaling.diagnostics import HINTS
from prime_jax.scaling.fit import fit_runs
from prime_jax.scaling.points import select
from prime_jax.scaling.settings import Settings
from prime_jax.scaling.table import read

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


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


def test_the_page_on_scaling_has_every_field_of_fit_json(tmp_path):
    page = PAGE.read_text()
    page = page[page.index("## fit.json") :]
    rows = csv_rows(surface(noise=1e-3))
    runs = select(read(write_csv(tmp_path / "runs.csv", rows)))
    result = record.as_dict(fit_runs(runs, Settings(replicates=100)))
    family = result["families"]["known"]
    for name in (
        *result,
        *family,
        *family["approach3"],
        *family["approach2"],
        *family["error_budget"],
    ):
        assert re.search(rf"\b{name}\b", page), name
