"""The code as one archive in ROOT, which machines without a shared disk install.

Of a checkout: tracked files, and new files that git does not ignore, unless large or likely secrets.
Of an installed wheel: its files, laid out as in a checkout (`shipped`).
"""

import gzip
import hashlib
import io
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from prime_jax import shipped
from prime_jax.errors import UserError
from prime_jax.launch.engine import REPO, Sweep
from prime_jax.runtime import storage

MAX_BYTES = 1_000_000  # of an untracked file
KEYS = (".env*", "*.pem", "*.key", "*.p12", "id_*", "*credential*", "*secret*", "*token*.json")


@dataclass(frozen=True)
class Archive:
    """A .tar.gz and the list of excluded files.

    Attributes:
        name: contains the hash of the bytes: the same files give the same name.
        left_out: untracked files, each with the reason.
    """

    data: bytes
    name: str
    files: int
    left_out: tuple[str, ...]

    def summary(self) -> str:
        text = f"code: {self.files} files, {len(self.data) / 1e6:.1f} MB, {self.name}"
        if self.left_out:
            text += f"; left out: {', '.join(self.left_out)}"
        return f"{text}; ignored files are never included"


def pack(repo: Path | None = None) -> Archive:
    """Archive a git checkout; without one, the code that runs here.

    Raises:
        UserError: the checkout is none, or git is missing.
    """
    if repo is None and not shipped.is_checkout():
        included, refused = shipped.installed(), {}
    else:
        included, refused = _of_checkout(repo or REPO)
    out, files = io.BytesIO(), 0
    # Times, owners and order are normalised: equal files give equal bytes.
    with (
        gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as squeezed,
        tarfile.open(fileobj=squeezed, mode="w") as tar,
    ):
        for name, path in sorted(included.items()):
            if not path.is_symlink() and not path.is_file():
                continue  # tracked, but deleted here; or a submodule
            info = tar.gettarinfo(path, arcname=name)
            info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
            info.mode = 0o755 if info.mode & 0o100 else 0o644
            with path.open("rb") if info.isreg() else io.BytesIO() as content:
                tar.addfile(info, content)
            files += 1
    data = out.getvalue()
    name = f"code-{hashlib.sha256(data).hexdigest()[:12]}.tar.gz"
    return Archive(data, name, files, tuple(f"{n} ({r})" for n, r in sorted(refused.items())))


def _of_checkout(repo: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The files to include, by name, and why others are not."""
    tracked = _git(repo, "ls-files", "-z", "--cached")
    fresh = _git(repo, "ls-files", "-z", "--others", "--exclude-standard")
    refused = {name: reason for name in fresh if (reason := _refuse(repo / name))}
    return {name: repo / name for name in {*tracked, *fresh} - set(refused)}, refused


def publish(sweep: Sweep, archive: Archive) -> str:
    """Write the archive to the sweep unless it exists; returns its address.

    Raises:
        UserError: ROOT cannot be written to.
    """
    storage.make_folder(sweep.notes)
    if not storage.exists(sweep.notes / archive.name):
        storage.write(sweep.notes / archive.name, archive.data)
    return address(sweep, archive)


def address(sweep: Sweep, archive: Archive) -> str:
    return f"{sweep.root}/launch/{archive.name}"


def _refuse(path: Path) -> str:
    """Why an untracked file is excluded; empty if it is included."""
    if any(fnmatch(path.name.lower(), pattern) for pattern in KEYS):
        return "looks like a key"
    size = path.lstat().st_size
    return f"untracked, {size / 1e6:.1f} MB" if size > MAX_BYTES else ""


def _git(repo: Path, *command: str) -> Sequence[str]:
    try:
        done = subprocess.run(["git", "-C", str(repo), *command], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("the code archive needs git") from error
    if done.returncode:
        raise UserError(
            f"{repo}: no git checkout; `up` and `render` for TPUs need one of prime_jax "
            "(pip install -e .)"
        )
    return [name for name in done.stdout.split("\0") if name]
