"""The `prime-jax` command. Only the standard library is imported until a command runs."""

import difflib
import importlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prime_jax import __version__
from prime_jax.cli import boundary
from prime_jax.errors import UserError

PROG = "prime-jax"
HELP = ("-h", "--help")
ABOUT = "Scale masked diffusion language models over sub-tokens, with valid numbers."
# Name -> the function that runs it, in the order of work, and its line in the list.
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("init:init", "write a small starter, and list the presets"),
    "doctor": ("doctor:doctor", "what this machine has, what is missing and how to get it"),
    "data prepare": ("data:prepare", "tokenise a source into blocks, in parallel, resumable"),
    "data inspect": ("data:inspect", "what a prepared dataset holds"),
    "data entropy": ("data:entropy", "how evenly sub-tokens are used, for each length"),
    "data codes": ("data:codes", "give tokens codes, e.g. similar words the same leading digits"),
    "train": ("train:train", "train and evaluate one run"),
    "sweep plan": (
        "sweep:plan",
        "list the runs of an experiment; with ROOT, create or extend a sweep",
    ),
    "sweep run": ("sweep:run", "train the open runs on this machine"),
    "sweep work": ("sweep:work", "run one worker; engines start this command"),
    "sweep status": ("sweep:status", "state of every run, and why some failed"),
    "sweep logs": ("sweep:logs", "logs of all attempts at a run, host by host"),
    "sweep retry": ("sweep:retry", "open failed, killed or stuck runs again"),
    "sweep kill": ("sweep:kill", "stop runs permanently"),
    "sweep collect": ("sweep:collect", "write runs.csv, one row per run"),
    "sweep report": ("fit:report", "fit and report, also while runs are still training"),
    "sweep up": ("launch:up", "start workers on other machines"),
    "sweep down": ("launch:down", "remove what `up` made for this sweep, and nothing else"),
    "sweep render": ("launch:render", "print the files that would be submitted"),
    "fit": (
        "fit:fit",
        "fit scaling laws to a sweep or a CSV: table, fit.json, figures, report.html",
    ),
    "scaling compare": (
        "compare:compare",
        "compare families with a baseline: compute multiplier, tests",
    ),
    "scaling predict": ("design:predict", "N*, D* and the loss at a budget, with intervals"),
    "scaling validate": ("compare:validate", "predict the larger budgets from the smaller ones"),
    "scaling frontier": ("compare:frontier", "the lowest loss as a law of compute alone"),
    "scaling rates": ("compare:rates", "the best learning rate as a law, also a rule for sweeps"),
    "scaling downstream": ("compare:downstream", "accuracy of tasks against compute"),
    "scaling design": ("design:design", "which runs to train next, as rows for `sweep plan`"),
    "eval": (
        "evaluate:evaluate",
        "likelihood of text with standard errors; samples; lm-eval tasks",
    ),
    "sample": ("sample:sample", "generate text with a trained model"),
    "infill": ("sample:infill", "fill holes in a text"),
    "analyse spectra": ("analyse:spectra", "singular values of weights, ranks, tail exponents"),
    "analyse attention": (
        "analyse:attention",
        "attention maps, sinks, band, entropy, by hidden fraction",
    ),
    "analyse noise": ("analyse:noise", "contribution of each noise level to the bound"),
    "analyse bits": ("analyse:bits", "cost and error of each sub-token of a token"),
    "export": ("interchange:export", "write a finished run as safetensors, settings and tokenizer"),
    "import": (
        "interchange:import_",
        "read published or exported weights into a folder that is a RUN",
    ),
    "kernels tune": ("kernels:tune", "time every kernel implementation here, and store the choice"),
    "kernels check": ("kernels:check", "compile the TPU kernels without a TPU"),
}
GROUPS = {
    "data": "prepare and inspect datasets",
    "sweep": "plan and run many trainings, collect their results",
    "scaling": "compare families, validate, predict, fit other laws, design the next runs",
    "analyse": "look inside finished runs",
    "kernels": "time the kernels here, or compile those for TPUs without a TPU",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (`boundary`)."""
    code = boundary.guarded(lambda: _run(list(sys.argv[1:] if argv is None else argv)))
    if argv is None:  # this is the whole process
        if code in (boundary.INTERRUPTED, boundary.SAVED):
            boundary.leave(code)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
    return code


def _run(words: list[str]) -> int | None:
    for place, word in enumerate(words, 1):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"argument {place} is not UTF-8: {word!r}") from None
    if not words or words[0] in HELP:
        print(_overview(ABOUT, COMMANDS), end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"{PROG} {__version__}")
        return 0
    if words[0] in GROUPS and (len(words) == 1 or words[1] in HELP):
        inside = {name: c for name, c in COMMANDS.items() if name.split()[0] == words[0]}
        print(_overview(f"{GROUPS[words[0]].capitalize()}.", inside), end="")
        return 0 if len(words) > 1 else 2
    name = _name(words)
    rest = words[len(name.split()) :]
    plain = rest[: rest.index("--")] if "--" in rest else rest
    if any(word in HELP for word in plain):
        from prime_jax.cli import parse

        print(parse.help_page(parse.arguments_of(function(name)), f"{PROG} {name}"), end="")
        return 0
    command, args = parsed(words)
    return command(args)


def function(name: str) -> Callable[[Any], int | None]:
    """What runs a command of COMMANDS."""
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(f"prime_jax.cli.{module}"), function)


def parsed(words: Sequence[str]) -> tuple[Callable[[Any], int | None], Any]:
    """The command of a line of words and its arguments.

    Raises:
        UserError: what is wrong with the first wrong word.
    """
    name = _name(words)
    from prime_jax.cli import parse

    command = function(name)
    rest = words[len(name.split()) :]
    return command, parse.parse(parse.arguments_of(command), rest, f"{PROG} {name}")


def _name(words: Sequence[str]) -> str:
    """The command that the first words name.

    Raises:
        UserError: there is none; says the nearest.
    """
    if words[0] in COMMANDS:
        return words[0]
    group = words[0] in GROUPS
    if group and f"{words[0]} {words[1]}" in COMMANDS:
        return f"{words[0]} {words[1]}"
    given = f"{words[0]} {words[1]}" if group else words[0]
    valid = [name for name in COMMANDS if not group or name.split()[0] == words[0]]
    close = difflib.get_close_matches(given, [*valid, *(() if group else GROUPS)], n=1, cutoff=0.5)
    hint = f"did you mean {PROG} {close[0]}?" if close else f"{PROG} --help lists them"
    raise UserError(f"no such command {given}; {hint}")


def _overview(about: str, commands: Mapping[str, tuple[str, str]]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {line}" for name, (_, line) in commands.items()]
    head = [f"usage: {PROG} COMMAND [arguments]", "", about, "", "commands:"]
    tail = ["", f"{PROG} COMMAND --help says more. Start with: {PROG} init DIR", ""]
    return "\n".join([*head, *lines, *tail])
