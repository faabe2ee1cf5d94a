"""Cloud TPU VMs as queued resources: one per worker, created and deleted by a stateless reconcile.

Each pass lists the resources with the sweep's name, deletes dead or idle ones (they hold quota),
waits for that, and creates missing ones under new names. It has no local state, so it may crash at
any point, run twice or from cron. Machines install themselves from ROOT, without a login.
"""

import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prime_jax.errors import UserError
from prime_jax.launch import archive
from prime_jax.launch.engine import Dialogue, Pool, Sweep, needs
from prime_jax.launch.tpu_request import Options, parent_of, request
from prime_jax.runtime import storage

POLL, WAIT = 60.0, 600.0  # seconds between passes; for one operation of the cloud
DEAD = ("SUSPENDED", "FAILED")  # the machines are gone, but they still hold quota
USELESS = ("IDLE", "BROKEN")
GOING = ("DELETING", "SUSPENDING")


@dataclass(frozen=True)
class Machine:
    """A queued resource of this sweep.

    Attributes:
        state: that of the cloud, or as reported by the machine: IDLE when no run was left, BROKEN
            when it could not work.
        why: the cloud's message if it failed.
    """

    name: str
    state: str
    why: str = ""

    @property
    def pool(self) -> str:
        return self.name.rpartition("-")[0]


def render(sweep: Sweep, options: Options) -> dict[str, str]:
    """The request and the start-up script of one machine of each pool."""
    code, out = archive.address(sweep, archive.pack()), {}
    for pool in sweep.busy_pools():
        made = request(pool, options, f"{pool.name}-0000", code)
        metadata = made["tpu"]["node_spec"][0]["node"]["metadata"]
        out[f"{pool.name}-startup.sh"] = metadata["startup-script"]
        metadata["startup-script"] = f"(the text of {pool.name}-startup.sh)"
        out[f"{pool.name}-request.json"] = json.dumps(made, indent=2) + "\n"
    return out


def up(sweep: Sweep, options: Options, dialogue: Dialogue) -> int:
    """Delete dead or idle machines and create missing ones; with --watch, repeatedly.

    Raises:
        UserError: bad options, no credentials, or an error of the cloud.
    """
    if not sweep.root.startswith("gs://"):
        raise UserError(f"{sweep.root}: TPU VMs cannot access it; ROOT must be gs://BUCKET/DIR")
    busy = reconcile(sweep, options, dialogue)
    unattended = replace(dialogue, yes=True)  # the number of machines was confirmed
    while busy and options.watch:
        time.sleep(POLL)
        try:
            busy = reconcile(sweep, replace(options, again=False), unattended)
        except UserError as error:
            if not (isinstance(error, storage.Unreachable) or _transient(error.__cause__)):
                raise
            dialogue.log(f"{error}; trying again")
    return 0


def reconcile(sweep: Sweep, options: Options, dialogue: Dialogue) -> bool:
    """One pass; whether another one may be needed."""
    parent, packed, pools = parent_of(options), archive.pack(), sweep.pools()
    code = archive.address(sweep, packed)
    for pool in sweep.busy_pools():  # raises before anything is created
        request(pool, options, f"{pool.name}-0000", code)
    marks = Marks.read(sweep)
    stuck = bool(marks.failed) and not options.again
    with _cloud() as cloud:
        machines = _machines(cloud, parent, sweep, marks)
        todo = [(pool, *_difference(pool, machines)) for pool in pools]
        if stuck:
            todo = [(pool, gone, 0) for pool, gone, _ in todo]
        lines = [line for pool, gone, new in todo for line in _describe(pool, gone, new, dialogue)]
        if not lines:
            dialogue.log("; ".join(_counts(pool, machines) for pool in pools))
        elif not dialogue.confirm([packed.summary(), *lines], "continue?"):
            return False
        _delete(cloud, parent, [machine.name for _, gone, _ in todo for machine in gone], dialogue)
        for name in marks.failed if options.again else ():
            storage.remove(sweep.notes / f"{name}.failed")
        if any(new for _, _, new in todo):
            archive.publish(sweep, packed)
        for pool, _, new in todo:
            for _ in range(new):
                dialogue.log(f"requested {_create(cloud, parent, pool, options, code)}")
    if stuck:
        raise UserError(
            f"machines could not work: {'; '.join(marks.failed.values())}; logs in "
            f"{sweep.root}/logs; after fixing it, repeat with --again"
        )
    return bool(machines) or any(pool.runs for pool in pools)


def down(sweep: Sweep, options: Options, dialogue: Dialogue) -> int:
    """Delete every queued resource of this sweep with its machines; 1 if some remain."""
    parent = parent_of(options)
    with _cloud() as cloud:
        mine = _machines(cloud, parent, sweep, Marks())
        if not mine:
            dialogue.log(f"nothing of this sweep in {options.zone}")
            return 0
        if not dialogue.confirm([f"{m.name} {m.state}" for m in mine], "delete?"):
            return 0
        _delete(cloud, parent, [m.name for m in mine], dialogue)
        left = _machines(cloud, parent, sweep, Marks())
    dialogue.log(f"left: {', '.join(m.name for m in left)}" if left else "nothing is left")
    return 1 if left else 0


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
    states = [machine.state for machine in machines if machine.pool == pool.name]
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


def client() -> Any:
    """The Cloud TPU client; tests replace it.

    Raises:
        UserError: its library is missing.
    """
    try:
        from google.cloud import tpu_v2
    except ImportError as error:
        raise needs("gcp", "google-cloud-tpu") from error
    return tpu_v2.TpuClient()


@contextlib.contextmanager
def _cloud() -> Iterator[Any]:
    """The client; its exceptions are converted to a `UserError` with the cloud's message."""
    try:
        from google.api_core.exceptions import GoogleAPICallError, RetryError
        from google.auth.exceptions import GoogleAuthError
    except ImportError as error:
        raise needs("gcp", "google-cloud-tpu") from error
    try:
        yield client()
    except GoogleAPICallError as error:
        raise UserError(f"Cloud TPU: {' '.join(error.message.split())}") from error
    except TimeoutError as error:
        raise UserError(f"Cloud TPU: an operation takes longer than {WAIT:.0f} s") from error
    except RetryError as error:
        raise UserError(f"Cloud TPU does not answer: {' '.join(str(error).split())}") from error
    except GoogleAuthError as error:
        words = str(error).splitlines()[0]
        hint = "gcloud auth application-default login"
        raise UserError(f"no Google credentials ({words}); run: {hint}") from error


def _machines(cloud: Any, parent: str, sweep: Sweep, marks: Marks) -> list[Machine]:
    found = []
    for one in cloud.list_queued_resources(parent=parent):
        name = one.name.rpartition("/")[2]
        if name.startswith(f"{sweep.name}-"):
            state = one.state.state.name
            if state not in (*DEAD, *GOING):
                state = "BROKEN" if name in marks.failed else state
                state = "IDLE" if name in marks.idle else state
            why = " ".join(one.state.failed_data.error.message.split())
            found.append(Machine(name, state, why))
    return sorted(found, key=lambda machine: machine.name)


def _create(cloud: Any, parent: str, pool: Pool, options: Options, code: str) -> str:
    from google.api_core.exceptions import AlreadyExists

    while True:
        name = f"{pool.name}-{secrets.token_hex(4)}"
        made = request(pool, options, name, code)
        with contextlib.suppress(AlreadyExists):  # another `up` chose the same name
            cloud.create_queued_resource(
                parent=parent, queued_resource_id=name, queued_resource=made
            ).result(timeout=WAIT)
            return name


def _delete(cloud: Any, parent: str, names: Sequence[str], dialogue: Dialogue) -> None:
    """Delete resources with their machines, and wait until the quota is free."""
    from google.api_core.exceptions import NotFound

    begun = []
    for name in names:
        whole = {"name": f"{parent}/queuedResources/{name}", "force": True}
        with contextlib.suppress(NotFound):  # already deleted
            begun.append(cloud.delete_queued_resource(request=whole))
            dialogue.log(f"deleting {name}")
    if begun:
        dialogue.log("waiting until they are deleted: they hold quota")
    for operation in begun:
        with contextlib.suppress(NotFound):
            operation.result(timeout=WAIT)


def _transient(error: BaseException | None) -> bool:
    from google.api_core import exceptions

    kinds = exceptions.ServiceUnavailable, exceptions.DeadlineExceeded, exceptions.RetryError
    return isinstance(error, (*kinds, TimeoutError))
