"""How a command ends: with its exit status and a line, not with a traceback, and not never.

Statuses are the same for every command: 0 right, 1 something is wrong, 2 it could not be judged (or was used wrongly),
130 interrupted. ``anabranch explore`` adds 3: no failure, but not every schedule was tried.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

RIGHT, WRONG, NOT_JUDGED, INTERRUPTED = 0, 1, 2, 130
#: Seconds after Ctrl-C in which a command may end by itself. Threads that wait for each other may never do so.
_GRACE = 5.0
#: Set to anything: show where an unexpected error was raised.
_VARIABLE = "ANABRANCH_TRACEBACK"


def run(name: str, body: Callable[[], Any]) -> NoReturn:
    """Run a command's body and exit: with the status that it returns or exits with, 0 for None.

    An error is a line on stderr and status 2. Ctrl-C is status 130, at the latest after five seconds. Output that
    nobody reads any more (``| head``) is dropped, and changes no status.
    """
    with _streams(), _interruptible(name):
        status = _run(name, body)
        try:
            sys.stdout.flush()
        except OSError as e:
            status = _say(name, f"the output cannot be written: {e.strerror}")
        if status == INTERRUPTED:
            _leave(INTERRUPTED)  # whatever was interrupted may hold threads for which the interpreter would wait
        sys.exit(status)


def _run(name: str, body: Callable[[], Any]) -> int:
    try:
        status = body()
        return status if isinstance(status, int) else RIGHT
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return e.code or RIGHT
        return _say(name, str(e.code))
    except click.ClickException as e:
        e.show()
        return NOT_JUDGED
    except (KeyboardInterrupt, click.Abort):
        _say(name, "interrupted")
        return INTERRUPTED
    except Exception as e:
        return _report(name, e)


def refuse(name: str, error: Exception | str) -> NoReturn:
    """Exit with status 2 and a line."""
    sys.exit(_report(name, error))


def _report(name: str, error: Exception | str) -> int:
    from anabranch.errors import AnabranchError

    if isinstance(error, str):
        return _say(name, error)
    if os.environ.get(_VARIABLE):
        traceback.print_exception(error)
    hint = "" if isinstance(error, AnabranchError) else f". {_VARIABLE}=1 shows where it was raised"
    return _say(name, described(error) + hint)


def described(error: BaseException) -> str:
    """One line: the type, unless it is one of this project's, the message, and the user's line that it came from."""
    from anabranch.errors import AnabranchError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, AnabranchError):
        return str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    where = user_line(error)
    return f"{text[:400]}{f' ({where})' if where else ''}"


def user_line(error: BaseException) -> str:
    """``file:line`` of the innermost frame that is neither Python's, nor an installed package's, nor this one's."""
    ours = str(Path(__file__).parent) + os.sep
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if not (file.startswith((ours, "<", sys.base_prefix)) or f"{os.sep}site-packages{os.sep}" in file):
            found = f"{file}:{line}"
    return found


def _say(name: str, message: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"{name}: {message}", err=True)
    return NOT_JUDGED


def _leave(status: int) -> NoReturn:
    """End the process at once; what was printed is printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def refuse_unwritable(path: Path, *, parents: bool = False) -> None:
    """Raise :class:`~anabranch.errors.InputError` where a file cannot be written there, before any work is done for it.

    ``parents``: its folders are made, as they will be when it is written."""
    from anabranch.errors import InputError

    there = path.exists()
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
        if not there:
            path.unlink()
    except OSError as e:
        raise InputError(f"{path} cannot be written: {e.strerror}; name another file") from e


def give_up(name: str, message: str, status: int = NOT_JUDGED) -> NoReturn:
    """End the process now, from any thread, with a line. For where nothing can be raised, or nobody would catch it."""
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # a progress bar hides the cursor
    _say(name, message)
    _leave(status)


# -- Ctrl-C and what hangs --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _interruptible(name: str) -> Iterator[None]:
    """Ctrl-C ends the process even where the main thread does not come back to Python."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # The signal's number arrives here whatever the main thread does.
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while True:
            try:
                data = os.read(reader, 1)
            except OSError:
                return
            if not data:
                return
            if data[0] == signal.SIGINT:
                time.sleep(_GRACE)
                give_up(name, "interrupted", INTERRUPTED)

    threading.Thread(target=watch, name="anabranch-interrupt", daemon=True).start()
    try:
        yield
    finally:
        # A command that was interrupted does not come here, nor does the thread then stop: it ends the process.
        signal.set_wakeup_fd(before)
        os.close(writer)


class Patience:
    """Ends the process with status 2 where :meth:`beat` is not called for ``seconds``: what a user's model does may
    never end, and neither Python nor a device can be told to stop it."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name, self._seconds = name, seconds
        self._doing = ""
        self._over = threading.Event()
        self._last = time.monotonic()

    def beat(self, doing: str) -> None:
        """Something happened; from now on the command is ``doing`` that."""
        self._doing, self._last = doing, time.monotonic()

    def __enter__(self) -> Patience:
        threading.Thread(target=self._watch, name="anabranch-patience", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(max(0.05, self._last + self._seconds - time.monotonic())):
            if time.monotonic() - self._last >= self._seconds:
                frames = sys._current_frames().get(threading.main_thread().ident or 0)
                at = traceback.extract_stack(frames)[-1] if frames else None
                give_up(
                    self._name,
                    f"nothing happened for {self._seconds:g} s while {self._doing}"
                    + (f" (the main thread is at {at.filename}:{at.lineno})" if at else "")
                    + "; --patience gives it longer",
                )


# -- streams that nobody reads ----------------------------------------------------------------------------------------


class _Stream:
    """A text stream whose reader may go away: what is written afterwards is dropped."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def write(self, text: str) -> int:
        with self._open():
            self._inner.write(text)
        return len(text)

    def flush(self) -> None:
        with self._open():
            self._inner.flush()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.ESHUTDOWN):
                raise
            # What is still in buffers goes there, too, instead of into an error at exit.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._inner.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    # Python has none where the descriptor was closed (>&-).
    sys.stdout, sys.stderr = (
        _Stream(stream) if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        for stream in before
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
