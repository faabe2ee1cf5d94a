"""`prime-jax eval`: likelihood on text, zero-shot sets, scored samples, tasks."""

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prime_jax.cli.runs import RUN
from prime_jax.errors import UserError


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="what a finished run is worth: likelihood with standard errors, tasks",
        description="Likelihood of text under RUN (a run directory, ROOT:ID of a sweep or an "
        "exported folder), by every estimator that applies, each marked as valid (a likelihood or "
        "a bound on one) or not. Results are added to RUN/eval.json. An interrupted evaluation "
        "continues when the same command is given again.",
        epilog="Examples: prime-jax eval RUN ; prime-jax eval RUN --data text:books/*.txt "
        "--estimators subtoken,chain:l2r ; prime-jax eval RUN --data zero-shot:sets/ ; prime-jax "
        "eval RUN --samples out.jsonl --scorer OTHER ; prime-jax eval RUN --tasks sciq,arc_easy "
        "--task-data tasks/",
    )
    parser.add_argument("run_name", metavar="RUN", help=RUN)
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="WHAT",
        help="prepared dataset, text:GLOB (each file one text), jsonl:GLOB, a zero-shot set as "
        "NAME:PATH (lambada, wikitext2, ptb, lm1b, ag_news, pubmed, arxiv) or zero-shot:DIR for "
        "all of them; may be given again (default: the run's own data)",
    )
    parser.add_argument(
        "--estimators",
        default="",
        metavar="LIST",
        help="subtoken, token, finite:T, chain:ORDER with ORDER l2r, confidence, margin, "
        "entropy, random or subtokens; subtoken:independent and token:independent mask without "
        "fixed counts (default: those of the run's config; ar for an autoregressive run)",
    )
    parser.add_argument(
        "--replicates", type=int, default=8, metavar="R", help="Monte-Carlo passes (default 8)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        metavar="N",
        help="tokens scored per window (default: the model's length less the context)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=0,
        metavar="N",
        help="tokens before them that are given, visible and free (default 0)",
    )
    parser.add_argument(
        "--split", default="valid", help="of a prepared dataset: train, valid (default) or test"
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=None,
        metavar="N",
        help="blocks of a prepared dataset, 0 for all (default: as the run's config says)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=0, help="windows per call; changes no number"
    )
    parser.add_argument("--devices", type=int, default=0, help="how many to use (default all)")
    parser.add_argument("--out", type=Path, help="write here instead of RUN/eval.json")
    _samples_and_tasks(parser)
    parser.set_defaults(run=run)


def _samples_and_tasks(parser: Any) -> None:
    samples = parser.add_argument_group("generative perplexity")
    samples.add_argument("--samples", type=Path, metavar="FILE", help="samples of RUN, JSON lines")
    samples.add_argument("--scorer", metavar="OTHER", help="the run that scores them (default RUN)")
    tasks = parser.add_argument_group("tasks (needs prime_jax[eval])")
    tasks.add_argument("--tasks", default="", metavar="LIST", help="names of lm-eval tasks")
    tasks.add_argument(
        "--task-data", type=Path, metavar="DIR", help="local TASK.jsonl files; no network is used"
    )
    tasks.add_argument(
        "--include-path", type=Path, metavar="DIR", help="more task definitions (YAML)"
    )
    tasks.add_argument(
        "--model-args",
        default="",
        metavar="K=V,...",
        help="mc_num, cfg, steps, gen_length, block_length, nll_type; one preset serves all tasks",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task")
    tasks.add_argument(
        "--sensitivity", action="store_true", help="repeat the tasks with each setting changed"
    )


def run(args: argparse.Namespace) -> int:
    _check(args)
    from rich.console import Console

    from prime_jax.cli import runs
    from prime_jax.evaluate import report
    from prime_jax.runtime import distributed, outputs

    console = Console()
    log = lambda line: console.print(line, highlight=False, markup=False)  # noqa: E731
    if args.tasks:
        from prime_jax.evaluate import tasks

        tasks.check(args.tasks, args.include_path, args.task_data)  # before anything is loaded
    if args.out:
        outputs.refuse_overwrite(_inputs(args), [args.out])
    found = runs.load(args.run_name, log)
    out = args.out or found.path / report.FILE
    records: list[dict[str, Any]] = []
    with distributed.PreemptionGuard() as guard, progress(console, guard) as tick:
        try:
            if args.samples:
                _samples(args, found, out, tick, records)
            if args.tasks:
                _tasks(args, found, out, tick, console)
            if not (args.samples or args.tasks) or args.data:
                _texts(args, found, out, tick, records)
        except KeyboardInterrupt:
            log("stopped; what is done is kept, and the same command continues")
            return 85
    wide = Console(width=max(report.WIDTH, console.width))
    for record in records:
        wide.print(report.table(record))
    log(f"record: {out}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.replicates < 2:
        raise UserError(
            f"--replicates {args.replicates}: must be at least 2; the standard error is their spread"
        )
    if args.scorer and not args.samples:
        raise UserError("--scorer needs --samples FILE")
    if (args.sensitivity or args.task_data or args.include_path or args.model_args) and not (
        args.tasks
    ):
        raise UserError(
            "--sensitivity, --task-data, --include-path, --model-args need --tasks LIST"
        )
    for name in ("stride", "context", "batch_size", "devices"):
        if getattr(args, name) < 0:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative"
            )


def _inputs(args: argparse.Namespace) -> list[Any]:
    """The files and folders that this evaluation reads."""
    import glob

    from prime_jax.cli import runs
    from prime_jax.data import manifest
    from prime_jax.evaluate import trained
    from prime_jax.evaluate.texts import SUFFIXES
    from prime_jax.runtime import outputs

    read = [runs.attempts(run) for run in (args.run_name, args.scorer) if run]
    found = [part for directories in read for part in outputs.of_run(directories)]
    data = [trained.read_config(*directories).data.path for directories in read]
    found += [Path(path) for path in data if path]
    found += [args.samples] if args.samples else []
    named = [p for spec in args.data for p in (spec, spec.partition(":")[2]) if p]
    named += [str(part) for part in (args.task_data, args.include_path) if part]
    named = [name for name in named if "://" not in name]
    for path in (Path(p) for name in named for p in [name, *glob.glob(name)]):
        if path.is_dir() and not (path / manifest.FILE).exists():
            kinds = {*SUFFIXES, ".yaml", ".yml"}  # records of evaluations may lie among texts
            found += [file for file in path.rglob("*") if file.suffix in kinds]
        else:
            found.append(path)
    return found


@contextmanager
def progress(console: Any, guard: Any) -> Iterator[Any]:
    """tick(what, total, newly done): a bar on a terminal; raises KeyboardInterrupt when told to stop."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    started: dict[str, Any] = {}

    def tick(what: str, total: int, done: int) -> None:
        if what not in started:
            started[what] = bar.add_task(what, total=total)
        bar.update(started[what], advance=done)
        if guard.should_stop():
            raise KeyboardInterrupt

    with bar:
        yield tick


def _scorer(args: argparse.Namespace, found: Any) -> Any:
    from prime_jax.evaluate.score import Scorer

    return Scorer(found, devices=args.devices, batch_size=args.batch_size)


def _texts(args, found, out: Path, tick, records: list) -> None:
    from prime_jax.evaluate import report, texts
    from prime_jax.runtime import distributed

    examples = found.config.eval.examples if args.examples is None else args.examples
    if args.examples is None and (args.stride or args.context):
        examples = 0
    cutting = texts.Cutting(args.stride, args.context, examples, args.split)
    names = report.names_of(found, args.estimators)
    wanted = args.data or [found.config.data.path]
    sets = [each for spec in wanted for each in texts.load(spec, found, cutting)]
    scorer = _scorer(args, found)
    for each in sets:
        named = lambda name, total, done, of=each.name: tick(f"{of} {name}", total, done)  # noqa: E731
        losses = report.evaluate(
            scorer,
            texts=each,
            names=names,
            replicates=args.replicates,
            work=out.parent / report.WORK,
            tick=named,
        )
        records.append(report.as_record(each, losses))
        if distributed.is_writer():
            same = ("data", "rules", "hash", "stride", "context")
            report.store(found, out, "sets", records[-1], same)


def _samples(args, found, out: Path, tick, records: list) -> None:
    from prime_jax.cli import runs
    from prime_jax.evaluate import report, samples
    from prime_jax.runtime import distributed

    by = runs.load(args.scorer) if args.scorer else found
    names = report.names_of(by, args.estimators)
    record = samples.score(
        args.samples,
        of=found,
        scorer=_scorer(args, by),
        names=names,
        replicates=args.replicates,
        tick=tick,
    )
    records.append(record)
    if distributed.is_writer():
        report.store(found, out, "samples", record, ("data", "hash", "scorer"))


def _tasks(args, found, out: Path, tick, console: Any) -> None:
    from rich.console import Console

    from prime_jax.evaluate import report, tasks
    from prime_jax.runtime import distributed

    call = tasks.Call(args.tasks, args.task_data, args.include_path, args.limit)
    settings = dataclasses.replace(
        tasks.settings(args.model_args, offline=args.task_data is not None),
        replicates=args.replicates,
        stride=args.stride,
        context=args.context,
    )
    scorer = _scorer(args, found)
    variants = [settings]
    if args.sensitivity:
        variants = tasks.variations(settings, found, tasks.output_types(call))
    results = []
    for number, variant in enumerate(variants, 1):
        part = f"{number}/{len(variants)} " if args.sensitivity else ""
        named = lambda what, *rest, part=part: tick(part + what, *rest)  # noqa: E731
        results.append(tasks.evaluate(scorer, call, variant, named))
        if distributed.is_writer():
            report.store(found, out, "tasks", results[-1], ("tasks", "settings", "limit"))
    Console(width=max(report.WIDTH, console.width)).print(tasks.table(results))
