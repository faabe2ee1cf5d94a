"""From words to the arguments of a command. tyro makes flags and help; an error is one line.

A command is a frozen dataclass of arguments and a function that takes it:

    @dataclass(frozen=True)
    class Inspect(Arguments):
        \"\"\"What a prepared dataset holds: sizes, statistics, the first block as text.\"\"\"

        EXAMPLES = ("prime-jax data inspect data/quickstart --verify",)
        dir: str = setting(REQUIRED, "made by `prime-jax data prepare`", positional=True)
        verify: bool = setting(False, "also read and hash every record")

    def inspect(args: Inspect) -> int | None: ...

Besides ranges a `setting` may say `positional=True`, `metavar="DIR"`, `alias="-o"`, `repeat=True`
(given again for each value), `bare=VALUE` (what the flag alone means), `flag="name"` (where that is
not the field's) and `flag=False` (not on the command line). A field whose type is another
dataclass brings that one's flags.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from prime_jax import settings
from prime_jax.errors import UserError
from prime_jax.settings import Flags

A = TypeVar("A")
Field = dataclasses.Field
ALIKE = 0.6  # of 1: less is not what was meant
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


class Arguments(Flags):
    """Base of a command's arguments; its docstring is the description."""

    EXAMPLES: ClassVar[Sequence[str]] = ()
    NOTES: ClassVar[str] = ""  # shown after the flags
    SETTINGS: ClassVar[type | None] = None  # a class whose dotted settings are taken as well

    @classmethod
    def called(cls, name: str) -> str:
        field = next(f for f in dataclasses.fields(cls) if f.name == name)
        return _metavar(cls, field) if _positional(field) else super().called(name)


def arguments_of(command: Callable[[Any], Any]) -> type[Arguments]:
    """The dataclass that a command takes."""
    return next(iter(inspect.signature(command).parameters.values())).annotation


def parse(cls: type[A], words: Sequence[str], prog: str) -> A:
    """The arguments of a command.

    Raises:
        UserError: an unknown option, a missing, surplus or wrong value, in one line.
    """
    import tyro

    words, dotted = _split(cls, list(words))
    words = _fill_bare(cls, words)
    if any(not word or word.endswith("=") for word in words) and (wrong := _explain(cls, words)):
        raise UserError(f"{wrong} ({prog} --help)")  # tyro would take "" for the folder it is in
    page = io.StringIO()
    try:
        with contextlib.redirect_stderr(page), contextlib.redirect_stdout(page):
            flat = tyro.cli(_for_tyro(cls), prog=prog, args=words)
    except SystemExit:
        wrong = _explain(cls, words) or _first_sentence(page.getvalue())
        raise UserError(f"{wrong} ({prog} --help)") from None
    for owner, field in _flat(cls):
        if settings.required(field) and getattr(flat, field.name) == ():
            raise UserError(f"{_missing(owner, field)} ({prog} --help)")
    made = _rebuild(cls, flat)
    return dataclasses.replace(made, overrides=dotted) if dotted else made


def help_page(cls: type[Arguments], prog: str) -> str:
    """What --help prints: usage, description, tyro's table of arguments, notes, examples."""
    import tyro

    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        tyro.cli(_for_tyro(cls), prog=prog, description="", args=["--help"])
    table = page.getvalue()
    table = table[re.search(r"^.*(positional arguments|options)", table, re.MULTILINE).start() :]  # type: ignore[union-attr]
    table = re.sub(r"[ \t]+$|^ ", "", table, flags=re.MULTILINE)
    about = [textwrap.fill(part, 100) for part in inspect.cleandoc(cls.__doc__ or "").split("\n\n")]
    parts = [_usage(cls, prog), *about, table, textwrap.dedent(cls.NOTES), _examples(cls.EXAMPLES)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _usage(cls: type, prog: str) -> str:
    fields = [field for _, field in _flat(cls)]
    needed = [
        f"{_flag(f)} {_metavar(o, f)}"
        for o, f in _flat(cls)
        if settings.required(f) and not _positional(f)
    ]
    places = [_metavar(o, f) for o, f in _flat(cls) if _positional(f)]
    more = ["[options]"] if len(fields) > len(needed) + len(places) else []
    more += ["[--SETTING VALUE ...]"] if getattr(cls, "SETTINGS", None) else []
    return " ".join(["usage:", prog, *places, *needed, *more])


def _examples(lines: Sequence[str]) -> str:
    return "\n".join(["examples:", *(f"  {line}" for line in lines)]) if lines else ""


# --- the declaration, as tyro wants it


def flags(cls: type) -> Iterator[tuple[str, type, Field]]:
    """Every flag of a command: `--name`, the class that declares it, and its field."""
    for owner, field in _flat(cls):
        if not _positional(field):
            yield _flag(field), owner, field


def _flat(cls: type) -> Iterator[tuple[type, Field]]:
    """The fields on the command line, those of nested dataclasses included; positionals first."""
    found = list(_walk(cls))
    yield from (pair for pair in found if _positional(pair[1]))
    yield from (pair for pair in found if not _positional(pair[1]))


def _walk(cls: type) -> Iterator[tuple[type, Field]]:
    """A command's own fields, then those of nested dataclasses."""
    nested = []
    for field in dataclasses.fields(cls):
        hint = settings.hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            nested.append(hint)
        elif field.metadata.get("flag") is not False:
            yield cls, field
    for inner in nested:
        yield from _walk(inner)


def _positional(field: Field) -> bool:
    return field.metadata.get("positional", False)


def _flag(field: Field) -> str:
    return f"--{field.metadata.get('flag', field.name).replace('_', '-')}"


def _metavar(cls: type, field: Field) -> str:
    hint = _bare(settings.hints(cls)[field.name])
    many = typing.get_origin(hint) is tuple
    one = typing.get_args(hint)[0] if many else hint
    name = field.metadata.get("metavar")
    if name is None and _positional(field):
        name = field.name.upper()
    if name is None:
        choices = typing.get_args(one) if typing.get_origin(one) is Literal else ()
        name = "|".join(map(str, choices)) if choices else METAVARS.get(one, "")
    if many and not field.metadata.get("repeat"):
        name = f"{name} [{name} ...]"
    return f"[{name}]" if _positional(field) and not settings.required(field) else name


def _bare(hint: Any) -> Any:
    """X of `X | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return inner[0] if len(inner) == 1 else hint
    return hint


def _for_tyro(cls: type) -> type:
    import tyro

    made = []
    for owner, field in _flat(cls):
        hint = settings.hints(owner)[field.name]
        alias = field.metadata.get("alias")
        notes: list[Any] = [
            tyro.conf.arg(
                name=None if _positional(field) else _flag(field)[2:],
                help=field.metadata["help"],
                metavar=_metavar(owner, field),
                aliases=(alias,) if alias else None,
                help_behavior_hint=_hint(field),
            ),
            tyro.conf.DisallowNone,
            tyro.conf.FlagCreatePairsOff,
        ]
        notes += [tyro.conf.Positional] if _positional(field) else []
        notes += [tyro.conf.UseAppendAction] if field.metadata.get("repeat") else []
        default = [] if settings.required(field) else [settings.default(field)]
        made.append((field.name, Annotated[hint, *notes], *default))
    return dataclasses.make_dataclass(cls.__name__, made, kw_only=True, frozen=True)


def _hint(field: Field) -> str:
    """(required), or the default and the range."""
    limits = settings.range_of(field)
    if settings.required(field):
        return f"(required; {limits})" if limits else "(required)"
    value = settings.default(field)
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
    parts = [] if value is None or value is False or not shown else [f"default: {shown}"]
    parts += [limits] if limits else []
    parts += ["may be repeated"] if field.metadata.get("repeat") else []
    return f"({'; '.join(parts)})" if parts else ""


def _rebuild(cls: type[A], flat: Any) -> A:
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = settings.hints(cls)[field.name]
        if field.metadata.get("flag") is False:
            continue
        nested = dataclasses.is_dataclass(hint)
        value = _rebuild(hint, flat) if nested else getattr(flat, field.name)
        if not issubclass(cls, Flags):  # whose errors would name the setting, not the flag
            _check_flag(cls, field, value)
        values[field.name] = value
    return cls(**values)


def _check_flag(cls: type, field: Field, value: Any) -> None:
    try:
        settings.check_value(cls, field, value)
    except UserError:
        right = settings.allowed(cls, field.name)
        raise UserError(f"{_flag(field)} {value}: must be {right}") from None


def _fill_bare(cls: type, words: list[str]) -> list[str]:
    """`--check` alone stands for `--check=largest`."""
    for name, owner, field in flags(cls):
        if "bare" in field.metadata:
            choices = typing.get_args(_bare(settings.hints(owner)[field.name]))
            for place, word in enumerate(words):
                if word == name and (words[place + 1 : place + 2] or [""])[0] not in choices:
                    words[place] = f"{name}={field.metadata['bare']}"
    return words


# --- dotted settings


def _split(cls: type, words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The words of a command, and those of settings of its SETTINGS class: `--model.width 256`."""
    config = getattr(cls, "SETTINGS", None)
    if config is None:
        return words, ()
    known = settings.flatten(settings.to_dict(config()))
    own = {name for name, _, _ in flags(cls)}
    mine, dotted, taking = [], [], 0.0
    for word in words:
        name = word.partition("=")[0]
        if word.startswith("--") and len(word) > 2:
            path = name[2:].replace("-", "_")
            foreign = name not in own and name != "--help" and ("." in path or path in known)
            many = isinstance(known.get(path), list)
            taking = (0 if "=" in word else float("inf") if many else 1) if foreign else 0
            (dotted if foreign else mine).append(word)
        elif taking > 0:
            dotted.append(word)
            taking -= 1
        else:
            mine.append(word)
    return mine, tuple(dotted)


def override(config: A, words: Sequence[str]) -> A:
    """`config` with the settings that words like `--model.width 256` give.

    Raises:
        UserError: an unknown setting, with the nearest; or a value that it does not take.
    """
    known = settings.flatten(settings.to_dict(config))
    for name, values in _groups(words):
        path = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--"):
            raise UserError(f"{name}: a setting is written --name value")
        if path not in known:
            raise UserError(f"{name}: no such setting{_meant(name, [*map(_dotted, known)])}")
        owner, field = settings.find(type(config), path)
        hint, right = settings.hints(owner)[field.name], settings.allowed(type(config), path)
        if not values and typing.get_origin(hint) is not tuple:
            raise UserError(f"{name} needs a value: {right}; now {known[path]!r}")
        try:
            value = settings.read(hint, values)
            settings.check_value(owner, field, value)
        except (ValueError, UserError):
            said = " ".join([name, *values])
            raise UserError(f"{said}: must be {right}; now {known[path]!r}") from None
        config = settings.set_path(config, path, value)
    return config


def _groups(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with its values."""
    group: list[str] = []
    for word in words:
        if _is_option(word) and group:
            yield group[0], group[1:]
            group = []
        name, equals, value = word.partition("=") if _is_option(word) else (word, "", "")
        group += [name, value] if equals else [word]
    if group:
        yield group[0], group[1:]


def _is_option(word: str) -> bool:
    return re.match(r"--?[^\W\d]", word) is not None and word.lower() not in ("-inf", "-nan")


# --- errors


def _explain(cls: type, words: list[str]) -> str:
    """What is wrong with the words, in one line; empty if nothing is found."""
    options = {name: (owner, field) for name, owner, field in flags(cls)}
    aliases = {f.metadata.get("alias"): name for name, (_, f) in options.items()}
    given, loose = set(), []
    plain = words.index("--") if "--" in words else len(words)
    groups = list(_groups(["", *words[:plain]]))
    for (name, values), (after, _) in zip(groups, [*groups[1:], ("", [])], strict=True):
        found = aliases.get(name, name.replace("_", "-"))
        if not name:
            loose += values
        elif found not in options:
            config = getattr(cls, "SETTINGS", None)
            dotted = settings.flatten(settings.to_dict(config())) if config else ()
            return f"no such option {name}{_meant(name, [*options, *map(_dotted, dotted)])}"
        else:
            given.add(found)
            owner, field = options[found]
            if settings.hints(owner)[field.name] is bool:
                if values and f"{name}={values[0]}" in words:
                    return f"{name} takes no value"
                loose += values
                continue
            wrong, rest = _judge(owner, field, name, values)
            if wrong and not values and after and after not in options and after not in aliases:
                return f"{wrong}; one that begins with a dash is written {name}={after}"
            if wrong:
                return wrong
            loose += rest
    loose += words[plain + 1 :]
    places = [(owner, field) for owner, field in _flat(cls) if _positional(field)]
    for owner, field in places:
        if settings.required(field) and not loose:
            return _missing(owner, field)
        if loose:
            wrong, loose = _judge(owner, field, _metavar(owner, field), loose)
            if wrong:
                return wrong
    for name, (owner, field) in options.items():
        if settings.required(field) and name not in given:
            return _missing(owner, field)
    return f"{loose[0]}: not expected here" if loose else ""


def _missing(owner: type, field: Field) -> str:
    name = "" if _positional(field) else f"{_flag(field)} "
    about = field.metadata["help"].partition(", see ")[0]  # "see below" is for the page of help
    return f"{name}{_metavar(owner, field)} is missing: {about}"


def _judge(owner: type, field: Field, name: str, values: list[str]) -> tuple[str, list[str]]:
    """What is wrong with the values of a field, if anything, and the words after them."""
    hint = settings.hints(owner)[field.name]
    many = typing.get_origin(hint) is tuple and not field.metadata.get("repeat")
    right = settings.allowed(owner, field.name)
    if not values and not many:
        return f"{name} needs a value: {right}", []
    mine, rest = (values, []) if many else (values[:1], values[1:])
    named = name.split()[0].strip("[]")  # of `[ID [ID ...]]`
    for value in mine:
        if not value and (settings.required(field) or settings.default(field) != ""):
            return f"{named} is empty: must be {right}", []
        try:
            settings.check_value(owner, field, settings.read(hint, [value]))
        except (ValueError, UserError):
            return f"{named} {value}: must be {right}", []
    return "", rest


def _meant(name: str, valid: Sequence[str]) -> str:
    """The option that begins like `name` or has it as a word, or else is spelt most like it."""
    typed = _plain(name)

    def likeness(option: str) -> tuple[float, int]:
        whole, last = _plain(option), _plain(option).rpartition(".")[2]
        if len(typed) > 1 and (whole.startswith(typed) or last.startswith(typed)):
            return 3, -len(whole)
        if typed in last.split("-"):
            return 2, -len(whole)
        alike = [difflib.SequenceMatcher(None, typed, part).ratio() for part in (whole, last)]
        return max(alike), -len(whole)

    best = max(valid, key=likeness, default="")
    return f"; did you mean {best}?" if best and likeness(best)[0] >= ALIKE else ""


def _dotted(path: str) -> str:
    return f"--{path.replace('_', '-')}"


def _plain(option: str) -> str:
    return option.lstrip("-").replace("_", "-").lower()


def _first_sentence(page: str) -> str:
    """Of tyro's page, which has rules of dashes: the first line with words after its heading."""
    lines = [re.sub(r"[│╭╮╰╯─|]", "", line).strip() for line in page.splitlines()]
    return next((line for line in lines[1:] if re.search(r"[^\W\d]", line)), "not understood")
