"""Machines of Google Cloud, one per worker: what Cloud TPU and Compute Engine have in common.

Each pass lists what carries the sweep's name, deletes dead or idle machines (they hold quota),
waits for that, and creates missing ones under new names. It has no local state, so it may crash at
any point, run twice or from cron. Machines install themselves from ROOT, without a login.
"""

import contextlib
import re
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from prime_jax.errors import UserError
from prime_jax.launch import archive
from prime_jax.launch.engine import Dialogue, Pool, Sweep, needs, template
from prime_jax.runtime import storage
from prime_jax.settings import Flags, setting

PORT = 8476  # of the coordinator; JAX's newer default is closed by Cloud TPU's firewall rule
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
POLL, WAIT = 60.0, 600.0  # seconds between passes; for one operation of the cloud
NAMES = 5  # that are tried for a machine
BUSY = "resourceNotReady"  # Compute Engine's reason, with code 400
# The hosts are gone, or will never come; what is left may still hold quota.
DEAD = ("SUSPENDED", "FAILED", "PREEMPTED", "ENDED", "INCOMPLETE")
USELESS = ("IDLE", "BROKEN")
GOING = ("DELETING", "SUSPENDING")
UNITS = {"m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class CloudOptions(Flags):
    project: str = setting("", "Google Cloud project")
    zone: str = setting("", "its zone, e.g. europe-west4-b")
    spot: bool = setting(False, "use spot machines: cheaper, but can be preempted at any time")
    reservation: str = setting("", "use machines of this reservation", metavar="NAME")
    runtime_version: str = setting(
        "", "image of the machines (default: the usual one of the slice)"
    )
    network: str = setting("", "VPC network (default: the project's)")
    subnetwork: str = setting("", "its subnetwork")
    service_account: str = setting(
        "", "identity of the machines (default: the project's)", metavar="EMAIL"
    )
    data: str = setting(
        "", "bucket folder from which machines read prepared data", metavar="gs://BUCKET/DIR"
    )
    mount: bool = setting(False, "mount the data with gcsfuse instead of copying it")
    setup: tuple[str, ...] = setting(
        (), "shell line to run before the worker", metavar="LINE", repeat=True
    )
    again: bool = setting(False, "start machines although earlier ones failed")
    watch: bool = setting(False, "keep running: check every minute and replace preempted machines")


@dataclass(frozen=True)
class Machine:
    """All hosts of one worker.

    Attributes:
        state: that of the cloud, or as reported by the machine: IDLE when no run was left, BROKEN
            when it could not work.
        why: the cloud's message if it failed or waits.
    """

    name: str
    state: str
    why: str = ""

    @property
    def pool(self) -> str:
        return self.name.rpartition("-")[0]


class Cloud(Protocol):
    """One of Google's interfaces; its methods raise the exceptions of `google.api_core`.

    Attributes:
        title: for messages.
    """

    title: str

    def connect(self) -> None:
        """Make the client; only what follows `check` and `note` needs it."""

    def note(self, pools: Sequence[Pool]) -> str:
        """A line for the user before anything else; "" for none."""

    def check(self, pool: Pool, code: str) -> None:
        """Raises: UserError: options or a slice for which no machine can be made."""

    def machines(self, sweep: Sweep) -> list[Machine]:
        """What there is of a sweep."""

    def create(self, pool: Pool, name: str, code: str) -> None:
        """Request a machine. Raises: Conflict: the name is taken."""

    def delete(self, names: Sequence[str]) -> None:
        """Delete machines, and wait until they are gone; those that are absent are no error."""


def up(cloud: Cloud, sweep: Sweep, options: Any, dialogue: Dialogue) -> int:
    """Delete dead or idle machines and create missing ones; with --watch, repeatedly.

    Raises:
        UserError: bad options, no credentials, or an error of the cloud.
    """
    if not sweep.root.startswith("gs://"):
        raise UserError(f"{sweep.root}: TPU VMs cannot access it; ROOT must be gs://BUCKET/DIR")
    busy = reconcile(cloud, sweep, options, dialogue)
    unattended = replace(dialogue, yes=True)  # the number of machines was confirmed
    while busy and options.watch:
        time.sleep(POLL)
        try:
            busy = reconcile(cloud, sweep, replace(options, again=False), unattended)
        except UserError as error:
            if not is_transient(error):
                raise
            dialogue.log(f"{error}; trying again")
    return 0


def reconcile(cloud: Cloud, sweep: Sweep, options: Any, dialogue: Dialogue) -> bool:
    """One pass; whether another one may be needed."""
    packed, pools, busy = archive.pack(), sweep.pools(), sweep.busy_pools()
    code, marks = archive.address(sweep, packed), Marks.read(sweep)
    stuck = bool(marks.failed) and not options.again
    for pool in busy:  # raises before anything is created
        cloud.check(pool, code)
    with _connected(cloud):
        machines = [marks.applied(machine) for machine in cloud.machines(sweep)]
        todo = [(pool, *_difference(pool, machines)) for pool in pools]
        if stuck:
            todo = [(pool, gone, 0) for pool, gone, _ in todo]
        lines = [line for pool, gone, new in todo for line in _describe(pool, gone, new, dialogue)]
        if lines and (note := cloud.note(busy)):
            lines.insert(0, note)
        if not lines:
            dialogue.log("; ".join(_counts(pool, machines) for pool in pools))
        elif not dialogue.confirm([packed.summary(), *lines], "continue?"):
            return False
        _delete(cloud, [machine.name for _, gone, _ in todo for machine in gone], dialogue)
        for name in marks.failed if options.again else ():
            storage.remove(sweep.notes / f"{name}.failed")
        if any(new for _, _, new in todo):
            archive.publish(sweep, packed)
        for pool, _, new in todo:
            for _ in range(new):
                dialogue.log(f"requested {_create(cloud, pool, code)}")
    if stuck:
        raise UserError(
            f"machines could not work: {'; '.join(marks.failed.values())}; logs in "
            f"{sweep.root}/logs; after fixing it, repeat with --again"
        )
    return bool(machines) or any(pool.runs for pool in pools)


def down(cloud: Cloud, sweep: Sweep, options: Any, dialogue: Dialogue) -> int:
    """Delete every machine of this sweep, and what was made for it; 1 if some remain."""
    with _connected(cloud):
        mine = cloud.machines(sweep)
        if not mine:
            dialogue.log(f"nothing of this sweep in {options.zone}")
            return 0
        if not dialogue.confirm([f"{m.name} {m.state}" for m in mine], "delete?"):
            return 0
        _delete(cloud, [m.name for m in mine], dialogue)
        left = cloud.machines(sweep)
    dialogue.log(f"left: {', '.join(m.name for m in left)}" if left else "nothing is left")
    return 1 if left else 0


def startup(
    pool: Pool, options: CloudOptions, name: str, code: str, give_back: Sequence[str]
) -> str:
    """The start-up script of one machine: its variables, then launch/tpu_startup.sh.

    Args:
        give_back: the command with which the machine deletes itself.
    """
    values = {
        "PRIME_ROOT": pool.sweep.root,
        "PRIME_CODE": code,
        "PRIME_NAME": name,
        "PRIME_GIVE_BACK": shlex.join(give_back),
        "PRIME_SLICE": pool.slice_.name,
        "PRIME_SLICES": str(pool.slice_.slices),
        "PRIME_HOSTS": str(pool.hosts // pool.slice_.slices),
        "PRIME_DATA": "\n".join("\t".join(pair) for pair in pool.mounts(options.data)),
        "PRIME_MOUNT": "yes" if options.mount else "",
        "PRIME_SETUP": "\n".join(options.setup),
        "JAX_COORDINATOR_PORT": str(PORT),
    }
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in values.items())
    return f"#!/usr/bin/env bash\n{exports}{template('tpu_startup.sh')}"


def seconds(text: str, flag: str) -> int:
    """`90m`, `6h` or `2d` in seconds.

    Raises:
        UserError: another form.
    """
    match = re.fullmatch(r"(\d+)([mhd])", text)
    if not match:
        raise UserError(f"{flag} {text}: write 90m, 6h or 2d")
    return int(match[1]) * UNITS[match[2]]


def required(options: CloudOptions, engine: str) -> None:
    """Raises: UserError: no project or zone."""
    for name in ("project", "zone"):
        if not getattr(options, name):
            raise UserError(f"--on {engine} needs --{name}")


def one_model(options: CloudOptions, *flags: str) -> None:
    """Raises: UserError: more than one of the options that say how machines are rented."""
    given = [options.called(flag) for flag in flags if getattr(options, flag)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other")


def wait(operations: Sequence[Any]) -> None:
    """Wait for deletions; what is absent by now is no error."""
    from google.api_core.exceptions import NotFound

    for operation in operations:
        with contextlib.suppress(NotFound):
            operation.result(timeout=WAIT)


def _difference(pool: Pool, machines: Sequence[Machine]) -> tuple[list[Machine], int]:
    """(machines to delete, number to create) of one pool."""
    mine = [machine for machine in machines if machine.pool == pool.name]
    gone = [machine for machine in mine if machine.state in (*DEAD, *USELESS)]
    alive = [machine for machine in mine if machine.state not in (*DEAD, *USELESS, *GOING)]
    # Waiting requests cost nothing; a working machine ends by itself when no run is open.
    waiting = [machine for machine in alive if machine.state != "ACTIVE"]
    surplus = max(0, len(alive) - pool.want)
    return gone + waiting[:surplus], max(0, pool.want - len(alive))


def _describe(pool: Pool, gone: Sequence[Machine], new: int, dialogue: Dialogue) -> Iterator[str]:
    for machine in gone:
        yield f"delete {machine.name}: {machine.state} {machine.why}".rstrip()
    if new:
        cost = dialogue.cost(pool.slice_, new)
        yield f"create {new} x {pool.slice_.name} for {pool.runs} runs: {cost}"


def _counts(pool: Pool, machines: Sequence[Machine]) -> str:
    states = [f"{m.state} {m.why}".rstrip() for m in machines if m.pool == pool.name]
    return f"{pool.name}: {pool.runs} runs, {', '.join(states) or 'no machines'}"


@dataclass(frozen=True)
class Marks:
    """Files that machines write in ROOT/launch when their worker ends: NAME.idle or NAME.failed.

    Attributes:
        idle: names of idle machines.
        failed: message of each failed machine, by name.
    """

    idle: frozenset[str] = frozenset()
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, sweep: Sweep) -> "Marks":
        names = storage.names(sweep.notes)
        failed = [name.removesuffix(".failed") for name in names if name.endswith(".failed")]
        messages = {name: storage.read(sweep.notes / f"{name}.failed").decode() for name in failed}
        idle = frozenset(name.removesuffix(".idle") for name in names if name.endswith(".idle"))
        return cls(idle, {name: text.strip() for name, text in messages.items()})

    def applied(self, machine: Machine) -> Machine:
        """The machine in the state that it reported, unless the cloud knows better."""
        if machine.state in (*DEAD, *GOING):
            return machine
        state = "BROKEN" if machine.name in self.failed else machine.state
        return replace(machine, state="IDLE" if machine.name in self.idle else state)


@contextlib.contextmanager
def _connected(cloud: Cloud) -> Iterator[None]:
    """Its exceptions are converted to a `UserError` with the cloud's message."""
    try:
        from google.api_core.exceptions import GoogleAPICallError, RetryError
        from google.auth.exceptions import GoogleAuthError
        from requests.exceptions import RequestException
    except ImportError as error:
        raise needs("gcp", "google-api-core") from error
    title = cloud.title
    try:
        cloud.connect()
        yield
    except GoogleAPICallError as error:
        raise UserError(f"{title}: {_words(error)}") from error
    except TimeoutError as error:
        raise UserError(f"{title}: an operation takes longer than {WAIT:.0f} s") from error
    except (RetryError, RequestException) as error:
        raise UserError(f"{title} does not answer: {' '.join(str(error).split())}") from error
    except GoogleAuthError as error:
        words = str(error).splitlines()[0]
        hint = "gcloud auth application-default login"
        raise UserError(f"no Google credentials ({words}); run: {hint}") from error


def _words(error: Any) -> str:
    """The cloud's own words: of the call, or of the operation that it began."""
    found = [
        e.get("message") if isinstance(e, dict) else getattr(e, "message", "") for e in error.errors
    ]
    return " ".join(("; ".join(text for text in found if text) or error.message).split())


def _create(cloud: Cloud, pool: Pool, code: str) -> str:
    from google.api_core.exceptions import Conflict

    for left in reversed(range(NAMES)):
        name = f"{pool.name}-{secrets.token_hex(4)}"
        try:
            cloud.create(pool, name, code)
            break
        except Conflict:  # another `up` chose the same name; always: the cloud means something else
            if not left:
                raise
    return name


def _delete(cloud: Cloud, names: Sequence[str], dialogue: Dialogue) -> None:
    for name in names:
        dialogue.log(f"deleting {name}")
    if names:
        dialogue.log("waiting until they are deleted: they hold quota")
        cloud.delete(names)


def is_transient(error: UserError) -> bool:
    """Whether a later attempt may succeed."""
    from google.api_core import exceptions
    from requests.exceptions import RequestException

    kinds = exceptions.ServerError, exceptions.TooManyRequests, exceptions.RetryError
    cause = error.__cause__
    of_cloud = isinstance(cause, (*kinds, RequestException, TimeoutError))
    # Something is just being done to it: a machine may be deleting itself.
    busy = any(
        isinstance(e, dict) and e.get("reason") == BUSY for e in getattr(cause, "errors", ())
    )
    return of_cloud or busy or isinstance(error, storage.Unreachable)
