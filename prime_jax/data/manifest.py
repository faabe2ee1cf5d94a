"""The manifest of a prepared dataset: its sources, contents and checksums.

DIR/manifest.json is written last. Beside it: shards of fixed-length blocks (ArrayRecord; a record
is a little-endian int64, the document that its first token belongs to, then the tokens),
`unigram.npy` (int64 [V], counts of the train split), `token_bytes.npy` (int32 [V], bytes of text
of each id) and the tokenizer.
"""

import dataclasses
import hashlib
import io
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from prime_jax import config as configs
from prime_jax.data import shards, tokenizers
from prime_jax.errors import NoData, UserError
from prime_jax.runtime.records import read_json, write_json_atomic
from prime_jax.settings import REQUIRED, Flags, from_dict, nearest, setting

SCHEMA = 1
SPLITS = ("train", "valid", "test")
FILE = "manifest.json"
UNIGRAM, TOKEN_BYTES = "unigram.npy", "token_bytes.npy"


@dataclass(frozen=True)
class Request(Flags):
    """What `data prepare` was asked for."""

    source: str = setting(REQUIRED, "what text to read, see below", positional=True)
    tokenizer: str = setting(REQUIRED, "how text becomes token ids, see below", metavar="SPEC")
    seq_len: int = setting(128, "tokens per block", at_least=2)
    valid_fraction: float = setting(
        0.05, "fraction of the documents for validation", at_least=0, below=1
    )
    test_fraction: float = setting(
        0.05, "fraction of the documents for the test split", at_least=0, below=1
    )
    max_documents: int = setting(
        0, "read only the first N documents of each source; 0: all", at_least=0
    )
    max_bytes: int = setting(
        0, "read only the first N bytes of text of each source; 0: all", at_least=0
    )
    seed: int = setting(0, "seed of the split into train, valid and test", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.valid_fraction + self.test_fraction >= 1:
            raise UserError(
                f"--valid-fraction {self.valid_fraction} and --test-fraction {self.test_fraction}: "
                "must leave something to train on"
            )

    def command(self, out: Path | str) -> str:
        """The command line that makes this dataset."""
        words = ["prime-jax", "data", "prepare", self.source, "--tokenizer", self.tokenizer]
        words += ["--out", str(out), "--seq-len", str(self.seq_len)]
        for field in dataclasses.fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default:
                words += ["--" + field.name.replace("_", "-"), str(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class Shard:
    file: str
    blocks: int
    size: int  # bytes of the file
    sha256: str  # of the records, in order


@dataclass(frozen=True)
class Table:
    file: str  # .npy
    sha256: str


@dataclass(frozen=True)
class Split:
    """Tokens, bytes and blocks are those of the full blocks; the tail is left out."""

    documents: int
    tokens: int
    bytes: int  # of text; EOS has none
    blocks: int
    dropped_tokens: int  # at the end of the stream, fewer than one block
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """A prepared dataset.

    Attributes:
        fingerprint: sixteen hex digits: tokenizer, block length and the content of every shard.
        eos_policy: `append` (after each document) or `none` (a stream without documents).
        skipped: documents left out because they are not valid text.
        empty: documents left out because they hold no text.
        tokens_per_second: of the preparation; the only field that differs between repetitions.
        directory: where it was loaded from; not stored.
    """

    schema: int
    request: Request
    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    eos_id: int
    eos_policy: Literal["append", "none"]
    seq_len: int
    dtype: Literal["uint16", "uint32"]
    skipped: int
    empty: int
    train: Split
    valid: Split
    test: Split
    tables: tuple[Table, ...]
    tokens_per_second: float
    directory: str = ""

    def split(self, name: str) -> Split:
        if name not in SPLITS:
            raise UserError(f"split {name!r}: no such split{nearest(name, SPLITS)}")
        return getattr(self, name)

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @property
    def record_bytes(self) -> int:
        return 8 + self.seq_len * np.dtype(self.dtype).itemsize

    def rebuild(self) -> str:
        """Advice to append to an error about this dataset."""
        return f"; remove {self.directory} and run: {self.request.command(self.directory)}"

    def unigram(self) -> np.ndarray:
        """int64 [V]: how often each id occurs in the blocks of the train split."""
        return self._table(UNIGRAM)

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: bytes of text each id stands for."""
        return self._table(TOKEN_BYTES)

    def tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.load(self.path)

    def _table(self, name: str) -> np.ndarray:
        path = self.path / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}{self.rebuild()}") from error
        if Table(name, hashlib.sha256(data).hexdigest()) not in self.tables:
            raise UserError(f"{path} was altered{self.rebuild()}")
        return np.load(io.BytesIO(data))


def fingerprint(tokenizer_hash: str, seq_len: int, eos: str, splits: list[Split]) -> str:
    """The identity of the content, independent of its sources."""
    digest = hashlib.sha256(f"{SCHEMA} {tokenizer_hash} {seq_len} {eos}".encode())
    for split in splits:
        digest.update(f" {split.blocks}:".encode())
        digest.update(" ".join(shard.sha256 for shard in split.shards).encode())
    return digest.hexdigest()[:16]


def save(manifest: Manifest, directory: Path) -> None:
    stored = dataclasses.asdict(manifest)
    del stored["directory"]
    write_json_atomic(directory / FILE, stored)


def load(path: str | Path, *, verify: bool = False) -> Manifest:
    """Read a manifest and check that its shards exist.

    Args:
        path: the dataset's directory.
        verify: read every record and check the hashes as well.
    Raises:
        UserError: no manifest, a damaged one, another schema, a missing or damaged shard; with
            the file and the command that rebuilds it.
    """
    if "://" in str(path):
        raise UserError(
            f"{path}: prepared data is read from a local folder; copy it to this machine"
        )
    directory = Path(path)
    file = directory / FILE
    again = f"prime-jax data prepare SOURCE --tokenizer SPEC --out {shlex.quote(str(directory))}"
    if not file.exists():
        state = "an unfinished dataset" if (directory / "parts").exists() else "no dataset"
        raise UserError(f"{directory} holds {state} (no {FILE}); run: {again}")
    values = read_json(file)
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{file} has schema {schema}, this version reads {SCHEMA}; "
            f"remove {directory} and run: {again}"
        )
    try:
        manifest = from_dict(Manifest, values | {"directory": str(directory)})
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}); run: {again}") from error
    splits = [manifest.split(name) for name in SPLITS]
    content = (manifest.tokenizer_hash, manifest.seq_len, manifest.eos_policy, splits)
    if fingerprint(*content) != manifest.fingerprint:
        raise UserError(f"{file} was altered{manifest.rebuild()}")
    for name in SPLITS:
        for shard in manifest.split(name).shards:
            _check_shard(manifest, shard, contents=verify)
    return manifest


def _check_shard(manifest: Manifest, shard: Shard, *, contents: bool) -> None:
    path = manifest.path / shard.file
    if not path.is_file():
        raise UserError(f"{path} is missing{manifest.rebuild()}")
    if (size := path.stat().st_size) != shard.size:
        raise UserError(f"{path} has {size} bytes instead of {shard.size}{manifest.rebuild()}")
    if contents and shards.digest(path, shard.blocks, manifest.rebuild()) != shard.sha256:
        raise UserError(f"{path}: its content was altered{manifest.rebuild()}")


def of_run(config: configs.RunConfig) -> Manifest:
    """The dataset that a run trains on.

    Raises:
        NoData: it is missing, damaged or unreadable, or another dataset is at its path.
    """
    path = config.data.path
    try:
        found = load(path)
    except UserError as error:
        raise NoData(str(error)) from error
    except OSError as error:
        raise NoData(f"cannot read {path}: {error.strerror or error}") from error
    if config.data.fingerprint not in ("", found.fingerprint):
        raise NoData(_differs("data.fingerprint", config.data.fingerprint, found))
    return found


def check(manifest: Manifest, config: configs.RunConfig) -> None:
    """Check that the dataset is the one that the config describes.

    Raises:
        UserError: vocabulary, length or fingerprint differ, with both values; or the run wants more
            tokens than there are.
    """
    pairs = {
        "model.vocab_size": (config.model.vocab_size, manifest.vocab_size),
        "data.seq_len": (config.data.seq_len, manifest.seq_len),
        "data.fingerprint": (config.data.fingerprint or manifest.fingerprint, manifest.fingerprint),
    }
    for name, (given, right) in pairs.items():
        if given != right:
            raise UserError(_differs(name, given, manifest))
    if config.data.unique_tokens > manifest.train.tokens:
        raise UserError(
            f"data.unique_tokens = {config.data.unique_tokens}, but {manifest.directory} has "
            f"{manifest.train.tokens} tokens to train on"
        )


def _differs(name: str, given: object, manifest: Manifest) -> str:
    right = getattr(manifest, name.rpartition(".")[2])
    return f"{name} = {given}, but {manifest.directory} was prepared with {right}"
