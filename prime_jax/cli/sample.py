"""`prime-jax sample` and `prime-jax infill`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prime_jax.cli.console import Progress, console, say
from prime_jax.cli.parse import Arguments
from prime_jax.cli.runs import RUN
from prime_jax.errors import UserError
from prime_jax.runtime import outputs
from prime_jax.sample.options import Options, validate
from prime_jax.settings import REQUIRED, setting

ORDERS = """orders (masked diffusion):
  ancestral      the reverse process of the model in --steps steps (default); idle steps are free
  random         equally many sub-tokens at every step, in random order
  first-hitting  one sub-token per network call: exact, slow
  left-to-right  equally many sub-tokens at every step, in reading order
  confidence, margin, entropy
                 the most confident tokens first, equally many at every step, or all beyond
                 --threshold (at one token a step and temperature 1, the exact likelihood is
                 chain:ORDER)
  confidence-drawn
                 the same, ranked by the probability of the token that was drawn: the published
                 rule, which has no known likelihood
"""
HOLES = r"""holes in TEXT:
  [[MASK]]            one hidden token; [[MASK*8]] eight
  [[KEEP:3 word]]     keep the first three sub-tokens of each token of `word`, draw the others again
  [[KEEP:++?+ word]]  the same with a sign for every sub-token: + kept, ? drawn again
  \[[MASK]]           the text [[MASK]] itself
"""


@dataclass(frozen=True)
class Drawing(Arguments):
    """What both commands take."""

    run: str = setting(REQUIRED, RUN, positional=True)
    num: int = setting(1, "number of samples", at_least=1)
    out: Path | None = setting(
        None,
        'file for the samples, {"tokens": .., "text": .., "drawn": ..} per line; - is stdout',
        alias="-o",
        metavar="FILE",
    )
    grid: Literal["uniform", "cosine", "measured"] = setting(
        "uniform",
        "how much each step reveals; measured: the grid of least loss, estimated on validation data",
    )
    within: float | None = setting(
        None,
        "with --grid measured, in place of --steps: use the fewest steps whose loss is at most this "
        "many nats per token above that of infinitely many steps",
        at_least=0,
        metavar="NATS",
    )
    watch: bool = setting(False, "show on the terminal how sub-tokens are revealed")
    options: Options = setting(Options(), "how to sample")


@dataclass(frozen=True)
class Sample(Drawing):
    """Generate text with a finished run."""

    NOTES = ORDERS
    EXAMPLES = (
        "prime-jax sample runs/3f9a --prompt 'def add(a, b):' --num 4",
        "prime-jax sample quickstart:3f9a --order confidence --steps 32 --watch",
    )

    prompt: str | None = setting(None, "text to continue (default: none)")
    gen_length: int = setting(
        0, "number of tokens to generate; 0: up to the model's length", at_least=0
    )
    stop_at_eos: bool = setting(False, "end each text at its first end-of-text id")


def sample(args: Sample) -> int:
    from prime_jax.cli import runs
    from prime_jax.sample import Sampler

    _spare(args)
    run = runs.load(args.run)
    tokenizer = run.tokenizer  # told before anything is drawn, where it is not there
    prompt = [] if args.prompt is None else tokenizer.encode(args.prompt).tolist()
    sampler = Sampler(run)
    changes: dict[str, Any] = {"gen_length": args.gen_length}
    if args.stop_at_eos:
        if run.eos_id < 0:
            raise UserError("--stop-at-eos: the data of this run has no EOS token")
        changes["stop"] = run.eos_id
    options = _options(args, run, sampler, **changes)
    return _draw(args, run, sampler, sampler.canvas(prompt, args.gen_length), options)


@dataclass(frozen=True, kw_only=True)
class Infill(Drawing):
    """Fill the holes of a text with a finished run of family mdm or prime."""

    NOTES = f"{HOLES}\n{ORDERS}"
    EXAMPLES = ("prime-jax infill quickstart:3f9a 'def add(a, b):[[MASK*8]] + b'",)

    text: str = setting(REQUIRED, "text with holes, see below", positional=True)


def infill(args: Infill) -> int:
    from prime_jax.cli import runs
    from prime_jax.sample import Sampler, infill

    _spare(args)
    run = runs.load(args.run)
    sampler = Sampler(run)
    canvas = infill.canvas(args.text, run.tokenizer, run.codebook)
    return _draw(args, run, sampler, canvas, _options(args, run, sampler))


def _spare(args: Drawing) -> None:
    """Raises: UserError: the samples would replace a file of the run."""
    from prime_jax.cli import runs

    if args.out:
        outputs.refuse_overwrite(outputs.of_run(runs.attempts(args.run)), [args.out])
        outputs.check_file(args.out)


def _options(args: Drawing, run: Any, sampler: Any, **changes: Any) -> Options:
    """The options of a command line, checked; measures a grid if that is asked for."""
    if args.within is not None and args.grid != "measured":
        raise UserError(f"--within {args.within}: needs --grid measured")
    if args.watch and (args.num > 1 or run.config.family == "arm"):
        raise UserError("--watch shows one sample of a model of family mdm or prime")
    grid = "cosine" if args.grid == "measured" else args.grid
    options = dataclasses.replace(args.options, grid=grid, **changes)
    validate(options, run.config.family)
    if args.grid != "measured":
        return options
    return dataclasses.replace(options, grid="uniform", time_grid=_measured(args, run, sampler))


def _measured(args: Drawing, run: Any, sampler: Any) -> tuple[float, ...]:
    """Measure and tell the grid of least loss for --steps, or of fewest steps for --within."""
    from prime_jax.data import loader
    from prime_jax.sample import grids
    from prime_jax.sample.orders import time_grid

    if args.options.block_length:
        raise UserError("--block-length: --grid measured is the grid of one block")
    if args.options.steps > grids.MAX_STEPS:
        raise UserError(f"--grid measured: --steps must be at most {grids.MAX_STEPS}")
    out = console(stderr=True)
    with Progress(out, transient=True) as progress:
        progress.doing("measuring the loss of steps")
        blocks = loader.eval_blocks(run.dataset, "valid", 2 * grids.EXAMPLES).tokens
        # What is told comes from blocks that the search did not see: it favours lucky noise.
        rates, check = (
            grids.measure(sampler.model, run.params, run.config, half)
            for half in (blocks[::2], blocks[1::2])
        )
    steps = args.options.steps
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
    others = ", ".join(f"{name} {loss:.4f}" for name, loss in rivals.items())
    say(
        f"{steps} steps: measured grid {check.loss(found):.4f} nats/token (nelbo), {others}, "
        f"infinitely many steps {check.bound:.4f}",
        out,
    )
    return tuple(found.tolist())


def _draw(args: Drawing, run: Any, sampler: Any, canvas: Any, options: Any) -> int:
    """Draw --num samples of one canvas, print or write them, and say what they are like."""
    import time

    done: list[Any] = []
    out, began = console(), time.monotonic()
    hidden = (canvas == run.codebook.base).any(axis=1)
    _say_blocks(args, run, hidden)
    try:
        for samples in _batches(
            args, run=run, sampler=sampler, canvas=canvas, options=options, terminal=out
        ):
            done.append(samples)
    except KeyboardInterrupt:
        kept = f" are in {args.out}" if args.out else ""
        say(f"interrupted: {sum(len(s.tokens) for s in done)} samples{kept}")
        return 130
    tokens = [x for samples in done for x in samples.tokens]
    if args.out is None:
        for x in tokens:
            if len(tokens) > 1:
                out.rule(style="dim")
            say(run.tokenizer.decode(x), out)
    drawn = [x[hidden[: len(x)]] for x in tokens]
    spent = f"{sum(sum(samples.calls) for samples in done)} network calls"
    idle = [fraction for samples in done for fraction in samples.idle]
    if any(idle) and not options.remasking:
        spent += f" ({sum(idle) / len(idle):.1%} of the steps were idle and skipped)"
    _tell(drawn, f"{spent}, {time.monotonic() - began:.1f} s with compiling")
    if args.out and not outputs.is_stdout(args.out):
        say(f"samples: {args.out}")
    return 0


def _say_blocks(args: Drawing, run: Any, hidden: Any) -> None:
    """Where a run trained in blocks takes more steps than asked for."""
    import numpy as np

    length = run.config.objective.block_length
    blocks = len(np.unique(np.flatnonzero(hidden) // length)) if length else 0
    if args.options.threshold is None and args.options.steps < blocks:
        say(f"--steps {args.options.steps}: {blocks} blocks of {length} tokens take a step each")


def _batches(args, run: Any, sampler: Any, canvas: Any, options: Any, terminal: Any) -> Any:
    """The samples, batch by batch; each is written before the next is drawn."""
    import contextlib
    import json

    from prime_jax.cli.watch import watcher
    from prime_jax.sample.quality import spans

    hidden = (canvas == run.codebook.base).any(axis=1)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(outputs.stream(args.out)) if args.out else None
        watch = None
        if args.watch:
            watch = stack.enter_context(watcher(run.codebook, run.tokenizer, canvas, terminal))
        starts = range(0, args.num, options.batch_size)
        progress = None
        if len(starts) > 1:
            progress = stack.enter_context(Progress(console(stderr=True), transient=True))
        for start in starts:
            count = min(options.batch_size, args.num - start)
            samples = sampler.sample([canvas] * count, options, watch, first=start)
            for tokens in samples.tokens if out else []:
                line = {
                    "tokens": tokens.tolist(),
                    "text": run.tokenizer.decode(tokens),
                    "drawn": spans(hidden[: len(tokens)]),
                }
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
            if out:
                out.flush()
            if progress:
                progress.tick("sampling", args.num, count)
            yield samples


def _tell(drawn: list, spent: str) -> None:
    """One line about the drawn tokens of all samples."""
    from prime_jax.sample.quality import REPEAT, quality

    measured = quality(drawn)
    ones = " / ".join(f"{x:.2f}" for x in measured.distinct)
    say(
        f"{sum(len(x) for x in drawn)} tokens in {spent}; entropy {measured.entropy:.2f} "
        f"nats/token, repeated {REPEAT}-grams {measured.repetition:.1%}, distinct-1/2/3 {ones}",
        console(stderr=True),
    )
