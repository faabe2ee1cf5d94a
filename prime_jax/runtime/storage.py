"""Local or shared folders and buckets (`gs://`, `s3://`) behind one path type.

Local paths are `pathlib.Path`, others `etils.epath.Path`, which has the same interface. Exclusive
creation, one listing of a folder and concurrent reads go through fsspec, which does them better.
A store that does not answer raises `Unreachable`, worth a retry; other errors are `UserError`s.
"""

import contextlib
import errno
import fcntl
import functools
import os
import pathlib
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from prime_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    Path = pathlib.Path | epath.Path
else:
    Path = pathlib.Path
T = TypeVar("T")

PROTOCOLS = {"gs": "gcp", "s3": "s3"}  # protocol -> extra of prime_jax that it needs
CHUNK = 1 << 24
LOCK = ".lock"
TEMPORARY = ".tmp"  # ends the name of a file that is being written
READERS = 8  # files read concurrently for their checksums
PATIENCE = 3600.0  # seconds for which finished work retries an unreachable store
MIRROR_SECONDS = 30.0  # between uploads of a log to a bucket
WAITABLE = (errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH)
LOGIN = {
    "gs": "log in with `gcloud auth application-default login`, or give the machine's service "
    "account the role Storage Object Admin",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role",
}
# Otherwise gcsfs creates a client at import that queries another service about every bucket.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


class Unreachable(UserError):
    """The store does not answer; a retry may succeed."""


def path(text: str | os.PathLike[str]) -> Path:
    """The path of a local name or a URL.

    Raises:
        UserError: a protocol that is not supported, or whose package is not installed.
    """
    text = os.fspath(text)
    protocol, found, rest = text.partition("://")
    if not found:
        return pathlib.Path(text)
    if protocol not in PROTOCOLS or not rest.strip("/"):
        raise UserError(f"{text}: expected a folder, gs://BUCKET/... or s3://BUCKET/...")
    _filesystem(protocol)
    from etils import epath

    return epath.Path(text)


def is_remote(place: Path) -> bool:
    return "://" in os.fspath(place)


def create(place: Path, data: bytes) -> bool:
    """Write `data` if nothing is at `place`, whole or not at all; False when something is.

    A retried request may find the object of its own first try: equal content counts as created
    here, so callers make the content unique.

    Raises:
        UserError, Unreachable: it cannot be written.
    """
    with one_line("write", place):
        if not is_remote(place):
            return _create_local(place, data)
        try:
            _of(place).pipe_file(str(place), data, mode="create")
        except Exception as error:
            if not _exists_already(error):
                raise
            return _of(place).cat_file(str(place)) == data
        return True


def write(place: Path, data: bytes) -> None:
    """Replace a file atomically: a reader, or a crash, sees the old content or the new.

    Raises:
        UserError, Unreachable: it cannot be written.
    """
    with one_line("write", place):
        if is_remote(place):
            _of(place).pipe_file(str(place), data)
            return
        with replacing(place) as [temporary]:
            temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(*places: pathlib.Path) -> Iterator[list[pathlib.Path]]:
    """Names beside local files, which take their places when the block ends well."""
    temporary = [_temporary(place) for place in places]
    try:
        yield temporary
        for place, written in zip(places, temporary, strict=True):
            os.replace(written, place)
    finally:
        for written in temporary:
            written.unlink(missing_ok=True)


def _temporary(place: pathlib.Path) -> pathlib.Path:
    """A name that no other process has, on any machine that shares the folder."""
    return place.with_name(f".{place.name}.{uuid.uuid4().hex}{TEMPORARY}")


def read(place: Path) -> bytes:
    """Raises: UserError, Unreachable: it is missing or cannot be read."""
    with one_line("read", place):
        if is_remote(place):
            return _of(place).cat_file(str(place))
        return place.read_bytes()


def read_all(folder: Path, names: Iterable[str]) -> list[bytes]:
    """The contents of some files of one folder, read concurrently from a bucket.

    Raises:
        UserError, Unreachable: one of them is missing or cannot be read.
    """
    base = os.fspath(folder)
    files = [f"{base}/{name}" for name in names]
    with one_line("read", folder):
        if is_remote(folder):
            fs = _of(folder)
            found = fs.cat(files) if files else {}
            return [found[fs._strip_protocol(file)] for file in files]
        out = []
        for file in files:
            with open(file, "rb", buffering=0) as stream:
                out.append(stream.read())
        return out


def exists(place: Path) -> bool:
    """Whether a file or folder exists (in a bucket a folder exists while it holds something)."""
    with one_line("read", place):
        return _of(place).exists(str(place)) if is_remote(place) else place.exists()


def names(folder: Path) -> list[str]:
    """Names directly in a folder, from one listing; empty if there is no such folder."""
    with one_line("read", folder):
        try:
            if not is_remote(folder):
                return os.listdir(folder)
            return [name.rpartition("/")[2] for name in _of(folder).ls(str(folder), detail=False)]
        except FileNotFoundError:
            return []


def make_folder(folder: Path) -> None:
    """Raises: UserError: it cannot be made. In a bucket this does nothing."""
    if not is_remote(folder):
        with one_line("make", folder):
            folder.mkdir(parents=True, exist_ok=True)


def remove(place: Path) -> None:
    """Remove a file, or a folder and its contents, if it exists.

    Raises:
        UserError, Unreachable: it cannot be removed.
    """
    import shutil

    with one_line("remove", place), contextlib.suppress(FileNotFoundError):
        if is_remote(place):
            _of(place).rm(str(place), recursive=True)
        elif place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()


def upload(local: pathlib.Path, place: Path) -> None:
    """Copy a local folder's files to a bucket."""
    with one_line("write", place):
        _of(place).put(f"{local}/", f"{place}/", recursive=True)


def download(place: Path, local: pathlib.Path) -> None:
    """Copy the files below `place` in a bucket to a local folder."""
    with one_line("read", place):
        _of(place).get(f"{place}/", f"{local}/", recursive=True)


def checksums(folder: Path) -> dict[str, list[Any]]:
    """{relative name: [bytes, checksum]} of every file below a folder.

    A bucket's own checksums come with its listing, without reading files. They differ from those
    of local files, so a copy elsewhere can be compared by size only (`same_sums`).
    """
    with one_line("read", folder):
        if is_remote(folder):
            found = _of(folder).find(str(folder), detail=True)
            start = len(_of(folder)._strip_protocol(str(folder))) + 1
            return {name[start:]: _server_sum(info) for name, info in sorted(found.items())}
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        with ThreadPoolExecutor(READERS) as readers:
            sums = list(readers.map(_local_sum, files))
        return {str(p.relative_to(folder)): x for p, x in zip(files, sums, strict=True)}


def _local_sum(file: pathlib.Path) -> list[int]:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            crc = zlib.crc32(block, crc)
    return [file.stat().st_size, crc]


def same_sums(one: list[Any] | None, two: list[Any]) -> bool:
    """Whether two checksums agree; if their kinds differ, whether the sizes agree."""
    if one is None:
        return False
    comparable = type(one[1]) is type(two[1]) and _kind(one) == _kind(two)
    return one == two if comparable else one[0] == two[0]


def retry(action: Callable[[], T], log: Callable[[str], None], patience: float = PATIENCE) -> T:
    """Call `action`, and retry while the store is unreachable.

    Raises:
        Unreachable: the store is still unreachable after `patience` seconds.
    """
    began, pause = time.monotonic(), 1.0
    while True:
        try:
            return action()
        except Unreachable as error:
            if time.monotonic() - began > patience:
                raise
            log(f"{error}; trying again in {pause:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, MIRROR_SECONDS)


@contextlib.contextmanager
def locked(folder: Path, doing: str = "training there") -> Iterator[None]:
    """Lock a folder for this process inside the block; a killed process leaves no lock.

    Does nothing in a bucket, or where the file system has no locks.

    Args:
        doing: what another process is told to be doing.

    Raises:
        UserError: another process has it.
    """
    if is_remote(folder):
        yield
        return
    make_folder(folder)
    with one_line("lock", folder):
        stream = (folder / LOCK).open("a")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is {doing}") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        yield


def _create_local(place: pathlib.Path, data: bytes) -> bool:
    temporary = _temporary(place)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, place)
        except FileExistsError:
            # NFS may have created the link although its reply was lost.
            return temporary.stat().st_nlink == 2
        return True
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@functools.cache
def _filesystem(protocol: str) -> Any:
    """One client for all threads, without listing caches, so that other processes' writes show."""
    import logging

    import fsspec

    for name in ("gcsfs", "s3fs"):  # they log exceptions that they also raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in ("gcs", "s3"):  # epath creates its own clients from this
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem({"gs": "gcs"}.get(protocol, protocol))
    except ImportError as error:
        extra = PROTOCOLS[protocol]
        raise UserError(f"{protocol}:// needs: pip install 'prime_jax[{extra}]'") from error
    except Exception as error:
        raise UserError(f"{protocol}://: {_line(error)}; {LOGIN[protocol]}") from error


def _of(place: Path) -> Any:
    return _filesystem(os.fspath(place).partition("://")[0])


def _server_sum(info: dict[str, Any]) -> list[Any]:
    for kind in ("crc32c", "ETag"):
        if info.get(kind):
            return [info["size"], f"{kind}:{info[kind]}"]
    return [info["size"], ""]


def _kind(sums: list[Any]) -> str:
    return str(sums[1]).partition(":")[0] if isinstance(sums[1], str) else ""


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _exists_already(error: Exception) -> bool:
    """gcsfs raises FileExistsError; the cause of the error of s3fs has the code."""
    answer = getattr(error.__cause__, "response", {})
    code = answer.get("Error", {}).get("Code")
    return isinstance(error, FileExistsError) or code == "PreconditionFailed"


@contextlib.contextmanager
def one_line(verb: str, place: Path) -> Any:
    """Convert errors of stores to `UserError` or `Unreachable`, in one line."""
    try:
        yield
    except FileNotFoundError as error:
        if verb == "read" and not is_remote(place):
            raise UserError(f"cannot read {place}: {error.strerror}") from error
        raise UserError(f"cannot {verb} {place}: no such file, folder or bucket") from error
    except UserError:
        raise
    except Exception as error:
        raise explain(error, f"cannot {verb} {place}", place) from error


def explain(error: Exception, what: str, place: Path) -> UserError:
    """The `Unreachable` or other `UserError` for an error of a store."""
    if not is_remote(place):
        kind = Unreachable if getattr(error, "errno", None) in WAITABLE else UserError
        return kind(f"{what}: {getattr(error, 'strerror', None) or _line(error)}")
    protocol = os.fspath(place).partition("://")[0]
    code = str(getattr(error, "code", ""))
    names = {c.__name__ for c in type(error).__mro__}
    credentials = names & {
        "PermissionError",
        "NoCredentialsError",
        "GoogleAuthError",
        "PartialCredentialsError",
    }
    words = ("Forbidden", "PERMISSION_DENIED", "UNAUTHENTICATED", "Unable to locate credentials")
    if credentials or code in ("401", "403") or any(word in str(error) for word in words):
        return UserError(f"{what}: {_line(error)}; {LOGIN[protocol]}")
    if isinstance(error, (ValueError, NotADirectoryError, IsADirectoryError)) or code == "400":
        return UserError(f"{what}: {_line(error)}")
    return Unreachable(f"{what}: {_line(error)}")
