"""`prime-jax sweep up|down|render`: workers on other machines."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from prime_jax.errors import UserError
from prime_jax.launch import k8s, slurm, tpu
from prime_jax.launch import sky as skypilot
from prime_jax.launch.engine import REPO, Dialogue, Sweep, sweep_at
from prime_jax.settings import nearest

ENGINES = {"slurm": slurm, "tpu": tpu, "k8s": k8s, "sky": skypilot}
PRICES = REPO / "docs" / "prices.toml"


def register(commands: Any, root: dict[str, Any]) -> None:
    """Add the three commands.

    Args:
        commands: the sub-commands of `sweep`.
        root: how they take ROOT, as add_argument wants it.
    """
    up = commands.add_parser(
        "up",
        help="start workers on other machines: --on slurm, --on tpu",
        description="Prints what it will make and what that costs per hour, and asks. Safe to "
        "repeat: what is there is not made twice. Workers leave when nothing is open.",
    )
    up.set_defaults(run=run_up)
    down = commands.add_parser(
        "down",
        help="remove what `up` made for this sweep, and nothing else",
        description="Lists jobs or machines that carry this sweep's name and removes them. Runs "
        "are saved where that is possible, and stay open.",
    )
    down.set_defaults(run=run_down)
    render = commands.add_parser(
        "render",
        help="print what would be sent: --on slurm, tpu, k8s, sky",
        description="Prints files, or writes them into DIR. Nothing is started.",
    )
    render.add_argument("-o", "--out", type=Path, metavar="DIR", help="write the files there")
    render.set_defaults(run=run_render)
    for parser in (up, down, render):
        parser.add_argument("root", metavar="ROOT", **root)
        parser.add_argument(
            "--on", required=True, metavar="ENGINE", help=f"{', '.join(ENGINES)} (required)"
        )
        if parser is not down:
            parser.add_argument(
                "--workers", type=int, default=1, metavar="N", help="at most so many per slice (1)"
            )
            parser.add_argument(
                "--slice",
                metavar="NAME",
                help="only the runs of this slice, and those planned for none (default: all slices)",
            )
        if parser is not render:
            parser.add_argument("--yes", action="store_true", help="do not ask")
        if parser is up:
            parser.add_argument(
                "--prices", type=Path, metavar="FILE", help="your price list (docs/prices.toml)"
            )
        _add_options(parser.add_argument_group("options of engines"))


def run_up(args: argparse.Namespace) -> int:
    engine, options, sweep = _understand(args)
    if not hasattr(engine, "up"):
        name = args.on
        raise UserError(
            f"--on {name} is only rendered: prime-jax sweep render ROOT --on {name} -o DIR; "
            f"{engine.APPLY} DIR/FILE"
        )
    return engine.up(sweep, options, _dialogue(args))


def run_down(args: argparse.Namespace) -> int:
    engine, options, sweep = _understand(args)
    if not hasattr(engine, "down"):
        raise UserError(f"--on {args.on} is only rendered; remove it with the tool that applied it")
    return engine.down(sweep, options, _dialogue(args))


def run_render(args: argparse.Namespace) -> None:
    engine, options, sweep = _understand(args)
    files = engine.render(sweep, options)
    if not files:
        raise UserError(f"{args.root}: every run has ended; nothing to render")
    if args.out is None:
        for name, text in files.items():
            print(f"# ---- {name}\n{text}" if len(files) > 1 else text, end="")
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (args.out / name).write_text(text)
            print(args.out / name)
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror}") from error


def _understand(args: argparse.Namespace) -> tuple[Any, Any, Sweep]:
    """The engine, its options and the sweep.

    Raises:
        UserError: an unknown engine or slice, or an option of another engine.
    """
    from prime_jax.hardware import slices

    if args.on == "local":
        raise UserError("--on local: prime-jax sweep run ROOT --workers N runs here")
    if args.on not in ENGINES:
        known = nearest(args.on, ENGINES) or f"; there are {', '.join(ENGINES)}"
        raise UserError(f"--on {args.on}: no such engine{known}")
    engine = ENGINES[args.on]
    own = {one.name for one in fields(engine.Options)}
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for other in ENGINES.values()
        for name in (one.name for one in fields(other.Options))
        if (value := getattr(args, name)) is not None
    }
    if foreign := sorted(set(given) - own):
        raise UserError(f"--{foreign[0].replace('_', '-')}: not an option of --on {args.on}")
    only = slices.parse(args.slice) if getattr(args, "slice", None) else None
    sweep = sweep_at(args.root, getattr(args, "workers", 1), only)
    return engine, engine.Options(**given), sweep


def _dialogue(args: argparse.Namespace) -> Dialogue:
    from rich.console import Console

    from prime_jax.hardware import roofline

    path = getattr(args, "prices", None) or (PRICES if PRICES.exists() else None)
    return Dialogue(Console(), args.yes, roofline.load_prices(path) if path else None)


def _add_options(group: Any) -> None:
    """Every option of every engine, once, with the engines that take it; None where not given."""
    takers: dict[str, list[str]] = {}
    for name, engine in ENGINES.items():
        for one in fields(engine.Options):
            takers.setdefault(one.name, []).append(name)
    for name, engines in takers.items():
        one = next(f for f in fields(ENGINES[engines[0]].Options) if f.name == name)
        more = {key: value for key, value in one.metadata.items() if key != "help"}
        if one.type is bool:
            more["action"] = "store_true"
        else:
            many = one.type == tuple[str, ...]
            more |= {"type": str, "action": "append"} if many else {"type": one.type}
            more.setdefault("metavar", name.upper())
        text = f"({', '.join(engines)}) {one.metadata['help']}"
        group.add_argument(f"--{name.replace('_', '-')}", default=None, help=text, **more)
