"""The runtime under every interleaving once more, with a backend whose runs need state of their own."""

from __future__ import annotations

from typing import Any

import pytest

PROGRAMS = "stateful"
RUNTIMES = pytest.mark.parametrize("runtime", ["python", "native"])


# How many schedules are not equivalent; see `test_runtime.py`. Direct calls go through Python in both runtimes: of
# those, the orders of the critical sections of the locks of their pool, and of what builds instances.
@RUNTIMES
@pytest.mark.parametrize(
    ("program", "schedules"),
    [
        ("streams2_threads1_calls3_contexts2", 1),
        ("streams2_threads2_calls2_contexts2", {"python": 70, "native": 8}),
        ("streams2_threads1_calls3_instances1", 1),
        ("streams2_threads1_calls3_instances2", 1),
        ("streams2_threads2_calls2_instances1", 110),
        ("streams2_threads2_calls2_instances2", 70),
        ("streams2_threads2_first_calls_instances1", 18),
        ("streams2_threads1_two_captures", 1),
        ("streams2_threads1_two_calls_in_a_capture", 1),
        ("streams2_threads2_two_captures", 56),
        ("streams2_threads1_direct_call_then_capture", 1),
        ("streams2_threads2_direct_call_beside_a_capture", 1),
    ],
)
def test_every_interleaving(programs: Any, runtime: str, program: str, schedules: int | dict[str, int]) -> None:
    from anabranch.sim import explore

    verdict = explore(getattr(programs, program), args=(runtime,))
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"
    assert verdict.schedules == (schedules if isinstance(schedules, int) else schedules[runtime])
    assert len(verdict.outcomes) == 1


@pytest.mark.parametrize("runtime", ["python", pytest.param("native", marks=pytest.mark.slow)])
def test_three_threads_on_three_streams(programs: Any, runtime: str) -> None:
    from anabranch.sim import explore, random

    program = programs.streams3_threads3_calls2_instances2
    verdict = explore(program, args=(runtime,), scheduler=random(0), schedules=150)
    assert not verdict.failed, verdict.report()
    assert str(verdict) == "bounded(150 schedules, 150)"
