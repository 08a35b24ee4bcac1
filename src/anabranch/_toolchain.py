"""Builds this package's C++ at first use. One function, :func:`build`; it knows nothing of what it builds.

A library is kept in the user's cache under a name made from its sources, the compiler and the flags, so a change in
any of them builds anew. A library that somebody else than the user could have written is not loaded
(:mod:`anabranch._trust`), but built again in its place. Processes that want to build at once do it one after the other,
and find what the first one made.
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

from anabranch import _trust
from anabranch.errors import BuildError

#: Flags of every build; a caller's flags come after them and win.
BASE_FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror")


def build(
    name: str,
    sources: Sequence[Path],
    *,
    beside: Sequence[Path] = (),
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
    headers: Sequence[Path] = (),
    shared: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Compile ``sources`` and return the path of the library (or, with ``shared=False``, of the program).

    The sources are compiled as one translation unit, so that headers which they share are read once: names in their
    anonymous namespaces must differ. Those of ``beside`` are a second unit, compiled at the same time.

    ``libraries`` are the linker's arguments. Returns at once when an equal build is in the cache. Headers beside the
    sources (``*.h``) and those of ``headers`` count as sources for that comparison. ``progress`` gets one line before a
    compilation and one after it; by default they go to stderr. Safe in many threads and processes at once.

    Raises :class:`~anabranch.errors.BuildError` when there is no compiler, when it fails (its output is in the
    message), when the cache cannot be written, or when others than the user can write to it.
    """
    say = progress or _to_stderr
    units = [unit for unit in (sources, beside) if unit]
    own = [source for unit in units for source in unit]
    files = sorted({*own, *headers, *(h for s in own for h in s.parent.glob("*.h"))})
    compiler = _compiler()
    options = [*BASE_FLAGS, *(["-shared"] if shared else []), *flags]
    digest = hashlib.sha256()
    for part in (*compiler, _version(compiler), *options, *libraries, sysconfig.get_platform(), str(len(sources))):
        digest.update(part.encode() + b"\0")
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    target = cache_folder() / f"{name}-{digest.hexdigest()[:20]}{'.so' if shared else ''}"
    if _is_kept(target):
        return target

    try:
        _prepare(target.parent)
        handle, partial = tempfile.mkstemp(prefix=f".{name}-", dir=target.parent)
    except OSError as error:
        raise BuildError(
            f"cannot write to {target.parent} ({error.strerror}); set XDG_CACHE_HOME to a folder that you can write to"
        ) from error
    os.close(handle)
    try:
        with _alone(target.parent):
            if _is_kept(target, say):  # another process was building it meanwhile
                return target
            say(f"anabranch: compiling {name} (once for this version; kept in {target.parent})")
            started = time.perf_counter()  # no clock of an explorer
            # What the compiler writes has another name until it is whole: a reader sees all of it or nothing.
            _compile(name, [*compiler, *options], units, libraries, partial)
            os.chmod(partial, 0o700)
            try:
                os.replace(partial, target)
            except OSError as error:
                raise BuildError(f"cannot write {target} ({error.strerror}); remove what is there") from error
            why = _trust.objection(target, cache_root())
            if why:  # a file system that gives files to somebody else, as NFS gives root's to nobody
                raise BuildError(f"{why}; or set XDG_CACHE_HOME to a folder of your own")
            say(f"anabranch: compiled {name} in {time.perf_counter() - started:.1f} s")
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def _is_kept(library: Path, say: Callable[[str], None] | None = None) -> bool:
    """Whether ``library`` is in the cache and may be loaded; ``say`` gets the reason where it is there and may not."""
    try:
        why = _trust.objection(library, cache_root())
    except OSError:  # not there
        return False
    if why and say:
        say(f"anabranch: not loaded, and compiled anew: {why}")
    return why is None


def _prepare(folder: Path) -> None:
    """Make the cache's ``folder``, or make sure that only the user can write to it. Raises OSError and BuildError."""
    root = cache_root()
    _trust.make_folders(folder, root)
    with _alone(folder):
        if _trust.close_folders(folder, root):
            for file in folder.iterdir():
                with suppress(IsADirectoryError):
                    file.unlink(missing_ok=True)
    why = _trust.folder_objection(folder, root)
    if why:
        raise BuildError(
            f"compiled libraries are not kept where others can exchange them: {why}; or set XDG_CACHE_HOME to a folder "
            "that only you can write to"
        )


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


def _compile(
    name: str, compiler: list[str], units: Sequence[Sequence[Path]], libraries: Sequence[str], target: str
) -> None:
    with tempfile.TemporaryDirectory(prefix="anabranch-") as folder:
        objects = [str(Path(folder) / f"{i}.o") for i in range(len(units))]
        commands = []
        for unit, made in zip(units, objects, strict=True):
            included = [word for source in unit for word in ("-include", str(source.absolute()))]
            options = [word for word in compiler if word != "-shared"]
            commands.append([*options, *included, "-c", "-x", "c++", os.devnull, "-o", made])
        # A compiler is a process of its own: threads do to run several.
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for _ in pool.map(_run, commands, [name] * len(commands)):
                pass
        _run([*compiler, *objects, *libraries, "-o", target], name)


def _run(command: Sequence[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(
            f"compiling {name} failed; expected a compiler for C++20. Name one in CXX. The command and what it said:\n"
            f"  {shlex.join(command)}\n{done.stderr.strip()[-4000:]}"
        )


def cache_root() -> Path:
    """The folder for all programs' caches: ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification asks to ignore a relative path there.
    return Path(base) if os.path.isabs(base) else Path.home() / ".cache"


def cache_folder() -> Path:
    """Where builds are kept: ``anabranch/native`` in :func:`cache_root`."""
    return cache_root() / "anabranch" / "native"


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
        raise BuildError(
            f"{shlex.join(compiler)} --version failed: {done.stderr.strip()[-400:]}; name a C++ compiler in CXX"
        )
    return done.stdout


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
