"""What is freed only when the device is done with it, with stand-ins for events; no device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from anabranch.devices._deferred import DeferredFrees
from contract.support import in_time, on_threads


class Parts:
    pass


@pytest.fixture
def done() -> set[str]:
    """Names of the events that the device has reached."""
    return set()


@pytest.fixture
def deferred(done: set[str]) -> Iterator[DeferredFrees]:
    frees = DeferredFrees(lambda events: all(e in done for e in events))
    yield frees
    frees.close()
    gc.callbacks.remove(frees._on_gc)


def test_parts_are_kept_until_their_events_are_done(deferred: DeferredFrees, done: set[str]) -> None:
    freed: list[str] = []
    parts = Parts()
    alive = weakref.ref(parts)
    deferred.defer(["a", "b"], parts, lambda: freed.append("ab"))
    del parts
    done.add("a")
    deferred.collect()
    assert not freed
    assert alive() is not None
    done.add("b")
    deferred.collect()
    assert freed == ["ab"]
    assert alive() is None
    deferred.collect()
    assert freed == ["ab"], "once"


def test_a_later_entry_does_not_wait_for_an_earlier_one(deferred: DeferredFrees, done: set[str]) -> None:
    freed: list[str] = []
    for name in "abc":
        deferred.defer([name], None, lambda name=name: freed.append(name))  # type: ignore[misc]
    done.add("c")
    deferred.collect()
    done.add("a")
    deferred.collect()
    assert freed == ["c", "a"]


def test_what_is_done_already_is_freed_at_once(deferred: DeferredFrees) -> None:
    freed: list[int] = []
    deferred.defer([], None, lambda: freed.append(1))
    assert freed == [1]


def test_each_garbage_collection_looks_again(deferred: DeferredFrees, done: set[str]) -> None:
    freed: list[int] = []
    deferred.defer(["a"], None, lambda: freed.append(1))
    done.add("a")
    gc.collect()
    assert freed == [1]


def test_burying_from_a_entry_does_not_hang(deferred: DeferredFrees, done: set[str]) -> None:
    freed: list[int] = []
    done.add("a")

    def again() -> None:
        freed.append(1)
        if len(freed) < 5:
            deferred.defer(["a"], None, again)
        gc.collect()

    assert in_time(lambda: deferred.defer(["a"], None, again))
    assert freed == [1] * 5


def test_a_closed_deferred_keeps_everything_and_asks_nothing(deferred: DeferredFrees, done: set[str]) -> None:
    freed: list[int] = []
    deferred.defer(["a"], None, lambda: freed.append(1))
    deferred.close()
    done.add("a")
    deferred.defer(["a"], None, lambda: freed.append(2))
    deferred.collect()
    gc.collect()
    assert freed == []


def test_other_things_to_look_at_are_looked_at_in_each_reaping(deferred: DeferredFrees) -> None:
    looks: list[int] = []
    deferred.also = lambda: looks.append(1)
    deferred.collect()
    gc.collect()
    assert len(looks) == 2


def test_many_threads_bury_and_each_is_freed_once(deferred: DeferredFrees, done: set[str]) -> None:
    freed: list[tuple[int, int]] = []

    def work(i: int) -> None:
        for n in range(200):
            name = f"{i}.{n}"
            deferred.defer([name], None, lambda i=i, n=n: freed.append((i, n)))  # type: ignore[misc]
            done.add(name)
            if n % 10 == 0:
                deferred.collect()

    on_threads(8, work)
    deferred.collect()
    assert sorted(freed) == [(i, n) for i in range(8) for n in range(200)]
