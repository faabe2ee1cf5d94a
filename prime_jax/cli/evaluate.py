"""`prime-jax eval`: likelihood on text, zero-shot sets, scored samples, tasks."""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from prime_jax.cli.console import Progress, console, error, say, show, write
from prime_jax.cli.parse import Arguments
from prime_jax.cli.runs import RUN
from prime_jax.errors import UserError
from prime_jax.settings import REQUIRED, setting
from prime_jax.table import Table

Tick = Callable[[str, int, float], None]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Eval(Arguments):
    """Compute the likelihood of text under RUN. Every number is marked as valid (a likelihood or a
    bound on one) or not. Results are added to RUN/eval.json. After an interruption the same command
    continues.

    With --samples: generative perplexity. With --tasks: lm-eval tasks (needs prime_jax[eval])."""

    EXAMPLES = (
        "prime-jax eval RUN",
        "prime-jax eval RUN --data 'text:books/*.txt' --estimators subtoken,chain:l2r",
        "prime-jax eval RUN --data zero-shot:sets/",
        "prime-jax eval RUN --samples out.jsonl --scorer OTHER",
        "prime-jax eval RUN --tasks sciq,arc_easy --task-data tasks/",
    )

    run: str = setting(REQUIRED, RUN, positional=True)
    data: tuple[str, ...] = setting(
        (),
        "what to score: a prepared dataset, text:GLOB (each file one text), jsonl:GLOB, a zero-shot set "
        "as NAME:PATH (lambada, wikitext2, ptb, lm1b, ag_news, pubmed, arxiv), or zero-shot:DIR for "
        "all sets in DIR (default: the run's own data)",
        repeat=True,
        metavar="WHAT",
    )
    estimators: str = setting(
        "",
        "estimators, with commas: subtoken, token, finite:T; chain:ORDER with ORDER l2r, confidence, "
        "margin, entropy, random or subtokens; exact:subtoken and exact:token for blocks of at most 12 "
        "units, bracket:K for larger ones (K orders in each half); subtoken:independent and "
        "token:independent, masks without fixed counts. docs/evaluation.md explains them (default: "
        "those of the run's config; ar for an autoregressive run)",
        metavar="LIST",
    )
    replicates: int = setting(
        8, "Monte-Carlo passes; the standard error se (MC) comes from them", at_least=2, metavar="R"
    )
    stride: int = setting(
        0, "tokens scored per window; 0: the length of the model less the context", at_least=0
    )
    context: int = setting(0, "visible tokens before them, which are not scored", at_least=0)
    split: Literal["train", "valid", "test"] = setting("valid", "split of a prepared dataset")
    examples: int | None = setting(
        None,
        "blocks of a prepared dataset, 0 for all (default: that of the run's config)",
        at_least=0,
    )
    batch_size: int = setting(
        0, "windows per call, 0: that of the run; does not change results", at_least=0
    )
    devices: int = setting(0, "number of devices to use; 0: all", at_least=0)
    out: Path | None = setting(
        None, "result file (default: RUN/eval.json); -: standard output", metavar="FILE"
    )
    samples: Path | None = setting(
        None, "score these samples of RUN (JSON lines): generative perplexity", metavar="FILE"
    )
    scorer: str | None = setting(
        None, "run that scores the samples (default: RUN)", metavar="OTHER"
    )
    tasks: str = setting("", "lm-eval tasks, with commas", metavar="LIST")
    task_data: Path | None = setting(
        None, "folder of local TASK.jsonl files; no network is used", metavar="DIR"
    )
    include_path: Path | None = setting(
        None, "folder of further task definitions (YAML)", metavar="DIR"
    )
    model_args: str = setting(
        "",
        "changes to the preset of all tasks: mc_num, cfg, steps, gen_length, block_length, nll_type",
        metavar="K=V,...",
    )
    limit: int | None = setting(None, "only the first N documents of each task", at_least=1)
    sensitivity: bool = setting(False, "repeat the tasks with each setting changed in turn")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer and not self.samples:
            raise UserError("--scorer needs --samples FILE")
        of_tasks = (self.sensitivity, self.task_data, self.include_path, self.model_args)
        if any(of_tasks) and not self.tasks:
            raise UserError(
                "--sensitivity, --task-data, --include-path, --model-args need --tasks LIST"
            )


def evaluate(args: Eval) -> int:
    from prime_jax.evaluate import report
    from prime_jax.runtime import outputs

    if not args.out or not outputs.is_stdout(args.out):
        return _evaluate(args, console())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / report.FILE
        code = _evaluate(dataclasses.replace(args, out=file), console(stderr=True))
        if file.exists():
            write(file.read_text())
    return code


def _evaluate(args: Eval, screen: Console) -> int:
    from prime_jax.cli import runs
    from prime_jax.evaluate import report
    from prime_jax.runtime import distributed, outputs

    if args.tasks:
        from prime_jax.evaluate import tasks

        tasks.check(args.tasks, args.include_path, args.task_data)  # before anything is loaded
    if args.out:
        outputs.refuse_overwrite(_inputs(args), [args.out])
        outputs.check_file(args.out)
    found = runs.load(args.run, lambda line: say(line, screen))
    out = args.out or found.path / report.FILE
    if distributed.is_writer():
        report.stored(found, out)  # refused before the work
    records: list[dict[str, Any]] = []
    with distributed.PreemptionGuard() as guard, Progress(screen) as progress:

        def tick(what: str, total: int, more: float) -> None:
            progress.tick(what, total, more)
            if guard.should_stop():
                raise KeyboardInterrupt

        try:
            if args.samples:
                _samples(
                    args=args, found=found, out=out, tick=tick, log=progress.log, records=records
                )
            if args.tasks:
                show(tasks_table(_tasks(args, found, out, tick)), screen)
            if not (args.samples or args.tasks) or args.data:
                _texts(
                    args=args, found=found, out=out, tick=tick, log=progress.log, records=records
                )
        except KeyboardInterrupt:
            progress.log("stopped; what is done is kept, and the same command continues")
            return 85
    for record in records:
        show(_losses_table(record), screen)
    if not screen.stderr:  # else the record is printed
        say(f"record: {out}", screen)
    return 0


def _inputs(args: Eval) -> list[Any]:
    """The files and folders that this evaluation reads."""
    import glob

    from prime_jax.cli import runs
    from prime_jax.data import manifest
    from prime_jax.evaluate import trained
    from prime_jax.evaluate.texts import SUFFIXES
    from prime_jax.runtime import outputs

    read = [runs.attempts(run) for run in (args.run, args.scorer) if run]
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


def _scorer(args: Eval, found: Any) -> Any:
    from prime_jax.evaluate.score import Scorer

    return Scorer(found, devices=args.devices, batch_size=args.batch_size)


def _texts(args: Eval, found: Any, out: Path, tick: Tick, log: Log, records: list) -> None:
    from prime_jax.evaluate import report, texts
    from prime_jax.runtime import distributed

    examples = found.config.eval.examples if args.examples is None else args.examples
    if args.examples is None and (args.stride or args.context):
        if examples and not args.data:
            log(f"--stride, --context: the whole {args.split} split, not {examples} blocks of it")
        examples = 0
    cutting = texts.Cutting(args.stride, args.context, examples, args.split)
    names = report.names_of(found, args.estimators)
    wanted = args.data or [found.dataset.directory]
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
            log=log,
        )
        records.append(report.as_record(each, losses))
        if distributed.is_writer():
            same = ("data", "rules", "hash", "stride", "context")
            report.store(found, out, "sets", records[-1], same)


def _samples(args: Eval, found: Any, out: Path, tick: Tick, log: Log, records: list) -> None:
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
        log=log,
    )
    records.append(record)
    if distributed.is_writer():
        report.store(found, out, "samples", record, ("data", "hash", "scorer"))


def _tasks(args: Eval, found: Any, out: Path, tick: Tick) -> list[dict[str, Any]]:
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
            report.store(
                found, out, "tasks", results[-1], ("tasks", "settings", "limit", "data_hash")
            )
    return results


def _losses_table(record: dict[str, Any]) -> Table:
    """Of one set of texts."""
    rows = []
    for loss in record["losses"]:
        bits = loss.get("bits_per_byte")
        rows.append(
            (
                loss["estimator"],
                loss["kind"],
                "yes" if loss["valid"] else "no",
                f"{loss['value']:.4f}",
                *(error(loss[name]) for name in ("se_mc", "se_data")),
                f"{loss['perplexity']:.2f}" if loss["valid"] else "",
                "" if bits is None else f"{bits:.4f}",
                f"{loss['n_tokens']:,}",
            )
        )
    head = ("estimator", "kind", "valid", "nats/token", "se (MC)", "se (data)")
    notes = [f"{x['estimator']}: {x['note']}" for x in record["losses"] if x.get("note")]
    return Table((*head, "perplexity", "bits/byte", "tokens"), rows, notes, title=record["data"])


def tasks_table(records: list[dict[str, Any]]) -> Table:
    """One row per call, one column per task and measure; accuracies in percent."""
    from prime_jax.evaluate import tasks

    default = records[0]["settings"]
    columns = [
        (task, measure)
        for task, values in records[0]["results"].items()
        for measure in tasks.MEASURES
        if measure in values
    ]
    rows = []
    for record in records:
        changed = {k: v for k, v in record["settings"].items() if v != default[k]}
        name = ", ".join(f"{k}={v}" for k, v in changed.items())
        row = [name or ("preset" if len(records) > 1 else record["estimator"])]
        for task, measure in columns:
            value, se = record["results"][task][measure]
            scale = 1 if measure in ("bits_per_byte", "perplexity") else 100
            row.append(
                f"{scale * value:.2f} ± " + ("unknown" if se is None else f"{scale * se:.2f}")
            )
        mean = tasks.mean_accuracy(record["results"])
        rows.append([*row, "" if mean is None else f"{100 * mean:.2f}"])
    counts = ", ".join(f"{task} {n:,}" for task, n in records[0]["documents"].items())
    notes = [f"documents: {counts}"] if counts else []
    if cut := max(record["contexts_cut"] for record in records):
        notes.append(
            f"{cut:,} requests did not fit into the model's length: the beginnings of their contexts "
            "were cut"
        )
    head = ("settings", *(f"{task} {m}" for task, m in columns), "mean acc")
    return Table(head, rows, notes)
