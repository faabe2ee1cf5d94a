"""`prime-jax sample` and `prime-jax infill`."""

import argparse
from pathlib import Path
from typing import Any

from prime_jax.cli.runs import RUN
from prime_jax.errors import UserError

ORDERS = """orders (masked diffusion):
  ancestral      the model's own reverse process in --steps steps (default); idle steps are free
  random         as many sub-tokens at every step, in random order
  first-hitting  one sub-token per network call: exact, slow
  left-to-right  in reading order
  confidence, margin, entropy
                 the most confident tokens first, as many at every step, or all beyond --threshold
"""
HOLES = """holes in TEXT:
  [[MASK]]            one hidden token; [[MASK*8]] eight
  [[KEEP:3 word]]     keep the first three sub-tokens of each token of `word`, draw the others again
  [[KEEP:++?+ word]]  the same with a sign for every sub-token: + kept, ? drawn again
"""


def register(subparsers: Any) -> None:
    sample = subparsers.add_parser(
        "sample",
        help="draw text from a trained model",
        description="Draw text from a finished run (a run directory or ROOT:ID).",
        epilog=ORDERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sample.add_argument("run_name", metavar="RUN", help=RUN)
    sample.add_argument("--prompt", metavar="TEXT", help="text to continue (default: none)")
    sample.add_argument("--gen-length", type=int, default=0, help="tokens; 0 fills the context")
    sample.add_argument("--stop-at-eos", action="store_true", help="end a text at its first EOS")
    _add_options(sample)
    sample.set_defaults(run=run_sample)

    infill = subparsers.add_parser(
        "infill",
        help="fill holes in a text",
        description="Fill the holes of TEXT with a finished run of family mdm or prime, e.g. "
        "prime-jax infill RUN 'def add(a, b):[[MASK*8]] + b'",
        epilog=HOLES + "\n" + ORDERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    infill.add_argument("run_name", metavar="RUN", help=RUN)
    infill.add_argument("text", metavar="TEXT", help="with holes, see below")
    _add_options(infill)
    infill.set_defaults(run=run_infill)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--num", type=int, default=1, help="samples (1)")
    add("-o", "--out", type=Path, metavar="FILE", help='write {"tokens": .., "text": ..} per line')
    add("--seed", type=int, default=0, help="with its number it determines a sample (0)")
    add("--steps", type=int, default=64, help="reveal steps, over all blocks (64)")
    add("--order", default="ancestral", help="what is revealed when, see below (ancestral)")
    add(
        "--grid",
        default="uniform",
        help="how much each step reveals: uniform, cosine, or measured: the grid of least loss, "
        "from the validation data (uniform)",
    )
    add(
        "--within",
        type=float,
        metavar="NATS",
        help="with --grid measured, in place of --steps: the fewest steps that lose at most so "
        "many nats per token against infinitely many",
    )
    add("--block-length", type=int, default=0, help="write blocks left to right; 0: one block")
    add("--threshold", type=float, help="confidence, margin or entropy that needs no more steps")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token (1)")
    add("--top-k", type=int, default=0, help="draw among so many likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="draw within this mass, nucleus sampling (1)")
    add("--cfg-scale", type=float, default=0.0, help="guidance away from the unprompted model (0)")
    add(
        "--remasking",
        type=float,
        default=0.0,
        metavar="RATE",
        help="hide revealed sub-tokens again, 0 to 1 of the largest rate that ReMDM allows (0)",
    )
    add("--batch-size", type=int, default=32, help="samples at a time; changes no sample (32)")
    add("--watch", action="store_true", help="show sub-tokens resolving on the terminal")


def run_sample(args: argparse.Namespace) -> int:
    if args.prompt == "":
        raise UserError("--prompt is empty; leave it out to sample without one")
    from prime_jax.cli import runs
    from prime_jax.sample import Sampler

    _spare(args)
    run = runs.load(args.run_name)
    prompt = [] if args.prompt is None else run.tokenizer.encode(args.prompt).tolist()
    sampler = Sampler(run)
    options = _options(args, run, sampler, gen_length=args.gen_length)
    return _draw(args, run, sampler, sampler.canvas(prompt, args.gen_length), options)


def run_infill(args: argparse.Namespace) -> int:
    from prime_jax.cli import runs
    from prime_jax.sample import Sampler, infill

    _spare(args)
    run = runs.load(args.run_name)
    sampler = Sampler(run)
    canvas = infill.canvas(args.text, run.tokenizer, run.codebook)
    return _draw(args, run, sampler, canvas, _options(args, run, sampler))


def _spare(args: argparse.Namespace) -> None:
    """Raises: UserError: the samples would replace a file of the run."""
    from prime_jax.cli import runs
    from prime_jax.runtime import outputs

    if args.out:
        outputs.refuse_overwrite(outputs.of_run(runs.attempts(args.run_name)), [args.out])


def _options(args: argparse.Namespace, run: Any, sampler: Any, **more: Any) -> Any:
    """The options of a command line, checked; measures a grid if that is asked for."""
    from prime_jax.sample.options import Options, validate

    names = ("steps", "order", "block_length", "threshold", "temperature", "top_k", "top_p")
    names += ("cfg_scale", "remasking", "seed", "batch_size")
    values = {name: getattr(args, name) for name in names} | more
    if getattr(args, "stop_at_eos", False):
        if run.eos_id < 0:
            raise UserError("--stop-at-eos: the data of this run has no EOS token")
        values["stop"] = run.eos_id
    if args.num < 1:
        raise UserError(f"--num {args.num}: must be 1 or more")
    if args.within is not None and (args.grid != "measured" or args.within < 0):
        raise UserError(f"--within {args.within}: needs --grid measured, and must be 0 or more")
    if args.watch and (args.num > 1 or run.config.family == "arm"):
        raise UserError("--watch shows one sample of a model of family mdm or prime")
    if args.grid != "measured":
        return validate(Options(**values, grid=args.grid), run.config.family)
    validate(Options(**values, grid="cosine"), run.config.family)
    return Options(**values, time_grid=_measured(args, run, sampler))


def _measured(args: argparse.Namespace, run: Any, sampler: Any) -> tuple[float, ...]:
    """Measure and tell the grid of least loss for --steps, or of fewest steps for --within."""
    from rich.console import Console

    from prime_jax.data import loader
    from prime_jax.sample import grids
    from prime_jax.sample.options import Options
    from prime_jax.sample.orders import time_grid

    if run.data is None:
        raise UserError(
            f"--grid measured needs the run's dataset, and {run.config.data.path} is not on this "
            "machine"
        )
    if args.block_length:
        raise UserError("--block-length: --grid measured is the grid of one block")
    if args.steps > grids.MAX_STEPS:
        raise UserError(f"--grid measured: --steps must be at most {grids.MAX_STEPS}")
    console = Console(stderr=True)
    with console.status("measuring the loss of steps"):
        blocks = loader.eval_blocks(run.data, "valid", 2 * grids.EXAMPLES).tokens
        # What is told comes from blocks that the search did not see: it favours lucky noise.
        rates, check = (
            grids.measure(sampler.model, run.params, run.config, half)
            for half in (blocks[::2], blocks[1::2])
        )
    steps = args.steps
    if args.within is not None:
        fewest = grids.fewest(rates, rates.bound + args.within)
        if fewest is None:
            raise UserError(
                f"--within {args.within}: {grids.POINTS} steps lose more than that; use --steps"
            )
        steps = fewest
    found = grids.best(rates, steps)
    rivals = {
        name: check.loss(time_grid(Options(grid=name), steps)) for name in ("uniform", "cosine")
    }
    told = ", ".join(f"{name} {loss:.4f}" for name, loss in rivals.items())
    console.print(
        f"{steps} steps: measured grid {check.loss(found):.4f} nats/token (nelbo), {told}, "
        f"infinitely many steps {check.bound:.4f}",
        highlight=False,
    )
    return tuple(found.tolist())


def _draw(args: argparse.Namespace, run: Any, sampler: Any, canvas: Any, options: Any) -> int:
    """Draw --num samples of one canvas, print or write them, and say what they are like."""
    import time

    from rich.console import Console

    console, done, began = Console(), [], time.monotonic()
    hidden = (canvas == run.codebook.base).any(axis=1)
    try:
        for samples in _batches(
            args, run=run, sampler=sampler, canvas=canvas, options=options, console=console
        ):
            done.append(samples)
    except KeyboardInterrupt:
        kept = f" are in {args.out}" if args.out else ""
        console.print(f"interrupted: {sum(len(s.tokens) for s in done)} samples{kept}")
        return 130
    tokens = [x for samples in done for x in samples.tokens]
    if args.out is None:
        for x in tokens:
            if len(tokens) > 1:
                console.rule(style="dim")
            text = run.tokenizer.decode(x)
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    drawn = [x[hidden[: len(x)]] for x in tokens]
    spent = f"{sum(sum(samples.calls) for samples in done)} network calls"
    idle = [fraction for samples in done for fraction in samples.idle]
    if any(idle) and not options.remasking:
        spent += f" ({sum(idle) / len(idle):.1%} of the steps were idle and skipped)"
    _tell(drawn, f"{spent}, {time.monotonic() - began:.1f} s with compiling")
    if args.out:
        console.print(f"samples: {args.out}", highlight=False)
    return 0


def _batches(args, run: Any, sampler: Any, canvas: Any, options: Any, console: Any) -> Any:
    """The samples, batch by batch; each is written before the next is drawn."""
    import contextlib
    import json

    from rich.console import Console
    from rich.progress import track

    from prime_jax.cli.watch import Watcher

    with contextlib.ExitStack() as stack:
        out = stack.enter_context(_open(args.out)) if args.out else None
        watch = None
        if args.watch:
            watch = stack.enter_context(Watcher(run.codebook, run.tokenizer, canvas, console))
        starts = range(0, args.num, options.batch_size)
        if len(starts) > 1 and console.is_terminal:
            starts = track(starts, description="sampling", console=Console(stderr=True))
        for start in starts:
            count = min(options.batch_size, args.num - start)
            samples = sampler.sample([canvas] * count, options, watch, first=start)
            for tokens in samples.tokens if out else []:
                line = {"tokens": tokens.tolist(), "text": run.tokenizer.decode(tokens)}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
            if out:
                out.flush()
            yield samples


def _open(path: Path) -> Any:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _tell(drawn: list, spent: str) -> None:
    """One line about the drawn tokens of all samples."""
    from rich.console import Console

    from prime_jax.sample.quality import REPEAT, quality

    measured = quality(drawn)
    ones = " / ".join(f"{x:.2f}" for x in measured.distinct)
    Console(stderr=True).print(
        f"{sum(len(x) for x in drawn)} tokens in {spent}; entropy {measured.entropy:.2f} "
        f"nats/token, repeated {REPEAT}-grams {measured.repetition:.1%}, distinct-1/2/3 {ones}",
        highlight=False,
        soft_wrap=True,
    )
