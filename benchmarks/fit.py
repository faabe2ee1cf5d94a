"""CPU time of a scaling-law fit beside the usual tools: many starts, then 4,000 bootstraps.

    python benchmarks/fit.py [--csv FILE] [--bootstraps 4000] [--starts 45] [--sample 40] [--every]

The job is the one of the published fits: log-Huber of delta 1e-3, the best of many starts, then
every bootstrap replicate refitted from there. The points are a synthetic surface of 240 noisy runs,
or a CSV with the columns params, loss and tokens or flops (C = 6 N D). The baselines are written here on
the usual unscaled unknowns (log A, log B, log E, alpha, beta) and start from the usual 4,500 (a and b
of 0 to 25, e of -1 to 1, exponents of 0 to 2):

* L-BFGS-B of scipy, gradient by finite differences;
* BFGS of scipy with the exact gradient in numpy, which stands in for automatic differentiation
  (a tape would only add to its time).

Their times are measured on a part of the starts and of the replicates and scaled up; --every runs
all 4,500 starts, for the best objective that they can reach. One thread, CPU seconds.
"""

import argparse
import csv
import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # read when numpy is imported

import numpy as np  # noqa: E402
from scipy.optimize import minimize  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from prime_jax.scaling import approach3, intervals  # noqa: E402
from prime_jax.scaling.laws import PowerLaw  # noqa: E402

Array = np.ndarray
STARTS = 4500
AGREE = 1e-6  # a start that ends within this fraction of the best objective has found it


@dataclass(frozen=True)
class Runs:
    params: Array
    tokens: Array
    loss: Array


def synthetic(count: int = 240) -> Runs:
    rng = np.random.default_rng(0)
    params, ratio = np.exp(rng.uniform(np.log([5e7, 3.0]), np.log([1e10, 300.0]), (count, 2))).T
    loss = PowerLaw(1.8, 480.0, 2100.0, 0.347, 0.367).loss(params, params * ratio)
    return Runs(params, params * ratio, loss * np.exp(0.005 * rng.standard_normal(count)))


def read(path: Path) -> Runs:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    column = {name: np.array([float(row[name]) for row in rows]) for name in ("params", "loss")}
    other = "tokens" if "tokens" in rows[0] else "flops"
    values = np.array([float(row[other]) for row in rows])
    tokens = values if other == "tokens" else values / (6 * column["params"])
    return Runs(column["params"], tokens, column["loss"])


def objective(runs: Runs, weight: Array) -> Callable[[Array], tuple[float, Array]]:
    """The usual objective of x = a, b, e, alpha, beta, and its gradient."""
    log_n, log_d, log_loss = np.log(runs.params), np.log(runs.tokens), np.log(runs.loss)

    def both(x: Array) -> tuple[float, Array]:
        a, b, e, alpha, beta = x
        terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
        top = terms.max(axis=0)
        parts = np.exp(terms - top)
        total = parts.sum(axis=0)
        residual = top + np.log(total) - log_loss
        pull = np.clip(residual, -1e-3, 1e-3)
        value = float(weight @ (pull * (residual - 0.5 * pull)))
        by_a, by_b, by_e = weight * pull * parts / total
        return value, np.array([by_a.sum(), by_b.sum(), by_e.sum(), -by_a @ log_n, -by_b @ log_d])

    return both


def finite_differences(runs: Runs, weight: Array, start: Array) -> tuple[float, Array]:
    both = objective(runs, weight)
    found = minimize(lambda x: both(x)[0], start, method="L-BFGS-B")
    return found.fun, found.x


def exact_gradient(runs: Runs, weight: Array, start: Array) -> tuple[float, Array]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # steps into infinity, which it recovers from
        found = minimize(objective(runs, weight), start, jac=True, method="BFGS")
    return found.fun, found.x


PEERS = {
    "L-BFGS-B, finite differences": finite_differences,
    "BFGS, exact gradient": exact_gradient,
}


def usual_starts() -> Array:
    grid = itertools.product(
        np.arange(0, 30, 5), np.arange(0, 30, 5), np.arange(-1, 1.1, 0.5), *[np.arange(0, 2.1, 0.5)] * 2
    )  # fmt: skip
    return np.array(list(grid))


def ours(runs: Runs, weight_Rxn: Array) -> tuple[float, float, approach3.Fit, PowerLaw]:
    """CPU seconds of the starts and of the replicates, the fit, and its replicates."""
    begin = time.process_time()
    problem = approach3.problem(runs.params, runs.tokens, runs.loss)
    fit = approach3.fit(problem)
    middle = time.process_time()
    laws = intervals.resample(problem, fit, weight_Rxn)
    return middle - begin, time.process_time() - middle, fit, laws


def unscaled(law: PowerLaw, k: int | None = None) -> Array:
    values = (law.A, law.B, law.E, law.alpha, law.beta)
    a, b, e, alpha, beta = values if k is None else (v[k] for v in values)
    return np.array([np.log(a), np.log(b), np.log(e), alpha, beta])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--drop", type=int, default=0, help="leave out the runs of highest loss")
    parser.add_argument("--bootstraps", type=int, default=4000)
    parser.add_argument(
        "--starts", type=int, default=45, help="of 4,500 on which a baseline is timed"
    )
    parser.add_argument("--sample", type=int, default=40, help="replicates it is timed on")
    parser.add_argument("--every", action="store_true", help="all 4,500 starts of the baselines")
    args = parser.parse_args()

    runs = read(args.csv) if args.csv else synthetic()
    kept = np.argsort(runs.loss, kind="stable")[: len(runs.loss) - args.drop]
    runs = Runs(runs.params[kept], runs.tokens[kept], runs.loss[kept])
    count = len(runs.loss)
    weight_Rxn = intervals.bootstrap_weights(np.zeros(count), args.bootstraps, seed=0)
    print(f"{count} runs; {STARTS} starts or 54 of ours; {args.bootstraps} bootstraps; CPU seconds")
    print(
        f"{'':30}{'starts':>9}{'bootstraps':>11}{'all':>9}{'ratio':>7}  objective       starts at best"
    )

    fit_seconds, bootstrap_seconds, fit, laws = ours(runs, weight_Rxn)
    total = fit_seconds + bootstrap_seconds
    print(
        f"{'prime_jax':30}{fit_seconds:9.2f}{bootstrap_seconds:11.2f}{total:9.2f}{1:7.0f}  "
        f"{fit.objective:.10g}  {fit.certificate.agreeing:.0%} of 54",
        flush=True,
    )
    starts = usual_starts()
    if not args.every:
        starts = np.random.default_rng(0).choice(starts, min(args.starts, STARTS), replace=False)
    sample = np.arange(min(args.sample, args.bootstraps))
    for name, peer in PEERS.items():
        begin = time.process_time()
        ends = np.array([peer(runs, np.ones(count), start)[0] for start in starts])
        middle = time.process_time()
        theirs = [peer(runs, weight_Rxn[k], unscaled(fit.law))[0] for k in sample]
        end = time.process_time()
        seconds = (middle - begin) * STARTS / len(starts)
        more = (end - middle) * args.bootstraps / len(sample)
        ends = ends[np.isfinite(ends)]
        found = np.mean(ends <= fit.objective * (1 + AGREE))
        print(
            f"{name:30}{seconds:9.1f}{more:11.1f}{seconds + more:9.1f}"
            f"{(seconds + more) / total:7.0f}  {ends.min():.10g}  {found:.0%} of {len(starts)}",
            flush=True,
        )
        mine = [objective(runs, weight_Rxn[k])(unscaled(laws, k))[0] for k in sample]
        worst = np.max(np.array(mine) / np.array(theirs) - 1)
        lower = np.mean(np.array(mine) < np.array(theirs) * (1 - AGREE))
        print(
            f"  timed on {len(starts)} starts and {len(sample)} replicates; ours against it, most: "
            f"{fit.objective / ends.min() - 1:+.1e} of the best of its starts, {worst:+.1e} of a "
            f"replicate; lower in {lower:.0%} of replicates",
            flush=True,
        )


if __name__ == "__main__":
    main()
