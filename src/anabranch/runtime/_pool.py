"""The context pool: gives a call a context that nothing else is using."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from anabranch import _sync
from anabranch.devices import Event, Stream
from anabranch.runtime._process import process


class Pooled(Protocol):
    """What a pool hands out: a context, or anything else that one call at a time may use."""

    nbytes: int
    used_on: int | None
    done: Event


_P = TypeVar("_P", bound=Pooled)


#: What was discarded and of which nothing says when the device is done with it.
_never_freed: list[Any] = []


class Limits:
    """How many contexts and bytes one engine may hold, over all its signatures.

    Threads: any. ``_lock`` is a leaf: nothing is called with it held. :meth:`forget` runs in garbage collections, so it
    takes no lock: what it says is settled at the next :meth:`reserve`.
    """

    def __init__(self, max_contexts: int, memory_limit: int | None) -> None:
        self.max_contexts = max_contexts
        self.memory_limit = memory_limit
        self._lock = _sync.lock("limits")
        self._contexts = 0
        self._bytes = 0
        self._forgotten: deque[int] = _sync.deque_("forgotten")
        process.register(self)

    def reserve(self, nbytes: int) -> bool:
        """Make room for one more context of about ``nbytes``; False if a limit forbids it."""
        with self._lock:
            self._settle()
            if not self._fits(nbytes):
                return False
            self._contexts += 1
            self._bytes += nbytes
            return True

    def has_room(self, nbytes: int) -> bool:
        """Whether :meth:`reserve` would succeed now."""
        with self._lock:
            self._settle()
            return self._fits(nbytes)

    def confirm(self, reserved: int, actual: int, reservation: Reservation | None = None) -> bool:
        """Correct a reservation to what the context really takes; False if that is over the limit."""
        with self._lock:
            self._settle()
            # No call in between, as in book(): an interrupt finds both corrected, or neither.
            self._bytes += actual - reserved
            if reservation is not None:
                reservation.nbytes = actual
            return self.memory_limit is None or self._bytes <= self.memory_limit

    def book(self, nbytes: int) -> Reservation | None:
        """:meth:`reserve`, as an object that gives the room back when it goes; None if a limit forbids it."""
        reservation = Reservation(self)
        with self._lock:
            self._settle()
            if not self._fits(nbytes):
                return None
            # No call in between: it is counted here and there, or not at all.
            self._contexts += 1
            self._bytes += nbytes
            reservation.nbytes = nbytes
            reservation.is_held = True
        return reservation

    def forget(self, nbytes: int) -> None:
        """A context of ``nbytes`` is gone."""
        self._forgotten.append(nbytes)

    def held(self) -> tuple[int, int]:
        """Contexts and bytes held now."""
        with self._lock:
            self._settle()
            return self._contexts, self._bytes

    def _fits(self, nbytes: int) -> bool:
        within_memory = self.memory_limit is None or self._bytes + nbytes <= self.memory_limit
        return self._contexts < self.max_contexts and within_memory

    def _settle(self) -> None:
        # No call in between, as in book(): an interrupt comes before or after it. (Only here is anything taken out.)
        while self._forgotten:
            nbytes = self._forgotten[0]
            del self._forgotten[0]
            self._contexts -= 1
            self._bytes -= nbytes

    def after_fork(self) -> None:
        self._lock = _sync.lock("limits")


class _Waiter:
    __slots__ = ("context", "ready")

    def __init__(self) -> None:
        self.ready = _sync.event("a context")
        self.context: Any = None


class Reservation:
    """Room in the limits for one more context of ``nbytes``: whoever holds it builds that context, or cancels.

    Given back when this goes, unless its context has: an exception (an interrupt, say) may leave the build anywhere.
    """

    __slots__ = ("_limits", "is_held", "nbytes")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.nbytes = 0
        self.is_held = False

    def confirm(self, actual: int) -> bool:
        """Correct it to what the context really takes; False if that is over the limit."""
        return self._limits.confirm(self.nbytes, actual, self)

    def cancel(self) -> None:
        """The context was not built, or is gone. May be repeated; safe in a garbage collection."""
        if getattr(self, "is_held", False):  # an interrupt may come before it is set
            self.is_held = False
            self._limits.forget(self.nbytes)

    def __del__(self) -> None:
        self.cancel()


@_sync.atomics("may_grow")
class ContextPool(Generic[_P]):
    """The contexts of one specialization.

    Threads: any. ``_lock`` guards the lists and is never held while a device is called, a graph is built or another
    lock but :class:`Limits`' leaf is taken. A context handed out belongs to one thread until :meth:`release` or
    :meth:`discard`; that interval only queues work, so whoever waits on the host waits for other hosts, never for a
    device. Waiters are served in the order in which they came: none starves.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = _sync.lock("pool")
        self._idle: list[_P] = []  # least recently used first
        self._waiters: deque[_Waiter] = deque()
        self._alive: weakref.WeakSet[_P] = weakref.WeakSet()
        self._estimate = 0
        #: Whether calls may build contexts; not after a build failed.
        self.may_grow = True
        process.register(self)

    @property
    def estimate(self) -> int:
        """Bytes of the last context built: what the next will take."""
        with self._lock:
            return self._estimate

    @property
    def nbytes(self) -> int:
        """Bytes of the contexts that are alive."""
        with self._lock:
            return sum(context.nbytes for context in self._alive)

    def acquire(self, stream: int, may_build: Callable[[], bool]) -> _P | Reservation | None:
        """An idle context, by preference: last used on ``stream``; never used; a new one (room for it is reserved); the
        least recently used. When all are in the hands of other threads, waits for the first that comes back. None
        (run direct) when there is no context at all and none may be built.
        """
        with self._lock:
            ready = self._ready(stream)
            if ready is not None:
                return ready
            idle = self._idle
            # Read once: another thread's build changes it.
            estimate = self._estimate
            if self._limits.has_room(estimate) and may_build():
                reservation = self._limits.book(estimate)
                if reservation is not None:
                    return reservation
            if idle:
                return idle.pop(0)
            if not self._alive:
                return None
            waiter = _Waiter()
            self._waiters.append(waiter)
        try:
            # The time-out is for what an interrupt of another thread can leave undone: a context that was lost with its
            # call, a waiter that was taken off the list and never told.
            while not waiter.ready.wait(timeout=1.0):
                with self._lock:
                    if waiter.context is not None:
                        break
                    if waiter in self._waiters:
                        if self._alive:
                            continue
                        self._waiters.remove(waiter)
                        return None
                    if self._idle:
                        return self._idle.pop(0)
                    if not self._alive:
                        return None
                    self._waiters.appendleft(waiter)
            return waiter.context
        except BaseException:
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            if waiter.context is not None:
                self.release(waiter.context)
            raise

    def add(self, context: _P) -> None:
        """Count a context that was just built; it is in its builder's hands."""
        with self._lock:
            self._estimate = context.nbytes
            self._alive.add(context)

    def release(self, context: _P) -> None:
        """Give a context back; ``context.done`` must have been recorded after its last use."""
        with self._lock:
            if self._waiters:
                waiter = self._waiters[0]
                waiter.context = context
                del self._waiters[0]
                waiter.ready.set()
            else:
                self._idle.append(context)

    def discard(self, context: _P) -> None:
        """Give up a context after an error; it is freed once its queued work is done."""
        with self._lock:
            self._alive.discard(context)
            if not self._alive:
                while self._waiters:
                    self._waiters.popleft().ready.set()

    def discard_used(self, context: _P, stream: Stream) -> None:
        """:meth:`discard` after an error in a use on ``stream``: part of it may be queued, and ``done`` comes after."""
        self.discard(context)
        try:
            context.done.record(stream)
        except BaseException:
            # Nothing says when the device is done with it, so it is never freed.
            _never_freed.append(context)

    def discard_added(self) -> None:
        """Give up what this thread has added and nobody got. Of a context that nothing refers to nothing is left."""

    def take_ready(self, stream: int) -> _P | None:
        """An idle one whose user has to wait for no other stream, as :meth:`acquire` would find it; None if there is
        none."""
        with self._lock:
            return self._ready(stream)

    def _ready(self, stream: int) -> _P | None:
        idle = self._idle
        for i in range(len(idle) - 1, -1, -1):
            if idle[i].used_on == stream:
                return idle.pop(i)
        for i, context in enumerate(idle):
            if context.used_on is None:
                return idle.pop(i)
        return None

    def drain(self) -> list[_P]:
        """Take all idle contexts out for good."""
        with self._lock:
            idle, self._idle = self._idle, []
            for context in idle:
                self._alive.discard(context)
        return idle

    def events(self) -> set[int]:
        """Identities of the events of the contexts that are alive."""
        with self._lock:
            return {id(context.done) for context in self._alive}

    def after_fork(self) -> None:
        # Contexts in the hands of threads that the child does not have never come back: nobody is to wait for them.
        self._lock = _sync.lock("pool")
        self._waiters.clear()
        self._alive = weakref.WeakSet(self._idle)

    def __len__(self) -> int:
        with self._lock:
            return len(self._alive)
