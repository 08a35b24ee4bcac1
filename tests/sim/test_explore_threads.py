"""Programs of threads alone: known numbers of schedules, and every classic bug found."""

from __future__ import annotations

import mmap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from explore_model import trace_of
from programs import threads

from anabranch import _sync
from anabranch.explore import NotDeterministic, Run, Var, controlled, explore, fifo, observed, pct, random
from anabranch.explore._locks import Lock


@pytest.mark.parametrize(
    ("program", "args", "schedules"),
    [
        ("writers", (2,), 2),
        ("writers", (3,), 6),
        ("adders", (3,), 1),
        ("readers", (2,), 4),
        ("separate", (3,), 1),
        ("locked", (3,), 6),
        ("store_buffer", (), 3),
        ("polite_philosophers", (3,), 6),
        ("reentrant", (), 2),
        ("event", (), 1),
        ("timed_out", (), 1),
        ("timed_wait", (), 1),
        ("barrier", (), 2),
    ],
)
def test_every_schedule_of_a_correct_program(program: str, args: tuple[Any, ...], schedules: int) -> None:
    verdict = explore(getattr(threads, program), args=args)
    assert str(verdict) == f"exhaustive({schedules} schedule{'s' * (schedules > 1)})"
    assert verdict.cut == 0


@pytest.mark.parametrize("program", ["condition", "semaphore", "handed_over", "pool"])
def test_what_the_standard_library_builds_on_locks(program: str) -> None:
    assert explore(getattr(threads, program)).kind == "exhaustive"


@pytest.mark.parametrize(
    ("program", "oracle", "message"),
    [
        ("lost_update", "values", "an update was lost: 1"),
        ("philosophers", "deadlock", "T0.1 waits at: acquire lock0.2 (held by T0.2)"),
        ("two_preemptions", "values", "seen half done"),
        ("lost_wakeup", "deadlock", "T0 waits at: join T0.1 (which has not ended)"),
        ("crashing", "crash", "SIGKILL"),
    ],
)
def test_bugs_are_found(program: str, oracle: str, message: str) -> None:
    verdict = explore(getattr(threads, program))
    assert verdict.kind == "failed"
    assert verdict.failure is not None
    assert verdict.failure.oracle == oracle
    assert message in verdict.failure.message
    assert verdict.command is not None
    assert "--replay" in verdict.command


@pytest.mark.parametrize("program", ["lost_update", "two_preemptions"])
@pytest.mark.parametrize("scheduler", [random(0), pct(0, depth=3)], ids=repr)
def test_bugs_are_found_at_random(program: str, scheduler: Any) -> None:
    assert explore(getattr(threads, program), scheduler=scheduler, schedules=200).failed


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("pool", marks=pytest.mark.slow),
        "condition",
        "two_setters",
        "handed_over",
        "locked",
        "semaphore",
        "barrier",
        "two_preemptions",
    ],
)
def test_no_schedule_drawn_at_random_is_new(program: str) -> None:
    """Each is equivalent to one that the search has run."""
    searched, drawn = set(), set()

    def note(number: int, run: Run) -> None:
        if run.end != "cut":
            searched.add(trace_of(run))

    fn = getattr(threads, program)
    explore(fn, keep_going=True, progress=note)
    explore(fn, keep_going=True, scheduler=random(0), schedules=60, progress=lambda _, run: drawn.add(trace_of(run)))
    assert drawn <= searched


def test_outcomes_are_told_apart() -> None:
    assert len(explore(threads.writers, args=(3,)).outcomes) == 3
    assert len(explore(threads.readers, args=(2,)).outcomes) == 4
    assert len(explore(threads.trying).outcomes) == 3


def test_a_spinning_thread_lets_others_go_on() -> None:
    assert explore(threads.spinning).kind == "exhaustive"
    for scheduler in (fifo(), random(1), pct(1)):
        assert not explore(threads.spinning, scheduler=scheduler, schedules=5, steps=200).failed


def _slow() -> tuple[bool, bool, float]:
    """Time passes only where nothing else can happen, and then at once."""
    begin = time.monotonic()
    flag = threading.Event()
    thread = threading.Thread(target=lambda: (time.sleep(50), flag.set()))
    thread.start()
    first = flag.wait(1000)
    thread.join()
    second = threading.Lock().acquire(timeout=5) and threading.Condition().acquire()
    return first, second, time.monotonic() - begin


def test_time_is_the_schedules_own() -> None:
    began = time.monotonic()
    verdict = explore(_slow, reference=(True, True, 50.0), oracles=("values",))
    assert verdict.kind == "exhaustive"
    assert time.monotonic() - began < 20


def _poller() -> None:
    """Woken by nothing but its own time-outs."""
    flag = threading.Event()
    while not flag.wait(0.1):
        pass


def test_a_wait_that_only_ever_times_out_is_a_deadlock() -> None:
    verdict = explore(_poller)
    assert verdict.oracles == {"deadlock"}


def _error_in_a_thread() -> None:
    thread = threading.Thread(target=lambda: 1 // 0)
    thread.start()
    thread.join()


def test_an_exception_in_a_thread_counts() -> None:
    failure = explore(_error_in_a_thread).failure
    assert failure is not None
    assert failure.oracle == "error"
    assert "ZeroDivisionError" in failure.message
    assert "thread T0.1" in failure.message


def _forgotten_pool() -> int:
    return ThreadPoolExecutor(1).submit(lambda: 3).result()


def test_a_pool_that_nobody_shuts_down_ends_with_the_program() -> None:
    assert explore(_forgotten_pool, reference=3).kind == "exhaustive"


#: Shared by all processes: what no schedule determines.
_runs = mmap.mmap(-1, 1)


def _depends_on_what_ran_before() -> None:
    x = Var(0)
    _runs[0] ^= 1
    others = [threading.Thread(target=x.set, args=(i,)) for i in range(1 + _runs[0])]
    for thread in others:
        thread.start()
    x.get()
    for thread in others:
        thread.join()


def test_a_program_that_depends_on_something_else_is_refused() -> None:
    with pytest.raises(NotDeterministic, match="depends on the schedule alone"):
        explore(_depends_on_what_ran_before)


def _shared_containers() -> list[Any]:
    """Different keys do not depend; the length depends on both."""
    table, line, seen = _sync.dict_("table"), _sync.deque_("line"), []

    def put(key: str) -> None:
        table[key] = key

    threads_ = [threading.Thread(target=put, args=(key,)) for key in ("a", "b")]
    for thread in threads_:
        thread.start()
    for thread in threads_:
        thread.join()
    line.append(len(table))
    seen.append(line.popleft() if line else None)
    return [sorted(table.items()), seen]


def test_keys_of_a_dict_are_apart() -> None:
    verdict = explore(_shared_containers, reference=[[("a", "a"), ("b", "b")], [2]])
    assert str(verdict) == "exhaustive(1 schedule)"


@_sync.atomics("state")
class _Flagged:
    def __init__(self) -> None:
        self.state = 0


_flagged = _Flagged()


def _attributes() -> tuple[int, int]:
    """One object of the run, one that was there before."""
    own = _Flagged()

    def change() -> None:
        own.state = 1
        _flagged.state = 1

    thread = threading.Thread(target=change)
    thread.start()
    seen = own.state, _flagged.state
    thread.join()
    return seen


def test_attributes_are_observed() -> None:
    assert len(explore(_attributes).outcomes) == 4


def _tallies() -> dict[str, int]:
    tally = _sync.tally("counts", ("a",))
    workers = [threading.Thread(target=tally.add, args=("a",)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return tally.read()


def test_additions_commute() -> None:
    assert str(explore(_tallies, reference={"a": 2})) == "exhaustive(1 schedule)"


def test_outside_of_an_exploration_the_objects_are_ordinary() -> None:
    with observed():
        lock, flag, table = threading.Lock(), threading.Event(), _sync.dict_("table")
        assert isinstance(lock, Lock)
        worker = threading.Thread(target=flag.wait)
        worker.start()
    assert not lock.acquire(timeout=0.01) if lock.locked() else lock.acquire()
    assert not lock.acquire(timeout=0.01)
    lock.release()
    table["a"] = 1
    assert dict(table) == {"a": 1}
    flag.set()
    worker.join(10)
    assert not worker.is_alive()
    assert threading.Lock is not Lock


def test_controlled_in_this_process() -> None:
    seen = set()
    for seed in range(20):
        with controlled(random(seed)) as conductor:
            seen.add(threads.store_buffer())
        assert len(conductor.steps) > 10
    assert seen == {(0, 1), (1, 0), (1, 1)}
