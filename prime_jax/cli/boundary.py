"""Where errors and signals end: what went wrong is one line, and the exit code says of what kind.

0 done; 1 something failed, or an error that nobody foresaw; 2 wrong input or environment; 3 an
answer was refused; 85 interrupted and saved; 130 interrupted.
"""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from prime_jax.errors import FULL, UserError

INTERRUPTED, SAVED = 130, 85
SWALLOWED_SECONDS = 1.5  # after which a Ctrl-C that had no effect is given again
STUCK_SECONDS = 1.5  # a compilation is left that long after Ctrl-C
COMPILERS = ("jax/_src/compiler.py", "jax/_src/compilation_cache.py")  # their last frame is in C++
IMPORTED = "/jaxlib/"  # Python files that load C++
REPORT = "please report this to the maintainers with that file, which says what was run"


def guarded(run: Callable[[], int | None]) -> int:
    """The exit code of a command; whatever it raises is told on stderr.

    Ctrl-C ends it at any time: Python sees no signal while the compiler runs, so then a thread
    ends the process.
    """
    swallowed = threading.Event()
    try:
        with _interruptible(swallowed):
            _fit_streams()
            code = run() or 0
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return _quiet()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2 if stop.code else 0
    except Exception as error:
        if swallowed.is_set():  # a library made another error of Ctrl-C
            _say("interrupted")
            return INTERRUPTED
        return _told(error)


def interrupt(_: int, frame: FrameType | None) -> None:
    """Ctrl-C raises KeyboardInterrupt, but ends the process while JAX's C++ is being imported: an
    exception there would be thrown where C++ allows none."""
    while frame is not None:
        if IMPORTED in frame.f_code.co_filename:
            _say("interrupted")
            leave(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


interrupt.only_raises = True  # type: ignore[attr-defined]  # nobody needs to hand a signal on to it


def leave(code: int) -> NoReturn:
    """End the process here and now.

    Python's own way out of an interrupted JAX may crash in C++, or kill itself by SIGINT.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
            if stream.isatty():
                stream.write("\x1b[?25h")  # a bar may have hidden the cursor
                stream.flush()
    os._exit(code)


def _told(error: Exception) -> int:
    if isinstance(error, UserError):
        _say(" ".join(str(error).split("\n")))
        return 2
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in FULL:
            _say(f"the disk is full{_place(cause)}")
            return 2
    if isinstance(error, OSError) and error.errno and error.strerror:
        _say(f"{error.strerror}{_place(error)}")
        return 2
    _say(f"unforeseen {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
    with contextlib.suppress(OSError):
        handle, path = tempfile.mkstemp(prefix="prime-jax-", suffix=".txt", text=True)
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"{sys.argv}\n{''.join(traceback.format_exception(error))}")
        _say(f"the whole trace: {path}")
    _say(REPORT)
    return 1


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _place(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"prime-jax: {text}", file=sys.stderr, flush=True)


def _quiet() -> int:
    """Nobody reads any more; what is still in buffers goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fit_streams() -> None:
    """Streams that were closed are replaced, and characters that one lacks become `?`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif reconfigure := getattr(getattr(sys, name), "reconfigure", None):
            reconfigure(errors="replace")


@contextlib.contextmanager
def _interruptible(swallowed: threading.Event) -> Iterator[None]:
    """Within, Ctrl-C ends the process also where the compiler or a library would not let it.

    Args:
        swallowed: set when a library printed KeyboardInterrupt, as C does that imports numpy.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if plain := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if before != -1:  # an event loop's; it has its own way with Ctrl-C
        signal.set_wakeup_fd(before)
    ignored, printed = sys.unraisablehook, sys.excepthook

    def again(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):  # lost in a callback
            lost.set()
        else:
            ignored(unraisable)

    def silent(kind: type[BaseException], *rest: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            swallowed.set()
            lost.set()
        elif not struck.is_set():  # else an event loop complains that it was closed
            printed(kind, *rest)

    sys.unraisablehook, sys.excepthook = again, silent
    over, lost, struck = threading.Event(), threading.Event(), threading.Event()
    arguments = (reading, threading.get_ident(), over, lost, struck)
    threading.Thread(target=_watch, args=arguments, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if plain and signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook, sys.excepthook = ignored, printed
        if before == -1:
            signal.set_wakeup_fd(-1)
        os.close(writing)


def _watch(
    reading: int,
    main: int,
    over: threading.Event,
    lost: threading.Event,
    struck: threading.Event,
) -> None:
    with open(reading, "rb", buffering=0) as signals:
        while numbers := signals.read(64):
            if signal.SIGINT not in numbers:
                continue
            struck.set()
            plain = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, interrupt)
            if _stays_compiling(main):
                _say("interrupted while compiling")
                leave(INTERRUPTED)
            end = time.monotonic() + SWALLOWED_SECONDS
            while plain and not over.wait(0.05):
                if lost.is_set() or time.monotonic() > end:  # or a library has caught it
                    lost.clear()
                    signal.pthread_kill(main, signal.SIGINT)
                    break


def _stays_compiling(main: int) -> bool:
    end = time.monotonic() + STUCK_SECONDS
    while time.monotonic() < end:
        frame = sys._current_frames().get(main)
        if frame is None or not frame.f_code.co_filename.endswith(COMPILERS):
            return False
        time.sleep(0.05)
    return True
