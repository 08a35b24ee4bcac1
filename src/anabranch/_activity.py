"""What the calling thread is doing, as the runtimes say it: it is in a call of an engine; it is building something.

A call must not wait for the device on the host, except while it builds. The explorer's oracle ``host-wait`` asks here.

Threads: any; each knows of itself alone, without a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Thread(threading.local):
    calls = 0
    builds = 0


_thread = _Thread()
_also: list[Callable[[], bool]] = []


def begin_call() -> int:
    """The calling thread has entered a call. Calls may be nested; each needs its :func:`end_call`. Returns how many it
    is in now."""
    _thread.calls += 1
    return _thread.calls


def end_call() -> int:
    """The call that this thread entered last has ended. Returns how many it is still in: those that made this one."""
    _thread.calls -= 1
    return _thread.calls


def also_in_call(ask: Callable[[], bool]) -> None:
    """Calls that do not come by :func:`begin_call`: ``ask()`` says whether the calling thread is in one."""
    _also.append(ask)


@contextmanager
def building() -> Iterator[None]:
    """In here the calling thread builds, warms up or frees: it may wait for the device, even in a call."""
    _thread.builds += 1
    try:
        yield
    finally:
        _thread.builds -= 1


def in_call() -> bool:
    """Whether the calling thread is in a call."""
    return _thread.calls > 0 or any(ask() for ask in _also)


def is_building() -> bool:
    """Whether the calling thread is inside :func:`building`."""
    return _thread.builds > 0
