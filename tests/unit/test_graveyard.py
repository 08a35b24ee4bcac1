"""What is freed only when the device is done with it, with stand-ins for events; no device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from anabranch.devices._graveyard import Graveyard
from contract.support import in_time, on_threads


class Remains:
    pass


@pytest.fixture
def done() -> set[str]:
    """Names of the events that the device has reached."""
    return set()


@pytest.fixture
def graveyard(done: set[str]) -> Iterator[Graveyard]:
    yard = Graveyard(lambda events: all(e in done for e in events))
    yield yard
    yard.close()
    gc.callbacks.remove(yard._on_gc)


def test_remains_are_kept_until_their_events_are_done(graveyard: Graveyard, done: set[str]) -> None:
    freed: list[str] = []
    remains = Remains()
    alive = weakref.ref(remains)
    graveyard.bury(["a", "b"], remains, lambda: freed.append("ab"))
    del remains
    done.add("a")
    graveyard.reap()
    assert not freed
    assert alive() is not None
    done.add("b")
    graveyard.reap()
    assert freed == ["ab"]
    assert alive() is None
    graveyard.reap()
    assert freed == ["ab"], "once"


def test_a_later_burial_does_not_wait_for_an_earlier_one(graveyard: Graveyard, done: set[str]) -> None:
    freed: list[str] = []
    for name in "abc":
        graveyard.bury([name], None, lambda name=name: freed.append(name))  # type: ignore[misc]
    done.add("c")
    graveyard.reap()
    done.add("a")
    graveyard.reap()
    assert freed == ["c", "a"]


def test_what_is_done_already_is_freed_at_once(graveyard: Graveyard) -> None:
    freed: list[int] = []
    graveyard.bury([], None, lambda: freed.append(1))
    assert freed == [1]


def test_each_garbage_collection_looks_again(graveyard: Graveyard, done: set[str]) -> None:
    freed: list[int] = []
    graveyard.bury(["a"], None, lambda: freed.append(1))
    done.add("a")
    gc.collect()
    assert freed == [1]


def test_burying_from_a_burial_does_not_hang(graveyard: Graveyard, done: set[str]) -> None:
    freed: list[int] = []
    done.add("a")

    def again() -> None:
        freed.append(1)
        if len(freed) < 5:
            graveyard.bury(["a"], None, again)
        gc.collect()

    assert in_time(lambda: graveyard.bury(["a"], None, again))
    assert freed == [1] * 5


def test_a_closed_graveyard_keeps_everything_and_asks_nothing(graveyard: Graveyard, done: set[str]) -> None:
    freed: list[int] = []
    graveyard.bury(["a"], None, lambda: freed.append(1))
    graveyard.close()
    done.add("a")
    graveyard.bury(["a"], None, lambda: freed.append(2))
    graveyard.reap()
    gc.collect()
    assert freed == []


def test_other_things_to_look_at_are_looked_at_in_each_reaping(graveyard: Graveyard) -> None:
    looks: list[int] = []
    graveyard.also = lambda: looks.append(1)
    graveyard.reap()
    gc.collect()
    assert len(looks) == 2


def test_many_threads_bury_and_each_is_freed_once(graveyard: Graveyard, done: set[str]) -> None:
    freed: list[tuple[int, int]] = []

    def work(i: int) -> None:
        for n in range(200):
            name = f"{i}.{n}"
            graveyard.bury([name], None, lambda i=i, n=n: freed.append((i, n)))  # type: ignore[misc]
            done.add(name)
            if n % 10 == 0:
                graveyard.reap()

    on_threads(8, work)
    graveyard.reap()
    assert sorted(freed) == [(i, n) for i in range(8) for n in range(200)]
