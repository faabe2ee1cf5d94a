"""The acceptance run: what only a TPU slice can show, measured and checked once, as one JSON file.

    PRIME_TPU_APPROVE=v6e-16 python benchmarks/tpu_acceptance.py --on gce --slice v6e-16 \
        --project P --zone Z --root gs://BUCKET/acceptance -o tpu_acceptance_v6e-16.json

It starts one worker on the slice and plans three things for it: kernels are tuned and MFU measured
before the first run; the quickstart's sweep; two runs that differ only in how they are evaluated,
of which one is taken away with its hosts in the middle and must continue to the bit. It says first
what it will cost, spends nothing without PRIME_TPU_APPROVE=SLICE, and deletes all that it made.
docs/tpu-acceptance.md describes the file. `--on-host` is what the hosts themselves start.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

from prime_jax import __version__  # noqa: E402
from prime_jax.cli import boundary  # noqa: E402
from prime_jax.errors import UserError  # noqa: E402
from prime_jax.hardware import slices  # noqa: E402
from prime_jax.hardware.prices import Prices, load_prices  # noqa: E402
from prime_jax.launch import cloud, engine, gce, tpu  # noqa: E402
from prime_jax.runtime import checkpoint, distributed, metrics, records, storage  # noqa: E402
from prime_jax.sweep import accelerators, grid, plan, state  # noqa: E402

SCHEMA = 1
APPROVAL = "PRIME_TPU_APPROVE"
ENGINES = {"gce": gce, "tpu": tpu}
CLOUDS = {"gce": gce.InstanceGroups, "tpu": tpu.QueuedResources}
SAME = ("loss", "lr", "grad_norm")  # columns of metrics.jsonl that must agree to the bit
LOOKS = 6  # at the runs, for each one at the machines
ENDS, PAUSE = 20, 15.0  # attempts to delete what was made; seconds between them
LONGEST = 168.0  # hours
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        mfu: arguments of benchmarks/mfu.py.
        tokens: of a step per chip, for MFU.
        shape: layers, width and heads of the interrupted run.
        steps: of this run; `every`: between its checkpoints; `batch`: its sequences.
        rounds: of `kernels tune`.
    """

    mfu: tuple[str, ...]
    tokens: int
    shape: tuple[int, int, int]
    steps: int
    every: int
    batch: int
    rounds: int


SCALES = {
    "full": Scale(
        mfu=("--sizes", "92M", "354M", "1.1B"),
        tokens=32768,
        shape=(8, 512, 8),
        steps=40_000,
        every=1000,
        batch=256,
        rounds=5,
    ),
    # On CPUs in place of chips: the same programs, and no numbers of any worth.
    "rehearsal": Scale(
        mfu=("--sizes", "tiny", "--families", "mdm", "--rounds", "1", "--length", "64"),
        tokens=64,
        shape=(1, 16, 1),
        steps=60,
        every=10,
        batch=8,
        rounds=1,
    ),
}


def main(words: list[str] | None = None) -> int:
    args = _parser().parse_args(words)
    if args.on_host:
        return boundary.guarded(lambda: on_host(args.root, slices.parse(args.slice), args.scale))
    return boundary.guarded(lambda: _drive(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slice", required=True)
    parser.add_argument("--root", required=True, help="a new folder, gs://BUCKET/DIR")
    parser.add_argument("--on", choices=ENGINES, default="gce")
    parser.add_argument(
        "--hours", type=float, default=4.0, help="all ends after so many (default 4)"
    )
    parser.add_argument("--prices", type=Path, default=HERE.parents[1] / "docs/prices.toml")
    parser.add_argument("--experiment", default="preset:quickstart", help="the sweep")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--poll", type=float, default=10.0, help="seconds between looks")
    parser.add_argument("-o", "--out", type=Path, default=Path("tpu_acceptance.json"))
    parser.add_argument("--on-host", action="store_true", help=argparse.SUPPRESS)
    for name in ("project", "zone", "reservation", "service-account", "network", "subnetwork"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--flex-start", default="", help="with --on gce")
    parser.add_argument("--spot", action="store_true")
    return parser


def _drive(args: argparse.Namespace) -> int:
    """From the plan to the file; 1 if a check failed."""
    where, prices, scale = slices.parse(args.slice), load_prices(args.prices), SCALES[args.scale]
    if args.out.exists():
        raise UserError(f"{args.out} exists; -o names another file")
    if not (args.data / "manifest.json").exists():
        raise UserError(f"{args.data}: no data; make it with `make quickstart`, or give --data DIR")
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"{args.out}: there is no such folder")
    if not 0 < args.hours <= LONGEST or not 0 < args.poll < math.inf:
        raise UserError(f"--hours: above 0, at most {LONGEST:g}; --poll: above 0")
    if where.chip.platform != "tpu" or where.hosts < 2:
        raise UserError(f"--slice {where.name}: must be TPUs on at least two hosts, e.g. v6e-16")
    options = _options(args, where)
    print(_announced(args, where, prices))
    if os.environ.get(APPROVAL) != where.name:
        raise UserError(f"nothing was started: {APPROVAL}={where.name} approves the cost above")
    module, root = ENGINES[args.on], storage.path(args.root)
    sweep = engine.sweep_at(root, 1, where)
    if storage.names(root):
        raise UserError(f"{args.root}: not empty; give a new folder")
    pair = plan_runs(root, args.experiment, args.data, where, scale)
    _upload(args.data, storage.path(f"{args.root}-data") / args.data.name)
    began = time.monotonic()
    taken, problem, left = "", "", ""
    with _signals_are_ctrl_c():
        try:
            taken = _watch(module, sweep, options, pair, args)
        except UserError as error:
            problem = str(error)
        finally:
            left = _end(module, sweep, options, _dialogue(prices, lambda line: None))
    hours = (time.monotonic() - began) / 3600
    made = manifest(root, where, pair, taken)
    made["checks"] += [
        _check("finished in time and without an error", not problem, problem),
        _check("nothing is left", not left, left),
    ]
    price = prices.of(where, hours)
    made |= {
        "engine": args.on,
        "rehearsal": args.scale != "full",
        "experiment": args.experiment,
        "hours": round(hours, 3),
        "cost": price
        and {"value": round(price, 2), "currency": prices.currency, "prices": prices.date},
    }
    args.out.write_bytes(records.as_json(made))
    for check in made["checks"]:
        print(
            f"{'passed' if check['passed'] else 'FAILED'}: {check['name']} {check['detail']}".rstrip()
        )
    print(args.out)
    return 0 if all(check["passed"] for check in made["checks"]) else 1


def _upload(folder: Path, place: Any) -> None:
    for file in (file for file in folder.rglob("*") if file.is_file()):
        storage.write(place / str(file.relative_to(folder)), file.read_bytes())


def _announced(args: argparse.Namespace, where: slices.Slice, prices: Prices) -> str:
    price = prices.of(where, args.hours)
    cost = "unknown" if price is None else f"{price:.2f} {prices.currency}"
    return (
        f"at most {args.hours:g} hours of one {where.name} ({where.hosts} hosts, {where.chips} chips) "
        f"in {args.zone}; at most {cost} on demand by {args.prices.name} ({prices.date}), and storage"
    )


def _options(args: argparse.Namespace, where: slices.Slice) -> Any:
    """The engine's options, with what the hosts do before their first run.

    Raises:
        UserError: options or a slice that the engine does not take.
    """
    kind = ENGINES[args.on].Options
    known = {field.name for field in fields(kind)}
    if args.flex_start and "flex_start" not in known:
        raise UserError("--flex-start is an option of --on gce")
    given = {name: value for name, value in vars(args).items() if name in known and value}
    command = [*("--on-host", "--slice", where.name, "--scale", args.scale), "--root", args.root]
    setup = (
        "export PRIME_WAIT_SECONDS=7200",
        f'"$home/venv/bin/python" "$home/code/benchmarks/{HERE.name}" {shlex.join(command)}',
    )
    options = kind(**given | {"setup": setup, "data": f"{args.root}-data"})
    pool = engine.Pool(engine.Sweep(args.root, None), where, 1)
    CLOUDS[args.on](options).check(pool, "")
    return options


@contextlib.contextmanager
def _signals_are_ctrl_c() -> Iterator[None]:
    """A closed terminal or a kill must not leave machines behind."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(module: Any, sweep: Any, options: Any, dialogue: engine.Dialogue) -> str:
    """Delete all that was made, however often that fails at first; what is wrong in the end.

    The cloud may refuse what a machine has just begun to delete by itself.
    """
    left = ""
    try:
        for attempt in range(ENDS):
            if attempt:
                time.sleep(PAUSE)
            try:
                left = "some resources" if module.down(sweep, options, dialogue) else ""
            except UserError as error:
                left = str(error)
            if not left:
                break
    except BaseException:
        left = "interrupted"
        raise
    finally:
        where = f"--project {options.project} --zone {options.zone}"
        name = module.__name__.rpartition(".")[2]
        command = f"prime-jax sweep down {sweep.root} --on {name} {where}"
        print(f"NOT ALL IS DELETED ({left}): {command}" if left else "nothing is left", flush=True)
    return left


def _dialogue(prices: Prices, log: Any) -> engine.Dialogue:
    return engine.Dialogue(log, lambda question: True, True, prices)


def plan_runs(
    root: Any, name: str, data: Path, where: slices.Slice, scale: Scale
) -> tuple[str, str]:
    """Write the sweep; the ids of the two runs of one trajectory."""
    experiment = grid.load_experiment(name)
    path = {"data.path": str(data)}
    moved = [replace(row, overrides=row.overrides | path) for row in experiment.rows]
    experiment = replace(experiment, rows=tuple(moved))
    listed = plan.candidates(experiment, plan.load_datasets(experiment, required=True))
    plan.write(root, experiment, listed, where.name)
    longest = max((row for row in moved if row.family == "prime"), key=lambda row: row.budget)
    layers, width, heads = scale.shape
    twins = [
        replace(
            longest,
            layers=layers,
            width=width,
            heads=heads,
            steps=scale.steps,
            batch_size=scale.batch,
            budget=100 * longest.budget,  # the largest run is taken first
            overrides=longest.overrides
            | {
                "eval.replicates": replicates,
                "checkpoint.every": scale.every,
                "checkpoint.keep": 100,
                "log.every": 1,
                "optim.warmup_steps": scale.every,
            },
        )
        for replicates in (2, 3)
    ]
    both = grid.Experiment("resume", tuple(twins), "0" * 64, epochs_limit=math.inf)
    listed = plan.candidates(both, plan.load_datasets(both, required=True))
    plan.write(root, both, listed, where.name)
    first, second = (candidate.id for candidate in listed)
    return first, second


def _watch(module: Any, sweep: Any, options: Any, pair: tuple[str, str], args: Any) -> str:
    """Keep one worker until every run has ended; the run that was taken away in its middle.

    Raises:
        UserError: the machine could not work, or the time is over.
    """
    deadline, taken, said = time.monotonic() + 3600 * args.hours, "", ""
    quiet, watch = _dialogue(load_prices(args.prices), lambda line: None), state.Watch()
    while True:
        if time.monotonic() > deadline:
            raise UserError(f"not finished within {args.hours:g} hours")
        try:
            if not sweep.busy_pools():
                return taken
            module.up(sweep, options, quiet)
            for _ in range(LOOKS):
                runs = {run.id: run for run in state.list_runs(sweep.source, watch)}
                line = f"{sum(run.state == 'done' for run in runs.values())} of {len(runs)} runs"
                if line != said:
                    print(f"{datetime.now(UTC):%H:%M:%S} {line}", flush=True)
                    said = line
                pair_of = [runs[name] for name in pair]
                if not taken and (name := _in_the_middle(sweep.source, pair_of)):
                    print(f"taking the hosts of run {name} away", flush=True)
                    module.down(sweep, options, quiet)
                    taken = name
                    break
                if time.monotonic() > deadline:
                    break
                time.sleep(args.poll)
        except UserError as error:
            if not cloud.is_transient(error):
                raise
            time.sleep(args.poll)


def _in_the_middle(root: Any, runs: list[state.Run]) -> str:
    """A run that has a checkpoint and is at work; "" for none."""
    for run in runs:
        if run.state == "running" and run.k == 1:
            folder = root / "runs" / run.id / "1" / "checkpoints"
            saved = checkpoint.steps(folder)
            if saved and saved[-1] < run.spec["config"]["steps"] * 3 / 4:
                return run.id
    return ""


def manifest(root: Any, where: slices.Slice, pair: tuple[str, str], taken: str) -> dict[str, Any]:
    """What the sweep's directory says: numbers and checks."""
    runs = {run.id: run for run in state.list_runs(root)}
    host = (
        records.read_json(file) if storage.exists(file := root / "acceptance" / "host.json") else {}
    )
    tables = {
        name: records.read_json(root / "kernels" / name)
        for name in storage.names(root / "kernels")
        if name.endswith(".json")
    }
    sweep = [run for run in runs.values() if run.id not in pair]
    done = [run for run in sweep if run.state == "done"]
    bad = [
        run.id for run in done if any(not math.isfinite(x["value"]) for x in run.result["losses"])
    ]
    results = [run.result for run in runs.values() if run.result]
    resumed = _resumed(root, runs, pair, taken)
    rows = host.get("mfu", [])
    wrong = [f"{row['size']} {row['family']}: {row['error']}" for row in rows if "error" in row]
    devices = sorted({result["device"] for result in results})
    expected = f"{where.devices} x "
    return {
        "schema": SCHEMA,
        "kind": "tpu_acceptance",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "slice": where.name,
        "topology": where.topology,
        "chips": where.chips,
        "hosts": where.hosts,
        "devices": devices,
        "versions": {"prime_jax": __version__, **host.get("versions", {})},
        "kernels": tables,
        "mfu": rows,
        "sweep": {"runs": len(sweep), "done": len(done)},
        "resume": resumed,
        "checks": [
            _check("kernels are tuned", bool(tables), ", ".join(tables)),
            _check("MFU is measured", bool(rows) and not wrong, "; ".join(wrong)),
            _check("the sweep is done", len(done) == len(sweep) > 0, f"{len(done)} of {len(sweep)}"),
            _check("its losses are finite", bool(done) and not bad, ", ".join(bad)),
            _check("two hosts train as one", where.hosts > 1 and all(d.startswith(expected) for d in devices) and bool(devices), ", ".join(devices)),
            _check("a run was taken away in its middle", 0 < resumed.get("at_step", 0) < resumed.get("steps", 0), json.dumps(resumed)),
            _check("it continued to the bit", resumed.get("different") == [], ""),
        ],
    }  # fmt: skip


def _check(name: str, passed: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "detail": detail}


def _resumed(root: Any, runs: dict[str, Any], pair: tuple[str, str], taken: str) -> dict[str, Any]:
    """The interrupted run beside the one that was not; the steps at which they differ."""
    if not taken or not all(runs[name].result for name in pair):
        return {}
    (control,) = (name for name in pair if name != taken)
    curves = []
    for name in (taken, control):
        attempts = [root / "runs" / name / str(a.k) for a in runs[name].attempts]
        rows = metrics.rows_through(attempts, runs[name].result["steps"], name)
        curves.append({r["step"]: [r.get(key) for key in SAME] for r in rows if "loss" in r})
    first, second = curves
    result = runs[taken].result
    return {
        "run": taken,
        "control": control,
        "attempts": runs[taken].k,
        "at_step": result["first_step"],
        "steps": result["steps"],
        "compared": len(first),
        "different": sorted(s for s in first.keys() | second.keys() if first.get(s) != second.get(s)),
    }  # fmt: skip


def on_host(root_url: str, where: slices.Slice, scale_name: str) -> int:
    """Before the first run, on every host: tune kernels on a chip of the first, then MFU on all."""
    root, scale, group = storage.path(root_url), SCALES[scale_name], distributed.detect(os.environ)
    first = group is None or group.process == 0
    report = root / "acceptance" / "host.json"
    if storage.exists(report):
        return 0  # this slice replaces one that was taken away
    if first:
        alone = {k: v for k, v in os.environ.items() if not k.startswith("PRIME_PROCESS")}
        alone.pop("PRIME_COORDINATOR", None)
        alone |= accelerators.partition(where.chips_per_host)[0]
        rounds = ["--rounds", str(scale.rounds)]
        command = ["-m", "prime_jax", "kernels", "tune", "--root", root_url, *rounds]
        subprocess.run([sys.executable, *command], env=alone, check=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "mfu.json"
        tokens = ["--tokens", str(scale.tokens * where.chips), "--json", str(out)]
        command = [str(HERE.with_name("mfu.py")), *scale.mfu, *tokens]
        subprocess.run([sys.executable, *command])  # what does not run is a row that says so
        rows = json.loads(out.read_text()) if out.exists() else []
    if first:
        versions = {"python": sys.version.split()[0], **dict(_versions())}
        storage.make_folder(report.parent)
        records.write_json_atomic(report, {"versions": versions, "mfu": rows})
    return 0


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


if __name__ == "__main__":
    sys.exit(main())
