"""The product's own runtime under every interleaving: one shared engine, on streams of many threads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(scope="module")
def engines() -> Any:
    sys.path.insert(0, str(PROGRAMS))
    import engines

    return engines


# How many schedules are not equivalent: the orders of the critical sections of the pool's lock. With one thread, and on
# the direct path, calls have nothing in common whose order could matter.
@pytest.mark.parametrize(
    ("program", "schedules"),
    [
        ("streams2_threads1_calls3_contexts1", 1),
        ("streams2_threads1_calls3_contexts2", 1),
        ("streams2_threads1_calls3_direct", 1),
        ("streams2_threads2_calls2_contexts1", 28),
        ("streams2_threads2_calls2_contexts2", 70),
        ("streams2_threads2_calls2_direct", 1),
        ("streams3_threads3_calls1_contexts2", 78),
    ],
)
def test_every_interleaving(engines: Any, program: str, schedules: int) -> None:
    from anabranch.sim import explore

    verdict = explore(getattr(engines, program), schedules=5000)
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"
    assert verdict.schedules == schedules
    assert len(verdict.outcomes) == 1


def test_a_context_for_fewer_threads_than_call(engines: Any) -> None:
    # The waiters' path, with a third thread: who waits is served in the order of coming, and nobody is lost.
    from anabranch.sim import explore

    verdict = explore(engines.streams3_threads3_calls1_contexts1, schedules=5000)
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"
    assert verdict.schedules > 1


def test_three_threads_on_three_streams(engines: Any) -> None:
    from anabranch.sim import explore, random

    verdict = explore(engines.streams3_threads3_calls2_contexts2, scheduler=random(0), schedules=5000)
    assert not verdict.failed, verdict.report()
    assert str(verdict) == "bounded(5000 schedules, 5000)"
