"""What a fitted law says, with its errors: of a budget N*, D* and the loss there; of a run its loss."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prime_jax.errors import UserError
from prime_jax.scaling import approach2, labels, launchable
from prime_jax.scaling.approach2 import Debiased
from prime_jax.scaling.intervals import known_percentiles, percentiles
from prime_jax.scaling.launchable import Template
from prime_jax.scaling.laws import optima, optimum
from prime_jax.scaling.points import MIN_COUNT, Points
from prime_jax.scaling.results import FamilyFit
from prime_jax.scaling.rollout import ModelError, distance, model_error
from prime_jax.scaling.schema import Diagnostic, refuse, warn
from prime_jax.scaling.settings import Settings

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    value: float
    interval: list[float] | None  # at the level of the fit


@dataclass(frozen=True)
class Best:
    """The cheapest way to spend the budget according to one approach.

    Attributes:
        loss: in the unit and of the kind of the data; None from approach 2, which has no law of it.
        loss_with_model_error: the same, its interval widened by the error of the rollout.
    """

    params: Estimate
    tokens: Estimate
    loss: Estimate | None = None
    loss_with_model_error: Estimate | None = None


@dataclass(frozen=True)
class Launch:
    """The nearest run that exists: whole layers, heads and steps.

    Attributes:
        params: exact, in the fit's count of N where it names one (see `notes`).
        flops: of the whole run, in `convention`.
        loss: what approach 3 expects of it, None without approach 3.
    """

    layers: int
    width: int
    heads: int
    params: int
    count: str
    batch_size: int
    steps: int
    tokens: int
    peak_lr: float
    flops: float
    convention: str
    loss: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """One family at one budget.

    Attributes:
        flops: C, in the fit's convention.
        in_range: C lies within the budgets of the data, and N* among the sizes sampled there.
        decades: log10 of C over the largest budget of the data, 0 within.
        debiased: approach 2 without the bias of its parabolas; None where that is not known.
        rollout: how wrong losses predicted from smaller budgets were; None if that is unknown.
        unique_tokens: of the training data, None if unknown.
        epochs: D* over `unique_tokens`.
    """

    family: str
    kind: str
    flops: float
    in_range: bool
    decades: float
    approach3: Best | None
    approach2: Best | None
    debiased: Best | None
    rollout: ModelError | None
    unique_tokens: float | None
    epochs: float | None
    launch: Launch | None
    findings: tuple[Diagnostic, ...]


@dataclass(frozen=True)
class RunPrediction:
    """The loss of a run of one family, wherever its N and D lie.

    Attributes:
        flops: C = k N^q D of the runs of the fit.
        unique_tokens: of the training data, None if unknown.
        epochs: D over `unique_tokens`.
        decades: how far C, N, D or, by a law of repetition, the epochs lie beyond the data, whichever
            are furthest; 0 within.
        loss, loss_with_model_error: as those of `Best`; None where approach 3 is refused.
    """

    family: str
    kind: str
    params: float
    tokens: float
    flops: float
    unique_tokens: float | None
    epochs: float | None
    decades: float
    loss: Estimate | None
    loss_with_model_error: Estimate | None
    rollout: ModelError | None
    findings: tuple[Diagnostic, ...]


def predict_run(
    family: FamilyFit,
    settings: Settings,
    params: float,
    tokens: float,
    unique_tokens: float | None = None,
) -> RunPrediction:
    """Predict the loss of a run of N = `params` on D = `tokens` by approach 3.

    The error of the rollout grows with these decades: an over-trained model lies outside the data
    although its C may not.
    """
    points, error = family.points, model_error(family.rollout)
    flops = float(family.compute.k * params**family.compute.q * tokens)
    beyond = {
        "C": (flops, float(distance(points, flops))),
        "N": (params, _decades(points.params, params)),
        "D": (tokens, _decades(points.tokens, tokens)),
    }
    epochs = tokens / unique_tokens if unique_tokens else None
    if epochs and family.approach3 and family.approach3.law.knows_repetition:
        seen = points.tokens / np.minimum(points.available, points.tokens)
        beyond["D / unique tokens"] = (epochs, _decades(seen, max(epochs, 1.0)))
    decades = max(far for _, far in beyond.values())
    loss = widened = None
    if family.approach3:
        law, replicates = family.approach3.law, family.approach3.replicates
        unique = unique_tokens or np.inf
        draws = percentiles(replicates.loss(params, tokens, unique), settings.level)
        loss = Estimate(float(law.loss(params, tokens, unique)), draws)
        if error is not None:
            ends = error.widen(loss.value, *loss.interval, decades, settings.level)
            widened = Estimate(loss.value, [float(end) for end in ends])
    return RunPrediction(
        family=points.family,
        kind=points.measure.kind,
        params=params,
        tokens=tokens,
        flops=flops,
        unique_tokens=unique_tokens,
        epochs=epochs,
        decades=decades,
        loss=loss,
        loss_with_model_error=widened,
        rollout=error,
        findings=(*_run_findings(family, beyond, error, epochs), *family.warnings),
    )


def _decades(known: Array, value: float) -> float:
    """log10 beyond the smallest or the largest of the data; 0 within."""
    low, high = np.log10([known.min(), known.max()])
    return float(max(0.0, np.log10(value) - high, low - np.log10(value)))


def _run_findings(
    family: FamilyFit,
    beyond: dict[str, tuple[float, float]],
    error: ModelError | None,
    epochs: float | None,
) -> list[Diagnostic]:
    if not family.approach3:
        return [
            refuse("loss_not_predicted", "approach 3 was refused, and no other has a law of it")
        ]
    diagnostics = [
        warn(
            "extrapolation",
            f"{name} = {labels.value(value, 3)} lies {far:.2g} decades outside the data",
        )
        for name, (value, far) in beyond.items()
        if far > 0
    ]
    if error is None:
        diagnostics.append(_model_error_unknown())
    if epochs is not None and epochs > 1 and not family.approach3.law.knows_repetition:
        seen = f"the run sees its data {epochs:.3g} times, which this law counts as new tokens"
        diagnostics.append(warn("data_repeated", seen))
    return diagnostics


def predict_family(
    family: FamilyFit,
    settings: Settings,
    flops: float,
    template: Template,
    unique_tokens: float | None = None,
) -> Prediction:
    """Predict one family at C = `flops`.

    Args:
        template: what a launched run would share with the old ones.
        unique_tokens: of the training data.

    Where nothing can be predicted, a refusal says why.
    """
    points, largest = family.points, family.points.levels[-1]
    error = model_error(family.rollout)
    by_approach = {
        "approach 3": _approach3(family, settings, flops, error, unique_tokens),
        "approach 2": _approach2(family, settings, flops, None),
        "de-biased": family.approach2.debiased
        and _approach2(family, settings, flops, family.approach2.debiased),
    }
    refused = [_absurd(name, part) for name, part in by_approach.items()]
    if below := _below(points, flops):
        refused = [below] * 3
    three, two, debiased = (
        None if why else part for part, why in zip(by_approach.values(), refused, strict=True)
    )
    best, launch = three or debiased or two, None
    epochs = best.tokens.value / unique_tokens if best and unique_tokens else None
    limited = bool(epochs and epochs > 1 and three and family.approach3.law.knows_repetition)
    if limited:  # approach 2 answers another question
        two = debiased = None
        refused.append(refuse("of_fresh_data", "approach 2 does not know of the limit of the data"))
    decades = float(distance(points, flops))
    among = bool(best) and _among(points, flops, best)
    diagnostics = list(dict.fromkeys(why for why in refused if why))
    if best:
        launch, more = _launch(family, template, flops, best.params.value, unique_tokens)
        diagnostics += _range_findings(family, flops, decades, error)
        diagnostics += [] if among or decades else [_outside(points, flops, best)]
        diagnostics += [
            *_disagreement(three, debiased or two),
            *([] if limited else _data_findings(best, epochs)),
            *more,
        ]
    known = {(one.code, one.message) for one in diagnostics}
    diagnostics += [one for one in family.warnings if (one.code, one.message) not in known]
    return Prediction(
        family=points.family,
        kind=points.measure.kind,
        flops=flops,
        in_range=bool(flops <= largest and among),
        decades=decades,
        approach3=three,
        approach2=two,
        debiased=debiased,
        rollout=error,
        unique_tokens=unique_tokens,
        epochs=epochs,
        launch=launch,
        findings=tuple(diagnostics),
    )


def _below(points: Points, flops: float) -> Diagnostic | None:
    """A refusal of a budget that is cheaper to spend than to predict."""
    lowest = points.levels[0]
    if flops >= lowest:
        return None
    return refuse(
        "below_the_data",
        f"{labels.flops(flops)} FLOPs lie below the data of {points.family}, which begin at "
        f"{labels.flops(lowest)}",
    )


def _absurd(name: str, best: Best | None) -> Diagnostic | None:
    """A refusal of an optimum that is no model, or has no data: a law far from where it was fitted."""
    if best is None or min(best.params.value, best.tokens.value) >= MIN_COUNT:
        return None
    shown = (
        f"N* = {labels.value(best.params.value, 3)} and D* = {labels.value(best.tokens.value, 3)}"
    )
    return refuse("optimum_outside_range", f"{name} puts the optimum at {shown}, which is no run")


def _among(points: Points, flops: float, best: Best) -> bool:
    """Whether N* lies among the sizes that were sampled near C."""
    sizes = points.sizes_near(flops)
    return bool(sizes.min() <= best.params.value <= sizes.max())


def _outside(points: Points, flops: float, best: Best) -> Diagnostic:
    sizes = points.sizes_near(flops)
    ends = f"{labels.count(sizes.min())} to {labels.count(sizes.max())}"
    return warn(
        "optimum_outside_range",
        f"N* = {labels.count(best.params.value)} lies outside the sizes sampled near {labels.flops(flops)} FLOPs, {ends}",
    )


def _approach3(
    family: FamilyFit,
    settings: Settings,
    flops: float,
    error: ModelError | None,
    unique_tokens: float | None,
) -> Best | None:
    """The optimum with so many unique tokens, for a law that knows of repetition."""
    if not family.approach3:
        return None
    three, unique = family.approach3, unique_tokens or np.inf
    best = optimum(three.law, family.compute, flops, unique)
    draws = optima(three.replicates, family.compute, np.array([flops]), unique)
    params, tokens, loss = (
        Estimate(
            float(getattr(best, name)),
            percentiles(getattr(draws, name)[:, 0], settings.level),
        )
        for name in ("params", "tokens", "loss")
    )
    widened = None
    if error is not None:
        decades = distance(family.points, flops)
        ends = error.widen(loss.value, *loss.interval, decades, settings.level)
        widened = Estimate(loss.value, [float(end) for end in ends])
    return Best(params, tokens, loss, widened)


def _approach2(
    family: FamilyFit, settings: Settings, flops: float, debiased: Debiased | None
) -> Best | None:
    """The power law through the optima of the parabolas, or those without bias, read off at C."""
    if family.approach2.a is None:
        return None
    if debiased:
        optima, a, log_params, a_R = (
            debiased.optima, debiased.a, debiased.log_params_RxK, debiased.a_R,
        )  # fmt: skip
    else:
        optima, a = [curve.optimum for curve in family.approach2.inside], family.approach2.a
        log_params = (
            None if family.approach2.draws is None else np.log(family.approach2.draws.params)
        )
        a_R = None if family.approach2.draws is None else family.approach2.draws.a
    x = np.log([best.flops for best in optima])
    y = np.log([best.params for best in optima])
    away = np.log(flops) - x.mean()
    value = float(np.exp(y.mean() + a * away))
    ends = None
    if log_params is not None:
        scatter = approach2.line_scatter(x, y, approach2.percentile_sd(log_params)) / np.sqrt(
            len(x)
        )
        noise = scatter * np.random.default_rng(settings.seed).standard_normal(len(a_R))
        draws = np.exp(log_params.mean(axis=1) + noise + a_R * away)
        ends = known_percentiles(draws, settings.level)
    tokens = float(family.compute.tokens(flops, value))
    spent = family.compute.tokens(flops, ends)[::-1].tolist() if ends else None
    return Best(Estimate(value, ends), Estimate(tokens, spent))


def _launch(
    family: FamilyFit,
    template: Template,
    flops: float,
    params: float,
    unique_tokens: float | None,
) -> tuple[Launch | None, list[Diagnostic]]:
    try:
        shape = launchable.shape_near(template, params)
        row = launchable.rows(template, flops, shape, [0])[0]
    except UserError as problem:
        return None, [warn("no_launchable_shape", str(problem))]
    size = launchable.count(template, shape)
    tokens = row.steps * row.batch_size * template.config.data.seq_len
    loss = None
    if family.approach3:
        loss = float(family.approach3.law.loss(size, tokens, unique_tokens or np.inf))
    launch = Launch(
        *shape,
        params=size,
        count=template.count,
        batch_size=row.batch_size,
        steps=row.steps,
        tokens=tokens,
        peak_lr=row.peak_lr,
        flops=launchable.cost(row),
        convention=row.flops,
        loss=loss,
        notes=template.notes,
    )
    return launch, []


def _range_findings(
    family: FamilyFit, flops: float, decades: float, error: ModelError | None
) -> list[Diagnostic]:
    diagnostics = []
    if decades > 0:
        diagnostics.append(
            warn(
                "extrapolation",
                f"{labels.flops(flops)} FLOPs lie {decades:.2g} decades beyond the largest "
                f"budget of the data, {labels.flops(family.points.levels[-1])}",
            )
        )
    if not family.approach3:
        diagnostics.append(
            refuse(
                "loss_not_predicted",
                "approach 3 was refused, and approach 2 has no law of the loss",
            )
        )
    elif error is None:
        diagnostics.append(_model_error_unknown())
    return diagnostics


def _model_error_unknown() -> Diagnostic:
    return warn(
        "model_error_unknown",
        "too few budgets for a rollout: intervals of the loss leave out the error of the law itself",
    )


def _disagreement(three: Best | None, two: Best | None) -> list[Diagnostic]:
    ends = [best.params.interval for best in (three, two) if best and best.params.interval]
    if len(ends) < 2 or max(e[0] for e in ends) <= min(e[1] for e in ends):
        return []
    shown = f"{labels.count(two.params.value)} against {labels.count(three.params.value)}"
    return [
        warn(
            "approaches_disagree",
            f"N* of approaches 2 and 3 differ beyond their intervals: {shown}",
        )
    ]


def _data_findings(best: Best, epochs: float | None) -> list[Diagnostic]:
    if epochs is None or epochs <= 1:
        return []
    return [
        warn(
            "data_repeated",
            f"D* = {labels.count(best.tokens.value)} tokens are {epochs:.3g} times the unique ones",
        )
    ]
