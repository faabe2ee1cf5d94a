"""The tables of docs/scaling.md that are made from the code; `python -m prime_jax.scaling.reference`."""

from collections.abc import Mapping
from pathlib import Path

from prime_jax.scaling.comparison import Comparison
from prime_jax.scaling.library import Validations
from prime_jax.scaling.results import ScalingFit
from prime_jax.scaling.schema import table_of

BEGIN = "<!-- {} is generated: python -m prime_jax.scaling.reference -->"
END = "<!-- end of what is generated -->"
FILES = {"fit.json": ScalingFit, "compare.json": Comparison, "validate.json": Validations}


def rewrite(page: str, files: Mapping[str, type] = FILES) -> str:
    """The page with the fields of each file in the place that is marked for them."""
    for name, cls in files.items():
        begin = BEGIN.format(name)
        head, rest = page.split(begin)
        page = f"{head}{begin}\n\n{table_of(cls)}\n\n{END}{rest.split(END, 1)[1]}"
    return page


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "scaling.md"
    path.write_text(rewrite(path.read_text()))
