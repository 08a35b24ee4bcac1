"""Small programs of threads alone; the numbers of their Mazurkiewicz traces are known."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from anabranch.explore import Var


def _together(*bodies: Callable[[], object]) -> None:
    threads = [threading.Thread(target=body) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def writers(n: int = 3) -> int:
    """n writers of one variable: n! orders."""
    x = Var(0)
    _together(*[lambda i=i: x.set(i + 1) for i in range(n)])
    return x.get()


def adders(n: int = 3) -> int:
    """Additions commute: one trace."""
    x = Var(0)
    _together(*[x.add for _ in range(n)])
    return x.get()


def readers(n: int = 2) -> list[int]:
    """One writer and n readers: each reads before or after it, 2^n."""
    x, seen = Var(0), [0] * n

    def read(i: int) -> None:
        seen[i] = x.get()

    _together(lambda: x.set(1), *[lambda i=i: read(i) for i in range(n)])
    return seen


def separate(n: int = 3) -> list[int]:
    """n variables of n threads: one trace."""
    xs = [Var(0) for _ in range(n)]
    _together(*[lambda x=x: x.set(1) for x in xs])
    return [x.get() for x in xs]


def locked(n: int = 3) -> int:
    """n increments under a lock: n! orders of the lock, one result."""
    lock, x = threading.Lock(), Var(0)

    def increment() -> None:
        with lock:
            x.set(x.get() + 1)

    _together(*[increment] * n)
    assert x.get() == n
    return x.get()


def lost_update() -> int:
    """Two increments without a lock."""
    x = Var(0)

    def increment() -> None:
        x.set(x.get() + 1)

    _together(increment, increment)
    assert x.get() == 2, f"an update was lost: {x.get()}"
    return x.get()


def store_buffer() -> tuple[int, int]:
    """Each writes one and reads the other: both 0 is impossible here."""
    x, y, seen = Var(0), Var(0), [0, 0]

    def first() -> None:
        x.set(1)
        seen[0] = y.get()

    def second() -> None:
        y.set(1)
        seen[1] = x.get()

    _together(first, second)
    assert seen != [0, 0]
    return seen[0], seen[1]


def philosophers(n: int = 3) -> None:
    """Each takes the left fork, then the right one."""
    forks = [threading.Lock() for _ in range(n)]

    def dine(i: int) -> None:
        with forks[i], forks[(i + 1) % n]:
            pass

    _together(*[lambda i=i: dine(i) for i in range(n)])


def polite_philosophers(n: int = 3) -> None:
    """The last takes them the other way round."""
    forks = [threading.Lock() for _ in range(n)]

    def dine(i: int) -> None:
        first, second = sorted((i, (i + 1) % n))
        with forks[first], forks[second]:
            pass

    _together(*[lambda i=i: dine(i) for i in range(n)])


def two_preemptions() -> None:
    """Fails only if one thread is interrupted between its steps, and the other one, too."""
    x, y = Var(0), Var(0)

    def first() -> None:
        x.set(1)
        if y.get() == 1:
            x.set(2)

    def second() -> None:
        if x.get() == 1:
            y.set(1)
            assert x.get() != 2, "seen half done"

    _together(first, second)


def trying() -> list[bool]:
    lock, took = threading.Lock(), [False, False]

    def attempt(i: int) -> None:
        if lock.acquire(blocking=False):
            took[i] = True
            lock.release()

    _together(lambda: attempt(0), lambda: attempt(1))
    return took


def reentrant() -> int:
    lock, x = threading.RLock(), Var(0)

    def increment() -> None:
        with lock, lock:
            x.set(x.get() + 1)

    _together(increment, increment)
    return x.get()


def event() -> tuple[int, bool]:
    flag, x = threading.Event(), Var(0)
    seen = []

    def waits() -> None:
        flag.wait()
        seen.append(x.get())

    def sets() -> None:
        x.set(1)
        flag.set()

    _together(waits, sets)
    return seen[0], flag.is_set()


def two_setters() -> int:
    """Either of two threads may be the one that wakes the third."""
    flag, x = threading.Event(), Var(0)
    seen = []

    def sets(i: int) -> None:
        x.set(i)
        flag.set()

    def waits() -> None:
        flag.wait()
        seen.append(x.get())

    _together(waits, lambda: sets(1), lambda: sets(2))
    return seen[0]


def timed_out() -> bool:
    return threading.Event().wait(timeout=5.0)


def timed_wait() -> tuple[bool, int]:
    """Time passes only when nothing else can happen: the wait never times out."""
    flag, x = threading.Event(), Var(0)
    got = []
    _together(lambda: got.append(flag.wait(1.0)), flag.set, lambda: x.set(1))
    return got[0], x.get()


def condition() -> list[int]:
    """One consumer, two producers, a list under a condition."""
    ready, items, taken = threading.Condition(), [], []

    def produce(i: int) -> None:
        with ready:
            items.append(i)
            ready.notify()

    def consume() -> None:
        for _ in range(2):
            with ready:
                while not items:
                    ready.wait()
                taken.append(items.pop(0))

    _together(consume, lambda: produce(1), lambda: produce(2))
    return taken


def semaphore() -> int:
    slots, x, most = threading.Semaphore(1), Var(0), Var(0)

    def enter() -> None:
        with slots:
            x.set(x.get() + 1)
            most.set(max(most.get(), x.get()))
            x.set(x.get() - 1)

    _together(enter, enter)
    return most.get()


def barrier() -> list[int]:
    gate, x, seen = threading.Barrier(2), [Var(0), Var(0)], [0, 0]

    def cross(i: int) -> None:
        x[i].set(1)
        gate.wait()
        seen[i] = x[1 - i].get()

    _together(lambda: cross(0), lambda: cross(1))
    return seen


def handed_over() -> list[int]:
    line: queue.Queue[int] = queue.Queue(maxsize=1)
    got = []
    _together(lambda: [line.put(1), line.put(2)], lambda: got.extend([line.get(), line.get()]))
    return got


def pool() -> list[int]:
    with ThreadPoolExecutor(2) as workers:
        return list(workers.map(lambda n: n * n, range(2)))


def spinning() -> int:
    """Looks at a flag until it is set: ends only if others get their turn."""
    flag, looks = threading.Event(), 0
    thread = threading.Thread(target=flag.set)
    thread.start()
    while not flag.is_set():
        looks += 1
    thread.join()
    return looks


def lost_wakeup() -> None:
    """The flag is looked at outside the lock: the notify may come before the wait."""
    ready, flag = threading.Condition(), Var(0)

    def waits() -> None:
        if not flag.get():
            with ready:
                ready.wait()

    def wakes() -> None:
        flag.set(1)
        with ready:
            ready.notify()

    _together(waits, wakes)


def endless() -> None:
    x = Var(0)
    while True:
        x.set(1)


def crashing() -> None:
    import os
    import signal

    x = Var(0)

    def second() -> None:
        if x.get():
            os.kill(os.getpid(), signal.SIGKILL)

    _together(lambda: x.set(1), second)
