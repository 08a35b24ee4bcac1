"""The Python runtime's context pool and its limits, with stand-ins for contexts; no device."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from anabranch.runtime._pool import ContextPool, Limits, Reservation
from contract.faults import interrupt_at
from contract.support import in_time


def yes() -> bool:
    """A call may build a context."""
    return True


def no() -> bool:
    """It may not."""
    return False


class Context:
    """What the pool looks at in an execution context."""

    def __init__(self, nbytes: int = 100, used_on: int | None = None) -> None:
        self.nbytes = nbytes
        self.used_on = used_on


def pool_of(*contexts: Context, max_contexts: int | None = None, memory_limit: int | None = None) -> Any:
    """A pool in which ``contexts`` are idle, the first the least recently used, and their limits."""
    limits = Limits(len(contexts) if max_contexts is None else max_contexts, memory_limit)
    pool: Any = ContextPool(limits)
    for context in contexts:
        assert limits.reserve(0)
        assert limits.confirm(0, context.nbytes)
        pool.add(context)
        pool.release(context)
    return pool


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


@contextmanager
def threads(n: int, work: Callable[[int], Any]) -> Iterator[list[threading.Thread]]:
    """``n`` threads that run ``work(i)``; joined, with their first error raised, at the end of the block."""
    errors: list[BaseException] = []

    def body(i: int) -> None:
        try:
            work(i)
        except BaseException as e:
            errors.append(e)

    started = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(n)]
    for t in started:
        t.start()
    yield started
    for t in started:
        t.join(60)
        assert not t.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


# -- which context a call gets ----------------------------------------------------------------------------------------


def test_the_streams_own_context_comes_first() -> None:
    mine, fresh, other = Context(used_on=7), Context(), Context(used_on=8)
    pool = pool_of(mine, fresh, other, max_contexts=9)
    assert pool.acquire(7, yes) is mine


def test_of_the_streams_own_the_most_recently_used_comes_first() -> None:
    older, newer = Context(used_on=7), Context(used_on=7)
    pool = pool_of(older, newer)
    assert pool.acquire(7, yes) is newer
    assert pool.acquire(7, yes) is older


def test_a_context_that_was_never_used_comes_before_a_new_one() -> None:
    other, fresh = Context(used_on=8), Context()
    pool = pool_of(other, fresh, max_contexts=9)
    assert pool.acquire(7, yes) is fresh
    assert pool._limits.held() == (2, 200), "nothing was reserved"


def test_a_new_one_comes_before_another_streams() -> None:
    other = Context(used_on=8)
    pool = pool_of(other, max_contexts=2)
    choice = pool.acquire(7, yes)
    assert isinstance(choice, Reservation)
    assert choice.nbytes == 100, "what the last one took"
    assert pool._limits.held() == (2, 200)
    assert pool.acquire(7, yes) is other, "the limit is reached"


def test_where_nothing_may_be_built_the_least_recently_used_comes() -> None:
    first, second = Context(used_on=8), Context(used_on=9)
    pool = pool_of(first, second, max_contexts=9)
    assert pool.acquire(7, no) is first
    assert pool._limits.held() == (2, 200)
    pool.release(first)
    assert pool.acquire(7, no) is second, "the one given back is now the most recent"


def test_without_contexts_and_without_room_a_call_runs_direct() -> None:
    pool = pool_of(max_contexts=0)
    assert pool.acquire(7, yes) is None
    assert pool_of(max_contexts=5).acquire(7, no) is None


def test_a_reservation_keeps_its_bytes_when_the_estimate_changes() -> None:
    pool = pool_of(Context(100, used_on=8), max_contexts=9)
    choice = pool.acquire(7, yes)
    bigger = Context(300)
    pool._limits.reserve(0)
    pool._limits.confirm(0, 300)
    pool.add(bigger)  # another thread's build
    choice.cancel()
    assert pool._limits.held() == (2, 400)


def test_a_reservation_that_is_lost_gives_its_room_back_once() -> None:
    limits = Limits(1, 100)
    lost = limits.book(60)
    assert lost is not None
    assert limits.held() == (1, 60)
    assert limits.book(0) is None, "the limit is reached"
    del lost
    assert limits.held() == (0, 0)
    kept = limits.book(60)
    assert kept is not None
    assert kept.confirm(100)
    assert limits.held() == (1, 100)
    kept.cancel()
    kept.cancel()
    del kept
    assert limits.held() == (0, 0)
    over = limits.book(0)
    assert over is not None
    assert not over.confirm(101)


def test_drain_takes_the_idle_and_leaves_those_in_use() -> None:
    idle, used = Context(used_on=1), Context(used_on=2)
    pool = pool_of(idle, used)
    assert pool.acquire(2, no) is used
    assert pool.drain() == [idle]
    assert len(pool) == 1
    pool.release(used)
    assert pool.acquire(2, no) is used


# -- limits -----------------------------------------------------------------------------------------------------------


def test_the_count_of_contexts_is_limited() -> None:
    limits = Limits(2, None)
    assert [limits.reserve(10) for _ in range(3)] == [True, True, False]
    limits.forget(10)
    assert limits.held() == (1, 10)
    assert limits.reserve(5)
    assert not limits.reserve(0)
    assert limits.held() == (2, 15)


def test_bytes_are_limited_by_what_is_reserved_and_by_what_it_turns_out_to_be() -> None:
    limits = Limits(10, 100)
    assert limits.reserve(60)
    assert not limits.reserve(41)
    assert limits.reserve(40)
    assert limits.confirm(40, 39)
    assert limits.held() == (2, 99)
    assert not limits.reserve(2)
    assert limits.reserve(1)
    assert not limits.confirm(1, 2), "over the limit now"
    limits.forget(2)
    assert limits.held() == (2, 99)


def test_a_limit_of_zero_bytes_allows_only_what_takes_none() -> None:
    limits = Limits(10, 0)
    assert limits.reserve(0)
    assert not limits.confirm(0, 1)
    limits.forget(1)
    assert limits.held() == (0, 0)
    assert not limits.reserve(1)


def test_limits_are_never_exceeded_by_many_threads() -> None:
    limits = Limits(7, 350)
    peak: list[tuple[int, int]] = []

    def work(i: int) -> None:
        for n in range(300):
            size = 30 + (i * 37 + n) % 60
            if limits.reserve(size):
                peak.append(limits.held())
                limits.forget(size)

    with threads(8, work):
        pass
    assert limits.held() == (0, 0)
    assert max(c for c, _ in peak) <= 7
    assert max(b for _, b in peak) <= 350
    assert max(c for c, _ in peak) >= 1


@pytest.mark.parametrize("lock", ["limits", "pool"])
def test_forget_from_a_finalizer_while_a_lock_is_held_does_not_deadlock(lock: str) -> None:
    pool = pool_of(Context(100, used_on=1), max_contexts=3)
    limits = pool._limits
    context: Any = Context(70)
    limits.reserve(0)
    limits.confirm(0, 70)
    pool.add(context)
    weakref.finalize(context, limits.forget, context.nbytes)
    context.itself = context  # only a garbage collection frees it
    held = [limits.held()]

    def collect_with_the_lock_held() -> None:
        nonlocal context
        with limits._lock if lock == "limits" else pool._lock:
            context = None
            gc.collect()

    assert in_time(collect_with_the_lock_held), "deadlock"
    held.append(limits.held())
    assert held == [(2, 170), (1, 100)]
    assert len(pool) == 1


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_sixty_four_threads_share_one_context_and_all_finish() -> None:
    pool = pool_of(Context(used_on=0))
    inside = 0
    calls: list[int] = []

    def work(i: int) -> None:
        nonlocal inside
        for _ in range(10):
            context = pool.acquire(i, yes)
            inside += 1
            assert inside == 1, "two threads have one context"
            calls.append(i)
            context.used_on = i
            inside -= 1
            pool.release(context)

    with threads(64, work):
        pass
    assert len(calls) == 640
    assert len(pool._idle) == 1
    assert not pool._waiters


def test_waiters_are_served_in_the_order_in_which_they_came() -> None:
    pool = pool_of(Context(used_on=0))
    context = pool.acquire(0, yes)
    served: list[int] = []
    go = [threading.Event() for _ in range(12)]

    def work(i: int) -> None:
        go[i].wait(30)
        mine = pool.acquire(i, yes)
        served.append(i)
        pool.release(mine)

    with threads(12, work):
        for i in range(12):
            go[i].set()
            eventually(lambda i=i: len(pool._waiters) == i + 1)  # type: ignore[misc]
        pool.release(context)
    assert served == list(range(12))


def test_a_newcomer_does_not_overtake_a_waiter() -> None:
    pool = pool_of(Context(used_on=0))
    context = pool.acquire(0, yes)
    got: list[Any] = []
    with threads(1, lambda i: got.append(pool.acquire(1, yes))):
        eventually(lambda: len(pool._waiters) == 1)
        pool.release(context)
        assert not pool._idle, "the context went to the waiter, not to whoever comes next"
    assert got == [context]


def test_discarding_the_last_context_wakes_all_who_wait() -> None:
    pool = pool_of(Context(used_on=0))
    context = pool.acquire(0, yes)
    got: list[Any] = []
    with threads(5, lambda i: got.append(pool.acquire(i, no))):
        eventually(lambda: len(pool._waiters) == 5)
        start = time.monotonic()
        pool.discard(context)
    assert got == [None] * 5
    assert time.monotonic() - start < 0.9, "woken, not timed out"


def test_discarding_one_of_two_leaves_the_other_to_the_waiters() -> None:
    pool = pool_of(Context(used_on=0), Context(used_on=1))
    first, second = pool.acquire(0, yes), pool.acquire(1, yes)
    got: list[Any] = []
    with threads(1, lambda i: got.append(pool.acquire(5, yes))):
        eventually(lambda: len(pool._waiters) == 1)
        pool.discard(first)
        pool.release(second)
    assert got == [second]


def test_a_context_lost_with_its_thread_does_not_hold_up_the_waiters_for_ever() -> None:
    pool = pool_of(Context(used_on=0))
    context = pool.acquire(0, yes)
    got: list[Any] = []
    with threads(3, lambda i: got.append(pool.acquire(i, no))):
        eventually(lambda: len(pool._waiters) == 3)
        del context  # neither released nor discarded
    assert got == [None] * 3
    assert not pool._waiters


class Interrupt(BaseException):
    pass


def test_an_exception_raised_into_a_waiting_thread_loses_no_context() -> None:
    pool = pool_of(Context(used_on=0))
    for _ in range(10):
        context = pool.acquire(0, yes)
        caught: list[bool] = []

        def work(i: int, caught: list[bool] = caught) -> None:
            try:
                pool.acquire(1, yes)
            except Interrupt:
                caught.append(True)

        with threads(1, work) as (thread,):
            eventually(lambda: len(pool._waiters) == 1)
            assert thread.ident is not None
            raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupt)
            )
            assert raised == 1
            # It is seen when the wait's time is up, or when the context comes: both must give it on.
            pool.release(context)
        del context
        assert caught == [True]
        assert not pool._waiters
        assert len(pool._idle) == 1
        assert len(pool) == 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
def test_ctrl_c_while_waiting_loses_no_context() -> None:
    pool = pool_of(Context(used_on=0))
    context = pool.acquire(0, yes)

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            pool.acquire(1, yes)
        assert time.monotonic() - start < 0.9, "at once, not when the wait's time is up"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not pool._waiters
    pool.release(context)
    assert pool.acquire(1, yes) is context


def test_an_interrupted_waiter_hands_its_context_to_the_next() -> None:
    pool = pool_of(Context(used_on=0))
    context = pool.acquire(0, yes)
    got: list[Any] = []
    first_waits = threading.Event()

    def work(i: int) -> None:
        if i == 1:
            first_waits.wait(30)
        try:
            got.append(pool.acquire(i, yes))
        except Interrupt:
            got.append("interrupted")

    with threads(2, work) as (first, _):
        eventually(lambda: len(pool._waiters) == 1)
        first_waits.set()
        eventually(lambda: len(pool._waiters) == 2)
        assert first.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(first.ident), ctypes.py_object(Interrupt))
        pool.release(context)
    assert sorted(map(str, got)) == sorted(["interrupted", str(context)])


@pytest.mark.parametrize("left", ["idle", "in use", "given", "gone"])
def test_a_waiter_that_an_interrupt_elsewhere_left_off_the_list_is_served(left: str) -> None:
    # What an interrupt can leave in other threads' release() and discard(), done by hand.
    pool = pool_of(Context())
    context = pool.acquire(1, no)
    got: list[Any] = []
    with threads(1, lambda i: got.append(pool.acquire(2, no))):
        eventually(lambda: len(pool._waiters) == 1)
        with pool._lock:
            waiter = pool._waiters.popleft()
            if left == "given":
                waiter.context = context  # and not told
            elif left == "idle":
                pool._idle.append(context)
            elif left == "gone":
                pool._alive.discard(context)
        if left == "in use":
            eventually(lambda: len(pool._waiters) == 1)
            pool.release(context)
    assert got == [None if left == "gone" else context]
    assert not pool._waiters


def test_an_interrupt_while_room_is_settled_loses_none() -> None:
    limits = Limits(3, None)
    for _ in range(3):
        assert limits.reserve(100)
    for nth in range(1, 40):
        limits.forget(100)
        limits.forget(100)
        with interrupt_at(nth, Interrupt) as fault, contextlib.suppress(Interrupt):
            limits.has_room(0)
        assert limits.held() == (1, 100)
        if not fault.fired:
            break
        assert limits.reserve(100)
        assert limits.reserve(100)
    assert nth > 3


def test_many_threads_streams_and_discards_end_with_the_books_in_order() -> None:
    limits = Limits(3, 350)
    pool: Any = ContextPool(limits)
    counts = {"direct": 0, "built": 0, "used": 0}

    def build(reservation: Reservation) -> Context | None:
        context = Context(100)
        weakref.finalize(context, reservation.cancel)
        if not reservation.confirm(100):
            return None
        pool.add(context)
        return context

    def work(i: int) -> None:
        for n in range(200):
            choice = pool.acquire(i, yes)
            if isinstance(choice, Reservation):
                counts["built"] += 1
                choice = build(choice)
            if choice is None:
                counts["direct"] += 1
                continue
            counts["used"] += 1
            choice.used_on = i
            held = limits.held()
            assert held[0] <= 3
            assert held[1] <= 350
            if (n + i) % 17 == 0:
                pool.discard(choice)
            else:
                pool.release(choice)
            del choice

    with threads(16, work):
        pass
    assert counts["built"] >= 3
    assert counts["used"] > 2000
    contexts = len(pool)
    assert limits.held() == (contexts, 100 * contexts)
    drained = pool.drain()
    assert len(drained) == contexts
    del drained
    gc.collect()
    assert limits.held() == (0, 0)


def test_a_correction_that_is_interrupted_is_whole_or_not_there() -> None:
    for nth in itertools.count(1):
        limits = Limits(max_contexts=4, memory_limit=None)
        reservation = limits.book(0)
        assert reservation is not None
        with interrupt_at(nth) as planted, contextlib.suppress(KeyboardInterrupt):
            reservation.confirm(100)
        reservation.cancel()
        assert limits.held() == (0, 0), f"interrupted at place {nth}"
        if not planted.fired:
            break
    assert nth > 3
