"""An append-only text file, local or in a bucket."""

import contextlib
import threading

from prime_jax.errors import UserError
from prime_jax.runtime.storage import MIRROR_SECONDS, Path, is_remote, one_line, retry, write


class Log:
    """An append-only text file. Objects in a bucket cannot grow: there it is uploaded periodically.

    An unreachable store does not stop the writer; `close` retries for a while.
    """

    def __init__(self, place: Path, text: str = "", seconds: float = MIRROR_SECONDS):
        self.place, self._remote = place, is_remote(place)
        if not self._remote:
            with one_line("write", place):
                place.write_text(text)
                self._stream = place.open("a")
            return
        self._lines, self._changed, self._over = [text], bool(text), threading.Event()
        self._copying = threading.Lock()
        self._thread = threading.Thread(target=self._mirror, args=(seconds,), daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        if not self._remote:
            with one_line("write", self.place):
                self._stream.write(text)
                self._stream.flush()
            return
        self._lines.append(text)
        self._changed = True

    def flush(self) -> None:
        """Bring what was written to a bucket now, if it can be reached; a folder has it already."""
        if self._remote:
            with contextlib.suppress(UserError):
                self._copy()

    def close(self) -> None:
        if not self._remote:
            with contextlib.suppress(OSError):  # every line was flushed, or its failure raised
                self._stream.close()
        elif not self._over.is_set():
            self._over.set()
            self._thread.join()
            retry(self._copy, lambda _: None, patience=2 * MIRROR_SECONDS)

    def _mirror(self, seconds: float) -> None:
        while not self._over.wait(seconds):
            with contextlib.suppress(UserError):
                self._copy()

    def _copy(self) -> None:
        with self._copying:  # an older text is never written over a newer one
            if self._changed:
                self._changed = False
                try:
                    write(self.place, "".join(self._lines).encode())
                except UserError:
                    self._changed = True
                    raise
