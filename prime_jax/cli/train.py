"""`prime-jax train` and `prime-jax doctor`."""

import argparse
import contextlib
import io
import itertools
from pathlib import Path
from typing import Any

from prime_jax.errors import UserError


def register(subparsers: Any) -> None:
    train = subparsers.add_parser(
        "train",
        help="train and evaluate one run",
        description="Train and evaluate one run: EXPERIMENT is a Python file with a function "
        "config() -> RunConfig. Any setting can be overridden by its dotted name, for example "
        "--model.width 256 --optim.peak-lr 3e-4; --settings lists them all. A run that was "
        "interrupted continues when the same command is given again.",
    )
    train.add_argument("experiment", type=Path, help="Python file with config() -> RunConfig")
    train.add_argument("--out", type=Path, help="run directory (default runs/<run id>)")
    train.add_argument("--settings", action="store_true", help="list all settings and stop")
    train.add_argument(
        "--profile", type=int, default=0, metavar="STEPS", help="trace so many steps for xprof"
    )
    add_slice(train)
    train.add_argument(
        "--check",
        action="store_true",
        help="do not train: compile the training step for --slice and say whether it fits",
    )
    train.set_defaults(run=run_train, overridable=True)

    doctor = subparsers.add_parser(
        "doctor",
        help="what this machine has, what is missing and how to get it",
        description="Versions, devices, memory, compilers and optional packages.",
    )
    doctor.set_defaults(run=run_doctor)


def add_slice(parser: argparse.ArgumentParser) -> None:
    """Options of commands that look ahead."""
    parser.add_argument(
        "--slice",
        metavar="NAME",
        help="accelerators to predict for, e.g. v5e-16, v5p-128, 2xv6e-256, h100-8",
    )
    parser.add_argument(
        "--autofit",
        action="store_true",
        help="with --check: compile up to six mesh settings for the fastest that fits",
    )
    parser.add_argument(
        "--prices", type=Path, metavar="FILE", help="your price list, like docs/prices.toml"
    )


def slice_of(args: argparse.Namespace) -> tuple[Any, Any]:
    """The slice and the price list that were asked for, None where not.

    Raises:
        UserError: an option that needs another one, a bad slice or a bad price list.
    """
    from prime_jax.hardware import roofline, slices

    if not args.slice and (args.check or args.prices):
        raise UserError("--check and --prices need --slice, e.g. --slice v5e-16")
    if args.autofit and not args.check:
        raise UserError("--autofit needs --check")
    slice_ = slices.parse(args.slice) if args.slice else None
    return slice_, roofline.load_prices(args.prices) if args.prices else None


def override(config: Any, arguments: list[str]) -> Any:
    """Apply typed dotted overrides (tyro) to a config.

    Raises:
        UserError: an unknown or ill-typed setting, with the nearest valid one or its type.
    """
    import difflib

    from prime_jax.settings import allowed, to_dict

    known = flatten(to_dict(config))
    starts = [i for i, word in enumerate(arguments) if word.startswith("--")]
    groups = [arguments[i:j] for i, j in itertools.pairwise([*starts, len(arguments)])]
    if arguments and starts[:1] != [0]:
        raise UserError(f"{arguments[0]}: a setting is written --name value")
    for group in groups:
        name = group[0].partition("=")[0].removeprefix("--").replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{close[0]}?" if close else "--settings lists them all"
            raise UserError(f"--{name}: no such setting; {hint}")
        if _tyro(config, group) is None:
            kind = allowed(type(config), name)
            raise UserError(f"{' '.join(group)}: not a valid value ({kind}; now {known[name]!r})")
    return _tyro(config, arguments)


def _tyro(config: Any, arguments: list[str]) -> Any | None:
    """The overridden config, or None where tyro refuses; it would print a page, we print a line."""
    import tyro

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            plain = (tyro.conf.FlagConversionOff,)
            return tyro.cli(type(config), default=config, args=arguments, config=plain)
        except SystemExit:
            return None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.width": 128, ...} of a nested dict."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        out |= inner if inner is not None else {prefix + key: value}
    return out


def run_train(args: argparse.Namespace) -> int:
    from prime_jax.config import run_id
    from prime_jax.experiment import load_config
    from prime_jax.settings import set_path, to_dict

    config = override(load_config(args.experiment), args.rest)
    if args.profile:
        config = set_path(config, "log.profile", args.profile)
    if args.settings:
        for name, value in flatten(to_dict(config)).items():
            print(f"--{name} {value}")
        return 0
    if args.check or args.slice or args.autofit or args.prices:
        return dry_run(config, args)
    from prime_jax.cli.progress import RunProgress
    from prime_jax.data import manifest
    from prime_jax.runtime import distributed
    from prime_jax.train import Interrupted, Preempted, fill_fingerprint, train

    data = manifest.load(config.data.path)
    manifest.check(data, config)
    config = fill_fingerprint(config, data)
    out = args.out or Path("runs") / run_id(config)
    with RunProgress() as progress:
        distributed.start(progress.log)
        try:
            result = train(config, out, heartbeat=progress.heartbeat, log=progress.log)
        except Interrupted as stop:
            progress.log(f"{stop}; the same command continues it")
            return 85 if isinstance(stop, Preempted) else 1
    return report(result, out)


def dry_run(config: Any, args: argparse.Namespace) -> int:
    """Predict a run on a slice and, with --check, compile it; 1 if it does not fit."""
    from rich.console import Console

    from prime_jax.cli import forecast
    from prime_jax.cli.compilations import Compilations
    from prime_jax.compile_check import aot
    from prime_jax.config import validate

    slice_, prices = slice_of(args)
    console = Console(width=max(forecast.WIDTH, Console().width))
    verdict = None
    validate(config)
    if args.check:
        judge = aot.autofit if args.autofit else aot.check
        with Compilations(f"compiling for {slice_.name}", console) as progress:
            verdict = judge(config, slice_, progress=progress)
        forecast.show([verdict], console)
        config = verdict.config
    console.print(forecast.cost_estimate([config], slice_, prices), soft_wrap=True)
    if verdict and args.autofit and verdict.fits:
        console.print(f"settings: {aot.describe(config.mesh)}", soft_wrap=True)
    return 0 if verdict is None or verdict.fits else 1


def report(result: dict[str, Any], out: Path) -> int:
    """Print what a finished run is worth; 1 if it diverged."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if result["status"] == "diverged":
        console.print(f"diverged: {result['reason']}; see {out / 'metrics.jsonl'}")
        return 1
    table = Table("estimator", "kind", "nats/token", "se (MC)", "se (data)", "bits/byte")
    for loss in result["losses"]:
        bits = result["bits_per_byte"].get(loss["estimator"])
        table.add_row(
            loss["estimator"],
            loss["kind"],
            f"{loss['value']:.4f}",
            f"{loss['se_mc']:.4f}",
            f"{loss['se_data']:.4f}",
            "" if bits is None else f"{bits:.4f}",
        )
    console.print(table)
    seconds = result["seconds"]
    console.print(
        f"{result['family']} N={result['params']['nonembedding']:,} D={result['tokens']:,} "
        f"C={result['flops']['matmul']:.3g} FLOPs (matmul), {result['tokens_per_second']:,.0f} "
        f"tokens/s, {seconds['total']:.1f} s of which {seconds['compile']:.1f} s compiling"
    )
    console.print(f"record: {out / 'result.json'}", soft_wrap=True)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from prime_jax.cli import doctor

    return doctor.run()
