"""The product's own runtime under every interleaving: one shared engine, on streams of many threads."""

from __future__ import annotations

from typing import Any

import pytest

PROGRAMS = "engines"


# How many schedules are not equivalent. Of the Python runtime: the orders of the critical sections of the pool's lock.
# Of the native one: the orders in which the contexts' words change, and of critical sections where no hint helps.
# With one thread, and on the direct path, calls have nothing in common whose order could matter.
@pytest.mark.parametrize("runtime", ["python", "native"])
@pytest.mark.parametrize(
    ("program", "schedules"),
    [
        ("streams2_threads1_calls3_contexts1", {"python": 1, "native": 1}),
        ("streams2_threads1_calls3_contexts2", {"python": 1, "native": 1}),
        ("streams2_threads1_calls3_direct", {"python": 1, "native": 1}),
        ("streams2_threads2_calls2_contexts1", {"python": 28, "native": 582}),
        ("streams2_threads2_calls2_contexts2", {"python": 70, "native": 8}),
        ("streams2_threads2_calls2_direct", {"python": 1, "native": 1}),
        ("streams3_threads3_calls1_contexts2", {"python": 78, "native": 66}),
    ],
)
def test_every_interleaving(programs: Any, runtime: str, program: str, schedules: dict[str, int]) -> None:
    from anabranch.sim import explore

    verdict = explore(getattr(programs, program), args=(runtime,), schedules=5000)
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"
    assert verdict.schedules == schedules[runtime]
    assert len(verdict.outcomes) == 1


@pytest.mark.parametrize("runtime", ["python", "native"])
def test_a_context_for_fewer_threads_than_call(programs: Any, runtime: str) -> None:
    # The waiters' path, with a third thread: who waits is served in the order of coming, and nobody is lost.
    from anabranch.sim import explore

    verdict = explore(programs.streams3_threads3_calls1_contexts1, args=(runtime,), schedules=5000)
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"
    assert verdict.schedules > 1


@pytest.mark.parametrize("runtime", ["python", "native"])
@pytest.mark.parametrize("schedules", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_three_threads_on_three_streams(programs: Any, runtime: str, schedules: int) -> None:
    from anabranch.sim import explore, random

    program = programs.streams3_threads3_calls2_contexts2
    verdict = explore(program, args=(runtime,), scheduler=random(0), schedules=schedules)
    assert not verdict.failed, verdict.report()
    assert str(verdict) == f"bounded({schedules} schedules, {schedules})"
