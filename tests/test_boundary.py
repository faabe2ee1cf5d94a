"""Where errors and signals end: one line, an exit code, and never a trace on the terminal."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prime_jax.cli import boundary
from prime_jax.errors import UserError


def raised(error: BaseException, capsys) -> tuple[int, list[str]]:
    def run():
        raise error

    code = boundary.guarded(run)
    return code, capsys.readouterr().err.splitlines()


def caused(cause: Exception) -> Exception:
    error = ValueError("while saving")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\nlines"), 2, "prime-jax: two lines"),
        (OSError(errno.ENOSPC, "No space left", "/a/b"), 2, "prime-jax: the disk is full: /a/b"),
        (caused(OSError(errno.ENOSPC, "No space")), 2, "prime-jax: the disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            2,
            "prime-jax: Permission denied: x",
        ),
        (KeyboardInterrupt(), 130, "prime-jax: interrupted"),
    ],
)
def test_what_is_foreseen_is_one_line(error, code, line, capsys):
    assert raised(error, capsys) == (code, [line])


def test_what_is_not_is_three_lines_and_a_file(capsys):
    code, lines = raised(RuntimeError("no such luck\nsecond line"), capsys)
    assert code == 1
    assert lines[0] == "prime-jax: unforeseen RuntimeError: no such luck"
    trace = Path(lines[1].rpartition(": ")[2])
    assert "in run" in trace.read_text()
    trace.unlink()
    assert "report" in lines[2]
    assert len(lines) == 3


# As in a terminal: what a shell starts in the background ignores Ctrl-C.
LISTENING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def python(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LISTENING + code],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_closed_pipe_is_quiet():
    reading, writing = os.pipe()
    os.close(reading)
    code = "from prime_jax.cli import main; raise SystemExit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_under_stdout_is_a_line():
    code = "from prime_jax.cli import main; raise SystemExit(main(['--help']))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith(b"prime-jax: the disk is full")


def test_words_that_are_not_utf8_are_a_line():
    code = "from prime_jax.cli import main; raise SystemExit(main())"
    words = [sys.executable, "-c", code, b"train", b"\xff"]
    done = subprocess.run(words, capture_output=True)
    assert done.returncode == 2
    assert b"argument 2 is not UTF-8" in done.stderr


WAITING = """
import time
from prime_jax.cli import boundary
def run():
    print("ready", flush=True)
    time.sleep(60)
raise SystemExit(boundary.guarded(run))
"""
# A frame of JAX's compiler whose C does not return when a signal comes.
COMPILING = """
import hashlib, signal
from prime_jax.cli import boundary
def run():
    signal.signal(signal.SIGINT, lambda *_: None)  # a run that would save and leave
    names = {"hashlib": hashlib}
    source = "def f():\\n    hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2 * 10**9)"
    exec(compile(source, "site-packages/jax/_src/compiler.py", "exec"), names)
    print("ready", flush=True)
    names["f"]()
raise SystemExit(boundary.guarded(run))
"""
SWALLOWING = WAITING.replace(
    "    time.sleep(60)",
    """
    try:
        time.sleep(60)
    except BaseException:
        pass
    time.sleep(60)""",
)


PRINTING = WAITING.replace(
    "    time.sleep(60)",
    """
    try:
        time.sleep(60)
    except BaseException:
        import sys
        sys.excepthook(*sys.exc_info())  # as C that imports numpy
        raise ImportError("numpy failed to import") from None""",
)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (PRINTING, "interrupted\n"),
        (WAITING, "interrupted\n"),
        (SWALLOWING, "interrupted\n"),
        (COMPILING, "interrupted while compiling\n"),
    ],
)
def test_ctrl_c_is_one_line_within_seconds(code, says):
    process = python(code)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, told) == (130, f"prime-jax: {says}")
    assert time.monotonic() - began < 10  # two seconds, on a machine that has other work
