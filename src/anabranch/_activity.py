"""What the calling thread is doing, as the runtimes say it: it is in a call of an engine; it is building something.

A call must not wait for the device on the host, except while it builds. The explorer's oracle ``host-wait`` asks here.

Threads: any; each knows of itself alone, without a lock. Nothing is counted that an interrupt could leave counted: a
call is seen by its frame on the stack, and a thread builds while it owns a lock that nobody else ever sees, which takes
and gives back in one step of the interpreter.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType, FrameType
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Thread(threading.local):
    def __init__(self) -> None:
        self.builds: Any = threading.RLock()


_thread = _Thread()
_calls: list[CodeType] = []
_also: list[Callable[[], bool]] = []


def call(function: _Function) -> _Function:
    """Decorator: while ``function`` runs, its thread is in a call. Costs a call nothing."""
    _calls.append(function.__code__)
    return function


def calls_on(frame: FrameType | None) -> int:
    """How many calls are under way on the stack whose innermost frame this is."""
    calls = 0
    while frame is not None:
        calls += any(frame.f_code is code for code in _calls)
        frame = frame.f_back
    return calls


def also_in_call(ask: Callable[[], bool]) -> None:
    """Calls that are no :func:`call`'s: ``ask()`` says whether the calling thread is in one."""
    _also.append(ask)


def in_call() -> bool:
    """Whether the calling thread is in a call."""
    return calls_on(sys._getframe(1)) > 0 or any(ask() for ask in _also)


def building() -> AbstractContextManager[Any]:
    """In here the calling thread builds, warms up or frees: it may wait for the device, even in a call."""
    return cast("AbstractContextManager[Any]", _thread.builds)


def is_building() -> bool:
    """Whether the calling thread is inside :func:`building`."""
    return bool(_thread.builds._is_owned())
