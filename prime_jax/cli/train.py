"""`prime-jax train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_jax import settings
from prime_jax.cli.console import Progress, error, say, show
from prime_jax.cli.parse import Arguments, override
from prime_jax.config import RunConfig, run_id
from prime_jax.errors import UserError
from prime_jax.settings import REQUIRED, Flags, flatten, set_path, setting, to_dict
from prime_jax.table import Table


@dataclass(frozen=True)
class DryRun(Flags):
    """Flags of commands that predict what accelerators would do."""

    slice: str = setting(
        "", "accelerators to predict for, e.g. v5e-16, v5p-128, 2xv6e-256, h100-8", metavar="NAME"
    )
    autofit: bool = setting(
        False, "with --check: try up to six mesh settings and take the fastest that fits"
    )
    prices: Path | None = setting(
        None, "your price list, in the format of docs/prices.toml", metavar="FILE"
    )

    def understood(self, *, check: bool) -> tuple[Any, Any]:
        """The slice and the price list that were asked for, None where not.

        Raises:
            UserError: an option that needs another one, a bad slice or a bad price list.
        """
        from prime_jax.hardware import slices
        from prime_jax.hardware.prices import load_prices

        if not self.slice and (check or self.prices):
            raise UserError("--check and --prices need --slice, e.g. --slice v5e-16")
        if self.autofit and not check:
            raise UserError("--autofit needs --check")
        slice_ = slices.parse(self.slice) if self.slice else None
        return slice_, load_prices(self.prices) if self.prices else None


@dataclass(frozen=True)
class Train(Arguments):
    """Train and evaluate one run. EXPERIMENT is a Python file with a function config() ->
    RunConfig. Any setting of the run can be given by its dotted name; --settings lists them all.
    After an interruption the same command continues the run."""

    SETTINGS = RunConfig
    EXAMPLES = (
        "prime-jax train preset:quickstart --steps 200 --out runs/first",
        "prime-jax train preset:quickstart --model.width 256 --optim.peak-lr 3e-4",
        "prime-jax train preset:owt_92m --slice v5e-16 --check",
    )

    experiment: Path = setting(REQUIRED, "Python file with config() -> RunConfig", positional=True)
    out: Path | None = setting(None, "run directory (default: runs/<run id>)", metavar="DIR")
    init_from: str | None = setting(
        None,
        "start from the weights of this finished run or exported folder instead of random weights; "
        "steps, warm-up and data are those of the new run",
        metavar="RUN",
    )
    settings: bool = setting(False, "list all settings with their values and ranges, then stop")
    profile: int = setting(0, "number of steps to trace for xprof", at_least=0, metavar="STEPS")
    check: bool = setting(
        False, "do not train: compile the training step for --slice and report whether it fits"
    )
    dry_run: DryRun = setting(DryRun(), "predictions")
    overrides: tuple[str, ...] = setting((), "dotted settings", flag=False)


def train(args: Train) -> int | None:
    from prime_jax.experiment import load_config

    config = override(load_config(args.experiment), args.overrides)
    if args.profile:
        config = set_path(config, "log.profile", args.profile)
    if args.settings:
        return _list(config)
    slice_, prices = args.dry_run.understood(check=args.check)
    if slice_:
        return _dry_run(config, slice_, prices, check=args.check, autofit=args.dry_run.autofit)
    from prime_jax.cli import runs
    from prime_jax.data import manifest
    from prime_jax.runtime import distributed
    from prime_jax.train import Interrupted, Preempted, fill_fingerprint, starting_from, train

    data = manifest.load(config.data.path)
    manifest.check(data, config)
    config = fill_fingerprint(config, data)
    with Progress() as progress:
        distributed.start(progress.log)
        initial = runs.weights(args.init_from, progress.log) if args.init_from else None
        config = starting_from(config, initial) if initial else config
        out = args.out or Path("runs") / run_id(config)
        shown = {"heartbeat": progress.heartbeat, "log": progress.log}
        try:
            result = train(config, out, initial=initial, **shown)
        except Interrupted as stop:
            progress.log(f"{stop}; the same command continues it")
            return 85 if isinstance(stop, Preempted) else 1
    return report(result, out)


def _list(config: RunConfig) -> None:
    """Every setting as a flag with its value, what it is for and what it takes."""
    rows = []
    for path, value in flatten(to_dict(config)).items():
        _, field = settings.find(RunConfig, path)
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append((f"--{path}", shown, field.metadata["help"], settings.allowed(RunConfig, path)))
    show(Table(("setting", "value", "what it is for", "what it takes"), rows))


def _dry_run(config: RunConfig, slice_: Any, prices: Any, *, check: bool, autofit: bool) -> int:
    """Predict a run on a slice and perhaps compile it; 1 if it does not fit."""
    from prime_jax.cli import forecast
    from prime_jax.cli.compilations import Compilations
    from prime_jax.compile_check import aot
    from prime_jax.config import remark, validate

    verdict = None
    validate(config)
    if said := remark(config):
        say(said)
    if check:
        judge = aot.autofit if autofit else aot.check
        with Compilations(f"compiling for {slice_.name}") as progress:
            verdict = judge(config, slice_, progress=progress)
        forecast.show_verdicts([verdict])
        config = verdict.config
    say(forecast.cost_estimate([config], slice_, prices))
    if verdict and autofit and verdict.fits:
        say(f"settings: {aot.describe(config.mesh)}")
    return 0 if verdict is None or verdict.fits else 1


def report(result: dict[str, Any], out: Path) -> int:
    """Show what a finished run is worth; 1 if it diverged."""
    if result["status"] == "diverged":
        say(f"diverged: {result['reason']}; see {out / 'metrics.jsonl'}")
        return 1
    rows = []
    for loss in result["losses"]:
        bits = result["bits_per_byte"].get(loss["estimator"])
        errors = (error(loss[name]) for name in ("se_mc", "se_data"))
        per_byte = "" if bits is None else f"{bits:.4f}"
        value = f"{loss['value']:.4f}"
        rows.append((loss["estimator"], loss["kind"], value, *errors, per_byte))
    seconds = result["seconds"]
    notes = (
        *(f"{loss['estimator']}: {loss['note']}" for loss in result["losses"] if loss.get("note")),
        f"{result['family']} N={result['params']['nonembedding']:,} D={result['tokens']:,} "
        f"C={result['flops']['matmul']:.3g} FLOPs (matmul), {result['tokens_per_second']:,.0f} "
        f"tokens/s, {seconds['total']:.1f} s of which {seconds['compile']:.1f} s compiling",
        f"record: {out / 'result.json'}",
    )
    show(
        Table(("estimator", "kind", "nats/token", "se (MC)", "se (data)", "bits/byte"), rows, notes)
    )
    return 0
