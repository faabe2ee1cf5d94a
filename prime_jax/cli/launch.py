"""`prime-jax sweep up|down|render`: workers on other machines."""

import dataclasses
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from prime_jax import settings, shipped
from prime_jax.cli.console import console, say, write
from prime_jax.cli.parse import Arguments
from prime_jax.errors import UserError
from prime_jax.launch import gce, k8s, slurm, tpu
from prime_jax.launch import sky as skypilot
from prime_jax.launch.engine import Dialogue, Sweep, sweep_at
from prime_jax.runtime import outputs, storage
from prime_jax.settings import REQUIRED, Flags, setting

ENGINES = {"slurm": slurm, "gce": gce, "tpu": tpu, "k8s": k8s, "sky": skypilot}
PRICES = shipped.place("docs/prices.toml")
ROOT = "the directory that holds the whole sweep: a folder, gs://BUCKET/... or s3://BUCKET/..."


def _of_engines() -> type:
    """Every option of every engine, once, with the engines that take it; None where not given."""
    takers: dict[str, dict[str, list[str]]] = {}  # option -> what it means -> engines
    first: dict[str, tuple[type, dataclasses.Field]] = {}
    for engine, module in ENGINES.items():
        for field in fields(module.Options):
            default = settings.default(field)
            means = field.metadata["help"] + (f" (default: {default})" if default else "")
            takers.setdefault(field.name, {}).setdefault(means, []).append(engine)
            first.setdefault(field.name, (module.Options, field))
    made = []
    for name, meanings in takers.items():
        options, field = first[name]
        hint, default = settings.hints(options)[name], settings.default(field)
        told = "; ".join(f"[{', '.join(who)}] {means}" for means, who in meanings.items())
        more = dict(field.metadata) | {"help": told}
        limits = more.pop("limits")
        empty = default if isinstance(default, (bool, tuple)) else None
        kind = hint if empty is not None else hint | None
        made.append((name, kind, setting(empty, more.pop("help"), **limits, **more)))
    return dataclasses.make_dataclass("EngineOptions", made, bases=(Flags,), frozen=True)


EngineOptions: Any = _of_engines()


@dataclass(frozen=True)
class _Elsewhere(Arguments):
    root: str = setting(REQUIRED, ROOT, positional=True)
    on: Literal[tuple(ENGINES)] = setting(
        REQUIRED,
        f"system that runs the workers: {', '.join(ENGINES)}",
        metavar="ENGINE",
        takes=f"one of {', '.join(ENGINES)}; here: prime-jax sweep run ROOT --workers N",
    )
    engine: EngineOptions = setting(EngineOptions(), "options of engines")


@dataclass(frozen=True)
class _Start(_Elsewhere):
    workers: int = setting(1, "largest number of workers per slice", at_least=1)
    slice: str = setting(
        "",
        "only runs of this slice, and runs planned for no slice (default: all slices)",
        metavar="NAME",
    )


@dataclass(frozen=True)
class Up(_Start):
    """Start workers on other machines. Prints what it will make and what that costs per hour, and
    asks. Safe to repeat: nothing is made twice. Workers end when no run is open."""

    EXAMPLES = (
        "prime-jax sweep up ROOT --on slurm --partition gpu --workers 8",
        "prime-jax sweep up gs://BUCKET/c4 --on gce --project P --zone us-east5-a --spot",
    )

    yes: bool = setting(False, "do not ask")
    prices: Path | None = setting(
        None, "your price list, in the format of docs/prices.toml", metavar="FILE"
    )


def up(args: Up) -> int:
    engine, options, sweep = _understand(args)
    if not hasattr(engine, "up"):
        raise UserError(
            f"--on {args.on} is only rendered: prime-jax sweep render ROOT --on {args.on} -o DIR; "
            f"{engine.APPLY} DIR/FILE"
        )
    return engine.up(sweep, options, _dialogue(args.yes, args.prices))


@dataclass(frozen=True)
class Down(_Elsewhere):
    """Remove what `up` made for this sweep, and nothing else. It lists the jobs or machines that carry
    the sweep's name, and asks. Runs are saved where possible, and stay open."""

    EXAMPLES = ("prime-jax sweep down ROOT --on slurm",)

    yes: bool = setting(False, "do not ask")


def down(args: Down) -> int:
    engine, options, sweep = _understand(args)
    if not hasattr(engine, "down"):
        raise UserError(f"--on {args.on} is only rendered; remove it with the tool that applied it")
    return engine.down(sweep, options, _dialogue(args.yes))


@dataclass(frozen=True)
class Render(_Start):
    """Print the files that would be submitted, or write them into DIR. Nothing is started."""

    EXAMPLES = ("prime-jax sweep render gs://BUCKET/c4 --on k8s --slice v5e-16 --image IMAGE",)

    out: Path | None = setting(
        None, "folder for the files (default: print them)", alias="-o", metavar="DIR"
    )
    force: bool = setting(
        False, "also replace files there that prime-jax did not make or that were changed since"
    )


def render(args: Render) -> None:
    engine, options, sweep = _understand(args)
    files = engine.render(sweep, options)
    if not files:
        raise UserError(f"{args.root}: every run has ended; nothing to render")
    for name, text in files.items():
        if args.out is None:
            write(f"# ---- {name}\n{text}" if len(files) > 1 else text)
            continue
        with outputs.folder(args.out, [name], force=args.force):
            (args.out / name).write_text(text)
        say(str(args.out / name))


def _understand(args: _Elsewhere) -> tuple[ModuleType, Any, Sweep]:
    """The engine, its options and the sweep.

    Raises:
        UserError: an unknown slice, or an option of another engine.
    """
    from prime_jax.hardware import slices

    engine = ENGINES[args.on]
    own = {field.name for field in fields(engine.Options)}
    all_of_them = {field.name: getattr(args.engine, field.name) for field in fields(args.engine)}
    given = {name: value for name, value in all_of_them.items() if value not in (None, False, ())}
    if foreign := sorted(set(given) - own):
        raise UserError(f"{Flags.called(foreign[0])}: not an option of --on {args.on}")
    name = getattr(args, "slice", "")
    only = slices.parse(name) if name else None
    sweep = sweep_at(storage.path(args.root), getattr(args, "workers", 1), only)
    return engine, engine.Options(**given), sweep


def _dialogue(yes: bool, prices: Path | None = None) -> Dialogue:
    from prime_jax.hardware.prices import load_prices

    path = prices or (PRICES if PRICES.exists() else None)
    return Dialogue(say, _ask, yes, load_prices(path) if path else None)


def _ask(question: str) -> bool:
    """Raises: UserError: stdin is not a terminal."""
    if not sys.stdin.isatty():
        raise UserError("stdin is not a terminal, so nobody can confirm; --yes skips the question")
    answer = console().input(f"{question} [y/N] ", markup=False)
    return answer.strip().lower() in ("y", "yes")
