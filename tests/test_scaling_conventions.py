"""The same runs under every count of N and C."""

import numpy as np
import pytest
from scaling_cases import csv_rows, surface

from prime_jax import scaling
from prime_jax.scaling import approach3


def columns():
    """N in two counts: as the law has it, and with a head that small models notice."""
    rows = csv_rows(surface(budgets=(1e18, 3e18, 1e19, 3e19, 1e20), noise=1e-3))
    for row in rows:
        params, flops = row.pop("params"), row.pop("flops")
        row |= {"params_nonembedding": params, "params_total": params + 3e7}
        row |= {"flops_matmul": flops, "flops_network": 1.02 * flops}
        row |= {"budget": flops}
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.fixture(scope="module")
def found():
    return scaling.fit(columns(), params="nonembedding", replicates=100)


def test_every_count_is_there_once(found):
    counted = found.families["known"].counted
    assert {(one.flops, one.params) for one in counted} == {
        (c, n) for c in ("matmul", "network") for n in ("total", "nonembedding")
    }
    own = next(one for one in counted if (one.flops, one.params) == ("matmul", "nonembedding"))
    three = found.families["known"].approach3
    assert own.a == pytest.approx(three.a, rel=1e-12)
    assert own.approach2 == found.families["known"].approach2.a
    assert own.profile == pytest.approx(three.profile["a"])
    best = [three.law.optimum(three.compute, c) for c in (1e18, 1e20)]
    assert own.ratio == pytest.approx([b.tokens / b.params for b in best])
    assert own.growth == pytest.approx(np.log(own.ratio[1] / own.ratio[0]) / np.log(100))


def test_other_counts_are_fits_of_those_columns(found):
    data = columns()
    n, d = np.array(data["params_total"]), np.array(data["tokens"])
    fitted = approach3.fit(approach3.problem(n, d, np.array(data["loss"]))).law
    other = next(
        one
        for one in found.families["known"].counted
        if (one.flops, one.params) == ("matmul", "total")
    )
    again = scaling.fit(columns(), params="total", replicates=100).families["known"].approach3
    assert other.a == pytest.approx(again.a, rel=1e-9)
    assert again.law.alpha == pytest.approx(fitted.alpha, rel=1e-6)
    assert abs(other.a - found.families["known"].approach3.a) > 0.02


def test_the_report_names_the_steadiest(found, tmp_path):
    found.save(tmp_path / "fit")
    page = (tmp_path / "fit" / "report.html").read_text()
    counted = found.families["known"].counted
    least = min(counted, key=lambda one: abs(one.growth))
    assert "The same runs, counted in every way" in page
    assert f"D*/N* of known varies least with N {least.params}" in page
    again = scaling.load(tmp_path / "fit")
    assert (
        again.to_dict()["families"]["known"]["counted"]
        == (found.to_dict()["families"]["known"]["counted"])
    )


def test_one_count_needs_no_table():
    rows = csv_rows(surface())
    data = {name: [row[name] for row in rows] for name in rows[0]}
    assert scaling.fit(data, replicates=100).families["known"].counted == ()
