"""What threads share, declared once: every lock, and every container or attribute that they touch without one.

In production the functions here return the plain objects (``threading.Lock``, ``dict``, ...) and :func:`atomics` only
takes a note: a declaration costs nothing after the object is made. The explorer installs :class:`Factories` of its own,
whose objects tell it of each access, so that it can try the other orders.

What may be shared without a lock, because one bytecode or one C call does it: getting, setting and removing an item of
a dict; ``append``, ``pop``, ``popleft`` and truth of a list or a deque; ``add`` and ``discard`` of a set; loading and
storing an attribute. Two accesses conflict where they touch the same key or element (or one looks at the whole) and
one of them changes it. ``list(d.items())`` is one access, to the whole.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)


class Tally:
    """Named counts. Additions commute: in whatever order threads make them, the counts come out the same.

    Threads: any; one lock, held while nothing else is called.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._counts = dict.fromkeys(keys, 0)
        self._lock = threading.Lock()

    def add(self, *keys: str) -> None:
        """One more of each."""
        with self._lock:
            for key in keys:
                self._counts[key] += 1

    def read(self) -> dict[str, int]:
        """All counts as of one moment."""
        with self._lock:
            return dict(self._counts)

    def renew_lock(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()


class Factories:
    """Makes the shared objects; ``name`` says in reports what an object is for. These make the plain ones."""

    def lock(self, name: str) -> Any:
        return threading.Lock()

    def rlock(self, name: str) -> Any:
        return threading.RLock()

    def event(self, name: str) -> Any:
        return threading.Event()

    def dict_(self, name: str) -> Any:
        return {}

    def deque_(self, name: str) -> Any:
        return deque()

    def list_(self, name: str) -> Any:
        return []

    def set_(self, name: str) -> Any:
        return set()

    def tally(self, name: str, keys: Iterable[str]) -> Any:
        return Tally(keys)

    def observer(self) -> Any:
        """Makes the locks, events and atomics of the native runtime (see its ``sync.h``); None: plain ones."""
        return None

    def atomics(self, owner: type, names: tuple[str, ...]) -> None:
        """Threads load and store these attributes of ``owner``'s instances without a lock."""


_PLAIN = Factories()
_factories = _PLAIN
#: Every class that was declared with :func:`atomics`, and which attributes.
_atomics: list[tuple[type, tuple[str, ...]]] = []
_listeners: list[Callable[[Factories], None]] = []
_renewals: list[Callable[[], None]] = []


def install(factories: Factories | None) -> None:
    """Make what is made from now on with ``factories`` (None: the plain ones), which hears of all :func:`atomics`.

    What was made before stays as it is; see :func:`renew` for what a process has one of.
    """
    global _factories
    _factories = factories or _PLAIN
    for owner, names in _atomics:
        _factories.atomics(owner, names)
    for listener in _listeners:
        listener(_factories)


def on_install(listener: Callable[[Factories], None]) -> None:
    """Call ``listener`` with the factories now and whenever others are installed."""
    _listeners.append(listener)
    listener(_factories)


def renew() -> None:
    """Make what a process has one of (its build lock, say) anew, with the factories that are installed now.

    Nothing may hold any of it, in any thread.
    """
    for make in _renewals:
        make()


def on_renew(make: Callable[[], None]) -> None:
    """Have :func:`renew` call ``make``, which makes such objects anew."""
    _renewals.append(make)


def lock(name: str) -> threading.Lock:
    made: threading.Lock = _factories.lock(name)
    return made


def rlock(name: str) -> Any:  # threading.RLock is a function in some versions' stubs
    return _factories.rlock(name)


def event(name: str) -> threading.Event:
    made: threading.Event = _factories.event(name)
    return made


def dict_(name: str) -> dict[Any, Any]:
    made: dict[Any, Any] = _factories.dict_(name)
    return made


def deque_(name: str) -> deque[Any]:
    made: deque[Any] = _factories.deque_(name)
    return made


def list_(name: str) -> list[Any]:
    made: list[Any] = _factories.list_(name)
    return made


def set_(name: str) -> set[Any]:
    made: set[Any] = _factories.set_(name)
    return made


def tally(name: str, keys: Iterable[str]) -> Tally:
    made: Tally = _factories.tally(name, keys)
    return made


def atomics(*names: str) -> Callable[[_Class], _Class]:
    """Class decorator: threads load and store these attributes of an instance without a lock."""

    def declare(owner: _Class) -> _Class:
        _atomics.append((owner, names))
        _factories.atomics(owner, names)
        return owner

    return declare
