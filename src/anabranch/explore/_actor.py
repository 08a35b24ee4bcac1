"""Threads as actors: who the calling thread is, and what it calls the things that it makes."""

from __future__ import annotations

import threading
from _thread import allocate_lock
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from anabranch.explore._dependence import Touch


class Actor:
    """A controlled thread. ``ready`` says whether its pending step is enabled (None: it always is)."""

    __slots__ = (
        "baton",
        "children",
        "daemon",
        "deadline",
        "ended",
        "index",
        "kind",
        "label",
        "made",
        "name",
        "ready",
        "thread",
        "timed_out",
        "touches",
        "why",
    )

    def __init__(self, name: str, index: int, thread: threading.Thread, label: str, touches: list[Touch]) -> None:
        self.name = name
        self.index = index
        self.thread = thread
        self.daemon = thread.daemon
        self.baton = allocate_lock()
        self.baton.acquire()
        self.kind = "begin"
        self.label = label
        self.touches = touches
        self.ready: Callable[[], bool] | None = None
        self.why: Callable[[], str] | None = None
        self.deadline: float | None = None
        self.timed_out = False
        self.ended = False
        self.children = 0
        self.made = 0


class _Local(threading.local):
    actor: Actor | None = None
    plain = 0


local = _Local()


def controlled() -> Actor | None:
    """The calling thread as an actor; None where it is not controlled, or is inside :func:`plain`."""
    return None if local.plain else local.actor


@contextmanager
def plain() -> Iterator[None]:
    """In here the calling thread makes and uses plain locks, and no points."""
    local.plain += 1
    try:
        yield
    finally:
        local.plain -= 1


@contextmanager
def observable() -> Iterator[None]:
    """The opposite of :func:`plain`, inside one."""
    before, local.plain = local.plain, 0
    try:
        yield
    finally:
        local.plain = before


_unowned = 0
#: Where the numbers begin of what a forked child makes before it is controlled: whatever its parent did before.
_CHILD = 1000


@contextmanager
def child_names() -> Iterator[None]:
    """Around a fork."""
    global _unowned
    before, _unowned = _unowned, _CHILD * (1 + _unowned // _CHILD)
    try:
        yield
    finally:
        _unowned = before


def fresh(kind: str) -> str:
    """A name for something that the calling thread makes: the same in every schedule that is equal up to there."""
    global _unowned
    actor = local.actor
    if actor is None:
        _unowned += 1
        return f"{kind}{_unowned}"
    actor.made += 1
    return f"{kind}{actor.name[1:]}.{actor.made}"
