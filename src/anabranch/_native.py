"""Builds this package's C++ at first use. One function, :func:`build`; it knows nothing of what it builds.

A library is kept in the user's cache under a name made from its sources, the compiler and the flags, so a change in
any of them builds anew and nothing is ever rebuilt in place. Processes that want to build at once do it one after the
other, and find what the first one made.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from anabranch.errors import BuildError

#: Flags of every build; a caller's flags come after them and win.
BASE_FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror")


def build(
    name: str,
    sources: Sequence[Path],
    *,
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
    headers: Sequence[Path] = (),
    shared: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Compile ``sources`` and return the path of the library (or, with ``shared=False``, of the program).

    ``libraries`` are the linker's arguments. Returns at once when an equal build is in the cache. Headers beside the
    sources (``*.h``) and those of ``headers`` count as sources for that comparison. ``progress`` gets one line before a
    compilation and one after it; by default they go to stderr. Safe in many threads and processes at once.

    Raises :class:`~anabranch.errors.BuildError` when there is no compiler, when it fails (its output is in the
    message), or when the cache cannot be written.
    """
    say = progress or _to_stderr
    files = sorted({*sources, *headers, *(h for s in sources for h in s.parent.glob("*.h"))})
    compiler = _compiler()
    options = [*BASE_FLAGS, *(["-shared"] if shared else []), *flags]
    digest = hashlib.sha256()
    for part in (*compiler, _version(compiler), *options, *libraries, sysconfig.get_platform()):
        digest.update(part.encode() + b"\0")
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    target = cache_folder() / f"{name}-{digest.hexdigest()[:20]}{'.so' if shared else ''}"
    if target.exists():
        return target

    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, partial = tempfile.mkstemp(prefix=f".{name}-", dir=target.parent)
    except OSError as error:
        raise BuildError(
            f"cannot write to {target.parent} ({error.strerror}); set XDG_CACHE_HOME to a folder that you can write to"
        ) from error
    os.close(handle)
    try:
        with _alone(target.parent):
            if target.exists():  # another process was building it meanwhile
                return target
            say(f"anabranch: compiling {name} (once for this version; kept in {target.parent})")
            started = time.monotonic()
            # What the compiler writes has another name until it is whole: a reader sees all of it or nothing.
            _compile(name, [*compiler, *options], sources, libraries, partial)
            os.chmod(partial, 0o700)
            os.replace(partial, target)
            say(f"anabranch: compiled {name} in {time.monotonic() - started:.1f} s")
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One build at a time in ``folder``: a second one would most likely make the same library, and slow down both."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Where the file system knows no locks, both build: the result is the same.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _compile(name: str, compiler: list[str], sources: Sequence[Path], libraries: Sequence[str], target: str) -> None:
    with tempfile.TemporaryDirectory(prefix="anabranch-") as folder:
        objects = [str(Path(folder) / f"{i}.o") for i in range(len(sources))]
        commands = [
            [*(word for word in compiler if word != "-shared"), "-c", str(source), "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        # A compiler is a process of its own: threads do to run several.
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for _ in pool.map(_run, commands, [name] * len(commands)):
                pass
        _run([*compiler, *objects, *libraries, "-o", target], name)


def _run(command: Sequence[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"compiling {name} failed:\n  {shlex.join(command)}\n{done.stderr.strip()[-4000:]}")


def cache_folder() -> Path:
    """Where builds are kept: ``$XDG_CACHE_HOME/anabranch/native``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification asks to ignore a relative path there.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "anabranch" / "native"


def _compiler() -> list[str]:
    given = os.environ.get("CXX")
    if given:
        words = shlex.split(given)
        if words and shutil.which(words[0]):
            return words
        raise BuildError(f"CXX is {given!r}, and there is no such program; unset it or name a C++17 compiler")
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found]
    raise BuildError(
        "anabranch compiles its C++ core at first use and found no compiler (looked for c++, g++, clang++); install "
        "one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda install gxx), or set CXX"
    )


def _version(compiler: list[str]) -> str:
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(compiler)} --version failed: {done.stderr.strip()[-400:]}")
    return done.stdout


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
