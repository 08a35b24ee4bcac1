"""Locks and events that the conductor sees, and everything of `threading`, `queue` and `concurrent.futures` on top.

While :func:`patched` holds, `threading.Lock`, `RLock` and `Event` make observable ones, and threads started by a
controlled thread are controlled, too. Conditions, semaphores, barriers, queues, timers and thread pools are the
standard library's own Python code: they are built on those. In a thread that is not controlled the objects do what
plain ones do.
"""

from __future__ import annotations

import concurrent.futures.thread
import queue
import threading
import time
from _thread import allocate_lock, get_ident
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anabranch.explore import _conductor
from anabranch.explore._actor import controlled, fresh, local, plain
from anabranch.explore._conductor import Conductor
from anabranch.explore._dependence import ACQUIRE, AWAIT, NEED, READ, RELEASE, WRITE

_plain_rlock = threading.RLock


def _active() -> Conductor:
    conductor = _conductor.active
    assert conductor is not None
    return conductor


def _seconds(blocking: bool, timeout: float | None) -> float | None:
    if not blocking:
        if timeout is not None and timeout != -1:
            raise ValueError("can't specify a timeout for a non-blocking call")
        return 0.0
    if timeout is None or timeout == -1:
        return None
    if timeout < 0:
        raise ValueError("timeout value must be a non-negative number")
    return timeout


class Lock:
    """As `threading.Lock`. The plain lock inside says whether it is held, whoever holds it."""

    def __new__(cls, name: str = "") -> Any:
        return allocate_lock() if local.plain else super().__new__(cls)

    def __init__(self, name: str = "") -> None:
        self._inner = allocate_lock()
        self._id = fresh("lock")
        self._name = f"{self._id}:{name}" if name else self._id
        self._holder = ""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = controlled()
        if me is None:
            return self._inner.acquire(blocking, timeout)
        seconds = _seconds(blocking, timeout)
        inner, key = self._inner, f"lock:{self._id}"
        conductor = _active()
        if seconds == 0.0:
            conductor.point("try", f"try {self._name}", [(key, 0, 1, ACQUIRE), (f"try:{self._id}", 0, 1, WRITE)])
            if not inner.acquire(False):
                return False
        elif conductor.point(
            "lock",
            f"acquire {self._name}",
            [(key, 0, 1, ACQUIRE)],
            ready=lambda: not inner.locked(),
            timeout=seconds,
            why=lambda: f"held by {self._holder or 'a thread that is not controlled'}",
        ):
            inner.acquire(False)
        else:
            return False
        self._holder = me.name
        conductor.emit(f'{{"do":"lock","lock":"{self._id}","thread":"{me.name}"}}')
        return True

    def release(self) -> None:
        me = controlled()
        if me is not None:
            touches = [(f"lock:{self._id}", 0, 1, RELEASE), (f"try:{self._id}", 0, 1, WRITE)]
            conductor = _active()
            conductor.point("unlock", f"release {self._name}", touches)
            if self._inner.locked():
                conductor.emit(f'{{"do":"unlock","lock":"{self._id}","thread":"{me.name}"}}')
        self._holder = ""
        self._inner.release()

    def locked(self) -> bool:
        me = controlled()
        if me is not None:
            # Its answer changes with every acquire and release.
            touches = [(f"lock:{self._id}", 0, 1, ACQUIRE), (f"try:{self._id}", 0, 1, WRITE)]
            _active().point("poll", f"look at {self._name}", touches)
        return self._inner.locked()

    def _is_owned(self) -> bool:
        return self._inner.locked()

    def _release_save(self) -> None:
        self.release()

    def _acquire_restore(self, _: object) -> None:
        self.acquire()

    def _at_fork_reinit(self) -> None:
        self._inner = allocate_lock()
        self._holder = ""

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<{'locked' if self._inner.locked() else 'unlocked'} {self._name}>"


class RLock:
    """As `threading.RLock`: a :class:`Lock` whose owner may take it again; only the outermost of its acquires shows."""

    def __new__(cls, name: str = "") -> Any:
        return _plain_rlock() if local.plain else super().__new__(cls)

    def __init__(self, name: str = "") -> None:
        self._lock = Lock(name)
        self._owner: int | None = None
        self._depth = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._owner == get_ident():
            self._depth += 1
            return True
        if not self._lock.acquire(blocking, timeout):
            return False
        self._owner, self._depth = get_ident(), 1
        return True

    def release(self) -> None:
        if self._owner != get_ident():
            raise RuntimeError("cannot release un-acquired lock")
        if self._depth > 1:
            self._depth -= 1
        else:
            self._release_save()

    def _is_owned(self) -> bool:
        return self._owner == get_ident()

    def _release_save(self) -> int:
        # Still owned until the release is this thread's step.
        depth, lock = self._depth, self._lock
        me = controlled()
        if me is not None:
            touches = [(f"lock:{lock._id}", 0, 1, RELEASE), (f"try:{lock._id}", 0, 1, WRITE)]
            _active().point("unlock", f"release {lock._name}", touches)
            _active().emit(f'{{"do":"unlock","lock":"{lock._id}","thread":"{me.name}"}}')
        self._owner, self._depth = None, 0
        lock._holder = ""
        lock._inner.release()
        return depth

    def _acquire_restore(self, depth: int) -> None:
        self._lock.acquire()
        self._owner, self._depth = get_ident(), depth

    def _at_fork_reinit(self) -> None:
        self._lock._at_fork_reinit()
        self._owner, self._depth = None, 0

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


_PlainEvent = threading.Event


class Event(_PlainEvent):
    """As `threading.Event`; for controlled threads a flag of its own steps, without the lock inside."""

    def __init__(self, name: str = "") -> None:
        self._plain = bool(local.plain)
        with plain():
            super().__init__()
        self._id = "" if self._plain else fresh("event")
        self._name = f"{self._id}:{name}" if name else self._id

    def set(self) -> None:
        me = None if self._plain else controlled()
        if me is not None:
            _active().point("event", f"set {self._name}", [(f"event:{self._id}", 0, 1, WRITE)])
            _active().signal(self._id)
        with plain():
            super().set()

    def clear(self) -> None:
        if not self._plain and controlled() is not None:
            _active().point("event", f"clear {self._name}", [(f"event:{self._id}", 0, 1, WRITE)])
        with plain():
            super().clear()

    def is_set(self) -> bool:
        if not self._plain and controlled() is not None:
            _active().point("poll", f"look at {self._name}", [(f"event:{self._id}", 0, 1, READ)])
            if self._flag:  # type: ignore[attr-defined]
                _active().awaited(self._id)
        return super().is_set()

    def wait(self, timeout: float | None = None) -> bool:
        if self._plain or controlled() is None:
            with plain():
                return super().wait(timeout)
        if timeout is not None and timeout <= 0:
            return self.is_set()
        happened = _active().point(
            "wait",
            f"wait for {self._name}",
            [(f"event:{self._id}", 0, 1, AWAIT)],
            ready=lambda: self._flag,  # type: ignore[attr-defined]
            timeout=timeout,
            why=lambda: "not set",
        )
        if happened:
            _active().awaited(self._id)
        return happened


class SimpleQueue:
    """As `queue.SimpleQueue`, which is C: unbounded, first in first out."""

    def __init__(self) -> None:
        with plain():
            self._queue: queue.Queue[Any] = queue.Queue()
        self._id = fresh("queue")

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if controlled() is not None:
            _active().point("queue", f"put into {self._id}", [(f"queue:{self._id}", 0, 1, WRITE)])
            _active().signal(self._id)
        with plain():
            self._queue.put(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if timeout is not None and timeout < 0:
            raise ValueError("'timeout' must be a non-negative number")
        if controlled() is None:
            with plain():
                return self._queue.get(block, timeout)
        key, got, label = f"queue:{self._id}", f"got:{self._id}", f"get from {self._id}"
        if not block or timeout == 0:
            _active().point("try", label, [(key, 0, 1, WRITE), (got, 0, 1, WRITE)])
        else:
            touches = [(key, 0, 1, AWAIT), (got, 0, 1, WRITE)]
            ready = self._queue.queue.__len__
            if not _active().point("wait", label, touches, ready=lambda: ready() > 0, timeout=timeout):
                raise queue.Empty
        with plain():
            item = self._queue.get_nowait()
        _active().awaited(self._id)
        return item

    def put_nowait(self, item: Any) -> None:
        self.put(item)

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return self.qsize() == 0

    def qsize(self) -> int:
        if controlled() is not None:
            _active().point("poll", f"look at {self._id}", [(f"queue:{self._id}", 0, 1, READ)])
        return len(self._queue.queue)


_start, _join, _is_alive = threading.Thread.start, threading.Thread.join, threading.Thread.is_alive


def _thread_start(thread: threading.Thread) -> None:
    if controlled() is None:
        with plain():
            _start(thread)
    else:
        _active().start(thread, lambda: _start(thread))


def _thread_join(thread: threading.Thread, timeout: float | None = None) -> None:
    me, actor = controlled(), getattr(thread, "_anabranch_actor", None)
    if me is None or actor is None:
        with plain():
            _join(thread, timeout)
        return
    if actor is me:
        raise RuntimeError("cannot join current thread")
    ended = _active().point(
        "join",
        f"join {actor.name}",
        [(f"j{actor.name}", 0, 1, NEED)],
        ready=lambda: actor.ended,
        timeout=timeout,
        why=lambda: "which has not ended",
    )
    if ended:
        _active().emit(f'{{"do":"join","of":"{actor.name}","thread":"{me.name}"}}')
        with plain():
            _join(thread)


def _thread_is_alive(thread: threading.Thread) -> bool:
    actor = getattr(thread, "_anabranch_actor", None)
    if controlled() is None or actor is None:
        return _is_alive(thread)
    _active().point("poll", f"look at {actor.name}", [(f"alive:{actor.name}", 0, 1, READ)])
    return not actor.ended


_init = threading.Thread.__init__


def _thread_init(thread: threading.Thread, *args: Any, **kwargs: Any) -> None:
    # What a thread needs to begin and to end is no business of the program.
    with plain():
        _init(thread, *args, **kwargs)


_sleep, _monotonic = time.sleep, time.monotonic
_origin = _monotonic()


def _observable_sleep(seconds: float) -> None:
    if controlled() is None:
        _sleep(seconds)
        return
    _active().point("sleep", "sleep", [])
    _active().elapse(seconds)


def _observable_monotonic() -> float:
    return _monotonic() if controlled() is None else _origin + _active().now


class _Ordered(dict[threading.Thread, None]):
    """A pool's set of threads: it is joined in their order, not in that of their addresses."""

    def add(self, thread: threading.Thread) -> None:
        self[thread] = None


_pool_init = concurrent.futures.ThreadPoolExecutor.__init__


def _observable_pool_init(pool: Any, *args: Any, **kwargs: Any) -> None:
    _pool_init(pool, *args, **kwargs)
    pool._threads = _Ordered()


_PLACES: list[tuple[Any, str, Any]] = [
    (threading, "Lock", Lock),
    (threading, "_allocate_lock", Lock),
    (threading, "RLock", RLock),
    (threading, "Event", Event),
    (threading, "_time", _observable_monotonic),
    (threading.Thread, "__init__", _thread_init),
    (threading.Thread, "start", _thread_start),
    (threading.Thread, "join", _thread_join),
    (threading.Thread, "is_alive", _thread_is_alive),
    (time, "sleep", _observable_sleep),
    (time, "monotonic", _observable_monotonic),
    (queue, "time", _observable_monotonic),
    (queue, "SimpleQueue", SimpleQueue),
    (concurrent.futures.ThreadPoolExecutor, "__init__", _observable_pool_init),
]


#: In place of the lock that is held while a pool hands over work: that one blocks behind the conductor's back.
_POOLS = Lock("pools")


@contextmanager
def patched() -> Iterator[None]:
    """Locks, events and threads that are made meanwhile, anywhere in the process, are observable."""
    if vars(threading)["Lock"] is Lock:
        yield
        return
    before = [(where, name, getattr(where, name)) for where, name, _ in _PLACES]
    pool: Any = concurrent.futures.thread
    global_lock = pool._global_shutdown_lock
    for where, name, ours in _PLACES:
        setattr(where, name, ours)
    pool._global_shutdown_lock = _POOLS
    try:
        yield
    finally:
        pool._global_shutdown_lock = global_lock
        for where, name, theirs in before:
            setattr(where, name, theirs)


def end_pools() -> None:
    """What the interpreter does at its exit: tell the workers of pools that nobody shut down to end, and join them."""
    pool: Any = concurrent.futures.thread
    if pool._threads_queues:
        pool._python_exit()


__all__ = ["Event", "Lock", "RLock", "end_pools", "patched"]
