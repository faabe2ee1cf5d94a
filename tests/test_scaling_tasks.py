"""From loss to accuracy: through the loss, and directly."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scaling_cases import BUDGETS, LAW, csv_rows, surface, write_csv
from scipy.optimize import least_squares

from prime_jax import scaling
from prime_jax.cli import main
from prime_jax.errors import UserError
from prime_jax.scaling import tasks
from prime_jax.scaling.intervals import profiles
from prime_jax.scaling.laws import Compute
from prime_jax.scaling.points import select
from prime_jax.scaling.settings import Settings
from prime_jax.scaling.table import of_columns
from prime_jax.scaling.tasks import Direct, LinkForm, Sigmoid, gumbel, logistic
from prime_jax.sweep import collect

MANY = (1e18, 3e18, 1e19, 3e19, 1e20, 3e20)
CURVE = Sigmoid(k=4.0, L0=2.6)
STRAIGHT = Direct(A=2e4, alpha=0.22)
CHANCE, CEILING = 0.25, 0.95


def columns(noise=0.0, seed=0, direct=False, budgets=MANY, se=0.008):
    """Runs of a known law whose accuracy follows one of the two curves."""
    part = surface(budgets=budgets, noise=noise / 4, seed=seed)
    clean = LAW.loss(part.params, part.tokens)
    fraction = STRAIGHT.fraction(part.flops) if direct else CURVE.fraction(clean)
    accuracy = CHANCE + (CEILING - CHANCE) * fraction
    rng = np.random.default_rng(seed + 1)
    accuracy = accuracy + (se * rng.standard_normal(len(clean)) if noise else 0.0)
    rows = [
        row | {"acc_quiz": a, "acc_se_quiz": se}
        for row, a in zip(csv_rows(part), accuracy.tolist(), strict=True)
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}


def fitted(data, at=(), **options):
    given = {"chance": {"quiz": CHANCE}, "ceiling": {"quiz": CEILING}, "replicates": 100}
    return scaling.downstream(data, at=at, **(given | options)).families["known"].tasks["quiz"]


def test_without_noise_both_laws_come_back():
    best = float(LAW.optimum(Compute(), 1e22).loss)
    found = fitted(columns(), [1e22])
    assert vars(found.sigmoid.params) == pytest.approx(vars(CURVE), rel=1e-6)
    assert found.sigmoid.certificate.converged
    truth = CHANCE + (CEILING - CHANCE) * CURVE.fraction(best)
    assert found.predictions[0].two_steps == pytest.approx(truth, rel=1e-5)
    assert found.two_steps_rms < 1e-6
    found = fitted(columns(direct=True), [1e22])
    assert vars(found.direct.params) == pytest.approx(vars(STRAIGHT), rel=1e-6)
    truth = CHANCE + (CEILING - CHANCE) * STRAIGHT.fraction(1e22)
    assert found.predictions[0].direct == pytest.approx(truth)
    assert found.direct_rms < 1e-6


@pytest.mark.parametrize(("link", "law"), [(gumbel, STRAIGHT), (logistic, CURVE)])
def test_derivatives_are_those_of_differences(link, law):
    x = np.log(MANY) if link is gumbel else np.linspace(2.2, 3.4, 6)
    form = LinkForm.on(np.asarray(x), link)
    theta, weight, aim = form.theta(law), np.linspace(1, 2, 6), np.linspace(0.1, 0.8, 6)
    assert vars(form.law(theta)) == pytest.approx(vars(law))
    np.testing.assert_allclose(
        form.predict(theta[None])[0][0], law.fraction(np.exp(x) if link is gumbel else x)
    )

    def value(theta):
        return np.sum(weight * (form.predict(theta[None])[0] - aim) ** 2 / 2)

    def gradient(theta):
        found, parts = form.predict(theta[None])
        return form.derivatives(parts, weight * (found - aim), weight[None])[0][0]

    found, parts = form.predict(theta[None])
    step = 1e-5 * np.eye(2)
    slopes = [(value(theta + h) - value(theta - h)) / 2e-5 for h in step]
    np.testing.assert_allclose(gradient(theta), slopes, rtol=1e-6, atol=1e-9)
    bends = [(gradient(theta + h) - gradient(theta - h)) / 2e-5 for h in step]
    hessian = form.derivatives(parts, weight * (found - aim), weight[None])[1][0]
    np.testing.assert_allclose(hessian, bends, rtol=1e-6, atol=1e-8)
    named = form.quantities()
    for name, truth in vars(law).items():
        assert named[name].natural(named[name].at(theta)[0]) == pytest.approx(truth)


def test_the_direct_law_is_what_scipy_finds():
    found = fitted(columns(noise=1.0, direct=True))
    p = found.direct.problem

    def residuals(u):
        fraction = np.exp(-np.exp(u[0] - u[1] * p.form.x_n))
        return np.sqrt(p.weight_n) * (fraction - p.log_loss_n)

    other = least_squares(residuals, [0.0, 0.5], xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert found.direct.objective == pytest.approx(other.cost, rel=1e-9)


def scores(data):
    table = of_columns(data)
    (points,) = select(table).families.values()
    return tasks._scores(points, table, "quiz", CHANCE, CEILING)[0]


def covers(seed, direct):
    """Whether the interval of the accuracy at 1e21 holds the truth."""
    found = scores(columns(noise=0.01, seed=seed, direct=direct))
    settings = Settings(replicates=400)
    if direct:
        step = tasks._direct(found, settings)
        quantity = step.problem.form.fraction_at(np.log(1e21))
        low, high = profiles(step.problem, step.fit, [quantity])[0]
        return low <= STRAIGHT.fraction(1e21) <= high
    _, (low, high) = tasks._two_steps(found, settings).at(Compute(), 1e21, settings)
    return low <= CURVE.fraction(LAW.optimum(Compute(), 1e21).loss) <= high


@pytest.mark.slow
@pytest.mark.parametrize("direct", [True, False])
def test_intervals_cover_as_often_as_they_say(direct):
    repeats, least = (500, 0.93) if direct else (200, 0.91)  # .93 of 200 were seen
    assert least <= np.mean([covers(seed, direct) for seed in range(repeats)]) <= 0.97


def test_checkpoints_of_one_run_tell_no_more_than_one():
    one, settings = scores(columns(noise=0.01, seed=3)), Settings(replicates=300)
    twice = one.only(np.arange(len(one.se)).repeat(2))
    runs = np.arange(len(one.se)).repeat(2)
    same = replace(twice, points=replace(twice.points, run=runs))
    widths = []
    for part in (one, twice, same):
        two = tasks._two_steps(part, settings)
        ends = two.sigmoid.profile["k"], two.at(Compute(), 1e22, settings)[1]
        widths.append([high - low for low, high in ends])
    alone, doubled, known = np.array(widths)
    np.testing.assert_allclose(doubled / alone, 0.5**0.5, rtol=0.2)
    assert known[0] == pytest.approx(alone[0], rel=0.02)
    assert known[1] > 1.1 * doubled[1]


def test_a_task_at_chance_says_nothing():
    data = columns(budgets=BUDGETS)
    data["acc_quiz"] = [CHANCE + 0.001] * len(data["loss"])
    found = fitted(data)
    assert found.direct is None
    assert found.warnings[0].code == "at_chance"
    assert "quiz is above chance in 0 of 4 budgets, up to 3e19 FLOPs: nothing can be said" in (
        found.warnings[0].message
    )


def test_an_unknown_standard_error_is_not_zero():
    """Noise about chance lies above it in most budgets, and still says nothing."""
    data = columns()
    noise = 0.01 * np.random.default_rng(0).standard_normal(len(data["loss"]))
    data["acc_quiz"] = (CHANCE + 0.005 + noise).tolist()
    del data["acc_se_quiz"]
    assert fitted(data).warnings[0].code == "at_chance"
    data["acc_quiz"] = columns(noise=0.01)["acc_quiz"]
    found = fitted(data)
    assert found.above_chance == len(MANY)
    assert "task_error_unknown" in {one.code for one in found.warnings}


@pytest.mark.parametrize(
    ("column", "cell"), [("acc_quiz", 45.0), ("acc_se_quiz", -0.01), ("task_loss_quiz", 0.0)]
)
def test_impossible_cells_are_refused(column, cell):
    data = columns()
    data.setdefault(column, [1.0] * len(data["loss"]))[3] = cell
    with pytest.raises(UserError, match=f"{column} must be from"):
        fitted(data)


def test_why_there_are_no_two_steps_is_said():
    found = fitted(columns(), law="repeated")
    assert found.sigmoid is None
    said = next(one.message for one in found.warnings if one.code == "loss_not_predicted")
    assert "no run saw its data more than once" in said


def test_wrong_chances_and_tasks_are_named():
    data = columns()
    for options, said in (
        ({"chance": {}}, "chance of quiz is not known; say --chance quiz=0.25"),
        ({"chance": {"quizz": 0.2}}, "no such task; did you mean quiz"),
        ({"chance": {"quiz": 1.2}}, "must be 0 or more, and below 1"),
        ({"ceiling": {"quiz": 0.2}}, "it lies above chance"),
        ({"ceiling": {"quizz": 0.9}}, "ceiling of 'quizz': no such task; did you mean quiz"),
        ({"tasks": ["sciq"]}, "no accuracy of sciq; it has quiz"),
        ({"tasks": "sciq"}, "no accuracy of sciq; it has quiz"),
        ({"at": [0.0]}, "at are budgets in FLOPs, numbers above 0"),
    ):
        with pytest.raises(UserError, match=said):
            fitted(data, **options)
    plain = {name: cells for name, cells in data.items() if not name.startswith("acc")}
    with pytest.raises(UserError, match="no accuracy of a task"):
        fitted(plain)


def test_the_loss_of_the_task_is_used_where_it_is_known():
    data = columns()
    data["task_loss_quiz"] = [2 * loss for loss in data["loss"]]
    found = fitted(data)
    assert found.loss == "task_loss_quiz"
    half = found.sigmoid.params.L0
    assert half == pytest.approx(2 * CURVE.L0, rel=1e-5)


def test_on_the_command_line(tmp_path, capsys):
    data = columns(noise=0.01)
    rows = [dict(zip(data, cells, strict=True)) for cells in zip(*data.values(), strict=True)]
    path = write_csv(tmp_path / "runs.csv", rows)
    words = ["scaling", "downstream", str(path), "--at", "1e21", "--bootstrap", "100"]
    assert main([*words, "--chance", "quiz=0.25", "--ceiling", "quiz=0.95"]) == 0
    said = capsys.readouterr().out
    assert "quiz" in said
    record = json.loads((tmp_path / "runs-fit" / "downstream.json").read_text())
    assert record["families"]["known"]["tasks"]["quiz"]["predictions"][0]["flops"] == 1e21
    assert main([*words, "--chance", "quiz"]) == 2
    assert "--chance quiz: must be like hellaswag=0.25" in capsys.readouterr().err


def test_accuracies_of_a_sweep_come_from_the_newest_evaluation(tmp_path):
    for attempt, value in (("1", 0.3), ("2", 0.4)):
        folder = tmp_path / "runs" / "abc" / attempt
        folder.mkdir(parents=True)
        entry = {"results": {"sciq": {"acc": [value, 0.01]}, "words": {"f1": [0.5, None]}}}
        (folder / "eval.json").write_text(json.dumps({"tasks": [entry]}))
    rows = collect.with_tasks(tmp_path, [{"run": "abc"}, {"run": "other"}])
    assert rows == [
        {"run": "abc", "acc_sciq": 0.4, "acc_se_sciq": 0.01},
        {"run": "other", "acc_sciq": "", "acc_se_sciq": ""},
    ]


def test_scores_keep_to_their_rows():
    data = columns()
    data["acc_quiz"][3] = ""
    found = fitted(data)
    assert found.runs == len(data["loss"]) - 1


@pytest.mark.slow
def test_tasks_and_rates_stand_in_the_report_of_the_same_data(tmp_path, capsys):
    data = columns(noise=0.01)
    rows = [dict(zip(data, cells, strict=True)) for cells in zip(*data.values(), strict=True)]
    path = write_csv(tmp_path / "runs.csv", rows)
    assert main(["fit", str(path), "--bootstrap", "100"]) == 0
    given = ["--chance", "quiz=0.25", "--bootstrap", "100"]
    assert main(["scaling", "downstream", str(path), *given]) == 0
    assert main(["scaling", "rates", str(path)]) == 3  # of one rate for each run
    page = (tmp_path / "runs-fit" / "report.html").read_text()
    assert "From loss to accuracy" in page
    assert "too_few_rates" in page
    other = write_csv(tmp_path / "other.csv", rows[:-1])
    words = ["scaling", "downstream", str(other), *given, "--out", str(tmp_path / "runs-fit")]
    assert main(words) == 0
    assert "From loss to accuracy" not in (tmp_path / "runs-fit" / "report.html").read_text()
    capsys.readouterr()
