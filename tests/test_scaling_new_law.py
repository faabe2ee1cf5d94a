"""A law that the package does not know: its two classes are all that a fit needs."""

from dataclasses import dataclass, fields

import numpy as np
import pytest
from scaling_cases import LAW, csv_rows, surface

from prime_jax import scaling
from prime_jax.errors import UserError
from prime_jax.scaling import approach3
from prime_jax.scaling.laws import Compute, Optimum, quantity

BETA = LAW.beta


@dataclass(frozen=True)
class Steady:
    """L = E + A / N**alpha + B / D**BETA with a BETA that is known: four parameters."""

    E: float
    A: float
    alpha: float
    B: float

    formula = "L = E + A / N^α + B / D^0.38, a toy."
    knows_repetition = False

    @property
    def lowest(self):
        return self.E

    def loss(self, params, tokens, unique=np.inf):
        return self.E + self.A * np.power(params, -self.alpha) + self.B * np.power(tokens, -BETA)

    def exponent(self, compute):
        return np.asarray(BETA / (self.alpha + compute.q * BETA))

    def optimum(self, compute, flops, unique=np.inf):
        log_ratio = np.log(self.alpha * self.A) - np.log(compute.q * BETA * self.B)
        work = np.log(flops) - np.log(compute.k)
        log_params = (log_ratio + BETA * work) / (self.alpha + compute.q * BETA)
        params, tokens = np.exp(log_params), np.exp(work - compute.q * log_params)
        return Optimum(np.asarray(flops), params, tokens, self.loss(params, tokens))


@dataclass(frozen=True)
class SteadyForm:
    """Unknowns: log E, the log of the first term at the centre, alpha, the log of the second."""

    features: np.ndarray  # [3, n, 4]: by which the logs of the terms are linear in the unknowns
    shift: np.ndarray  # [3, n]: and what is added
    centre: tuple[float, float]

    names = ("E", "A", "alpha", "B")
    logs = (0, 1, 3)

    @classmethod
    def on(cls, params, tokens, unique=np.inf):
        x, y = np.log(params), np.log(tokens)
        centre = x.mean(), y.mean()
        rows = np.zeros((3, len(x), 4))
        rows[0, :, 0] = rows[1, :, 1] = rows[2, :, 3] = 1
        rows[1, :, 2] = -(x - centre[0])
        shift = np.zeros((3, len(x)))
        shift[2] = -BETA * (y - centre[1])
        return cls(rows, shift, centre)

    def predict(self, theta):
        terms = np.exp(np.einsum("mnk,pk->pmn", self.features, theta) + self.shift)
        total = terms.sum(axis=1)
        return np.log(total), terms / total[:, None]

    def derivatives(self, parts, slope, curve):
        first = np.einsum("pmn,mnk->pnk", parts, self.features)
        second = np.einsum("pmn,mnk,mnl->pnkl", parts, self.features, self.features)
        second = second - first[:, :, :, None] * first[:, :, None, :]
        hessian = np.einsum("pn,pnk,pnl->pkl", curve, first, first)
        return np.einsum("pn,pnk->pk", slope, first), hessian + np.einsum(
            "pn,pnkl->pkl", slope, second
        )

    def gradient_size(self, parts, weight):
        return np.einsum(
            "n,pnk->pk", weight, np.abs(np.einsum("pmn,mnk->pnk", parts, self.features))
        )

    def starts(self, log_loss):
        low, middle = np.exp(log_loss.min()), np.exp(np.median(log_loss))
        return np.array([
            [np.log(e * low), np.log((middle - e * low) / 2), alpha, np.log((middle - e * low) / 2)]
            for e in (0.3, 0.6, 0.9) for alpha in (0.2, 0.5, 1.0)
        ])  # fmt: skip

    def box(self, log_loss):
        low, high = log_loss.min(), log_loss.max()
        lower, upper = [low - 14, low - 14, 0.01, low - 14], [high, high + 5, 5.0, high + 5]
        return np.array(lower), np.array(upper)

    def law(self, theta):
        e, a, alpha, b = np.moveaxis(theta, -1, 0)
        first, second = a + alpha * self.centre[0], b + BETA * self.centre[1]
        return Steady(np.exp(e), np.exp(first), alpha, np.exp(second))

    def theta(self, law):
        first, second = (np.log(v) for v in (law.A, law.B))
        rows = (
            np.log(law.E),
            first - law.alpha * self.centre[0],
            law.alpha,
            second - BETA * self.centre[1],
        )
        return np.stack([np.asarray(row, dtype=float) for row in rows], -1)

    def quantities(self, compute):
        return {
            "E": quantity(linear=(1, 0, 0, 0)),
            "A": quantity(linear=(0, 1, self.centre[0], 0)),
            "alpha": quantity(logs=(0, 0, 1, 0)),
            "B": quantity(BETA * self.centre[1], linear=(0, 0, 0, 1)),
            "a": quantity(
                logs=(0, 0, -1, 0), natural=lambda g: 1 / (np.exp(-g) / BETA + compute.q)
            ),
        }

    def best_size(self, compute, flops):
        work = BETA * (np.log(flops) - np.log(compute.k) - self.centre[1]) - np.log(
            compute.q * BETA
        )
        linear, divide = (0, 1, self.centre[0], -1), (0, 0, 1, 0)
        return quantity(work, linear, (0, 0, 1, 0), compute.q * BETA, divide)


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    monkeypatch.setitem(approach3.LAWS, "steady", (SteadyForm.on, Steady))


def columns(**how):
    rows = csv_rows(surface(**how))
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_its_derivatives_and_quantities_are_right():
    part = surface()
    form = SteadyForm.on(part.params, part.tokens)
    truth = Steady(LAW.E, LAW.A, LAW.alpha, LAW.B)
    theta = form.theta(truth)
    assert vars(form.law(theta)) == pytest.approx(vars(truth))
    np.testing.assert_allclose(np.exp(form.predict(theta[None])[0][0]), part.loss)
    size = form.best_size(Compute(), 1e21)
    top = (
        size.constant
        + size.linear_K @ theta
        + size.logs_K @ np.log(np.where(size.logs_K, theta, 1))
    )
    assert np.exp(top / (size.plain + size.divide_K @ theta)) == pytest.approx(
        float(truth.optimum(Compute(), 1e21).params)
    )


def test_a_fit_by_it_has_all_that_a_fit_has(tmp_path):
    found = scaling.fit(
        columns(noise=2e-3, budgets=(1e18, 3e18, 1e19, 3e19, 1e20)), law="steady", replicates=100
    )
    three = found.families["known"].approach3
    assert three.certificate.converged
    assert three.certificate.agreeing == 1
    for field in fields(Steady):
        truth = getattr(LAW, field.name)
        for ends in (three.intervals[field.name], three.profile[field.name]):
            assert ends[0] < getattr(three.params, field.name) < ends[1]
            assert ends[0] / 2 < truth < ends[1] * 2
    best = three.optimum(1e21)
    truth = float(LAW.optimum(Compute(), 1e21).params)
    assert best.intervals["params"][0] < truth < best.intervals["params"][1]
    assert len(found.families["known"].rollout.steps) == 2
    assert found.families["known"].approach2.debiased is None
    found.save(tmp_path / "fit")
    page = (tmp_path / "fit" / "report.html").read_text()
    assert "B / D^0.38, a toy" in page
    assert "isoloss" in {path.stem for path in (tmp_path / "fit").iterdir()}
    again = scaling.load(tmp_path / "fit")
    assert again.families["known"].approach3.params == three.params
    assert scaling.predict(found, 1e21)["known"].approach3.params.value == best.params
    with pytest.raises(UserError, match="knows only the law"):
        scaling.design(found, "known", target=1e21, budget=1e20)


def test_without_noise_the_truth_comes_back():
    found = scaling.fit(columns(), law="steady", replicates=100).families["known"].approach3
    assert vars(found.params) == pytest.approx(
        vars(Steady(LAW.E, LAW.A, LAW.alpha, LAW.B)), rel=1e-6
    )


def test_a_law_that_is_not_there():
    with pytest.raises(UserError, match="no law 'stedy'; there are powers, repeated, steady"):
        scaling.fit(columns(), law="stedy")
