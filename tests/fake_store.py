"""What the loopback buckets share: objects with generations, preconditions, outages and counters."""

import hashlib
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Stored:
    data: bytes
    generation: int

    @property
    def md5(self) -> bytes:
        return hashlib.md5(self.data).digest()


@dataclass
class Store:
    """Objects by (bucket, name).

    Attributes:
        down: requests are cut off without an answer.
        lost: so many writes are done, but their answers never arrive.
        denied: requests are answered with "no rights".
        page: most names in one page of a listing.
        counts: requests by what they wanted.
    """

    objects: dict[tuple[str, str], Stored] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    down: bool = False
    lost: int = 0
    denied: bool = False
    page: int = 1000
    counts: Counter = field(default_factory=Counter)
    generation: int = 0
    uploads: dict[str, tuple] = field(default_factory=dict)

    def put(self, bucket: str, name: str, data: bytes, expected: int | None = None) -> bool:
        """Store an object; False if its generation (0: absent) is not the expected one."""
        with self.lock:
            there = self.objects.get((bucket, name))
            if expected is not None and expected != (there.generation if there else 0):
                return False
            self.generation += 1
            self.objects[bucket, name] = Stored(data, self.generation)
            return True

    def get(self, bucket: str, name: str) -> Stored | None:
        with self.lock:
            return self.objects.get((bucket, name))

    def delete(self, bucket: str, name: str) -> bool:
        with self.lock:
            return self.objects.pop((bucket, name), None) is not None

    def listing(
        self, bucket: str, prefix: str, delimiter: str, after: str, most: int
    ) -> tuple[list[str], list[str], str]:
        """Names, common prefixes, and where the next page starts ("" at the end)."""
        with self.lock:
            names = sorted(n for b, n in self.objects if b == bucket and n.startswith(prefix))
        entries = {}  # name or common prefix -> whether it is a prefix, in order
        for name in names:
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            entries.setdefault(prefix + head + delimiter if found else name, bool(found))
        rest = [entry for entry in entries if entry > after]
        shown = rest[: min(most, self.page)]
        return (
            [entry for entry in shown if not entries[entry]],
            [entry for entry in shown if entries[entry]],
            shown[-1] if len(rest) > len(shown) else "",
        )


class Handler(BaseHTTPRequestHandler):
    """Reads a request, obeys `store.down`, and answers in one piece.

    A subclass says how it refuses: `refuse()` answers a caller who may not.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def begin(self) -> bool:
        """Take the request apart; False if it has been dealt with."""
        self.body = self._read_body()
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        self.parts = url.path.strip("/").split("/")
        if self.store.down:
            self.close_connection = True
            self.connection.shutdown(2)
            return False
        if self.store.denied:
            self.refuse()
            return False
        return True

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            out = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def range_of(self, data: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers of a read, whole or of a byte range."""
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes="):
            return 200, data, {}
        first, _, last = wanted[6:].partition("-")
        start = int(first) if first else max(0, len(data) - int(last))
        stop = int(last) + 1 if first and last else len(data)
        part = data[start:stop]
        if not part:
            return 416, b"", {"Content-Range": f"bytes */{len(data)}"}
        return 206, part, {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}

    def answer(self, code: int, body: bytes = b"", kind: str = "", **headers: str) -> None:
        if self.store.lost and self.command in ("PUT", "POST"):
            self.store.lost -= 1
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.send_response(code)
        length = headers.pop("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", length)
        self.send_header("Content-Type", kind or "application/octet-stream")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()


@contextmanager
def serving(handler: type[Handler]) -> Iterator[tuple[Store, str]]:
    """A store behind `handler` on a port of its own, and its address."""
    store = Store()
    bound = type(handler.__name__, (handler,), {"store": store})
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield store, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Bucket:
    """A loopback bucket that the environment of this process, and of its children, names.

    Attributes:
        url: a folder in it, e.g. gs://bucket/here.
        store: what it holds.
        environment: variables by which clients find it.
    """

    def __init__(self, protocol: str, store: Store, address: str):
        self.url, self.store = f"{protocol}://bucket/here", store
        self.environment = {
            "gs": {
                "STORAGE_EMULATOR_HOST": address,
                "TENSORSTORE_GCS_HTTP_URL": address,
                "FSSPEC_GCS_TOKEN": "anon",
            },
            "s3": {
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "a",
                "AWS_SECRET_ACCESS_KEY": "b",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        }[protocol]


@contextmanager
def bucket(protocol: str) -> Iterator[Bucket]:
    """A bucket that `storage.path(bucket.url)` finds."""
    import os

    import fsspec
    from fake_gcs import GCS
    from fake_s3 import S3
    from fsspec.config import conf, set_conf_env

    from prime_jax.runtime import storage

    with serving({"gs": GCS, "s3": S3}[protocol]) as (store, address):
        made = Bucket(protocol, store, address)
        before = {name: os.environ.get(name) for name in made.environment}
        os.environ |= made.environment
        set_conf_env(conf)
        _forget_clients(storage, fsspec)
        try:
            yield made
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            _forget_clients(storage, fsspec)


def _forget_clients(storage, fsspec) -> None:
    from etils.epath import backend

    storage._filesystem.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()
    for protocol in ("gcs", "s3"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()
